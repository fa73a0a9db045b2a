"""Encrypting, decrypting and making data keys."""

from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from kms.app.keyring import require_key, require_usable_key
from kms.app.limits import CIPHERTEXT_BYTES_MAX, DATA_KEY_BYTES, MESSAGE_BYTES_MAX
from kms.app.ports import Call, Entry, Hsm, Keys, PublicKeys, Sealed
from kms.domain.algorithms import DIGEST_BYTES, Hash, KeyType, Purpose
from kms.domain.ciphertext import AesCiphertext, Ciphertext, RsaCiphertext, ciphertext_aad, ciphertext_invalid, parse_ciphertext
from kms.domain.errors import KmsError, Reason, about_key, malformed
from kms.domain.fields import check_size, parse_number
from kms.domain.ids import KeyId, KeyRef, UserId, base_name
from kms.domain.keys import KeyIdentity, UsableKey
from kms.domain.lifecycle import Use, use_among
from kms.domain.permissions import check_use_permitted, needed_for
from kms.keys.ledger.settling import PendingResult

DATA_KEY_BYTES_DEFAULT: Final = 32
_OAEP_STRONGEST_FIRST: Final = (Hash.SHA_512, Hash.SHA_384, Hash.SHA_256, Hash.SHA_1)


@dataclass(frozen=True, slots=True)
class ToEncrypt:
    """A plaintext for a key. `oaep_hash` None takes the strongest that the token can open again."""

    key: KeyRef
    plaintext: bytes
    aad: bytes = b""
    oaep_hash: Hash | None = None


@dataclass(frozen=True, slots=True)
class ToDecrypt:
    """A ciphertext. `raw_oaep` says that it is bare RSA-OAEP made elsewhere, with the hash to open it by.

    `uses` is what the request allows: beside processing that by keys which are compromised, or revoked.
    """

    ciphertext: bytes
    aad: bytes
    key: KeyRef | None
    raw_oaep: bool
    oaep_hash: Hash | None
    uses: tuple[Use, ...] = (Use.PROCESS,)


@dataclass(frozen=True, slots=True)
class ToGenerate:
    """A wish for a data key of *size_bytes* under *key*, with or without its plaintext."""

    key: KeyRef
    size_bytes: int = DATA_KEY_BYTES_DEFAULT
    aad: bytes = b""
    without_plaintext: bool = False


@dataclass(frozen=True, slots=True)
class Encrypted:
    """A ciphertext and the key that made it."""

    ciphertext: bytes
    key_id: KeyId


@dataclass(frozen=True, slots=True)
class Decrypted:
    """A plaintext and the key that opened it."""

    plaintext: bytes
    key_id: KeyId

    def __repr__(self) -> str:
        return f"<Decrypted by {self.key_id}>"


@dataclass(frozen=True, slots=True)
class DataKey:
    """A data key, in the clear and encrypted."""

    plaintext: bytes
    ciphertext: bytes
    key_id: KeyId

    def __repr__(self) -> str:
        return f"<DataKey under {self.key_id}>"


@dataclass(frozen=True, slots=True)
class Encryption:
    """Encrypt, Decrypt, GenerateDataKey, GenerateRandom."""

    keys: Keys
    hsm: Hsm
    public_keys: PublicKeys

    async def encrypt(self, call: Call, request: ToEncrypt, *, fresh: bool) -> PendingResult[Encrypted]:
        """Encrypt under a key of the caller, to be charged. The ciphertext names its key."""
        check_size("plaintext", request.plaintext, bytes_max=MESSAGE_BYTES_MAX)
        check_size("aad", request.aad, bytes_max=MESSAGE_BYTES_MAX)
        key = await require_usable_key(self.keys, call.user.user_id, request.key, Use.PROTECT, fresh=fresh)
        with about_key(key.record.identity.key_id):
            identity = _for_encryption(key)
            if identity.spec.key_type is KeyType.RSA:
                ciphertext = self._encrypt_rsa(key, request).encode()
            elif request.oaep_hash is not None:
                raise malformed("oaep_hash", "expected none: this key encrypts by AES-GCM")
            else:
                ciphertext = await self._encrypt_aes(key, request.plaintext, request.aad)
        entry = _entry(call, "encrypt", key, Use.PROTECT, ciphertext)
        return PendingResult(Encrypted(ciphertext, identity.key_id), entry)

    async def decrypt(self, call: Call, request: ToDecrypt, *, fresh: bool) -> PendingResult[Decrypted]:
        """Open a ciphertext with the key that it names, to be recorded.

        Raises PERMISSION_DENIED if the key's state leaves decryption to users with a permission that the caller lacks.
        """
        check_size("ciphertext", request.ciphertext, bytes_max=CIPHERTEXT_BYTES_MAX)
        check_size("aad", request.aad, bytes_max=MESSAGE_BYTES_MAX)
        locate = self._bare if request.raw_oaep else self._self_describing
        key, ciphertext = await locate(call, request, fresh=fresh)
        key_id = key.record.identity.key_id
        with about_key(key_id):
            use = use_among(key.record.state, *request.uses)
            check_use_permitted(call.user.permissions, use)
            plaintext = await self._open(key, ciphertext, request.aad)
        return PendingResult(Decrypted(plaintext, key_id), _entry(call, "decrypt", key, use, request.ciphertext))

    async def data_key(self, call: Call, request: ToGenerate, *, fresh: bool) -> PendingResult[DataKey]:
        """Draw a data key of 16 to 64 bytes from the token and encrypt it under an AES key of the caller, to be charged."""
        check_size("aad", request.aad, bytes_max=MESSAGE_BYTES_MAX)
        parse_number(request.size_bytes, field="size_bytes", least=DATA_KEY_BYTES[0], most=DATA_KEY_BYTES[-1])
        key = await require_usable_key(self.keys, call.user.user_id, request.key, Use.PROTECT, fresh=fresh)
        with about_key(key.record.identity.key_id):
            identity = _for_encryption(key)
            if identity.spec.key_type is not KeyType.AES:
                raise KmsError(Reason.WRONG_PURPOSE, "data keys are made under AES keys", key_type=identity.spec.key_type)
            plaintext = await self.hsm.random(request.size_bytes)
            ciphertext = await self._encrypt_aes(key, plaintext, request.aad)
        entry = _entry(call, "generate_data_key", key, Use.PROTECT, ciphertext)
        return PendingResult(DataKey(plaintext, ciphertext, identity.key_id), entry)

    async def random(self, size_bytes: int) -> bytes:
        """Return 1 to 65,536 random bytes from the token."""
        return await self.hsm.random(parse_number(size_bytes, field="size_bytes", least=1, most=MESSAGE_BYTES_MAX))

    async def _encrypt_aes(self, key: UsableKey, plaintext: bytes, aad: bytes) -> bytes:
        key_id = key.record.identity.key_id
        sealed = await self.hsm.encrypt(key.held, plaintext, ciphertext_aad(key_id, aad))
        return AesCiphertext(key_id, sealed.nonce, sealed.body).encode()

    def _encrypt_rsa(self, key: UsableKey, request: ToEncrypt) -> RsaCiphertext:
        if request.aad:
            raise malformed("aad", "expected none: RSA-OAEP carries no associated data here")
        hash_ = request.oaep_hash or next(
            (hash_ for hash_ in _OAEP_STRONGEST_FIRST if hash_ in self.hsm.oaep_hashes()), Hash.SHA_256
        )
        self._check_oaep(hash_)
        identity = key.record.identity
        check_size("plaintext", request.plaintext, bytes_max=identity.spec.strength_bits // 8 - 2 * DIGEST_BYTES[hash_] - 2)
        return RsaCiphertext(
            identity.key_id, hash_, self.public_keys.encrypt_rsa(key.record.public_key, hash_, request.plaintext)
        )

    def _check_oaep(self, hash_: Hash) -> None:
        if hash_ not in _OAEP_STRONGEST_FIRST:
            raise malformed("oaep_hash", f"expected one of {', '.join(_OAEP_STRONGEST_FIRST)}")
        if hash_ not in self.hsm.oaep_hashes():
            # What the token cannot open again must not be encrypted either.
            raise KmsError(
                Reason.HSM_MECHANISM_UNSUPPORTED, f"the token does no RSA-OAEP with {hash_}", mechanism="CKM_RSA_PKCS_OAEP"
            )

    async def _check_named(self, caller: UserId, ref: KeyRef, named: KeyId) -> None:
        """Raise INCORRECT_KEY unless *ref* is the key *named*, or the name of a lineage that the key belongs to."""
        if (await require_key(self.keys, caller, ref, recent=True)).identity.key_id == named:
            return
        key = await require_key(self.keys, caller, ref)
        if key.identity.key_id == named:
            return
        older = await self.keys.find(caller, named) if ref == key.name else None
        if older is None or base_name(older.name) != ref:
            with about_key(key.identity.key_id):
                raise KmsError(Reason.INCORRECT_KEY, "the ciphertext was made with another key")

    async def _self_describing(self, call: Call, request: ToDecrypt, *, fresh: bool) -> tuple[UsableKey, Ciphertext]:
        if request.oaep_hash is not None:
            raise malformed("oaep_hash", "expected none: the ciphertext names its hash")
        ciphertext = parse_ciphertext(request.ciphertext)
        if request.key is not None:
            await self._check_named(call.user.user_id, request.key, ciphertext.key_id)
        caller = call.user.user_id
        return await require_usable_key(self.keys, caller, ciphertext.key_id, *request.uses, fresh=fresh), ciphertext

    async def _bare(self, call: Call, request: ToDecrypt, *, fresh: bool) -> tuple[UsableKey, Ciphertext]:
        if request.key is None:
            raise malformed("key", "expected a key: bare RSA-OAEP does not name its own")
        if request.oaep_hash is None:
            raise malformed("oaep_hash", "expected the hash that the ciphertext was made with")
        key = await require_usable_key(self.keys, call.user.user_id, request.key, *request.uses, fresh=fresh)
        return key, RsaCiphertext(key.record.identity.key_id, request.oaep_hash, request.ciphertext)

    async def _open(self, key: UsableKey, ciphertext: Ciphertext, aad: bytes) -> bytes:
        identity = _for_encryption(key)
        if isinstance(ciphertext, AesCiphertext):
            if identity.spec.key_type is not KeyType.AES:
                raise ciphertext_invalid()
            sealed = Sealed(ciphertext.nonce, ciphertext.body)
            return await self.hsm.decrypt(key.held, sealed, ciphertext_aad(identity.key_id, aad))
        if identity.spec.key_type is not KeyType.RSA:
            raise KmsError(Reason.WRONG_PURPOSE, "this key does not open RSA-OAEP", key_type=identity.spec.key_type)
        if aad or len(ciphertext.body) != identity.spec.strength_bits // 8:
            raise ciphertext_invalid()
        self._check_oaep(ciphertext.hash)
        return await self.hsm.decrypt_rsa(key.held, ciphertext.hash, ciphertext.body)


def _entry(call: Call, action: str, key: UsableKey, use: Use, ciphertext: bytes) -> Entry:
    """Return the line of the trail: of the plaintext it holds nothing but, by the ciphertext, its length."""
    identity = key.record.identity
    details: dict[str, str | int] = {
        "algorithm": "aes-gcm" if identity.spec.key_type is KeyType.AES else "rsa-oaep",
        "ciphertext_bytes": len(ciphertext),
        "ciphertext_sha256": sha256(ciphertext).hexdigest(),
    }
    if needed_for(use) is not None:
        details["use"] = use
    return Entry(call, action, identity.key_id, key.record.version, use, is_charged=use is Use.PROTECT, details=details)


def _for_encryption(key: UsableKey) -> KeyIdentity:
    identity = key.record.identity
    if identity.spec.purpose is not Purpose.ENCRYPTION:
        raise KmsError(Reason.WRONG_PURPOSE, "this key does not encrypt", purpose=identity.spec.purpose)
    return identity
