"""Pure policy: how much, how long, and what then. No sockets, no clock of its own.

Every number a user can set has its default here, once; `fastwire.jupyter` makes traits of them and the docs are
generated from those.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Limits", "resume_time"]

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True)
class Limits:
    """Bounds of one kernel's relay. Bytes and seconds."""

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
