"""Mechanisms and their parameters, as constants. Nothing here comes from a request but through these tables."""

from typing import Final

from pkcs11 import MGF, GCMParams, Mechanism
from pkcs11 import KeyType as P11KeyType

from kms.domain.algorithms import Hash, KeyType
from kms.domain.envelope import TAG_BYTES

WRAP: Final = Mechanism.AES_KEY_WRAP_PAD
GCM: Final = Mechanism.AES_GCM
CMAC: Final = Mechanism.AES_CMAC
HMAC: Final = Mechanism.SHA256_HMAC
ECDSA: Final = Mechanism.ECDSA
EDDSA: Final = Mechanism.EDDSA
PKCS1: Final = Mechanism.RSA_PKCS
PSS: Final = Mechanism.RSA_PKCS_PSS
OAEP: Final = Mechanism.RSA_PKCS_OAEP

P11_TYPE: Final = {
    KeyType.SECP256K1: P11KeyType.EC,
    KeyType.SECP256R1: P11KeyType.EC,
    KeyType.ED25519: P11KeyType.EC_EDWARDS,
    KeyType.RSA: P11KeyType.RSA,
    KeyType.AES: P11KeyType.AES,
}
# DER of the curve's object identifier (SEC 2, RFC 8410).
CURVE_PARAMETERS: Final = {
    KeyType.SECP256K1: bytes.fromhex("06052b8104000a"),
    KeyType.SECP256R1: bytes.fromhex("06082a8648ce3d030107"),
    KeyType.ED25519: bytes.fromhex("06032b6570"),
}
CURVE_GENERATION: Final = {
    KeyType.SECP256K1: Mechanism.EC_KEY_PAIR_GEN,
    KeyType.SECP256R1: Mechanism.EC_KEY_PAIR_GEN,
    KeyType.ED25519: Mechanism.EC_EDWARDS_KEY_PAIR_GEN,
}
RSA_HASH: Final = {
    Hash.SHA_1: (Mechanism.SHA_1, MGF.SHA1),
    Hash.SHA_256: (Mechanism.SHA256, MGF.SHA256),
    Hash.SHA_384: (Mechanism.SHA384, MGF.SHA384),
    Hash.SHA_512: (Mechanism.SHA512, MGF.SHA512),
}
# The DigestInfo in front of a digest (RFC 8017 section 9.2, note 1).
DIGEST_INFO: Final = {
    Hash.SHA_256: bytes.fromhex("3031300d060960864801650304020105000420"),
    Hash.SHA_384: bytes.fromhex("3041300d060960864801650304020205000430"),
    Hash.SHA_512: bytes.fromhex("3051300d060960864801650304020305000440"),
}


def gcm_parameters(nonce: bytes, aad: bytes) -> GCMParams:
    """Return AES-GCM parameters: a nonce of 12 bytes, never-empty associated data, a tag of 16 bytes."""
    # A NULL nonce or AAD crashes SoftHSM; an empty one reads past a buffer in some builds.
    if len(nonce) != 12 or not aad:
        raise ValueError("AES-GCM takes a nonce of 12 bytes and associated data that is not empty")
    return GCMParams(nonce, aad, TAG_BYTES * 8)
