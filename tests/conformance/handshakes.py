"""Handshakes, right and wrong: the request, and what a strict server says to it (RFC 6455 section 4.2)."""

import base64
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

KEY = "dGhlIHNhbXBsZSBub25jZQ=="  # that of the RFC
GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"

FIELDS = {
    "Host": "127.0.0.1",
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Key": KEY,
    "Sec-WebSocket-Version": "13",
}


@dataclass(frozen=True)
class Knock:
    """``statuses`` are all that a strict server may choose from, ``fields`` patterns of its response, None for a field
    that must not be there."""

    number: str
    title: str
    request: bytes
    statuses: tuple[int, ...]
    fields: tuple[tuple[str, str | None], ...] = ()
    deflate: bool = False

    @property
    def section(self) -> str:
        return self.number.partition(".")[0]

    @property
    def says(self) -> str:
        return self.title

    @property
    def refused(self) -> bool:
        return 101 not in self.statuses

    def __str__(self) -> str:
        return self.number

    def judge(self, head: bytes) -> tuple[str, str]:
        """Grade and remark for a response's head."""
        start, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
        status = int(start.split()[1])
        fields: dict[str, str] = {}
        for line in lines:
            name, _, value = line.partition(":")
            fields[name.lower()] = value.strip()
        if (status == 101) != (not self.refused):
            return "failed", f"answered {status}"
        if status not in self.statuses:
            return "non-strict", f"answered {status}"
        for name, pattern in self.fields:
            value = fields.get(name.lower())
            if not (value is None if pattern is None else re.fullmatch(pattern, value or "")):
                grade = "non-strict" if status != 101 else "failed" if value else "not offered"
                return grade, f"{name}: {value}"
        if status == 101:
            return judge_acceptance(start, fields)
        return "ok", ""


def judge_acceptance(start: str, fields: dict[str, str]) -> tuple[str, str]:
    proof = base64.b64encode(hashlib.sha1(KEY.encode() + GUID).digest()).decode()
    if fields.get("sec-websocket-accept") != proof:
        return "failed", f"Sec-WebSocket-Accept: {fields.get('sec-websocket-accept')}"
    if not start.startswith("HTTP/1.1 101"):
        return "failed", start
    if fields.get("upgrade", "").lower() != "websocket" or fields.get("connection", "").lower() != "upgrade":
        return "failed", "the response does not upgrade"
    if "content-length" in fields or "transfer-encoding" in fields:
        return "non-strict", "the response has a body"
    return "ok", ""


def request(start: str = "GET / HTTP/1.1", **changed: str | list[str] | None) -> bytes:
    """The usual fields, changed (a list for several lines of one name, None for none)."""
    names = {name.lower().replace("-", "_"): name for name in FIELDS}
    fields: dict[str, str | list[str] | None] = {**FIELDS}
    for name, value in changed.items():
        fields[names.get(name, name.replace("_", "-"))] = value
    lines = [
        f"{name}: {value}"
        for name, values in fields.items()
        if values is not None
        for value in ([values] if isinstance(values, str) else values)
    ]
    return "\r\n".join([start, *lines, "", ""]).encode("latin-1")


def accepted() -> Iterator[tuple[str, bytes]]:
    yield "the example of the RFC", request()
    yield "Connection: keep-alive, Upgrade", request(connection="keep-alive, Upgrade")
    yield "two Connection fields", request(connection=["keep-alive", "upgrade"])
    yield "Upgrade and Connection in other cases", request(upgrade="WebSocket", connection="uPGRADE")
    yield (
        "names of fields in other cases",
        request().replace(b"Sec-WebSocket-", b"SEC-WEBSOCKET-").replace(b"Host", b"host"),
    )
    yield "a query", request("GET /?token=1&x=%20 HTTP/1.1")
    yield "fields that mean nothing", request(x_unknown="1", user_agent="judge", cookie="a=b")
    yield "an extension nobody knows", request(sec_websocket_extensions="x-unknown; a=b, y")


def refused() -> Iterator[tuple[str, bytes, tuple[int, ...]]]:
    bad, upgrade = (400,), (400, 426)
    short, long = (base64.b64encode(bytes(count)).decode() for count in (15, 17))
    yield "no Sec-WebSocket-Key", request(sec_websocket_key=None), bad
    yield "an empty key", request(sec_websocket_key=""), bad
    yield "two keys", request(sec_websocket_key=[KEY, KEY]), bad
    yield "two different keys", request(sec_websocket_key=[KEY, "AAAAAAAAAAAAAAAAAAAAAA=="]), bad
    yield "a key that is not base64", request(sec_websocket_key="this is no base64 text!!"), bad
    yield "a key of 15 octets", request(sec_websocket_key=short), bad
    yield "a key of 17 octets", request(sec_websocket_key=long), bad
    yield "a key without its padding", request(sec_websocket_key=KEY.rstrip("=")), bad
    yield "no Host", request(host=None), bad
    yield "two Hosts", request(host=["127.0.0.1", "127.0.0.1"]), bad
    yield "two different Hosts", request(host=["127.0.0.1", "example.com"]), bad
    yield "no Upgrade", request(upgrade=None), upgrade
    yield "Upgrade to something else", request(upgrade="h2c"), upgrade
    yield "no Connection", request(connection=None), upgrade
    yield "Connection: close", request(connection="close"), upgrade
    yield "Connection: keep-alive", request(connection="keep-alive"), upgrade
    yield "HTTP/1.0", request("GET / HTTP/1.0"), (*upgrade, 505)
    yield "HTTP/0.9", request("GET / HTTP/0.9"), (*upgrade, 505)
    yield "POST", request("POST / HTTP/1.1", content_length="0"), (400, 403, 404, 405, 426, 501)
    yield "HEAD", request("HEAD / HTTP/1.1"), (400, 403, 404, 405, 426, 501)
    yield "no request line", b"\x81\x85\x01\x02\x03\x04hello\r\n\r\n", (400, 405, 501, 505)
    yield "a field without a colon", request().replace(b"Host: ", b"Host "), bad
    yield "no Sec-WebSocket-Version", request(sec_websocket_version=None), upgrade
    yield "two versions", request(sec_websocket_version=["13", "13"]), upgrade


def offered() -> Iterator[tuple[str, str | None]]:
    """``Sec-WebSocket-Extensions`` of requests and of their responses (RFC 7692 section 7.1)."""
    deflate = "permessage-deflate"
    for parameters in (
        "unknown",
        "unknown=1",
        "server_no_context_takeover=1",
        "client_no_context_takeover=true",
        "server_max_window_bits",
        "server_max_window_bits=7",
        "server_max_window_bits=16",
        "server_max_window_bits=09",
        "server_max_window_bits=x",
        "client_max_window_bits=0",
        "client_max_window_bits=16",
        "client_max_window_bits=08",
        "server_no_context_takeover; server_no_context_takeover",
        "client_max_window_bits; client_max_window_bits=10",
    ):
        yield f"{deflate}; {parameters}", None
    yield "x-webkit-deflate-frame", None
    yield f"{deflate}; server_max_window_bits=7, {deflate}", rf"{deflate}\b(?!.*client_max_window_bits).*"
    yield f"unknown; a=b, {deflate}", rf"{deflate}\b(?!.*client_max_window_bits).*"
    yield f'{deflate}; server_max_window_bits="10"', rf"{deflate};.*server_max_window_bits=([89]|10)\b.*"
    yield f"{deflate}; server_no_context_takeover", rf"{deflate};.*server_no_context_takeover\b.*"


MALFORMED_OFFERS = ("permessage-deflate;", "permessage-deflate; =1", "permessage deflate", '"permessage-deflate"')


def table() -> list[Knock]:
    knocks = [
        Knock(f"H.1.{i}", title, data, (101,), (("Sec-WebSocket-Extensions", None), ("Sec-WebSocket-Protocol", None)))
        for i, (title, data) in enumerate(accepted(), 1)
    ]
    knocks += [Knock(f"H.2.{i}", title, data, statuses) for i, (title, data, statuses) in enumerate(refused(), 1)]
    supported = (("Sec-WebSocket-Version", "13"), ("Upgrade", "websocket"))
    knocks += [
        Knock(f"H.3.{i}", f"version {version}", request(sec_websocket_version=version), (426,), supported)
        for i, version in enumerate(("0", "7", "8", "12", "14", "255", "thirteen", "013"), 1)
    ]
    knocks += [
        Knock(
            f"H.4.{i}",
            offer.removeprefix("permessage-deflate; "),
            request(sec_websocket_extensions=offer),
            (101,),
            (("Sec-WebSocket-Extensions", agreed),),
            deflate=True,
        )
        for i, (offer, agreed) in enumerate(offered(), 1)
    ]
    return knocks + [
        Knock(f"H.5.{i}", f"malformed: {offer}", request(sec_websocket_extensions=offer), (400,), deflate=True)
        for i, offer in enumerate(MALFORMED_OFFERS, 1)
    ]
