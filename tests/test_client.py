"""WebSockets that we open: what servers may answer, and what becomes of it."""

import asyncio
from pathlib import Path

import pytest
from far_end import Far, answer, certificate, run, serving_tls

from fastwire import client
from fastwire.client import dial
from fastwire.errors import NotConnected
from fastwire.flow import Limits

pytestmark = pytest.mark.timeout(90)

ANSWERS = {
    "forbidden": (lambda *_: b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n", 403, "answers 403 Forbidden"),
    "no such kernel": (lambda *_: b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno", 404, "answers 404"),
    "elsewhere": (lambda *_: b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n", 302, "answers 302"),
    "no WebSocket": (lambda *_: b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 502, "cannot be spoken to"),
    "wrong key": (lambda key, _: answer(key + b"x"), 502, "breaks the WebSocket handshake"),
    "no upgrade": (lambda key, _: answer(key).replace(b"Upgrade: websocket\r\n", b""), 502, "breaks the WebSocket"),
    "other protocol": (lambda key, _: answer(key, **{"Sec-WebSocket-Protocol": "x"}), 502, "was not offered"),
    "compression": (
        lambda key, _: answer(key, **{"Sec-WebSocket-Extensions": "permessage-deflate"}),
        502,
        "unsupported extension",
    ),
    "busy": (lambda *_: b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n", 503, "answers 503 Busy"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_a_server_that_refuses(case: str) -> None:
    how, status, words = ANSWERS[case]

    async def test() -> None:
        async with Far(how) as far:
            with pytest.raises(NotConnected, match=words) as caught:
                await dial(far.url, ["v1"], Limits())
            assert caught.value.status == status
            assert caught.value.may_pass == (status == 503)
            end = await far.ends.get()
            assert await end.bytes_to_the_end() == b""
            await end.end()

    run(test)


def test_a_token_that_cannot_be_sent_is_not_told() -> None:
    """It may have been read with the end of its line. What is said of it is logged, and answered to clients."""

    async def test() -> None:
        async with Far() as far:
            with pytest.raises(NotConnected, match="cannot be spoken to") as caught:
                await dial(far.url, [], Limits(), headers={"Authorization": "token a-secret\n"})
            assert "a-secret" not in str(caught.value)

    run(test)


def test_a_server_that_is_not_there() -> None:
    async def test() -> None:
        async with Far() as far:
            pass
        await far.server.wait_closed()
        with pytest.raises(NotConnected, match="cannot be reached") as caught:
            await dial(far.url, [], Limits())
        assert (caught.value.status, caught.value.may_pass) == (503, True)

    run(test)


def test_a_server_that_does_not_answer() -> None:
    async def test() -> None:
        async with Far(lambda *_: b"") as far:
            with pytest.raises(NotConnected, match="does not answer in time") as caught:
                await dial(far.url, [], Limits(), request_timeout=0.2, connect_timeout=0.2)
            assert (caught.value.status, caught.value.may_pass) == (504, True)
            await (await far.ends.get()).end()

    run(test)


def test_who_stops_waiting_for_a_server_leaves_no_connection() -> None:
    async def test() -> None:
        async with Far(lambda *_: b"") as far:
            dialling = asyncio.create_task(dial(far.url, [], Limits(), connect_timeout=3600, request_timeout=3600))
            end = await far.ends.get()
            dialling.cancel()
            assert await end.bytes_to_the_end() == b""
            assert dialling.cancelled()
            await end.end()

    run(test)


def test_a_server_that_hangs_up() -> None:
    async def test() -> None:
        async with Far(lambda *_: b"") as far:
            dialling = asyncio.create_task(dial(far.url, [], Limits()))
            await (await far.ends.get()).end()
            with pytest.raises(NotConnected, match="closes the connection before"):
                await dialling

    run(test)


def test_a_connection_that_nobody_wants_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "UNUSED", 0.05)

    async def test() -> None:
        async with Far() as far:
            await dial(far.url, [], Limits())
            end = await far.ends.get()
            assert await end.closed() is None
            await end.end()

    run(test)


def test_a_server_that_cannot_be_trusted(tmp_path: Path) -> None:
    async def test() -> None:
        async with Far(tls=serving_tls(*certificate(tmp_path))) as far:
            with pytest.raises(NotConnected, match="cannot be trusted") as caught:
                await dial(far.url, [], Limits())
            assert (caught.value.status, caught.value.may_pass) == (502, False)

    run(test)
