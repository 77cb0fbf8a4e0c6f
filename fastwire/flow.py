"""Pure policy: how much, how long, and what then. No sockets, no clock of its own.

Every number a user can set has its default here, once; `fastwire.settings` makes traits of them and the docs are
generated from those. Sizes are bytes, times seconds, positions bytes since a connection began.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass

from fastwire._core import Asking

__all__ = [
    "Acknowledgements", "Attempts", "Limits", "OutputRates", "Questions", "Rate", "has_room", "is_said_again",
    "resume_time", "too_many",
]  # fmt: skip

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB


@dataclass(frozen=True)
class Limits:
    """Bounds of one kernel's relay. Bytes and seconds. Many, because each is a number that a user can set, and none has
    a default anywhere else."""

    #: Of one message of a client: its bytes, joined and decompressed, and its frames.
    max_message_size: int = 10 * MIB
    max_fragments: int = 128 * KIB

    #: Pings and pongs a second that a client may send unasked, on the average of `Rate.WINDOW` seconds.
    control_frame_rate: float = 2000.0

    #: How long a connection may be without a whole request, the one that opens a WebSocket included.
    handshake_timeout: float = 60.0

    #: WebSockets that are open at once. Each costs the server four file descriptors, seven with libzmq. As many
    #: sessions of a kernel may be away; beyond, the longest away is given up.
    clients_per_kernel: int = 256
    clients_per_user: int = 1024

    #: A client's socket is given more only while fewer bytes than this wait for it; the rest stays in the log, where it
    #: can still be re-encoded for the next socket of the session. With many clients it is less (`fastwire.budgets`).
    high_water: int = 1 * MIB

    #: A client for which messages have waited so long is called slow.
    slow_after: float = 1.0

    #: Pings tell what a client has received. Without them, what the system's TCP took counts as received.
    acknowledge: bool = True

    #: What undelivered messages may take of memory: those of one kernel, of all whose hindmost client is one user's,
    #: and of all together.
    client_memory_limit: int = 32 * MIB
    user_memory_limit: int = 256 * MIB
    total_memory_limit: int = 512 * MIB

    #: Adjacent output of one cell is joined when a quarter of the memory is used.
    merge: bool = True

    #: What does not fit into memory is put aside in files, up to so many bytes a kernel, a user and in all, in a
    #: directory on a disk of which the last ``spill_keep_free`` bytes are left to others. No directory: dropped.
    spill: bool = True
    client_spill_limit: int = 2 * GIB
    user_spill_limit: int = 8 * GIB
    total_spill_limit: int = 16 * GIB
    spill_keep_free: int = 1 * GIB
    spill_dir: str = ""

    #: Of what everybody has the messages of runs are kept so far, a kernel, for pages that were reloaded and for
    #: programs; 0: not at all. In memory: the first to go where that is short.
    history_limit: int = 2 * MIB

    #: A client whose TCP takes nothing for so long although bytes wait is closed, if it can come back for them.
    write_deadline: float = 30.0

    #: What a client may have waiting for a kernel that does not take it; at the bound its socket is not read any
    #: more, and after so long without progress it is closed.
    uplink_limit: int = 8 * MIB
    uplink_deadline: float = 600.0

    #: How long a session without a socket is kept after its TCP connection broke, and after a Close frame.
    resume_timeout: float = 3600.0
    resume_timeout_closed: float = 60.0


def resume_time(limits: Limits, *, closed: bool) -> float:
    """Seconds a session waits for its next socket; ``closed`` when its client ended the last one by a Close frame."""
    return limits.resume_timeout_closed if closed else limits.resume_timeout


def is_said_again(msg_type: str, *, was_taken: bool, answers_pings: bool, replied: bool, restarted: bool) -> bool:
    """Whether a message that a socket was given, and that its client has not acknowledged, is given to the next one.

    ``was_taken``: TCP's other end has it. That is the client, or a proxy that may take bytes for a client that is gone:
    one that answers pings (``answers_pings``) has said what it has, and is believed. Of one that never does TCP is all
    there is to believe: what it takes badly twice (a second comm_open replaces a live comm, a second input_request asks
    again) and what is from before the kernel was started again (``restarted``) does not come twice. A question that
    was answered (``replied``, as `Questions` knows), or whose kernel is gone, is not asked again.
    """
    if msg_type == "input_request" and (replied or restarted):
        return False
    if answers_pings or not was_taken:
        return True
    return not restarted and msg_type not in ("comm_open", "input_request")


class Questions:
    """Which of a kernel's questions to one client are answered: those that were asked before an answer passed. A kernel
    that asks anew waits for no other answer; and an answer need not say which question it is for."""

    def __init__(self) -> None:
        #: What has a number before this is answered.
        self.answered = 0
        self._answers = 0

    def look(self, answers: int, end: int) -> None:
        """So many answers have passed; what was asked until now has a number before ``end``. To be called before the
        next question."""
        if answers != self._answers:
            self._answers, self.answered = answers, end


class Attempts:
    """The connections of a session, as they end: whether its client cannot take a message that it is given each time.

    A client says so (close code 1009). A proxy between, or a client that fails, just ends the connection: of `MOST` in
    a row that end at the same place the message is taken to be the reason. Of a client that never answered a ping that
    place is not known: it may have had the message each time. A short message is no reason: a network that fails three
    times before a pong has come, in a flood, looks the same.
    """

    MOST = 3

    #: What every WebSocket stack takes, by default, and proxies too.
    LEAST = 1 * MIB

    def __init__(self) -> None:
        #: The last one ended further on than the one before, or its client has everything.
        self.has_progressed = True
        #: The client has answered a ping.
        self.answers = False
        self._place: int | None = None
        self._count = 0

    def ended(self, place: int | None, *, too_long: bool, answers: bool, longest: int) -> bool:
        """One ended, and its client has received what comes before ``place``; None: everything. ``answers``: it has
        answered a ping, on this one or before. ``longest`` are the bytes of the longest message that was on its way.
        Returns whether a message is to be passed over."""
        self.answers |= answers
        self.has_progressed = place is None or place != self._place
        self._count = 1 if self.has_progressed else self._count + 1
        self._place = place
        if place is None or not (too_long or (self.answers and self._count >= self.MOST and longest >= self.LEAST)):
            return False
        self._count = 0
        return True


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


@dataclass
class Slice:
    """What came within a moment; it counts until ``end``."""

    begin: float
    end: float
    messages: int = 0
    nbytes: int = 0


class OutputRate:
    """The output of one request against limits of messages and of bytes a second; 0 is none. Above one output is left
    out, which does not count, until what passed in the last ``window`` seconds is below `RESUME` of it."""

    RESUME = 0.8

    #: What is remembered of a window, however much came in it.
    SLICES = 32

    def __init__(self, messages: float, nbytes: float, window: float) -> None:
        self._limits = {"message": messages, "data": nbytes}
        self._window = window
        self._slices: deque[Slice] = deque()
        self._exceeded: set[str] = set()

    def judge(self, nbytes: int, now: float) -> str | None:
        """Whether a message is left out: None for no. The first time, which limit that is: "message" or "data"."""
        while self._slices and self._slices[0].end <= now:
            self._slices.popleft()
        before = self._exceeded
        amounts = {"message": 1 + sum(each.messages for each in self._slices)}
        amounts["data"] = nbytes + sum(each.nbytes for each in self._slices)
        self._exceeded = {name for name, amount in amounts.items() if self._is_above(name, amount)}
        if not self._exceeded:
            self._count(nbytes, now)
            return None
        return min(self._exceeded - before, default="")

    def _is_above(self, name: str, amount: int) -> bool:
        limit = self._limits[name]
        return limit > 0 and amount > limit * self._window * (self.RESUME if name in self._exceeded else 1)

    def _count(self, nbytes: int, now: float) -> None:
        if not self._slices or now >= self._slices[-1].begin + self._window / self.SLICES:
            self._slices.append(Slice(now, now + self._window))
        self._slices[-1].messages += 1
        self._slices[-1].nbytes += nbytes

    def is_over(self, now: float) -> bool:
        """Nothing that came counts any more."""
        return not self._slices or self._slices[-1].end <= now


class OutputRates:
    """An `OutputRate` for each request of a kernel that has output. A kernel may work on several at a time: what one
    says, and its end, leave the others alone. Beyond `MOST`, which no kernel works on at a time, they share one."""

    MOST = 64

    def __init__(self, messages: float, nbytes: float, window: float) -> None:
        self._limits = messages, nbytes, window
        self._rates: dict[Hashable, OutputRate] = {}

    def judge(self, request: Hashable, nbytes: int, now: float) -> str | None:
        """As `OutputRate.judge`; ``request`` is None for output that belongs to none."""
        rate = self._rates.get(request) or self._begin(request, now)
        return rate.judge(nbytes, now)

    def _begin(self, request: Hashable, now: float) -> OutputRate:
        if len(self._rates) >= self.MOST:
            self._rates = {key: rate for key, rate in self._rates.items() if not rate.is_over(now)}
        key = request if len(self._rates) < self.MOST else None
        return self._rates.setdefault(key, OutputRate(*self._limits))

    def ended(self, request: Hashable) -> None:
        """A request has ended; None: all have."""
        if request is None:
            self._rates.clear()
        self._rates.pop(request, None)


def too_many(limits: Limits, of_kernel: int, of_user: int) -> str | None:
    """Why one more client is not admitted beside these others of the same kernel and of the same user, or None."""
    if of_kernel >= limits.clients_per_kernel:
        return f"the kernel has {of_kernel} clients, as many as the server allows"
    if of_user >= limits.clients_per_user:
        return f"the user has {of_user} clients, as many as the server allows"
    return None


def has_room(limit: int, used: int) -> bool:
    """Whether one more client or kernel is admitted where ``used`` descriptors or sockets are in use: an eighth of the
    ``limit`` is left to what is there. A kernel that is restarted needs ten for a moment, a request or a file one."""
    return used + MOST_FOR_ONE <= limit - max(limit // 8, LEAST_RESERVE)


#: Descriptors, and sockets, that a kernel with its first client takes at most, and what is always left to others.
MOST_FOR_ONE = 16
LEAST_RESERVE = 48


class Acknowledgements(Asking):
    """Which bytes of a connection its peer has received, as the pongs of numbered pings tell.

    A pong says that the peer's WebSocket stack has taken everything before its ping (RFC 6455 section 5.5.3). At
    most one ping is outstanding, and none is sent while nothing is unacknowledged. Each costs a wake-up here and
    one there, so bytes wait for one a while: it goes with the next ones after that, or by itself behind the last of
    a burst (`wait`). Only a connection's first does not: whether its client answers at all decides what is
    believed. Who is behind gets more when it has answered, and is asked again as soon as it has. A peer that never
    answers, although its TCP took a ping `PATIENCE` ago and takes more bytes or has them all, is believed to have
    received what was written (`demoted`), until it does answer. One that has answered before is only slow: a
    browser does not while its page's script is busy. Where more is kept back until it answers (``held``), and
    nothing says that it ever will, it is believed after `HELD_PATIENCE`: there are clients that answer no pings,
    and it would have to wait for nothing.

    What is asked and answered with each burst is compiled (`fastwire._core.Asking`), what silence means is here.
    """

    PREFIX = b"fastwire"

    #: Seconds that bytes wait until others take a ping with them, and until one goes without.
    DELAY = 0.150
    TAIL = 0.300

    #: Where so many bytes are unacknowledged that whoever gives them out may wait for that, they wait for neither:
    #: seconds between two pings then, at least, to one that is not behind.
    MUCH = 16 * KIB
    INTERVAL = 0.050

    PATIENCE = 30.0
    HELD_PATIENCE = 2.0

    def __new__(cls) -> Acknowledgements:
        return super().__new__(cls, cls.PREFIX, cls.DELAY, cls.TAIL, cls.INTERVAL, cls.MUCH)

    def __init__(self) -> None:
        self._taken = 0
        self._silent_since: float | None = None

    @property
    def answers(self) -> bool:
        """It has answered a ping: what it says is believed."""
        return self._answered

    def look(self, now: float, taken: int, *, waits: bool, held: bool = False) -> None:
        """The ping is not answered yet; the peer's TCP has everything before ``taken``. One that takes nothing although
        bytes wait is stalled, not silent."""
        moved, self._taken = taken > self._taken, max(taken, self._taken)
        if self._answered or taken <= self._asked:
            return
        if self._silent_since is None:
            self._silent_since = now
        patience = self.HELD_PATIENCE if held else self.PATIENCE
        self.demoted |= (moved or not waits) and now - self._silent_since >= patience

    def pause(self) -> None:
        """Nothing is read from the peer: that no pong comes means nothing."""
        self._silent_since = None
