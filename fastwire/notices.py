"""What the server itself tells clients, in messages that stand beside those of a kernel.

A client takes the kernel's session from every message, and shows output below the cell whose request is its parent:
both are taken from the kernel's last message, its `Neighbour`. What a kernel puts there need be neither UTF-8 nor JSON,
and a client is told all the same.
"""

from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime

from fastwire._core import Batch, Signer, batch_of, check_json
from fastwire.errors import MalformedMessage

__all__ = ["NOBODY", "Neighbour", "beside", "local_batch", "notice", "request_of", "said", "shortened"]

#: ``(header, parent_header)`` of a kernel's message, as `Batch.headers` has them.
Neighbour = tuple[bytes, bytes]

#: Of a kernel that has said nothing.
NOBODY: Neighbour = (b"{}", b"{}")

#: Bytes of a header that are remembered: a kernel chooses how long its headers are, and a client those of its requests.
LONGEST_HEADER = 2048


def local_batch(channel: str, parts: list[bytes]) -> Batch:
    """A message that the server itself says to clients."""
    return batch_of(channel, [[b"<IDS|MSG>", b"", *parts]], Signer(b""))


def beside(neighbour: Neighbour, parts: list[bytes]) -> Batch:
    """A message of the server's own, told as if the kernel had said it after its ``neighbour``: in its session, and
    with its parent unless it has one."""
    header = json.loads(parts[0])
    header["session"] = said(neighbour[0], "session") or header.get("session", "")
    parent_header = parent_of(neighbour[1]) if parts[1] == b"{}" else parts[1]
    return local_batch("iopub", [json.dumps(header).encode(), parent_header, *parts[2:]])


def shortened(neighbour: Neighbour) -> Neighbour:
    """As it is remembered where what it belongs to is gone."""
    header, parent_header = (part if len(part) <= LONGEST_HEADER else b"{}" for part in neighbour)
    return header, parent_header


def notice(neighbour: Neighbour, text: str) -> Batch:
    """A line on stderr."""
    header = {
        "msg_id": uuid.uuid4().hex,
        "msg_type": "stream",
        "username": "",
        "session": "",
        "date": datetime.now(UTC).isoformat(),
        "version": "5.3",
    }
    content = {"name": "stderr", "text": text}
    return beside(neighbour, [json.dumps(header).encode(), b"{}", b"{}", json.dumps(content).encode()])


def said(part: bytes, name: str) -> str:
    """The text of that name in a part of a kernel's message, "" where there is none."""
    text = members_of(part).get(name)
    return text if isinstance(text, str) else ""


def request_of(parent_header: bytes) -> int | None:
    """What tells the request that a message belongs to from others; None where it belongs to none. A hash, as ids may
    be long."""
    parent = members_of(parent_header)
    msg_id, session = parent.get("msg_id"), parent.get("session")
    return hash((msg_id, session if isinstance(session, str) else "")) if isinstance(msg_id, str) else None


def members_of(part: bytes) -> dict[str, object]:
    """Of a JSON object; {} where it is none."""
    try:
        found = json.loads(part.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def parent_of(parent_header: bytes) -> bytes:
    """A kernel's parent_header as every client can read it, ``{}`` where that is not JSON."""
    text = parent_header.decode("utf-8", "replace").encode()
    try:
        check_json(text)
    except MalformedMessage:
        return b"{}"
    return text
