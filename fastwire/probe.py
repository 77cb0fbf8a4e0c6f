"""What a peer has received, and whether it takes anything at all: pings, looks at its TCP, and no decision of its own.

What is difficult: nobody tells. sendmsg says that the system has the bytes, TCP says at most that the other system has
them, and between that and the peer's program may stand a proxy. Only a pong says that it was reached
(`flow.Acknowledgements`), and only who is read can send one.

What was believed and is wrong:

- *A timer for each connection is cheap.* Each is a wake-up of the loop of its own, twenty a second and client, and
  most of them found that a ping with the next bytes would have done. So a ping that is due rides in the flush that
  makes it so, and what is left, the end of a burst, waits in the `Timers` that all connections share
  (``test_pings_ride``).
- *Twenty pings a second are enough.* Of a client that is behind each makes room for what it may have unacknowledged,
  which is little where many are behind: a window every 100 ms, 160 kB/s
  (``test_who_is_behind_is_asked_as_often_as_it_answers``).
- *No pong, no peer.* A browser does not answer while its page's script is busy, and a connection that we do not read
  cannot be heard. Silence counts only with what TCP took meanwhile (``test_a_client_that_answers_no_pings``).
- *A socket without room is stalled.* One at 1 kB/s takes bytes for a minute before there is room for one of ours
  (``test_who_takes_a_little_is_slow_and_not_stalled``).

A look costs one system call, and there are ever fewer while a peer is silent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from fastwire.flow import Acknowledgements
from fastwire.transport import Transport
from fastwire.turns import Timer, Turns

__all__ = ["Probe", "Prober", "Stalls"]

#: Seconds between looks at a ping that is not answered, at most.
LONGEST_DELAY = 1.0

#: Looks at a stalled peer within its limit.
STALL_LOOKS = 4


class Prober(Protocol):
    """Who is told."""

    def is_held(self) -> bool:
        """More is kept back until the peer answers, and nothing says that it ever will."""

    def on_demoted(self) -> None:
        """What was written to the peer counts as received from now on."""


class Probe:
    """Asks one peer what it has received. What happens with each burst is compiled (`fastwire._core.Wire`): a ping that
    is due rides, the end of a burst is asked about, an answer counts. Here is what silence means."""

    def __init__(self, transport: Transport, prober: Prober) -> None:
        self.acknowledgements = transport.wire.asks = Acknowledgements()
        self._paused = False
        self._transport = transport
        self._wire = transport.wire
        self._prober = prober
        self._loop = asyncio.get_running_loop()

    def look_at_silence(self) -> None:
        """Ever less often, what TCP does."""
        try:
            self._look_at_silence()
        except Exception:
            self._wire.look_after(LONGEST_DELAY)  # or it is never believed to have what it has
            raise

    def _look_at_silence(self) -> None:
        acknowledgements, transport = self.acknowledgements, self._transport
        transport.sample()
        if self._paused:
            acknowledgements.pause()
        else:
            taken = transport.taken
            waits = transport.queue.queued > taken
            acknowledgements.look(self._loop.time(), taken, waits=waits, held=self._prober.is_held())
        if acknowledgements.demoted:
            self._prober.on_demoted()
            return
        self._wire.look_delay = min(2 * self._wire.look_delay, LONGEST_DELAY)
        self._wire.look_after(self._wire.look_delay)

    def answer(self, payload: bytes) -> bool:
        """A pong came. Returns whether it is for us."""
        # Out of our hands, that is: over TLS the system has records of which OpenSSL has not told us yet.
        if not self.acknowledgements.answer(payload, self._transport.queue.written):
            return False
        self._wire.is_acknowledged()
        return True

    def pause(self) -> None:
        """Nothing is read from the peer, so no pong can come."""
        self._paused = True
        self.acknowledgements.pause()

    def resume(self) -> None:
        self._paused = False


class Stalls:
    """Tells of a peer whose TCP takes nothing for ``limit`` seconds although bytes wait: by a few looks within that
    time, so that a flush need not note the time."""

    def __init__(self, transport: Transport, on_stall: Callable[[], None]) -> None:
        #: Seconds; 0 for no limit.
        self.limit = 0.0
        self._transport = transport
        self._on_stall = on_stall
        self._timers = Turns.current().timers
        self._timer: Timer | None = None
        self._position: tuple[int, int | None] = (0, None)
        self._looks = 0

    def watch(self) -> None:
        """Bytes wait."""
        if self._timer is None and self.limit:
            self._begin()

    def _begin(self) -> None:
        self._position, self._looks = self._transport.position, STALL_LOOKS
        self._look_later()

    def _look_later(self) -> None:
        self._timer = self._timers.later(self.limit / STALL_LOOKS, self.look)

    def look(self) -> None:
        self._timer = None
        if self._transport.has_all:
            return
        self._transport.sample()
        self._looks -= 1
        if self._transport.position != self._position:
            self._begin()
        elif self._looks > 0:
            self._look_later()
        else:
            self._on_stall()

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
