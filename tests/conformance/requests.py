"""Short ways to say common requests."""

from kms.v1 import keys_pb2 as kpb
from tests.fixtures.server import Caller

KEY_TYPES = {
    "secp256k1": (kpb.KEY_TYPE_SECP256K1, kpb.KEY_PURPOSE_SIGNING),
    "secp256r1": (kpb.KEY_TYPE_SECP256R1, kpb.KEY_PURPOSE_SIGNING),
    "ed25519": (kpb.KEY_TYPE_ED25519, kpb.KEY_PURPOSE_SIGNING),
    "rsa": (kpb.KEY_TYPE_RSA, kpb.KEY_PURPOSE_SIGNING),
    "rsa-encryption": (kpb.KEY_TYPE_RSA, kpb.KEY_PURPOSE_ENCRYPTION),
    "aes": (kpb.KEY_TYPE_AES, kpb.KEY_PURPOSE_ENCRYPTION),
}


def create(
    kind: str, *, name: str = "k", size_bits: int = 0, custody: "kpb.Custody.ValueType" = kpb.CUSTODY_UNSPECIFIED
) -> kpb.CreateKeyRequest:
    """Return the request for a key of *kind* (a name in `KEY_TYPES`)."""
    key_type, purpose = KEY_TYPES[kind]
    return kpb.CreateKeyRequest(name=name, type=key_type, purpose=purpose, size_bits=size_bits, custody_min=custody)


def made(caller: Caller, kind: str, *, name: str = "k", size_bits: int = 0) -> kpb.Key:
    """Make a key and return it."""
    return caller.keys.CreateKey(create(kind, name=name, size_bits=size_bits), timeout=30).key
