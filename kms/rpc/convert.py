"""Wire to domain and back: pure, and the only place where a request's fields are read."""

import base64
import hashlib
import json
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from kms.domain.errors import KmsError, malformed
from kms.domain.fields import open_token, parse_moment, parse_number, parse_optional_number, parse_span, token_of
from kms.domain.ids import KeyName, parse_key_name, parse_key_ref
from kms.domain.keys import KeyFilter, KeyRecord
from kms.domain.lifecycle import Change, Use
from kms.keys.crypto.encryption import DATA_KEY_BYTES_DEFAULT, Decrypted, Encrypted, ToDecrypt, ToEncrypt, ToGenerate
from kms.keys.crypto.reencryption import ReEncrypted, ToReEncrypt
from kms.keys.crypto.signing import Signature, ToSign, ToVerify, Verification
from kms.keys.ledger.repeats import RepeatableRequest
from kms.rpc import enums
from kms.v1 import certificates_pb2, crypto_pb2, keys_pb2, rotation_pb2

PAGE_DEFAULT = 50
PAGE_MAX = 200

Moves = (
    keys_pb2.UpdateKeyRequest
    | keys_pb2.ActivateKeyRequest
    | keys_pb2.DeactivateKeyRequest
    | keys_pb2.ReactivateKeyRequest
    | keys_pb2.RevokeKeyRequest
    | keys_pb2.MarkKeyCompromisedRequest
    | keys_pb2.ScheduleKeyDestructionRequest
    | keys_pb2.CancelKeyDestructionRequest
)


def wire_key(key: KeyRecord) -> keys_pb2.Key:
    """Return *key* as a client sees it."""
    spec = key.identity.spec
    return keys_pb2.Key(
        id=str(key.identity.key_id),
        name=key.name,
        type=enums.number_of(enums.KEY_TYPES, spec.key_type),
        purpose=enums.number_of(enums.PURPOSES, spec.purpose),
        size_bits=spec.strength_bits,
        state=enums.number_of(enums.STATES, key.state),
        custody=enums.number_of(enums.CUSTODIES, key.custody),
        origin=key.identity.origin,
        public_key_pem="" if spec.is_symmetric else key.public_key,
        check_value=key.public_key.removeprefix("kcv:") if spec.is_symmetric else "",
        usage_count=key.usage_counter,
        version=key.version,
        created_at=stamp(key.created_at),
        metadata=key.metadata,
        max_usage_count=key.max_usage_count,
        activated_at=stamp(key.activated_at),
        expires_at=stamp(key.expires_at),
        destruction_scheduled_at=stamp(key.destruction_scheduled_at),
        superseded_at=stamp(key.superseded_at),
    )


def stamp(moment: datetime | None) -> Timestamp | None:
    """Return *moment* as the wire has it."""
    if moment is None:
        return None
    made = Timestamp()
    made.FromDatetime(moment)
    return made


def der_of(pem: str) -> bytes:
    """Return the DER inside a PEM text (RFC 7468)."""
    return base64.b64decode("".join(line for line in pem.splitlines() if not line.startswith("-----")))


def page_request(request: keys_pb2.ListKeysRequest, lineage: KeyName | None) -> tuple[KeyFilter, str, int]:
    """Return the filter, the name to begin behind, and the page's size. *lineage* is the name that `lineage` stands for."""
    page_size = parse_optional_number(request.page_size, field="page_size", most=PAGE_MAX)
    if request.name_prefix:
        parse_key_name(request.name_prefix, field="name_prefix")
    which = KeyFilter(
        key_type=enums.optional(enums.KEY_TYPES, request.type, "type"),
        purpose=enums.optional(enums.PURPOSES, request.purpose, "purpose"),
        status=enums.optional(enums.STATES, request.state, "state"),
        name_prefix=request.name_prefix or None,
        lineage=lineage,
    )
    return which, _parse_page_token(request.page_token, which), page_size or PAGE_DEFAULT


def page_token(after: str, which: KeyFilter) -> str:
    """Return the token of the page behind the name *after*."""
    return token_of(_fingerprint(which), after)


def _parse_page_token(token: str, which: KeyFilter) -> str:
    if not token:
        return ""
    expected = malformed("page_token", "expected next_page_token of the page before, with the same filter")
    match open_token(token, expected=expected):
        case [fingerprint, str(after)] if fingerprint == _fingerprint(which):
            pass
        case _:
            raise expected
    try:
        # A name is what a token holds. Anything else does not come from this service.
        parse_key_ref(after)
    except KmsError:
        raise expected from None
    return after


def _fingerprint(which: KeyFilter) -> str:
    parts = [which.key_type, which.purpose, which.status, which.name_prefix, which.lineage]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def to_sign(request: crypto_pb2.SignRequest) -> ToSign:
    """Return what a Sign request is about."""
    return ToSign(**_signing_fields(request))


def to_verify(request: crypto_pb2.VerifyRequest) -> ToVerify:
    """Return what a Verify request is about."""
    return ToVerify(**_signing_fields(request), signature=request.signature, require_low_s=request.require_low_s)


def _signing_fields(request: crypto_pb2.SignRequest | crypto_pb2.VerifyRequest) -> dict[str, Any]:
    source = request.WhichOneof("input")
    if source is None:
        raise malformed("input", "expected a message or a digest")
    return {
        "key": parse_key_ref(request.key),
        "data": request.digest if source == "digest" else request.message,
        "is_digest": source == "digest",
        "scheme": enums.optional(enums.SCHEMES, request.scheme, "scheme"),
        "hash": enums.optional(enums.HASHES, request.hash, "hash"),
        "form": enums.optional(enums.FORMS, request.format, "format"),
    }


def wire_signature(signature: Signature) -> crypto_pb2.SignResponse:
    """Return a signature as a client sees it."""
    hash_ = signature.algorithm.hash
    return crypto_pb2.SignResponse(
        signature=signature.signature,
        key_id=str(signature.key_id),
        scheme=enums.number_of(enums.SCHEMES, signature.algorithm.scheme),
        hash=enums.number_of(enums.HASHES, hash_) if hash_ else crypto_pb2.HASH_ALGORITHM_UNSPECIFIED,
    )


def wire_verification(verification: Verification) -> crypto_pb2.VerifyResponse:
    """Return a verification as a client sees it."""
    return crypto_pb2.VerifyResponse(valid=verification.is_valid, key_id=str(verification.key_id))


def wire_encrypted(encrypted: Encrypted) -> crypto_pb2.EncryptResponse:
    """Return a ciphertext as a client sees it."""
    return crypto_pb2.EncryptResponse(ciphertext=encrypted.ciphertext, key_id=str(encrypted.key_id))


def wire_decrypted(decrypted: Decrypted) -> crypto_pb2.DecryptResponse:
    """Return a plaintext as a client sees it."""
    return crypto_pb2.DecryptResponse(plaintext=decrypted.plaintext, key_id=str(decrypted.key_id))


def wire_reencrypted(moved: ReEncrypted) -> crypto_pb2.ReEncryptResponse:
    """Return a ciphertext that was moved to another key as a client sees it."""
    return crypto_pb2.ReEncryptResponse(
        ciphertext=moved.ciphertext, key_id=str(moved.key_id), source_key_id=str(moved.source_key_id)
    )


def to_encrypt(request: crypto_pb2.EncryptRequest) -> ToEncrypt:
    """Return what an Encrypt request is about."""
    oaep_hash = enums.optional(enums.HASHES, request.oaep_hash, "oaep_hash")
    return ToEncrypt(parse_key_ref(request.key), request.plaintext, request.aad, oaep_hash)


def to_decrypt(request: crypto_pb2.DecryptRequest) -> ToDecrypt:
    """Return what a Decrypt request is about."""
    if request.format not in crypto_pb2.CiphertextFormat.values():
        raise malformed("format", f"expected a number from 0 to {max(crypto_pb2.CiphertextFormat.values())}")
    return ToDecrypt(
        ciphertext=request.ciphertext,
        aad=request.aad,
        key=parse_key_ref(request.key) if request.key else None,
        raw_oaep=request.format == crypto_pb2.CIPHERTEXT_FORMAT_RAW_RSA_OAEP,
        oaep_hash=enums.optional(enums.HASHES, request.oaep_hash, "oaep_hash"),
        uses=tuple(_uses(request)),
    )


def to_reencrypt(request: crypto_pb2.ReEncryptRequest) -> ToReEncrypt:
    """Return what a ReEncrypt request is about."""
    return ToReEncrypt(
        ciphertext=request.ciphertext,
        aad=request.aad,
        source_key=parse_key_ref(request.source_key, field="source_key") if request.source_key else None,
        key=parse_key_ref(request.key) if request.key else None,
        new_aad=request.new_aad if request.HasField("new_aad") else None,
        oaep_hash=enums.optional(enums.HASHES, request.oaep_hash, "oaep_hash"),
        uses=tuple(_uses(request)),
    )


def _uses(request: crypto_pb2.DecryptRequest | crypto_pb2.ReEncryptRequest) -> Iterator[Use]:
    yield Use.PROCESS
    if request.allow_compromised:
        yield Use.PROCESS_COMPROMISED
    if request.allow_revoked:
        yield Use.PROCESS_REVOKED


def to_generate(request: crypto_pb2.GenerateDataKeyRequest) -> ToGenerate:
    """Return what a GenerateDataKey request is about: 32 bytes unless it gives a size."""
    size_bytes = request.size_bytes or DATA_KEY_BYTES_DEFAULT
    return ToGenerate(parse_key_ref(request.key), size_bytes, request.aad, request.without_plaintext)


def repeatable(
    request: crypto_pb2.SignRequest
    | crypto_pb2.EncryptRequest
    | crypto_pb2.ReEncryptRequest
    | crypto_pb2.GenerateDataKeyRequest
    | keys_pb2.CreateKeyRequest
    | rotation_pb2.RotateKeyRequest
    | certificates_pb2.IssueCertificateRequest
    | certificates_pb2.RenewCertificateRequest,
) -> RepeatableRequest | None:
    """Return the idempotency id of a request with what it stands for. None: the request has no id."""
    if not request.request_id:
        return None
    rpc = request.DESCRIPTOR.name.removesuffix("Request")
    return RepeatableRequest(rpc, request.request_id, request.SerializeToString(deterministic=True))


def moment(request: Message, field: str) -> datetime | None:
    """Return the moment in *field*, aware and in UTC, None if it is absent. Raises MALFORMED for one that is none."""
    if not request.HasField(field):
        return None
    stamp: Timestamp = getattr(request, field)
    return parse_moment(stamp.seconds, stamp.nanos, field=field)


def span(request: Message, field: str) -> timedelta | None:
    """Return the span of time in *field*, None if it is absent. Raises MALFORMED for one that is none."""
    if not request.HasField(field):
        return None
    duration: Duration = getattr(request, field)
    return parse_span(duration.seconds, duration.nanos, field=field)


def version(request: Moves) -> int | None:
    """Return the version that the caller has seen, None for any, or raise MALFORMED."""
    return parse_optional_number(request.version, field="version")


def update(request: keys_pb2.UpdateKeyRequest) -> Change:
    """Return what an update changes, or raise MALFORMED for one that changes nothing."""
    change = Change(
        max_usage_count=usage_limit(request),
        expires_at=moment(request, "expires_at"),
        metadata=dict(request.metadata.entries) if request.HasField("metadata") else None,
    )
    if change == Change():
        raise malformed("request", "expected max_usage_count, expires_at or metadata")
    return change


def usage_limit(request: keys_pb2.CreateKeyRequest | keys_pb2.UpdateKeyRequest) -> int | None:
    """Return `max_usage_count`, None if it is absent, or raise MALFORMED."""
    if not request.HasField("max_usage_count"):
        return None
    return parse_number(request.max_usage_count, field="max_usage_count", least=1)
