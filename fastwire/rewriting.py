"""Jupyter Server: what clients and programs see of a kernel's messages otherwise than it has said them.

Tracebacks are hidden where the server's configuration says so, and messages of an older protocol are adapted, as
jupyter_server does for its clients. Who reads runs over HTTP sees the same as who has a WebSocket.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from fastwire._core import Batch

__all__ = ["Rewriting", "parts_of"]


def parts_of(session: Any, message: dict[str, Any]) -> list[bytes]:
    """A message as jupyter_client's `Session` builds it, as parts."""
    parts = [session.pack(message[key]) for key in ("header", "parent_header", "metadata", "content")]
    return parts + [bytes(buffer) for buffer in message.get("buffers", ())]


class Rewriting:
    """Of the messages of one kernel, by its ``manager``, a kernel manager of jupyter_server."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager

    def concerns(self, batch: Batch, *, adapts: bool) -> list[int]:
        """The indices of those messages that may be seen otherwise."""
        if not batch.unusual:
            return []
        concerned = {*batch.foreign} if adapts else set()
        if self._hides_errors_of(batch):
            concerned.update(index for index in range(len(batch)) if batch.message_class(index) == "error")
        return sorted(concerned)

    def _hides_errors_of(self, batch: Batch) -> bool:
        return batch.channel == "iopub" and not self._manager.parent.allow_tracebacks

    def shown(self, batch: Batch, index: int, *, adapts: bool = True) -> list[bytes] | None:
        """One message as it may be seen; None where it is left out. ``adapts``: one of an older protocol is what
        jupyter_client makes of it."""
        parts, msg_type = batch[index], batch.message_class(index)
        if adapts and batch.unusual and index in batch.foreign:
            adapted = self._changed(self._adapted, parts)
            if adapted is None:
                return None
            parts, msg_type = adapted, json.loads(adapted[0])["msg_type"]
        if msg_type == "error" and self._hides_errors_of(batch):
            return self._changed(self._redacted, parts)
        return parts

    def _changed(self, change: Callable[[list[bytes]], list[bytes]], parts: list[bytes]) -> list[bytes] | None:
        """One that cannot be read is left out, as jupyter_server does."""
        try:
            return change(parts)
        except Exception as error:  # noqa: BLE001 - whatever a kernel may have put there
            name = self._manager.kernel_id
            self._manager.log.warning("Left out a malformed message of kernel %s (%s)", name, type(error).__name__)
            self._manager.log.debug("Left out: %r", error)  # which may quote it
            return None

    def _redacted(self, parts: list[bytes]) -> list[bytes]:
        """Source: `ZMQChannelsWebsocketConnection._on_error`."""
        session = self._manager.session
        content = session.unpack(parts[3])
        content |= {
            "ename": "ExecutionError",
            "evalue": "Execution error",
            "traceback": [self._manager.parent.traceback_replacement_message],
        }
        return [*parts[:3], session.pack(content), *parts[4:]]

    def _adapted(self, parts: list[bytes]) -> list[bytes]:
        reader = self._manager.session.clone()
        reader.auth = None  # the core has checked the signature
        return parts_of(reader, reader.deserialize([b"", *parts]))
