"""Stored answers: each byte of what an answer belongs to changes its proof."""

from dataclasses import dataclass
from hashlib import sha256
from hmac import digest
from uuid import UUID

import pytest

from kms.domain.answers import RequestSecret, request_bytes
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import UserId

USER = UserId(UUID(int=1))
ID = bytes(range(16))
ANOTHER = UserId(UUID(int=2))


def secret_of(user: UserId = USER, rpc: str = "Sign", request_id: str = "order-1", body: bytes = b"request") -> RequestSecret:
    """Return the secret under a MAC key that stands for the token's."""
    return RequestSecret(digest(bytes(32), request_bytes(user, rpc, request_id, body), sha256))


@dataclass(frozen=True)
class Foreign:
    """A request that differs from ours in one thing."""

    differs: str
    secret: RequestSecret


FOREIGN = [
    Foreign("user", secret_of(user=ANOTHER)),
    Foreign("rpc", secret_of(rpc="Encrypt")),
    Foreign("request_id", secret_of(request_id="order-2")),
    Foreign("body", secret_of(body=b"another")),
    Foreign("border between rpc and request_id", secret_of(rpc="Signo", request_id="rder-1")),
]


def test_an_answer_comes_back_for_its_own_request() -> None:
    assert secret_of().opened(secret_of().stored(ID, b"signature")) == (ID, b"signature")
    assert secret_of().opened(secret_of().stored(ID, b"")) == (ID, b"")


@pytest.mark.parametrize("foreign", FOREIGN, ids=lambda foreign: foreign.differs)
def test_an_answer_of_another_request_is_refused(foreign: Foreign) -> None:
    with pytest.raises(KmsError) as raised:
        secret_of().opened(foreign.secret.stored(ID, b"signature"))
    assert raised.value.reason is Reason.RECORD_INVALID
    assert foreign.secret.body_mac != secret_of().body_mac


@pytest.mark.parametrize("place", range(1 + 32 + 16 + 9))
def test_a_changed_byte_of_a_stored_answer_is_refused(place: int) -> None:
    stored = bytearray(secret_of().stored(ID, b"signature"))
    stored[place] ^= 1
    with pytest.raises(KmsError) as raised:
        secret_of().opened(bytes(stored))
    assert raised.value.reason is Reason.RECORD_INVALID


@pytest.mark.parametrize(
    "stored", [b"", b"\x03", bytes(33), secret_of().stored(ID, b"")[:-1]], ids=("empty", "short", "zero", "cut")
)
def test_what_is_no_stored_answer_is_refused(stored: bytes) -> None:
    with pytest.raises(KmsError):
        secret_of().opened(stored)


def test_the_mac_of_a_request_proves_no_answer() -> None:
    """`body_mac` is in the database: it must not serve as the MAC of an answer."""
    with pytest.raises(KmsError):
        secret_of().opened(b"\x03" + secret_of().body_mac + b"")
    with pytest.raises(KmsError):
        secret_of().opened(b"\x03" + secret_of().body_mac + b"request")
