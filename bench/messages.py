"""Jupyter messages as a browser sends and sees them: ready-made requests, cheap decoding."""

from __future__ import annotations

import json
import struct
import uuid
from typing import Any

LEGACY = "legacy"
V1 = "v1"
PROTOCOLS = (LEGACY, V1)
V1_SUBPROTOCOL = "v1.kernel.websocket.jupyter.org"

#: What one execute_request of a plain expression brings back, in order: the text that
#: tells them apart in either protocol, without parsing.
BUSY, INPUT, RESULT, REPLY, IDLE = range(5)
MARKERS = (b'"busy"', b'"execute_input"', b'"execute_result"', b'"execute_reply"', b'"idle"')
MESSAGES_PER_REQUEST = len(MARKERS)

#: JupyterLab names the cell in each request, and so does the benchmark of the notes.
CELL_ID = "5d0fb8a6-2f0f-4b39-9a04-0c1f4d2a7e11"

PREFIX_LENGTH = 24
DIGITS = 12
# Every byte of the mask key is the same, so masking does not depend on the position.
_MASK_KEY = b"\x5a\x5a\x5a\x5a"
_MASK = bytes(byte ^ _MASK_KEY[0] for byte in range(256))


def frame(opcode: int, payload: bytes) -> bytes:
    """A whole masked client frame."""
    size = len(payload)
    if size < 126:
        head = struct.pack("!BB", 0x80 | opcode, 0x80 | size)
    elif size < 1 << 16:
        head = struct.pack("!BBH", 0x80 | opcode, 0x80 | 126, size)
    else:
        head = struct.pack("!BBQ", 0x80 | opcode, 0x80 | 127, size)
    return head + _MASK_KEY + payload.translate(_MASK)


class RequestMaker:
    """Makes the frames of one connection's execute_requests at about 0.5 us each.

    The msg_ids look like UUIDs: 24 characters that only this connection uses, then the
    request's number in 12 digits. Whoever searches for `prefix` in a message finds its parent.
    """

    def __init__(self, protocol: str, code: str, session: str, prefix: bytes = b"") -> None:
        self.prefix = prefix or f"{str(uuid.uuid4())[:PREFIX_LENGTH]}".encode()
        placeholder = "#" * DIGITS
        payload = _request(protocol, self.prefix.decode() + placeholder, code, session)
        opcode = 1 if protocol == LEGACY else 2
        whole = frame(opcode, payload)
        before, _, after = whole.partition(placeholder.encode().translate(_MASK))
        self._before, self._after = before, after

    def __call__(self, number: int) -> bytes:
        """The frame of request *number*."""
        return self._before + (b"%012d" % number).translate(_MASK) + self._after


def _request(protocol: str, msg_id: str, code: str, session: str) -> bytes:
    """An execute_request, as JupyterLab writes it."""
    header = {
        "date": "2024-01-01T00:00:00.000Z",
        "msg_id": msg_id,
        "msg_type": "execute_request",
        "session": session,
        "username": "",
        "version": "5.2",
    }
    content = {
        "silent": False,
        "store_history": True,
        "user_expressions": {},
        "allow_stdin": True,
        "stop_on_error": True,
        "code": code,
    }
    metadata = {"deletedCells": [], "recordTiming": False, "cellId": CELL_ID, "trusted": True}
    if protocol == LEGACY:
        message = {
            "buffers": [],
            "channel": "shell",
            "content": content,
            "header": header,
            "metadata": metadata,
            "parent_header": {},
        }
        return _dump(message)
    return _v1([b"shell", _dump(header), b"{}", _dump(metadata), _dump(content)])


def _dump(value: Any) -> bytes:
    """JSON without spaces, as browsers write it."""
    return json.dumps(value, separators=(",", ":")).encode()


def _v1(parts: list[bytes]) -> bytes:
    """The v1 form: the count of offsets, the offsets, the parts; little-endian u64."""
    offsets = [8 * (len(parts) + 2)]
    for part in parts:
        offsets.append(offsets[-1] + len(part))
    return struct.pack(f"<{len(offsets) + 1}Q", len(offsets), *offsets) + b"".join(parts)


def decode(payload: bytes, protocol: str, opcode: int) -> dict[str, Any]:
    """A server's message as a dict with channel, header, parent_header, content (slow path)."""
    if protocol == LEGACY:
        if opcode == 2:
            count, start = struct.unpack_from("!II", payload)
            end = struct.unpack_from("!I", payload, 8)[0] if count > 1 else len(payload)
            payload = payload[start:end]
        message: dict[str, Any] = json.loads(payload)
        return message
    count = struct.unpack_from("<Q", payload)[0]
    offsets = struct.unpack_from(f"<{count}Q", payload, 8)
    parts = [payload[offsets[index] : offsets[index + 1]] for index in range(5)]
    return {
        "channel": parts[0].decode(),
        "header": json.loads(parts[1]),
        "parent_header": json.loads(parts[2]),
        "content": json.loads(parts[4]),
    }
