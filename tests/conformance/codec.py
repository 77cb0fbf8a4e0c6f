"""permessage-deflate as a client does it, with what the server agreed to; or nothing of it."""

import re
import zlib

from builders import client_frame

from fastwire._core import RSV1

TAIL = b"\x00\x00\xff\xff"
PARAMETER = re.compile(r"([a-z_]+)(?:=\"?([0-9]+)\"?)?")


class Codec:
    """Of one connection; ``agreed`` is the response's ``Sec-WebSocket-Extensions``, empty for none."""

    def __init__(self, agreed: str = "") -> None:
        name, *parameters = [part.strip() for part in agreed.split(";")]
        self.on = name == "permessage-deflate"
        self.parameters = {match[1]: match[2] for match in map(PARAMETER.fullmatch, parameters) if match}
        self._deflating = self._deflater()
        self._inflating = self._inflater()

    def _deflater(self) -> "zlib._Compress":
        return zlib.compressobj(wbits=-max(9, int(self.parameters.get("client_max_window_bits") or 15)))

    def _inflater(self) -> "zlib._Decompress":
        return zlib.decompressobj(wbits=-int(self.parameters.get("server_max_window_bits") or 15))

    def message(self, opcode: int, data: bytes, fragment: int = 0) -> list[bytes]:
        """The frames of one message, each of at most ``fragment`` octets before compression."""
        if "client_no_context_takeover" in self.parameters:
            self._deflating = self._deflater()
        step = fragment or len(data) or 1
        starts = range(0, len(data), step) or range(1)
        frames = []
        for start in starts:
            payload, last = data[start : start + step], start == starts[-1]
            if self.on:
                payload = self._deflating.compress(payload)
                payload += self._deflating.flush(zlib.Z_SYNC_FLUSH) if last else b""
                payload = payload.removesuffix(TAIL) if last else payload
            frames.append(
                client_frame(0 if start else opcode, payload, fin=last, rsv=RSV1 if self.on and not start else 0)
            )
        return frames

    def plain(self, data: bytes) -> bytes:
        """What a compressed message of the server says."""
        if "server_no_context_takeover" in self.parameters:
            self._inflating = self._inflater()
        return self._inflating.decompress(data + TAIL)
