"""Runs code in a kernel for who has no WebSocket.

An `Executor` has sockets of its own to one kernel, as a client's session has, and no place in the log: what the kernel
answers is for who reads that. What is asked waits while the kernel is not heard yet.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from fastwire._core import OP_TEXT, Uplink
from fastwire.channels import Channel
from fastwire.charge import Charge
from fastwire.errors import FastwireError
from fastwire.relay import CLIENT_CHANNELS, STDIN_PATIENCE, KernelRelay

__all__ = ["Executor", "KernelIsFull"]


class KernelIsFull(FastwireError):
    """It takes no more now."""


class Executor:
    """Of one kernel. ``held``: what is asked waits."""

    def __init__(self, relay: KernelRelay) -> None:
        self.session = uuid.uuid4().hex
        self._relay = relay
        self._held = False
        self._uplink: Uplink | None = None
        self._channels: list[Channel] = []
        self._charge = Charge(relay.budgets.total, relay.limits.uplink_limit, self._count)

    def open(self) -> None:
        """Connect, where that is still to be done or the kernel is elsewhere now; what waits goes there."""
        if self._channels and not any(channel.closed for channel in self._channels):
            return
        self._leave()
        relay, waiting = self._relay, self._uplink
        # stdin first: what a kernel asks on a socket that is not there yet, it drops.
        opened = relay.channels(CLIENT_CHANNELS[::-1], self.session.encode(), relay.keep, after=self._send_waiting)
        self._channels = opened[::-1]
        sockets = {channel.name: channel.socket for channel in self._channels}
        try:
            uplink = Uplink(None, relay.signer, sockets, ledger=relay.journal.ledger)
            uplink.held = self._held
            if waiting is not None:
                uplink.adopt(waiting)
        except BaseException:
            for channel in opened:
                channel.close()
            raise
        self._uplink = uplink

    def move(self) -> None:
        """The kernel is elsewhere."""
        if self._channels:
            self._leave()
            self.open()

    def _leave(self) -> None:
        """What it has said is passed on first."""
        for channel in self._channels:
            channel.catch_up()
        if self._channels:
            self._relay.give_replies()
        for channel in self._channels:
            channel.close()

    def hold(self, *, held: bool) -> None:
        self._held = held
        if self._uplink is not None:
            self._uplink.held = held
            self._send_waiting()

    def can_be_asked(self) -> bool:
        """Whether the kernel knows the socket on which it asks."""
        return self._channels[CLIENT_CHANNELS.index("stdin")].can_be_asked()

    async def until_it_can_be_asked(self) -> None:
        """Or that is not waited for any longer."""
        with suppress(TimeoutError):
            async with asyncio.timeout(STDIN_PATIENCE if self._relay.listens_on_stdin else 0):
                while not self.can_be_asked():  # noqa: ASYNC110 - three kinds of sockets, asked alike
                    await asyncio.sleep(0.01)

    def execute(self, content: dict[str, Any], metadata: dict[str, Any], username: str) -> str:
        """Returns the run's id."""
        return self._say("shell", "execute_request", content, metadata, username)

    def answer(self, value: str, username: str) -> None:
        """The question that the kernel has asked, whomever."""
        self._say("stdin", "input_reply", {"value": value}, {}, username)

    def _say(
        self, channel: str, msg_type: str, content: dict[str, Any], metadata: dict[str, Any], username: str
    ) -> str:
        uplink = self._uplink
        assert uplink is not None
        if self._waiting_bytes > self._charge.most:
            raise KernelIsFull("the kernel takes no messages now: too many wait for it")
        msg_id = uuid.uuid4().hex
        header = {
            "msg_id": msg_id,
            "msg_type": msg_type,
            "username": username,
            "session": self.session,
            "date": datetime.now(UTC).isoformat(),
            "version": "5.3",
        }
        message = {"channel": channel, "header": header, "parent_header": {}, "metadata": metadata, "content": content}
        self._settle(uplink.send(OP_TEXT, json.dumps(message | {"buffers": []})))
        self._count()
        return msg_id

    @property
    def waits(self) -> bool:
        """Whether something that was asked does."""
        return self._uplink is not None and self._uplink.waiting_messages > 0

    def _send_waiting(self) -> None:
        if self._uplink is not None and self._uplink.waiting_messages:
            self._settle(self._uplink.retry())
            self._count()

    @property
    def _waiting_bytes(self) -> int:
        return 0 if self._uplink is None else self._uplink.waiting_bytes + self._uplink.sending_bytes

    def _count(self) -> None:
        self._charge.set(self._waiting_bytes)

    def _settle(self, readable: int) -> None:
        """Sending took the edge of these descriptors with it."""
        for index, channel in enumerate(self._channels):
            if readable & (1 << index):
                channel.come_back()

    def close(self) -> None:
        """What waits goes nowhere: its kernel has ended."""
        for channel in self._channels:
            channel.close()
        self._channels.clear()
        self._charge.end()
        uplink, self._uplink = self._uplink, None
        if uplink is not None:
            uplink.retire()
