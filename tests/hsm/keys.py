"""Keys for the tests of the HSM: made, and used once in the way that shows they work."""

from typing import cast
from uuid import uuid4

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from kms.app.ports import Hsm
from kms.domain.algorithms import DIGEST_BYTES, Hash, KeySpec, KeyType, Purpose, signature_algorithm
from kms.domain.ids import KeyId, UserId
from kms.domain.keys import Custody, HeldKey, KeyIdentity


def identity_of(spec: KeySpec) -> KeyIdentity:
    """Return a new identity."""
    return KeyIdentity(KeyId(uuid4()), UserId(uuid4()), spec)


async def new_key(hsm: Hsm, spec: KeySpec, minimum: Custody | None = None) -> HeldKey:
    """Return a new key of *spec*."""
    identity = identity_of(spec)
    return HeldKey(identity, await hsm.generate(identity, hsm.custody_for(spec, minimum)), version=1)


async def use(hsm: Hsm, key: HeldKey) -> None:
    """Do with *key* what it is for. Signatures are checked by the contract suite, not here."""
    spec = key.identity.spec
    if spec.key_type is KeyType.AES:
        assert await hsm.decrypt(key, await hsm.encrypt(key, b"plain", b"aad"), b"aad") == b"plain"
    elif spec.purpose is Purpose.ENCRYPTION:
        assert await hsm.decrypt_rsa(key, Hash.SHA_1, oaep_sha1(key, b"plain")) == b"plain"
    else:
        algorithm = signature_algorithm(spec.key_type, None, None)
        assert await hsm.sign(key, algorithm, bytes(DIGEST_BYTES[algorithm.hash] if algorithm.hash else 7))


def oaep_sha1(key: HeldKey, plaintext: bytes) -> bytes:
    """Encrypt for *key* in the one way that SoftHSM opens."""
    public = cast("rsa.RSAPublicKey", serialization.load_pem_public_key(key.material.public_key.encode()))
    sha1 = hashes.SHA1()  # noqa: S303  # OAEP does not rest on collision resistance
    return public.encrypt(plaintext, padding.OAEP(padding.MGF1(sha1), sha1, None))
