"""Echo servers to be judged, each a process of its own: ``python tests/conformance/echo.py NAME CERTIFICATE``.

Each listens on four ports, which it prints: plain, TLS, with permessage-deflate, and for messages of at most `LITTLE`
octets. The echoes are those of the libraries' own documentation.
"""

import asyncio
import json
import ssl
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

for folder in Path(__file__).resolve().parents[:3]:
    sys.path.insert(0, str(folder))

from cases import LITTLE, MAX_MESSAGE_SIZE  # noqa: E402

Serve = Callable[[int, bool, ssl.SSLContext | None], Awaitable[int]]


def serve_tornado(base: Any = None, *, coroutines: bool = False) -> Serve:
    """Tornado's handler, or another with the same methods."""
    import tornado.httpserver
    import tornado.netutil
    import tornado.web
    import tornado.websocket

    class Echo(base or tornado.websocket.WebSocketHandler):
        def initialize(self, deflate: bool) -> None:
            self.deflate = deflate

        def get_compression_options(self) -> dict[str, Any] | None:
            return {} if self.deflate else None

        def open(self) -> None:
            self.set_nodelay(True)

        def on_message(self, message: str | bytes) -> Any:
            written = self.write_message(message, binary=isinstance(message, bytes))
            return written if coroutines else None

    class Live(tornado.web.RequestHandler):
        def get(self) -> None:
            from fastwire import _core

            self.write(_core.live())

    async def serve(max_size: int, deflate: bool, tls: ssl.SSLContext | None) -> int:
        routes = [("/", Echo, {"deflate": deflate}), ("/live", Live)]
        application = tornado.web.Application(routes, websocket_max_message_size=max_size)
        sockets = tornado.netutil.bind_sockets(0, "127.0.0.1")
        tornado.httpserver.HTTPServer(application, ssl_options=tls).add_sockets(sockets)
        return sockets[0].getsockname()[1]

    return serve


def serve_fastwire() -> Serve:
    import fastwire.conversation
    import fastwire.websocket

    fastwire.conversation.CLOSE_TIMEOUT = 60.0  # a judge on a busy machine may be slow
    return serve_tornado(fastwire.websocket.WebSocketHandler)


def serve_connection_for() -> Serve:
    """fastwire's data path given to a handler of Tornado, whose callbacks are coroutines."""
    import tornado.websocket

    import fastwire.conversation
    import fastwire.websocket
    from fastwire.websocket import Connection, connection_for

    fastwire.conversation.CLOSE_TIMEOUT = 60.0

    class Handler(tornado.websocket.WebSocketHandler):
        def get_websocket_protocol(self) -> Connection | None:
            return connection_for(self)

        async def write_message(self, message: str | bytes, binary: bool = False) -> None:
            await super().write_message(message, binary)

    return serve_tornado(Handler, coroutines=True)


def serve_websockets() -> Serve:
    from websockets.asyncio.server import Server, ServerConnection
    from websockets.asyncio.server import serve as start

    kept: list[Server] = []

    async def echo(connection: ServerConnection) -> None:
        async for message in connection:
            await connection.send(message)

    async def serve(max_size: int, deflate: bool, tls: ssl.SSLContext | None) -> int:
        compression = "deflate" if deflate else None
        server = await start(echo, "127.0.0.1", 0, compression=compression, max_size=max_size, ssl=tls)
        kept.append(server)
        return server.sockets[0].getsockname()[1]

    return serve


def serve_picows() -> Serve:
    """It hands out frames: the echo joins them, as its documentation shows."""
    from picows import WSFrame, WSListener, WSMsgType, WSTransport, ws_create_server

    kept: list[Any] = []

    class Echo(WSListener):
        def __init__(self) -> None:
            self.kind, self.parts = WSMsgType.CONTINUATION, []

        def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
            if frame.msg_type == WSMsgType.CLOSE:
                transport.send_close(frame.get_close_code(), frame.get_close_message())
                transport.disconnect()
            elif frame.msg_type in (WSMsgType.TEXT, WSMsgType.BINARY, WSMsgType.CONTINUATION):
                if frame.msg_type != WSMsgType.CONTINUATION:
                    self.kind = frame.msg_type
                self.parts.append(frame.get_payload_as_bytes())
                if frame.fin:
                    transport.send(self.kind, b"".join(self.parts))
                    self.parts.clear()

    async def serve(max_size: int, deflate: bool, tls: ssl.SSLContext | None) -> int:
        options = {"max_frame_size": max_size, "enable_auto_pong": True}
        server = await ws_create_server(lambda _: Echo(), "127.0.0.1", 0, ssl=tls, **options)
        kept.append(server)
        return server.sockets[0].getsockname()[1]

    return serve


SERVERS: dict[str, Callable[[], Serve]] = {
    "fastwire": serve_fastwire,
    "connection_for": serve_connection_for,
    "websockets": serve_websockets,
    "tornado": serve_tornado,
    "picows": serve_picows,
}


async def main(name: str, certificate: str) -> None:
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate)
    serve = SERVERS[name]()
    ports = {
        "plain": await serve(MAX_MESSAGE_SIZE, False, None),
        "tls": await serve(MAX_MESSAGE_SIZE, False, tls),
        "deflate": await serve(MAX_MESSAGE_SIZE, True, None),
        "little": await serve(LITTLE, False, None),
    }
    print(json.dumps(ports), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
