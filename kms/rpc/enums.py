"""The wire's enumerations and ours, both ways. Zero is UNSPECIFIED; a number that is in no table is MALFORMED."""

from collections.abc import Mapping
from typing import Final, TypeVar

from kms.domain.algorithms import Hash, KeyType, Purpose, Scheme, SignatureForm
from kms.domain.errors import malformed
from kms.domain.keys import Custody
from kms.domain.lifecycle import State
from kms.domain.trail import Outcome, Severity
from kms.v1 import audit_pb2, crypto_pb2, keys_pb2

T = TypeVar("T")
N = TypeVar("N", bound=int)

KEY_TYPES: Final[Mapping["keys_pb2.KeyType.ValueType", KeyType]] = {
    keys_pb2.KEY_TYPE_SECP256K1: KeyType.SECP256K1,
    keys_pb2.KEY_TYPE_SECP256R1: KeyType.SECP256R1,
    keys_pb2.KEY_TYPE_ED25519: KeyType.ED25519,
    keys_pb2.KEY_TYPE_RSA: KeyType.RSA,
    keys_pb2.KEY_TYPE_AES: KeyType.AES,
}
PURPOSES: Final[Mapping["keys_pb2.KeyPurpose.ValueType", Purpose]] = {
    keys_pb2.KEY_PURPOSE_SIGNING: Purpose.SIGNING,
    keys_pb2.KEY_PURPOSE_ENCRYPTION: Purpose.ENCRYPTION,
    keys_pb2.KEY_PURPOSE_AUTHENTICATION: Purpose.AUTHENTICATION,
    keys_pb2.KEY_PURPOSE_DERIVATION: Purpose.DERIVATION,
}
STATES: Final[Mapping["keys_pb2.KeyState.ValueType", State]] = {
    keys_pb2.KEY_STATE_PRE_ACTIVE: State.PRE_ACTIVE,
    keys_pb2.KEY_STATE_ACTIVE: State.ACTIVE,
    keys_pb2.KEY_STATE_INACTIVE: State.INACTIVE,
    keys_pb2.KEY_STATE_EXPIRED: State.EXPIRED,
    keys_pb2.KEY_STATE_COMPROMISED: State.COMPROMISED,
    keys_pb2.KEY_STATE_REVOKED: State.REVOKED,
    keys_pb2.KEY_STATE_PENDING_DESTRUCTION: State.PENDING_DESTRUCTION,
    keys_pb2.KEY_STATE_DESTROYED: State.DESTROYED,
}
CUSTODIES: Final[Mapping["keys_pb2.Custody.ValueType", Custody]] = {
    keys_pb2.CUSTODY_SEALED: Custody.SEALED,
    keys_pb2.CUSTODY_WRAPPED: Custody.WRAPPED,
    keys_pb2.CUSTODY_RESIDENT: Custody.RESIDENT,
}
HASHES: Final[Mapping["crypto_pb2.HashAlgorithm.ValueType", Hash]] = {
    crypto_pb2.HASH_ALGORITHM_SHA_256: Hash.SHA_256,
    crypto_pb2.HASH_ALGORITHM_SHA_384: Hash.SHA_384,
    crypto_pb2.HASH_ALGORITHM_SHA_512: Hash.SHA_512,
    crypto_pb2.HASH_ALGORITHM_SHA3_256: Hash.SHA3_256,
    crypto_pb2.HASH_ALGORITHM_KECCAK_256: Hash.KECCAK_256,
    crypto_pb2.HASH_ALGORITHM_SHA_1: Hash.SHA_1,
}
SCHEMES: Final[Mapping["crypto_pb2.SignatureScheme.ValueType", Scheme]] = {
    crypto_pb2.SIGNATURE_SCHEME_ECDSA: Scheme.ECDSA,
    crypto_pb2.SIGNATURE_SCHEME_ED25519: Scheme.ED25519,
    crypto_pb2.SIGNATURE_SCHEME_RSA_PKCS1: Scheme.RSA_PKCS1,
    crypto_pb2.SIGNATURE_SCHEME_RSA_PSS: Scheme.RSA_PSS,
}
FORMS: Final[Mapping["crypto_pb2.SignatureFormat.ValueType", SignatureForm]] = {
    crypto_pb2.SIGNATURE_FORMAT_DER: SignatureForm.DER,
    crypto_pb2.SIGNATURE_FORMAT_RAW: SignatureForm.RAW,
    crypto_pb2.SIGNATURE_FORMAT_RECOVERABLE: SignatureForm.RECOVERABLE,
}
SEVERITIES: Final[Mapping["audit_pb2.Severity.ValueType", Severity]] = {
    audit_pb2.SEVERITY_LOW: Severity.LOW,
    audit_pb2.SEVERITY_MEDIUM: Severity.MEDIUM,
    audit_pb2.SEVERITY_HIGH: Severity.HIGH,
    audit_pb2.SEVERITY_CRITICAL: Severity.CRITICAL,
}
OUTCOMES: Final[Mapping["audit_pb2.Outcome.ValueType", Outcome]] = {
    audit_pb2.OUTCOME_SUCCESS: Outcome.SUCCESS,
    audit_pb2.OUTCOME_FAILURE: Outcome.FAILURE,
    audit_pb2.OUTCOME_BLOCKED: Outcome.BLOCKED,
}


def optional(table: Mapping[N, T], number: N, field: str) -> T | None:
    """Return what *number* stands for, None for UNSPECIFIED; raise MALFORMED for a number that is not in *table*."""
    if number == 0:
        return None
    if number not in table:
        raise malformed(field, f"expected a number from 0 to {max(table)}, not {number}")
    return table[number]


def required(table: Mapping[N, T], number: N, field: str) -> T:
    """Return what *number* stands for, or raise MALFORMED, for UNSPECIFIED too."""
    found = optional(table, number, field)
    if found is None:
        raise malformed(field, "expected a value; it is unspecified")
    return found


def number_of(table: Mapping[N, T], value: T) -> N:
    """Return the wire's number for *value*."""
    return next(number for number, known in table.items() if known == value)
