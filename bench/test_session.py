"""The drop-in Session against the stock one: what it does better, and that the rest costs no more."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest
from jupyter_client.session import Session as StockSession

from bench.conftest import clock
from bench.test_core import KEY, kernel_message
from fastwire.session import Session

if TYPE_CHECKING:
    from bench.conftest import Racer

pytestmark = pytest.mark.benchmark(timer=clock, max_time=0.2, min_rounds=5)

FULL = 65_536


def test_sign(race: Racer) -> None:
    _, parts = kernel_message("status")
    stock, fastwire = StockSession(key=KEY), Session(key=KEY)
    assert race("Session.sign", lambda: stock.sign(parts), lambda: fastwire.sign(parts)) == stock.sign(parts)


def test_deserialize(race: Racer) -> None:
    signature, parts = kernel_message("status")
    stock, fastwire = (kind(key=KEY, digest_history_size=0) for kind in (StockSession, Session))
    wire = [signature, *parts]
    message = race("Session.deserialize status", lambda: stock.deserialize(wire), lambda: fastwire.deserialize(wire))
    assert message == stock.deserialize(wire)


def test_cull_a_full_history(race: Racer) -> None:
    """What the message pays that makes the history too long."""
    digests = [hashlib.sha256(b"%d" % number).hexdigest().encode() for number in range(FULL)]
    stock, fastwire = StockSession(key=KEY), Session(key=KEY)

    def fill() -> None:
        for session in (stock, fastwire):
            session.digest_history = set(digests)

    def cull(session: StockSession) -> int:
        session._add_digest(b"one more")  # noqa: SLF001 - what deserialize calls
        return len(session.digest_history)

    left = race("Session: one digest too many", lambda: cull(stock), lambda: cull(fastwire), setup=fill)
    assert left == FULL + 1 - (FULL + 1) // 10
