"""Wire to domain and back: pure, and the only place where a request's fields are read."""

import base64
import binascii
import hashlib
import json

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from kms.app.encryption import DATA_KEY_BYTES_DEFAULT, ToDecrypt, ToEncrypt
from kms.app.signing import Signed, ToSign
from kms.domain.errors import KmsError, Reason, malformed
from kms.domain.ids import parse_key_name, parse_key_ref
from kms.domain.keys import KeyFilter, KeyRecord
from kms.rpc import enums
from kms.v1 import crypto_pb2, keys_pb2

PAGE_DEFAULT = 50
PAGE_MAX = 200


def refuse_unimplemented(request: Message, *fields: str) -> None:
    """Raise NOT_IMPLEMENTED if a field is set that is not enforced yet: it is never accepted and ignored."""
    present = {descriptor.name for descriptor, _ in request.ListFields()}
    for field in fields:
        if field in present:
            raise KmsError(Reason.NOT_IMPLEMENTED, f"{field}: not offered yet; leave it out", field=field)


def wire_key(key: KeyRecord) -> keys_pb2.Key:
    """Return *key* as a client sees it."""
    spec = key.identity.spec
    created_at = Timestamp()
    created_at.FromDatetime(key.created_at)
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
        created_at=created_at,
        metadata=key.metadata,
    )


def der_of(pem: str) -> bytes:
    """Return the DER inside a PEM text (RFC 7468)."""
    return base64.b64decode("".join(line for line in pem.splitlines() if not line.startswith("-----")))


def page_request(request: keys_pb2.ListKeysRequest) -> tuple[KeyFilter, str, int]:
    """Return the filter, the name to begin behind, and the page's size."""
    if request.page_size > PAGE_MAX:
        raise malformed("page_size", f"expected at most {PAGE_MAX}")
    if request.name_prefix:
        parse_key_name(request.name_prefix, field="name_prefix")
    which = KeyFilter(
        key_type=enums.optional(enums.KEY_TYPES, request.type, "type"),
        purpose=enums.optional(enums.PURPOSES, request.purpose, "purpose"),
        status=enums.optional(enums.STATES, request.state, "state"),
        name_prefix=request.name_prefix or None,
    )
    return which, _parse_page_token(request.page_token, which), request.page_size or PAGE_DEFAULT


def page_token(after: str, which: KeyFilter) -> str:
    """Return the token of the page behind the name *after*."""
    return base64.urlsafe_b64encode(json.dumps([_fingerprint(which), after]).encode()).decode()


def _parse_page_token(token: str, which: KeyFilter) -> str:
    if not token:
        return ""
    expected = malformed("page_token", "expected next_page_token of the page before, with the same filter")
    try:
        found = json.loads(base64.b64decode(token, altchars=b"-_", validate=True))
        fingerprint, after = found
        # A name is what a token holds; whatever else comes back was not made here.
        parse_key_ref(after)
    except (binascii.Error, ValueError, TypeError, KmsError, RecursionError):
        raise expected from None
    if fingerprint != _fingerprint(which):
        raise expected
    return str(after)


def _fingerprint(which: KeyFilter) -> str:
    parts = [which.key_type, which.purpose, which.status, which.name_prefix]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def to_sign(request: crypto_pb2.SignRequest | crypto_pb2.VerifyRequest) -> ToSign:
    """Return what a Sign or Verify request is about."""
    source = request.WhichOneof("input")
    if source is None:
        raise malformed("input", "expected a message or a digest")
    return ToSign(
        key=parse_key_ref(request.key),
        data=request.digest if source == "digest" else request.message,
        is_digest=source == "digest",
        scheme=enums.optional(enums.SCHEMES, request.scheme, "scheme"),
        hash=enums.optional(enums.HASHES, request.hash, "hash"),
        form=enums.optional(enums.FORMS, request.format, "format"),
    )


def signed(result: Signed) -> crypto_pb2.SignResponse:
    """Return a signature as a client sees it."""
    return crypto_pb2.SignResponse(
        signature=result.signature,
        key_id=str(result.key_id),
        scheme=enums.number_of(enums.SCHEMES, result.algorithm.scheme),
        hash=enums.number_of(enums.HASHES, result.algorithm.hash)
        if result.algorithm.hash
        else crypto_pb2.HASH_ALGORITHM_UNSPECIFIED,
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
    )


def data_key_size(request: crypto_pb2.GenerateDataKeyRequest) -> int:
    """Return the size asked for in bytes, 32 unless given."""
    return request.size_bytes or DATA_KEY_BYTES_DEFAULT
