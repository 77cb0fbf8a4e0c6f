"""Two WebSockets as one: what comes on either goes out on the other, frame by frame, until one of them ends.

What is difficult: to promise nothing that only the two ends can keep. Somebody behind us keeps what a client has not
received yet (`fastwire.journal`), and asks it by pings; somebody before us reads. Between them stands this, which is
restarted, which loses either side, and which must not be believed to be either.

What was believed and is wrong:

- *A proxy answers pings.* Then who pings learns what the proxy has. Passed on, in order, behind what they ask about, a
  pong says that the far end has all of it, and nothing need be kept here
  (``test_a_front_that_is_killed_comes_back_at_its_address``).
- *A proxy heals what breaks.* A connection that is opened again behind a client's back does not tell it that a request
  may be lost, and pongs for the one before would acknowledge what the next has only written. So both end together, and
  who comes back is a new pair of the same session (``test_a_gateway_that_is_lost``).
- *A proxy reads what comes.* Then a fast kernel fills it. A side is read while the other takes, in steps small enough
  that a slow one can be told from one that takes nothing (``test_a_flood_for_who_does_not_read``).
- *A message is passed on when it is there.* One of a gigabyte would have to be; its frame goes on as it comes. While
  one is on its way no other frame can follow, and if its sender is lost neither can a Close frame.
- *Close codes are passed on.* Some are about the hop that they were said on (`passed_on`), and a broken connection has
  none: it is broken on the other side too, where a session is kept longer for that.

This room knows no Jupyter.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from fastwire.client import Client
from fastwire.events import note
from fastwire.flow import Acknowledgements, Limits, Rate
from fastwire.websocket import Connection

__all__ = ["Pair", "open_pairs", "passed_on"]

log = logging.getLogger(__name__)

#: Those that are open.
open_pairs: set[Pair] = set()

#: Bytes that may wait for a side before the other is not read any more.
HIGH_WATER = 128 * 1024

#: What is said to a client whose server was lost: come back (IANA's registry, "service restart").
SERVER_LOST = 1012

#: Codes about frames or extensions of one hop, which the other side has nothing to do with.
OF_ONE_HOP = {1002, 1010}


def passed_on(code: int | None) -> int | None:
    """The code that is said to the other side for one that came; None is none."""
    return 1011 if code in OF_ONE_HOP else code


class Way:
    """One direction."""

    def __init__(self, source: Connection, sink: Connection) -> None:
        self._source = source
        self._sink = sink
        #: The source is not read, for the sink is behind.
        self.held = False
        source.relay(sink.queue)
        source.consumer = self._on_received
        sink.on_progress = self._on_progress

    def _on_received(self, _: Any) -> None:
        """Once for all that one read brought."""
        self._source.on_sign_of_life()
        self._sink.conversation.transport.schedule()
        if self._sink.queue.pending_bytes > HIGH_WATER and not self.held:
            self.held = True
            self._source.pause_reading()

    def _on_progress(self) -> None:
        if self.held and self._sink.queue.pending_bytes <= HIGH_WATER:
            self.held = False
            self._source.resume_reading()

    def end(self) -> None:
        """What still comes, until the other side has closed too, is for nobody."""
        self._source.relay(None)
        self._source.consumer = None
        if self.held:
            self._source.resume_reading()


class Pair:
    """A client's WebSocket, and the one to a server that was opened for it. ``on_end`` is called when the first of
    them ends."""

    def __init__(
        self, front: Connection, server: Client, limits: Limits, on_end: Callable[[], object] = lambda: None
    ) -> None:
        self.front = front
        self._on_end = on_end
        self.back = server.socket
        self._ways = (Way(self.front, self.back), Way(self.back, self.front))
        self.front.on_last_word = self._on_front_end
        self.back.on_last_word = self._on_back_end
        # Who keeps what was not received asks for it, and the answers come on top: as with `Connection.acknowledge`.
        most = limits.control_frame_rate + 1 / Acknowledgements.INTERVAL
        for each in (self.front, self.back):
            each.conversation.transport.keep_little()
            each.conversation.reader.control_rate = Rate(most)
        self.front.limit_stalls(limits.write_deadline)
        self.front.on_stalled = self._on_stalled
        # A gateway may wait for a kernel, and gives up by itself; of one that is gone TCP may say nothing for long.
        self.back.limit_stalls(limits.uplink_deadline + limits.write_deadline)
        self.back.on_stalled = self._on_back_stalled
        open_pairs.add(self)
        if self.back.is_closing():
            self._on_back_end()
        server.begin()

    @property
    def state(self) -> str:
        """In the words of `metrics.STATES`."""
        from_front, from_back = self._ways
        return "paused" if from_front.held else "slow" if from_back.held else "fine"

    @property
    def pending(self) -> tuple[int, int]:
        """Bytes that wait for the client, and for the server."""
        return self.front.queue.pending_bytes, self.back.queue.pending_bytes

    def part(self) -> None:
        """This process ends: neither side has closed, and either may come back."""
        if self._end():
            self.front.leave()
            self.back.leave()

    def _end(self) -> bool:
        """Nothing is passed on any more. False when that was so before."""
        if self not in open_pairs:
            return False
        open_pairs.discard(self)
        for way in self._ways:
            way.end()
        self._on_end()
        return True

    def _on_front_end(self) -> None:
        if not self._end():
            return
        if self.front.closed_by_peer:
            self.back.close(passed_on(self.front.close_code), self.front.close_reason)
        else:
            self.back.leave()

    def _on_back_end(self) -> None:
        if not self._end():
            return
        if self.back.closed_by_peer:
            self.front.close(passed_on(self.back.close_code), self.back.close_reason)
        else:
            self._tell("gateway", f"the connection to {self.back.peer} was lost")
            self.front.close(SERVER_LOST, "the connection to the gateway was lost")

    def _on_stalled(self) -> None:
        self._tell("stalled", "the client took nothing for too long: its connection is closed")
        self.front.leave()

    def _on_back_stalled(self) -> None:
        self._tell("gateway", f"{self.back.peer} took nothing for too long: it is given up")
        self.back.conversation.abort()

    def _tell(self, kind: str, text: str) -> None:
        kernel, client = self.front.label
        log.warning("WebSocket client %s: %s", self.front.peer, text)
        note(kind, text, kernel=kernel, client=client or self.front.peer)
