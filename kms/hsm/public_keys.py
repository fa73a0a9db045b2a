"""Public halves: read from the token as SPKI PEM (RFC 5280), and the proof that a loaded private key fits its own."""

import hashlib
from typing import Any, Final, cast

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, encode_dss_signature
from pkcs11 import Attribute

from kms.domain.algorithms import Hash, KeySpec, KeyType, Purpose
from kms.hsm import mechanisms
from kms.hsm.errors import ALTERED_INPUT, MisfitError

PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey

_CURVE: Final = {KeyType.SECP256K1: ec.SECP256K1(), KeyType.SECP256R1: ec.SECP256R1()}
_PYCA_HASH: Final[dict[Hash, hashes.HashAlgorithm]] = {
    Hash.SHA_1: hashes.SHA1(),  # noqa: S303  # MGF1 and OAEP do not rest on collision resistance
    Hash.SHA_256: hashes.SHA256(),
    Hash.SHA_384: hashes.SHA384(),
    Hash.SHA_512: hashes.SHA512(),
}
_CHALLENGE: Final = hashlib.sha256(b"neo-kms: does the private half fit the public one?").digest()
_ZERO_BLOCK: Final = bytes(16)
_OCTET_STRING: Final = 0x04


def read_public_key(spec: KeySpec, public: Any) -> str:  # noqa: ANN401  # the binding makes a class for each object
    """Return the SPKI PEM of the token's public-key object, its attributes one by one checked by the parser."""
    return to_pem(_public_key(spec, public))


def to_pem(key: PublicKey) -> str:
    """Return the SPKI PEM of *key*."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()


def check_value(handle: Any) -> str:  # noqa: ANN401  # as above
    """Return the check value of an AES key: `kcv:` and the first three bytes of AES-CMAC of a zero block, in hex."""
    mac: bytes = handle.sign(_ZERO_BLOCK, mechanism=mechanisms.CMAC)
    return f"kcv:{mac[:3].hex()}"


def check_fits(handle: Any, spec: KeySpec, public_key: str, oaep_hashes: frozenset[Hash]) -> None:  # noqa: ANN401  # as above
    """Raise `MisfitError` unless the loaded key is the one whose public half (or check value) the record has.

    A signing key signs a fixed challenge, an RSA decryption key opens an RSA-OAEP ciphertext made here.
    """
    if spec.is_symmetric:
        fits = check_value(handle) == public_key
    elif spec.purpose is Purpose.SIGNING:
        fits = _signs_for(handle, spec, _load(public_key))
    else:
        fits = _decrypts_for(handle, cast("rsa.RSAPublicKey", _load(public_key)), oaep_hashes)
    if not fits:
        raise MisfitError


def oaep_padding(hash_: Hash) -> padding.OAEP:
    """Return RSA-OAEP with MGF1 over the same hash and an empty label (RFC 8017 section 7.1)."""
    algorithm = _PYCA_HASH[hash_]
    return padding.OAEP(padding.MGF1(algorithm), algorithm, None)


def raw_point(der_or_raw: bytes, size: int) -> bytes:
    """Return the point of CKA_EC_POINT: a DER OCTET STRING by the standard, bare in some tokens."""
    head = bytes((_OCTET_STRING, size))
    return der_or_raw[2:] if len(der_or_raw) == size + 2 and der_or_raw.startswith(head) else der_or_raw


def _public_key(spec: KeySpec, public: Any) -> PublicKey:  # noqa: ANN401  # as above
    if spec.key_type is KeyType.RSA:
        modulus, exponent = public[Attribute.MODULUS], public[Attribute.PUBLIC_EXPONENT]
        return rsa.RSAPublicNumbers(int.from_bytes(exponent, "big"), int.from_bytes(modulus, "big")).public_key()
    point = public[Attribute.EC_POINT]
    if spec.key_type is KeyType.ED25519:
        return ed25519.Ed25519PublicKey.from_public_bytes(raw_point(point, 32))
    return ec.EllipticCurvePublicKey.from_encoded_point(_CURVE[spec.key_type], raw_point(point, 65))


def _load(public_key: str) -> PublicKey:
    try:
        return cast("PublicKey", serialization.load_pem_public_key(public_key.encode()))
    except ValueError:
        raise MisfitError from None


def _signs_for(handle: Any, spec: KeySpec, public: PublicKey) -> bool:  # noqa: ANN401  # as above
    try:
        match public:
            case ec.EllipticCurvePublicKey() if spec.key_type in _CURVE:
                raw = handle.sign(_CHALLENGE, mechanism=mechanisms.ECDSA)
                half = len(raw) // 2
                signature = encode_dss_signature(int.from_bytes(raw[:half], "big"), int.from_bytes(raw[half:], "big"))
                public.verify(signature, _CHALLENGE, ec.ECDSA(Prehashed(hashes.SHA256())))
            case ed25519.Ed25519PublicKey() if spec.key_type is KeyType.ED25519:
                public.verify(handle.sign(_CHALLENGE, mechanism=mechanisms.EDDSA), _CHALLENGE)
            case rsa.RSAPublicKey() if spec.key_type is KeyType.RSA:
                signature = handle.sign(mechanisms.DIGEST_INFO[Hash.SHA_256] + _CHALLENGE, mechanism=mechanisms.PKCS1)
                public.verify(signature, _CHALLENGE, padding.PKCS1v15(), Prehashed(hashes.SHA256()))
            case _:
                return False
    except InvalidSignature:
        return False
    return True


def _decrypts_for(handle: Any, public: rsa.RSAPublicKey, oaep_hashes: frozenset[Hash]) -> bool:  # noqa: ANN401  # as above
    if not isinstance(public, rsa.RSAPublicKey) or not oaep_hashes:
        return False
    hash_ = min(oaep_hashes)
    ciphertext = public.encrypt(_CHALLENGE, oaep_padding(hash_))
    try:
        return decrypt_oaep(handle, hash_, ciphertext) == _CHALLENGE
    except ALTERED_INPUT:
        return False  # under another key the padding is random


def decrypt_oaep(handle: Any, hash_: Hash, ciphertext: bytes) -> bytes:  # noqa: ANN401  # as above
    """Return the RSA-OAEP plaintext of *ciphertext*, or raise the binding's error."""
    parameters = (*mechanisms.RSA_HASH[hash_], None)
    return bytes(handle.decrypt(ciphertext, mechanism=mechanisms.OAEP, mechanism_param=parameters))
