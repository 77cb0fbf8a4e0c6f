"""One kernel's ZMQ sockets to many clients and back, in batches.

A `KernelRelay` owns the one iopub subscription of a kernel. A `Session` owns a client's shell, control and stdin
channels; it lives as long as the client may come back, however many WebSockets that takes. Kernel to client: Channel ->
Journal -> Downlink -> Connection; client to kernel: Connection -> Uplink.

This room knows no jupyter_server: where the kernel is comes from a callable, messages are bytes.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import zmq

from fastwire._core import (
    OP_BINARY,
    OP_TEXT,
    Activity,
    Batch,
    FrameParser,
    KernelSide,
    Signer,
    Uplink,
    indices_of_types,
)
from fastwire.budgets import Budgets
from fastwire.channels import NO_MEMORY_PAUSE, Channel, ZmqChannel, ZmtpChannel
from fastwire.charge import Charge, Deadline
from fastwire.disk import Disk
from fastwire.downlink import Downlink
from fastwire.errors import FastwireError, MessageError, SocketClosed
from fastwire.events import note
from fastwire.flow import Limits, resume_time
from fastwire.hearing import Event, Hearing
from fastwire.identities import Identities
from fastwire.journal import Journal
from fastwire.notices import NOBODY, Neighbour, local_batch, notice
from fastwire.tombstones import LATE, TOO_MANY, TOO_MUCH, Tombstone, Tombstones
from fastwire.turns import Turns
from fastwire.websocket import Connection
from fastwire.zmtp import Address

__all__ = ["KernelRelay", "Session", "open_relays"]

log = logging.getLogger(__name__)

CLIENT_CHANNELS = ("shell", "control", "stdin")

#: Characters of a session's id that are shown to people; of a longer one a few.
LONGEST_NAME = 16

#: Seconds that a kernel has to connect a stdin socket.
STDIN_PATIENCE = 5.0

#: Times that a kernel is not read while memory is almost full and the disk is at work; what it says meanwhile is taken
#: aside, or waits in its sockets. Seconds between two looks at what has to wait.
DISK_PATIENCE, PAUSE = 100, 0.001

#: Seconds that a client is away before its sockets are closed, if nothing is to come on them: pages reload.
REST_AFTER = 1.0

#: ``open_socket(channel, identity)`` connects a ZMQ socket to the kernel, or says where it listens.
OpenSocket = Callable[[str, bytes | None], "zmq.Socket[bytes] | Address"]

#: ``callback(batch, indices)``
Listener = Callable[[Batch, list[int]], None]

#: The audience of what no client gets.
NO_CLIENT = 0


class KernelRelay(KernelSide):
    """One kernel: its iopub subscription and its clients' sessions.

    ``observers`` are called with what `activity` says of what came on iopub, after half a second and then every two
    while something comes; `tell_observers` calls them now.
    ``on_rejected(channel, error)`` hears once of each kind of error for which messages were refused. ``on_doubt`` is
    called when iopub may not be heard any more, and requests wait until whoever it is has told `hearing` otherwise;
    without it they never do. ``name`` is what people call the kernel.

    Large, because whoever connects, breaks, comes back, ends or moves does so here, in an order that all sessions
    share; what is kept, whether the kernel is heard and what waits for it are objects of their own.
    """

    def __init__(
        self,
        open_socket: OpenSocket,
        signer: Signer,
        *,
        limits: Limits | None = None,
        budgets: Budgets | None = None,
        permissive: bool = False,
        on_rejected: Callable[[str, MessageError], None] | None = None,
        on_doubt: Callable[[], None] | None = None,
        name: str = "",
    ) -> None:
        self.name = name
        self.limits = limits or Limits()
        self.budgets = budgets or Budgets(self.limits)
        self.journal = Journal(self.limits, self.budgets, Disk.current())
        self.journal.on_drop = self._on_drop
        self.signer = signer
        self.sessions: dict[str, Session] = {}
        #: What is left of those that ended although their clients may come back.
        self.tombstones = Tombstones()
        self.identities = Identities()
        #: What the kernel is doing. Who knows of message types that do not count sets another before it is opened.
        self.activity = Activity(())
        self.endpoint: object = None
        self.is_closed = False
        self._open_socket = open_socket
        self._permissive = permissive
        self._on_rejected = on_rejected
        self._on_doubt = on_doubt
        #: The kernel speaks nothing that we do: `OpenSocket` is to connect ZMQ sockets.
        self.foreign = False
        self._causes: set[type[MessageError]] = set()
        self._announced: list[Batch] = []
        self.rejected = 0
        self.iopub: Channel | None = None
        #: Whether iopub is heard, and whether requests wait for that.
        self.hearing = Hearing()
        self.hearing.listeners.append(self._on_hearing)
        self.needs_a_word = self.hearing.needs_a_word
        self.poller = Turns.current().poller
        #: Called when all sockets are made anew although the kernel has not moved.
        self.on_anew: Callable[[], None] = lambda: None
        #: Nobody waits a second time for a kernel that does not listen on stdin.
        self.listens_on_stdin = True

    # -- sockets --

    def open(self, endpoint: object = None, signer: Signer | None = None) -> None:
        """Subscribe to the kernel, once. ``endpoint`` is whatever tells where it listens: when that is not what it was
        last time, every socket is made anew. ``signer`` is that of sockets that are made now."""
        moved = self.endpoint != endpoint
        if moved:
            self.drain_iopub()
        open_relays.add(self)
        if moved or self.iopub is None or self.iopub.closed:
            self._close_iopub()
            self.signer = signer or self.signer
            self._open_iopub()
            self._lose()
        self.endpoint = endpoint
        if moved:
            for session in list(self.sessions.values()):
                session.follow()

    def _open_iopub(self) -> None:
        try:
            self.iopub = self.channel(
                "iopub", None, self.on_iopub, before=self.journal.is_pressed, after=self.look_at_replies
            )
            self.iopub.pass_to(self)
            self.iopub.patience, self.iopub.pause = DISK_PATIENCE, PAUSE
            if self._on_doubt is not None:
                self.iopub.watch(self.doubt)
        except Exception as error:
            self._close_iopub()
            for session in list(self.sessions.values()):
                session.stay_behind(error)
            raise

    def channel(
        self,
        name: str,
        identity: bytes | None,
        on_batch: Callable[[Batch], None],
        *,
        on_faulty: Callable[[Batch], None] | None = None,
        **options: Any,
    ) -> Channel:
        """A socket of this kernel on the loop; ``options`` are a `Channel`'s."""

        def refused(batch: Batch) -> None:
            self._reject(batch)
            if on_faulty is not None:
                on_faulty(batch)

        options |= {"on_faulty": refused, "permissive": self._permissive, "most_bytes": lambda: self.budgets.turn}
        opened = self._open_socket(name, identity)
        channel: Channel
        if isinstance(opened, Address):
            channel = ZmtpChannel(name, opened, identity, self.signer, on_batch, self._on_foreign, **options)
            channel.socket.charge(self.journal.budget)
        else:
            channel = ZmqChannel(name, opened, self.signer, on_batch, **options)
        channel.traffic = self.traffic
        return channel

    @property
    def path(self) -> str:
        """Who speaks to the kernel: "zmtp" is this process itself, "libzmq" its library."""
        return self.iopub.path if self.iopub is not None else ""

    def _on_foreign(self) -> None:
        """The kernel speaks ZMTP 2, or something else that is libzmq's: all its sockets are made anew."""
        if not self.foreign:
            self.foreign = True
            log.info("kernel %s is left to libzmq: it does not greet as ZMTP 3 does", self.name)
            asyncio.get_running_loop().call_soon(self._make_anew)

    def _make_anew(self) -> None:
        self.drain_iopub()
        if self.iopub is None:  # or it was closed by who heard that
            return
        self._close_iopub()
        self._open_iopub()
        self._lose()
        for session in list(self.sessions.values()):
            session.follow()
        self.on_anew()

    def channels(
        self, names: Iterable[str], identity: bytes | None, on_batch: Callable[[Batch], None], **options: Any
    ) -> list[Channel]:
        """All of them or, when one cannot be opened, none. What comes on them does not overtake iopub."""
        opened: list[Channel] = []
        try:
            opened.extend(self.channel(name, identity, on_batch, before=self.holds_enough, **options) for name in names)
        except BaseException:
            for channel in opened:
                channel.close()
            raise
        for channel in opened:
            channel.behind, channel.pause = self.after_output, PAUSE
        return opened

    def _reject(self, batch: Batch) -> None:
        self.rejected += batch.rejected_count
        if batch.rejected_count:
            note("refused", f"messages on {batch.channel} are refused: {batch.rejected[0]}", kernel=self.name)
        for error in batch.rejected:
            if type(error) not in self._causes:
                self._causes.add(type(error))
                if self._on_rejected is not None:
                    self._on_rejected(batch.channel, error)
        if batch.channel == "iopub":
            # A message that is refused proves the subscription as well as any.
            self.hearing.happens(Event.SPOKE)

    def on_word(self) -> None:
        """A message came on iopub, and may be what is waited for."""
        self.hearing.happens(Event.SPOKE)

    def tell_observers(self) -> None:
        active, state = self.unseen()
        if not active and state is None:
            return
        for observe in self.observers:
            try:
                observe(active, state)
            except Exception as error:  # clients get their messages all the same
                log.error("an observer of kernel %s: %s", self.name, error, exc_info=error)

    @property
    def neighbour(self) -> Neighbour:
        """The last message on iopub: what the server itself says stands beside it."""
        return self.last_headers or NOBODY

    def say(self, batch: Batch, *, ours: bool = False) -> None:
        """Messages for all clients; ``ours`` are those of the server itself."""
        if self.sessions or self.journal.history_limit:
            self.journal.say(batch, ours=ours)

    @property
    def place(self) -> Neighbour:
        """Where it is now: in the request that it works on, or behind what it said last."""
        busy = self.activity.status
        return self.neighbour if busy is None else (busy[0], busy[1])

    # -- who listens --

    def listen(self, callback: Listener, msg_types: Iterable[str] = ()) -> Callable[[], None]:
        """Call ``callback(batch, indices)`` with what the kernel says, on iopub to all and on other channels to
        anybody, once for each batch that has messages of these types, or of any. ``indices`` are theirs in the batch;
        ``batch[index]`` are the parts of one: header, parent_header, metadata and content in JSON, and buffers.

        It is called on the loop, after the clients were given the batch, and not for what the server itself says. Who
        raises is told of in the log, and is called again. Returns what ends it.
        """
        names = [name.encode() for name in msg_types]
        key = object()

        def hear(batch: Batch, indices: list[int]) -> None:
            indices = indices_of_types(batch, names) if names else indices
            if indices:
                callback(batch, indices)

        self.listeners[key] = hear
        return lambda: self.listeners.pop(key, None) and None

    def tell_listeners(self, batch: Batch) -> None:
        for hear in list(self.listeners.values()):
            try:
                hear(batch, [*range(len(batch))])
            except Exception as error:  # one of others, of whom each hears the same
                log.error("a listener of kernel %s: %s", self.name, error, exc_info=error)

    def keep(self, batch: Batch) -> None:
        """What the kernel says to somebody who is no client, for who reads the log."""
        self.activity.answered(batch)
        self.journal.append(batch, NO_CLIENT)
        self.journal.settle()
        if self.listeners:
            self.tell_listeners(batch)

    def _on_drop(self) -> None:
        text = "clients are too far behind: the oldest output is dropped, and they are told where"
        log.warning("kernel %s: %s", self.name, text)
        note("drop", text, kernel=self.name)

    def begin_anew(self) -> None:
        """The kernel was started again: what it has said before is its last word, and not repeated to anyone."""
        self.drain_iopub()
        self.activity.begin_anew()
        for session in self.sessions.values():
            session.begin_anew()
        self.listens_on_stdin = True
        self.journal.barrier = self.journal.end
        self.lose_runs()

    def lose_runs(self) -> None:
        """What the kernel's process was at work on went with it."""
        self.journal.learn()
        self.journal.ledger.begin_anew()

    # -- whether iopub is heard --

    def doubt(self) -> None:
        """The connection broke, or the kernel's process is another: its subscription has to be proven again."""
        self.drain_iopub()  # what was said before proves nothing
        self.activity.forget()
        self._lose()

    def _lose(self) -> None:
        if self._on_doubt is not None:
            self.hearing.happens(Event.BROKE)
            self._on_doubt()

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection on which the kernel could be heard, as far as is known."""
        return self.iopub is not None and self.iopub.connected

    def _on_hearing(self) -> None:
        """Requests wait, or go to the kernel."""
        self.needs_a_word = self.hearing.needs_a_word
        for session in list(self.sessions.values()):
            session.hold(held=self.hearing.held)

    def announce(self, batch: Batch) -> None:
        """Say something to every session, also to those that come later."""
        self._announced.append(batch)
        self.say(batch, ours=True)

    def iopub_is_behind(self) -> bool:
        """Before replies are passed on: a turn's budget of output has been delivered; is there more?"""
        return self.iopub is not None and self.iopub.has_more()

    def iopub_waits(self) -> bool:
        return self.iopub is not None and self.iopub.waits

    def try_later(self) -> None:
        """There is no memory for a reply."""
        asyncio.get_running_loop().call_later(NO_MEMORY_PAUSE, self.look_at_replies)

    def drain_iopub(self) -> None:
        """What the kernel has said so far, before something happens to it."""
        try:
            if self.iopub is not None:
                self.iopub.catch_up()
            self.give_replies()
        except MemoryError as error:  # what happens to it happens all the same
            log.error("kernel %s: there is no memory for its last words: %s", self.name, error, exc_info=error)

    # -- sessions --

    def session(self, session_id: str, identity: bytes, user: str = "") -> Session:
        """The session of that id, made when there is none, for ``user``. Raises FastwireError where it ends at once."""
        if session_id not in self.sessions:
            self._begin(Session(self, session_id, self.identities.take(identity), user))
        if session_id not in self.sessions:
            raise FastwireError("the log has no room for what this client is to be told first")
        return self.sessions[session_id]

    def _begin(self, session: Session) -> None:
        """It is known from now on and told what comes first, or it ends and nothing was."""
        tombstone = self.tombstones.take(session.session_id, session.user)
        self.sessions[session.session_id] = session
        try:
            self.journal.listen(session.downlink)
            session.remember(tombstone)
            if session.session_id in self.sessions:
                self._greet(session)
        except BaseException:  # no memory: half of a session would be found the next time
            self.end_session(session)
            if tombstone is not None:
                self.tombstones.leave(session.session_id, session.user, tombstone)
            raise

    def _greet(self, session: Session) -> None:
        """Before anything else a newcomer hears that the kernel is at work, in the kernel's own words. One that is idle
        is asked by the newcomer, and says so."""
        busy = self.activity.status
        if busy is not None:
            session.say(local_batch("iopub", busy))
        for batch in self._announced:
            session.say(batch)

    def end_session(self, session: Session, level: int = logging.INFO) -> None:
        """``level`` is that of the line in the log that says what its client did not get."""
        if self.sessions.get(session.session_id) is session:
            self.journal.unlisten(session.downlink)
            del self.sessions[session.session_id]
        session.close(level)

    def bury(self, session: Session, why: str) -> None:
        """End a session whose client may come back, and is to hear then what it did not get."""
        if self.sessions.get(session.session_id) is session:
            self.tombstones.leave(session.session_id, session.user, session.tombstone(why))
        self.end_session(session)

    def limit_away(self) -> None:
        """As many clients may be away as may be there. Each costs memory, and time with every message; so whoever opens
        one session after another, or never comes back with its id, ends those he has left, the oldest first."""
        away = [session for session in self.sessions.values() if session.connection is None]
        if len(away) > self.limits.clients_per_kernel:
            ((user, _),) = Counter(session.user for session in away).most_common(1)
            oldest = min((each for each in away if each.user == user), key=lambda each: each.detached_at)
            self.bury(oldest, TOO_MANY)

    def _close_iopub(self) -> None:
        try:
            self.give_replies()
        finally:
            if self.iopub is not None:
                self.iopub.close()
                self.iopub = None

    def close(self) -> None:
        """The kernel is gone: clients are told and every socket is closed."""
        self.is_closed = True
        open_relays.discard(self)
        with ExitStack() as steps:  # from the last to the first, each whatever became of those before
            steps.callback(self.hearing.happens, Event.CLOSE)
            for step in self.forget_times, self.tell_observers, self._close_iopub, self.journal.close:
                steps.callback(step)
            for step in self._end_sessions, self.journal.ledger.lose_all:
                steps.callback(step)
            self.give_replies()

    def _end_sessions(self) -> None:
        for session in list(self.sessions.values()):
            connection, unsent = session.connection, session.unsent_messages
            try:
                self.end_session(session, logging.WARNING)
            except Exception as error:  # the others are to end as well
                log.error("session %s could not be ended: %s", session.session_id, error, exc_info=error)
            if connection is not None:
                lost = f"; {unsent} messages did not reach it" if unsent else ""
                connection.close(1011, f"the kernel was shut down{lost}")


#: Those that may have sockets now, for metrics.
open_relays: WeakSet[KernelRelay] = WeakSet()


class Session:
    """One client's side of a kernel: its shell, control and stdin sockets, the WebSocket it has now, and its
    `Downlink`.

    Away, it has sockets only while something is to come on them or to go: it rests when every request was answered.
    What a kernel says on iopub is its log's, and needs none.

    Large, because a socket of the client and four of the kernel end and begin independently of each other, and each
    combination has to be right for the others. What is kept for the client, what waits for the kernel and what that
    costs are objects of their own.
    """

    def __init__(self, relay: KernelRelay, session_id: str, identity: bytes, user: str) -> None:
        self.relay = relay
        self.session_id = session_id
        self.identity = identity
        #: Whose session it is: nobody else may continue it.
        self.user = user
        self.downlink = Downlink(
            relay.journal.cursor(user),
            relay.limits,
            relay.budgets,
            self._cannot_say,
            self._is_slow,
            self._count_answers,
        )
        self.downlink.cursor.on_overflow = self._overflow
        self.on_ignored: Callable[[list[str]], None] | None = None
        self.detached_at = 0.0
        self._kept_until = 0.0
        self._resumable = False
        self._deadline = Deadline(relay.limits.uplink_deadline, self._uplink_progress, self._on_deadline)
        self._allowed: frozenset[str] = frozenset()
        self._expiry: asyncio.TimerHandle | None = None
        self._charge = Charge(relay.budgets.of(user), relay.limits.uplink_limit, self._hold_back)
        self._loop = asyncio.get_running_loop()
        self._paused = False
        self._closed = False
        #: Its sockets are closed until its client comes back.
        self.rests = False
        self._rest: asyncio.TimerHandle | None = None
        self._can_be_asked = asyncio.Event()
        #: Of an earlier session, of which its client is told before this number, and how much was shown before that.
        self._inherited: tuple[Tombstone, int, int] | None = None
        self._channels: list[Channel] = []
        try:
            self._open_channels()
        except BaseException:
            self.downlink.close()
            raise

    def _open_channels(self, waiting: Uplink | None = None) -> None:
        """To the kernel; what waits for it in an uplink goes on there."""
        if self.rests:
            self.identity = self.relay.identities.take(self.identity)
        # stdin first, shell last: what a kernel asks on a socket that is not there yet, it drops.
        opened = self.relay.channels(CLIENT_CHANNELS[::-1], self.identity, self._answer, after=self._after_wake_up)
        self._channels = opened[::-1]
        for channel in self._channels:
            if channel.name != "stdin":  # each question there is to be looked at
                channel.pass_to(self.relay, self.downlink)
        try:
            self._uplink = self._new_uplink(self.protocol, waiting)
        except BaseException:
            for channel in opened:
                channel.close()
            raise
        self._lend_uplink()
        self.rests = False

    def _new_uplink(self, protocol: str | None, waiting: Uplink | None) -> Uplink:
        sockets = {channel.name: channel.socket for channel in self._channels}
        ledger = self.relay.journal.ledger if self.relay.limits.history_limit else None
        uplink = Uplink(protocol, self.relay.signer, sockets, allowed_message_types=self._allowed, ledger=ledger)
        uplink.held = self.relay.hearing.held
        if waiting is not None:
            uplink.adopt(waiting)
        return uplink

    def reopen(self) -> None:
        """The kernel listens elsewhere now: its last words from the old sockets, what waits for it to the new ones."""
        self._catch_up()
        for channel in self._channels:
            channel.close()
        if self._uplink.sending_bytes:  # what we had not written ourselves waits again
            self._note("unsent", "its kernel moved; what libzmq had of its messages may not have reached it")
        if self._closed:  # its last words were too much for it, or it ended while others were told theirs
            return
        self._open_channels(self._uplink)
        self._settle(self._uplink.retry())

    def follow(self) -> None:
        """`reopen`, or else try again when the client comes back; the others follow their kernel now."""
        if self.rests:
            return
        try:
            self.reopen()
        except Exception as error:  # noqa: BLE001 - descriptors have run out, or whatever `connect_*` may raise
            self.stay_behind(error)

    def stay_behind(self, error: Exception) -> None:
        """The kernel is elsewhere, its sockets cannot be: its client comes back for others."""
        self._give_up(error, "the server could not follow the kernel to its new ports")

    def _catch_up(self) -> bool:
        """Receive and pass on what the kernel has said; whether there is more."""
        more = [channel.catch_up() for channel in self._channels]
        self.relay.give_replies()
        return any(more)

    async def until_it_can_be_asked(self) -> None:
        """Wait until stdin is connected: a kernel's ``ROUTER`` drops what it asks a peer that it does not know yet."""
        self._can_be_asked.clear()
        self._look_at_stdin()
        try:
            async with asyncio.timeout(STDIN_PATIENCE if self.relay.listens_on_stdin else 0):
                await self._can_be_asked.wait()
        except TimeoutError:
            self.relay.listens_on_stdin = False
            self._can_be_asked.set()

    def _look_at_stdin(self) -> None:
        if self._channels[CLIENT_CHANNELS.index("stdin")].can_be_asked():
            self._can_be_asked.set()

    # -- while its client is away --

    def _rest_soon(self) -> None:
        """Its client is away, and perhaps has everything that it is to get on its own sockets."""
        if self._rest is None and not self.rests:
            self._rest = self._loop.call_later(REST_AFTER, self._rest_now)

    def _rest_now(self) -> None:
        """A reply that is to come looks again when it is there."""
        self._rest = None
        uplink = self._uplink
        if self.connection is not None or self._closed or uplink.unanswered or uplink.asked:
            return
        if self._catch_up() or self.uplink_bytes:
            self._rest_soon()
        elif not (self._closed or uplink.unanswered or uplink.asked):  # it was asked just now
            self.rests = True
            for channel in self._channels:
                channel.close()

    def begin_anew(self) -> None:
        """The kernel was started again: what the old process was asked is not answered any more."""
        self._uplink.forget()
        if self.connection is None:
            self._rest_soon()

    @property
    def open_channels(self) -> int:
        """Connections to the kernel that it has."""
        return sum(not channel.closed for channel in self._channels)

    # -- for whoever runs the server --

    @property
    def label(self) -> str:
        """Enough of the id to tell clients apart: a name whole, of a UUID its first digits."""
        return self.session_id if len(self.session_id) <= LONGEST_NAME else self.session_id[:8]

    @property
    def state(self) -> str:
        """One of "away", "paused", "slow", "resuming" or "fine"."""
        if self.connection is None:
            return "away"
        return "paused" if self._paused else self.downlink.lag.state.name.lower()

    @property
    def connection(self) -> Connection | None:
        """The WebSocket it has now."""
        return self.downlink.connection

    @property
    def protocol(self) -> str | None:
        """That of the WebSocket it has now, or had last."""
        return self.downlink.protocol

    @property
    def uplink(self) -> Uplink:
        """What goes to the kernel."""
        return self._uplink

    @property
    def uplink_bytes(self) -> int:
        """What the client said and its kernel's TCP has not taken."""
        return self._uplink.waiting_bytes + self._uplink.sending_bytes

    @property
    def unsent_messages(self) -> int:
        """The same in messages, as far as is known: libzmq does not tell how many it has."""
        return self._uplink.waiting_messages + self._uplink.sending_messages

    def _note(self, kind: str, text: str) -> None:
        note(kind, text, kernel=self.relay.name, client=self.label)

    # -- the client's WebSocket --

    def attach(
        self,
        connection: Connection,
        protocol: str | None,
        allowed_message_types: frozenset[str] = frozenset(),
        *,
        resumable: bool = True,
    ) -> None:
        """Continue on this socket: first what the client has not received, then what comes. ``resumable``: the client
        can come back on another socket.

        Raises FastwireError where it ends as it is continued, and what its sockets to the kernel raise: then it is
        waited for as long as it was before.
        """
        kept = self.downlink.cursor.kept
        if self._rest is not None:
            self._rest.cancel()
            self._rest = None
        self._resumable = resumable
        self.downlink.protocol = protocol
        self._allowed = allowed_message_types
        self._paused = False
        try:
            self._take_up(connection, protocol)
        except BaseException:
            if self._expiry is None:  # a new one: nobody else ends it
                self.relay.end_session(self)
            elif not self._closed:
                self._rest_soon()
            raise
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
            self._note("resume", f"came back; {kept:,} messages had been kept for it")

    def _take_up(self, connection: Connection, protocol: str | None) -> None:
        if any(channel.closed for channel in self._channels):
            self.reopen()
        else:
            self._uplink = self._new_uplink(protocol, self._uplink)
        if self._closed:  # the kernel's last words were too much for it
            raise FastwireError("the log has no room for what this client comes back for")
        connection.consumer = self._consume
        connection.wire.settle, connection.wire.free_bytes = self._settle, self._charge.free
        connection.receiver = self.send
        connection.label = (self.relay.name, self.label)
        connection.on_stalled = self._on_stalled
        connection.limit_stalls(self.relay.limits.write_deadline)
        if self.relay.limits.acknowledge:
            connection.acknowledge()
        self.downlink.attach(connection, protocol)
        self._lend_uplink()

    def _lend_uplink(self) -> None:
        """The client's messages go to it without us; where something is left to do afterwards, `_settle` is called."""
        for channel in self._channels:
            channel.lend(self._uplink)
        if self.connection is not None:
            wire = self.connection.wire
            wire.uplink = self._uplink
            wire.watched = self._paused or self._charge.nbytes > 0

    def detach(self, connection: Connection, *, replaced: bool = False) -> None:
        """The socket is gone. Nothing when another one has taken its place already. ``replaced``: the next is attached
        at once, so that the session does not count as detached."""
        if connection is not self.connection:
            return
        connection.consumer = connection.receiver = connection.on_stalled = None
        connection.wire.uplink = connection.wire.settle = None
        try:
            passes_over = self.downlink.detach()
        except BaseException:  # no memory: what its client has not got is not known any more
            self._end_at(self._loop.time(), TOO_MUCH)
            raise
        if passes_over:
            self._note("too_long", "cannot take a message: it is passed over, and the client is told where")
        if self._closed:  # the log had no room for what it came back for
            return
        self._deadline.stop()
        if not self._resumable:
            self.relay.end_session(self)
            return
        self.detached_at = self._loop.time()
        until = self.detached_at + resume_time(self.relay.limits, closed=connection.closed_by_peer)
        # Who comes back in vain is not waited for any longer for that.
        self._kept_until = until if self.downlink.attempts.has_progressed else min(until, self._kept_until)
        self._end_at(self._kept_until, LATE)
        self._rest_soon()
        if not replaced:
            self.relay.limit_away()

    def _end_at(self, when: float, why: str) -> None:
        """Unless its client comes back before."""
        if self._expiry is not None:  # of a time before, where it was not attached to the end
            self._expiry.cancel()
        self._expiry = self._loop.call_at(when, self._expire, why)

    def _expire(self, why: str) -> None:
        try:
            self.relay.bury(self, why)
        except Exception as error:
            log.error("session %s cannot be ended yet: %s", self.session_id, error, exc_info=error)
            self._end_at(self._loop.time() + NO_MEMORY_PAUSE, why)

    # -- kernel to client --

    def _answer(self, batch: Batch) -> None:
        """Messages of the kernel on this client's own sockets."""
        self.relay.activity.answered(batch)
        if batch.channel == "stdin":
            self.downlink.look_for_answers()
        try:
            self.deliver(batch)
        finally:
            if batch.logged:  # or it comes again
                self._uplink.answered(batch)
        if self.relay.listeners:
            self.relay.tell_listeners(batch)
        if self.connection is None:
            self._rest_soon()

    def deliver(self, batch: Batch) -> None:
        """Messages of the kernel for this client alone."""
        self._deliver(batch, ours=False)

    def say(self, batch: Batch, *, momentary: bool = False, missing: int = 0) -> None:
        """What the server itself says to this client, as it is. If ``momentary``, to the socket it has now. If it tells
        of messages that are ``missing``, it counts for so many."""
        if not momentary or self.connection is not None:
            self._deliver(batch, momentary=momentary, ours=True, missing=missing)

    def _deliver(self, batch: Batch, *, momentary: bool = False, ours: bool, missing: int = 0) -> None:
        if self._closed:
            return
        self.relay.journal.tell(self.downlink, batch, momentary=momentary, ours=ours, missing=missing)

    def _count_answers(self) -> int:
        return self._uplink.answers

    def _cannot_say(self, error: Exception) -> None:
        self._give_up(error, "the server could not handle a message of the kernel")

    def _give_up(self, error: Exception, reason: str) -> None:
        """This client's policy or sockets failed: what it would be sent is not known to be right."""
        log.error("session %s: %s", self.session_id, error, exc_info=error)
        if self.connection is not None:
            self.connection.close(1011, reason)

    def _overflow(self) -> None:
        """Replies, statuses and what else may not be dropped are more than there may be, and it is the hindmost."""
        text = f"is given up: {self.downlink.cursor.kept} messages wait for it, and there is no room for them"
        log.warning("session %s %s", self.session_id, text)
        self._note("overflow", text)
        connection = self.connection
        self.relay.bury(self, TOO_MUCH)
        if connection is not None:
            connection.close(1013, "too far behind: messages were lost")

    def _is_slow(self) -> None:
        memory = self.relay.journal.memory / 1e6
        self._note("slow", f"takes messages slower than they come: {memory:.1f} MB wait for it")

    def _on_stalled(self) -> None:
        """A client that can come back is worth more without a socket that takes nothing; others have the keepalive."""
        if self._resumable and self.connection is not None:
            self._note("stalled", f"took nothing for {self.relay.limits.write_deadline:g} s: its connection is closed")
            self.connection.close(1013, "the client took nothing for too long")

    # -- client to kernel --

    def _consume(self, parser: FrameParser) -> None:
        try:
            readable = self._uplink.relay(parser)
        except MessageError:
            # The messages before it went out, and their answers may be there.
            self._settle(self._uplink.retry())
            raise
        self._settle(readable)

    def send(self, message: str | bytes) -> None:
        """One message of the client that is in Python's hands already."""
        self.send_as(self.protocol, message)

    def send_as(self, protocol: str | None, message: str | bytes) -> None:
        """The same of a socket that speaks ``protocol``: another may have taken its place, and it not know yet."""
        uplink = self._uplink
        if protocol != self.protocol:
            uplink = self._new_uplink(protocol, self._uplink)
        try:
            readable = uplink.send(OP_BINARY if isinstance(message, bytes) else OP_TEXT, message)
        finally:
            self._uplink.adopt(uplink)
        self._settle(readable)

    def _after_wake_up(self) -> None:
        """A socket of ours woke up: it may have room again, be connected, or be gone."""
        if not self._can_be_asked.is_set():
            self._look_at_stdin()
        self._send_waiting()

    def _send_waiting(self) -> None:
        if self._uplink.waiting_messages:
            try:
                self._settle(self._uplink.retry())
            except SocketClosed as error:
                if self.connection is not None:
                    self.connection.fail(error)

    def hold(self, *, held: bool) -> None:
        """Requests on shell wait from now on, or go to the kernel; those of others do, whatever becomes of these."""
        self._uplink.held = held
        if held:
            return
        try:
            self._send_waiting()
        except Exception as error:  # noqa: BLE001 - memory, or whatever libzmq may refuse
            self._give_up(error, "the server could not pass on what waited for the kernel")

    def _settle(self, readable: int) -> None:
        """After sending: read what has come meanwhile, send what waited and has room now. A kernel that goes on sending
        is read on in the next turn: here it would be as long as it likes."""
        # Sending took the edge of these descriptors with it, as receiving takes that of a socket with room again.
        for channel in self._among(readable):
            channel.read()
        if readable and self._uplink.waiting_messages:
            for channel in self._among(self._uplink.retry()):
                channel.come_back()
        if self.on_ignored is not None and (notes := self._uplink.ignored):
            self.on_ignored(notes)
        self._hold_back()

    def _among(self, bits: int) -> list[Channel]:
        return [channel for index, channel in enumerate(self._channels) if bits & (1 << index)]

    def _hold_back(self) -> None:
        """At the bound of what may wait for the kernel, leave the client's bytes in its TCP."""
        uplink_bytes = self.uplink_bytes
        if uplink_bytes <= self._charge.free and not self._charge.nbytes and not self._paused:
            return
        self._charge.set(uplink_bytes)
        self._lend_uplink()
        over = uplink_bytes > self._charge.most
        if over != self._paused and self.connection is not None:
            self._paused = over
            if over:
                waiting = uplink_bytes / 1e6
                self._note("paused", f"not read for now: {waiting:.1f} MB of its messages wait for the kernel")
                self.connection.pause_reading()
                self._deadline.start()
            else:
                self._deadline.stop()
                self.connection.resume_reading()
            self._lend_uplink()

    def _uplink_progress(self) -> tuple[Uplink, int, int]:
        """Changes when the kernel takes something."""
        return self._uplink, self._uplink.sent, self._uplink.sending_bytes

    def _on_deadline(self) -> None:
        """The client has been held back for a long time."""
        if self.connection is not None:
            seconds = self.relay.limits.uplink_deadline
            self._note("stalled", f"was not read for {seconds:g} s, because its kernel takes nothing: closed")
            self.connection.close(1013, "the kernel takes no messages")

    # -- the end --

    def tombstone(self, why: str) -> Tombstone:
        """What its client does not get if it ends now."""
        cursor, relay = self.downlink.cursor, self.relay
        messages, nbytes = cursor.owed
        neighbour = cursor.neighbour or relay.place
        unsent, unanswered = self.unsent_messages, self._uplink.unanswered
        tombstone = Tombstone(why, messages, nbytes, unsent, unanswered, relay.activity.shown, neighbour)
        if self._inherited is None or cursor.needed >= self._inherited[1]:
            return tombstone
        earlier, _, shown_before = self._inherited
        both = replace(earlier)
        both.absorb(tombstone, shown_before)
        return both

    def remember(self, tombstone: Tombstone | None) -> None:
        """A session of the same client ended before this one: before anything new it is told what it missed."""
        shown = self.relay.activity.shown
        if tombstone is not None and (text := tombstone.text(shown)):
            # First: the log may have no room for the notice, and it ends then.
            self._inherited = (tombstone, self.relay.journal.end + 1, shown)
            self.say(notice(tombstone.neighbour, text), missing=tombstone.missing(shown))
            self._note("late", "came back after its session had ended, and is told what it missed")

    def close(self, level: int = logging.INFO) -> None:
        self._closed = True
        if self.connection is not None:
            self.connection.wire.uplink = None
        self._can_be_asked.set()
        self._deadline.stop()
        self._charge.end()
        for timer in (self._expiry, self._rest):
            if timer is not None:
                timer.cancel()
        for channel in self._channels:
            channel.close()
        has_all = self.connection is not None and self.downlink.cursor.is_live  # or it is on its way
        try:
            self._tell_unsent()
            self._uplink.retire()
        finally:
            lost = self.downlink.close()
        if lost and not has_all:
            log.log(level, "session %s ended with %s messages undelivered", self.session_id, lost)
            self._note("expired", f"its session ended; {lost:,} messages were not delivered")

    def _tell_unsent(self) -> None:
        unsent = self.unsent_messages
        if unsent:
            text = f"its session ended; {unsent:,} of its messages had not reached the kernel"
            log.warning("session %s: %s", self.session_id, text)
            self._note("unsent", text)
