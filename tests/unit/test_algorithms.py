"""The table of types, purposes, sizes and algorithms, against a second copy written out by hand."""

import itertools
from typing import Final

import pytest

from kms.domain.algorithms import Hash, KeyType, Purpose, Scheme, key_spec, signature_algorithm
from kms.domain.errors import KmsError, Reason

_PAIRS: Final = {
    ("secp256k1", "signing"),
    ("secp256r1", "signing"),
    ("ed25519", "signing"),
    ("rsa", "signing"),
    ("rsa", "encryption"),
    ("aes", "encryption"),
}
_ALGORITHMS: Final = {
    *itertools.product(("secp256k1", "secp256r1"), ("ecdsa",), ("sha-256", "sha3-256", "keccak-256")),
    *itertools.product(("rsa",), ("rsa-pkcs1", "rsa-pss"), ("sha-256", "sha-384", "sha-512")),
}


@pytest.mark.parametrize(("key_type", "purpose"), list(itertools.product(KeyType, Purpose)))
def test_only_the_pairs_of_the_table_can_be_made(key_type: KeyType, purpose: Purpose) -> None:
    if (key_type.value, purpose.value) in _PAIRS:
        assert key_spec(key_type, purpose, None).purpose is purpose
        return
    with pytest.raises(KmsError) as refusal:
        key_spec(key_type, purpose, None)
    assert refusal.value.reason is Reason.WRONG_PURPOSE


@pytest.mark.parametrize(
    ("key_type", "purpose", "sizes"),
    [
        (KeyType.SECP256K1, Purpose.SIGNING, {256}),
        (KeyType.SECP256R1, Purpose.SIGNING, {256}),
        (KeyType.ED25519, Purpose.SIGNING, {256}),
        (KeyType.RSA, Purpose.ENCRYPTION, {2048, 3072, 4096}),
        (KeyType.AES, Purpose.ENCRYPTION, {128, 192, 256}),
    ],
)
def test_a_size_outside_the_table_is_malformed(key_type: KeyType, purpose: Purpose, sizes: set[int]) -> None:
    for size in (0, 1, 128, 192, 255, 256, 1024, 2048, 3072, 4096, 8192, 2**32 - 1):
        if size in sizes:
            assert key_spec(key_type, purpose, size).strength_bits == size
        else:
            with pytest.raises(KmsError, match="size_bits"):
                key_spec(key_type, purpose, size)


@pytest.mark.parametrize(("key_type", "scheme", "hash_"), list(itertools.product(KeyType, Scheme, Hash)))
def test_only_the_algorithms_of_the_table_sign(key_type: KeyType, scheme: Scheme, hash_: Hash) -> None:
    if (key_type.value, scheme.value, hash_.value) in _ALGORITHMS:
        assert signature_algorithm(key_type, scheme, hash_).hash is hash_
        return
    with pytest.raises(KmsError) as refusal:
        signature_algorithm(key_type, scheme, hash_)
    assert refusal.value.reason in (Reason.WRONG_PURPOSE, Reason.MALFORMED)


def test_what_is_left_open_gets_the_documented_default() -> None:
    assert signature_algorithm(KeyType.SECP256K1, None, None).hash is Hash.SHA_256
    assert signature_algorithm(KeyType.RSA, None, None).scheme is Scheme.RSA_PSS
    assert signature_algorithm(KeyType.ED25519, None, None).hash is None
    assert key_spec(KeyType.RSA, Purpose.SIGNING, None).strength_bits == 2048
    assert key_spec(KeyType.AES, Purpose.ENCRYPTION, None).strength_bits == 256
