"""What a client sends, from the parser to whoever it is for, in order.

What is difficult: three things may stop it, each for its own reason and each to be continued by somebody else. The
application pauses (`Reader.pause`), a coroutine of the application runs (the next message waits for it, as with
Tornado), the loop has other work (`MESSAGES_A_TURN`). Reading goes on when none of them holds it, and what was parsed
already comes first.

What was believed and is wrong:

- *Handing out is a loop.* The application may call back from within it: ``resume_reading`` in ``on_message``
  (``test_resuming_in_on_message_does_not_nest``), or in a coroutine that has not ended
  (``test_resuming_in_a_coroutine_on_message_does_not_overtake_it``).
- *Control frames are few.* One read may bring forty thousand, each Python's to answer: they are counted before the
  first is (``test_more_control_frames_than_the_server_accepts``).
- *After a broken frame there is nothing to read.* There is, megabytes of it, and who leaves it resets the connection:
  it is read and thrown away (``test_megabytes_behind_the_broken_frame_do_not_lose_our_close``).
"""

from __future__ import annotations

import asyncio
import sys
import zlib
from collections.abc import Callable
from typing import Any, Protocol, cast

from fastwire._core import OP_BINARY, OP_CLOSE, OP_PING, OP_PONG, OP_TEXT, RSV1, FrameParser
from fastwire.closing import Closing, State
from fastwire.errors import FastwireError, InvalidPayload, MessageTooBig, PolicyViolation
from fastwire.flow import Rate
from fastwire.transport import Transport

__all__ = ["Inflater", "Reader", "Recipient"]

DATA = (OP_TEXT, OP_BINARY)

#: Messages handed to the application before the loop has its next turn: others wait for theirs.
MESSAGES_A_TURN = 256

#: The same of bytes that were compressed: a read of 256 KiB may become 256 MB.
BYTES_A_TURN = 1 << 20

#: What a callback of the application leaves: nothing, or what the next message waits for.
Done = asyncio.Future[None] | None


class Hearer(Protocol):
    """Who hears messages: one by one, or from the parser itself."""

    consumer: Callable[[FrameParser], None] | None

    def on_message(self, payload: str | bytes) -> Done: ...


class Recipient(Protocol):
    """Whom it is for: data messages are the application's."""

    @property
    def application(self) -> Hearer: ...
    def on_ping_frame(self, payload: bytes) -> None: ...
    def on_pong_frame(self, payload: bytes) -> Done: ...
    def on_close_frame(self, payload: bytes) -> None: ...
    def fail(self, error: FastwireError) -> None:
        """The peer sent what it must not."""

    def on_exception(self, *error: Any) -> None:
        """The application's code raised it."""


class Reader:
    """One connection's messages, from its transport's parser to a `Recipient`."""

    def __init__(
        self, transport: Transport, closing: Closing, recipient: Recipient, inflater: Inflater | None, rate: Rate
    ) -> None:
        #: Of pings and pongs, how many may come.
        self.control_rate = rate
        self.paused = False
        #: What the next message waits for.
        self.running: Done = None
        self._transport = transport
        self._closing = closing
        self._recipient = recipient
        self._inflater = inflater
        self._loop = asyncio.get_running_loop()
        self._counted = 0
        self._grown = 0
        self._handing_out = False
        self._started = False

    # -- going on and stopping --

    async def start(self) -> None:
        """``open`` has returned."""
        self._started = True
        self.look_at_wire()
        if self._closing.state.is_over:
            return
        # What came with the handshake.
        early = self._transport.stream._read_buffer_size
        if early:
            self._transport.parser.feed(await self._transport.stream.read_bytes(early))
            self.process()
        self._transport.start()
        self._read_on()

    def pause(self) -> None:
        self.paused = True
        self.look_at_wire()
        self._transport.read_off()

    def look_at_wire(self) -> None:
        """Whether messages may pass without us."""
        goes_on = self._started and not self.paused and self.running is None
        self._transport.wire.hands_out = goes_on and self._inflater is None and not self._closing.state.peer_is_done

    def resume(self) -> None:
        self.paused = False
        self.look_at_wire()
        if self._started and self.running is None and not self._closing.state.is_over:
            self.process()
            self._read_on()

    def _read_on(self) -> None:
        is_paused = self.paused and self._closing.state is not State.FAILED
        is_done = self._closing.state.is_over or self._closing.state is State.HALF_CLOSED
        if not is_paused and not is_done and self.running is None:
            self._transport.read_on()

    # -- handing out --

    def process(self) -> None:
        """Hand out what the parser has, in order, until it is empty or a coroutine must finish first."""
        if self._closing.state is State.FAILED:
            self._transport.parser = FrameParser(0)  # and with the old one what it has
        if self._closing.state.peer_is_done or self.paused or self._handing_out or self.running is not None:
            return
        self._handing_out = True
        try:
            self._count_control_frames()
            self._hand_out()
        except FastwireError as error:
            self._recipient.fail(error)
        except Exception:  # noqa: BLE001 - the boundary to the application's code
            self._recipient.on_exception(*sys.exc_info())
        finally:
            self._handing_out = False

    def _count_control_frames(self) -> None:
        """Before the first of them is answered."""
        # Without the answers to our own pings that were dealt with already: there is never more than one.
        came = self._transport.parser.control_frames - self._transport.wire.answered - self._counted
        if came:
            self._counted += came
            if self.control_rate.exceeded(came, self._loop.time()):
                raise PolicyViolation("there are more pings and pongs than the server accepts")

    def _hand_out(self) -> None:
        parser, application = self._transport.parser, self._recipient.application
        self._grown = 0
        if application.consumer is not None:
            application.consumer(parser)
        for count, (opcode, payload) in enumerate(parser, 1):
            if self._closing.state.peer_is_done:
                return
            # Nearly always there is nothing to decide.
            done = application.on_message(payload) if opcode in DATA else self._dispatch(opcode, payload)
            if done is None and (count == MESSAGES_A_TURN or self._grown > BYTES_A_TURN):
                done = self._next_turn()
            if done is not None:
                self._wait_for(done)
                return
            if application.consumer is not None:
                application.consumer(parser)

    def _dispatch(self, opcode: int, payload: str | bytes) -> Done:
        if opcode & RSV1:
            opcode &= ~RSV1
            payload = self._decompress(opcode, cast(bytes, payload))
        if opcode in DATA:
            return self._recipient.application.on_message(payload)
        control = cast(bytes, payload)
        if opcode == OP_PONG:
            return self._recipient.on_pong_frame(control)
        if opcode == OP_PING:
            self._recipient.on_ping_frame(control)
        elif opcode == OP_CLOSE:
            self._recipient.on_close_frame(control)
        return None

    def _decompress(self, opcode: int, data: bytes) -> str | bytes:
        assert self._inflater is not None
        plain = self._inflater.decompress(data)
        self._grown += len(plain)
        if opcode == OP_BINARY:
            return plain
        try:
            return plain.decode()
        except UnicodeDecodeError:
            raise InvalidPayload("a text message is not UTF-8") from None

    def refused(self, error: Exception) -> None:
        """Whoever takes messages without us did not take one."""
        if isinstance(error, FastwireError):
            self._recipient.fail(error)
        else:
            self._recipient.on_exception(type(error), error, error.__traceback__)

    # -- waiting --

    def _next_turn(self) -> asyncio.Future[None]:
        """Resolves when the loop comes round. Source: `WebSocketProtocol13._receive_frame_loop`."""
        turn = self._loop.create_future()

        def come() -> None:
            if not turn.done():
                turn.set_result(None)

        self._loop.call_soon(come)
        return turn

    def _wait_for(self, done: asyncio.Future[None]) -> None:
        """The next message waits for a callback that is a coroutine, as with Tornado, or for the loop's next turn."""
        self.running = done
        self.look_at_wire()
        self._transport.read_off()
        done.add_done_callback(self._go_on)

    def _go_on(self, done: asyncio.Future[None]) -> None:
        self.running = None
        self.look_at_wire()
        # Tornado 6.5 hands out the coroutine's own future; later ones have logged its exception and aborted.
        error = None if done.cancelled() else done.exception()
        if error is not None:
            self._recipient.on_exception(type(error), error, error.__traceback__)
        if not self._closing.state.is_over:
            self.process()
            self._read_on()


class Inflater:
    """Decompresses the client's messages (RFC 7692 section 7.2.2).

    A block may say that it is the last of its stream, and another follow in this message or the next (section
    7.2.3.4): zlib takes that up with the text so far as its dictionary. Many such blocks in one message are an attack.
    """

    LAST_BLOCKS = 16
    WINDOW = 1 << zlib.MAX_WBITS

    def __init__(self, agreed: dict[str, Any], max_message_size: int) -> None:
        self._takes_context_over = "client_no_context_takeover" not in agreed
        self._max_message_size = max_message_size
        self._start(b"")

    def _start(self, window: bytes) -> None:
        self._window = window
        # The largest window reads what was compressed with any.
        self._zlib = zlib.decompressobj(-zlib.MAX_WBITS, window)

    def decompress(self, data: bytes) -> bytes:
        """Raises MessageTooBig, InvalidPayload."""
        if not self._takes_context_over:
            self._start(b"")
        before, plain, left = self._window, b"", data + b"\x00\x00\xff\xff"
        for _ in range(self.LAST_BLOCKS):
            try:
                # One more than there may be, so that a message of the full size is told from a longer one.
                plain += self._zlib.decompress(left, self._max_message_size - len(plain) + 1)
            except zlib.error as error:
                raise InvalidPayload(f"a compressed message cannot be decompressed: {error}") from error
            if len(plain) > self._max_message_size:
                raise MessageTooBig("message too big after decompression")
            self._window = plain[-self.WINDOW :] if len(plain) >= self.WINDOW else (before + plain)[-self.WINDOW :]
            if not self._zlib.eof:
                return plain
            left = self._zlib.unused_data
            self._start(self._window)
        raise InvalidPayload("a compressed message has too many last blocks")
