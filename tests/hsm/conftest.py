"""Fixtures of the HSM's own tests: a token whose KEK and sealing key the test knows, and calls that do not return."""

import threading
from collections.abc import Callable, Iterator

import pytest

from kms.dev.softhsm import SoftToken
from kms.domain.algorithms import SignatureAlgorithm
from kms.hsm import operations
from kms.hsm.envelopes import Handle
from kms.hsm.token_hsm import TokenHsm
from tests.fixtures.softhsm import OpenHsm, settings_of
from tests.hsm.tokens import KnownKey, prepare


@pytest.fixture
def enter_blank(blank_token: SoftToken, soft_token: SoftToken, enter_token: Callable[[SoftToken], None]) -> Callable[[], None]:
    """Makes `blank_token` the one that is found, whatever other fixtures did."""
    return lambda: enter_token(blank_token)


@pytest.fixture
def keks(blank_token: SoftToken, enter_blank: Callable[[], None]) -> tuple[KnownKey, KnownKey]:
    """The KEK and the sealing key that `blank_token` has been given."""
    enter_blank()
    known = KnownKey(), KnownKey()
    prepare(blank_token, *known)
    return known


@pytest.fixture
async def known(
    blank_token: SoftToken, keks: tuple[KnownKey, KnownKey], opened: OpenHsm, enter_blank: Callable[[], None]
) -> TokenHsm:
    """The port over `blank_token` with the keys in `keks`; short operations run inline."""
    enter_blank()
    return await opened(pin=settings_of(blank_token).pin, inline_p99_seconds=1.0)


class Dam:
    """Holds every signature of a digest of zeros until it is opened."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.held = 0
        self._sign = operations.sign

    def sign(self, handle: Handle, algorithm: SignatureAlgorithm, data: bytes) -> bytes:
        if data == bytes(32):
            self.held += 1
            self.opened.wait(30)
        return self._sign(handle, algorithm, data)


@pytest.fixture
def dam(monkeypatch: pytest.MonkeyPatch) -> Iterator[Dam]:
    """Closed until the test opens it, at the latest when it ends."""
    dam = Dam()
    monkeypatch.setattr(operations, "sign", dam.sign)
    yield dam
    dam.opened.set()
