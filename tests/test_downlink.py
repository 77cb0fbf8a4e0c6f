"""What one client gets differently, between real ZMQ sockets and real WebSockets."""

import json
import logging

import pytest
from builders import message
from relay_stage import Kernel, Stage, leave, stream, until

from fastwire import _core
from fastwire._core import Batch
from fastwire.downlink import Changes
from fastwire.notices import local_batch

pytest_plugins = "relay_stage"  # the fixtures `stage` and `kernel`


def test_a_hook_changes_what_one_client_gets(stage: Stage, kernel: Kernel) -> None:
    stage.start(kernel)

    def odd_ones_hidden(batch: Batch) -> Changes:
        changes: dict[int, list[bytes] | None] = {}
        for i in range(len(batch)):
            msg_id = _core.header_fields(batch[i][0])[0]
            if msg_id.isdigit():
                changes[i] = None if int(msg_id) % 2 else [*batch[i][:3], b'{"seen": true}']
        return changes

    stage.prepare["ann"] = odd_ones_hidden
    ann, bob = stage.connect("ann"), stage.connect("bob")
    stage.introduce(ann)
    kernel.publish(*stream(1))
    kernel.publish(*stream(2, 3, 4))
    first, second = ann.next(), ann.next()
    assert [first.header["msg_id"], second.header["msg_id"]] == ["2", "4"]
    assert first.content == second.content == {"seen": True}
    assert bob.ids(4) == ["1", "2", "3", "4"]
    kernel.reply("ann", stream(6)[0])
    assert ann.next().content == {"seen": True}, "replies pass the hook too"
    stage.run(lambda: stage.session("ann").say(local_batch("iopub", stream(7)[0])))
    assert ann.ids(1) == ["7"], "what the server says does not"


def test_a_hook_is_asked_only_about_what_is_unusual(stage: Stage, kernel: Kernel) -> None:
    """Errors, and messages of another protocol; unless it wants to see all. Its clients pay for no others."""
    stage.start(kernel)
    asked: list[str] = []

    def note(batch: Batch) -> Changes:
        asked.extend(_core.header_fields(batch[i][0])[0] for i in range(len(batch)))
        return {}

    stage.prepare["ann"] = note
    client = stage.connect("ann")
    stage.session("ann").downlink.prepare_all = False
    unversioned = [json.dumps({"msg_id": "foreign", "msg_type": "stream"}).encode(), *stream(0)[0][1:]]
    for parts in (*stream(1), message("error", "error"), *stream(2), unversioned, *stream(3)):
        kernel.publish(parts)
        client.next()
    assert asked == ["error", "foreign"]


def test_a_hook_that_fails_is_one_clients_problem(
    stage: Stage, kernel: Kernel, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)  # a record would keep the traceback, and that the batch
    stage.start(kernel)

    def fail(batch: Batch) -> Changes:
        raise RuntimeError("of the hook")

    stage.prepare["ann"] = fail
    stage.connect("ann")
    bob = stage.connect("bob")
    kernel.publish(*stream(1, 2))
    assert bob.ids(2) == ["1", "2"]
    stage.take_problems()
    stage.take_logs()


def test_a_message_that_a_protocol_cannot_say_is_one_clients_problem(
    stage: Stage, kernel: Kernel, caplog: pytest.LogCaptureFixture
) -> None:
    """The default protocol has four octets for an offset."""
    caplog.set_level(logging.CRITICAL)
    stage.start(kernel)
    seen: list[int] = []

    def hide(batch: Batch) -> Changes:
        seen.append(batch.nbytes)
        return dict.fromkeys(range(len(batch)))

    stage.prepare["bob"] = hide
    ann, _ = stage.connect("ann"), stage.connect("bob")
    huge = message("comm_msg", "huge", {}, *[bytes(1 << 26)] * 65)
    stage.run(lambda: stage.relay._on_iopub(local_batch("iopub", huge)))
    assert ann.close_frame()[0] == 1011
    (size,) = seen
    assert size > 1 << 32
    stage.take_problems()
    stage.take_logs()


def test_the_hook_holds_while_its_client_is_away(stage: Stage, kernel: Kernel) -> None:
    """It hides what this client must not see: also what comes between two of its sockets."""
    stage.start(kernel)
    stage.prepare["ann"] = lambda batch: {i: [*batch[i][:3], b'{"hidden": true}'] for i in range(len(batch))}
    leave(stage, stage.connect("ann"), "reset")
    kernel.publish(*stream(1))
    until(lambda: stage.session("ann").downlink.cursor.kept == 1, "the message waits")
    assert stage.connect("ann").next().content == {"hidden": True}
