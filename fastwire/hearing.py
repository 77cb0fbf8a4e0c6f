"""Whether a kernel's iopub is heard, and whether requests wait for that: one machine of named states for each kernel.

What a kernel prints while nobody is subscribed is lost for good: a PUB socket keeps nothing, and libzmq says neither
when a subscription has arrived nor what was missed meanwhile. So nobody's request may reach a kernel before its iopub
is known to be heard. What looks like a proof and is none:

- That the connection is there. The subscription follows it, and the kernel may print between the two.
- A welcome (JEP 65). Only kernels of today send one, and an XPUB socket without ``XPUB_VERBOSE`` only to the first who
  subscribes: who waits for it waits for ever. One that comes is a proof.
- A message that was said by the process before. It may still lie in the socket when the next process runs.
- An answer to ``kernel_info_request``. It comes on shell, and iopub may be connected later. A kernel that goes on to
  answer without a word on iopub, though that is connected, publishes no status for it: there is nothing to wait for.

This room decides and keeps no time; `fastwire.relay` tells it what happened, `fastwire.kernels` asks the kernels.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

__all__ = ["TRANSITIONS", "Event", "Hearing", "State"]


class State(enum.Enum):
    UNHEARD = "subscribed, and nothing was heard yet: who comes waits, and there is nobody yet whose requests could"
    HEARD = "what the kernel says is heard, and requests pass"
    BELIEVED = "nothing was heard, nor is it waited for: it publishes nothing, or answers nobody. Requests pass"
    LOST = "its process is another now, its connection broke, or somebody was let in before a word came. Requests wait"
    RETURNING = "it is heard again, and may not yet be connected to everybody whom it could ask. Requests wait"
    ENDING = "its process is to be replaced by another: requests wait for that, and what it says proves nothing"
    CLOSED = "the kernel is gone"


class Event(enum.Enum):
    SPOKE = "a message came on iopub"
    BROKE = "the connection of iopub broke, or a new one was made, or the kernel's process is another"
    LET_IN = "somebody is connected, whether or not it is heard"
    PROVEN = "it is heard, it has answered, and it can ask all who are connected"
    GIVEN_UP = "it answers without a word on iopub, lets nobody hear that, or does not answer although it runs"
    RESTART = "somebody is about to end its process and to start another"
    STARTED = "the restart has ended, in whichever way"
    CLOSE = "the kernel is gone"


S, E = State, Event

#: Every event in every state. What is not said here changes nothing.
TRANSITIONS: dict[State, dict[Event, State]] = {
    S.UNHEARD: {
        E.SPOKE: S.HEARD,
        E.LET_IN: S.LOST,  # he waits no longer, what he asks does
        E.GIVEN_UP: S.BELIEVED,
        E.RESTART: S.ENDING,
        E.CLOSE: S.CLOSED,
    },
    S.HEARD: {E.BROKE: S.LOST, E.RESTART: S.ENDING, E.CLOSE: S.CLOSED},
    S.BELIEVED: {E.SPOKE: S.HEARD, E.BROKE: S.LOST, E.RESTART: S.ENDING, E.CLOSE: S.CLOSED},
    S.LOST: {E.SPOKE: S.RETURNING, E.GIVEN_UP: S.BELIEVED, E.RESTART: S.ENDING, E.CLOSE: S.CLOSED},
    S.RETURNING: {
        E.PROVEN: S.HEARD,
        E.GIVEN_UP: S.HEARD,  # it was heard: that it does not answer, or cannot ask, is no reason to wait longer
        E.BROKE: S.LOST,
        E.RESTART: S.ENDING,
        E.CLOSE: S.CLOSED,
    },
    S.ENDING: {E.STARTED: S.LOST, E.CLOSE: S.CLOSED},
    S.CLOSED: {},
}

#: Requests on shell wait.
HELD = {S.LOST, S.RETURNING, S.ENDING}

#: It is worth asking the kernel.
DOUBTFUL = {S.UNHEARD, S.LOST, S.RETURNING}

#: Who comes now misses nothing.
HEARD = {S.HEARD, S.RETURNING, S.BELIEVED}


class Hearing:
    """The state of one kernel. ``listeners`` are called after each change."""

    def __init__(self) -> None:
        self.state = State.UNHEARD
        self.listeners: list[Callable[[], None]] = []
        #: Times that its connection broke, also where that changed nothing: what was found out before is of another.
        self.breaks = 0
        self._restarts = 0

    def happens(self, event: Event) -> None:
        """Restarts overlap: the end of one does not end the wait for the next, whose process takes with it what it
        is given."""
        if event is Event.RESTART:
            self._restarts += 1
        elif event is Event.STARTED:
            self._restarts -= 1
            if self._restarts:
                return
        self.breaks += event is Event.BROKE
        before = self.state
        self.state = TRANSITIONS[before].get(event, before)
        if self.state is not before:
            for tell in self.listeners:
                tell()

    @property
    def held(self) -> bool:
        """Whether requests on shell wait."""
        return self.state in HELD

    @property
    def doubtful(self) -> bool:
        """Whether the kernel is to be asked."""
        return self.state in DOUBTFUL

    @property
    def needs_a_word(self) -> bool:
        """Whether a message on iopub changes anything."""
        return Event.SPOKE in TRANSITIONS[self.state]

    @property
    def heard(self) -> bool:
        """Whether somebody who comes now misses nothing."""
        return self.state in HEARD
