"""The request that opens a WebSocket: what RFC 6455 section 4.2.1 asks of it beyond what Tornado looks at, and which
offer of permessage-deflate (RFC 7692) is taken.

Pure functions of the request's version and header fields.
"""

from __future__ import annotations

import binascii
import re

__all__ = ["agree_on_deflate", "problem"]

# One step each, from left to right. A possessive group would be all of them in one, but in Python 3.11.2, which is
# Debian's, it takes "a;", too.
TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
VALUE = rf'(?:{TOKEN}|"(?:[^"\\]|\\.)*")'
NAME = re.compile(rf"[ \t]*({TOKEN})?")  # or none: elements of a list may be empty (RFC 9110 section 5.6.1)
PARAMETER = re.compile(rf"[ \t]*;[ \t]*({TOKEN})(?:[ \t]*=[ \t]*({VALUE}))?")
END = re.compile(r"[ \t]*(?:,|\Z)")

WINDOW_BITS = re.compile(r"[89]|1[0-5]")

Parameters = dict[str, str | None]


def problem(version: str, keys: list[str]) -> str | None:
    """Why a request is not answered with 101, or None; its HTTP version and all its ``Sec-WebSocket-Key`` fields."""
    if version == "HTTP/1.0":
        return "a WebSocket needs HTTP/1.1 or higher"
    if len(keys) != 1:
        return "there is not exactly one Sec-WebSocket-Key"
    try:
        nonce = binascii.a2b_base64(keys[0], strict_mode=True)
    except ValueError:
        return "Sec-WebSocket-Key is not base64"
    return None if len(nonce) == 16 else "Sec-WebSocket-Key is not one of 16 bytes"


def agree_on_deflate(offers: str) -> Parameters | None:
    """The parameters of the first offer of permessage-deflate in ``Sec-WebSocket-Extensions`` that can be taken, None
    when there is none. An offer that breaks RFC 7692 section 7.1 is passed over.

    Raises ValueError for a field that is not a list of extensions: section 9.1 of RFC 6455 refuses the handshake.
    """
    for name, parameters in extensions(offers):
        agreed = accepted(parameters) if name == "permessage-deflate" else None
        if agreed is not None:
            return agreed
    return None


def extensions(field: str) -> list[tuple[str, list[tuple[str, str | None]]]]:
    """Names and parameters, in order."""
    found, position = [], 0
    while position < len(field):
        name = NAME.match(field, position)
        assert name is not None
        position, parameters = name.end(), []
        while name[1] and (parameter := PARAMETER.match(field, position)):
            parameters.append((parameter[1], plain(parameter[2])))
            position = parameter.end()
        end = END.match(field, position)
        if end is None:
            raise ValueError("Sec-WebSocket-Extensions is malformed")
        position = end.end()
        if name[1]:
            found.append((name[1], parameters))
    return found


def plain(value: str | None) -> str | None:
    """A parameter's value without the quotes and backslashes that it may have."""
    if value is None or not value.startswith('"'):
        return value
    token = re.sub(r"\\(.)", r"\1", value[1:-1])
    if not re.fullmatch(TOKEN, token):
        raise ValueError("a quoted parameter of Sec-WebSocket-Extensions is not a token")
    return token


def accepted(parameters: list[tuple[str, str | None]]) -> Parameters | None:
    """An offer as the response states it, None for one that has to be declined."""
    agreed = dict(parameters)
    if len(agreed) < len(parameters) or not all(is_valid(name, value) for name, value in parameters):
        return None
    return agreed


def is_valid(name: str, value: str | None) -> bool:
    if name in ("server_no_context_takeover", "client_no_context_takeover"):
        return value is None
    if name == "client_max_window_bits" and value is None:
        return True
    if name not in ("server_max_window_bits", "client_max_window_bits") or value is None:
        return False
    # zlib compresses with a window of 2^9 bytes at least; it decompresses any.
    return WINDOW_BITS.fullmatch(value) is not None and (name, value) != ("server_max_window_bits", "8")
