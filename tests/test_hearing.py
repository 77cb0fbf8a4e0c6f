"""The states of a kernel's iopub: every event in every state, and what must hold however they follow on each other."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastwire.hearing import DOUBTFUL, HEARD, HELD, TRANSITIONS, Event, Hearing, State

S, E = State, Event


def following(*events: Event) -> Hearing:
    hearing = Hearing()
    for event in events:
        hearing.happens(event)
    return hearing


#: How each state is reached.
WAYS = {
    S.UNHEARD: (),
    S.HEARD: (E.SPOKE,),
    S.BELIEVED: (E.GIVEN_UP,),
    S.LOST: (E.SPOKE, E.BROKE),
    S.RETURNING: (E.SPOKE, E.BROKE, E.SPOKE),
    S.ENDING: (E.RESTART,),
    S.CLOSED: (E.CLOSE,),
}


@pytest.mark.parametrize("event", Event)
@pytest.mark.parametrize("state", State)
def test_every_event_in_every_state(state: State, event: Event) -> None:
    hearing = following(*WAYS[state])
    assert hearing.state is state
    if state is S.ENDING and event is E.STARTED:
        hearing.happens(event)
        assert hearing.state is S.LOST, "another process: nobody has heard it"
        return
    if event is E.STARTED:
        return  # of no restart
    changes: list[State] = []
    hearing.listeners.append(lambda: changes.append(hearing.state))
    hearing.happens(event)
    assert hearing.state is TRANSITIONS[state].get(event, state)
    assert changes == ([hearing.state] if hearing.state is not state else [])
    assert (hearing.held, hearing.doubtful, hearing.heard) == (
        hearing.state in HELD,
        hearing.state in DOUBTFUL,
        hearing.state in HEARD,
    )


def test_the_table_has_every_state_and_leads_everywhere() -> None:
    assert set(TRANSITIONS) == set(State) == set(WAYS)
    assert {after for row in TRANSITIONS.values() for after in row.values()} == set(State) - {S.UNHEARD}
    assert not TRANSITIONS[S.CLOSED]
    assert all(row[E.CLOSE] is S.CLOSED for state, row in TRANSITIONS.items() if state is not S.CLOSED)


def test_nobody_waits_for_ever_and_nobody_is_let_in_unheard() -> None:
    """Who waits waits for something that can happen: the kernel is asked, or a restart ends. And one word on iopub
    lets nobody's held requests go: the kernel may not yet be able to ask."""
    assert set(State) - HEARD - DOUBTFUL == {S.ENDING, S.CLOSED}
    assert all(E.GIVEN_UP in TRANSITIONS[state] for state in DOUBTFUL)
    for state in HELD:
        let_go = {event for event, after in TRANSITIONS[state].items() if after not in HELD | {S.CLOSED}}
        assert let_go <= {E.PROVEN, E.GIVEN_UP}


@given(st.lists(st.sampled_from([each for each in Event if each not in (E.RESTART, E.STARTED, E.CLOSE)])))
def test_what_the_old_process_says_proves_nothing(events: list[Event]) -> None:
    hearing = following(E.SPOKE, E.RESTART, *events)
    assert hearing.state is S.ENDING
    hearing.happens(E.STARTED)
    assert hearing.state is S.LOST


@given(st.lists(st.sampled_from(Event)))
def test_requests_wait_as_long_as_any_restart_is_under_way(events: list[Event]) -> None:
    hearing, restarts = Hearing(), 0
    for event in events:
        if event is E.STARTED and not restarts:
            continue
        restarts += {E.RESTART: 1, E.STARTED: -1}.get(event, 0)
        hearing.happens(event)
        if hearing.state is not S.CLOSED:
            assert (hearing.state is S.ENDING) == (restarts > 0)
