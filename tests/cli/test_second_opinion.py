"""The demonstration's checkers take good signatures and refuse others, with the openssl program and without it."""

from collections.abc import Iterator

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes

from kms.dev import second_opinion
from kms.domain.algorithms import Scheme

SHA256 = hashes.SHA256()


@pytest.fixture(params=["openssl", "pyca/cryptography"])
def checker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Check with one of the two."""
    second_opinion._program.cache_clear()
    if request.param != "openssl":
        monkeypatch.setenv("PATH", "/nonexistent")
    assert second_opinion.checker() == request.param
    yield
    second_opinion._program.cache_clear()


@pytest.mark.usefixtures("checker")
def test_signatures_are_told_apart_from_those_of_other_messages() -> None:
    ecdsa, eddsa, rsa_key = ec.generate_private_key(ec.SECP256K1()), ed25519.Ed25519PrivateKey.generate(), _rsa_key()
    pss = padding.PSS(padding.MGF1(SHA256), 32)
    signatures = (
        (ecdsa.public_key(), Scheme.ECDSA, ecdsa.sign(b"m", ec.ECDSA(SHA256))),
        (eddsa.public_key(), Scheme.ED25519, eddsa.sign(b"m")),
        (rsa_key.public_key(), Scheme.RSA_PSS, rsa_key.sign(b"m", pss, SHA256)),
        (rsa_key.public_key(), Scheme.RSA_PKCS1, rsa_key.sign(b"m", padding.PKCS1v15(), SHA256)),
    )
    for key, scheme, signature in signatures:
        assert second_opinion.accepts(_pem(key), scheme, b"m", signature), scheme
        assert not second_opinion.accepts(_pem(key), scheme, b"n", signature), scheme


@pytest.mark.usefixtures("checker")
def test_what_is_encrypted_elsewhere_opens_with_the_private_key() -> None:
    key, sha1 = _rsa_key(), hashes.SHA1()  # noqa: S303 - what SoftHSM decrypts with
    ciphertext = second_opinion.encrypt_oaep_sha1(_pem(key.public_key()), b"m")
    assert key.decrypt(ciphertext, padding.OAEP(padding.MGF1(sha1), sha1, None)) == b"m"


def test_a_signature_by_another_key_recovers_to_another_key() -> None:
    pem = _pem(ec.generate_private_key(ec.SECP256K1()).public_key())
    assert not second_opinion.recovers(pem, bytes(range(32)), bytes(64) + b"\0")


def _rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


def _pem(key: PublicKeyTypes) -> str:
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()
