"""The way to a connection's end, walked: every state, whatever happens in it."""

import re
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastwire.closing import TRANSITIONS, Closing, Happened, State


def at(state: State) -> Closing:
    closing = Closing()
    closing.state = state
    return closing


@pytest.mark.parametrize(("state", "happened"), [*product(State, Happened)], ids=lambda each: each.name)
def test_every_pair_leads_where_the_table_says_or_nowhere(state: State, happened: Happened) -> None:
    closing = at(state)
    after = closing.take(happened)
    assert after == TRANSITIONS.get((state, happened))
    assert closing.state is (after or state)


def test_every_state_is_reached_and_left() -> None:
    reached = {State.OPEN, *TRANSITIONS.values()}
    left = {state for state, _ in TRANSITIONS}
    assert reached == set(State)
    assert left == {state for state in State if not state.is_over}


@pytest.mark.parametrize("state", [state for state in State if not state.is_over])
def test_tcp_may_end_at_any_time(state: State) -> None:
    assert at(state).take(Happened.TCP_OVER) is State.LOST


@pytest.mark.parametrize("before", [*TRANSITIONS])
def test_there_is_no_way_back(before: tuple[State, Happened]) -> None:
    """Who has said his last frame says no other: not a state later either."""
    state, after = before[0], TRANSITIONS[before]
    assert after.we_are_done >= state.we_are_done
    assert after.peer_is_done >= state.peer_is_done
    assert list(State).index(after) > list(State).index(state)


@given(st.lists(st.sampled_from(Happened)))
def test_who_closed_first(what: list[Happened]) -> None:
    """Against the plainest account there is: the first of the things that close."""
    closing = Closing()
    for happened in what:
        closing.take(happened)
    closers = [each for each in what if each is not Happened.ALL_WRITTEN]
    assert closing.closed_by_peer == (closers[:1] == [Happened.PEER_CLOSES])


def test_each_state_has_its_section() -> None:
    for state in State:
        assert re.fullmatch(r"RFC (6455|9293) section [\d.]+", state.source), state
