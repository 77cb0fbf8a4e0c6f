"""Where the fuzzer begins: what kernels and browsers send, in the form each target takes."""

import json
from collections.abc import Callable
from itertools import cycle, product

from fuzz.targets import FRAME, LARGE, MEDIUM, MESSAGE, SIGN_HERE, oracle
from fuzz.targets import zmtp_oracle as peer

CELL = {"msg_id": "9a1f_1", "msg_type": "execute_request", "username": "ann", "session": "9a1f", "version": "5.3"}

#: Message types and contents, as ipykernel and JupyterLab send them.
KERNELS = {
    "status": {"execution_state": "busy"},
    "execute_input": {"code": "1+1", "execution_count": 1},
    "stream": {"name": "stdout", "text": "é\u2028\n"},
    "display_data": {"data": {"image/png": "iVBORw0KGgo=", "text/plain": "<Figure>"}, "metadata": {}, "transient": {}},
    "update_display_data": {"data": {}, "metadata": {}, "transient": {"display_id": "a"}},
    "execute_result": {"data": {"text/plain": "2"}, "metadata": {}, "execution_count": 1},
    "execute_reply": {"status": "ok", "execution_count": 1, "user_expressions": {}, "payload": []},
    "error": {"ename": "ZeroDivisionError", "evalue": "", "traceback": ["\x1b[0;31m"]},
    "comm_open": {"comm_id": "c", "target_name": "jupyter.widget", "data": {"x": float("nan")}},
    "input_request": {"prompt": "? ", "password": False},
    "clear_output": {"wait": True},
}
CLIENTS = {
    "execute_request": {"code": 'print("\\")', "silent": False, "allow_stdin": True},
    "kernel_info_request": {},
    "input_reply": {"value": "\U0001f600"},
    "comm_msg": {"comm_id": "c", "data": {"value": [1, -2.5e-3, None, True]}},
}


def message(msg_type: str, content: object, *buffers: bytes) -> list[bytes]:
    """Its parts."""
    header = CELL | {"msg_type": msg_type, "date": "2024-05-06T07:08:09.123456Z"}
    values = (header, CELL, {}, content)
    return [*(json.dumps(value, ensure_ascii=False).encode() for value in values), *buffers]


def kernels() -> list[list[bytes]]:
    return [message(*item) for item in KERNELS.items()] + [message("comm_msg", {}, b"\x80buffer", b"")]


def clients() -> list[list[bytes]]:
    return [message(*item) for item in CLIENTS.items()] + [message("comm_msg", {}, b"\x80buffer", b"")]


#: Around the edges of UTF-8: the first and last character of each length and the neighbours of surrogates; then what
#: goes beyond, is too long, half of a pair, or cut short.
UTF8 = [
    *(char.encode() for char in "\x7f\x80\u07ff\u0800\uffff\ud7ff\ue000\U00010000\U0010ffff"),
    *(b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80", b"\xff", b"\x80", b"\xbf"),
    *(b"\xc0\x80", b"\xc1\xbf", b"\xe0\x9f\xbf", b"\xf0\x8f\xbf\xbf", b"\xed\xa0\x80", b"\xed\xbf\xbf"),
    *(b"\xc2", b"\xc2\x7f", b"\xc2\xc0", b"\xe2\x82", b"\xe2\x82(", b"\xf0\x9f\x98", b"\xf0\x9f\x98("),
]


# -- client to kernel ------------------------------------------------------------------------------


def v1() -> list[bytes]:
    return [oracle.encode_v1(channel, parts) for channel in ("shell", "é") for parts in clients()]


def legacy_json(parts: list[bytes], channel: str) -> bytes:
    names = (b"header", b"parent_header", b"metadata", b"content")
    texts = [b'"%b": %b' % item for item in zip(names, parts, strict=False)]
    return b"{" + b", ".join([*texts, b'"buffers": [ ]', b'"channel":"%b"' % channel.encode()]) + b"}"


def legacy_text() -> list[bytes]:
    texts = [legacy_json(parts, channel) for parts in clients() for channel in ("shell", "control", "stdin", "x")]
    packed = texts[0].replace(b'"content": {', b'"content": null, "cont\\u0065nt": "{\\ud800}", "x": {')
    return [*texts, packed, packed.replace(b"\\ud800", b"\\n"), b" " + packed.replace(b"\\ud800", b"\xed\xa0\x80")]


def legacy_binary() -> list[bytes]:
    return [oracle.binary_message([legacy_json(parts, "shell"), *parts[4:]]) for parts in clients()]


def uplink() -> list[bytes]:
    """Behind the options: protocol, allowed types, parser, pyzmq, binary."""
    forms = [(1 | 16, each) for each in (*v1(), v1()[0].replace(b"2024-0", rb"\ud800"))]
    forms += [(16, each) for each in legacy_binary()]
    forms += [(0, each) for each in legacy_text()]
    return [bytes([form | options]) + payload for form, payload in forms for options in (0, 2, 4, 8)]


# -- frames ----------------------------------------------------------------------------------------


def frame(first: int, payload: bytes, mask: bytes = bytes(4)) -> bytes:
    """A client's: most with a mask of zeros, so that the fuzzer sees the payload."""
    head = bytearray(oracle.frame_header(first & 0x7F, len(payload), fin=bool(first & 0x80)))
    head[1] |= 0x80
    return bytes(head) + mask + oracle.unmask(payload, mask)


STREAMS = [
    frame(0x81, legacy_text()[0], b"\x01\x80\xfe\x37"),
    frame(0x82, v1()[0]) * 2,
    frame(0x01, "é\u20ac".encode()[:3]) + frame(0x89, b"ping") + frame(0x80, "é\u20ac".encode()[3:]),
    frame(0x02, b"") + frame(0x00, b"a" * 126) + frame(0x8A, b"") + frame(0x80, b""),
    frame(0x88, b"\x03\xe8" + "bye é".encode()) + frame(0x81, b"late"),
    frame(0x88, b"") + b"x",
    frame(0xC1, b"\xaa\x56\x4a\x04\x00") + frame(0x41, b"\x00") + frame(0x80, b"\xff"),
    frame(0x81, "\U0001f600\U0010ffff".encode()) + frame(0x81, b"\xed\xa0\x80"),
    b"\x82\xff\x00\x00\x00\x00\x7f\xff\xff\xff" + bytes(4) + b"few",
    b"\x82\xff\x80" + bytes(7),
    b"\x82\xfe\x00\x01" + bytes(5),
    b"\x83\x80", b"\x81\x05hello", b"\x09\x80", b"\x89\xfe", b"\xa1", b"\x80",
]  # fmt: skip


def frames() -> list[bytes]:
    """Behind the options (deflate, late, by socket, limit, few fragments) and the size of the chunks."""
    ways = [bytes(way) for way in product((0, 1, 2, 4, 8, 16, 24, 32), (0, 5, 255))]
    texts = [frame(0x81, b"a" + octets) + frame(0x01, octets) for octets in UTF8]
    return [
        *(way + stream for stream in STREAMS for way in ways),
        *(bytes([0, size]) + text for text in texts for size in (0, 255)),
    ]


def passing() -> list[bytes]:
    """As `frames` has them, then what a server sends."""
    ways = [bytes(way) for way in product((0, 2, 4, 24, 32), (0, 5, 255))]
    served = [
        oracle.frame_header(2, 70_000) + bytes(300),
        oracle.frame_header(1, 3, fin=False) + b"abc" + oracle.frame_header(9, 1) + b"p" + oracle.frame_header(0, 0),
        oracle.frame_header(2, 200) + bytes(200) + oracle.frame_header(8, 5) + b"\x03\xe8bye" + b"\x81\x00",
    ]
    return [
        *(way + stream for stream in STREAMS for way in ways),
        *(bytes([1 | option, size]) + each for each in served for option in (0, 2, 4) for size in (0, 255)),
    ]


def close() -> list[bytes]:
    codes = (0, 999, 1000, 1003, 1004, 1005, 1007, 1014, 1015, 2999, 3000, 4999, 5000, 65535)
    return [b"", b"\x03", *(code.to_bytes(2) + reason for code in codes for reason in (b"", b"bye", *UTF8))]


# -- JSON ------------------------------------------------------------------------------------------

TEXTS = [
    b'{"a": [1, -0.5e+7, true, false, null, NaN, Infinity, -Infinity, "\\u00e9\\n\\/\\"", {}], "b": {"c": []}}',
    b" [ ] ",
    '"é\u20ac\U0001f600 and more than eight octets"'.encode(),
    b"[" * 1000 + b"]" * 1000,
    b'{"":' * 1001,
    b'"\\ud83d\\ude00\\ud800"',
    b'"\xed\xa0\x80"',
    b"1.",
    b"-",
]


def json_text() -> list[bytes]:
    return TEXTS + [b'"%b"' % octets for octets in UTF8] + [parts[i] for parts in kernels() for i in (0, 3)]


def header() -> list[bytes]:
    spelled = (
        b'{"msg_type": 7, "msg\\u005ftype": "a\\u0062\xff", "\\u006dsg_id":"", "version":"5", "x": [{"msg_id": 1}]}'
    )
    return [parts[0] for parts in kernels()] + [spelled, b"{}", *TEXTS]


# -- kernel to client ------------------------------------------------------------------------------


def wire(parts: list[bytes], signature: bytes = SIGN_HERE, identities: tuple[bytes, ...] = (b"kernel.topic",)) -> bytes:
    return FRAME.join([*identities, oracle.DELIMITER, signature, *parts])


def multiparts() -> list[bytes]:
    good = [wire(parts) for parts in kernels()]
    parts = kernels()[1]
    foreign = [parts[0].replace(b'"5.3"', version) for version in (b'"4.1"', b"null", b'"5"', b'"\\u0035.3"')]
    large = [parts[0].replace(b"9a1f_1", LARGE), parts[1], b"{}", b'"' + LARGE + b'"', LARGE + b"x", MEDIUM, LARGE * 2]
    bad_text = [each.replace(b"ann", b"\xc3\xe2\x82\xf0") for each in parts]
    return [
        *good,
        MESSAGE.join(good),
        MESSAGE.join([good[0], good[0], wire(parts, b"forged"), wire(parts, b"")]),
        MESSAGE.join(wire([each, *parts[1:]]) for each in foreign),
        wire(large),
        wire([*parts, *[MEDIUM * 2] * 12]),
        wire(bad_text),
        MESSAGE.join([wire(large), wire(bad_text), wire([*parts, *(b"%d" % i for i in range(40))])]),
        MESSAGE.join([wire(parts[:3]), b"", oracle.DELIMITER, wire([b"", *parts[1:]]), wire([*parts[:3], b" "])]),
        wire([b'{"msg_id": "a", "msg_type": "x\\u005freply"}', b"null", b"[]", b"x"], identities=()),
    ]


def batch() -> list[bytes]:
    """Behind the options (key, permissive, channel, portable) and what is replaced."""
    options = cycle((0x00, 0x01, 0x03, 0x05, 0x09, 0x1D))
    return [bytes([next(options), change]) + each for each in multiparts() for change in (0x00, 0x80, 0x11)]


def drain() -> list[bytes]:
    """Behind the options: key, permissive, pyzmq, budget."""
    options = cycle((0, 1, 3, 5, 0x11, 0x24))
    return [bytes([next(options)]) + each for each in multiparts() * 3]


def compact() -> list[bytes]:
    """Behind the options: join, leave output out, size."""
    head = kernels()[2][0]
    texts = [b'{"name": "stdout", "text": "a"}', b'{"text": "\\ud83d", "name": "stdout"}']
    texts.append(b'{"name":"stdout","text":"\\ude00"}')
    lines = [wire([head, b"{}", b"{}", text]) for text in texts]
    other = wire([head, b"{}", b"{}", b'{"name": "stderr", "text": "a", "x": 1}'])
    each = [MESSAGE.join(lines * 2), MESSAGE.join([*lines, other, lines[0]]), *multiparts()]
    return [bytes([option]) + one for one in each for option in (0x01, 0xF1, 0x82)]


def spill() -> list[bytes]:
    frames = [oracle.server_frame(oracle.encode_v1("iopub", parts)) for parts in kernels()]
    long = oracle.server_frame(oracle.encode_v1("iopub", [*kernels()[0], bytes(70_000)]))
    header, parent, _, content = kernels()[0]
    blank = oracle.server_frame(oracle.encode_v1("", [header, parent, b" ", content]))
    return [*frames, b"".join(frames[:4]), long[:200], blank]


def segment() -> list[bytes]:
    """As `fastwire.segments.packed` has them, by hand."""
    frames = [oracle.server_frame(oracle.encode_v1("iopub", parts)) for parts in kernels()]
    gap = [7, 700, '{"session": "\u00ff"}', "{}"]
    tables = [
        [[5, 6, "iopub", [None, 0, 0], None, len(frames[0])]],
        [[5, 9, "iopub", [None, 0, 0], None, len(frames[0])], [9, 11, "shell", [4, 1, 1], None, len(frames[1])]],
        [[5, 9, "stdin", [2, 0, 1], gap, len(frames[0])]],
        [[5, 9, "iopub", [None, 0, 0], None, len(frames[0]) + 1], [4, 3, "x", [[], 0], [], -1]],
    ]
    heads = [json.dumps(table).encode() for table in tables]
    return [len(head).to_bytes(4, "big") + head + b"".join(frames[:count]) for head in heads for count in (1, 2)]


def activity() -> list[bytes]:
    parents = (b"null", b"{}", b'{"msg_type": "kernel_info_request"}', b'{"msg_type": 1, "msg_type": "\\u0073tatus"}')
    said = (b'{"execution_state": "idle"}', b'{"execution_state": "st\\u0061rting"}', b'{"execution_state": 1}', b"{}")
    head = kernels()[0][0]
    statuses = [wire([head, parent, b"{}", content]) for parent, content in product(parents, said)]
    return [bytes([state]) + each for each in (*multiparts(), *statuses) for state in range(4)]


def zmtp() -> list[bytes]:
    """Behind the options: the type of socket, whether the handshake is done, its minor version, the pieces' length."""
    head = kernels()[0]
    messages = b"".join(peer.multipart([b"topic", b"<IDS|MSG>", b"", *parts]) for parts in (head, kernels()[-1]))
    first = peer.frame(b"topic", peer.MORE)
    handshakes = [
        peer.greeting() + peer.ready(b"XPUB", Identity=b"") + messages,
        peer.greeting(0, padding=b"\0\0\0\0\0\0\0\1") + peer.ready(b"ROUTER") + messages,
        peer.greeting(mechanism=b"PLAIN"),
        b"\xff\0\0\0\0\0\0\0\1\x7f\1\5",
        b"\1\0",
        peer.greeting() + peer.command(b"ERROR", b"\4full"),
    ]
    others = [
        messages,
        first + peer.ping(b"context", 3) + messages,
        peer.command(b"ERROR", b"\0"),
        peer.command(b"NEW", b"x") + peer.frame(b"x" * 300, long=True),
        b"\3\x80" + bytes(7),
        first + b"\2\0\0\0\1" + bytes(4),
    ]
    return [bytes([option]) + each for each in handshakes for option in (0x00, 0x01, 0x09)] + [
        bytes([option]) + each for each in others for option in (0x02, 0x07, 0x3B)
    ]


SEEDS: dict[str, Callable[[], list[bytes]]] = {
    "frames": frames, "passing": passing, "close": close, "json_text": json_text, "header": header, "v1": v1,
    "legacy_text": legacy_text, "legacy_binary": legacy_binary, "split": multiparts, "batch": batch,
    "spill": spill, "compact": compact, "drain": drain, "activity": activity, "uplink": uplink,
    "zmtp": zmtp, "segment": segment, "history": multiparts,
}  # fmt: skip


def of(target: str) -> list[bytes]:
    return SEEDS[target]()
