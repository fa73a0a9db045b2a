"""An answer that is stored for a repeat of its request: `version(1) ‖ MAC(32) ‖ content`, in `request_records.result`.

The MAC is HMAC-SHA-256 under the token's MAC key over everything that the answer belongs to: the user, the RPC, the caller's own
request id, the HMAC of the request, and the content. So the database's owner can plant no answer, and can move none to another
request.
"""

from typing import Final

from kms.domain.envelope import lengths_prefixed
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import UserId

FORMAT_VERSION: Final = 1
_MAC_BYTES: Final = 32


def answer_bytes(user_id: UserId, rpc: str, request_id: str, body_mac: bytes, content: bytes) -> bytes:
    """Return the bytes that the MAC of an answer covers."""
    parts = (user_id.bytes, rpc.encode(), request_id.encode(), body_mac, content)
    return lengths_prefixed(b"answer", bytes((FORMAT_VERSION,)), *parts)


def stored_answer(mac: bytes, content: bytes) -> bytes:
    """Return *content* as it is stored."""
    return bytes((FORMAT_VERSION,)) + mac + content


def parse_answer(stored: bytes) -> tuple[bytes, bytes]:
    """Return the MAC and the content of a stored answer, or raise RECORD_INVALID for what is none."""
    if len(stored) <= _MAC_BYTES or stored[0] != FORMAT_VERSION:
        raise answer_invalid()
    return stored[1 : 1 + _MAC_BYTES], stored[1 + _MAC_BYTES :]


def answer_invalid() -> KmsError:
    """Return the error for a stored answer that the service did not make."""
    return KmsError(
        Reason.RECORD_INVALID,
        "the answer stored under this request_id is not as the service left it: use another request_id, and tell the operator",
        field="request_id",
    )
