"""fastwire: Jupyter messages between kernels and WebSocket clients, framed, signed and written by compiled code.

Importing this package loads the compiled core and nothing of tornado or jupyter_server; `fastwire.websocket`,
`fastwire.relay`, `fastwire.jupyter` and `fastwire.serve` do the rest.
"""

__version__ = "0.1.0"

from fastwire import errors

try:
    from fastwire._core import (
        FLUSH_BLOCKED,
        FLUSH_DEAD,
        FLUSH_DONE,
        FLUSH_MORE,
        FLUSH_NO_BUFFERS,
        OP_BINARY,
        OP_CLOSE,
        OP_PING,
        OP_PONG,
        OP_TEXT,
        PROTOCOL_V1,
        RSV1,
        FrameParser,
        Signer,
        WriteQueue,
        build_info,
        check_json,
        close_payload,
        decode_legacy,
        decode_v1,
        encode_legacy,
        encode_v1,
        frame_header,
        header_fields,
        parse_close,
        split_identities,
    )
except ModuleNotFoundError as error:
    if error.name != "fastwire._core":
        raise
    raise ImportError(
        f"fastwire is not compiled in {__path__[0]}: `make install` or `pip install --editable .` does it there; "
        "started in another directory, Python finds the fastwire that is installed"
    ) from None

__all__ = [
    "FLUSH_BLOCKED",
    "FLUSH_DEAD",
    "FLUSH_DONE",
    "FLUSH_MORE",
    "FLUSH_NO_BUFFERS",
    "OP_BINARY",
    "OP_CLOSE",
    "OP_PING",
    "OP_PONG",
    "OP_TEXT",
    "PROTOCOL_V1",
    "RSV1",
    "FrameParser",
    "Signer",
    "WriteQueue",
    "build_info",
    "check_json",
    "close_payload",
    "decode_legacy",
    "decode_v1",
    "encode_legacy",
    "encode_v1",
    "errors",
    "frame_header",
    "header_fields",
    "parse_close",
    "split_identities",
]


def _jupyter_server_extension_points() -> list[dict[str, str]]:
    """Where Jupyter Server finds its extension, which only it imports."""
    return [{"module": "fastwire.jupyter", "name": "fastwire"}]
