"""A drop-in `jupyter_client` Session that signs with the compiled core, for kernels and clients that import it.

::

    from fastwire.session import Session

Everything is jupyter_client's own but for three things: signatures are made by `Signer`; a digest is remembered only
when its message has verified, so that nobody without the key can fill the history or have a true message refused;
and a full history is thinned out without sorting it, which stops a stock session for as long as thousands of
messages take.
"""

from __future__ import annotations

import hashlib
from hmac import HMAC, compare_digest
from typing import Any

import zmq

try:
    from jupyter_client.session import Session as StockSession
except ImportError as error:
    raise ImportError(
        f"fastwire.session needs jupyter_client ({error.name} is missing): pip install 'jupyter-fastwire[serve]'"
    ) from error

from fastwire._core import Signer

__all__ = ["Session"]

#: What a signature covers: header, parent_header, metadata, content. The signature stands before them.
SIGNED_PARTS = 4


class Verified:
    """A session as `deserialize` is to see it when the signature has been checked."""

    auth = None

    def __init__(self, session: Session) -> None:
        self._session = session
        # Looked up four times and once: a trait costs more than an attribute.
        self.unpack = session.unpack
        self.debug = session.debug

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


class Session(StockSession):
    """jupyter_client's Session, its traits and its errors; configured as ``c.Session``."""

    _signer: Signer | None = None
    _signer_auth: HMAC | None = None

    def _new_auth(self) -> None:
        super()._new_auth()
        self._signer_auth = self.auth
        # For other hashes the core asks hashlib, as the stock session does.
        compiled = self.auth is not None and self.digest_mod is hashlib.sha256
        self._signer = Signer(self.key, history_size=0) if compiled else None

    def clone(self) -> Session:
        """Source: `jupyter_client.session.Session.clone`; it copies ``auth`` last, which has no `Signer`."""
        session = super().clone()
        assert isinstance(session, Session)
        session._new_auth()  # noqa: SLF001 - its own class
        return session

    def sign(self, msg_list: list[Any]) -> bytes:
        """The hex digest over all of ``msg_list``, b"" without a key."""
        # Whoever replaced ``auth`` means it.
        if self._signer is None or self.auth is not self._signer_auth or len(msg_list) != SIGNED_PARTS:
            return super().sign(msg_list)
        return self._signer.sign(msg_list)

    def deserialize(
        self, msg_list: list[bytes] | list[zmq.Message], content: bool = True, copy: bool = True
    ) -> dict[str, Any]:
        """Source: `jupyter_client.session.Session.deserialize`.

        Raises ValueError for a message that is not signed, signed wrongly or known, TypeError for too few parts.
        """
        if self.auth is None:
            return super().deserialize(msg_list, content=content, copy=copy)
        frames: list[Any] = list(msg_list)
        if not copy:
            frames[: SIGNED_PARTS + 1] = [bytes(frame.bytes) for frame in frames[: SIGNED_PARTS + 1]]
        self._check_signature(frames, remember=content)
        verified: Any = Verified(self)
        return StockSession.deserialize(verified, frames, content=content)

    def _check_signature(self, frames: list[bytes], *, remember: bool) -> None:
        """``remember`` is off for a look at a message that will be deserialized again."""
        signature = frames[0]
        if not signature:
            raise ValueError("Unsigned Message")
        if not compare_digest(signature, self.sign(frames[1 : SIGNED_PARTS + 1])):
            raise ValueError(f"Invalid Signature: {signature!r}")
        if signature in self.digest_history:
            raise ValueError(f"Duplicate Signature: {signature!r}")
        if remember:
            self._add_digest(signature)

    def _cull_digest_history(self) -> None:
        """Forgets a tenth, or what is over ``digest_history_size``: whichever come first in the set's own order, which
        nobody can foresee (hashes of bytes are salted)."""
        history = self.digest_history
        for _ in range(min(len(history), max(len(history) // 10, len(history) - self.digest_history_size))):
            history.pop()
