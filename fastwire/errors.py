"""One tree of exceptions: whose fault it is, and the close code that answers it.

::

    FastwireError
    ├── MessageError (ValueError)       what stands in a frame is not a Jupyter message
    │   ├── MalformedMessage   1007     the sender's fault: offsets, JSON or missing parts
    │   └── SignatureError              the kernel's fault; its message is dropped and counted,
    │       │                           no client is closed for it
    │       ├── InvalidSignature        wrong key, truncated or missing signature
    │       └── DuplicateSignature      a signature this socket has seen before: a replay
    ├── FrameError                      the client broke RFC 6455; it is told and closed
    │   ├── ProtocolError      1002     framing (RFC 6455 section 5)
    │   ├── InvalidPayload     1007     text that is not UTF-8 (RFC 6455 section 8.1)
    │   ├── MessageTooBig      1009     over the limit the server set (RFC 6455 section 7.4.1)
    │   └── PolicyViolation    1008     allowed by RFC 6455, but more of it than the server takes
    ├── ZmtpError                       a kernel's bytes break ZMTP 3: its connection is closed and made anew
    ├── TooManyClients         1013     of one kernel or of one user: come back later
    ├── NotConnected                    a server behind this one cannot be reached, or refuses: an HTTP status says it
    ├── OutOfMemory (MemoryError) 1011  there is none for what a client sends; it comes back, and sends it again
    └── SocketClosed           1011     the kernel's ZMQ sockets are closed: it was shut down

``close_code`` is the WebSocket close code (RFC 6455 section 7.4) that a server sends for the error,
None where no client is at fault.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "DuplicateSignature",
    "FastwireError",
    "FrameError",
    "InvalidPayload",
    "InvalidSignature",
    "MalformedMessage",
    "MessageError",
    "MessageTooBig",
    "NotConnected",
    "OutOfMemory",
    "PolicyViolation",
    "ProtocolError",
    "SignatureError",
    "SocketClosed",
    "TooManyClients",
    "ZmtpError",
]


class FastwireError(Exception):
    """Everything fastwire raises on purpose."""

    close_code: ClassVar[int | None] = None


class MessageError(FastwireError, ValueError):
    """A frame or multipart message that is not an acceptable Jupyter message."""


class MalformedMessage(MessageError):
    """Offsets, JSON or parts that are not those of a Jupyter message."""

    close_code = 1007


class SignatureError(MessageError):
    """A kernel's message that cannot be trusted."""


class InvalidSignature(SignatureError):
    """The signature is not that of these parts under this key."""


class DuplicateSignature(SignatureError):
    """The signature is valid and was seen before on this socket: a replay."""


class FrameError(FastwireError):
    """The client's bytes break RFC 6455; the connection must be failed with ``close_code``."""

    close_code: ClassVar[int | None] = 1002


class ProtocolError(FrameError):
    """Framing that RFC 6455 forbids."""

    close_code = 1002


class InvalidPayload(FrameError):
    """A text message or close reason that is not UTF-8."""

    close_code = 1007


class MessageTooBig(FrameError):
    """A message over ``max_message_size``; refused when its length is declared."""

    close_code = 1009


class PolicyViolation(FrameError):
    """More fragments in a message, or more control frames, than the server takes."""

    close_code = 1008


class ZmtpError(FastwireError):
    """Bytes that are not ZMTP 3, sizes no kernel may send, or a peer that refuses the connection (ERROR)."""


class TooManyClients(FastwireError):
    """As many clients of one kernel, or of one user, as the server allows."""

    close_code = 1013


class NotConnected(FastwireError):
    """A server that is to be connected to cannot be reached, or refuses; what it does stands behind its name.
    ``status`` is the HTTP status for whoever asked for the connection, ``may_pass``: another attempt may succeed."""

    def __init__(self, what: str, status: int, *, may_pass: bool = False) -> None:
        super().__init__(what)
        self.status = status
        self.may_pass = may_pass


class OutOfMemory(FastwireError, MemoryError):
    """The process has no memory for what the client sends; the bytes are gone, so its connection ends."""

    close_code = 1011


class SocketClosed(FastwireError):
    """The ZMQ socket was closed, usually because its kernel manager shut down."""

    close_code = 1011
