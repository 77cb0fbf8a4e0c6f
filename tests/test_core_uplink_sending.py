"""One sender: a message goes as a whole or waits as a whole, whatever its peer, its socket and Python do meanwhile."""

import hmac
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import builders
import oracle
import pytest
import zmq
from builders import KEY, client_message, data_frame, message
from hypothesis import given, settings
from hypothesis import strategies as st
from test_core_uplink import Kernel, ids, kernel, narrow, numbered, parser_of
from test_core_zmtp import shaken
from zmtp_oracle import greeting, ready

from fastwire import _core
from fastwire._core import OP_BINARY, PROTOCOL_V1, Ledger, Signer, Uplink, ZmtpStream
from fastwire.errors import SocketClosed

__all__ = ["kernel", "narrow"]  # fixtures

SCHEME = "hmac-sha512"  # by hashlib: Python code runs while a message is signed


class Hooked(zmq.Socket):
    """Calls something between two frames, when pyzmq sends."""

    between: Callable[[], object] | None = None
    frames_before = 1

    def send(self, data: object, flags: int = 0, **options: object) -> object:
        result = super().send(data, flags, **options)
        if flags & zmq.SNDMORE and Hooked.between is not None:
            Hooked.frames_before -= 1
            if Hooked.frames_before == 0:
                call, Hooked.between = Hooked.between, None
                call()
        return result

    @classmethod
    def call(cls, between: Callable[[], object], frames_before: int = 1) -> None:
        cls.between, cls.frames_before = staticmethod(between), frames_before


# -- a peer that goes in the middle of a message ---------------------------------------------------

#: A process that has the kernel's socket until it reads a word, and a little longer.
PEER = """
import os, sys, time, zmq
router = zmq.Context().socket(zmq.ROUTER)
router.rcvhwm = 1  # so that its libzmq reads no more than its program does
print(router.bind_to_random_port("tcp://127.0.0.1"), flush=True)
sys.stdin.readline()
time.sleep(0.5)
os._exit(0)
"""

#: One that runs it, and ends when libzmq has surely heard that it is gone.
AROUND = "import subprocess, sys, time; subprocess.run([sys.executable, '-c', sys.argv[1]]); time.sleep(0.5)"


class Mortal:
    """A peer that goes. ``gone`` is a descriptor that becomes readable then."""

    def __init__(self) -> None:
        self.gone, end = os.pipe()
        command = [sys.executable, "-c", AROUND, PEER]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=[end]
        )
        os.close(end)
        self.port = int(self._process.stdout.readline())

    def go_soon(self) -> None:
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def close(self) -> None:
        self._process.communicate()
        os.close(self.gone)


@contextmanager
def mortal() -> Iterator[Mortal]:
    peer = Mortal()
    try:
        yield peer
    finally:
        peer.close()


def connected(context: zmq.Context, port: int) -> zmq.Socket:
    """As a kernel manager connects stdin."""
    dealer = context.socket(zmq.DEALER, socket_class=Hooked)
    builders.opened.append(dealer)
    dealer.setsockopt(zmq.IDENTITY, b"client")
    dealer.setsockopt(zmq.IMMEDIATE, 1)
    dealer.setsockopt(zmq.RECONNECT_IVL, 20)
    dealer.connect(f"tcp://127.0.0.1:{port}")
    assert dealer.poll(builders.PATIENCE_MS, zmq.POLLOUT)
    return dealer


@pytest.mark.parametrize("transport", [False], ids=["direct"], indirect=True)  # pyzmq does not tell what libzmq dropped
@pytest.mark.parametrize("waits", [False, True], ids=["new", "waiting"])
@pytest.mark.parametrize("frame", [1, 3, 5], ids=["second frame", "fourth frame", "last frame"])
def test_a_peer_that_goes_in_the_middle(
    kernel: Kernel, context: zmq.Context, transport: bool, frame: int, waits: bool
) -> None:
    with mortal() as peer:
        kernel.dealers["shell"] = connected(context, peer.port)
        uplink = kernel.uplink(PROTOCOL_V1)
        uplink.held = waits
        parser = parser_of(*map(data_frame, numbered(1, PROTOCOL_V1)))
        if waits:
            uplink.relay(parser)
        uplink.held = False
        _core.script_syscalls([*[("zmq_send", 0)] * frame, ("zmq_send", peer.gone)])
        peer.go_soon()
        uplink.retry()
        uplink.relay(parser)
        assert (uplink.sent, uplink.waiting_messages, uplink.sending_bytes) == (0, 1, 0)
    arrives_whole_elsewhere(kernel, context, uplink, peer.port)


def arrives_whole_elsewhere(kernel: Kernel, context: zmq.Context, uplink: _core.Uplink, port: int) -> None:
    """The message that waits, and those behind it, when the peer is there again."""
    kernel.routers["shell"] = router = context.socket(zmq.ROUTER)
    builders.opened.append(router)
    router.setsockopt(zmq.RCVTIMEO, builders.PATIENCE_MS)
    router.bind(f"tcp://127.0.0.1:{port}")
    uplink.relay(parser_of(*map(data_frame, numbered(3, PROTOCOL_V1, first=1))))
    assert kernel.dealers["shell"].poll(builders.PATIENCE_MS, zmq.POLLOUT)
    uplink.retry()
    messages = kernel.received("shell", 4)
    assert ids(messages) == [0, 1, 2, 3]
    assert {len(frames) for frames in messages} == {6}
    assert (uplink.sent, uplink.waiting_messages, uplink.waiting_bytes) == (4, 0, 0)


@pytest.fixture
def hooked(kernel: Kernel, context: zmq.Context) -> Iterator[Kernel]:
    """A kernel whose shell is used through pyzmq's API, by a socket that tells."""
    _core.use_pyzmq(True)
    kernel.routers["shell"] = router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.RCVTIMEO, builders.PATIENCE_MS)
    router.bind("inproc://hooked")
    kernel.dealers["shell"] = dealer = context.socket(zmq.DEALER, socket_class=Hooked)
    dealer.setsockopt(zmq.IDENTITY, b"client")
    dealer.connect("inproc://hooked")
    builders.opened.extend((router, dealer))
    yield kernel
    Hooked.between = None


def test_a_message_that_cannot_be_ended_ends_its_socket(hooked: Kernel) -> None:
    def interrupted() -> None:
        raise MemoryError

    uplink = hooked.uplink(PROTOCOL_V1)
    Hooked.call(interrupted)
    with pytest.raises(MemoryError):
        uplink.send(OP_BINARY, numbered(1, PROTOCOL_V1)[0])
    with pytest.raises(SocketClosed):
        uplink.send(OP_BINARY, numbered(1, PROTOCOL_V1)[0])
    assert (uplink.sent, uplink.waiting_messages, uplink.sending_bytes) == (0, 0, 0)
    assert not hooked.routers["shell"].poll(50), "the half of a message"


# -- Python code that comes back in the middle -----------------------------------------------------

CALLS = {
    "retry": lambda uplink: uplink.retry(),
    "send": lambda uplink: uplink.send(OP_BINARY, numbered(1, PROTOCOL_V1)[0]),
    "relay": lambda uplink: uplink.relay(parser_of(data_frame(numbered(1, PROTOCOL_V1)[0]))),
    "adopt": lambda uplink: uplink.adopt(_core.Uplink(PROTOCOL_V1, _core.Signer(b""), uplink_sockets(uplink))),
    "be adopted": lambda uplink: _core.Uplink(PROTOCOL_V1, _core.Signer(b""), uplink_sockets(uplink)).adopt(uplink),
}


def uplink_sockets(uplink: _core.Uplink) -> dict[str, object]:
    """Sockets that are not used."""
    return dict.fromkeys(oracle.CHANNELS, uplink)


@pytest.mark.parametrize("call", CALLS)
def test_an_uplink_is_not_entered_while_it_sends(hooked: Kernel, call: str) -> None:
    uplink, refusals = hooked.uplink(PROTOCOL_V1), []

    def come_back() -> None:
        try:
            CALLS[call](uplink)
        except RuntimeError as error:
            refusals.append(str(error))

    uplink.held = True
    uplink.relay(parser_of(*map(data_frame, numbered(4, PROTOCOL_V1))))
    uplink.held = False
    Hooked.call(come_back)
    uplink.retry()
    assert len(refusals) == 1
    assert "one thread" in refusals[0]
    assert ids(hooked.received("shell", 4)) == [0, 1, 2, 3]
    assert (uplink.sent, uplink.waiting_messages, uplink.waiting_bytes) == (4, 0, 0)


def test_a_refused_relay_leaves_the_message(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    uplink = _core.Uplink(PROTOCOL_V1, _core.Signer(builders.KEY, SCHEME), kernel.dealers)
    parser, copy, todo = parser_of(*map(data_frame, numbered(2, PROTOCOL_V1, first=1))), hmac.HMAC.copy, [1]

    def interrupted(self: hmac.HMAC) -> hmac.HMAC:
        if todo:
            todo.pop()
            with pytest.raises(RuntimeError, match="one thread"):
                uplink.relay(parser)
        return copy(self)

    monkeypatch.setattr(hmac.HMAC, "copy", interrupted)
    uplink.send(OP_BINARY, numbered(1, PROTOCOL_V1)[0])
    assert parser.pending == 2
    uplink.relay(parser)
    assert ids(kernel.received("shell", 3)) == [0, 1, 2]


def test_a_relay_that_is_interrupted_leaves_the_message(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    uplink = _core.Uplink(PROTOCOL_V1, _core.Signer(builders.KEY, SCHEME), kernel.dealers)
    parser, copy, calls = parser_of(*map(data_frame, numbered(3, PROTOCOL_V1))), hmac.HMAC.copy, []

    def interrupted(self: hmac.HMAC) -> hmac.HMAC:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return copy(self)

    monkeypatch.setattr(hmac.HMAC, "copy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        uplink.relay(parser)
    assert (uplink.sent, parser.pending) == (1, 2)
    uplink.relay(parser)
    assert ids(kernel.received("shell", 3)) == [0, 1, 2]


# -- what is held, and what it takes ---------------------------------------------------------------


def test_a_message_of_very_many_parts_waits_and_goes_as_it_is(kernel: Kernel, transport: bool) -> None:
    parts = [*builders.message("comm_msg"), *[b"", b"x", b"y" * 100] * 20_000]
    uplink = kernel.uplink(PROTOCOL_V1)
    uplink.held = True
    uplink.send(OP_BINARY, oracle.encode_v1("shell", parts))
    assert uplink.waiting_bytes >= 101 * 20_000 + 60_000 * 64
    uplink.held = False
    uplink.retry()
    assert kernel.received("shell", 1) == [builders.wire(oracle.Signer(builders.KEY), parts)]
    assert (uplink.waiting_messages, uplink.waiting_bytes) == (0, 0)


def test_what_libzmq_has_not_passed_on_is_counted(narrow: Kernel) -> None:
    uplink = narrow.uplink(PROTOCOL_V1)
    parts = builders.message("comm_msg", "id", {}, bytes(300_000))
    uplink.relay(parser_of(*[data_frame(oracle.encode_v1("shell", parts))] * 8))
    each = uplink.waiting_bytes // uplink.waiting_messages
    assert 300_000 < each < 302_000
    assert uplink.sending_bytes == uplink.sent * each > 0
    received = 0
    while received < 8:
        narrow.received("shell", 1)
        received += 1
        uplink.retry()
        gone(lambda left=each * (uplink.sent - received): uplink.sending_bytes == left)
    assert (uplink.waiting_bytes, uplink.sending_bytes) == (0, 0)


def gone(condition: Callable[[], bool]) -> None:
    """pyzmq hears in a thread of its own what libzmq has let go of."""
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError


def test_a_kernel_that_is_stopped_is_seen_in_what_libzmq_has(context: zmq.Context, transport: bool) -> None:
    """Its TCP takes what it takes; the rest is ours."""
    with mortal() as peer:  # it never reads
        sockets = dict.fromkeys(oracle.CHANNELS, connected(context, peer.port))
        uplink = _core.Uplink(PROTOCOL_V1, _core.Signer(builders.KEY), sockets)
        payload = oracle.encode_v1("shell", builders.message("comm_msg", "id", {}, bytes(4 << 20)))
        for _ in range(20):
            uplink.send(OP_BINARY, payload)
        assert (uplink.sent, uplink.waiting_messages) == (20, 0)
        again = _core.Uplink(None, _core.Signer(builders.KEY), sockets)
        again.adopt(uplink)
        del uplink
        assert again.sending_bytes > 0, "also by who comes after"
        peer.go_soon()
    sockets["shell"].close(linger=0)
    gone(lambda: again.sending_bytes == 0)


# -- any order of things, against the oracle -------------------------------------------------------

KEYS = [b"key %d" % number for number in range(3)]
steps = st.lists(
    st.one_of(
        st.tuples(st.just("relay"), st.lists(st.sampled_from(oracle.CHANNELS), min_size=1, max_size=5)),
        st.tuples(st.just("read"), st.sampled_from(oracle.CHANNELS)),
        st.tuples(st.sampled_from(["retry", "hold", "new protocol", "new key", "new socket"]), st.none()),
    ),
    max_size=40,
)


class Client:
    """A client's side of a narrow kernel, and the oracle's."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel, self.key, self.protocol, self.made = kernel, 0, PROTOCOL_V1, 0
        self.signer = _core.Signer(KEYS[0])
        self.uplink = _core.Uplink(self.protocol, self.signer, kernel.dealers)
        self.oracle = oracle.Uplink(KEYS[0])

    def relay(self, channels: list[str]) -> None:
        payloads = []
        for channel in channels:
            parts = builders.message("comm_msg", f"id-{self.made}", {"i": self.made}, *[b"b"] * (self.made % 3))
            payloads.append(builders.client_message(parts, channel, self.protocol))
            self.oracle.say(channel, parts)
            self.made += 1
        self.uplink.relay(parser_of(*map(data_frame, payloads)))

    def retry(self, _: None = None) -> None:
        self.uplink.retry()

    def hold(self, _: None) -> None:
        self.uplink.held = self.oracle.held = not self.uplink.held

    def replace(self, protocol: str | None, signer: _core.Signer) -> None:
        before, self.protocol, self.signer = self.uplink, protocol, signer
        self.uplink = _core.Uplink(protocol, signer, self.kernel.dealers)
        self.uplink.held = before.held
        self.uplink.adopt(before)
        assert (before.waiting_messages, before.waiting_bytes, before.sent) == (0, 0, 0)

    def new_protocol(self, _: None) -> None:
        self.replace(PROTOCOL_V1 if self.protocol is None else None, self.signer)

    def new_socket(self, _: None) -> None:
        self.replace(self.protocol, self.signer)

    def new_key(self, _: None) -> None:
        self.key = (self.key + 1) % len(KEYS)
        self.oracle.keys.append(KEYS[self.key])
        self.replace(self.protocol, _core.Signer(KEYS[self.key]))

    def read(self, channel: str) -> None:
        router = self.kernel.routers[channel]
        if router.poll(0):
            self.oracle.arrive(channel, router.recv_multipart()[1:])

    def agrees(self) -> None:
        assert self.uplink.sent + self.uplink.waiting_messages == self.oracle.said
        assert (self.uplink.waiting_bytes == 0) == (self.uplink.waiting_messages == 0)


@settings(max_examples=120)
@given(steps)
def check_schedule(make: Callable[[], Kernel], schedule: list[tuple[str, object]]) -> None:
    client = Client(make())
    for step, argument in schedule:
        getattr(client, step.replace(" ", "_"))(argument)
        client.agrees()
    client.uplink.held = client.oracle.held = False
    while client.oracle.missing:
        client.retry()
        for channel in oracle.CHANNELS:
            client.read(channel)
    assert (client.uplink.sent, client.uplink.waiting_messages) == (client.made, 0)


def test_any_schedule_is_the_oracles(context: zmq.Context, transport: bool) -> None:
    count = 0

    def make() -> Kernel:
        nonlocal count
        for socket in builders.opened:
            socket.close(linger=0)
        builders.opened.clear()
        routers, dealers = {}, {}
        for channel in oracle.CHANNELS:
            count += 1
            routers[channel], dealers[channel] = router, dealer = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
            builders.opened.extend((router, dealer))
            for end in (router, dealer):
                end.setsockopt(zmq.SNDHWM, 1)
                end.setsockopt(zmq.RCVHWM, 1)
            dealer.setsockopt(zmq.IDENTITY, b"client")
            router.bind(f"inproc://narrow-{count}")
            dealer.connect(f"inproc://narrow-{count}")
        return Kernel(routers, dealers)

    check_schedule(make)


# -- connections of our own ------------------------------------------------------------------------


def said(number: int) -> bytes:
    return client_message(message("execute_request", str(number)), "shell", PROTOCOL_V1)


def streams() -> dict[str, ZmtpStream]:
    return {channel: shaken() for channel in ("shell", "control", "stdin")}


def test_what_goes_at_once_stays_behind_what_waits_and_is_counted_as_it_is() -> None:
    sockets = streams()
    shell, uplink = sockets["shell"], Uplink(PROTOCOL_V1, Signer(KEY), sockets)
    uplink.send(OP_BINARY, said(0))
    assert (uplink.sent, uplink.unanswered) == (1, 1)
    uplink.held = True
    uplink.send(OP_BINARY, said(1))
    assert (uplink.sent, uplink.waiting_messages) == (1, 1)
    uplink.held = False
    uplink.retry()
    shell.take(1 << 20)
    shell.send([b"x" * 70_000])  # it is full
    uplink.send(OP_BINARY, said(2))
    shell.take(1 << 20)
    uplink.send(OP_BINARY, said(3))
    uplink.retry()
    written = shell.take(1 << 20)
    assert 0 < written.index(b'"2"') < written.index(b'"3"')
    assert (uplink.sent, uplink.unanswered, uplink.waiting_messages) == (4, 4, 0)


def test_what_is_taken_back_or_signed_anew_is_still_a_request() -> None:
    sockets = streams()
    shell, uplink = sockets["shell"], Uplink(PROTOCOL_V1, Signer(KEY), sockets)
    uplink.send(OP_BINARY, said(0))
    shell.renew()
    uplink.retry()
    assert (uplink.unanswered, uplink.waiting_messages) == (0, 1)
    uplink.held = True
    other = Uplink(PROTOCOL_V1, Signer(b"other"), sockets)
    other.adopt(uplink)
    shell.feed(greeting() + ready(b"ROUTER"))
    shell.drain(-1, "shell", Signer(KEY))
    shell.take(1 << 20)
    other.retry()
    assert (other.sent, other.unanswered, other.waiting_messages) == (1, 1, 0)


@pytest.mark.parametrize(
    "header", [b'{"msg_type": 123456789012345}', b'{"msg_type": [12345678901234]}', b"{}", b"", b"?"]
)
def test_who_does_not_say_what_it_asks_may_be_answered(header: bytes) -> None:
    ledger = Ledger()
    uplink = Uplink(PROTOCOL_V1, Signer(KEY), streams(), ledger=ledger)
    uplink.send(OP_BINARY, client_message([header, b"{}", b"{}", b"{}"], "shell", PROTOCOL_V1))
    assert (uplink.sent, uplink.unanswered, len(ledger)) == (1, 1, 0)
