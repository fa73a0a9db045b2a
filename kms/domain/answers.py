"""An answer that is stored for a repeat of its request: `version(1) ‖ MAC(32) ‖ answer id(16) ‖ content`.

It stands in `request_records.result`. Its id tells it from every other answer: see `keys/ledger/counts.py`.

Each request under an id of the caller's own has a secret. It is HMAC-SHA-256 under the token's MAC key, over everything that the
answer belongs to: the user, the RPC, the request id, and the hash of the request. Two MACs are made under that secret: one that
recognizes the request, and one that proves its answer. So the database's owner can plant no answer and can move none to another
request, and `body_mac` tells nothing of what was asked. One call of the token serves both MACs.
"""

import hmac
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Final

from kms.domain.envelope import lengths_prefixed
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import UserId

FORMAT_VERSION: Final = 3
ANSWER_ID_BYTES: Final = 16
_MAC_BYTES: Final = 32


def request_bytes(user_id: UserId, rpc: str, request_id: str, body: bytes) -> bytes:
    """Return the bytes whose MAC under the token's MAC key is the secret of a request."""
    parts = (user_id.bytes, rpc.encode(), request_id.encode(), sha256(body).digest())
    return lengths_prefixed(b"request", bytes((FORMAT_VERSION,)), *parts)


@dataclass(frozen=True, slots=True)
class RequestSecret:
    """The secret of one request: 32 bytes that only the token can make."""

    secret: bytes = field(repr=False)

    @property
    def body_mac(self) -> bytes:
        """What recognizes the request when it is repeated: 32 bytes."""
        return self._mac(b"request")

    def stored(self, answer_id: bytes, content: bytes) -> bytes:
        """Return *content*, the answer of this request, as it is stored. *answer_id* has 16 bytes."""
        return bytes((FORMAT_VERSION,)) + self._mac(b"answer" + answer_id + content) + answer_id + content

    def opened(self, stored: bytes) -> tuple[bytes, bytes]:
        """Return the answer id and the content of *stored*.

        Raises RECORD_INVALID for an answer that `stored` did not make for this request.
        """
        mac, rest = stored[1 : 1 + _MAC_BYTES], stored[1 + _MAC_BYTES :]
        if not stored.startswith(bytes((FORMAT_VERSION,))) or not hmac.compare_digest(self._mac(b"answer" + rest), mac):
            raise KmsError(
                Reason.RECORD_INVALID,
                "the answer stored under this request_id is not as the service left it: use another, and tell the operator",
                field="request_id",
            )
        return rest[:ANSWER_ID_BYTES], rest[ANSWER_ID_BYTES:]

    def _mac(self, text: bytes) -> bytes:
        return hmac.digest(self.secret, text, sha256)
