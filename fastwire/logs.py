"""Tokens stay out of logs: scripts and WebSockets show theirs in the URL, and Tornado logs that of what failed."""

from __future__ import annotations

import logging
import re

__all__ = ["is_meant", "without_tokens", "without_tokens_of_requests"]

#: Also in a URL that is a parameter of another: the page to sign in has one.
TOKEN_IN_URL = re.compile(r"(token(?:=|%(?:25)*3d))[^&\s'\"]+", re.IGNORECASE)

#: jupyter_server's own numbers; what somebody has set for Tornado is in seconds, and seldom 30,000.
MILLISECONDS = re.compile(r"The websocket_ping_timeout \(\d{4,}\) cannot be longer than the websocket_ping_interval")

FORMATTER = logging.Formatter()


def without_tokens(record: logging.LogRecord) -> bool:
    """A filter of `logging` that keeps every record, and strikes tokens out of what it says."""
    try:
        message = record.getMessage()
    except Exception:  # noqa: BLE001 - the handler will tell about a record that cannot be formatted
        return True
    struck_out = strike_out(message)
    if struck_out != message:
        record.msg, record.args = struck_out, ()
    if record.exc_info:
        record.exc_text = strike_out(record.exc_text or FORMATTER.formatException(record.exc_info))
    return True


def without_tokens_of_requests(record: logging.LogRecord) -> bool:
    """`without_tokens`, but for the URL that ``ServerApp`` tells when it starts: its user learns the token from it."""
    return record.module == "serverapp" or without_tokens(record)


def is_meant(record: logging.LogRecord) -> bool:
    """A filter that drops Tornado's warning about the keepalive of Jupyter Server, at the first WebSocket of each
    process: the handlers of that ping by themselves, after milliseconds which Tornado takes for seconds."""
    return MILLISECONDS.match(str(record.msg)) is None  # ``ServerApp`` gives Tornado's loggers its own name


def strike_out(text: str) -> str:
    return TOKEN_IN_URL.sub(r"\1[secret]", text)
