"""Certificates in `cryptography.certificates`. A row is believed only with the MAC that the service made of it."""
# ruff: noqa: S608  # queries are put together from literals alone: LiteralString, which basedpyright checks

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final, LiteralString
from uuid import UUID

import structlog
from psycopg.rows import DictRow
from psycopg.types.json import Jsonb

from kms.app.ports import Call, Repeat, User
from kms.app.records import Records
from kms.certificates.authority import Authority
from kms.certificates.certificate import (
    COMPROMISES,
    Certificate,
    CertificateFilter,
    CertificatePlace,
    Issuance,
    Revocation,
    RevocationReason,
    serial_text,
)
from kms.certificates.postgres.clock import agreed_now
from kms.certificates.postgres.rows import OF_NOBODY, json_bytes, json_moment, moment, of_call, optional_moment, texts
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyId, UserId
from kms.domain.key_row import record_invalid
from kms.store.journal import Journal, JournaledCertificate, revoked_line
from kms.store.journal_knowledge import JournalKnowledge
from kms.store.journaled import write_line
from kms.store.keys import keep_answer
from kms.store.pool import AS_JOB, Acting, Pool, as_user

COLUMNS: Final = """id, user_id, key_id, issuer_id, profile, serial_number, issuer, subject, names, not_before, not_after,
    is_ca_certificate, tbs_sha256, spki_sha256, requested_by, created_at, replaces, crl_shard, issuance_status, certificate_data,
    fingerprint, revocation_status, revoked_at, revocation_reason, superseded_at, version, record_mac"""
# Row security shows a caller their own, and those of authorities that they manage or issue from.
FIND: Final = f"SELECT {COLUMNS} FROM cryptography.certificates WHERE id = %(id)s"
FIND_EACH: Final = f"SELECT {COLUMNS} FROM cryptography.certificates WHERE id = ANY (%(ids)s)"
FIND_BY_SERIAL: Final = f"""
    SELECT {COLUMNS} FROM cryptography.certificates WHERE issuer_id = %(issuer)s AND serial_number = %(serial)s
"""
OF_KEY: Final = f"""
    SELECT {COLUMNS} FROM cryptography.certificates WHERE key_id = %(key)s ORDER BY created_at DESC, id DESC LIMIT 100
"""
# What has ended is on one more CRL, so it counts for a while.
COUNT_LIVING: Final = """
    SELECT count(*) AS living
    FROM (
        SELECT FROM cryptography.certificates
        WHERE issuer_id = %(issuer)s AND not_after > clock_timestamp() - interval '2 days'
            AND (%(owner)s::uuid IS NULL OR user_id = %(owner)s) AND (%(shard)s::integer IS NULL OR crl_shard = %(shard)s)
        LIMIT 10000
    ) AS found
"""

# The reasons are `COMPROMISES`, in a form that the planner finds in the index.
COMPROMISED: Final = f"""
    SELECT {COLUMNS} FROM cryptography.certificates
    WHERE spki_sha256 = %(spki_sha256)s AND revocation_reason IN (1, 2, 10)
    LIMIT 1
"""


def _page(which: LiteralString) -> LiteralString:
    return f"""
    SELECT {COLUMNS} FROM cryptography.certificates
    WHERE {which} AND (created_at, id) < (%(created_at)s::timestamptz, %(id)s::uuid)
    ORDER BY created_at DESC, id DESC
    LIMIT %(limit)s
"""


PAGE: Final = _page("user_id = %(caller)s")
PAGE_OF_ISSUER: Final = _page("issuer_id = %(issuer)s")
PAGE_OF_KEY: Final = _page("key_id = %(key)s AND (%(issuer)s::uuid IS NULL OR issuer_id = %(issuer)s)")
ADD: Final = """
    SELECT cryptography.add_certificate(
        %(certificate)s, %(issuer_version)s, %(user_version)s, %(request_id)s, %(peer)s
    ) AS verdict
"""
COMPLETE: Final = """
    SELECT cryptography.complete_certificate(%(id)s, %(data)s, %(fingerprint)s, %(mac)s, %(request_id)s, %(peer)s) AS verdict
"""
WITHOUT_OUTCOME: Final = "SELECT cryptography.certificates_without_outcome(%(seconds)s, %(limit)s) AS id"
ABANDON: Final = "SELECT cryptography.abandon_certificate(%(id)s, %(reason)s, %(moment)s, %(mac)s) AS verdict"
REVOKE: Final = """
    SELECT cryptography.revoke_certificate(
        %(id)s, %(version)s, %(reason)s, %(moment)s, %(mac)s, %(user_version)s, %(request_id)s, %(peer)s
    ) AS verdict
"""
SUPERSEDE: Final = """
    SELECT cryptography.supersede_certificate(%(id)s, %(version)s, %(moment)s, %(mac)s, %(request_id)s, %(peer)s) AS verdict
"""
_LAST_PLACE: Final = CertificatePlace(datetime.max.replace(tzinfo=UTC), UUID(int=2**128 - 1))
# Changes of one certificate that come between a read and the look at the journal, one after another.
_READS_MAX: Final = 3
_X509: Final = "x509"
_LOG = structlog.get_logger("kms.certificates")


@dataclass(frozen=True, slots=True)
class StoredCertificates:
    """`Certificates` in PostgreSQL."""

    pool: Pool
    records: Records
    knowledge: JournalKnowledge | None = None
    journal: Journal | None = None

    async def now(self) -> datetime:
        """See `Certificates.now`."""
        return await agreed_now(self.pool, self.records)

    async def find(self, caller: User, certificate_id: UUID) -> Certificate | None:
        """See `Certificates.find`."""
        return await self._one(as_user(caller.user_id), certificate_id)

    async def find_any(self, certificate_id: UUID) -> Certificate | None:
        """See `Certificates.find_any`."""
        return await self._one(AS_JOB, certificate_id)

    async def find_each(self, certificate_ids: Sequence[UUID]) -> Sequence[Certificate]:
        """Return those of the certificates that there are, for the service itself, in any order."""
        found = await self._read(AS_JOB, FIND_EACH, {"ids": list(certificate_ids)})
        if not {certificate.certificate_id for certificate in found} <= set(certificate_ids):
            raise record_invalid()
        return found

    async def find_by_serial(self, issuer_id: UUID, serial_number: int) -> Certificate | None:
        """See `Certificates.find_by_serial`."""
        parameters = {"issuer": issuer_id, "serial": serial_text(serial_number)}
        found = await self._read(AS_JOB, FIND_BY_SERIAL, parameters)
        if any((each.issuer_id, each.serial_number) != (issuer_id, serial_number) for each in found):
            raise record_invalid()
        return found[0] if found else None

    async def is_revoked(self, issuer_id: UUID, serial_number: int) -> bool:
        """See `Certificates.is_revoked`."""
        if self.knowledge is not None and self.knowledge.revoked_certificate(issuer_id, serial_number) is not None:
            return True
        found = await self.find_by_serial(issuer_id, serial_number)
        return found is None or found.revocation is not None

    async def is_compromised(self, spki_sha256: bytes) -> bool:
        """See `Certificates.is_compromised`."""
        if self.knowledge is not None and self.knowledge.knows_compromised(spki_sha256.hex()):
            return True
        found = await self._read(AS_JOB, COMPROMISED, {"spki_sha256": spki_sha256})
        return any(each.spki_sha256 == spki_sha256 for each in found)

    async def count_living(self, issuer_id: UUID, *, owner_id: UserId | None, shard: int | None) -> int:
        """See `Certificates.count_living`."""
        parameters = {"issuer": issuer_id, "owner": owner_id, "shard": shard}
        return int((await self.pool.fetch(AS_JOB, COUNT_LIVING, parameters))[0]["living"])

    async def of_key(self, owner_id: UserId, key_id: KeyId) -> Sequence[Certificate]:
        """See `Certificates.of_key`."""
        found = await self._read(AS_JOB, OF_KEY, {"key": key_id})
        if any((each.owner_id, each.key_id) != (owner_id, key_id) for each in found):
            raise record_invalid()
        return found

    async def page(
        self, caller: User, which: CertificateFilter, *, after: CertificatePlace | None, limit: int
    ) -> Sequence[Certificate]:
        """See `Certificates.page`."""
        query = PAGE if which.issuer_id is None else PAGE_OF_ISSUER
        query = PAGE_OF_KEY if which.key_id is not None else query
        acting, place, found = as_user(caller.user_id), after or _LAST_PLACE, list[Certificate]()
        while len(found) < limit:
            parameters = {
                "caller": caller.user_id,
                "issuer": which.issuer_id,
                "key": which.key_id,
                "created_at": place.created_at,
                "id": place.certificate_id,
                "limit": limit,
            }
            rows = await self.pool.fetch(acting, query, parameters)
            found += [each for row in rows if (each := await self._ours(acting, row)) is not None]
            if len(rows) < limit:
                break
            before, place = place, CertificatePlace(rows[-1]["created_at"], rows[-1]["id"])
            if (place.created_at, place.certificate_id) >= (before.created_at, before.certificate_id):
                raise record_invalid()
        return found[:limit]

    async def _ours(self, acting: Acting, row: DictRow) -> Certificate | None:
        """Return the certificate in a row of a list, or None, which the log tells, where the row is not ours."""
        try:
            certificate = await self._proven(row)
            return await self._one(acting, certificate.certificate_id) if self._is_outdated(certificate) else certificate
        except KmsError as error:
            if error.reason is not Reason.RECORD_INVALID:
                raise
        _LOG.error("not listed: the certificate's record is not ours", certificate=str(row["id"]))
        return None

    async def add(self, call: Call | None, certificate: Certificate, issuer: Authority | None) -> None:
        """See `Certificates.add`."""
        row = Jsonb(await self._json(certificate))
        parameters = {"certificate": row, "issuer_version": None if issuer is None else issuer.version, **_of(call)}
        rows = await self.pool.fetch(_acting(call), ADD, parameters)
        if rows[0]["verdict"] != "OK":
            raise KmsError(Reason.STALE, "the authority changed meanwhile: try again")

    async def complete(self, call: Call | None, certificate: Certificate, repeat: Repeat | None = None) -> None:
        """See `Certificates.complete`."""
        parameters = {
            "id": certificate.certificate_id,
            "data": _base64(certificate.der),
            "fingerprint": certificate.fingerprint,
            "mac": await self._mac(certificate),
            **_of(call),
        }
        async with self.pool.transaction(_acting(call)) as connection:
            row = await (await connection.execute(COMPLETE, parameters)).fetchone()
            if row is None or row["verdict"] != "OK" or self._knows_revoked(certificate):
                # The database has the certificate, and a MAC of its record. Nobody is to believe them.
                revocation = Revocation(self.records.clock(), RevocationReason.CESSATION_OF_OPERATION)
                await self.note_revoked(replace(certificate, revocation=revocation))
                raise KmsError(Reason.STALE, "signing took so long that the certificate was given up: try again")
            if repeat is not None:
                await keep_answer(connection, repeat)

    async def without_outcome(self, seconds: float, limit: int) -> Sequence[UUID]:
        """See `Certificates.without_outcome`."""
        rows = await self.pool.fetch(AS_JOB, WITHOUT_OUTCOME, {"seconds": seconds, "limit": limit})
        return [row["id"] for row in rows]

    async def abandon(self, certificate: Certificate) -> bool:
        """See `Certificates.abandon`."""
        parameters = {**_revocation(certificate), "mac": await self._mac(certificate)}
        # The journal knows before another process reads the row: no record of an outcome counts from then on.
        async with self.pool.transaction(AS_JOB) as connection:
            row = await (await connection.execute(ABANDON, parameters)).fetchone()
            is_done = row is not None and row["verdict"] == "OK"
            if is_done:
                await self.note_revoked(certificate)
        return is_done

    async def revoke(self, call: Call | None, certificate: Certificate) -> bool:
        """See `Certificates.revoke`."""
        parameters = {
            **_revocation(certificate),
            "version": certificate.version - 1,
            "mac": await self._mac(certificate),
            **_of(call),
        }
        is_done = await self._is_done(call, REVOKE, parameters)
        if is_done:
            await self.note_revoked(certificate)
        return is_done

    async def note_revoked(self, certificate: Certificate) -> None:
        """See `Certificates.note_revoked`."""
        if self.journal is not None and not self._knows_revoked(certificate):
            await write_line(self.journal, revoked_line(certificate.certificate_id, _journaled(certificate)))

    async def supersede(self, call: Call | None, certificate: Certificate) -> bool:
        """See `Certificates.supersede`."""
        parameters = {
            "id": certificate.certificate_id,
            "version": certificate.version - 1,
            "moment": certificate.superseded_at,
            "mac": await self._mac(certificate),
            **_of(call),
        }
        return await self._is_done(call, SUPERSEDE, parameters)

    async def _is_done(self, call: Call | None, query: LiteralString, parameters: Mapping[str, object]) -> bool:
        rows = await self.pool.fetch(_acting(call), query, parameters)
        return bool(rows[0]["verdict"] == "OK")

    async def _one(self, acting: Acting, certificate_id: UUID) -> Certificate | None:
        found = await self._read(acting, FIND, {"id": certificate_id})
        if any(each.certificate_id != certificate_id for each in found):
            raise record_invalid()
        return found[0] if found else None

    async def _read(self, acting: Acting, query: LiteralString, parameters: Mapping[str, object]) -> list[Certificate]:
        for reads_left in reversed(range(_READS_MAX)):
            found = [await self._proven(row) for row in await self.pool.fetch(acting, query, parameters)]
            # The journal may know of a revocation that came after the read: a read that begins now shows it.
            if not any(self._is_outdated(certificate) for certificate in found):
                return found
            if not reads_left:
                break
        raise record_invalid()

    def _is_outdated(self, certificate: Certificate) -> bool:
        # An intent has no outcome yet. Who was killed while he gave it up may have written the line alone.
        is_valid = certificate.revocation is None and certificate.issuance is not Issuance.INTENDED
        return is_valid and self._knows_revoked(certificate)

    def _knows_revoked(self, certificate: Certificate) -> bool:
        return self.knowledge is not None and self.knowledge.knows_revoked(certificate.certificate_id)

    async def _proven(self, row: DictRow) -> Certificate:
        certificate = certificate_of(row)
        await self.records.prove(certificate.authenticated_bytes(), row["record_mac"], None)
        return certificate

    async def _mac(self, certificate: Certificate) -> bytes:
        return await self.records.mac(certificate.authenticated_bytes())

    async def _json(self, certificate: Certificate) -> dict[str, object]:
        """Return a new row with its MAC as JSON has it."""
        return {
            "id": str(certificate.certificate_id),
            "user_id": str(certificate.owner_id),
            "key_id": None if certificate.key_id is None else str(certificate.key_id),
            "certificate_type": _X509,
            "certificate_data": _base64(certificate.der),
            "issuer": certificate.issuer,
            "subject": certificate.subject,
            "serial_number": serial_text(certificate.serial_number),
            "not_before": json_moment(certificate.not_before),
            "not_after": json_moment(certificate.not_after),
            "fingerprint": certificate.fingerprint or None,
            "is_ca_certificate": certificate.is_ca,
            "revocation_status": "valid",
            "created_at": json_moment(certificate.created_at),
            "issuer_id": None if certificate.issuer_id is None else str(certificate.issuer_id),
            "profile": certificate.profile,
            "issuance_status": certificate.issuance.value,
            "names": list(certificate.names),
            "tbs_sha256": json_bytes(certificate.tbs_sha256),
            "spki_sha256": json_bytes(certificate.spki_sha256),
            "replaces": None if certificate.replaces is None else str(certificate.replaces),
            "requested_by": None if certificate.requested_by is None else str(certificate.requested_by),
            "crl_shard": certificate.crl_shard,
            "version": certificate.version,
            "record_mac": json_bytes(await self._mac(certificate)),
        }


def _acting(call: Call | None) -> Acting:
    return AS_JOB if call is None else as_user(call.user.user_id)


def _of(call: Call | None) -> Mapping[str, object]:
    return OF_NOBODY if call is None else of_call(call)


def _base64(der: bytes) -> str:
    return base64.b64encode(der).decode()


def _revocation(certificate: Certificate) -> dict[str, object]:
    revocation = certificate.revocation
    assert revocation is not None  # noqa: S101  # what is stored is a revocation
    return {"id": certificate.certificate_id, "reason": int(revocation.reason), "moment": revocation.at}


def _journaled(certificate: Certificate) -> JournaledCertificate:
    """Return what the journal has of a certificate of an authority that is revoked."""
    if certificate.issuer_id is None or certificate.revocation is None:
        raise AssertionError("what is stored is a revocation by an authority")
    return JournaledCertificate(
        issuer_id=certificate.issuer_id,
        serial_number=certificate.serial_number,
        shard=certificate.crl_shard,
        reason=int(certificate.revocation.reason),
        expires_at=certificate.not_after,
        revoked_at=certificate.revocation.at,
        compromised=certificate.spki_sha256.hex() if certificate.revocation.reason in COMPROMISES else "",
    )


def certificate_of(row: DictRow) -> Certificate:
    """Return the certificate in a row. Raises RECORD_INVALID for what no row of ours has."""
    try:
        is_revoked = row["revocation_status"] == "revoked"
        revocation = Revocation(moment(row["revoked_at"]), RevocationReason(row["revocation_reason"])) if is_revoked else None
        return Certificate(
            certificate_id=row["id"],
            owner_id=UserId(row["user_id"]),
            key_id=None if row["key_id"] is None else KeyId(row["key_id"]),
            issuer_id=row["issuer_id"],
            profile=str(row["profile"]),
            serial_number=int(row["serial_number"], 16),
            issuer=str(row["issuer"]),
            subject=str(row["subject"]),
            names=texts(row["names"]),
            not_before=moment(row["not_before"]),
            not_after=moment(row["not_after"]),
            is_ca=row["is_ca_certificate"] is True,
            tbs_sha256=bytes(row["tbs_sha256"]),
            spki_sha256=bytes(row["spki_sha256"]),
            requested_by=None if row["requested_by"] is None else UserId(row["requested_by"]),
            created_at=moment(row["created_at"]),
            replaces=row["replaces"],
            crl_shard=int(row["crl_shard"]),
            issuance=Issuance(row["issuance_status"]),
            der=base64.b64decode(row["certificate_data"], validate=True),
            revocation=revocation,
            superseded_at=optional_moment(row["superseded_at"]),
            version=int(row["version"]),
        )
    except (ValueError, TypeError, binascii.Error):
        raise record_invalid() from None
