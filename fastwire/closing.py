"""How a connection ends: the states of RFC 6455 section 7, and what leads from one to the next.

What is difficult: a connection has two halves that end one after the other, each in two layers (a Close frame, then
TCP's FIN), in any order, with bytes of ours still waiting in a queue, and any of it may fail instead.

What was believed and is wrong:

- *Both Close frames are said, so TCP can be closed.* Ours may stand behind a megabyte that the peer is still reading:
  `State.DRAINING` (``test_bytes_are_not_lost_when_the_close_frames_cross``).
- *The peer has ended its stream, so it is gone.* It may have called shutdown(2) for one direction only and read on:
  `State.HALF_CLOSED`. Its descriptor stays readable for ever, so nobody may watch it for that: the loop would spin
  (``test_a_half_closed_client_gets_all_that_waited_for_it``).
- *Everything is written, so the descriptor can be closed.* close(2) with unread bytes in the socket sends RST, and RST
  takes with it what the peer's TCP has and its program has not read, our Close frame first: `State.FAREWELL`
  (``test_the_close_frame_arrives_although_more_comes``).
- *A few booleans will do.* "The client has terminated", "the server has terminated", "failed" and "ended" make
  sixteen combinations, of which these seven mean something.

No sockets, no clock, nothing that waits: `Closing` is told what happened and says where that leads. A pair that is not
in `TRANSITIONS` changes nothing, for what is late is not wrong: a Close frame after ours failed, a second call of
``close``. ``tests/test_closing.py`` walks the table, ``docs/states.md`` is drawn from it.
"""

from __future__ import annotations

from enum import Enum

__all__ = ["TRANSITIONS", "Closing", "Happened", "State"]


class State(Enum):
    """Where a connection stands: what it is called there, the section it is from, whose last frame has been said."""

    OPEN = ("both sides may speak", "RFC 6455 section 4.2.2", False, False)
    CLOSE_SENT = ("we have said our Close frame and wait for the peer's", "RFC 6455 section 7.1.2", True, False)
    DRAINING = (
        "both Close frames are said, or we leave without one; our last bytes may still wait",
        "RFC 6455 section 7.1.3",
        True,
        True,
    )
    FAILED = (
        "the peer broke a rule and was told so; what it sends is thrown away",
        "RFC 6455 section 7.1.7",
        True,
        True,
    )
    HALF_CLOSED = ("the peer's TCP has ended its side and may be reading", "RFC 9293 section 3.6", True, True)
    FAREWELL = (
        "all is said; our side of TCP has ended, and the peer is to end its own",
        "RFC 6455 section 7.1.1",
        True,
        True,
    )
    LOST = ("TCP is over", "RFC 6455 section 7.1.5", True, True)

    def __init__(self, meaning: str, source: str, we_are_done: bool, peer_is_done: bool) -> None:
        self.meaning = meaning
        self.source = source
        #: No frame of ours may follow.
        self.we_are_done = we_are_done
        #: None of the peer's is heard any more.
        self.peer_is_done = peer_is_done
        #: Nothing is read or written any more, and whoever waits is told.
        self.is_over = self.name in {"FAREWELL", "LOST"}


class Happened(Enum):
    """What ends a connection, piece by piece."""

    WE_CLOSE = "somebody here calls `close`"
    WE_LEAVE = "what this connection goes on with is broken, which is no Close frame of anybody"
    PEER_CLOSES = "a Close frame comes"
    PEER_FAULT = "the peer breaks a rule"
    PEER_ENDS = "the peer ends its side of TCP while bytes wait for it"
    ALL_WRITTEN = "the system has our last byte"
    TCP_OVER = "an error, an end with nothing left to say, `CLOSE_TIMEOUT`, an abort"


TRANSITIONS: dict[tuple[State, Happened], State] = {
    (State.OPEN, Happened.WE_CLOSE): State.CLOSE_SENT,
    (State.OPEN, Happened.WE_LEAVE): State.DRAINING,
    (State.OPEN, Happened.PEER_CLOSES): State.DRAINING,
    (State.OPEN, Happened.PEER_FAULT): State.FAILED,
    (State.OPEN, Happened.PEER_ENDS): State.HALF_CLOSED,
    (State.OPEN, Happened.TCP_OVER): State.LOST,
    (State.CLOSE_SENT, Happened.PEER_CLOSES): State.DRAINING,
    (State.CLOSE_SENT, Happened.PEER_FAULT): State.FAILED,
    (State.CLOSE_SENT, Happened.PEER_ENDS): State.HALF_CLOSED,
    (State.CLOSE_SENT, Happened.TCP_OVER): State.LOST,
    (State.DRAINING, Happened.ALL_WRITTEN): State.FAREWELL,
    (State.DRAINING, Happened.PEER_ENDS): State.HALF_CLOSED,
    (State.DRAINING, Happened.TCP_OVER): State.LOST,
    (State.FAILED, Happened.ALL_WRITTEN): State.FAREWELL,
    (State.FAILED, Happened.PEER_ENDS): State.HALF_CLOSED,
    (State.FAILED, Happened.TCP_OVER): State.LOST,
    (State.HALF_CLOSED, Happened.ALL_WRITTEN): State.FAREWELL,
    (State.HALF_CLOSED, Happened.TCP_OVER): State.LOST,
}


class Closing:
    """One connection's way to its end."""

    __slots__ = ("closed_by_peer", "state")

    def __init__(self) -> None:
        self.state = State.OPEN
        #: The peer sent a Close frame before we did.
        self.closed_by_peer = False

    def take(self, happened: Happened) -> State | None:
        """The state this leads to, None when it changes nothing."""
        after = TRANSITIONS.get((self.state, happened))
        if after is not None:
            self.closed_by_peer |= self.state is State.OPEN and happened is Happened.PEER_CLOSES
            self.state = after
        return after
