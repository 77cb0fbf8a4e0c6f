"""One WebSocket after its handshake: the parts that make it, and what of one concerns another.

A `Transport` has the socket or Tornado's stream, a `Reader` what comes, a `Writer` what goes, a `Closing` the way to
the end; a `Probe` knows what the peer has received, and `Stalls` that it takes nothing. None of them knows another's
business: each tells the conversation what happened (`transport.Listener`, `reading.Recipient`, `probe.Prober`), and
here stands what follows. So everything that ends is ended in one place (`Conversation._is_over`), and what is said to
a peer last in three: `close`, `fail` and `on_close_frame`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Protocol

from tornado.iostream import IOStream

from fastwire._core import OP_CLOSE, FrameParser, WriteQueue, close_payload, parse_close
from fastwire.closing import Closing, Happened, State
from fastwire.errors import FastwireError
from fastwire.events import note
from fastwire.flow import Acknowledgements, Limits, Rate
from fastwire.probe import Probe, Stalls
from fastwire.reading import Done, Inflater, Reader
from fastwire.transport import Farewell, is_quiet, transport_for
from fastwire.writing import Writer

__all__ = ["Application", "Conversation"]

log = logging.getLogger(__name__)

#: Seconds a peer has to answer our Close frame, or to take the last bytes, before TCP is closed under it.
CLOSE_TIMEOUT = 5.0


class Application(Protocol):
    """On whose behalf we speak. What it may set is explained at `websocket.Connection`."""

    consumer: Callable[[FrameParser], None] | None
    on_stalled: Callable[[], None] | None
    is_held: Callable[[], bool] | None
    label: tuple[str, str]

    @property
    def peer(self) -> str:
        """The other side's address."""

    def on_message(self, payload: str | bytes) -> Done: ...
    def on_ping(self, payload: bytes) -> None: ...
    def on_pong(self, payload: bytes) -> Done: ...
    def on_sign_of_life(self) -> None: ...
    def on_state(self, state: State) -> None: ...
    def on_close_code(self, code: int | None, reason: str | None) -> None: ...
    def on_failure(self, error: FastwireError) -> None: ...
    def log_exception(self, *error: Any) -> None: ...


class Conversation:
    """The parts of one WebSocket, wired.

    Two dozen methods and more, because each of its parts says here what happened: most are a line or two.
    """

    def __init__(
        self,
        stream: IOStream,
        queue: WriteQueue,
        application: Application,
        limits: Limits,
        max_message_size: int,
        inflater: Inflater | None,
        *,
        client: bool = False,
    ) -> None:
        parser = FrameParser(
            max_message_size, deflate=inflater is not None, max_fragments=limits.max_fragments, client=client
        )
        self.application = application
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._close_timer: asyncio.TimerHandle | None = None
        #: Done when it is over.
        self.ended: asyncio.Future[None] = self._loop.create_future()
        #: Times that the system had no buffers.
        self.no_buffers = 0
        self.closing = Closing()
        self.transport = transport_for(stream, parser, queue, self)
        self.reader = Reader(self.transport, self.closing, self, inflater, Rate(limits.control_frame_rate))
        self.writer = Writer(self.transport, self.closing)
        self.stalls = Stalls(self.transport, self._on_stall)
        self.probe: Probe | None = None

    # -- what the application asks --

    def acknowledge(self) -> None:
        """See `Connection.acknowledge`."""
        if self.probe is None:
            self.probe = Probe(self.transport, self)
            # Its answers come on top of what it may send by itself.
            self.reader.control_rate = Rate(self._limits.control_frame_rate + 1 / Acknowledgements.INTERVAL)
            self.transport.keep_little()

    @property
    def received(self) -> int:
        """How far the peer is known to have our bytes: acknowledged, or written where it is not asked."""
        if self.probe is None or self.probe.acknowledgements.demoted:
            return self.transport.written
        return self.probe.acknowledgements.position

    def relay(self, sink: WriteQueue | None) -> None:
        """See `FrameParser.relay`."""
        self.transport.parser.relay(sink)

    def pause(self) -> None:
        self.reader.pause()
        if self.probe is not None:
            self.probe.pause()

    def resume(self) -> None:
        if self.probe is not None:
            self.probe.resume()
        self.reader.resume()

    # -- what comes (`reading.Recipient`) --

    def on_ping_frame(self, payload: bytes) -> None:
        self.writer.pong(payload)
        self.application.on_ping(payload)

    def on_pong_frame(self, payload: bytes) -> Done:
        if self.probe is not None and self.probe.answer(payload):
            return None
        return self.application.on_pong(payload)

    def on_close_frame(self, payload: bytes) -> None:
        code, reason = parse_close(payload)
        self.application.on_close_code(code, reason or None)
        if not self.closing.state.we_are_done:
            self._say_close(code, "")
        self._take(Happened.PEER_CLOSES)
        self._limit_closing()
        self._finish_if_written()

    def on_exception(self, *error: Any) -> None:
        self.application.log_exception(*error)
        self.abort()

    # -- how the transport does (`transport.Listener`) --

    def on_received(self) -> None:
        self.reader.process()

    def before_write(self) -> None:
        self.transport.wire.ride()

    def on_written(self) -> None:
        self.writer.on_written()
        if self.closing.state.peer_is_done:
            self._finish_if_written()
        self._progress()

    def on_blocked(self) -> None:
        self.stalls.watch()

    def on_no_buffers(self, name: str, *, first: bool) -> None:
        self.no_buffers += 1
        if first:
            self._note("no_buffers", f"the system had no buffers ({name}); the bytes are kept and sent later")

    def on_taken(self) -> None:
        self.on_sign_of_life()

    def on_sign_of_life(self) -> None:
        self.application.on_sign_of_life()

    def on_silence(self) -> None:
        if self.probe is not None:
            self.probe.look_at_silence()

    def on_refused(self, error: Exception) -> None:
        self.reader.refused(error)

    def on_end_of_stream(self) -> None:
        """The peer sends no more, but it may still be reading what we owe it."""
        if self.transport.has_all:
            self.on_lost(None)
        elif self._take(Happened.PEER_ENDS):
            self.transport.read_off()
            self._limit_closing()

    # -- what the peer has (`probe.Prober`) --

    def is_held(self) -> bool:
        return self.application.is_held is not None and self.application.is_held()

    def on_demoted(self) -> None:
        self._note("demoted", "answers no pings: what was written to it counts as received")
        self._progress()

    def _progress(self) -> None:
        self.transport.wire.progress()

    def _on_stall(self) -> None:
        if self.application.on_stalled is not None:
            self.application.on_stalled()

    def _note(self, kind: str, text: str) -> None:
        kernel, client = self.application.label
        note(kind, text, kernel=kernel, client=client or self.application.peer)

    # -- the end --

    def close(self, code: int | None, reason: str) -> None:
        """Send a Close frame; TCP is closed when the peer has answered, or after `CLOSE_TIMEOUT`."""
        if self.closing.state is not State.OPEN:
            return
        if self._say_close(code, reason):
            self._take(Happened.WE_CLOSE)
            self._limit_closing()
        else:
            self.leave()

    def leave(self) -> None:
        """End TCP when all is written, without a Close frame: to the peer the connection broke."""
        if self._take(Happened.WE_LEAVE):
            self._limit_closing()
            self._finish_if_written()

    def fail(self, error: FastwireError) -> None:
        """The peer sent what it must not: say so with a Close frame, then close (RFC 6455 section 7.1.7)."""
        may_speak = not self.closing.state.we_are_done
        if not self._take(Happened.PEER_FAULT):
            return
        how = f"closing with {error.close_code}" if may_speak else "behind our Close frame"
        log.warning("WebSocket client %s: %s; %s", self.application.peer, str(error), how)
        if may_speak:
            self._say_close(error.close_code, str(error))
        self.application.on_failure(error)
        self._limit_closing()
        self._finish_if_written()

    def _take(self, happened: Happened) -> State | None:
        state = self.closing.take(happened)
        if state is not None:
            wire = self.transport.wire
            wire.we_are_done, wire.closes = state.we_are_done, state.we_are_done or state.peer_is_done
            self.reader.look_at_wire()
            self.writer.attend()
            self.application.on_state(state)
        return state

    def _say_close(self, code: int | None, reason: str) -> bool:
        """Where no frame can follow, or there is no memory for one, the end of TCP has to say it."""
        if self.transport.queue.unfinished:
            return False
        try:
            self.writer.control(OP_CLOSE, close_payload(code, reason))
        except MemoryError:
            return False
        return True

    def _limit_closing(self) -> None:
        if self._close_timer is None:
            self._close_timer = self._loop.call_later(CLOSE_TIMEOUT, self.abort)

    def _finish_if_written(self) -> None:
        stream = self.transport.stream
        if not self.transport.has_all or self.closing.state.is_over:
            return
        if stream.closed():
            self.on_lost(stream.error)
        elif self._take(Happened.ALL_WRITTEN):
            self._is_over()
            Farewell(stream, CLOSE_TIMEOUT)

    def abort(self) -> None:
        """Without a word."""
        self.on_lost(None)

    def on_lost(self, error: BaseException | None) -> None:
        """TCP is over, or about to be."""
        if self.closing.state.is_over:
            return
        if isinstance(error, OSError) and not is_quiet(error):
            log.warning("WebSocket client %s: %s", self.application.peer, str(error))
        if error is None:  # after an error the system has thrown away what it had to send
            self.transport.sample()
        try:
            self._take(Happened.TCP_OVER)
        finally:  # or its descriptor stays readable, and watched, for ever
            self._is_over()
            self.transport.stream.close()

    def _is_over(self) -> None:
        """Whoever waits learns it."""
        self.ended.set_result(None)
        self.transport.release()
        self.writer.end()
        self.stalls.end()
        if self._close_timer is not None:
            self._close_timer.cancel()
