"""`fastwire.turns`: one epoll for many descriptors, and what is to be done once at a turn's end."""

from __future__ import annotations

import asyncio
import os
import resource
import subprocess
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from selectors import EpollSelector
from types import SimpleNamespace
from typing import Any

import pytest
from journal_stage import Disk, batch_of, line

from fastwire import _core
from fastwire.budgets import Budgets
from fastwire.flow import Limits
from fastwire.journal import Journal
from fastwire.turns import Timers, Turns


def run(test: Callable[[Turns], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        await test(Turns.current())

    asyncio.run(main())


class Pipe:
    """A pipe whose reading end notes what it read."""

    def __init__(self, turns: Turns, log: list[Any], name: Any) -> None:
        self.out, self.into = os.pipe()
        self.turns, self.log, self.name = turns, log, name
        turns.watch(self.out, self.read)

    def read(self) -> None:
        os.read(self.out, 100)
        self.log.append(self.name)

    def close(self) -> None:
        self.turns.unwatch(self.out, self.read)
        os.close(self.out)
        os.close(self.into)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_ready_descriptors_are_called_and_the_end_once() -> None:
    async def body(turns: Turns) -> None:
        log: list[Any] = []
        pipes = [Pipe(turns, log, name) for name in range(3)]

        def end() -> None:
            log.append("end")

        read = pipes[0].read
        for pipe in pipes:
            original = pipe.read

            def both(original: Callable[[], None] = original) -> None:
                original()
                turns.at_end(end)

            turns.unwatch(pipe.out, original)
            pipe.read = both
            turns.watch(pipe.out, both)
            os.write(pipe.into, b"x")
        await settle()
        assert sorted(log[:3]) == [0, 1, 2]
        assert log[3:] == ["end"]
        assert read is not pipes[0].read
        for pipe in pipes:
            pipe.close()

    run(body)


def test_a_callback_that_raises_keeps_nobody_from_its_turn() -> None:
    async def body(turns: Turns) -> None:
        log: list[Any] = []
        problems: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
        bad, good = Pipe(turns, log, "bad"), Pipe(turns, log, "good")
        turns.unwatch(bad.out, bad.read)

        def fail() -> None:
            os.read(bad.out, 1)
            raise ValueError("no")

        turns.watch(bad.out, fail)
        for pipe in (bad, good):
            os.write(pipe.into, b"x")
        await settle()
        assert log == ["good"]
        assert [type(problem["exception"]) for problem in problems] == [ValueError]
        turns.unwatch(bad.out, fail)
        good.close()
        os.close(bad.out)
        os.close(bad.into)

    run(body)


def test_a_callback_may_unwatch_another_that_is_ready_in_the_same_turn() -> None:
    async def body(turns: Turns) -> None:
        log: list[Any] = []
        pipes = [Pipe(turns, log, name) for name in "ab"]

        def first_wins(me: Pipe, other: Pipe) -> Callable[[], None]:
            def callback() -> None:
                me.read()
                turns.unwatch(other.out, callbacks[other])

            return callback

        callbacks = {pipes[0]: first_wins(*pipes), pipes[1]: first_wins(pipes[1], pipes[0])}
        for pipe in pipes:
            turns.unwatch(pipe.out, pipe.read)
            turns.watch(pipe.out, callbacks[pipe])
            os.write(pipe.into, b"x")
        await settle()
        assert len(log) == 1
        winner = pipes["ab".index(log[0])]
        turns.unwatch(winner.out, callbacks[winner])
        for pipe in pipes:
            os.close(pipe.out)
            os.close(pipe.into)

    run(body)


def test_a_number_that_was_closed_and_given_to_another_is_left_alone() -> None:
    async def body(turns: Turns) -> None:
        log: list[Any] = []
        gone = Pipe(turns, log, "gone")
        number = gone.out
        os.close(gone.out)
        os.close(gone.into)
        heir = Pipe(turns, log, "heir")
        assert heir.out == number
        turns.unwatch(number, gone.read)
        os.write(heir.into, b"x")
        await settle()
        assert log == ["heir"]
        heir.close()

    run(body)


def test_at_end_outside_a_turn_comes_with_the_loops_next() -> None:
    async def body(turns: Turns) -> None:
        log: list[str] = []

        def end() -> None:
            log.append("end")

        turns.at_end(end)
        turns.at_end(end)
        assert log == []
        await settle()
        assert log == ["end"]

    run(body)


def test_what_is_due_is_done_when_nothing_is_watched_any_more() -> None:
    """Somebody who is not watched here, a connection over TLS, counts on the turn that was to come."""

    async def body(turns: Turns) -> None:
        log: list[str] = []
        pipe = Pipe(turns, log, "a")

        def end() -> None:
            log.append("end")

        turns.at_end(end)
        pipe.close()
        await settle()
        assert log == ["end"]

    run(body)


def test_one_timer_of_the_loop_is_enough_for_all_who_wait() -> None:
    """However often the last of them goes and another comes."""
    timers: list[Any] = []
    poller = _core.Poller(lambda who, error: None, timers.append)
    for _ in range(100):
        wire = _core.Wire(-1, _core.FrameParser(), _core.WriteQueue(), poller, None)
        wire.look_after(1.0)
        assert timers == [None]
        wire.end()
    poller.tick()
    assert timers == [None]
    wire = _core.Wire(-1, _core.FrameParser(), _core.WriteQueue(), poller, None)
    wire.look_after(1.0)
    poller.tick()
    assert timers == [None] * 3
    wire.end()


def test_nobody_is_woken_up_for_who_has_left() -> None:
    async def body(turns: Turns) -> None:
        pipe = Pipe(turns, [], "a")
        wire = _core.Wire(-1, _core.FrameParser(), _core.WriteQueue(), turns.poller, None)

        async def turns_of_a_while() -> int:
            before = turns.poller.turns
            await asyncio.sleep(0.2)
            return turns.poller.turns - before

        usual = await turns_of_a_while()
        wire.look_after(0.05)
        wire.end()
        assert await turns_of_a_while() == usual
        pipe.close()

    run(body)


def test_what_ends_the_loop_leaves_nothing_to_do() -> None:
    """A loop that is closed then can be asked for nothing more, and the epoll is closed all the same."""
    loop = asyncio.new_event_loop()

    def stop() -> None:
        raise KeyboardInterrupt

    async def main() -> tuple[Turns, Pipe]:
        turns = Turns.current()
        pipe = Pipe(turns, [], "a")
        loop.call_soon(turns.at_end, stop)
        return turns, pipe

    turns, pipe = loop.run_until_complete(main())
    with pytest.raises(KeyboardInterrupt):
        loop.run_forever()
    loop.close()
    pipe.close()
    assert turns.poller.fd == -1


def test_turns_have_nobodys_context() -> None:
    """Who watches first would be held as long as anybody watches, and what he has set be seen by others."""
    who: ContextVar[str] = ContextVar("who", default="nobody")

    async def body(turns: Turns) -> None:
        seen: list[str] = []

        class Reading(Pipe):
            def read(self) -> None:
                super().read()
                seen.append(who.get())

        who.set("the first")
        pipe = Reading(turns, [], "a")
        os.write(pipe.into, b"x")
        await settle()
        assert seen == ["nobody"]
        pipe.close()

    run(body)


def test_loops_leave_no_descriptors() -> None:
    async def body(turns: Turns) -> None:
        Pipe(turns, [], "a").close()

    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        run(body)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


#: Each makes one that was never begun, and lets go of it.
NEVER_BEGUN = {
    "a poller without its arguments": "try: _core.Poller()\nexcept TypeError: pass",
    "a poller": "_core.Poller.__new__(_core.Poller)",
    "a poller that is asked": "p = _core.Poller.__new__(_core.Poller); p.turn(); p.end_turn(); p.close(); del p",
    "a stream without its arguments": "try: _core.ZmtpStream()\nexcept TypeError: pass",
    "a stream": "_core.ZmtpStream.__new__(_core.ZmtpStream).close()",
    "a stream that is asked": "s = _core.ZmtpStream.__new__(_core.ZmtpStream); s.feed(b'x'); s.send([b'']); s.renew()\n"
    "assert s.fd == -1",
    "a parser that is asked": "p = _core.FrameParser.__new__(_core.FrameParser); p.feed(b'\\x82\\x80mask'); list(p)",
    "a queue that is asked": "q = _core.WriteQueue.__new__(_core.WriteQueue); q.append_frame(1, b'x'); q.take(3)",
}


@pytest.mark.parametrize("code", NEVER_BEGUN.values(), ids=NEVER_BEGUN)
def test_what_was_never_begun_has_nobodys_descriptor(code: str) -> None:
    """0 is a number of one: the process's input."""
    program = f"import os; from fastwire import _core\n{code}\nfor fd in range(3): os.fstat(fd)"
    ended = subprocess.run([sys.executable, "-c", program], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_what_is_begun_twice_keeps_what_it_has() -> None:
    """Its descriptors are watched, and its callbacks kept, as before."""

    async def body(turns: Turns) -> None:
        log: list[Any] = []
        pipe = Pipe(turns, log, "read")
        fd = turns.poller.fd
        _core.Poller.__init__(turns.poller, turns._report, turns._later)
        assert (turns.poller.fd, len(turns.poller)) == (fd, 1)
        os.write(pipe.into, b"x")
        await settle()
        assert log == ["read"]
        pipe.close()

    run(body)


def test_without_epoll_the_loop_watches_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastwire.turns.select", object())

    async def body(plain: Turns) -> None:
        log: list[Any] = []
        pipe = Pipe(plain, log, "plain")
        turns = plain.poller.turns
        os.write(pipe.into, b"x")
        await settle()
        assert log == ["plain"]
        assert plain.poller.turns > turns, "and the standby reader hears that it goes on"
        turns = plain.poller.turns
        plain.at_end(partial(log.append, "end"))
        await settle()
        assert log == ["plain", "end"]
        assert plain.poller.turns > turns
        pipe.close()

    run(body)


def test_without_epoll_a_round_of_the_loop_is_one_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many are ready in it: to the standby reader a round of many that take their time is one that lasts."""
    monkeypatch.setattr("fastwire.turns.select", object())

    async def body(plain: Turns) -> None:
        seen: list[int] = []
        pipes = [os.pipe() for _ in range(5)]

        def on_readable(end: int) -> None:
            os.read(end, 1)
            seen.append(plain.poller.turns)

        callbacks = {end: partial(on_readable, end) for end, _ in pipes}
        for end, callback in callbacks.items():
            plain.watch(end, callback)
        for again in (1, 2):
            for _, begin in pipes:
                os.write(begin, b"x")
            await settle()
            assert len(seen) == 5 * again
            assert len(set(seen[-5:])) == 1
        assert seen[0] < seen[5]
        for end, callback in callbacks.items():
            plain.unwatch(end, callback)
        for fd in sum(pipes, ()):
            os.close(fd)

    run(body)


def test_of_very_many_that_are_ready_each_has_its_turn_before_one_has_it_twice() -> None:
    """A turn has 256 at most. So who is read in no turn waits for few of them."""
    poller = _core.Poller(lambda who, error: None, lambda callback: None)
    assert poller.open()
    heard: list[int] = []
    out, into = zip(*[os.pipe() for _ in range(600)], strict=True)
    for number, fd in enumerate(out):
        poller.watch(fd, partial(heard.append, number))
    for fd in into:
        os.write(fd, b"x")  # and nobody reads it
    for _ in range(3):
        poller.turn()
    assert len(heard) == 3 * 256
    assert sorted(heard[:600]) == [*range(600)]
    poller.close()
    for fd in (*out, *into):
        os.close(fd)


# -- what ends the loop ------------------------------------------------------------------------------


class Interrupted:
    """A loop that is ended in the middle of a turn, and runs again."""

    def __init__(self) -> None:
        self.asked: list[Callable[[], None] | None] = []
        self.done: list[str] = []
        self.poller = _core.Poller(lambda who, error: None, self.asked.append)

    def go_on(self) -> int:
        """How often it was ended before it had nothing to do."""
        ends = 0
        while self.asked:
            try:
                (self.asked.pop(0) or self.poller.tick)()
            except KeyboardInterrupt:
                ends += 1
        return ends

    def does(self, name: str) -> Callable[[], None]:
        """Once, and is interrupted at the first."""

        def work() -> None:
            self.done.append(name)
            if len(self.done) == 1:
                raise KeyboardInterrupt

        return work

    def wire(self, name: str) -> _core.Wire:
        work = self.does(name)
        owner = SimpleNamespace(flush=work, on_silence=work, on_lost=pytest.fail)
        return _core.Wire(-1, _core.FrameParser(), _core.WriteQueue(), self.poller, owner)


class Side(_core.KernelSide):
    """A kernel whose replies wait for output."""

    def __init__(self, loop: Interrupted, name: str) -> None:
        limits = Limits(spill=False)
        self.journal = Journal(limits, Budgets(limits), Disk())
        self.poller = loop.poller
        self.look = loop.does(name)

    def iopub_is_behind(self) -> bool:
        self.look()
        return False

    def try_later(self) -> None:
        self.look_at_replies()


def test_who_was_to_write_when_the_loop_was_ended_does_when_it_runs_again() -> None:
    loop = Interrupted()
    wires = [loop.wire(name) for name in "abc"]
    for wire in wires:
        wire.schedule()
    assert loop.go_on() == 1
    assert sorted(loop.done) == ["a", "a", "b", "c"], "who was in the middle of it does so again"


def test_what_was_due_at_a_turn_s_end_when_the_loop_was_ended_is_done() -> None:
    loop = Interrupted()
    for name in "abc":
        loop.poller.at_end(loop.does(name))
    assert loop.go_on() == 1
    assert sorted(loop.done) == ["a", "b", "c"]


def test_whose_time_had_come_when_the_loop_was_ended_is_looked_at() -> None:
    loop, selector, ends = Interrupted(), EpollSelector(), 0
    assert loop.poller.open()
    assert loop.poller.take_over(selector)
    for name in "abc":
        wire = loop.wire(name)
        wire.asks = _core.Asking(b"12345678", 1.0, 1.0, 1.0, 1)
        wire.asks.ask(1, 0.0)
        wire.look_after(0.0)
    for _ in range(5):  # as often as it takes, and no time of its own would end it
        if len(loop.done) < 4:
            try:
                loop.poller.select(1.0)
            except KeyboardInterrupt:
                ends += 1
    assert (sorted(loop.done), ends) == (["a", "a", "b", "c"], 1)
    loop.poller.close()
    selector.close()


def test_replies_that_were_to_be_given_when_the_loop_was_ended_are_given() -> None:
    loop = Interrupted()
    given: list[str] = []
    sides = [Side(loop, name) for name in "abc"]
    for side in sides:
        side.after_output(lambda batch: given.append("x"), batch_of(line(1)))
    assert loop.go_on() == 1
    assert len(given) == 3


def test_replies_behind_one_that_ended_the_loop_are_given() -> None:
    loop = Interrupted()
    loop.done.append("looked")
    side = Side(loop, "a")
    given: list[str] = []

    def give(batch: _core.Batch) -> None:
        given.append("x")
        if len(given) == 1:
            raise KeyboardInterrupt

    for _ in range(3):
        side.after_output(give, batch_of(line(1)))
    assert loop.go_on() == 1
    assert len(given) == 4


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    """Those that are open stay so."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_who_comes_when_no_descriptor_is_left_is_watched_all_the_same() -> None:
    """The last one was his own."""

    async def body(turns: Turns) -> None:
        for _ in range(2):  # again when all have gone
            log: list[Any] = []
            first = Pipe(turns, log, "first")
            turns.unwatch(first.out, first.read)
            with no_descriptor_left():
                with pytest.raises(OSError, match="Too many open files"):
                    os.pipe()
                turns.watch(first.out, first.read)
            second = Pipe(turns, log, "second")
            for pipe in first, second:
                os.write(pipe.into, b"x")
            await settle()
            assert sorted(log) == ["first", "second"]
            for pipe in first, second:
                pipe.close()

    run(body)


# -- timers ----------------------------------------------------------------------------------------


def run_timed(body: Callable[[Timers, list[float]], Awaitable[None]]) -> None:
    """On a loop whose clock goes as fast as its timers: no test waits."""

    async def main() -> None:
        loop: Any = asyncio.get_running_loop()
        wakes: list[float] = []
        now = [0.0]
        call_at = loop.call_at

        def at_once(when: float, callback: Callable[..., None], *args: Any, context: Any = None) -> asyncio.TimerHandle:
            def wake() -> None:
                now[0] = max(now[0], when)
                wakes.append(when)
                callback(*args)

            return call_at(0, wake, context=context)

        loop.time, loop.call_at = lambda: now[0], at_once
        try:
            await body(Timers(loop), wakes)
        finally:
            del loop.time, loop.call_at

    asyncio.run(main())


async def all_due(timers: Timers) -> None:
    while timers._count:  # noqa: ASYNC110 - the loop's next turn is all there is to wait for
        await asyncio.sleep(0)


def test_timers_of_one_tick_share_a_wake_up() -> None:
    async def body(timers: Timers, wakes: list[float]) -> None:
        log: list[int] = []
        for number in range(100):
            timers.later(Timers.TICK * (0.1 + 0.008 * number), partial(log.append, number))
        await all_due(timers)
        assert sorted(log) == [*range(100)]
        assert len(wakes) == 1

    run_timed(body)


def test_timers_come_in_their_order_and_not_too_early() -> None:
    async def body(timers: Timers, wakes: list[float]) -> None:
        log: list[float] = []
        delays = [7.5, 0.05, 1.0, 0.1, 30.0, 0.0]
        for delay in delays:
            timers.later(delay, lambda delay=delay: log.append((delay, wakes[-1])))
        await all_due(timers)
        assert [delay for delay, _ in log] == sorted(delays)
        assert all(delay <= when <= delay + Timers.TICK for delay, when in log)

    run_timed(body)


def test_what_is_cancelled_leaves_nothing() -> None:
    """However often: a peer may be the reason."""

    async def body(timers: Timers, wakes: list[float]) -> None:
        for _ in range(10_000):
            timer = timers.later(1.0, pytest.fail)
            timer.cancel()
            timer.cancel()
        assert not timers._slots
        assert not timers._ticks
        kept = timers.later(0.5, lambda: None)
        for _ in range(10_000):
            timers.later(1.0, pytest.fail).cancel()
        assert len(timers._slots) == len(timers._ticks) == 2
        assert timers._count == 1
        kept.cancel()
        await all_due(timers)
        assert wakes == []

    run_timed(body)


def test_timers_may_be_made_and_cancelled_by_those_of_the_same_tick() -> None:
    async def body(timers: Timers, wakes: list[float]) -> None:
        log: list[str] = []
        made: list[Any] = []

        def first_wins(other: int) -> None:
            log.append("one")
            made[other].cancel()
            if len(log) < 5:
                made[:] = [timers.later(0.01, partial(first_wins, 1)), timers.later(0.01, partial(first_wins, 0))]

        made[:] = [timers.later(0.01, partial(first_wins, 1)), timers.later(0.01, partial(first_wins, 0))]
        await all_due(timers)
        assert log == ["one"] * 5
        assert not timers._count

    run_timed(body)


def test_a_timer_that_raises_keeps_none_from_its_turn() -> None:
    async def body(timers: Timers, wakes: list[float]) -> None:
        log: list[str] = []
        problems: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
        timers.later(0.01, [].pop)
        timers.later(0.01, partial(log.append, "good"))
        timers.later(1.0, partial(log.append, "later"))
        await all_due(timers)
        assert log == ["good", "later"]
        assert [type(problem["exception"]) for problem in problems] == [IndexError]

    run_timed(body)
