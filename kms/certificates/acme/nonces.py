"""Nonces of replies, each good for one request (RFC 8555 section 6.5).

    made at ‖ process ‖ counter ‖ MAC

A nonce proves by its MAC that this service made it, and when. So handing one out stores nothing, whoever asks; it is stored when
an authentic request has used it up. All workers have the same key, so each takes the nonces of the others.
"""

import hmac
import itertools
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final, Protocol

from kms.certificates.acme.encoding import base64url, from_base64url
from kms.certificates.acme.problems import AcmeError, ProblemType

LASTS: Final = timedelta(hours=1)
PROCESS_BYTES: Final = 8
_CLOCKS_APART: Final = timedelta(minutes=1)
_TEXT: Final = struct.Struct(f">q{PROCESS_BYTES}sQ")
_MAC_BYTES: Final = 16


class SpentNonces(Protocol):
    """The nonces that were used."""

    async def spend(self, nonce: bytes, good_until: datetime) -> bool:
        """Use a nonce up. Return False for one that was used before. Raises STORE_UNAVAILABLE."""
        ...


@dataclass(frozen=True, slots=True)
class Nonces:
    """Makes nonces and takes each once. *process* are random bytes of this process; *clock* is the host's."""

    key: bytes = field(repr=False)
    process: bytes
    clock: Callable[[], datetime]
    spent: SpentNonces
    _numbers: "itertools.count[int]" = field(default_factory=itertools.count, repr=False)

    def new(self) -> str:
        """Return a new nonce."""
        text = _TEXT.pack(int(self.clock().timestamp()), self.process, next(self._numbers))
        return base64url(text + self._mac(text))

    def check(self, nonce: object) -> bytes:
        """Return what `spend` takes of a nonce that is ours and not too old. Raises badNonce."""
        try:
            found = from_base64url(nonce, field="nonce")
        except AcmeError:
            raise bad_nonce() from None
        text, mac = found[: _TEXT.size], found[_TEXT.size :]
        if len(text) != _TEXT.size or not hmac.compare_digest(self._mac(text), mac):
            raise bad_nonce()
        if not -_CLOCKS_APART <= self.clock() - _made_at(text) <= LASTS:
            raise bad_nonce()
        return text

    async def spend(self, text: bytes) -> None:
        """Use up what `check` returned. Raises badNonce for the second time, STORE_UNAVAILABLE."""
        if not await self.spent.spend(text, _made_at(text) + LASTS + 2 * _CLOCKS_APART):
            raise bad_nonce()

    def _mac(self, text: bytes) -> bytes:
        return hmac.digest(self.key, text, "sha256")[:_MAC_BYTES]


def bad_nonce() -> AcmeError:
    """Return the error for a nonce that is not ours, too old or used. Clients take the nonce of the answer and try again."""
    return AcmeError(ProblemType.BAD_NONCE, "nonce: expected one of this server, of the last hour and not used yet")


def _made_at(text: bytes) -> datetime:
    return datetime.fromtimestamp(_TEXT.unpack(text)[0], tz=UTC)
