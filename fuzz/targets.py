"""What the fuzzer calls: one function for each parser of the core, given any bytes.

A target returns when all is well. It raises for an error that `_core.pyi` does not document and for an answer that is
not the oracle's (tests/oracle.py); `run` does for an object of the core that outlives the input. All of it works with
an ordinary build too: tests/test_fuzz.py.

The first octet of most inputs chooses options. `data` is a view of exactly the input, so a sanitizer sees what the core
reads behind its end.
"""

import gc
import json
import re
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import cycle
from pathlib import Path

import zmq
import zmq.utils.garbage

from fastwire import _core
from fastwire.budgets import Budgets
from fastwire.errors import FrameError, MalformedMessage, MessageError, ZmtpError
from fastwire.flow import Limits
from fastwire.journal import Journal
from fastwire.segments import Entry, Gap, Segment, packed, unpacked

sys.path.append(str(Path(__file__).parents[1] / "tests"))

import oracle
import zmtp_oracle

Target = Callable[[memoryview], None]
TARGETS: dict[str, Target] = {}

KEY = b"a key"
PROTOCOLS = (None, _core.PROTOCOL_V1)
DEPTH = 1000  # of JSON, as _core.pyi has it
KEEPS_ALL = Limits(history_limit=1 << 30, merge=False)


def target(function: Target) -> Target:
    TARGETS[function.__name__] = function
    return function


def prepared(name: str) -> Callable[[memoryview], None]:
    """`run` for one target, in a Python whose json has no limits of its own."""
    lift_limits()
    return partial(run, name)


def finish() -> None:
    """End the thread by which pyzmq hears what libzmq has let go of: cut off, it leaks what it stands on."""
    zmq.utils.garbage.gc.stop()


def lift_limits() -> None:
    """Nesting is refused by Python's json for reasons the core does not have, long integers by both or by neither."""
    sys.setrecursionlimit(20_000)
    sys.set_int_max_str_digits(0)


def run(name: str, data: memoryview) -> None:
    """One input through one target."""
    before = _core.live()
    TARGETS[name](data)
    for generation in range(3):
        if _core.live() == before:
            return
        gc.collect(generation)  # slow, and only cycles need it
    assert _core.live() == before, f"left behind: {_core.live()}, before: {before}"


# -- comparing -------------------------------------------------------------------------------------


def attempt(function: Callable[..., object], *arguments: object) -> object:
    """What it returns, or the class of the error that is documented."""
    try:
        return function(*arguments)
    except MessageError as error:
        return type(error)


def is_deep(text: str) -> bool:
    """Whether JSON is nested beyond `DEPTH`: the one thing the core refuses and Python does not."""
    depth = deepest = 0
    for bracket in re.findall(r"[\[\]{}]", re.sub(r'"(?:[^"\\]|\\.)*"', "", text, flags=re.DOTALL)):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest > DEPTH


def agree(core: object, plain: object, text: str = "") -> None:
    """The same answer, or ``text`` is the reason why there is none."""
    if core is MalformedMessage and plain is not MalformedMessage and is_deep(text):
        return
    assert core == plain, f"the core says {core!r}, the oracle {plain!r}"


# -- frames ----------------------------------------------------------------------------------------

LIMITS = (10485760, 1000, 125, 0)
FRAGMENTS = 3


@cache
def connection() -> tuple[socket.socket, socket.socket]:
    """``(the server's, the client's)``."""
    server, client = socket.socketpair()
    server.setblocking(False)
    return server, client


def received(parser: _core.FrameParser, chunk: memoryview) -> None:
    server, client = connection()
    client.sendall(chunk)
    assert parser.receive(server.fileno()) == len(chunk)
    assert parser.receive(server.fileno()) == -1


def chunks(data: memoryview, size: int) -> Iterator[memoryview]:
    """Pieces of ``size`` octets and of one, in turn."""
    at = 0
    for length in cycle((size, 1)):
        if at >= len(data):
            return
        yield data[at : at + length]
        at += length


def taken(parser: _core.FrameParser | oracle.OracleParser) -> tuple[list[tuple[int, str | bytes]], type | None]:
    """What comes out before the parser stops, and the error that stops it."""
    items = []
    try:
        for item in parser:
            items.append(item)  # noqa: PERF402 - they are kept when the error comes
    except FrameError as error:
        return items, type(error)
    return items, None


@target
def frames(data: memoryview) -> None:
    """A client's stream in chunks, through one parser and through a second that shares the read buffer."""
    if len(data) < 2:
        return
    options, size = data[0], data[1] + 1
    deflate, late, by_socket, limit = options & 1, options & 2, options & 4, LIMITS[options >> 3 & 3]
    settings = {"deflate": bool(deflate), "max_fragments": FRAGMENTS if options & 32 else 0}
    parsers = [_core.FrameParser(limit, **settings) for _ in range(2)]
    seen: list[list[tuple[int, str | bytes]]] = [[], []]
    with data[2:] as stream:
        for chunk in chunks(stream, size):
            for parser, items in zip(parsers, seen, strict=True):
                received(parser, chunk) if by_socket else parser.feed(chunk)
                if not late:
                    items.extend(taken(parser)[0])
            chunk.release()  # fails if the core holds on to it
        plain = oracle.OracleParser(limit, **settings)
        plain.feed(stream)
        expected, error = taken(plain)
    for parser, items in zip(parsers, seen, strict=True):
        assert parser.pending == 0 or late
        last, stopped = taken(parser)
        agree((items + last, stopped), (expected, error))
        assert taken(parser) == ([], error), "an error is said again"
        assert (parser.closed, parser.control_frames) == (plain.closed, plain.control_frames)
        assert parser.buffered_bytes <= len(data)
    plain.error = None  # its traceback holds this function's parsers


@target
def passing(data: memoryview) -> None:
    """A stream in chunks, from a client or a server, passed on to a server or a client."""
    if len(data) < 2:
        return
    options, size = data[0], data[1] + 1
    client, mask, limit = bool(options & 1), bool(options & 2), LIMITS[options >> 3 & 3]
    settings = {"client": client, "max_fragments": FRAGMENTS if options & 32 else 0}
    parser, sink, wire = _core.FrameParser(limit, **settings), _core.WriteQueue(mask=mask), b""
    parser.relay(sink)
    with data[2:] as stream:
        for chunk in chunks(stream, size):
            received(parser, chunk) if options & 4 else parser.feed(chunk)
            wire += sink.take(1 << 20)
            chunk.release()
        plain = oracle.OracleRelay(limit, **settings)
        plain.feed(stream)
        expected, wrong = plain.passed()
    out = oracle.OracleRelay(client=not mask)
    out.feed(wire)
    closes, stopped = taken(parser)
    agree((out.passed(), stopped), ((expected, None), wrong))
    if wrong is None:
        agree((out.begun(), len(closes)), (plain.begun(), plain.closed))


@target
def close(data: memoryview) -> None:
    try:
        plain: object = oracle.parse_close(data)
    except FrameError as error:
        plain = type(error)
    try:
        core: object = _core.parse_close(data)
    except FrameError as error:
        core = type(error)
    agree(core, plain)
    if isinstance(core, tuple):
        agree(_core.close_payload(*core), oracle.close_payload(*core))


# -- JSON and both protocols -----------------------------------------------------------------------


@target
def json_text(data: memoryview) -> None:
    agree(attempt(_core.check_json, data), attempt(oracle.check_json, data), oracle.text_of(data))


@target
def header(data: memoryview) -> None:
    agree(attempt(_core.header_fields, data), attempt(oracle.header_fields, data), oracle.text_of(data))


@target
def v1(data: memoryview) -> None:
    core = attempt(_core.decode_v1, data)
    agree(core, attempt(oracle.decode_v1, data))
    if isinstance(core, tuple):
        again = _core.encode_v1(*core)
        agree(again, oracle.encode_v1(*core))
        agree(_core.decode_v1(again), core)


def text_frame(data: memoryview) -> str:
    """Half a surrogate pair can be said: Python's callers may hold such a string."""
    return bytes(data).decode("utf-8", "surrogatepass" if data[:1] == b" " else "replace")


@target
def legacy_text(data: memoryview) -> None:
    try:
        text = text_frame(data)
    except UnicodeDecodeError:
        return
    agree(attempt(_core.decode_legacy, text), attempt(oracle.decode_legacy, text), text)


def json_of(payload: str | memoryview) -> str:
    """The JSON text of a client's message, "" where there is none."""
    if isinstance(payload, str):
        return payload
    found = attempt(oracle.split_binary, bytes(payload))
    return found[0] if isinstance(found, tuple) else ""


@target
def legacy_binary(data: memoryview) -> None:
    agree(attempt(_core.decode_legacy, data), attempt(oracle.decode_legacy, data), json_of(data))


# -- a kernel's messages ---------------------------------------------------------------------------

# These octets are in no UTF-8, so in no JSON. One octet each: a mutation that moves it is still an input.
FRAME, MESSAGE = b"\xfe", b"\xff"
MEDIUM, LARGE = b"\xfc", b"\xfd"  # stand for so many octets; with one more, `LARGE` is not copied by the core
SIZES = {MEDIUM: 3000, LARGE: 8192}
SIGN_HERE = b"S"

channels = ("iopub", "shell", "é\u20ac", "")


def multipart(data: memoryview, key: bytes) -> list[list[bytes]]:
    """The multipart messages an input spells, at most 20."""
    texts = bytes(data).split(MESSAGE)[:20] if data else []
    return [signed(list(map(grown, text.split(FRAME))), key) for text in texts]


def grown(frame: bytes) -> bytes:
    for mark, size in SIZES.items():
        frame = frame.replace(mark, b"x" * size, 4)
    return frame


def signed(multipart: list[bytes], key: bytes) -> list[bytes]:
    """`SIGN_HERE` becomes the signature of the parts behind it."""
    if SIGN_HERE not in multipart[:-4]:
        return multipart
    at = multipart.index(SIGN_HERE)
    return [*multipart[:at], oracle.Signer(key).sign(multipart[at + 1 :]), *multipart[at + 1 :]]


def loads(text: str) -> object:
    """The value of JSON, NaN as something that is equal to itself. None for what is no JSON: nobody reads what a kernel
    sends behind its header."""
    try:
        return json.loads(text, parse_constant=lambda name: ("constant", name))
    except (ValueError, RecursionError):
        return None


def check_legacy(channel: str, parts: Sequence[bytes]) -> bytes:
    """The frame of a message in the default protocol, held against the oracle as JSON: the core keeps spellings."""
    core, plain = (module.encode_legacy(channel, parts) for module in (_core, oracle))
    assert type(core) is type(plain)
    if isinstance(core, str):
        agree(loads(core), loads(plain))
    else:
        (core_text, core_buffers), (plain_text, plain_buffers) = map(oracle.split_binary, (core, plain))
        agree((loads(core_text), core_buffers), (loads(plain_text), plain_buffers))
    return oracle.server_frame(core)


def is_classified_as_spelled(header: bytes) -> bool:
    """Known: the core looks for _reply at the end and comm_ at the beginning of a type without unescaping it, takes
    every comm_ for a comm and a bare _reply for none."""
    msg_type = oracle.header_fields(header)[1]
    return b"\\" in header or msg_type == "_reply" or msg_type.startswith("comm_")


def check_batch(batch: _core.Batch, messages: list[list[bytes]]) -> None:
    """All that a batch says of itself follows from its messages."""
    agree([batch[i] for i in range(len(batch))], messages)
    types = [oracle.header_fields(parts[0])[1] for parts in messages]
    agree([batch.msg_type(i) for i in range(len(batch))], types)
    classes = [batch.message_class(i) for i in range(len(batch))]
    plain = [oracle.message_class(msg_type) for msg_type in types]
    for parts, found, expected in zip(messages, classes, plain, strict=True):
        assert found == expected or is_classified_as_spelled(parts[0]), f"{parts[0]!r} is {found}, not {expected}"
    agree(batch.counts, tuple(map(classes.count, _core.MESSAGE_CLASSES)))
    agree(batch.nbytes, sum(len(part) for parts in messages for part in parts))
    agree(batch.foreign, [i for i, parts in enumerate(messages) if oracle.is_foreign(parts[0])])


def check_frames(batch: _core.Batch, messages: list[list[bytes]]) -> list[tuple[_core.Frames, bytes]]:
    """Its frames in both protocols, and what must be in them."""
    v1_frames = [oracle.server_frame(oracle.encode_v1(batch.channel, parts)) for parts in messages]
    legacy_frames = [check_legacy(batch.channel, parts) for parts in messages]
    results = []
    for protocol, each in zip(PROTOCOLS, (legacy_frames, v1_frames), strict=True):
        encoded = batch.frames(protocol)
        agree((len(encoded), encoded.nbytes), (len(each), sum(map(len, each))))
        if each:
            first = len(each[0])
            agree([encoded.ends.complete_before(n) for n in (0, first - 1, first)], [0, 0, 1])
        results.append((encoded, b"".join(each)))
    return results


def written(encoded: _core.Frames) -> bytes:
    """Its bytes as a queue gives them away, in pieces."""
    queue = _core.WriteQueue()
    queue.extend(encoded)
    return b"".join(iter(partial(queue.take, 5000), b""))


def check_encoded(results: list[tuple[_core.Frames, bytes]]) -> None:
    for encoded, expected in results:
        agree(bytes(encoded), expected)
        agree(written(encoded), expected)


Judged = tuple[list[list[bytes]], int, list[type]]


def judged(messages: Sequence[Sequence[bytes]], signer: oracle.Signer, *, permissive: bool) -> Judged:
    """By the oracle: the parts of the good ones, how many are refused, and the classes of all errors."""
    verdicts = [oracle.judge(frames, signer, permissive=permissive) for frames in messages]
    accepted = [parts for parts, _ in verdicts if parts is not None]
    errors = [type(error) for _, remarks in verdicts for error in remarks]
    refused = len(verdicts) - len(accepted)
    verdicts.clear()  # an error holds its traceback, that holds frames, and they the batch
    return accepted, refused, errors


def check_replaced(batch: _core.Batch, messages: list[list[bytes]], index: int, parts: list[bytes] | None) -> None:
    """One message changed, or left out."""
    expected: object = [*messages[:index], *([] if parts is None else [parts]), *messages[index + 1 :]]
    if parts is not None and attempt(oracle.encode_legacy, "", parts) is MalformedMessage:
        expected = MalformedMessage
    other = attempt(batch.replaced, {index: parts})
    if expected is MalformedMessage or other is MalformedMessage:
        agree(other, expected, oracle.text_of(parts[0]) if parts else "")
        return
    check_batch(other, expected)
    results = check_frames(other, expected)
    del other
    check_encoded(results)


def is_too_deep(messages: list[list[bytes]]) -> bool:
    """Perhaps there is a header that only the oracle reads: all that follows would differ."""
    return any(frame.count(b"[") + frame.count(b"{") > DEPTH for frames in messages for frame in frames)


@target
def split(data: memoryview) -> None:
    for each in multipart(data, b""):
        agree(attempt(_core.split_identities, each), attempt(oracle.split_identities, each))
        views = list(map(memoryview, each))
        agree(attempt(_core.split_identities, views), attempt(oracle.split_identities, each))


@target
def batch(data: memoryview) -> None:
    """Multipart messages that Python holds: judged, indexed, changed, and encoded in both protocols."""
    if len(data) < 2:
        return
    options, choice = data[0], data[1]
    key, permissive, channel = KEY if options & 1 else b"", bool(options & 2), channels[options >> 2 & 3]
    messages = multipart(data[2:], key)
    if is_too_deep(messages):
        return
    _core.force_portable(bool(options & 16))
    made = _core.batch_of(channel, messages, _core.Signer(key), permissive=permissive)
    accepted, refused, errors = judged(messages, oracle.Signer(key), permissive=permissive)
    agree((made.rejected_count, list(map(type, made.rejected))), (refused, errors[:16]))
    check_batch(made, accepted)
    results = check_frames(made, accepted)
    if accepted:
        index, parts = choice % len(accepted), messages[choice >> 4 & 7 if choice >> 4 & 7 < len(messages) else 0]
        check_replaced(made, accepted, index, None if choice & 128 else parts[2:])
    del made
    check_encoded(results)  # they need no batch
    _core.force_portable(False)


@target
def spill(data: memoryview) -> None:
    """What comes back from a file that may be damaged."""
    if is_too_deep([[bytes(data)]]):
        return
    made = attempt(_core.batch_of_frames, "iopub", bytes(data))
    plain = attempt(oracle.batch_of_frames, data)
    if not isinstance(made, _core.Batch) or not isinstance(plain, list):
        agree(made, plain)
        return
    check_batch(made, plain)
    results = check_frames(made, plain)
    del made
    check_encoded(results)


@target
def segment(data: memoryview) -> None:
    """A part of a log from a file: what it is taken for is put aside and read again as the same."""
    if is_too_deep([[bytes(data)]]):
        return
    entries = attempt(unpacked, bytes(data))
    if isinstance(entries, list):
        whole = Segment(0)
        whole.entries = entries
        agree(list(map(told, unpacked(bytes(packed(whole))))), list(map(told, entries)))


@target
def history(data: memoryview) -> None:
    """What everybody has is kept in blocks, and read again as it was."""
    messages = multipart(data, b"")
    if is_too_deep(messages):
        return
    made = _core.batch_of("iopub", messages, _core.Signer(b""))
    accepted, _, _ = judged(messages, oracle.Signer(b""), permissive=False)
    journal = Journal(KEEPS_ALL, Budgets(KEEPS_ALL))
    if accepted:
        journal.append(made, ours=True)  # the server's own may be asked for, whatever they answer
        journal.settle()
    found = []
    while journal.front is not journal.needed:
        block = journal.front
        kept = [entry.batch[index] for entry in block.read(0) for index in range(len(entry))]
        agree(block.weight, oracle.size_of_block(kept))
        found += kept
        journal.drop_front()
    agree(found, accepted)
    journal.close()


def told(entry: Entry) -> tuple[object, ...]:
    """All that an entry says. What a notice says of itself has the time in it."""
    about = (entry.first, entry.end, entry.audience, entry.momentary, entry.ours, entry.batch.channel)
    if isinstance(entry, Gap):
        return (*about, entry.told)
    return (*about, [entry.batch[i] for i in range(len(entry.batch))])


def stream_of(parts: list[bytes]) -> tuple[bytes, str, str] | None:
    """The parent, name and text of a message that only prints."""
    if len(parts) != 4 or oracle.header_fields(parts[0])[1] != "stream":
        return None
    content = loads(oracle.text_of(parts[3]))
    if not isinstance(content, dict) or content.keys() != {"name", "text"} or loads(oracle.text_of(parts[2])) != {}:
        return None
    name, text = content["name"], content["text"]
    return (parts[1], name, text) if isinstance(name, str) and isinstance(text, str) else None


def shown(messages: list[list[bytes]]) -> list[object]:
    """What a client sees of messages: what one cell prints to one stream, however it is cut, and all else as it is."""
    seen: list[object] = []
    for parts in messages:
        stream = stream_of(parts)
        before = seen[-1] if seen else None
        if stream and isinstance(before, tuple) and before[:2] == stream[:2]:
            seen[-1] = (*stream[:2], before[2] + stream[2])
        else:
            seen.append(stream or parts)
    return seen


@target
def compact(data: memoryview) -> None:
    """Batches of a client that is behind, made small."""
    if not data:
        return
    options, messages = data[0], multipart(data[1:], b"")
    if is_too_deep(messages):
        return
    join, output, size = bool(options & 1), not options & 2, 1 << (options >> 4)
    half = len(messages) // 2
    batches = [_core.batch_of("iopub", part, _core.Signer(b"")) for part in (messages[:half], messages[half:])]
    given = [each[i] for each in batches for i in range(len(each)) if output or is_no_output(each, i)]
    made = _core.compacted(batches, size, join=join, output=output)
    left = [each[i] for each in made for i in range(len(each))]
    agree(shown(left), shown(given)) if join else agree(left, given)
    assert len(left) <= len(given)
    for each in made:
        check_batch(each, [each[i] for i in range(len(each))])


def is_no_output(batch: _core.Batch, index: int) -> bool:
    return batch.message_class(index) not in ("stream", "display")


# -- the same, through ZMQ -------------------------------------------------------------------------


@cache
def zmq_pair(name: str) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
    """``(the kernel's, the server's)``, over inproc, where what was sent has arrived."""
    ends = zmq_context().socket(zmq.PAIR), zmq_context().socket(zmq.PAIR)
    for end in ends:
        end.setsockopt(zmq.LINGER, 0)
        end.setsockopt(zmq.SNDHWM, 0)
        end.setsockopt(zmq.RCVHWM, 0)
    ends[0].bind(f"inproc://{name}")
    ends[1].connect(f"inproc://{name}")
    return ends


@cache
def zmq_context() -> zmq.Context[zmq.Socket[bytes]]:
    return zmq.Context(io_threads=0)


def let_go() -> None:
    """Close what targets keep from one input to the next."""
    for end in connection():
        end.close()
    zmq_context().destroy(linger=0)
    for kept in (connection, zmq_context, zmq_pair):
        kept.cache_clear()


@target
def drain(data: memoryview) -> None:
    """Multipart messages that libzmq holds, in batches that a budget ends."""
    if not data:
        return
    options = data[0]
    key, permissive, budget = KEY if options & 1 else b"", bool(options & 2), options >> 4 or 100
    messages = multipart(data[1:], key)
    if is_too_deep(messages):
        return
    kernel, server = zmq_pair("drain")
    for each in messages:
        kernel.send_multipart(each)
    _core.use_pyzmq(bool(options & 4))
    receive = partial(_core.drain, server, "iopub", _core.Signer(key), max_messages=budget, permissive=permissive)
    batches = list(iter(receive, None))
    _core.use_pyzmq(False)
    accepted, refused, errors = judged(messages, oracle.Signer(key), permissive=permissive)
    agree(sum(map(len, batches)), len(accepted))
    agree(sum(each.rejected_count for each in batches), refused)
    if len(batches) == 1:
        agree(list(map(type, batches[0].rejected)), errors[:16])
    assert all(each.more for each in batches[:-1])
    check_drained(batches, accepted)


def check_drained(batches: list[_core.Batch], messages: list[list[bytes]]) -> None:
    results = []
    while batches:
        made = batches.pop(0)
        mine, messages = messages[: len(made)], messages[len(made) :]
        check_batch(made, mine)
        results += check_frames(made, mine)
        if len(mine) > 1:
            check_replaced(made, mine, 0, None)
        del made
    check_encoded(results)


# -- zmtp ------------------------------------------------------------------------------------------


@target
def zmtp(data: memoryview) -> None:
    """What a peer says on a ZMTP connection, in pieces of one length, behind a handshake or from its beginning."""
    if not data:
        return
    options = data[0]
    socket_type, peer_type = (("DEALER", b"ROUTER"), ("SUB", b"XPUB"))[options & 1]
    said = bytes(data[1:])
    if options & 2:
        said = zmtp_oracle.greeting(options >> 2 & 1) + zmtp_oracle.ready(peer_type) + said
    expected = zmtp_oracle.Peer(said, socket_type)
    if is_too_deep(expected.messages):
        return
    size = options >> 3 or len(said) or 1
    stream = _core.ZmtpStream(socket_type)
    heard = hear(stream, [said[start : start + size] for start in range(0, len(said), size)])
    accepted, refused, _ = judged(expected.messages, oracle.Signer(b""), permissive=False)
    agree(heard, (accepted, refused, expected.end))
    agree(stream.take(len(expected.answered) + 1), expected.answered)


def hear(stream: _core.ZmtpStream, pieces: Sequence[bytes]) -> tuple[list[list[bytes]], int, str]:
    """The messages, how many were refused, and how the stream ended."""
    messages: list[list[bytes]] = []
    refused = 0
    try:
        for piece in pieces:
            stream.feed(piece)
            while (batch := stream.drain(-1, "iopub", _core.Signer(b""))) is not None:
                messages += [batch[i] for i in range(len(batch))]
                refused += batch.rejected_count
    except ZmtpError:
        return messages, refused, "foreign" if stream.foreign else "refused" if stream.refused else "broken"
    return messages, refused, "open"


# -- activity --------------------------------------------------------------------------------------

UNTRACKED = ("kernel_info_request", "kernel_info_reply", "status", "stream", "comm_info_request", "")
STATES = ("starting", "busy", "idle", "restarting")


def value_of(part: bytes, name: str) -> object:
    value = oracle.loads(oracle.text_of(part))
    return value.get(name) if isinstance(value, dict) else None


@target
def activity(data: memoryview) -> None:
    if not data:
        return
    state = STATES[data[0] & 3]
    messages = multipart(data[1:], b"")
    made = _core.batch_of("iopub", messages, _core.Signer(b""))
    core, plain = _core.Activity(UNTRACKED, state), oracle.OracleActivity(UNTRACKED, state)
    answer = core.observe(made)
    expected = attempt(plain.observe, [made[i] for i in range(len(made))])
    if expected is not MalformedMessage and not is_too_deep(messages):  # else nobody says what it should be
        agree(answer, expected)
        agree(core.state, plain.state)


# -- client to kernel ------------------------------------------------------------------------------

ALLOWED = frozenset({"execute_request", "input_reply", "\u00e9"})


def due(payload: str | memoryview, protocol: str | None, allowed: frozenset[str]) -> object:
    """``(channel, parts)`` of what a kernel is to get, None for what is ignored, or the error."""
    decoded = attempt(oracle.for_kernel, payload, protocol)
    if not isinstance(decoded, tuple):
        return decoded
    channel, parts = decoded
    if channel not in oracle.CHANNELS:
        return None
    if not allowed:
        return decoded
    msg_type = attempt(value_of, parts[0], "msg_type")
    if not isinstance(msg_type, str):
        return MalformedMessage
    return decoded if msg_type in allowed else None


def client_frame(payload: str | memoryview) -> bytes:
    """Masked with zeros."""
    head = bytearray(oracle.server_frame(payload))
    size = len(head) - len(payload.encode() if isinstance(payload, str) else payload)
    head[1] |= 0x80
    return bytes(head[:size] + bytes(4) + head[size:])


def relayed(uplink: _core.Uplink, payload: str | memoryview) -> int:
    """From a parser's buffer."""
    parser = _core.FrameParser()
    parser.feed(client_frame(payload))
    return uplink.relay(parser)


def arrived(ends: dict[str, tuple[zmq.Socket[bytes], zmq.Socket[bytes]]]) -> list[tuple[str, list[bytes]]]:
    messages = []
    for channel, (kernel, _) in ends.items():
        while kernel.getsockopt(zmq.EVENTS) & zmq.POLLIN:
            messages.append((channel, kernel.recv_multipart()))
    return messages


@target
def uplink(data: memoryview) -> None:
    """A client's message, decoded and sent to a socket of its kernel."""
    if not data or is_too_deep([[bytes(data)]]):
        return
    options = data[0]
    protocol, allowed = PROTOCOLS[options & 1], ALLOWED if options & 2 else frozenset()
    try:
        payload = data[1:] if options & 16 else text_frame(data[1:])
        sendable = isinstance(payload, memoryview) or payload.encode() is not None
    except UnicodeDecodeError:
        return
    except UnicodeEncodeError:
        sendable = False
    ends = {channel: zmq_pair(channel) for channel in oracle.CHANNELS}
    _core.use_pyzmq(bool(options & 8))
    link = _core.Uplink(
        protocol,
        _core.Signer(KEY),
        {channel: server for channel, (_, server) in ends.items()},
        allowed_message_types=allowed,
    )
    opcode = _core.OP_BINARY if options & 16 else _core.OP_TEXT
    by_parser = options & 4 and sendable
    outcome = attempt(relayed, link, payload) if by_parser else attempt(link.send, opcode, payload)
    _core.use_pyzmq(False)
    check_sent(link, outcome, arrived(ends), due(payload, protocol, allowed))


def check_sent(link: _core.Uplink, outcome: object, messages: list[tuple[str, list[bytes]]], expected: object) -> None:
    agree(link.sent, len(messages))
    assert (link.waiting_messages, link.waiting_bytes) == (0, 0)
    if link.ignored:
        # What is not for a kernel is not read to its end: there may be something wrong with it too.
        assert outcome == 0
        assert messages == []
        assert not isinstance(expected, tuple)
    elif outcome is MalformedMessage:
        agree((outcome, messages), (expected, []))
    else:
        assert isinstance(expected, tuple), f"sent, but the oracle says {expected!r}"
        channel, parts = expected
        agree((outcome, messages), (0, [(channel, [oracle.DELIMITER, oracle.Signer(KEY).sign(parts), *parts])]))
