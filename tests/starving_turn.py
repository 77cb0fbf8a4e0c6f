"""Cases of `starving` in which several objects work together: a loop's turns, a kernel's log, its channels."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from selectors import EpollSelector
from types import SimpleNamespace
from typing import Any

import builders
import zmtp_oracle as peer
from builders import KEY, client_frame
from journal_stage import Disk
from starving_messages import (
    MANY,
    PARTS,
    RUN,
    STATUS,
    Case,
    Kernel,
    batch,
    events,
    idle,
    listed,
    one,
    same,
    shaken,
    signed,
)

from fastwire import _core
from fastwire._core import (
    OP_PONG,
    OP_TEXT,
    PROTOCOL_V1,
    Activity,
    Asking,
    Batch,
    Flight,
    FrameParser,
    Given,
    LogSegment,
    Outlet,
    Poller,
    Signer,
    Source,
    Uplink,
    Wire,
    WriteQueue,
)
from fastwire.budgets import Budgets
from fastwire.channels import Channel, ZmtpChannel
from fastwire.errors import OutOfMemory
from fastwire.flow import Limits
from fastwire.journal import Journal

# -- turn --


class Owner:
    """Whoever a `Wire` tells."""

    def __init__(self) -> None:
        self.silences: list[None] = []
        self.ends: list[object] = []
        self.on_lost = self.ends.append

    def on_silence(self) -> None:
        self.silences.append(None)

    def on_received(self) -> None: ...
    def on_written(self) -> None: ...
    def on_sign_of_life(self) -> None: ...


#: What a loop is asked to call, None for the poller's tick. A list needs memory for the first, a `deque` needs none.
Asked = list[Callable[[], None] | None] | deque[Callable[[], None] | None]


class Turn:
    """A poller whose loop does what it is asked for when it is told to, and two of its connections."""

    def __init__(self, asked: Asked | None = None) -> None:
        self.told: list[object] = []
        self.asked: Asked = [] if asked is None else asked
        self.poller = Poller(self.tell, self.asked.append)
        self.poller.open()
        self.others: list[builders.socket.socket] = []
        self.sockets = [self.pair() for _ in range(2)]
        self.owners = [Owner(), Owner()]
        self.wires = [self.wire(owner, ours) for owner, (ours, _) in zip(self.owners, self.sockets, strict=True)]

    @staticmethod
    def pair() -> tuple[builders.socket.socket, builders.socket.socket]:
        ours, theirs = builders.socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        return ours, theirs

    def more_sockets(self) -> tuple[builders.socket.socket, builders.socket.socket]:
        """Of a kernel; and this is the loop that runs."""
        asyncio._set_running_loop(self)
        pair = self.pair()
        self.others += pair
        return pair

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.asked.append(callback)

    def call_later(self, delay: float, callback: Callable[[], None]) -> None:
        self.asked.append(callback)

    def tell(self, who: object, error: Exception) -> None:
        self.starved = isinstance(error, MemoryError)
        self.told.append(error)

    def telling(self, call: Callable[[], object]) -> None:
        """Raises what it was told of: the turn goes on, and whoever starves it is to know that something failed."""
        self.starved = False
        call()
        if self.starved:
            raise MemoryError

    def wire(self, owner: Owner, ours: builders.socket.socket) -> Wire:
        return Wire(ours.fileno(), FrameParser(), WriteQueue(acknowledge=True), self.poller, owner)

    def go_on(self) -> None:
        """The loop calls what it was asked to."""
        tick = self.poller.tick  # bound before anything is taken off: that needs memory
        while self.asked:
            call = self.asked[0] or tick
            del self.asked[0]
            call()

    def look(self, count: int = 2) -> bool:
        """Until so many connections were looked at; or their owner could not be told, and that was."""
        while (looks := sum(len(owner.silences) for owner in self.owners) + len(self.told)) < count:
            assert self.asked, "nobody will look at them any more"
            self.go_on()
        return looks == count

    def forsaken(self) -> int:
        """How many connections have something to write, which nobody will."""
        self.go_on()
        return sum(wire.queue.pending_bytes > 0 for wire in self.wires)

    def written(self) -> list[bytes]:
        """What each peer has got; all is closed."""
        self.go_on()
        self.poller.close()
        asyncio._set_running_loop(None)
        for each in self.others:
            each.close()
        data = []
        for ours, theirs in self.sockets:
            ours.close()
            with suppress(ConnectionResetError), theirs.makefile("rb") as end:  # what the peer has said was not read
                data.append(end.read())
            theirs.close()
        return data


def turning(
    call: Callable[[Turn], object],
    outcome: Callable[[Turn], object] = lambda _: None,
    *,
    before: Callable[[Turn], object] = same,
    asked: Callable[[], Asked] = list,
) -> Case:
    def case() -> tuple[Any, Any]:
        turn = Turn(asked())
        before(turn)
        # No function is made while there is no memory: CPython 3.12 and 3.13 then let go of its code twice.
        return partial(turn.telling, partial(call, turn)), lambda _: (
            outcome(turn),
            turn.written(),
            [owner.ends for owner in turn.owners],
        )

    return case


def in_the_loops_place(before: Callable[[Turn], object], outcome: Callable[[Turn], object]) -> Case:
    """Where asyncio waits. What is raised there ends the loop, and with it the server."""

    def case() -> tuple[Any, Any]:
        turn, selector = Turn(), EpollSelector()
        assert turn.poller.take_over(selector)
        before(turn)

        def call() -> None:
            try:
                selector.select(0)
            except MemoryError as error:
                raise AssertionError("the loop ends") from error

        def whole(_: object) -> object:
            for _ in range(3):  # as the loop does
                selector.select(0)
            seen = outcome(turn), turn.written(), [owner.ends for owner in turn.owners]
            selector.close()
            return seen

        return lambda: turn.telling(call), whole

    return case


def taken_over(call: Callable[[Turn, EpollSelector], object], *, has_taken_over: bool = False) -> Case:
    """The loop's selector works afterwards, whoever has its place."""

    def case() -> tuple[Any, Any]:
        turn, selector = Turn(), EpollSelector()
        if has_taken_over:
            turn.poller.take_over(selector)

        def outcome(result: object) -> object:
            ours, theirs = turn.sockets[0]
            theirs.send(b"x")
            selector.register(ours, 1)
            ready = len(selector.select(0))
            before = turn.poller.has_taken_over
            turn.written()
            selector.close()
            return result, ready, before

        return lambda: call(turn, selector), outcome

    return case


def reading() -> tuple[Any, Any]:
    """A descriptor is watched, and heard of."""
    turn, heard = Turn(), []
    ours, theirs = turn.sockets[0]
    theirs.send(b"x")

    def callback() -> None:
        heard.append(ours.recv(10))

    def outcome(_: object) -> object:
        turn.poller.turn()
        before = len(turn.poller), turn.poller.unwatch(ours.fileno(), callback)
        theirs.send(b"y")
        turn.poller.turn()
        return before, heard, turn.written()

    return lambda: turn.poller.watch(ours.fileno(), callback), outcome


EVENTS = [(OP_PONG, b"nobody's"), (OP_TEXT, "text")]


def ready(turn: Turn) -> None:
    """Both connections have something to read."""
    for wire, (ours, theirs) in zip(turn.wires, turn.sockets, strict=True):
        wire.hands_out = True
        wire.uplink = Uplink(None, Signer(KEY), Kernel.sockets_of_nobody)
        theirs.send(client_frame(OP_PONG, b"nobody's") + client_frame(OP_TEXT, "text"))
        turn.poller.watch(ours.fileno(), wire)


def received(turn: Turn) -> bool:
    """It is there now; or its connection ends for want of memory."""
    turn.poller.turn()
    return all(events(wire.parser) in (EVENTS, [OutOfMemory]) for wire in turn.wires)


def asking(turn: Turn, tail: float = 0.0) -> None:
    for wire in turn.wires:
        wire.asks = Asking(b"12345678", 0.0, tail, 0.0, 1 << 20)


def silent(turn: Turn, tail: float = 0.0) -> None:
    asking(turn, tail)
    for wire in turn.wires:
        assert wire.asks is not None
        wire.asks.ask(0, 0.0)


def looked_after(turn: Turn, tail: float = 0.0) -> None:
    silent(turn, tail)
    for wire in turn.wires:
        wire.look_after(0.0)


def full(turn: Turn) -> None:
    for wire in turn.wires:
        wire.extend(one().frames(PROTOCOL_V1))


def busy(turn: Turn) -> None:
    """Something to read, to write and to look after."""
    ready(turn)
    full(turn)
    looked_after(turn, tail=3600.0)  # one look each: a machine that stalls would have the next one come, too


def done(turn: Turn) -> object:
    """Each was read, written and looked after; or an owner could not be told, and that was."""
    unsaid = sum(isinstance(error, MemoryError) for error in turn.told)
    silences = sum(len(owner.silences) for owner in turn.owners)
    assert 2 - unsaid <= silences <= 2, (silences, turn.told)
    return all(events(wire.parser) in (EVENTS, [OutOfMemory]) for wire in turn.wires)


def asking_and_full(turn: Turn) -> None:
    asking(turn)
    full(turn)


def at_end() -> tuple[Any, Any]:
    turn, heard = Turn(), []

    def callback() -> None:
        heard.append("end")

    return lambda: turn.poller.at_end(callback), lambda _: (turn.written(), heard)


def ride(turn: Turn) -> None:
    for wire in turn.wires:
        wire.ride()


# -- log --


def log_append() -> tuple[Any, Any]:
    limits = Limits(spill=False, history_limit=0)
    journal = Journal(limits, Budgets(limits), Disk())
    cursor = journal.cursor("")
    cursor.fall_behind(journal.append(idle()))
    new = one()
    return lambda: journal.append(new), lambda entry: (entry.first, entry.end, journal.end, len(journal.open.entries))


class Listener(_core.Outlet):
    """A client that gets what everybody gets."""

    def __init__(self, cursor: Any, wire: Wire, limits: Budgets) -> None:
        self.wire, self.budgets = wire, limits
        self.missed: list[object] = []
        wire.outlet = self

    def could_not_give(self, entry: object, error: Exception) -> None:
        self.missed.append(error)

    def fall_behind(self, entry: Any) -> None:
        self.cursor.fall_behind(entry)

    def pump(self) -> None:
        self.missed.append("behind")


class Said:
    """A log, and two who hear what is said."""

    def __init__(self) -> None:
        limits = Limits(spill=False, history_limit=0)
        budgets = Budgets(limits)
        self.turn = Turn()
        self.journal = Journal(limits, budgets, Disk())
        # Held: CPython 3.13 needs memory to tell who knew an object weakly that it ended, and complains without.
        self.before_anybody = self.journal.user_budget
        self.cursors = [self.journal.cursor(user) for user in "ab"]
        both = zip(self.cursors, self.turn.wires, strict=True)
        self.outlets = [Listener(cursor, wire, budgets) for cursor, wire in both]
        for outlet in self.outlets:
            self.journal.listen(outlet)

        self.entry: Any = None
        self.side: Any = None
        self.source: Any = None

    def once(self, call: Callable[[], object]) -> Callable[[], object]:
        """What was appended is not said again."""
        end = self.journal.end

        def called() -> None:
            try:
                call()
            except MemoryError:
                if self.journal.end == end:
                    raise

        return called

    def heard(self, *hears: bool) -> object:
        """Each got it once, and it is kept until that is known; or it was told."""
        frames = bytes(one().frames(None))
        assert self.journal.end == len(one())
        flights = [len(cursor.flight) for cursor in self.cursors]
        for outlet, flight, data, hear in zip(self.outlets, flights, self.turn.written(), hears, strict=True):
            got = data.startswith(frames)
            assert got + len(outlet.missed) == hear, (data, outlet.missed)
            assert flight == got
        return True


def say() -> tuple[Any, Any]:
    said, new = Said(), one()
    return said.once(lambda: said.journal.say(new)), lambda _: said.heard(True, True)


def tell() -> tuple[Any, Any]:
    said, new = Said(), one()
    return said.once(lambda: said.journal.tell(said.outlets[0], new)), lambda _: said.heard(True, False)


def tell_another() -> tuple[Any, Any]:
    """Who is told differs each time: the segment counts what it has for each."""
    said = Said()
    first, second = said.outlets
    numbers = [outlet.cursor.number for outlet in said.outlets]
    said.journal.tell(first, idle())
    said.journal.say(idle())
    call = said.once(lambda: said.journal.tell(second, idle()))

    def outcome(_: object) -> object:
        entries = said.journal.open.entries
        assert entries is not None
        said.turn.written()
        # Who could not be given it is behind, here for ever: for them, and nobody else, all is kept, and counted.
        behind = [outlet for outlet in said.outlets if not outlet.cursor.is_live]
        assert all("behind" in outlet.missed for outlet in behind)
        assert said.journal.open.counts == (dict.fromkeys([None, *numbers], 1) if behind else {})
        assert (said.journal.budget.used > 0) == bool(behind)
        return [(entry.first, entry.end) for entry in entries]

    return call, outcome


def released() -> tuple[Any, Any]:
    said = Said()
    said.journal.say(one())
    cursor = said.cursors[0]
    end = said.turn.wires[0].queue.queued

    def outcome(_: object) -> object:
        said.turn.written()
        said.journal.settle()  # the next message does: what could not be let go goes then
        return len(cursor.flight), len(said.cursors[1].flight), said.journal.open.memory

    return lambda: cursor.release(end), outcome


def released_by_half() -> tuple[Any, Any]:
    """While the rest is on its way. Without memory it stays, and goes with what comes next."""
    limits = Limits(spill=False)
    journal = Journal(limits, Budgets(limits), Disk())
    cursor, ends = journal.cursor(""), [0]
    for _ in range(8):
        entry = journal.append(batch(*RUN))
        frames = entry.batch.frames(PROTOCOL_V1)
        ends.append(ends[-1] + frames.nbytes)
        cursor.given(entry, ends[-2], ends[-1], frames.ends)
        journal.settle()

    def outcome(_: object) -> object:
        opened = journal.open
        assert opened.memory == sum(entry.memory for entry in opened.entries)
        assert sum(opened.counts.values()) == sum(map(len, opened.entries))
        cursor.release(ends[-1])
        journal.settle()
        kept = journal.front.read(0)
        return len(cursor.flight), opened.entries, [(entry.first, entry.end) for entry in kept], journal.history

    return lambda: cursor.release(ends[5]), outcome


def passing_as_it_is(call: Callable[[Journal, Any], Callable[[], object]]) -> Case:
    """A segment that is too large to be copied is history as it is."""

    def case() -> tuple[Any, Any]:
        limits = Limits(spill=False, history_limit=1 << 30, client_memory_limit=1 << 30)
        journal = Journal(limits, Budgets(limits), Disk())
        cursor = journal.cursor("")
        for parts in ([*PARTS[:3], b'{"name": "stdout", "text": "%s"}' % (b"x" * (5 << 20))], PARTS):
            entry = journal.append(batch(parts))
            cursor.given(entry, entry.first, entry.end, entry.batch.frames(PROTOCOL_V1).ends)
            journal.settle()

        def outcome(_: object) -> object:
            passed = []
            segment = journal.front
            while segment is not journal.needed:
                passed.append(segment.nbytes)
                segment = segment.next
            return journal.history == sum(passed)

        return call(journal, cursor), outcome

    return case


def keeping() -> tuple[Any, Any]:
    """What everybody has is kept once, in order, and can go when others need its room."""
    limits = Limits(spill=False)
    journal = Journal(limits, Budgets(limits), Disk())
    journal.append(batch(*RUN))

    def outcome(_: object) -> object:
        entries = journal.front.read(0)
        assert journal in journal.budget.histories
        return [(entry.first, entry.end, listed(entry.batch)) for entry in entries], journal.history

    return lambda: journal.keep(journal.open), outcome


def kept(call: Callable[[Journal], object]) -> Case:
    """Something that is done with a log in which a run is kept."""

    def case() -> tuple[Any, Any]:
        limits = Limits(spill=False)
        journal = Journal(limits, Budgets(limits), Disk())
        journal.say(batch(*RUN))
        assert journal.history
        return lambda: call(journal), lambda result: (result, journal.history)

    return case


def questions() -> Asking:
    return Asking(b"12345678", 0.0, 0.0, 0.0, 1)


def given() -> Given:
    return Given(10, 0, one().frames(None).ends, 0, None, LogSegment())


def flying(call: Callable[[Flight], object]) -> Case:
    def case() -> tuple[Any, Any]:
        flight = Flight()
        flight.add(given())
        return lambda: call(flight), lambda _: len(flight)

    return case


def logged(call: Callable[[Said], object]) -> Case:
    """Something that is done with a log of one entry, which one client has not got yet: what comes next is heard by who
    listens, and the log has its bytes or, once nobody needs them, none."""

    def case() -> tuple[Any, Any]:
        said = Said()
        said.cursors[1].fall_behind(said.journal.append(idle()))
        assert said.journal.open.entries is not None
        said.entry, said.side = said.journal.open.entries[0], Side(said)
        said.source = Source(shaken("SUB"), said.turn.poller, said)

        def outcome(result: object) -> object:
            said.journal.say(one())
            frames = bytes(one().frames(None))
            heard = [frames in data for data in said.turn.written()]
            entries = said.journal.open.entries or []
            return result, heard, said.journal.end, sum(entry.memory for entry in entries) - said.journal.open.memory

        return lambda: call(said), outcome

    return case


class Side(_core.KernelSide):
    def __init__(self, said: Said) -> None:
        self.journal, self.poller = said.journal, said.turn.poller
        self.activity = Activity([])
        self.budgets = said.outlets[0].budgets
        self.iopub: Channel | None = None

    def iopub_is_behind(self) -> bool:
        return self.iopub is not None and self.iopub.has_more()

    def iopub_waits(self) -> bool:
        return self.iopub is not None and self.iopub.waits

    def try_later(self) -> None:
        self.poller.at_end(self.look_at_replies)


def replying(call: Callable[[Side, Callable[[], None]], object], *, before: bool = False) -> Case:
    """A reply that waits, or is to wait, for its output is given once."""

    def case() -> tuple[Any, Any]:
        side, batch = Side(Said()), one()
        given: list[Batch] = []

        def hold() -> None:
            side.after_output(given.append, batch)

        if before:
            hold()

        def outcome(result: object) -> object:
            side.give_replies()
            return result, len(given)

        return lambda: call(side, hold), outcome

    return case


def hear() -> tuple[Any, Any]:
    said = Said()
    side = Side(said)
    side.on_iopub(idle())

    def outcome(_: object) -> object:
        headers, new = side.last_headers, one().headers(len(one()) - 1)
        assert headers in (idle().headers(0), new)
        frames = bytes(one().frames(None))
        written = said.turn.written()
        got = [frames in data or bool(each.missed) for data, each in zip(written, said.outlets, strict=True)]
        return got, said.journal.end

    return said.once(lambda: side.on_iopub(one())), outcome


class Heard(ZmtpChannel):
    """A channel whose connection is there, and whose loop is a `Turn`."""

    def __init__(self, name: str, said: Said, side: Side, outlet: Outlet | None) -> None:
        ours, theirs = said.turn.more_sockets()
        stream = shaken("SUB" if name == "iopub" else "DEALER")
        stream.attach(ours.fileno())
        source = Source(stream, said.turn.poller, self)
        source.was_ready = True

        def receive(signer: Signer, most_bytes: int, *, permissive: bool) -> Batch | None:
            return stream.drain(stream.fd, name, signer, max_bytes=most_bytes, permissive=permissive)

        self._link: Any = SimpleNamespace(
            source=source, stream=stream, closed=False, settle=lambda **_: None, drain=receive, rest=lambda **_: None
        )
        on_batch = side.on_iopub if outlet is None else partial(said.journal.tell, outlet)
        Channel.__init__(self, name, Signer(KEY), on_batch, after=side.look_at_replies)
        if outlet is None:
            side.iopub = self
        else:
            self.behind = side.after_output
        self.peer, self.source = theirs, source
        self.pass_to(side, outlet)
        said.turn.poller.watch(ours.fileno(), source)


def in_order(data: bytes, pieces: Sequence[bytes]) -> bool:
    places = [data.find(piece) for piece in pieces]
    return places == sorted(places) and -1 not in places


def passing(*replies: Sequence[bytes]) -> Case:
    """What a kernel says on iopub, and its replies to the first of two clients, on their way through a turn."""

    def case() -> tuple[Any, Any]:
        said = Said()
        kernel = Side(said)
        iopub = Heard("iopub", said, kernel, None)
        channels = [iopub]
        if replies:
            channels.append(Heard("shell", said, kernel, said.outlets[0]))
        for each in PARTS, STATUS, *MANY[:2]:
            iopub.peer.send(peer.multipart(signed(each)))
        for each in replies:
            channels[1].peer.send(peer.multipart(signed(each)))

        def outcome(_: object) -> object:
            for channel in channels[::-1]:  # whatever was kept is passed on when something comes, at the latest
                channel.peer.send(peer.multipart(signed(MANY[2])))
            said.turn.poller.turn()
            said.turn.go_on()
            for channel in channels:
                channel.source.end()
                channel.source.stream.close()
            output = [bytes(batch(each).frames(None)) for each in (PARTS, STATUS, *MANY[:3])]
            answers = [bytes(batch(each, channel="shell").frames(None)) for each in (*replies, MANY[2])]
            for outlet, data, more in zip(
                said.outlets, said.turn.written(), (answers * bool(replies), []), strict=True
            ):
                if not outlet.missed:
                    assert in_order(data, output)
                    assert in_order(data, output[:4] + more), "a reply is behind its output"
                    assert len(data) == len(b"".join(output + more)), "each once"
            return said.journal.end

        return lambda: said.turn.telling(said.turn.poller.turn), outcome

    return case
