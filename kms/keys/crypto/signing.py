"""Signing in the token, verifying in the service."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256

from kms.app.keyring import require_key, require_usable_key
from kms.app.limits import MESSAGE_BYTES_MAX, SIGNATURE_BYTES_MAX
from kms.app.ports import Call, Entry, Hsm, Keys, PublicKeys
from kms.domain import ecdsa
from kms.domain.algorithms import (
    DIGEST_BYTES,
    EC_TYPES,
    KeyType,
    Purpose,
    Scheme,
    SignatureAlgorithm,
    SignatureForm,
    signature_algorithm,
)
from kms.domain.algorithms import Hash as HashName
from kms.domain.errors import KmsError, Reason, about_key, malformed
from kms.domain.fields import check_size
from kms.domain.ids import KeyId, KeyRef
from kms.domain.keys import KeyIdentity, KeyRecord
from kms.domain.lifecycle import Use
from kms.keys.ledger.settling import PendingResult


@dataclass(frozen=True, slots=True)
class ToSign:
    """What is signed: a message or a digest of one (`is_digest`), and how. None takes the key type's default.

    `bound_to` is what the key is bound to: nothing, unless the service itself signs. `details` are more for the trail.
    """

    key: KeyRef
    data: bytes
    is_digest: bool
    scheme: Scheme | None
    hash: HashName | None
    form: SignatureForm | None
    bound_to: str = field(default="", kw_only=True)
    details: Mapping[str, str] = field(default_factory=dict, kw_only=True)

    @property
    def field(self) -> str:
        """The name of the request's field that holds the data."""
        return "digest" if self.is_digest else "message"


@dataclass(frozen=True, slots=True)
class ToVerify(ToSign):
    """A signature of a message or a digest, to be verified. `require_low_s` refuses the other s of ECDSA."""

    signature: bytes = b""
    require_low_s: bool = False


@dataclass(frozen=True, slots=True)
class Verification:
    """Whether a signature is valid, and the key that it was held against."""

    is_valid: bool
    key_id: KeyId


@dataclass(frozen=True, slots=True)
class Signature:
    """A signature, the key that made it, and the algorithm."""

    signature: bytes
    key_id: KeyId
    algorithm: SignatureAlgorithm


@dataclass(frozen=True, slots=True)
class Signing:
    """Sign and Verify."""

    keys: Keys
    hsm: Hsm
    public_keys: PublicKeys

    async def sign(self, call: Call, request: ToSign, *, fresh: bool) -> PendingResult[Signature]:
        """Sign with a key of the caller, to be charged. ECDSA signatures are always low-S."""
        check_size(request.field, request.data, bytes_max=MESSAGE_BYTES_MAX)
        key = await require_usable_key(
            self.keys, call.user.user_id, request.key, Use.PROTECT, fresh=fresh, bound_to=request.bound_to
        )
        identity = key.record.identity
        with about_key(identity.key_id):
            algorithm, form = _fitting(identity, request)
            data = self._to_be_signed(request, algorithm)
            signature = await self.hsm.sign(key.held, algorithm, data)
            if form is not None:
                signature = self._in_form(identity.spec.key_type, key.record.public_key, data, signature, form)
        details = {
            "scheme": algorithm.scheme,
            "hash": algorithm.hash or "",
            "input": request.field,
            "input_bytes": len(request.data),
            "input_sha256": sha256(request.data).hexdigest(),
            **request.details,
        }
        entry = Entry(call, "sign", identity.key_id, key.record.version, Use.PROTECT, is_charged=True, details=details)
        return PendingResult(Signature(signature, identity.key_id, algorithm), entry)

    async def verify(self, call: Call, request: ToVerify) -> Verification:
        """Say whether a signature is by a key of the caller, in whatever state the key is."""
        check_size(request.field, request.data, bytes_max=MESSAGE_BYTES_MAX)
        check_size("signature", request.signature, bytes_min=1, bytes_max=SIGNATURE_BYTES_MAX)
        record = await require_key(self.keys, call.user.user_id, request.key, recent=True)
        with about_key(record.identity.key_id):
            return Verification(self._is_valid(record, request), record.identity.key_id)

    def _is_valid(self, record: KeyRecord, request: ToVerify) -> bool:
        algorithm, form = _fitting(record.identity, request)
        data = self._to_be_signed(request, algorithm)
        if form is None:
            return self.public_keys.is_valid(record.public_key, algorithm, data, request.signature)
        parsed = _parse(record.identity.spec.key_type, request.signature, form)
        valid = (parsed.is_low_s or not request.require_low_s) and self.public_keys.is_valid(
            record.public_key, algorithm, data, parsed.der()
        )
        if valid and form is SignatureForm.RECOVERABLE:
            valid = self.public_keys.recovery_id(record.public_key, data, parsed.raw()) == request.signature[-1]
        return valid

    def _to_be_signed(self, request: ToSign, algorithm: SignatureAlgorithm) -> bytes:
        if algorithm.hash is None:
            if request.is_digest:
                raise malformed("digest", "expected a message: Ed25519 signs the message itself")
            return request.data
        if not request.is_digest:
            return self.public_keys.digest(algorithm.hash, request.data)
        if len(request.data) != DIGEST_BYTES[algorithm.hash]:
            expected = f"digest: expected {DIGEST_BYTES[algorithm.hash]} bytes for {algorithm.hash}"
            raise KmsError(Reason.DIGEST_LENGTH, expected, field="digest")
        return request.data

    def _in_form(self, key_type: KeyType, public_key: str, digest: bytes, raw: bytes, form: SignatureForm) -> bytes:
        signature = ecdsa.from_raw(key_type, raw).low_s()
        if form is SignatureForm.DER:
            return signature.der()
        if form is SignatureForm.RAW:
            return signature.raw()
        # v belongs to the low-S form: the other s has the other parity.
        return signature.raw() + bytes((self.public_keys.recovery_id(public_key, digest, signature.raw()),))


def _fitting(identity: KeyIdentity, request: ToSign) -> tuple[SignatureAlgorithm, SignatureForm | None]:
    """Return algorithm and form (None for signatures that have but one), or say what does not fit the key."""
    key_type = identity.spec.key_type
    if identity.spec.purpose is not Purpose.SIGNING:
        raise KmsError(Reason.WRONG_PURPOSE, "this key does not sign", purpose=identity.spec.purpose)
    algorithm = signature_algorithm(key_type, request.scheme, request.hash)
    if key_type not in EC_TYPES:
        if request.form is not None:
            raise malformed("format", f"expected none: a signature by {algorithm.scheme} has one form")
        return algorithm, None
    if request.form is SignatureForm.RECOVERABLE and key_type is not KeyType.SECP256K1:
        raise malformed("format", "expected DER or RAW: only secp256k1 signatures are recoverable")
    return algorithm, request.form or SignatureForm.DER


def _parse(key_type: KeyType, signature: bytes, form: SignatureForm) -> ecdsa.EcdsaSignature:
    if form is SignatureForm.DER:
        return ecdsa.from_der(key_type, signature)
    if form is SignatureForm.RECOVERABLE:
        if len(signature) != 65 or signature[-1] > 3:
            raise malformed("signature", "expected r‖s‖v of 65 bytes with v from 0 to 3")
        return ecdsa.from_raw(key_type, signature[:-1])
    return ecdsa.from_raw(key_type, signature)
