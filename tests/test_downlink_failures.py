"""What a kernel and its clients hear of each other where memory runs out, or more comes than there should."""

import json
import zlib
from typing import Any

import pytest
from builders import client_frame, client_message, message
from relay_stage import MIB, Kernel, Stage, stream, until

from fastwire._core import OP_TEXT, PROTOCOL_V1, RSV1
from fastwire.journal import Cursor
from fastwire.reading import BYTES_A_TURN

pytest_plugins = "relay_stage"  # the fixtures `stage`, `kernel` and `quiet`


def test_who_catches_up_while_memory_is_short_is_given_everything(
    stage: Stage, kernel: Kernel, monkeypatch: pytest.MonkeyPatch, quiet: None
) -> None:
    """Also when it has said that it has all it was given: nothing comes of it any more that would bring the rest."""
    stage.start(kernel, high_water=20_000)
    stage.send_buffers["ann"] = 1 << 15
    ann = stage.connect("ann", receive_buffer=1 << 15)
    session = stage.session("ann")
    cursor, connection = session.downlink.cursor, session.connection
    kernel.publish(*stream(*range(300), size=20_000))
    until(lambda: stage.run(lambda: not cursor.is_live), "it is behind")
    works, left = Cursor.next, ["memory is short"]

    def starved(self: Cursor) -> Any:
        if self is not cursor or not left:
            return works(self)
        if connection.received == connection.conversation.writer.data_end:
            left.clear()
        raise MemoryError

    monkeypatch.setattr(Cursor, "next", starved)
    assert ann.ids(300) == [str(number) for number in range(300)]
    assert not left


def test_half_a_surrogate_pair_does_not_reach_a_kernel(stage: Stage, kernel: Kernel) -> None:
    """It cannot encode it, whatever its client speaks: the cell would have no end."""
    stage.start(kernel)
    client = stage.connect("ann", PROTOCOL_V1)
    parts = message("execute_request", "cell")
    parts[3] = b'{"code": "\\ud83d"}'
    client.send_message(client_message(parts, "shell", PROTOCOL_V1))
    _, received = kernel.receive()
    assert json.loads(received[3]) == {"code": "\ufffd"}


def test_a_client_that_compresses_has_little_more_waiting_than_it_may(stage: Stage, kernel: Kernel) -> None:
    """All of them come in one read: it is not read any more after the one that is too much."""
    stage.start(kernel, uplink_limit=1 * MIB)
    client = stage.connect("ann", deflate=True)
    session = stage.session("ann")
    stage.run(lambda: session.hold(held=True))
    text = client.request("cell", text="x" * 2 * BYTES_A_TURN)
    compressor = zlib.compressobj(wbits=-15)
    shrunk = (compressor.compress(text.encode()) + compressor.flush(zlib.Z_FULL_FLUSH))[:-4]
    client.send(client_frame(OP_TEXT, shrunk, rsv=RSV1) * 12)
    until(lambda: session._paused, "the client is not read any more")
    stage.turns()
    assert session.uplink_bytes < 1 * MIB + 2 * len(text)
    stage.run(lambda: session.hold(held=False))
    assert kernel.ids(12) == ["cell"] * 12
    until(lambda: not session._paused, "it is read again")
