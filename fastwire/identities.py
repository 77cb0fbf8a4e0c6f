"""By which names a kernel knows those who ask it.

A kernel's ROUTER has one peer of a name. Unless it was made to hand the name over, as ipykernel's are and those of
other languages are not, it reads nothing of a second one until it has heard that the first is gone; and a kernel hears
nothing while it works.
"""

from __future__ import annotations

import uuid

__all__ = ["Identities"]

#: Of one kernel's that are remembered; from there on all have new ones.
MOST = 1024


class Identities:
    """Those that one kernel has heard of."""

    def __init__(self) -> None:
        #: Their hashes: clients choose how long names are, and two of one hash are two that have new ones.
        self._heard: set[int] = set()

    def take(self, wanted: bytes) -> bytes:
        """The one that is wanted, or another where the kernel may know it already."""
        if hash(wanted) in self._heard or len(self._heard) >= MOST:
            return uuid.uuid4().hex.encode()
        self._heard.add(hash(wanted))
        return wanted
