"""Public-key operations against signatures and ciphertexts made by other implementations."""

import hashlib

import pytest
from Crypto.Cipher import PKCS1_OAEP
from Crypto.Hash import SHA1, SHA256, SHA384, SHA512
from Crypto.PublicKey import RSA
from Crypto.Signature import pkcs1_15, pss
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, utils
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from eth_keys.datatypes import Signature as EthSignature

from kms.domain.algorithms import Hash, KeyType, Scheme, SignatureAlgorithm
from kms.domain.ecdsa import from_raw
from kms.pki.public_keys import PublicKeyOperations

PUBLIC = PublicKeyOperations()
ECDSA = SignatureAlgorithm(Scheme.ECDSA, Hash.SHA_256)
MESSAGE = b"a message"
DIGEST = hashlib.sha256(MESSAGE).digest()
PEM = (Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
OTHER_NAMES = {Hash.SHA_1: SHA1, Hash.SHA_256: SHA256, Hash.SHA_384: SHA384, Hash.SHA_512: SHA512}


@pytest.fixture(scope="module")
def rsa_key() -> RSA.RsaKey:
    return RSA.generate(2048)


def secp256k1(number: int) -> tuple[ec.EllipticCurvePrivateKey, str]:
    key = ec.derive_private_key(number, ec.SECP256K1())
    return key, key.public_key().public_bytes(*PEM).decode()


def spoilt(data: bytes) -> bytes:
    return data[:-1] + bytes((data[-1] ^ 1,))


@pytest.mark.parametrize("curve", [ec.SECP256K1(), ec.SECP256R1()])
def test_an_ecdsa_signature_holds_for_its_digest_only(curve: ec.EllipticCurve) -> None:
    key = ec.generate_private_key(curve)
    pem = key.public_key().public_bytes(*PEM).decode()
    signature = key.sign(DIGEST, ec.ECDSA(utils.Prehashed(hashes.SHA256())))
    assert PUBLIC.is_valid(pem, ECDSA, DIGEST, signature)
    assert not PUBLIC.is_valid(pem, ECDSA, spoilt(DIGEST), signature)
    assert not PUBLIC.is_valid(pem, ECDSA, DIGEST, spoilt(signature))


def test_an_ed25519_signature_holds_for_its_message_only() -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    pem = key.public_key().public_bytes(*PEM).decode()
    algorithm, signature = SignatureAlgorithm(Scheme.ED25519, None), key.sign(MESSAGE)
    assert PUBLIC.is_valid(pem, algorithm, MESSAGE, signature)
    assert not PUBLIC.is_valid(pem, algorithm, spoilt(MESSAGE), signature)
    assert not PUBLIC.is_valid(pem, algorithm, MESSAGE, signature[:-1])


@pytest.mark.parametrize("hash_", [Hash.SHA_256, Hash.SHA_384, Hash.SHA_512])
def test_rsa_signatures_of_pycryptodome_hold_under_their_own_scheme_and_hash_only(rsa_key: RSA.RsaKey, hash_: Hash) -> None:
    pem = rsa_key.public_key().export_key().decode()
    hashed = OTHER_NAMES[hash_].new(MESSAGE)
    made = {Scheme.RSA_PKCS1: pkcs1_15.new(rsa_key).sign(hashed), Scheme.RSA_PSS: pss.new(rsa_key).sign(hashed)}
    for scheme, signature in made.items():
        algorithm = SignatureAlgorithm(scheme, hash_)
        assert PUBLIC.is_valid(pem, algorithm, hashed.digest(), signature)
        assert not PUBLIC.is_valid(pem, algorithm, spoilt(hashed.digest()), signature)
        assert not PUBLIC.is_valid(pem, algorithm, hashed.digest(), spoilt(signature))
        other = Scheme.RSA_PSS if scheme is Scheme.RSA_PKCS1 else Scheme.RSA_PKCS1
        assert not PUBLIC.is_valid(pem, SignatureAlgorithm(other, hash_), hashed.digest(), signature)


@pytest.mark.parametrize("salt_bytes", [0, 20, 31, 33])
def test_a_pss_salt_of_another_length_than_the_digest_is_not_valid(rsa_key: RSA.RsaKey, salt_bytes: int) -> None:
    signature = pss.new(rsa_key, salt_bytes=salt_bytes).sign(SHA256.new(MESSAGE))
    pem = rsa_key.public_key().export_key().decode()
    assert not PUBLIC.is_valid(pem, SignatureAlgorithm(Scheme.RSA_PSS, Hash.SHA_256), DIGEST, signature)


@pytest.mark.parametrize("hash_", OTHER_NAMES)
def test_pycryptodome_opens_what_oaep_encrypted(rsa_key: RSA.RsaKey, hash_: Hash) -> None:
    ciphertext = PUBLIC.encrypt_rsa(rsa_key.public_key().export_key().decode(), hash_, MESSAGE)
    assert PKCS1_OAEP.new(rsa_key, hashAlgo=OTHER_NAMES[hash_]).decrypt(ciphertext) == MESSAGE


def test_a_recovery_id_recovers_the_key_for_eth_keys_whichever_s_was_signed() -> None:
    seen = set()
    for number in range(1, 17):
        key, pem = secp256k1(number)
        r, s = utils.decode_dss_signature(key.sign(DIGEST, ec.ECDSA(utils.Prehashed(hashes.SHA256()))))
        raw = r.to_bytes(32, "big") + s.to_bytes(32, "big")
        low = from_raw(KeyType.SECP256K1, raw).low_s().raw()
        v = PUBLIC.recovery_id(pem, DIGEST, low)
        seen.add(v)
        point = key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)[1:]
        assert EthSignature(low + bytes((v,))).recover_public_key_from_msg_hash(DIGEST).to_bytes() == point
        assert PUBLIC.recovery_id(pem, DIGEST, raw) == (v if low == raw else v ^ 1)
    assert seen == {0, 1}


def test_a_signature_of_another_key_has_no_recovery_id() -> None:
    key, _ = secp256k1(5)
    r, s = utils.decode_dss_signature(key.sign(DIGEST, ec.ECDSA(utils.Prehashed(hashes.SHA256()))))
    with pytest.raises(ValueError, match="does not recover"):
        PUBLIC.recovery_id(secp256k1(6)[1], DIGEST, r.to_bytes(32, "big") + s.to_bytes(32, "big"))


@pytest.mark.parametrize(
    ("hash_", "of_nothing"),
    [
        (Hash.SHA_256, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
        (Hash.SHA3_256, "a7ffc6f8bf1ed76651c14756a061d662f580ff4de43b49fa82d80a4b80f8434a"),
        (Hash.KECCAK_256, "c5d2460186f7233c927e7db2dcc703c0e500b653ca82273b7bfad8045d85a470"),
        (Hash.SHA_384, "38b060a751ac96384cd9327eb1b1e36a21fdb71114be07434c0cc7bf63f6e1da274edebfe76f65fbd51ad2f14898b95b"),
        (
            Hash.SHA_512,
            "cf83e1357eefb8bdf1542850d66d8007d620e4050b5715dc83f4a921d36ce9ce47d0d13c5d85f2b0ff8318d2877eec2f63b931bd47417a81a538327af927da3e",
        ),
    ],
)
def test_a_digest_of_nothing_is_the_published_one(hash_: Hash, of_nothing: str) -> None:
    assert PUBLIC.digest(hash_, b"").hex() == of_nothing
