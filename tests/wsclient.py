"""The WebSocket client of `fastwire.testing`, by the name the tests have for it."""

from fastwire.testing import OP_CONTINUATION, PATIENCE, Client, Handshake, close_frame, parsed_close

__all__ = ["OP_CONTINUATION", "PATIENCE", "Client", "Handshake", "close_frame", "parsed_close"]
