"""The compiled core: bytes, in the order they flow.

Sizes are in bytes. ``parts`` are a Jupyter message's frames after the signature: header, parent_header,
metadata, content, then any number of buffers (jupyter_client docs, "The wire protocol").
Every error is one of `fastwire.errors`; nothing else is raised for bad input.
No asyncio, no tornado, no logging; not thread-safe beyond what the GIL gives: an object belongs to one loop's thread.
Where Python code runs in the middle of a call (hashlib, a finalizer), and other threads with it, objects of other
loops go on undisturbed; a parser or uplink that is in use refuses with RuntimeError.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from selectors import EpollSelector, SelectorKey
from typing import Any, Final, Self, final

import zmq
from typing_extensions import Buffer

from fastwire.errors import MessageError

PROTOCOL_V1: Final = "v1.kernel.websocket.jupyter.org"

#: Opcodes, RFC 6455 section 5.2. ``RSV1`` is or-ed to an opcode for a compressed message (RFC 7692).
OP_TEXT: Final = 0x1
OP_BINARY: Final = 0x2
OP_CLOSE: Final = 0x8
OP_PING: Final = 0x9
OP_PONG: Final = 0xA
RSV1: Final = 0x40

#: What `WriteQueue.flush` answers.
FLUSH_DONE: Final = 0
FLUSH_MORE: Final = 1
FLUSH_BLOCKED: Final = 2
FLUSH_NO_BUFFERS: Final = 3
FLUSH_DEAD: Final = 4

def build_info() -> dict[str, str]:
    """What this build uses: ``version``, ``zmq`` ("direct" or "pyzmq"), ``libzmq``, ``zmtp`` (that of `ZmtpStream`),
    ``sha256`` ("sha-ni", "armv8", or "portable": C for what is short, OpenSSL for the rest), ``cython``,
    ``compiler``."""

def live() -> dict[str, int]:
    """Objects alive now, by kind: ``messages``, ``zmq_messages``, ``blocks``, ``buffers``, ``records``.

    All return to zero when no batch, frames, parser, queue or uplink is held: the tests fail on a leak.
    """

def counters() -> dict[tuple[str, str, str], int]:
    """What went through since the process began, by ``(what, channel, unit)``; "" where there is no channel or unit.

    ``from_kernels`` and ``to_kernels``: "messages" and "bytes" by channel ("shell", "control", "stdin", "iopub",
    "other"). ``from_clients`` and ``to_clients``: data messages, payload bytes in, wire bytes out. ``batches`` drained;
    messages ``rejected``; ``invalid_signatures`` and ``replayed_signatures`` (also of messages that pass with
    ``permissive``); ``budget_hits``: drains that left messages for the next turn; ``waited``: messages that
    were not sent at once, because a kernel's socket was full or `Uplink.held`; ``flushes`` that wrote, were
    ``blocked``, had ``no_buffers``.
    """

def histograms() -> dict[str, tuple[tuple[float, ...], tuple[int, ...], float]]:
    """Distributions since the process began: ``(upper bounds, observations in each bucket, their sum)``; the last
    bucket is for what is above the last bound.

    ``time_to_flush``: seconds of each message from its batch's first receipt to the write that took its last byte.
    ``messages_per_flush`` and ``batches_per_flush``: what was wholly written by one write, where there was any.
    All are of messages queued as `Frames`.
    """

# -- sign ------------------------------------------------------------------------------------------

@final
class Signer:
    """HMAC over header, parent_header, metadata and content (the first four parts; buffers are not signed).

    An empty key means unsigned: `sign` gives b"" and `verify` accepts anything.
    Keeps the digests it has verified, the last ``history_size`` of them, to refuse replays; a ZMQ socket
    needs a history of its own (several subscribers see the same message), so `fork` one for each.
    0 keeps none. Memory: at most 24 bytes a digest, allocated as they come; where the histories of all sockets have
    what they may have together (`limit_histories`), each has those that it has room for then, 1,024 at least.

    Source: messaging spec, "Wire protocol"; `jupyter_client.session.Session.sign`, `deserialize`.
    Raises ValueError for a ``signature_scheme`` that is not "hmac-" and a hashlib name, and for a ``history_size``
    that is not from 0 to 2**30.
    """

    def __init__(self, key: Buffer, signature_scheme: str = "hmac-sha256", *, history_size: int = 65536) -> None: ...
    @property
    def signature_scheme(self) -> str: ...
    @property
    def history_size(self) -> int: ...
    @property
    def history_length(self) -> int:
        """Digests remembered now."""
    def fork(self) -> Signer:
        """The same key and scheme with an empty history."""
    def sign(self, parts: Sequence[Buffer]) -> bytes:
        """The lower-case hex digest as bytes, b"" for an empty key.

        Raises MalformedMessage for fewer than four parts.
        """
    def verify(self, signature: Buffer, parts: Sequence[Buffer]) -> None:
        """Compares in constant time; remembers the digest once it has verified.

        Raises InvalidSignature, DuplicateSignature, MalformedMessage (fewer than four parts).
        """

# -- split, encode, decode -------------------------------------------------------------------------

def split_identities(frames: Sequence[Buffer]) -> tuple[list[bytes], bytes, list[Buffer]]:
    """``(identities, signature, parts)`` of a multipart message around the ``<IDS|MSG>`` delimiter.

    Source: `jupyter_client.session.Session.feed_identities`.
    Raises MalformedMessage without a delimiter or with fewer than four parts behind the signature.
    """

def encode_v1(channel: str, parts: Sequence[Buffer]) -> bytes:
    """One message of `PROTOCOL_V1`: little-endian u64 offsets, channel, parts.

    Source: `jupyter_server.services.kernels.connection.base.serialize_msg_to_ws_v1`, byte for byte.
    """

def decode_v1(payload: Buffer) -> tuple[str, list[bytes]]:
    """``(channel, parts)`` of a message of `PROTOCOL_V1`.

    Source: `deserialize_msg_from_ws_v1`. Raises MalformedMessage for text (str), offsets that run backwards, into
    the offsets or out of the payload, more than 65,536 of them, a channel that is not UTF-8, fewer than four parts.
    """

def encode_legacy(channel: str, parts: Sequence[Buffer]) -> str | bytes:
    """One message of the default protocol: str (a text frame) without buffers, bytes (a binary frame with
    big-endian u32 offsets) with them.

    The parts are already JSON; they are spliced between fixed keys in the order jupyter_server writes them:
    header, msg_id, msg_type, parent_header, metadata, content, buffers (text only), channel. Bytes that are not UTF-8
    become U+FFFD, as in `jupyter_client.session.json_unpacker`.
    Source: `ZMQChannelsWebsocketConnection._reserialize_reply`, `serialize_binary_message`.
    Raises MalformedMessage for a header that is not a JSON object with string ``msg_id`` and ``msg_type``,
    for an empty part among the first four, for a binary message over 4 GiB.
    """

def decode_legacy(payload: str | Buffer) -> tuple[str, list[bytes]]:
    """``(channel, parts)`` of a message of the default protocol, str for the text form, bytes for the binary.

    The parts are the JSON text of the client, cut out and not re-spelled (whitespace around a value is not part of
    it). Keys are compared unescaped and the last of duplicates wins, as in Python's `json`. A missing or null
    channel is "shell"; a channel that is no string is its JSON text. ``content`` null or missing is ``{}``; a string
    ``content`` is its unescaped text (Session.serialize).
    ``buffers`` of the text form must be absent, null or empty.
    Accepts RFC 8259 plus NaN, Infinity and -Infinity, nesting to 1,000.
    Source: `ZMQChannelsWebsocketConnection.handle_incoming_message`, `deserialize_binary_message`.
    Raises MalformedMessage for anything else: not JSON, not an object, header (an object), parent_header or metadata
    missing, offsets that run backwards, into the offsets or out of the payload, more than 65,536 of them.
    """

def check_json(text: Buffer) -> None:
    """The scanner behind the decoders on its own: one JSON text as Python's `json.loads` takes it
    (NaN and infinities included, integers of at most `sys.get_int_max_str_digits` digits), nesting to 1,000, whitespace
    around it allowed, in UTF-8. Raises MalformedMessage."""

def header_fields(header: Buffer) -> tuple[str, str]:
    """``(msg_id, msg_type)`` of a header's JSON text, by the rules of `json.loads` (unescaped keys, last one wins).

    Raises MalformedMessage when it is no JSON object or one of them is missing or no string.
    """

# -- frames ----------------------------------------------------------------------------------------

def frame_header(opcode: int, length: int, *, fin: bool = True) -> bytes:
    """A server's frame header, 2, 4 or 10 bytes, unmasked (RFC 6455 section 5.2).

    ``opcode`` may have `RSV1` or-ed to it. Raises ValueError for an unknown opcode or a control frame that is
    fragmented or longer than 125.
    """

def close_payload(code: int | None, reason: str = "") -> bytes:
    """The payload of a Close frame; ``reason`` is cut to 123 bytes at a character's edge; None gives b"".

    Raises ValueError for a code that must not be sent (RFC 6455 section 7.4.1)."""

def parse_close(payload: Buffer) -> tuple[int | None, str]:
    """``(code, reason)`` of a Close payload; ``(None, "")`` for an empty one.

    Raises ProtocolError (one byte, a code that must not be sent: RFC 6455 section 7.4), InvalidPayload.
    """

@final
class FrameParser:
    """A peer's bytes in, its messages out: RFC 6455, sans I/O; for a server, or with ``client`` for its client.

    ``feed`` or ``receive`` bytes, then iterate: each item is ``(opcode, payload)``; text as str, binary as bytes,
    and control frames (``OP_PING``, ``OP_PONG``, ``OP_CLOSE``) as bytes. Fragments are joined, control frames
    between them come out first. With ``deflate`` a compressed message comes out as ``(opcode | RSV1, bytes)``, still
    compressed and for text not yet checked. Iteration stops when more bytes are needed. A message that was complete
    comes out before an error that follows it: the error is raised by iteration, again at each further call, and
    nothing is parsed after it. Nothing is parsed after a Close frame either. A text that cannot become UTF-8 fails
    as soon as the octets show it. A Close frame comes out only when its code and reason may be sent (`parse_close`
    reads them). Declared lengths cost no memory before the bytes arrive. ``max_fragments`` is the number of frames of
    one message, 0 for any. A client's frames must be masked, a server's must not.

    After `relay` nothing is joined: data frames, pings and pongs go into another socket's queue, and only a Close
    frame comes out of iteration.

    Raises (from iteration) ProtocolError, InvalidPayload, MessageTooBig, PolicyViolation, and OutOfMemory when there is
    none for bytes that have come. MemoryError is for this call only: the next one gives the same message.
    """

    def __init__(
        self, max_message_size: int = 10485760, *, deflate: bool = False, max_fragments: int = 0, client: bool = False
    ) -> None: ...
    def relay(self, sink: WriteQueue | None) -> None:
        """From now on frames go into ``sink`` as they come: the same ones in the same order, unmasked, or masked anew
        where that queue's are. A frame is passed on before it is whole (`WriteQueue.unfinished`), so that a long one
        takes no memory here; whether text is UTF-8 is for who reads it. ``max_message_size`` bounds single frames.
        With None what comes is thrown away.

        Raises ValueError when something has been parsed already, unless it is to be thrown away from now on.
        """
    def feed(self, data: Buffer) -> None:
        """Bytes from a peer; copied."""
    def receive(self, fd: int) -> int:
        """One recv(2) of up to 256 KiB (16 after `relay`) from a non-blocking socket into a buffer that all parsers
        share.

        Returns the number of bytes, 0 at end of stream, -1 when nothing is there (EAGAIN, ENOBUFS, ENOMEM).
        EINTR is repeated. Raises OSError for a dead socket.
        """
    def __iter__(self) -> Iterator[tuple[int, str | bytes]]: ...
    def __next__(self) -> tuple[int, str | bytes]: ...
    @property
    def control_frames(self) -> int:
        """Pings, pongs and Close frames so far, also those not yet taken."""
    @property
    def pending(self) -> int:
        """Complete messages and control frames not yet taken."""
    @property
    def buffered_bytes(self) -> int:
        """Bytes of incomplete and untaken messages."""
    @property
    def closed(self) -> bool:
        """A Close frame or an error has ended parsing."""

# -- queue -----------------------------------------------------------------------------------------

@final
class Frames:
    """Frames encoded once, to be queued for any number of clients. Immutable."""

    def __len__(self) -> int:
        """Number of frames."""
    @property
    def nbytes(self) -> int: ...
    @property
    def ends(self) -> Ends:
        """Where each of them ends; it outlives their bytes."""
    def __bytes__(self) -> bytes: ...

@final
class Ends:
    """Where frames end, for whoever still has to know when their bytes have gone: 8 bytes a frame."""

    def __len__(self) -> int: ...
    def complete_before(self, nbytes: int) -> int:
        """How many frames lie wholly in the first ``nbytes`` bytes."""

    def longest(self, received: int, written: int) -> tuple[int, int]:
        """The bytes and the index of the longest frame that begins in the first ``written`` bytes and does not end in
        the first ``received``; ``(0, -1)`` where there is none."""

@final
class WriteQueue:
    """One socket's outgoing bytes with two cursors: *written* (the kernel's TCP buffer took them) and
    *acknowledged* (the peer has seen them). Positions are counts of bytes since the queue was made.

    Data up to ``copy_threshold`` is copied into contiguous blocks; larger data is referenced until its cursor has
    passed it. With ``acknowledge`` off the two cursors are one. With ``mask`` it is a client's: each frame is copied
    and masked with a key of its own, from the system's random bytes (RFC 6455 section 5.3).
    """

    def __init__(self, *, copy_threshold: int = 8192, acknowledge: bool = False, mask: bool = False) -> None: ...
    def append(self, data: Buffer) -> int:
        """Queue raw bytes. Returns the position behind them."""
    def append_frame(self, opcode: int, payload: str | Buffer) -> int:
        """Queue a whole frame with its header (`frame_header`). Returns the position behind it.

        Raises ValueError as `frame_header` does, for a str that has no UTF-8, and while a frame is `unfinished`.
        """
    def extend(self, frames: Frames) -> int:
        """Queue encoded frames by reference (small ones are copied). Returns the position behind them.

        Raises ValueError where frames are masked, and while one is `unfinished`.
        """
    def flush(self, fd: int, limit: int = ...) -> int:
        """Write once with sendmsg(2), at most ``limit`` bytes (default 1 MiB) in at most 256 pieces.

        Returns FLUSH_DONE (nothing is left), FLUSH_MORE (bytes are left, the socket took all it was given),
        FLUSH_BLOCKED (partial write or EAGAIN: wait for writability), FLUSH_NO_BUFFERS (ENOBUFS, ENOMEM: try
        again later, the bytes are kept), FLUSH_DEAD (any other errno, in `errno`; the bytes are kept until `clear`).
        EINTR is repeated.
        """
    def take(self, limit: int) -> bytes:
        """Up to ``limit`` bytes for another transport; they count as written."""
    def acknowledge(self, position: int) -> None:
        """The peer has seen everything before ``position``. Earlier positions are ignored.

        Raises ValueError beyond `written`, or when acknowledgement is off.
        """
    def clear(self) -> int:
        """Forget and release everything; returns the number of bytes that were not written."""
    @property
    def unfinished(self) -> int:
        """Bytes that are still to come of the payload of a frame that is passed on (`FrameParser.relay`): until then no
        other frame can follow."""
    @property
    def pending_bytes(self) -> int:
        """queued - written."""
    @property
    def unacknowledged_bytes(self) -> int:
        """written - acknowledged."""
    @property
    def held_buffers(self) -> int:
        """Large buffers, frames and blocks still referenced."""
    @property
    def time_to_flush(self) -> tuple[int, float]:
        """``(messages, seconds)``: the part of this queue in `histograms`; their quotient is the mean."""
    @property
    def queued(self) -> int: ...
    @property
    def written(self) -> int: ...
    @property
    def acknowledged(self) -> int: ...
    @property
    def errno(self) -> int:
        """The errno of the last flush that did not go through, else 0."""

# -- drain: kernel to clients ----------------------------------------------------------------------

#: The classes of messages, in the order of `Batch.counts`.
MESSAGE_CLASSES: Final[tuple[str, ...]]  # status reply stream display comm input_request error other

@final
class Batch:
    """Messages of one channel of one kernel, verified, in the order they arrived. Immutable.

    Parts up to 8 KiB are copied; larger ones stay where libzmq received them.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> list[bytes]:
        """The parts of one message, copied: the slow path of rate limits and hooks."""
    @property
    def channel(self) -> str: ...
    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
    @property
    def memory(self) -> int:
        """About what it takes of the process's memory, with the frames it was encoded to."""
    @property
    def counts(self) -> tuple[int, ...]:
        """Messages by class, in the order of `MESSAGE_CLASSES`."""
    @property
    def more(self) -> bool:
        """The budget ended the drain: more may be waiting, come back next turn."""
    @property
    def logged(self) -> bool:
        """It was appended to a `Log`."""
    @property
    def rejected(self) -> list[MessageError]:
        """Why messages were refused, at most 16 kept; `rejected_count` counts all. With ``permissive`` also what was
        wrong with the signatures of messages that passed all the same; those are not counted."""
    @property
    def rejected_count(self) -> int: ...
    @property
    def faulty(self) -> bool:
        """`rejected` is not empty."""
    @property
    def unusual(self) -> bool:
        """There are errors, or messages that are `foreign`."""
    @property
    def foreign(self) -> list[int]:
        """Indices of messages without a ``version`` or with a protocol major other than 5: jupyter_client's
        adaptation is theirs in the default protocol."""
    def headers(self, index: int) -> tuple[bytes, bytes]:
        """``(header, parent_header)`` of one message."""
    def msg_type(self, index: int) -> str: ...
    def message_class(self, index: int) -> str: ...
    def part(self, begin: int, end: int) -> Batch:
        """The messages from ``begin`` to before ``end``; their bytes are shared. Raises IndexError."""
    def replaced(self, changes: Mapping[int, Sequence[Buffer] | None]) -> Batch:
        """The same messages with the parts of some changed, or (None) left out: hooks, adaptation, rate limits.

        Raises MalformedMessage for parts that `encode_legacy` would refuse.
        """
    def frames(self, protocol: str | None) -> Frames:
        """WebSocket frames of all messages, `PROTOCOL_V1` or (None) the default protocol; encoded at the first
        call for each protocol and kept."""
    def forget_frames(self) -> None:
        """Those that were kept: memory is short."""

def batch_of(channel: str, messages: Sequence[Sequence[Buffer]], signer: Signer, *, permissive: bool = False) -> Batch:
    """A batch of multipart messages that were received elsewhere (identities and signature included).

    ``permissive`` lets messages pass whose signature does not match or was seen before; `Batch.rejected` names them.
    """

def drain(
    socket: zmq.Socket[bytes],
    channel: str,
    signer: Signer,
    *,
    max_messages: int = ...,
    max_bytes: int = ...,
    permissive: bool = False,
) -> Batch | None:
    """Receive from a ZMQ socket until EAGAIN or a budget is reached; None when nothing was there.

    Reads ``socket.underlying`` at each call. Raises SocketClosed, zmq.ZMQError; MemoryError, after which nothing is
    lost: the message that there was no memory for waits with ``signer``, and the next drain begins with it.
    """

# -- what waits for a client that is behind --

def compacted(batches: Iterable[Batch], size: int, *, join: bool = True, output: bool = True) -> list[Batch]:
    """The messages of some batches of one channel in new ones, every byte copied: the old ones' memory can go. A new
    one begins when the last has ``size`` bytes or more; none is empty.

    ``join`` makes one message of adjacent ``stream`` messages of iopub with byte-equal parent_header and name, empty
    metadata, no buffers, no other content, up to 1 MiB of text: the first one's header, all their text.
    ``output=False`` leaves out what `message_class` calls stream or display.
    Raises ValueError for no batches, or for some of different channels.
    """

def batch_of_frames(channel: str, data: bytes) -> Batch:
    """The batch whose ``bytes(batch.frames(PROTOCOL_V1))`` were put aside; trusted, so no signatures.

    Raises MalformedMessage when they are not that.
    """

@final
class Activity:
    """What a kernel does, by the rules of `jupyter_server`'s `MappingKernelManager.start_watching_activity`. Two
    differ: it is busy until each request that it said to be busy with has ended, and what it says of requests on
    control says nothing about its state, as it answers them while it is at work."""

    def __init__(self, untracked_message_types: Iterable[str], state: str = "starting") -> None: ...
    @property
    def state(self) -> str:
        """The execution state, by what was observed."""
    def observe(self, batch: Batch) -> tuple[bool, str | None]:
        """``(active, state)`` after an iopub batch: whether it is a sign of use, and the execution state if the batch
        says something about it. A message type, its own or its parent's, is a sign of use unless it is untracked."""
    @property
    def shown(self) -> int:
        """Messages of output so far: streams, displays and errors."""
    def answered(self, batch: Batch) -> None:
        """Replies have come: what they answer has ended, even if the word of that was lost on iopub. A kernel drops
        there what its socket has no room for."""
    @property
    def status(self) -> list[bytes] | None:
        """The parts of the status that said the kernel busy, of the request that it has worked on for longest. None
        when it is not busy, or when that status has more than 8 KiB."""
    def forget(self) -> None:
        """Messages may have been missed: what the kernel was busy with need not be said to have ended any more."""
    def begin_anew(self) -> None:
        """The kernel is another process: what the old one was busy with, it is not."""

# -- ledger: what became of requests ---------------------------------------------------------------

RUN_STATES: tuple[str, ...]
"""A run's states: "queued", "running", "done", "aborted", "lost"."""

@final
class Run:
    """What became of one execute_request. Found in a `Ledger`, whose it is: it changes while there is news."""

    @property
    def msg_id(self) -> str: ...
    @property
    def header(self) -> bytes:
        """Of the request, as its client sent it or, where that was not seen, as its kernel repeated it."""
    @property
    def cell(self) -> str | None:
        """The ``cellId`` in the request's metadata; at most 512 bytes of JSON, otherwise none."""
    @property
    def state(self) -> str:
        """One of `RUN_STATES`: "queued" until its kernel says that it is busy with it, "done" when it says that it is
        idle, "aborted" when its reply says so, "lost" when the kernel began anew before it was over, or its ledger
        forgot it."""
    @property
    def is_over(self) -> bool: ...
    @property
    def was_asked(self) -> bool:
        """By who asks this process. Otherwise it is known by what its kernel says of it."""
    @property
    def failed(self) -> bool:
        """There was an error."""
    @property
    def replied(self) -> bool:
        """Its execute_reply was seen."""
    @property
    def execution_count(self) -> int | None: ...
    @property
    def messages(self) -> int: ...
    @property
    def first(self) -> int:
        """The number in the log of its first message, -1 before there is one."""
    @property
    def last(self) -> int: ...
    @property
    def asks(self) -> int:
        """The number of its input_request that nobody has answered, -1 where there is none."""
    @property
    def begun(self) -> str | None:
        """When its kernel said that it began, as its clock has it."""
    @property
    def ended(self) -> str | None: ...
    @property
    def order(self) -> int:
        """Later runs have larger ones."""

@final
class Ledger:
    """The last ``most`` runs of a kernel. An `Uplink` tells what is asked, `learn` what the kernel says. A header of
    more than 8 KiB is no run's. What was asked becomes a run when the ledger is looked at or learns something; where
    that raises MemoryError it does so the next time. Where all ledgers have what they may have together
    (`limit_ledgers`), a run that is asked takes the place of older ones, of all but 32. Those that are over go first,
    and those of which only output is heard, then those that wait, then those that the kernel is at work on."""

    def __init__(self, most: int = 512) -> None: ...
    def __len__(self) -> int: ...
    @property
    def position(self) -> int:
        """What has a number below it was learned."""
    @property
    def is_full(self) -> bool:
        """Whether the next run that is asked takes the place of one that somebody waits for."""
    def get(self, msg_id: str) -> Run | None: ...
    def all(self) -> list[Run]:
        """In the order in which they were asked."""
    def learn(self, entries: list[LogEntry]) -> int:
        """Those of a log, in order. What was learned is passed by, and what the server said itself."""
    def lose_all(self) -> None:
        """The kernel is gone: what was not over is lost."""
    def begin_anew(self) -> None:
        """The kernel is another process: what was not over is lost, until the new one says that it is at work on it.
        What still waits in an `Uplink` is not lost: the new one is asked."""

def answers_to(batch: Batch, msg_id: str) -> list[int]:
    """The indices of the messages whose parent has this id."""

def indices_of_types(batch: Batch, names: list[bytes]) -> list[int]:
    """The indices of the messages of these types, ASCII."""

# -- zmtp: one connection to a kernel --------------------------------------------------------------

@final
class ZmtpStream:
    """One connection to a kernel that speaks ZMTP 3 (ZeroMQ RFC 37, and 23 for 3.0), from the side that connects, with
    the NULL mechanism. It touches no socket but the descriptors it is given: `feed` or `drain` bring bytes in, `flush`
    or `take` bring them out, `renew` begins the next connection. One that is being drained refuses with RuntimeError.

    A SUB subscribes to everything. PING is answered, unknown commands are ignored.
    """

    def __init__(self, socket_type: str, identity: Buffer | None = None, *, max_message_size: int = 4294967296) -> None:
        """``socket_type`` is "DEALER" or "SUB"; ``identity`` of a DEALER at most 255 bytes, the first not 0. Else
        ValueError. ``max_message_size`` bounds the frames of one message together."""

    @property
    def fd(self) -> int:
        """The descriptor that an `Uplink` writes to; -1, as at first, while there is none."""

    def attach(self, fd: int, tell: int = -1, poller: Poller | None = None) -> None:
        """Let an `Uplink` write to this descriptor. With ``tell``, a non-blocking pipe's end, what comes on ``fd``
        while a turn of ``poller`` lasts 20 ms or more is taken aside by a thread that needs no GIL. An octet in the
        pipe tells then that `drain` has something, also where the descriptor has not. Raises OSError when there can be
        no such thread."""

    def rest(self, rests: bool) -> None:
        """Its loop leaves it alone: what comes is taken aside, whatever the loop does."""

    def charge(self, budget: Budget) -> None:
        """What is taken aside counts there, and has its bounds."""
    def detach(self) -> None:
        """Before the descriptor is closed. What was taken aside and not drained is dropped."""
    @property
    def taken_aside(self) -> bool:
        """There is something that was taken aside."""

    @property
    def closed(self) -> bool:
        """There will be no other connection: an `Uplink` that has messages for it raises SocketClosed."""

    @property
    def socket_type(self) -> str: ...
    @property
    def state(self) -> str:
        """ "greeting", "handshake", "ready", or "over" after an error."""

    @property
    def ready(self) -> bool:
        """Messages go both ways."""

    @property
    def minor(self) -> int:
        """Of the peer's version 3; 0 before its greeting."""

    @property
    def ended(self) -> bool:
        """The peer sends no more: its end, or `errno`."""

    @property
    def errno(self) -> int:
        """Of the read that failed; 0 when the stream came to its end."""

    @property
    def foreign(self) -> bool:
        """The peer speaks an older ZMTP, another mechanism, or something else: leave it to libzmq."""

    @property
    def refused(self) -> bool:
        """The peer said ERROR: to connect again is of no use."""

    @property
    def more(self) -> bool:
        """The last `drain` ended at a budget or an error; there may be more."""

    @property
    def sent(self) -> int:
        """Messages that were wholly written."""

    @property
    def pending_bytes(self) -> int:
        """Bytes that wait to be written."""

    @property
    def pending_messages(self) -> int:
        """Messages that were not wholly written yet."""

    @property
    def unsent_messages(self) -> int:
        """Those of earlier connections that were not; whoever sends takes them back (`take_unsent`)."""

    @property
    def buffered_bytes(self) -> int:
        """Bytes that came and are no whole message yet."""

    @property
    def memory(self) -> int:
        """Bytes of memory that both take."""

    def feed(self, data: Buffer) -> None:
        """Bytes of the peer, that the next `drain` looks at."""

    def drain(
        self,
        fd: int,
        channel: str,
        signer: Signer,
        *,
        max_messages: int = ...,
        max_bytes: int = ...,
        permissive: bool = False,
    ) -> Batch | None:
        """Read from a non-blocking socket until EAGAIN or a budget is reached, and answer what is to be answered (not
        before `flush`); None when no message has ended. ``fd`` -1: look only at what was fed.

        Raises ZmtpError for what breaks the protocol, and again at each call until `renew`; MemoryError, after which
        nothing is lost. Messages before either are returned first, with ``more`` set.
        """

    def send(self, frames: Sequence[Buffer]) -> bool:
        """Queue one message. False when it was not taken: the connection is not ready, or 64 KiB wait already."""

    def flush(self, fd: int) -> int:
        """Write until everything is written (FLUSH_DONE) or the socket takes no more; the other answers are those of
        `WriteQueue.flush`."""

    def take(self, limit: int) -> bytes:
        """At most ``limit`` bytes of what would be written, which count as written."""

    def close(self) -> None:
        """For good, and without its memory; messages that were not wholly written become `unsent_messages`."""
    def renew(self) -> None:
        """The connection is gone: begin the next one. What was received in part is dropped; messages that were not
        wholly written become `unsent_messages`."""
    def take_unsent(self) -> list[list[bytes]]:
        """The messages that connections before did not wholly take, in order, each as its frames. An `Uplink` takes
        them back by itself, before what waits there, and sends them again when there is room."""

# -- uplink: client to kernel ----------------------------------------------------------------------

@final
class Uplink:
    """One client's messages to the shell, control and stdin sockets of its session.

    Decodes, signs and sends without a Python object per message. What a full socket does not take waits here, in
    order, per channel.
    """

    def __init__(
        self,
        protocol: str | None,
        signer: Signer,
        sockets: Mapping[str, zmq.Socket[bytes] | ZmtpStream],
        *,
        allowed_message_types: frozenset[str] = ...,
        ledger: Ledger | None = None,
    ) -> None:
        """``ledger`` is told of each execute_request, and that questions are answered."""
    def relay(self, parser: FrameParser) -> int:
        """Take data messages from ``parser`` until it is empty or a control frame is next.

        Returns a set of bits: 1 << index in ("shell", "control", "stdin") for each socket that was sent to and has
        something to read: sending can swallow the edge of its descriptor; a `ZmtpStream` was flushed, and has something
        that could not be written. Raises MalformedMessage for the first message that is not one, and SocketClosed; that
        message has been taken, and the bits come with the next call.
        Any other error (MemoryError, RuntimeError while this uplink is sending) leaves the message in the parser.
        """
    def send(self, opcode: int, payload: str | Buffer) -> int:
        """The same for one message that is already in Python's hands."""
    def retry(self) -> int:
        """Send again what waits; the result is that of `relay`."""
    def adopt(self, other: Uplink) -> None:
        """Take over what waits in another uplink, before what waits here, and what it has counted: the client
        has a new socket, or the kernel a new key (what waits is signed anew). Where the sockets are others,
        also what a `ZmtpStream` of the other had not wholly written. The other is empty afterwards. Without memory
        nothing is taken over."""
    held: bool
    """Requests on shell wait, whether the socket has room or not; control and stdin go on."""
    @property
    def waiting_bytes(self) -> int:
        """What waits here, with 80 for each part: a message of many empty buffers is not free."""
    @property
    def sending_bytes(self) -> int:
        """What libzmq was given and has not passed on to the kernel's TCP, counted the same way; and what a
        `ZmtpStream` has not written."""
    @property
    def waiting_messages(self) -> int:
        """Also those that a `ZmtpStream` had not wholly written when its connection ended."""
    @property
    def sending_messages(self) -> int:
        """Those that a `ZmtpStream` has and has not wholly written. How many libzmq has nobody knows."""
    @property
    def sent(self) -> int:
        """Messages a socket has taken."""
    def answered(self, batch: Batch) -> None:
        """What the kernel has sent on these sockets: its replies, and what it asks."""
    def retire(self) -> None:
        """What waits here is not sent any more: runs among it are lost."""
    def forget(self) -> None:
        """The kernel was started again: what the old process was asked, and what it asked, nobody answers any more."""
    @property
    def unanswered(self) -> int:
        """Requests on shell and control that a socket has taken, and that had no reply."""
    @property
    def asked(self) -> bool:
        """The kernel waits for an input_reply."""
    @property
    def answers(self) -> int:
        """Messages on stdin, which answer what the kernel has asked: those that a socket has taken, and that wait."""
    @property
    def ignored(self) -> list[str]:
        """Since the last look: unknown channels and message types that are not allowed, in words; taking them clears
        them."""

# -- for the tests ---------------------------------------------------------------------------------

# -- the compiled turn: bases of classes in other rooms, which tell of what they do ----------------

class Part:
    """What a turn of the loop calls without Python."""

class Poller:
    """The turns of one loop: which descriptors are ready, who writes at the end, whose time has come (`fastwire.turns`
    says how the loop is asked for them). ``report(who, error)`` is called when one raises, and ``later(callback)`` when
    the loop is to call soon; ``later(None)`` when it is to call `tick` after 20 ms. Of very many who have the same to
    write 256 do so at a turn's end, behind all others."""

    def __init__(
        self, report: Callable[[object, Exception], None], later: Callable[[Callable[[], None] | None], None]
    ) -> None: ...
    def __len__(self) -> int:
        """Descriptors that are watched."""

    @property
    def fd(self) -> int:
        """The epoll's; -1 without one."""

    @property
    def has_taken_over(self) -> bool:
        """It stands where the loop waits."""

    @property
    def turns(self) -> int:
        """That have begun: by them, and by when it waits, the standby reader knows whether the loop goes on."""

    def open(self) -> bool:
        """Whether there is an epoll now: not on every system, nor when descriptors have run out."""

    def close(self) -> None: ...
    def take_over(self, selector: EpollSelector) -> bool:
        """Wait in the place of a loop's selector: its ``select`` is ours until `close`. False where the system has no
        room for that."""

    def give_back(self) -> None: ...
    def select(self, timeout: float | None = None) -> list[tuple[SelectorKey, int]]:
        """See `selectors.BaseSelector.select`: what is ready of the loop's own, after what is ready of ours."""

    def watch(self, fd: int, callback: Callable[[], None] | Part) -> None:
        """Call it in each turn in which ``fd`` is readable. Raises OSError."""

    def unwatch(self, fd: int, callback: Callable[[], None] | Part) -> bool:
        """Whether it was watched."""

    def turn(self) -> None:
        """Everything that is ready now, where the loop calls us."""

    def ready(self, callback: Callable[[], None] | Part) -> None:
        """One descriptor is, where the loop watches each."""

    def wake(self, part: Part) -> None:
        """As if its descriptor were ready."""

    def at_end(self, callback: Callable[[], None]) -> None:
        """Call it once at the end of this turn, or of the next when none is running."""

    def end_turn(self) -> None: ...
    def tick(self) -> None:
        """Call those whose time has come, where the loop looks at the time for us."""

class Asking:
    """The numbers of `fastwire.flow.Acknowledgements`."""

    position: int
    outstanding: bool
    demoted: bool
    _answered: bool
    _asked: int
    _since: float
    _again: float

    def __new__(cls, prefix: bytes, delay: float, tail: float, interval: float, much: int) -> Self: ...
    @property
    def _number(self) -> int: ...
    @property
    def _payload(self) -> bytes: ...
    def wanted(self, position: int, now: float) -> bool:
        """The bytes before ``position`` go out now. Returns whether a ping is to go with them and ask about them."""

    def wait(self, position: int, now: float) -> float | None:
        """Seconds until the bytes before ``position`` are asked about although nothing follows them; None when they
        have been."""

    def ask(self, position: int, now: float) -> bytes:
        """The payload of a ping that is queued behind ``position``."""

    def answer(self, payload: bytes, written: int) -> bool:
        """A pong came when ``written`` bytes had gone out. Returns whether it answers our ping: its payload can be
        guessed, and nobody has what was not written."""

class Wire(Part):
    """One client's connection, where nothing happens but messages (`fastwire.transport`). ``owner`` is told the rest.

    ``fd`` is -1 where Tornado's stream has it, and when it is closed. With an `uplink` messages go to the kernel from
    here; ``settle(readable)`` is called when something is left to do after that (`Uplink.relay`): always while
    ``watched``, and when more than ``free_bytes`` are on their way.
    """

    fd: int
    parser: FrameParser
    waits_for: int
    data_end: int
    we_are_done: bool
    closes: bool
    attended: bool
    on_progress: Callable[[], None] | None
    outlet: Outlet | None
    asks: Asking | None
    look_delay: float
    hands_out: bool
    uplink: Uplink | None
    settle: Callable[[int], None] | None
    free_bytes: int
    watched: bool

    def __init__(self, fd: int, parser: FrameParser, queue: WriteQueue, poller: Poller, owner: object) -> None: ...
    @property
    def queue(self) -> WriteQueue: ...
    @property
    def over(self) -> bool: ...
    @property
    def writes(self) -> int:
        """System calls."""

    @property
    def answered(self) -> int:
        """Of our pings, those whose answers did not pass through Python."""

    @property
    def received(self) -> int:
        """How far the peer is known to have our bytes: acknowledged, or written where it is not asked."""

    def end(self) -> None:
        """Nothing is read or written any more."""

    def schedule(self) -> int:
        """Write once at the end of this turn, unless a write waits for something else already."""

    def extend(self, frames: Frames) -> int:
        """Queue them, and write. Returns the position behind them."""

    def write(self) -> int:
        """One sendmsg; see `WriteQueue.flush`."""

    def progress(self) -> int:
        """The peer has more of our bytes, or the system has."""

    def ride(self) -> int:
        """Bytes are about to be written: a ping that is due goes with them."""

    def look_after(self, seconds: float) -> int:
        """At the ping that is not answered, or at what is to be asked about."""

    def is_acknowledged(self) -> int:
        """A pong has said so."""

ENTRY: int

class Marks:
    """The base of `fastwire.budgets.Budgets`: the numbers that each message is measured by, in bytes."""

    high_water: int
    turn: int

class Budget:
    """See `fastwire.budgets.Budget`. Bytes."""

    limit: int
    used: int
    freed: int
    whole: Budget | None

    def __init__(self, limit: int, whole: Budget | None = None) -> None: ...
    def move(self, whole: Budget) -> None:
        """Be a part of another from now on."""

    @property
    def aside(self) -> int:
        """Of memory, what the standby reader has taken off connections (`ZmtpStream.attach`)."""

    def limit_aside(self, limit: int) -> None:
        """So much may that be; at first it has no limit."""

    @property
    def kept(self) -> int:
        """Of those that are used, what everybody has: it goes first."""

    @property
    def needed(self) -> int:
        """What somebody has still to get."""

    @property
    def logs(self) -> set[Any]: ...
    @property
    def sealed(self) -> set[Any]:
        """The logs that have something whole which somebody needs."""

    @property
    def histories(self) -> set[Any]:
        """Those that keep what everybody has."""

    @property
    def share(self) -> int: ...
    def take(self, nbytes: int, kept: int = 0) -> None: ...

class LogEntry:
    """A batch in the log, for all or (``audience``) for one cursor. Its messages are numbered from ``first`` on; the
    numbers up to ``end`` that it has no messages for belong to nothing. A ``momentary`` one is true only for the
    sockets that were there when it was said; what the server says itself is ``ours``, and no client's policy is asked.
    A line that tells of messages that are ``missing`` counts for so many.
    """

    first: int
    end: int
    batch: Batch
    audience: int | None
    memory: int
    momentary: bool
    ours: bool
    missing: int

    def __init__(
        self,
        first: int,
        end: int,
        batch: Batch,
        audience: int | None = None,
        *,
        momentary: bool = False,
        ours: bool = False,
        missing: int = 0,
    ) -> None: ...
    def __len__(self) -> int: ...
    @property
    def count(self) -> int:
        """The messages that it stands for."""

    @property
    def has_output(self) -> bool:
        """That may be dropped."""

    def part(self, begin: int, end: int) -> LogEntry:
        """Its messages from the number ``begin`` to before ``end``."""

class LogSegment:
    """The base of `fastwire.segments.Segment`."""

    state: Any
    first: int
    end: int
    entries: list[LogEntry] | None
    counts: dict[int | None, int]
    memory: int
    previous: Any
    next: Any
    record: Any
    standers: dict[Any, None]
    waiters: list[Any]
    is_joined: bool
    version: int
    weight: int

    @property
    def nbytes(self) -> int:
        """What it takes, in memory or else on the disk."""

    def read(self, position: int) -> list[LogEntry]:
        """Its entries that end behind a number."""

#: Bytes of a segment; a larger one is not copied when it is kept.
LARGEST_TO_KEEP: int

class Kept(LogSegment):
    """What everybody has and somebody may ask for: messages of runs, copied."""

class Given:
    """What a socket was given of an entry, or of a part of it: where that begins and ends in the socket's bytes, and
    the numbers of its messages, which are those from ``first`` on unless ``numbers`` has them."""

    def __init__(
        self, end: int, begin: int, ends: Any, first: int, numbers: Sequence[int] | None, segment: LogSegment
    ) -> None: ...
    @property
    def end(self) -> int: ...
    @property
    def begin(self) -> int: ...
    @property
    def ends(self) -> Any: ...
    @property
    def first(self) -> int: ...
    @property
    def numbers(self) -> Sequence[int] | None: ...
    @property
    def segment(self) -> Any: ...
    def reached(self, position: int) -> int | None:
        """The number of the first message that does not lie wholly before a position of the socket."""

    def longest(self, received: int, written: int) -> tuple[int, int]:
        """The bytes and the number of the longest message on its way at these positions of the socket; or no bytes."""

class Flight:
    """What a client was given and is not known to have, the oldest first."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Given]: ...
    @property
    def oldest(self) -> Given | None: ...
    def add(self, given: Given) -> int: ...
    def clear(self) -> None: ...

class LogCursor:
    """The base of `fastwire.journal.Cursor`."""

    is_connected: bool
    was_closed: bool
    place: Any
    position: int
    taken: int
    written: int
    passed_over: set[int]
    stands: Any

    def __init__(self, journal: Log, number: int, user: str, budget: Budget) -> None: ...
    @property
    def number(self) -> int: ...
    @property
    def user(self) -> str: ...
    @property
    def budget(self) -> Budget: ...
    @property
    def flight(self) -> Flight: ...
    @property
    def is_live(self) -> bool: ...
    def stand(self) -> None:
        """Where it needs nothing before."""

    def given(self, entry: LogEntry, begin: int, end: int, ends: Any, indices: Sequence[int] | None = None) -> None:
        """A socket was given messages of the next entry, all or those with these indices; none where ``end`` is
        ``begin``."""

    def release(self, position: int) -> None:
        """The client has received everything before a position of its socket: what nobody needs then goes."""

    def release_only(self, position: int) -> None:
        """The same, and of the segment that is open nothing goes yet."""

class Log:
    """The base of `fastwire.journal.Journal`: `append`, then give the entry to whom it is for, then `settle`; or all
    three at once, by `say` and `tell`."""

    front: Any
    needed: Any
    """Where begins what somebody may need. What is before is history."""
    open: Any
    history_limit: int
    history: int
    """Bytes of what everybody has."""
    end: int
    user_budget: Any
    count_of_behind: int

    def __init__(
        self,
        budget: Budget,
        total: Budget,
        first: LogSegment,
        sizes: tuple[int, int, int, int, int],
        parts: tuple[int, int, int, int],
        states: tuple[Any, Any],
        joins: bool,
    ) -> None: ...
    cursors: dict[int, Any]
    budget: Any

    @property
    def readers(self) -> set[Any]:
        """Who reads. Lines of output are not joined over their ``position``."""

    @property
    def told(self) -> set[int]:
        """Where others stopped who may come back: the same."""

    @property
    def segment_size(self) -> int:
        """Bytes of memory at which a segment is whole."""

    @property
    def window(self) -> int:
        """Bytes that a client may have on their way to it, unacknowledged: they cannot be dropped."""

    def append(
        self,
        batch: Batch,
        audience: int | None = None,
        *,
        momentary: bool = False,
        ours: bool = False,
        missing: int = 0,
    ) -> LogEntry: ...
    def listen(self, outlet: Outlet) -> None:
        """It hears all that is said from now on."""

    def unlisten(self, outlet: Outlet) -> None: ...
    def say(self, batch: Batch, *, ours: bool = False) -> None:
        """Messages for all who listen. What is said while others are given something comes behind that."""

    def tell(
        self, outlet: Outlet, batch: Batch, *, momentary: bool = False, ours: bool = False, missing: int = 0
    ) -> None:
        """Messages for one, as `say`. Raises ValueError for a ``missing`` below 0."""

    def settle(self) -> None:
        """Whoever could be given the newest entry at once was."""

    def recount(self, segment: LogSegment, entry: LogEntry) -> None:
        """Encoding it for a socket has made it larger."""

    def hold(self, segment: LogSegment, nbytes: int) -> int: ...
    def leave(self, segment: LogSegment) -> None:
        """A cursor stands there no more: what nobody needs is history, or can go."""

    @property
    def ledger(self) -> Ledger:
        """What became of what clients asked. It is told of a segment when that is whole, of what is open when that
        goes, and else by `learn`, before it is read."""

    def learn(self) -> None: ...
    def keep(self, segment: LogSegment) -> bool:
        """The first that is needed is not any more: what may be asked for is copied. False: something is missing there,
        and it stays as it is. What raises (there is no memory) may be called again."""

    def count_as_history(self, segment: LogSegment) -> None:
        """It has passed as it is."""

    def charge_hindmost(self) -> None:
        """The cursor before that one has ended: it is its user's now, by `charge_to`."""

    def drop_front(self) -> None:
        """The oldest of what is kept."""

    def empty(self) -> None:
        """The segment that is open is all there is, and nobody needs it."""

class Outlet:
    """The base of `fastwire.downlink.Downlink`: one client's way out of a log, where it gets what everybody gets."""

    wire: Wire | None
    protocol: str | None
    prepare: Callable[[Batch], Any] | None
    prepare_all: bool
    compresses: bool

    budgets: Any

    def __new__(cls, cursor: Any, *args: Any, **options: Any) -> Self: ...
    cursor: Any

    def has_room(self) -> bool:
        """The socket may be given more."""

class KernelTraffic:
    """Messages of a kernel, and the bytes of their parts."""

    messages: int
    nbytes: int

class KernelSide(Part):
    """The base of `fastwire.relay.KernelRelay`: what a kernel says on its way into its log, and what is learned from it
    in passing."""

    journal: Any
    activity: Activity
    traffic: KernelTraffic
    listeners: dict[object, Any]
    iopub_source: Source | None
    needs_a_word: bool
    observers: list[Callable[[bool, str | None], None]]
    poller: Poller
    budgets: Any

    def on_iopub(self, batch: Batch) -> None:
        """For all clients, and for who looks whether the kernel is at work."""

    def after_output(self, give: Callable[[Batch], None], batch: Batch) -> None:
        """Call ``give`` with what was read on another channel when iopub was read to its end."""

    def holds_enough(self) -> bool:
        """Whether as much as may be read in a turn waits for output already."""

    def look_at_replies(self) -> None:
        """iopub was read: what waits for that may go."""

    def give_replies(self) -> None:
        """Now, whatever may still come."""

    def unseen(self) -> tuple[bool, str | None]:
        """What `observers` have not been told: whether there was activity, and the state if it was said."""

    def forget_times(self) -> None: ...
    @property
    def last_headers(self) -> tuple[bytes, bytes] | None:
        """Of the last message on iopub: its header and parent header; None before."""

class Source(Part):
    """One channel of a kernel that is spoken to without libzmq (`fastwire.channels.ZmtpChannel`)."""

    uplink: Uplink | None
    was_ready: bool
    comes_back: bool
    kept: Batch | None

    def __init__(self, stream: ZmtpStream, poller: Poller, owner: Any) -> None:
        """``owner.wake`` is called when there is something to receive."""

    @property
    def stream(self) -> ZmtpStream: ...
    def pass_to(
        self, channel: Any, signer: Signer, permissive: bool, kernel: KernelSide, outlet: Outlet | None = None
    ) -> None:
        """Messages pass to a kernel's log, for all or for one, without the channel; what else happens is its."""

    def end(self) -> None:
        """The channel is closed."""

def memory_beside_logs() -> int:
    """Bytes of memory that messages take which are in no log: in the queues of sockets, on their way from kernels,
    taken aside while the loop was blocked; and what is kept for the next."""

def trim_memory() -> None:
    """Give memory that was freed back to the system, also where the C library would keep it: milliseconds."""

def limit_histories(limit: int) -> None:
    """Bytes of memory that the digests which refuse replays (`Signer`) may take together; at first 8 MiB."""

def limit_ledgers(limit: int) -> None:
    """Bytes of memory that what is known of runs (`Ledger`) may take together; at first 8 MiB."""

def limit_standby(limit: int) -> None:
    """Bytes of memory that what is taken aside (`ZmtpStream.attach`) may have in the whole process, whatever budgets
    allow (`Budget.limit_aside`); at first without a limit. At the bound it stays with the system, and then with the
    kernels."""

def script_syscalls(steps: Sequence[tuple[str, str | int]]) -> None:
    """Script the core's system calls: each step is ``(call, outcome)``, call "recv" or "sendmsg", outcome an errno
    name ("EAGAIN", "EINTR", "ENOBUFS", ...), or a number n: let at most n bytes through (0: the call answers 0).
    Of "zmq_send", a frame for libzmq, n is a descriptor that must be readable before (0: none). Of "entropy", random
    bytes, there are errnos only.
    Steps are used up in order by calls of that name; afterwards calls are real again. [] ends the script."""

def scripted_left() -> int:
    """Steps not used yet: a test asserts 0, so that each fault has fired."""

def fail_allocation(number: int) -> None:
    """Let the core's allocation of that number, from now on, fail; 0 ends the script. Those of Python's objects are
    not among them."""

def force_portable(portable: bool) -> None:
    """Sign as a CPU without SHA instructions does. ``make portable`` builds without the others too."""

def longest_probe(signer: Signer) -> int:
    """The most slots of its history's table that a search for a digest in it looks at."""

def receive_and_drop(socket: zmq.Socket[bytes]) -> int:
    """Receive and drop every message that waits; returns how many. For benchmarks: what receiving alone costs."""

def use_pyzmq(fallback: bool) -> None:
    """Receive and send through pyzmq's API although libzmq's functions were found. Used for the fallback's tests."""
