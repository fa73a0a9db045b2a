"""An authority in a database, with its certificates and all that publishes about them. Its keys are in memory, not in a token.

What signs and what makes MACs can be taken away, and so can the journal. Everything else is the service's own.
"""

import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from kms.app.ports import Call, User
from kms.app.records import Records
from kms.certificates.authority import Authority, AuthorityRef, AuthorityStatus, IssuerGrant
from kms.certificates.certificate import Certificate
from kms.certificates.crls import CrlPublishing
from kms.certificates.issuer import Draft
from kms.certificates.ocsp import OcspAnswering
from kms.certificates.postgres.authorities import StoredAuthorities
from kms.certificates.postgres.certificates import StoredCertificates
from kms.certificates.postgres.journaled import KnownRevocations
from kms.certificates.postgres.revocations import StoredAnswers, StoredCrls
from kms.certificates.profiles import BUILT_IN
from kms.certificates.publishing.locks import ShardLocks
from kms.certificates.publishing.publications import RememberedPublications
from kms.certificates.responders import Responders
from kms.certificates.revocation_jobs import OcspRounds
from kms.certificates.revoking import Revoking
from kms.certificates.x509.signing import Unsigned
from kms.domain.algorithms import KeyType, Purpose, key_spec
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyId, KeyName, UserId
from kms.domain.keys import Custody, KeyIdentity, KeyRecord
from kms.domain.lifecycle import State
from kms.domain.permissions import Permission
from kms.store.journal import Journal
from kms.store.journal_knowledge import JournalKnowledge
from kms.store.pool import Pool
from tests.certificates.memory_authority import MemoryAuthority, authority, signature
from tests.fixtures.postgres import Database
from tests.store.acting import add_user

_KEY = """
    INSERT INTO cryptography.keys (
        id, user_id, key_name, key_type, key_purpose, key_curve, public_key, encrypted_private_key, key_strength, custody, origin,
        bound_to
    ) VALUES (%s, %s, %s, 'secp256r1', 'signing', 'secp256r1', %s, 'x', 256, 'SEALED', 'GENERATED', %s)
"""
_PUBLIC_KEY = "-----BEGIN PUBLIC KEY-----\nMA==\n-----END PUBLIC KEY-----\n"  # nobody reads it
_HOUR = timedelta(hours=1)


@dataclass
class Token:
    """Makes MACs and signatures, unless it is away. `signatures` counts them."""

    keys: dict[KeyId, MemoryAuthority] = field(default_factory=dict)
    is_away: bool = False
    signatures: int = 0

    async def mac(self, data: bytes) -> bytes:
        self._check()
        return hmac.digest(b"key", data, "sha256")

    async def sign_for(self, call: Call | None, issuer: Authority, unsigned: Unsigned, details: Mapping[str, str]) -> bytes:
        return await self.sign(call, issuer.key_owner_id, issuer.key_id, "certificate-authority", unsigned, details)

    async def sign(
        self, call: Call | None, owner: UserId, key_id: KeyId, bound_to: str, unsigned: Unsigned, details: Mapping[str, str]
    ) -> bytes:
        self._check()
        self.signatures += 1
        return unsigned.signed(signature(self.keys[key_id].key, unsigned.to_sign))

    def _check(self) -> None:
        if self.is_away:
            raise KmsError(Reason.HSM_UNAVAILABLE, "the token does not answer")


@dataclass
class Allowance:
    """What may be signed on demand."""

    left: int = 1_000

    def take(self) -> bool:
        self.left -= 1
        return self.left >= 0


@dataclass
class StoredAuthority:
    """The authority `root`, its manager, and a worker of the service. Its members belong to one process, so they change."""

    pool: Pool
    database: Database
    memory: MemoryAuthority
    token: Token
    allowance: Allowance
    journal: Journal
    manager: Call
    service_user: UserId
    authority_id: UUID
    seconds: float = 0.0
    has_journal: bool = True
    signer_lives: timedelta = 24 * _HOUR
    _serial_number: int = 1000
    _signers: dict[KeyName, tuple[KeyId, ec.EllipticCurvePrivateKey]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin a process that remembers nothing."""
        knowledge = JournalKnowledge(self.journal.path) if self.has_journal else None
        journal = self.journal if self.has_journal else None
        records = Records(self.token.mac, lambda: datetime.now(UTC))
        self.authorities = StoredAuthorities(self.pool, records, knowledge, journal)
        self.certificates = StoredCertificates(self.pool, records, knowledge, journal)
        known = KnownRevocations(knowledge)
        crls, self.answers = StoredCrls(self.pool, self.certificates), StoredAnswers(self.pool)
        self.publishing = CrlPublishing(self.authorities, self.certificates, crls, self.token, known, ShardLocks())
        responders = Responders(self.authorities, self.certificates, self.answers, self, self, BUILT_IN["ocsp"], ShardLocks())
        self.answering = OcspAnswering(
            self.authorities, self.certificates, self.answers, self.token, responders, known, self.allowance
        )
        self.rounds = OcspRounds(self.authorities, responders, self.answering, self.answers)
        self.revoking = Revoking(self.authorities, self.certificates, self.publishing)
        self.publications = RememberedPublications(
            self.authorities, self.publishing, self.answering, lambda: datetime.now(UTC), lambda: self.seconds
        )

    async def read(self) -> Authority:
        found = await self.authorities.find(AuthorityRef(authority_id=self.authority_id))
        assert found is not None
        return found

    async def issue(
        self, *, owner: UserId | None = None, profile: str = "server", ends_in: timedelta = 24 * _HOUR, count: int = 1
    ) -> list[tuple[Certificate, MemoryAuthority]]:
        """Return certificates that were issued, each with its key."""
        return [await self._issue(owner or self.manager.user.user_id, profile, ends_in) for _ in range(count)]

    async def _issue(self, owner: UserId, profile: str, ends_in: timedelta) -> tuple[Certificate, MemoryAuthority]:
        issuer, now = await self.read(), await self.authorities.now()
        self._serial_number += 1
        key_id, key = (None, None) if profile != "ocsp" else self._signers[KeyName("ocsp/root/1")]
        leaf = self.memory.issue(self._serial_number, now=now, for_ocsp=profile == "ocsp", key=key)
        if key_id is not None:
            self.token.keys[key_id] = leaf
        intended = Certificate(
            certificate_id=uuid4(),
            owner_id=owner,
            key_id=key_id,
            issuer_id=issuer.authority_id,
            profile=profile,
            serial_number=self._serial_number,
            issuer=issuer.subject,
            subject="CN=leaf",
            names=(),
            not_before=(now - 24 * _HOUR).replace(microsecond=0),
            not_after=(now + ends_in).replace(microsecond=0),
            is_ca=False,
            tbs_sha256=bytes(32),
            requested_by=None,
            created_at=now,
            crl_shard=issuer.shard_of(self._serial_number),
        )
        await self.certificates.add(None, intended, issuer)
        issued = intended.issued(leaf.der)
        await self.certificates.complete(None, issued)
        return issued, leaf

    async def find_or_make(self, owner: UserId, name: KeyName, bound_to: str) -> KeyRecord:
        """Return the key of a signer, as `ServiceKeys` does."""
        if name not in self._signers:
            self._signers[name] = self._add_key(name, bound_to), ec.generate_private_key(ec.SECP256R1())
        key_id, key = self._signers[name]
        spec = key_spec(KeyType.SECP256R1, Purpose.SIGNING, None)
        public_key = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
        identity = KeyIdentity(key_id, owner, spec, bound_to)
        return KeyRecord(identity, name, State.ACTIVE, Custody.SEALED, public_key, 1, 0, datetime.now(UTC), {})

    async def issue_to_responder(self, authority: Authority, draft: Draft) -> Certificate:
        """Issue the certificate of a signer, as `Issuer` does."""
        certificate, _ = await self._issue(self.service_user, "ocsp", self.signer_lives)
        return certificate

    def user(self, name: str, *permissions: Permission) -> Call:
        """Return a call of a new user."""
        user_id = uuid4()
        add_user(self.database.admin_dsn, user_id, name)
        return Call(User(UserId(user_id), name, 0, frozenset(permissions)), "call", "")

    async def let(self, user: Call, profile: str) -> None:
        """Let *user* issue certificates of *profile*."""
        before = await self.read()
        grants = (*before.issuers, IssuerGrant(user.user.user_id, profile))
        await self.authorities.change(self.manager, before.changed(issuers=grants), "authority.changed", {})

    def run(self, query: str, *parameters: object) -> list[tuple[Any, ...]]:
        """Run a statement as whoever owns the database, and return its rows."""
        with psycopg.connect(self.database.admin_dsn) as connection:
            cursor = connection.execute(query.encode(), parameters)
            return cursor.fetchall() if cursor.description else []

    def _add_key(self, name: str, bound_to: str) -> KeyId:
        key_id = uuid4()
        self.run(_KEY, key_id, self.service_user, name, _PUBLIC_KEY, bound_to)
        return KeyId(key_id)

    async def _create(self, *, shards: int, ends_in: timedelta) -> None:
        key_id = self._add_key("ca/root/1", "certificate-authority")
        self.token.keys[key_id] = self.memory
        now = await self.authorities.now()
        pending = Authority(
            authority_id=self.authority_id,
            name="root",
            generation=1,
            manager_id=self.manager.user.user_id,
            key_id=key_id,
            key_owner_id=self.service_user,
            subject="CN=Test p256",
            created_at=now,
            base_url="http://pki.example.com",
            crl_shards=shards,
        )
        await self.authorities.add(self.manager, pending)
        active = replace(pending, version=2, status=AuthorityStatus.ACTIVE, certificate=self.memory.der, not_after=now + ends_in)
        await self.authorities.change(self.manager, active, "authority.activated", {})


async def stored_authority(
    pool: Pool,
    database: Database,
    directory: Path,
    *,
    shards: int = 0,
    ends_in: timedelta = 2400 * _HOUR,
    memory: MemoryAuthority | None = None,
) -> StoredAuthority:
    """Return a new authority in *database*. Its journal is in *directory*."""
    journal = Journal(directory / "journal")
    journal.begin(at=datetime.now(UTC))
    manager_id, service_user = UserId(uuid4()), UserId(uuid4())
    add_user(database.admin_dsn, manager_id, "manager")
    add_user(database.admin_dsn, service_user, "kms-certificates")
    manager = Call(User(manager_id, "manager", 0, frozenset({Permission.CERTS_MANAGE})), "call", "")
    made = StoredAuthority(pool, database, memory or authority(), Token(), Allowance(), journal, manager, service_user, uuid4())
    await made._create(shards=shards, ends_in=ends_in)
    return made
