"""CRLs and OCSP answers in PostgreSQL, and which certificates they are about. See `Crls` and `Answers`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

import structlog

from kms.certificates.certificate import Certificate, serial_text
from kms.certificates.crl import CRL_INTERVAL, CRL_LIFETIME, Crl
from kms.certificates.postgres.certificates import StoredCertificates
from kms.certificates.revocation_ports import NewAnswer, StoredCrl
from kms.domain.errors import KmsError, Reason
from kms.store.pool import AS_JOB, Pool

FIND_CRL: Final = "SELECT number, crl FROM cryptography.crls WHERE issuer_id = %(issuer)s AND shard = %(shard)s"
REVOKED: Final = """
    SELECT id, serial_number FROM cryptography.certificates
    WHERE issuer_id = %(issuer)s AND crl_shard = %(shard)s AND revocation_status = 'revoked'
        AND not_after >= coalesce(%(since)s::timestamptz, '-infinity')
"""
STORE_CRL: Final = """
    SELECT cryptography.store_crl(
        %(issuer)s, %(shard)s, %(previous)s, %(number)s, %(crl)s, %(entries)s, %(this_update)s, %(next_update)s
    ) AS verdict
"""
CRLS_TO_LOOK_AT: Final = "SELECT issuer_id, shard FROM cryptography.crls_to_look_at(%(seconds)s, %(limit)s)"
CRL_STATUS: Final = """
    SELECT a.name, a.generation, count(*) AS shards, min(c.next_update - clock_timestamp()) AS left,
        max(clock_timestamp() - c.this_update) AS age, coalesce(sum(c.entries), 0)::bigint AS entries
    FROM cryptography.crls AS c JOIN cryptography.certificate_authorities AS a ON a.id = c.issuer_id
    WHERE a.not_after > clock_timestamp()
    GROUP BY a.name, a.generation
    ORDER BY a.name, a.generation
    LIMIT 1000
"""
FIND_ANSWER: Final = """
    SELECT answer FROM cryptography.ocsp_answers
    WHERE issuer_id = %(issuer)s AND serial_number = %(serial)s AND hash_name = %(hash)s
"""
STORE_ANSWER: Final = """
    SELECT cryptography.store_ocsp_answer(
        %(issuer)s, %(serial)s, %(hash)s, %(answer)s, %(is_revoked)s, %(this_update)s, %(next_update)s
    )
"""
MISSING: Final = "SELECT id FROM cryptography.certificates_without_ocsp_answer(%(issuer)s, %(good_until)s, %(limit)s)"
FORGET: Final = "SELECT cryptography.forget_ocsp_answers(%(limit)s) AS removed"
FORGET_MAX: Final = 10_000
_READ_MAX: Final = 200
ISSUERS: Final = """
    SELECT id FROM cryptography.certificate_authorities
    WHERE certificate IS NOT NULL AND not_after > clock_timestamp()
    ORDER BY id
"""
RESPONDERS: Final = """
    SELECT id FROM cryptography.certificates
    WHERE issuer_id = %(issuer)s AND profile = 'ocsp' AND not_after > clock_timestamp()
    ORDER BY not_after DESC
    LIMIT 10
"""
_LOG = structlog.get_logger("kms.certificates")


@dataclass(frozen=True, slots=True)
class CrlStatus:
    """How the CRLs of an authority are: how many, how old the oldest is and for how long all are good, and what they list."""

    authority: str
    shards: int
    age_seconds: float
    left_seconds: float
    entries: int

    @property
    def warning(self) -> str:
        """Return the warning for an operator, or an empty text. A CRL is made anew long before half of its life is over."""
        if self.left_seconds > CRL_LIFETIME.total_seconds() / 2:
            return ""
        if self.left_seconds <= 0:
            return f"a CRL of the authority {self.authority} has ended: who verifies a certificate refuses it"
        return f"a CRL of the authority {self.authority} ends in {self.left_seconds / 3600:.0f} hours, and no new one is made"


@dataclass(frozen=True, slots=True)
class StoredCrls:
    """`Crls` in PostgreSQL."""

    pool: Pool
    certificates: StoredCertificates

    async def find(self, issuer_id: UUID, shard: int) -> StoredCrl | None:
        """See `Crls.find`."""
        rows = await self.pool.fetch(AS_JOB, FIND_CRL, {"issuer": issuer_id, "shard": shard})
        return StoredCrl(rows[0]["number"], rows[0]["crl"]) if rows else None

    async def revoked(self, issuer_id: UUID, shard: int, since: datetime | None) -> Mapping[int, UUID]:
        """See `Crls.revoked`."""
        rows = await self.pool.fetch(AS_JOB, REVOKED, {"issuer": issuer_id, "shard": shard, "since": since})
        return {int(row["serial_number"], 16): row["id"] for row in rows}

    async def proven(self, certificate_ids: Sequence[UUID]) -> Sequence[Certificate]:
        """See `Crls.proven`."""
        revoked = list[Certificate]()
        for start in range(0, len(certificate_ids), _READ_MAX):
            for certificate in await self._proven(certificate_ids[start : start + _READ_MAX]):
                if certificate.revocation is not None:
                    await self.certificates.note_revoked(certificate)
                    revoked.append(certificate)
        return revoked

    async def _proven(self, certificate_ids: Sequence[UUID]) -> Sequence[Certificate]:
        """Return those of the certificates that are as the service left them. Where one is not, each is read alone."""
        try:
            return await self.certificates.find_each(certificate_ids)
        except KmsError as error:
            if error.reason is not Reason.RECORD_INVALID:
                raise
        if len(certificate_ids) == 1:
            _LOG.error("not on the CRL: the certificate's record is not ours", certificate=str(certificate_ids[0]))
            return ()
        return [found for each in certificate_ids for found in await self._proven([each])]

    async def store(self, issuer_id: UUID, shard: int, previous: int, crl: Crl, der: bytes) -> bool:
        """See `Crls.store`."""
        parameters = {
            "issuer": issuer_id,
            "shard": shard,
            "previous": previous,
            "number": crl.number,
            "crl": der,
            "entries": len(crl.entries),
            "this_update": crl.this_update,
            "next_update": crl.next_update,
        }
        return bool((await self.pool.fetch(AS_JOB, STORE_CRL, parameters))[0]["verdict"] == "OK")

    async def to_look_at(self, limit: int) -> Sequence[tuple[UUID, int]]:
        """See `Crls.to_look_at`."""
        parameters = {"seconds": CRL_INTERVAL.total_seconds(), "limit": limit}
        rows = await self.pool.fetch(AS_JOB, CRLS_TO_LOOK_AT, parameters)
        return [(row["issuer_id"], row["shard"]) for row in rows]


@dataclass(frozen=True, slots=True)
class StoredAnswers:
    """`Answers` in PostgreSQL."""

    pool: Pool

    async def find(self, issuer_id: UUID, serial_number: int, hash_name: str) -> bytes | None:
        """See `Answers.find`."""
        parameters = {"issuer": issuer_id, "serial": serial_text(serial_number), "hash": hash_name}
        rows = await self.pool.fetch(AS_JOB, FIND_ANSWER, parameters)
        return bytes(rows[0]["answer"]) if rows else None

    async def store(self, issuer_id: UUID, serial_number: int, answer: NewAnswer) -> None:
        """See `Answers.store`."""
        parameters = {
            "issuer": issuer_id,
            "serial": serial_text(serial_number),
            "hash": answer.hash_name,
            "answer": answer.answer,
            "is_revoked": answer.is_revoked,
            "this_update": answer.this_update,
            "next_update": answer.next_update,
        }
        await self.pool.fetch(AS_JOB, STORE_ANSWER, parameters)

    async def missing(self, issuer_id: UUID, good_until: datetime, limit: int) -> Sequence[UUID]:
        """See `Answers.missing`."""
        parameters = {"issuer": issuer_id, "good_until": good_until, "limit": limit}
        return [row["id"] for row in await self.pool.fetch(AS_JOB, MISSING, parameters)]

    async def forget(self) -> None:
        """See `Answers.forget`."""
        while (await self.pool.fetch(AS_JOB, FORGET, {"limit": FORGET_MAX}))[0]["removed"] >= FORGET_MAX:
            pass

    async def issuer_ids(self) -> Sequence[UUID]:
        """See `Answers.issuer_ids`."""
        return [row["id"] for row in await self.pool.fetch(AS_JOB, ISSUERS)]

    async def responder_ids(self, issuer_id: UUID) -> Sequence[UUID]:
        """See `Answers.responder_ids`."""
        return [row["id"] for row in await self.pool.fetch(AS_JOB, RESPONDERS, {"issuer": issuer_id})]


async def read_crl_status(pool: Pool) -> Sequence[CrlStatus]:
    """Return how the CRLs of each authority are that has not ended, of at most 1,000. Raises STORE_UNAVAILABLE."""
    return [
        CrlStatus(
            authority=f"{row['name']}/{row['generation']}",
            shards=row["shards"],
            age_seconds=row["age"].total_seconds(),
            left_seconds=row["left"].total_seconds(),
            entries=row["entries"],
        )
        for row in await pool.fetch(AS_JOB, CRL_STATUS)
    ]
