"""Pure policy: how much, how long, and what then. No sockets, no clock of its own.

Every number a user can set has its default here, once; `fastwire.jupyter` makes traits of them and the docs are
generated from those.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Limits", "Rate", "resume_time", "too_many"]

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True)
class Limits:
    """Bounds of one kernel's relay. Bytes and seconds."""

    #: Of one message of a client: its bytes, joined and decompressed, and its frames.
    max_message_size: int = 10 * MIB
    max_fragments: int = 128 * KIB

    #: Pings and pongs a second that a client may send, on the average of `Rate.WINDOW` seconds.
    control_frame_rate: float = 2000.0

    #: How long a connection may be without a whole request, the one that opens a WebSocket included.
    handshake_timeout: float = 60.0

    #: WebSockets that are open at once. Each costs the server about seven file descriptors.
    clients_per_kernel: int = 256
    clients_per_user: int = 1024

    #: A client's socket is given more only while fewer bytes than this wait for it; the rest stays in the outbox,
    #: where it can still be re-encoded for the next socket of the session.
    high_water: int = 1 * MIB

    #: A client for which messages have waited so long is called slow.
    slow_after: float = 1.0

    #: What a client may have waiting for a kernel that does not take it; at the bound its socket is not read any
    #: more.
    uplink_limit: int = 8 * MIB

    #: How long a session without a socket is kept after its TCP connection broke, and after a Close frame.
    resume_timeout: float = 3600.0
    resume_timeout_closed: float = 60.0

    #: Detached sessions of one kernel; the oldest goes first.
    detached_sessions: int = 4

    #: What a detached session may hold before it is given up.
    client_memory_limit: int = 32 * MIB


def resume_time(limits: Limits, close_code: int | None) -> float:
    """Seconds a session waits for its next socket; ``close_code`` is None when TCP broke without a Close frame."""
    return limits.resume_timeout if close_code is None else limits.resume_timeout_closed


class Rate:
    """A bound on how often something happens: a leaky bucket that holds what `WINDOW` seconds allow."""

    WINDOW = 10.0

    def __init__(self, per_second: float) -> None:
        self._per_second = per_second
        self._level = 0.0
        self._then = 0.0

    def exceeded(self, count: int, now: float) -> bool:
        """Whether ``count`` more of it, ``now``, are too many; ``now`` is in seconds."""
        self._level = max(self._level - (now - self._then) * self._per_second, 0.0) + count
        self._then = now
        return self._level > self.WINDOW * self._per_second


def too_many(limits: Limits, of_kernel: int, of_user: int) -> str | None:
    """Why one more client is not admitted beside these others of the same kernel and of the same user, or None."""
    if of_kernel >= limits.clients_per_kernel:
        return f"the kernel has {of_kernel} clients, as many as the server allows"
    if of_user >= limits.clients_per_user:
        return f"the user has {of_user} clients, as many as the server allows"
    return None
