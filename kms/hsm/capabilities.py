"""What this token can do, found out by doing it: each key type made, kept, opened, used and destroyed once."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Final, TypeVar
from uuid import UUID

import pkcs11

from kms.domain.algorithms import DIGEST_BYTES, Hash, KeySpec, KeyType, Purpose, Scheme, SignatureAlgorithm
from kms.domain.errors import KmsError
from kms.domain.ids import KeyId, UserId
from kms.domain.keys import Custody, HeldKey, KeyIdentity
from kms.hsm import mechanisms, templates
from kms.hsm.connection import Connection
from kms.hsm.envelopes import Handle, make_key, open_key, unwrap_for_use
from kms.hsm.errors import MisfitError, unavailable
from kms.hsm.operations import sign
from kms.hsm.public_keys import check_fits, read_public_key
from kms.hsm.session import TokenSession, encrypt_gcm

T = TypeVar("T")

RSA_SIGNING: Final = KeySpec(KeyType.RSA, Purpose.SIGNING, 2048)
RSA_ENCRYPTION: Final = KeySpec(KeyType.RSA, Purpose.ENCRYPTION, 2048)
PROBED: Final = (
    KeySpec(KeyType.SECP256K1, Purpose.SIGNING, 256),
    KeySpec(KeyType.SECP256R1, Purpose.SIGNING, 256),
    KeySpec(KeyType.ED25519, Purpose.SIGNING, 256),
    KeySpec(KeyType.AES, Purpose.ENCRYPTION, 256),
)
_MECHANISMS: Final = {
    KeyType.SECP256K1: mechanisms.ECDSA,
    KeyType.SECP256R1: mechanisms.ECDSA,
    KeyType.ED25519: mechanisms.EDDSA,
    KeyType.RSA: mechanisms.OAEP,
    KeyType.AES: mechanisms.GCM,
}
_RSA_MECHANISMS: Final = {Scheme.RSA_PKCS1: mechanisms.PKCS1, Scheme.RSA_PSS: mechanisms.PSS}
_NOBODY: Final = UUID(int=0)
_TIMED_ROUNDS: Final = 4
_TIMED_CALLS: Final = 100
_TIMED_BYTES: Final = 1024


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The custodies each key type and purpose was shown to work in, the OAEP hashes, and the p99 of a short operation."""

    custodies: Mapping[tuple[KeyType, Purpose], frozenset[Custody]]
    rsa_signatures: frozenset[SignatureAlgorithm]
    oaep_hashes: frozenset[Hash]
    short_p99_seconds: float

    def of(self, spec: KeySpec) -> frozenset[Custody]:
        """Return the custodies that work for *spec*'s type and purpose."""
        return self.custodies.get((spec.key_type, spec.purpose), frozenset())

    def mechanisms_of(self, key_type: KeyType, purpose: Purpose) -> list[str]:
        """Return the PKCS #11 names of the mechanisms with which keys of a type work for a purpose."""
        if key_type is KeyType.RSA and purpose is Purpose.SIGNING:
            schemes = {algorithm.scheme for algorithm in self.rsa_signatures}
            found = [_RSA_MECHANISMS[scheme] for scheme in sorted(schemes)]
        else:
            found = [_MECHANISMS[key_type]] if self.custodies.get((key_type, purpose)) else []
        return [f"CKM_{mechanism.name}" for mechanism in found]


def find_capabilities(connection: Connection) -> Capabilities:
    """Make, wrap, unwrap, use and destroy a throw-away key of each type; time short operations.

    Whatever the token refuses counts as not working. SEALED is tried only for types that cannot be wrapped. Raises
    HSM_UNAVAILABLE if the token refuses everything.
    """
    custodies = {(spec.key_type, spec.purpose): _with_residence(_best(connection, spec)) for spec in PROBED}
    signatures, oaep = _probe_rsa(connection)
    custodies[KeyType.RSA, Purpose.SIGNING] = _with_residence(Custody.WRAPPED if signatures else None)
    custodies[KeyType.RSA, Purpose.ENCRYPTION] = _with_residence(Custody.WRAPPED if oaep else None)
    if not any(custodies.values()):
        raise unavailable("the HSM makes no key of any type")
    connection.oaep_hashes = oaep
    return Capabilities(MappingProxyType(custodies), signatures, oaep, _probe(connection, _short_p99) or 1.0)


def _with_residence(best: Custody | None) -> frozenset[Custody]:
    # A key that can be made and used can also stay: the same calls with another template, which a start does not write.
    return frozenset() if best is None else frozenset((best, Custody.RESIDENT))


def _best(connection: Connection, spec: KeySpec) -> Custody | None:
    for custody in (Custody.WRAPPED, Custody.SEALED):
        if _probe(connection, lambda session, custody=custody: _round_trip(session, spec, custody)):  # type: ignore[misc]  # mypy does not type the default
            return custody
    return None


def _probe(connection: Connection, trial: Callable[[TokenSession], T]) -> T | None:
    """Return what *trial* returns, or None where the token refuses; a session of its own, since a refusal may spoil it."""
    session = connection.open_session()
    try:
        return trial(session)
    except (pkcs11.PKCS11Error, MisfitError, KmsError):
        return None
    finally:
        connection.close_session(session)


def _round_trip(session: TokenSession, spec: KeySpec, custody: Custody) -> bool:
    identity = KeyIdentity(KeyId(_NOBODY), UserId(_NOBODY), spec)
    held = HeldKey(identity, make_key(session, identity, custody), version=1)
    open_key(session, held).drop()
    return True


def _probe_rsa(connection: Connection) -> tuple[frozenset[SignatureAlgorithm], frozenset[Hash]]:
    made = _probe(connection, _make_rsa)
    if made is None:
        return frozenset(), frozenset()
    wrapped, public_key = made
    signatures = [
        SignatureAlgorithm(scheme, hash_) for scheme in (Scheme.RSA_PKCS1, Scheme.RSA_PSS) for hash_ in mechanisms.DIGEST_INFO
    ]
    # Each trial in a session of its own: SoftHSM keeps an operation active that failed for its parameters.
    signs = frozenset(one for one in signatures if _probe(connection, partial(_try_signature, wrapped, public_key, one)))
    return signs, frozenset(
        one for one in mechanisms.RSA_HASH if _probe(connection, partial(_try_oaep, wrapped, public_key, one))
    )


def _make_rsa(session: TokenSession) -> tuple[bytes, str]:
    # One pair for both purposes, since making it is the longest part of a start.
    capabilities = templates.pair_capabilities(Purpose.SIGNING) | templates.pair_capabilities(Purpose.ENCRYPTION)
    public, private = session.raw.generate_keypair(
        pkcs11.KeyType.RSA,
        RSA_SIGNING.strength_bits,
        capabilities=capabilities,
        public_template=dict(templates.SESSION_PUBLIC),
        private_template=dict(templates.CREATION),
    )
    return session.kek(session.kek_id).wrap_key(private, mechanism=mechanisms.WRAP), read_public_key(RSA_SIGNING, public)


def _try_signature(wrapped: bytes, public_key: str, algorithm: SignatureAlgorithm, session: TokenSession) -> bool:
    key = unwrap_for_use(session, RSA_SIGNING, session.kek_id, wrapped)
    check_fits(key, RSA_SIGNING, public_key, frozenset())
    digest = bytes(DIGEST_BYTES[algorithm.hash]) if algorithm.hash else b""
    return len(sign(Handle(key, is_resident=False), algorithm, digest)) * 8 == RSA_SIGNING.strength_bits


def _try_oaep(wrapped: bytes, public_key: str, hash_: Hash, session: TokenSession) -> bool:
    key = unwrap_for_use(session, RSA_ENCRYPTION, session.kek_id, wrapped)
    check_fits(key, RSA_ENCRYPTION, public_key, frozenset({hash_}))
    return True


def _short_p99(session: TokenSession) -> float:
    # The lowest of a few rounds: what another process takes from us meanwhile is not the token's slowness.
    return min(_timed_round(session) for _ in range(_TIMED_ROUNDS))


def _timed_round(session: TokenSession) -> float:
    key = session.sealing_keys[session.sealing_key_id]
    plaintext, taken = bytes(_TIMED_BYTES), []
    for _ in range(_TIMED_CALLS):
        before = time.perf_counter()
        encrypt_gcm(session.raw, key, plaintext, b"neo-kms probe")
        taken.append(time.perf_counter() - before)
    return sorted(taken)[_TIMED_CALLS * 99 // 100]
