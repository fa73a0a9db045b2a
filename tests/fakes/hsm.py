"""An `Hsm` that computes with pyca/cryptography. The same contract suite holds for it as for a token.

It lives under `tests`, so no configuration can select it. A RESIDENT key stays in a dictionary, with a mark until it is
confirmed. The others are sealed by a key that only this object has, in the real envelope format.
"""

import os
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final, cast
from uuid import UUID, uuid4

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import cmac, hashes, hmac, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, decode_dss_signature
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES

from kms.app.ports import Sealed
from kms.domain.algorithms import DIGEST_BYTES, EC_TYPES, Hash, KeySpec, KeyType, Purpose, Scheme, SignatureAlgorithm
from kms.domain.ciphertext import ciphertext_invalid
from kms.domain.envelope import Envelope, associated_data, envelope_invalid, parse_envelope
from kms.domain.errors import KmsError, Reason, malformed
from kms.domain.ids import KeyId
from kms.domain.keys import Custody, HeldKey, KeyIdentity, KeyMaterial, check_custody
from kms.domain.residents import Holdings, Mark

PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey

_NO_KEK: Final = UUID(int=0)
_CURVE: Final = {KeyType.SECP256K1: ec.SECP256K1(), KeyType.SECP256R1: ec.SECP256R1()}
_HASH: Final[dict[Hash, hashes.HashAlgorithm]] = {
    Hash.SHA_1: hashes.SHA1(),  # noqa: S303  # for OAEP
    Hash.SHA_256: hashes.SHA256(),
    Hash.SHA_384: hashes.SHA384(),
    Hash.SHA_512: hashes.SHA512(),
}
_SCHEME_TYPES: Final = {
    Scheme.ECDSA: EC_TYPES,
    Scheme.ED25519: {KeyType.ED25519},
    Scheme.RSA_PKCS1: {KeyType.RSA},
    Scheme.RSA_PSS: {KeyType.RSA},
}


@dataclass(frozen=True, slots=True)
class FakeHsm:
    """A token in memory. `sealed_types` are kept SEALED, all others WRAPPED; with anything in `away` every call fails."""

    sealed_types: frozenset[KeyType] = frozenset()
    oaep: frozenset[Hash] = frozenset({Hash.SHA_1, Hash.SHA_256})
    sealing_key_id: UUID = field(default_factory=uuid4)
    away: list[bool] = field(default_factory=list)
    bound: dict[KeyId, str] = field(default_factory=dict)
    marks: dict[KeyId, Mark] = field(default_factory=dict)
    _sealing_key: bytes = field(default_factory=lambda: os.urandom(32), repr=False)
    _mac_key: bytes = field(default_factory=lambda: os.urandom(32), repr=False)
    _resident: dict[bytes, bytes] = field(default_factory=dict, repr=False)

    def custody_for(self, spec: KeySpec, minimum: Custody | None) -> Custody:
        """As the port says."""
        if minimum is Custody.RESIDENT:
            return Custody.RESIDENT
        best = Custody.SEALED if spec.key_type in self.sealed_types else Custody.WRAPPED
        check_custody(best, minimum)
        return best

    async def generate(self, identity: KeyIdentity, custody: Custody) -> KeyMaterial:
        """As the port says."""
        self._check_there()
        secret, public_key = _new_key(identity.spec)
        if custody is Custody.RESIDENT:
            self._resident[identity.key_id.bytes] = secret
            self.bound[identity.key_id] = identity.bound_to
            self.marks[identity.key_id] = Mark(datetime.now(UTC))
            secret = identity.key_id.bytes
        aad = associated_data(identity, custody=custody, public_key=public_key, sealing_key_id=self.sealing_key_id)
        nonce = os.urandom(12)
        sealed = AESGCM(self._sealing_key).encrypt(nonce, secret, aad)
        envelope = Envelope(custody, _NO_KEK, self.sealing_key_id, nonce, sealed).encode()
        return KeyMaterial(custody, public_key, envelope, secret.hex() if custody is Custody.RESIDENT else None)

    async def confirm(self, key_id: KeyId) -> None:
        """As the port says."""
        self._check_there()
        if key_id not in self.bound:
            raise KmsError(Reason.HSM_UNAVAILABLE, "the fake does not hold the key")
        self.marks.pop(key_id, None)

    async def abandon(self, key_id: KeyId) -> None:
        """As the port says."""
        self._check_there()
        if self.marks.pop(key_id, None) is not None:
            self._remove(key_id)

    async def discard(self, key_id: KeyId, bound_to: str) -> None:
        """As the port says."""
        self._check_there()
        if bound_to or self.bound.get(key_id):
            raise KmsError(Reason.WRONG_PURPOSE, "this key belongs to the service itself")
        self.marks.pop(key_id, None)
        self._remove(key_id)

    async def holdings(self) -> Holdings:
        """As the port says."""
        self._check_there()
        return Holdings(dict(self.bound), dict(self.marks))

    async def opens(self, key: HeldKey) -> bool:
        """As the port says."""
        try:
            self._open(key)
        except KmsError as error:
            if error.reason is Reason.HSM_UNAVAILABLE:
                raise
            return False
        return True

    async def residents(self) -> set[str]:
        """As the port says."""
        self._check_there()
        return {key_id.hex() for key_id in self._resident}

    async def sign(self, key: HeldKey, algorithm: SignatureAlgorithm, data: bytes) -> bytes:
        """As the port says."""
        spec = key.identity.spec
        if spec.purpose is not Purpose.SIGNING or spec.key_type not in _SCHEME_TYPES[algorithm.scheme]:
            raise KmsError(Reason.WRONG_PURPOSE, f"a {spec.key_type} key does not sign with {algorithm.scheme}")
        if algorithm.hash is not None and len(data) != DIGEST_BYTES[algorithm.hash]:
            raise KmsError(Reason.DIGEST_LENGTH, f"expected {DIGEST_BYTES[algorithm.hash]} bytes")
        return _sign(cast("PrivateKey", serialization.load_der_private_key(self._open(key), None)), algorithm, data)

    async def encrypt(self, key: HeldKey, plaintext: bytes, aad: bytes) -> Sealed:
        """As the port says."""
        _check_aes(key, aad)
        nonce = os.urandom(12)
        return Sealed(nonce, AESGCM(self._open(key)).encrypt(nonce, plaintext, aad))

    async def decrypt(self, key: HeldKey, sealed: Sealed, aad: bytes) -> bytes:
        """As the port says."""
        _check_aes(key, aad)
        secret = self._open(key)
        try:
            return AESGCM(secret).decrypt(sealed.nonce, sealed.body, aad)
        except (InvalidTag, ValueError):
            raise ciphertext_invalid() from None

    async def decrypt_rsa(self, key: HeldKey, hash_: Hash, body: bytes) -> bytes:
        """As the port says."""
        spec = key.identity.spec
        if spec.key_type is not KeyType.RSA or spec.purpose is not Purpose.ENCRYPTION:
            raise KmsError(Reason.WRONG_PURPOSE, "this key does not decrypt")
        if hash_ not in self.oaep:
            raise KmsError(Reason.HSM_MECHANISM_UNSUPPORTED, f"RSA-OAEP with {hash_} is not done here")
        private = cast("rsa.RSAPrivateKey", serialization.load_der_private_key(self._open(key), None))
        try:
            return private.decrypt(body, padding.OAEP(padding.MGF1(_HASH[hash_]), _HASH[hash_], None))
        except ValueError:
            raise ciphertext_invalid() from None

    async def random(self, size_bytes: int) -> bytes:
        """As the port says."""
        self._check_there()
        if not 1 <= size_bytes <= 65_536:
            raise malformed("size_bytes", "expected 1 to 65536")
        return os.urandom(size_bytes)

    async def mac(self, data: bytes) -> bytes:
        """As the port says."""
        self._check_there()
        if not 1 <= len(data) <= 1024 * 1024:
            raise malformed("data", "expected 1 byte to 1 MiB")
        made = hmac.HMAC(self._mac_key, hashes.SHA256())
        made.update(data)
        return made.finalize()

    def oaep_hashes(self) -> frozenset[Hash]:
        """As the port says."""
        return self.oaep

    def _remove(self, key_id: KeyId) -> None:
        self.bound.pop(key_id, None)
        self._resident.pop(key_id.bytes, None)

    def _check_there(self) -> None:
        if self.away:
            raise KmsError(Reason.HSM_UNAVAILABLE, "the fake is away")

    def _open(self, key: HeldKey) -> bytes:
        self._check_there()
        envelope = parse_envelope(key.material.envelope)
        if envelope.sealing_key_id != self.sealing_key_id:
            raise KmsError(Reason.HSM_KEK_MISSING, "the fake has another sealing key")
        aad = associated_data(
            key.identity,
            custody=key.material.custody,
            public_key=key.material.public_key,
            sealing_key_id=envelope.sealing_key_id,
            kek_id=envelope.kek_id,
        )
        try:
            inner = AESGCM(self._sealing_key).decrypt(envelope.nonce, envelope.sealed, aad)
            return self._resident[inner] if envelope.custody is Custody.RESIDENT else inner
        except (InvalidTag, KeyError):
            raise envelope_invalid() from None


def _new_key(spec: KeySpec) -> tuple[bytes, str]:
    if spec.is_symmetric:
        secret = os.urandom(spec.strength_bits // 8)
        check = cmac.CMAC(AES(secret))
        check.update(bytes(16))
        return secret, "kcv:" + check.finalize()[:3].hex()
    private = _new_private(spec)
    public = private.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    form = (serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return private.private_bytes(*form), public.decode()


def _new_private(spec: KeySpec) -> PrivateKey:
    if spec.key_type is KeyType.RSA:
        return rsa.generate_private_key(65537, spec.strength_bits)
    if spec.key_type is KeyType.ED25519:
        return ed25519.Ed25519PrivateKey.generate()
    return ec.generate_private_key(_CURVE[spec.key_type])


def _sign(private: PrivateKey, algorithm: SignatureAlgorithm, data: bytes) -> bytes:
    if isinstance(private, ed25519.Ed25519PrivateKey):
        return private.sign(data)
    if isinstance(private, ec.EllipticCurvePrivateKey):
        r, s = decode_dss_signature(private.sign(data, ec.ECDSA(Prehashed(hashes.SHA256()))))
        return r.to_bytes(32, "big") + s.to_bytes(32, "big")
    hash_ = _HASH[cast("Hash", algorithm.hash)]
    if algorithm.scheme is Scheme.RSA_PSS:
        return private.sign(data, padding.PSS(padding.MGF1(hash_), hash_.digest_size), Prehashed(hash_))
    return private.sign(data, padding.PKCS1v15(), Prehashed(hash_))


def _check_aes(key: HeldKey, aad: bytes) -> None:
    if key.identity.spec.key_type is not KeyType.AES:
        raise KmsError(Reason.WRONG_PURPOSE, "this key does not do AES-GCM")
    if not aad:
        raise malformed("aad", "expected associated data that is not empty")
