"""The request that opens a WebSocket: what RFC 6455 section 4.2.1 asks of it beyond what Tornado looks at, and which
offer of permessage-deflate (RFC 7692) is taken.

Pure functions of the request's version and header fields.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterator

__all__ = ["agree_on_deflate", "problem"]

# Possessive, so that no field takes longer than its length.
TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]++"
SPACE = r"[ \t]*+"
VALUE = rf'(?:{TOKEN}|"(?:[^"\\]|\\.)*+")'
PARAMETER = rf"{SPACE};{SPACE}({TOKEN})(?:{SPACE}={SPACE}({VALUE}))?"
#: One element of a list, which may be empty (RFC 9110 section 5.6.1), and the comma behind it.
EXTENSION = re.compile(rf"{SPACE}(?:({TOKEN})((?:{PARAMETER})*+))?{SPACE}(?:,|$)")

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
        match = EXTENSION.match(field, position)
        if match is None or match.end() == position:
            raise ValueError("Sec-WebSocket-Extensions is malformed")
        position = match.end()
        if match[1] is not None:
            found.append((match[1], list(parameters_of(match[2]))))
    return found


def parameters_of(text: str) -> Iterator[tuple[str, str | None]]:
    for name, value in re.findall(PARAMETER, text):
        if not value.startswith('"'):
            yield name, value or None
            continue
        plain = re.sub(r"\\(.)", r"\1", value[1:-1])
        if not re.fullmatch(TOKEN, plain):
            raise ValueError("a quoted parameter of Sec-WebSocket-Extensions is not a token")
        yield name, plain


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
