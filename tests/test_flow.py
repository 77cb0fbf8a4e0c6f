"""Decisions without sockets or clock."""

import dataclasses
import gc

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fastwire.flow import (
    Acknowledgements,
    Attempts,
    Limits,
    OutputRate,
    OutputRates,
    Questions,
    Rate,
    Slice,
    resume_time,
    too_many,
)

PATIENCE = Acknowledgements.PATIENCE
LONG = Attempts.LEAST


def test_a_client_that_said_goodbye_is_waited_for_briefly() -> None:
    assert resume_time(Limits(resume_timeout=50.0, resume_timeout_closed=7.0), closed=True) == 7.0


def test_a_client_whose_connection_broke_is_waited_for_longer() -> None:
    assert resume_time(Limits(resume_timeout=50.0, resume_timeout_closed=7.0), closed=False) == 50.0
    assert resume_time(Limits(), closed=False) > resume_time(Limits(), closed=True)


def test_a_question_is_answered_by_what_is_said_after_it() -> None:
    questions = Questions()
    questions.look(0, 10)  # before one with the number 10
    assert questions.answered == 0
    questions.look(1, 20)
    assert questions.answered == 20
    questions.look(1, 30)  # nothing was said since
    assert questions.answered == 20


def test_who_answers_before_it_is_asked_has_not_answered() -> None:
    questions = Questions()
    questions.look(3, 10)
    questions.look(3, 11)
    assert questions.answered == 10


def test_a_client_that_says_a_message_is_too_long_is_believed_at_once() -> None:
    attempts = Attempts()
    assert attempts.ended(7, too_long=True, answers=False, longest=LONG)
    assert not attempts.ended(None, too_long=True, answers=False, longest=LONG), "it has everything"


def test_three_attempts_that_end_at_the_same_place_are_believed() -> None:
    attempts = Attempts()
    believed = [attempts.ended(place, too_long=False, answers=True, longest=LONG) for place in (7, 7, 8, 8, 8, 8, 8, 8)]
    assert believed == [False, False, False, False, True, False, False, True]
    places = (9, 9, None, 9, 9)
    assert not any(attempts.ended(place, too_long=False, answers=True, longest=LONG) for place in places)


def test_a_short_message_is_no_reason_unless_its_client_says_so() -> None:
    attempts = Attempts()
    assert not any(attempts.ended(7, too_long=False, answers=True, longest=LONG - 1) for _ in range(9))
    assert attempts.ended(7, too_long=True, answers=True, longest=10)


def test_who_never_answered_may_have_had_it_each_time() -> None:
    attempts = Attempts()
    assert not any(attempts.ended(7, too_long=False, answers=False, longest=LONG) for _ in range(9))
    assert attempts.ended(7, too_long=False, answers=True, longest=LONG), "it has missed enough"
    later = [attempts.ended(7, too_long=False, answers=False, longest=LONG) for _ in range(3)]
    assert later == [False, False, True], "it has answered before"


def test_an_attempt_without_progress_is_known() -> None:
    attempts = Attempts()
    progress = []
    for place in (7, 7, 8, None, None, 9, 9):
        attempts.ended(place, too_long=False, answers=True, longest=LONG)
        progress.append(attempts.has_progressed)
    assert progress == [True, False, True, True, True, True, False]


def test_limits_do_not_change_under_those_who_share_them() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Limits().high_water = 1


NUMBERS = [field.name for field in dataclasses.fields(Limits) if type(field.default) in (int, float)]


@pytest.mark.parametrize("field", NUMBERS)
def test_every_limit_is_a_bound_by_default(field: str) -> None:
    assert 1e-9 <= getattr(Limits(), field) < float("inf")


def test_a_socket_is_given_less_than_a_session_may_keep() -> None:
    """What waits in a socket cannot be spelled again for the next one: most of it has to be in the log."""
    assert Limits().high_water < Limits().client_memory_limit < Limits().total_memory_limit


def test_a_rate_is_an_average_with_bursts() -> None:
    rate = Rate(10.0)
    assert not rate.exceeded(100, 1000.0), "a whole window at once"
    assert rate.exceeded(1, 1000.0)
    rate = Rate(10.0)
    assert not any(rate.exceeded(10, float(second)) for second in range(1000))
    rate = Rate(10.0)
    found = [second for second in range(100) if rate.exceeded(12, float(second))]
    assert 40 < found[0] < 60, "a fifth more than allowed fills the bucket in some 50 seconds"


def test_a_rate_forgets_what_was_long_ago() -> None:
    rate = Rate(10.0)
    rate.exceeded(100, 5.0)
    assert not rate.exceeded(100, 15.0)
    assert rate.exceeded(1, 15.0)


@pytest.mark.parametrize(
    ("of_kernel", "of_user", "why"),
    [(1, 2, None), (2, 0, "kernel has 2"), (0, 3, "user has 3"), (2, 3, "kernel has 2")],
)
def test_clients_that_are_one_too_many(of_kernel: int, of_user: int, why: str | None) -> None:
    refusal = too_many(Limits(clients_per_kernel=2, clients_per_user=3), of_kernel, of_user)
    assert refusal is why is None or why in refusal


#: Seconds after which something becomes due.
TIMES = (Acknowledgements.INTERVAL, Acknowledgements.DELAY, Acknowledgements.TAIL)


class Acknowledging(RuleBasedStateMachine):
    """Pings and pongs in flight, against the positions they stand for."""

    def __init__(self) -> None:
        super().__init__()
        self.acknowledgements = Acknowledgements()
        self.written = 0
        self.asked = 0
        self.in_flight: bytes | None = None
        self.old: list[bytes] = []
        self.received = 0
        self.now = 0.0
        self.since: float | None = None
        self.again = 0.0

    def due(self, delay: float) -> float:
        assert self.since is not None
        if not self.old:
            return 0.0
        is_much = self.written - self.received >= Acknowledgements.MUCH
        return self.again if is_much else self.since + delay

    @rule(seconds=st.sampled_from(TIMES) | st.floats(0.0, Acknowledgements.TAIL))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(size=st.integers(1, 100) | st.just(Acknowledgements.MUCH))
    def write(self, size: int) -> None:
        self.written += size
        wanted = self.acknowledgements.wanted(self.written, self.now)
        if self.since is None:
            self.since = self.now
        due = self.due(Acknowledgements.DELAY)
        assert wanted == (self.in_flight is None and self.now >= due)
        if wanted:
            self.ask()

    @rule()
    def look(self) -> None:
        """What `Wire.on_time` does."""
        wait = self.acknowledgements.wait(self.written, self.now)
        if self.in_flight is not None or self.written == self.asked:
            assert wait is None
            return
        assert wait == max(self.due(Acknowledgements.TAIL) - self.now, 0.0)
        if wait == 0.0:
            assert self.acknowledgements.wanted(self.written, self.now), "it would ride, too"
            self.ask()

    def ask(self) -> None:
        self.in_flight = self.acknowledgements.ask(self.written, self.now)
        self.asked = self.written
        self.since, self.again = None, self.now + Acknowledgements.INTERVAL
        assert len(self.in_flight) <= 125
        assert self.in_flight not in self.old

    @precondition(lambda self: self.in_flight)
    @rule(written=st.integers(0, 100))
    def pong_too_early(self, written: int) -> None:
        """Of one who can count: not a byte of the ping was written."""
        assert not self.acknowledgements.answer(self.in_flight, max(self.asked - written, 0))

    @precondition(lambda self: self.in_flight)
    @rule()
    def pong(self) -> None:
        assert self.acknowledgements.answer(self.in_flight, self.asked + 1)
        self.old.append(self.in_flight)
        self.in_flight = None
        self.received = self.asked

    @rule(payload=st.binary(max_size=20))
    def another_pong(self, payload: bytes) -> None:
        """Unsolicited, or to another's ping."""
        assert not self.acknowledgements.answer(payload, self.written + 1)

    @precondition(lambda self: self.old)
    @rule(data=st.data())
    def old_pong(self, data: st.DataObject) -> None:
        assert not self.acknowledgements.answer(data.draw(st.sampled_from(self.old)), self.written + 1)

    @invariant()
    def what_is_acknowledged_was_answered(self) -> None:
        assert self.acknowledgements.position == self.received
        assert self.acknowledgements.outstanding == (self.in_flight is not None)


TestAcknowledging = Acknowledging.TestCase


def asked() -> Acknowledgements:
    acknowledgements = Acknowledgements()
    acknowledgements.ask(100, 0.0)
    return acknowledgements


def test_who_never_answers_is_believed_after_a_while() -> None:
    acknowledgements = asked()
    acknowledgements.look(0.0, 101, waits=True)
    acknowledgements.look(PATIENCE - 1, 102, waits=True)
    acknowledgements.look(PATIENCE, 102, waits=True)
    assert not acknowledgements.demoted, "it takes nothing either"
    acknowledgements.look(2 * PATIENCE, 103, waits=True)
    assert acknowledgements.demoted
    assert not acknowledgements.wanted(1000, 1e9), "asked no more"


def test_who_has_everything_and_is_silent_is_believed_too() -> None:
    """Nothing moves any more: it has been given all it may be given."""
    acknowledgements = asked()
    acknowledgements.look(0.0, 101, waits=False)
    acknowledgements.look(PATIENCE, 101, waits=False)
    assert acknowledgements.demoted


def test_who_would_have_to_wait_for_nothing_is_believed_sooner() -> None:
    acknowledgements = asked()
    acknowledgements.look(0.0, 101, waits=False, held=True)
    acknowledgements.look(Acknowledgements.HELD_PATIENCE, 101, waits=False)
    assert not acknowledgements.demoted, "nothing is kept back any more"
    acknowledgements.look(Acknowledgements.HELD_PATIENCE, 101, waits=True, held=True)
    assert not acknowledgements.demoted, "it takes nothing either"
    acknowledgements.look(Acknowledgements.HELD_PATIENCE, 101, waits=False, held=True)
    assert acknowledgements.demoted


def test_who_answers_in_the_end_is_asked_again() -> None:
    acknowledgements = Acknowledgements()
    ping = acknowledgements.ask(100, 0.0)
    for now, taken in (0.0, 101), (PATIENCE, 102):
        acknowledgements.look(now, taken, waits=True)
    assert acknowledgements.demoted
    assert acknowledgements.answer(ping, 102)
    assert not acknowledgements.demoted
    acknowledgements.ask(200, 0.0)
    for now, taken in (2 * PATIENCE, 201), (4 * PATIENCE, 202):
        acknowledgements.look(now, taken, waits=True)
    assert not acknowledgements.demoted, "who has answered before is only slow"


@pytest.mark.parametrize("taken", [1, 100])
def test_a_ping_that_is_not_there_cannot_be_answered(taken: int) -> None:
    acknowledgements = asked()
    acknowledgements.look(0.0, taken - 1, waits=True)
    acknowledgements.look(2 * PATIENCE, taken, waits=True)
    assert not acknowledgements.demoted


def test_who_is_not_read_cannot_answer() -> None:
    acknowledgements = asked()
    acknowledgements.look(0.0, 101, waits=True)
    acknowledgements.pause()
    acknowledgements.look(PATIENCE, 102, waits=True)
    assert not acknowledgements.demoted


# -- the rate of output ----------------------------------------------------------------------------

#: One slice a second, so that an exact window can be the oracle.
WINDOW = float(OutputRate.SLICES)


class ExactRate:
    """One request: every message that passed, with its time."""

    def __init__(self, messages: float, nbytes: float) -> None:
        self.limits = messages, nbytes
        self.exceeded = [False, False]
        self.passed: list[tuple[float, int]] = []

    def judge(self, nbytes: int, now: float) -> str | None:
        self.passed = [(then, size) for then, size in self.passed if now < then + WINDOW]
        rates = (len(self.passed) + 1) / WINDOW, (sum(size for _, size in self.passed) + nbytes) / WINDOW
        told = ""
        for index, (name, limit, rate) in enumerate(zip(("message", "data"), self.limits, rates, strict=True)):
            if limit > 0 and rate > limit:
                told = told if self.exceeded[index] else name
                self.exceeded[index] = True
            elif rate <= 0.8 * limit:
                self.exceeded[index] = False
        if any(self.exceeded):
            return told
        self.passed.append((now, nbytes))
        return None


said_of_requests = st.tuples(
    st.sampled_from(["a", "b", "c", None]), st.sampled_from([0, 1, 40, None]), st.sampled_from([0, 0, 1, 3, 40])
)


@example(0.25, 0.0, [("a", 0, 0)] * 20 + [("b", 0, 0)])
@given(st.sampled_from([0.0, 0.25]), st.sampled_from([0.0, 4.0]), st.lists(said_of_requests, max_size=120))
def test_the_rate_of_each_request_is_its_own(
    messages: float, nbytes: float, said: list[tuple[str | None, int | None, int]]
) -> None:
    """Several at a time, each ended by its own end, or by one that belongs to none."""
    rates = OutputRates(messages, nbytes, WINDOW)
    exact: dict[str | None, ExactRate] = {}
    now = 0.0
    for request, size, seconds in said:
        now += seconds
        if size is not None:
            expected = exact.setdefault(request, ExactRate(messages, nbytes)).judge(size, now)
            assert rates.judge(request, size, now) == expected
            continue
        rates.ended(request)
        exact = {key: rate for key, rate in exact.items() if request is not None and key != request}


def test_requests_without_an_end_take_no_more_memory() -> None:
    """Beyond a number they have one limit together, which none of their ends begins anew; it is their own again when
    the others have said nothing for as long as counts."""
    rates = OutputRates(1.0, 0.0, WINDOW)
    for number in range(50_000):
        rates.judge(number % 5000, 10, number / 1000)
    assert sum(type(each) is Slice for each in gc.get_objects()) <= (rates.MOST + 1) * (OutputRate.SLICES + 1)
    rates = OutputRates(1.0, 0.0, WINDOW)
    assert not any(rates.judge(number, 10, 0.0) for number in range(rates.MOST))
    together = [rates.judge(number, 10, 0.0) for number in range(1000, 1100)]
    assert together == [None] * 32 + ["message"] + [""] * 67
    rates.ended(1000)
    assert rates.judge(1000, 10, 0.0) == ""
    assert rates.judge(1000, 10, WINDOW) is None
