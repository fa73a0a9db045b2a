"""Authorities in `cryptography.certificate_authorities`. A row is believed only with the MAC that the service made of it."""
# ruff: noqa: S608  # queries are put together from literals alone: LiteralString, which basedpyright checks

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import Any, Final, LiteralString
from uuid import UUID

from psycopg import AsyncConnection
from psycopg import errors as pg
from psycopg.rows import DictRow
from psycopg.types.json import Jsonb

from kms.app.ports import Call
from kms.app.records import Records
from kms.certificates.authority import Authority, AuthorityRef, AuthorityStatus, IssuerGrant
from kms.certificates.postgres.clock import agreed_now
from kms.certificates.postgres.rows import json_bytes, json_moment, moment, of_call, optional_moment, texts
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyId, UserId, parse_uuid
from kms.domain.key_row import record_invalid
from kms.store.errors import Refusals, unavailable
from kms.store.journal import Journal, JournaledAuthority, authority_line
from kms.store.journal_knowledge import JournalKnowledge
from kms.store.journaled import write_first_line
from kms.store.pool import AS_JOB, Pool, as_user

COLUMNS: Final = """id, name, generation, manager_id, key_id, key_owner_id, parent_id, status, subject, path_length, certificate,
    chain, issuers, self_service, base_url, crl_shards, created_at, not_after, superseded_at, version, record_mac"""
FIND_BY_ID: Final = f"SELECT {COLUMNS} FROM cryptography.certificate_authorities WHERE id = %(id)s"
FIND_BY_NAME: Final = f"""
    SELECT {COLUMNS} FROM cryptography.certificate_authorities
    WHERE name = %(name)s AND (%(generation)s::integer IS NULL OR generation = %(generation)s)
    ORDER BY status = 'active' DESC, generation DESC
    LIMIT 1
"""
GENERATIONS: Final = f"""
    SELECT {COLUMNS} FROM cryptography.certificate_authorities WHERE name = %(name)s ORDER BY generation DESC
"""
PAGE: Final = f"""
    SELECT {COLUMNS} FROM cryptography.certificate_authorities
    WHERE name IN (
        SELECT DISTINCT n.name FROM cryptography.certificate_authorities AS n
        WHERE n.name > %(after)s
        ORDER BY n.name
        LIMIT %(limit)s
    )
    ORDER BY name, generation DESC
"""
CREATE: Final = "SELECT cryptography.create_authority(%(authority)s, %(user_version)s, %(request_id)s, %(peer)s)"
CHANGE: Final = """
    SELECT cryptography.change_authority(
        %(id)s, %(version)s, %(authority)s, %(event)s, %(details)s, %(user_version)s, %(request_id)s, %(peer)s
    ) AS verdict
"""
# Changes of one authority that come between a read and the look at the journal, one after another.
_READS_MAX: Final = 3


@dataclass(frozen=True, slots=True)
class StoredAuthorities:
    """`Authorities` in PostgreSQL."""

    pool: Pool
    records: Records
    knowledge: JournalKnowledge | None = None
    journal: Journal | None = None

    async def now(self) -> datetime:
        """See `Authorities.now`."""
        return await agreed_now(self.pool, self.records)

    async def find(self, ref: AuthorityRef) -> Authority | None:
        """See `Authorities.find`."""
        if ref.authority_id is not None:
            found = await self._read(FIND_BY_ID, {"id": ref.authority_id})
        else:
            found = await self._read(FIND_BY_NAME, {"name": ref.name, "generation": ref.generation})
        if not found:
            return None
        [authority] = found
        is_asked = authority.authority_id == ref.authority_id or (
            authority.name == ref.name and ref.generation in (None, authority.generation)
        )
        if not is_asked:
            raise record_invalid()
        return authority

    async def generations(self, name: str) -> Sequence[Authority]:
        """See `Authorities.generations`."""
        found = await self._read(GENERATIONS, {"name": name})
        if any(authority.name != name for authority in found):
            raise record_invalid()
        return found

    async def page(self, *, after: str, limit: int) -> Sequence[Authority]:
        """See `Authorities.page`."""
        return await self._read(PAGE, {"after": after, "limit": limit})

    async def add(self, call: Call, authority: Authority) -> None:
        """See `Authorities.add`."""
        parameters = {"authority": Jsonb(await self._json(authority)), **of_call(call)}
        refusals: Refusals = {pg.UniqueViolation: _name_taken}
        await self.pool.fetch(as_user(call.user.user_id), CREATE, parameters, refusals=refusals)

    async def change(self, call: Call, authority: Authority, event: str, details: Mapping[str, object]) -> None:
        """See `Authorities.change`."""
        parameters = await self._change(call, authority, event, details)
        rows = await self.pool.fetch(as_user(call.user.user_id), CHANGE, parameters)
        if rows[0]["verdict"] != "OK":
            raise _stale()
        await self._tell(authority, event)

    async def roll_over(self, call: Call, successor: Authority, predecessor: Authority) -> None:
        """See `Authorities.roll_over`."""
        # The predecessor first: of a name one generation is active at a time.
        changes = [(predecessor, "authority.superseded"), (successor, "authority.activated")]
        made = [await self._change(call, authority, event, {"name": authority.name}) for authority, event in changes]
        async with self.pool.transaction(as_user(call.user.user_id)) as connection:
            for parameters in made:
                await _change(connection, parameters)
        for authority, event in changes:
            await self._tell(authority, event)

    async def _tell(self, authority: Authority, event: str) -> None:
        """Have the journal know of the record, so that no earlier one and no other of its version is believed from now on.

        The database has had the MACs of changes that it refused, too. Raises RECORD_INVALID if the journal has another record,
        OUTCOME_UNKNOWN if it cannot be written.
        """
        if self.journal is None or self.knowledge is None:
            return
        if not self._is_known(authority):
            told, at = _journaled(authority), self.records.clock()
            line = authority_line(authority.authority_id, told, occurred_at=at, what=event)
            await write_first_line(self.journal, line, since=self.knowledge.sequence())
            if not self._is_known(authority):
                raise record_invalid()

    async def _change(self, call: Call, authority: Authority, event: str, details: Mapping[str, object]) -> dict[str, object]:
        return {
            "id": authority.authority_id,
            "version": authority.version - 1,
            "authority": Jsonb(await self._json(authority)),
            "event": event,
            "details": Jsonb(dict(details)),
            **of_call(call),
        }

    async def _json(self, authority: Authority) -> dict[str, object]:
        """Return a row with its MAC as JSON has it."""
        return {
            "id": str(authority.authority_id),
            "name": authority.name,
            "generation": authority.generation,
            "manager_id": str(authority.manager_id),
            "key_id": str(authority.key_id),
            "key_owner_id": str(authority.key_owner_id),
            "parent_id": None if authority.parent_id is None else str(authority.parent_id),
            "status": authority.status.value,
            "subject": authority.subject,
            "path_length": authority.path_length,
            "certificate": None if authority.certificate is None else json_bytes(authority.certificate),
            "chain": [json_bytes(each) for each in authority.chain],
            "issuers": list(map(str, authority.issuers)),
            "self_service": list(authority.self_service),
            "base_url": authority.base_url,
            "crl_shards": authority.crl_shards,
            "created_at": json_moment(authority.created_at),
            "not_after": json_moment(authority.not_after),
            "superseded_at": json_moment(authority.superseded_at),
            "version": authority.version,
            "record_mac": json_bytes(await self.records.mac(authority.authenticated_bytes())),
        }

    async def _read(self, query: LiteralString, parameters: Mapping[str, object]) -> list[Authority]:
        for reads_left in reversed(range(_READS_MAX)):
            found = [await self._proven(row) for row in await self.pool.fetch(AS_JOB, query, parameters)]
            # The journal may know of a change that came after the read: a read that begins now shows it.
            if not any(self._is_outdated(authority) for authority in found):
                await self._tell_each(found)
                return found
            if not reads_left:
                break
        raise record_invalid()

    async def _tell_each(self, authorities: Sequence[Authority]) -> None:
        """Have the journal know of what was read: who changed it may have been killed before, or serve on another machine."""
        try:
            for authority in authorities:
                await self._tell(authority, "read")
        except KmsError as error:
            if error.reason is not Reason.OUTCOME_UNKNOWN:
                raise
            raise unavailable(error.message) from None

    def _is_known(self, authority: Authority) -> bool:
        """Whether the journal has this record of the authority."""
        return self.knowledge is not None and self.knowledge.knows_authority(authority.authority_id, _journaled(authority))

    def _is_outdated(self, authority: Authority) -> bool:
        """Whether the journal has a later record of the authority, or another of its version."""
        known = None if self.knowledge is None else self.knowledge.authority(authority.authority_id)
        return known is not None and known.version >= authority.version and known != _journaled(authority)

    async def _proven(self, row: DictRow) -> Authority:
        authority = authority_of(row)
        await self.records.prove(authority.authenticated_bytes(), row["record_mac"], None)
        return authority


async def _change(connection: AsyncConnection[DictRow], parameters: Mapping[str, object]) -> None:
    row = await (await connection.execute(CHANGE, parameters)).fetchone()
    if row is None or row["verdict"] != "OK":
        raise _stale()


def _name_taken() -> KmsError:
    return KmsError(Reason.NAME_TAKEN, "there is an authority of that name", field="name")


def _journaled(authority: Authority) -> JournaledAuthority:
    return JournaledAuthority(authority.version, sha256(authority.authenticated_bytes()).hexdigest())


def _stale() -> KmsError:
    return KmsError(Reason.STALE, "the authority changed meanwhile: read it again")


def authority_of(row: DictRow) -> Authority:
    """Return the authority in a row. Raises RECORD_INVALID for what no row of ours has."""
    try:
        return Authority(
            authority_id=_uuid(row["id"]),
            name=str(row["name"]),
            generation=int(row["generation"]),
            manager_id=UserId(_uuid(row["manager_id"])),
            key_id=KeyId(_uuid(row["key_id"])),
            key_owner_id=UserId(_uuid(row["key_owner_id"])),
            subject=str(row["subject"]),
            created_at=moment(row["created_at"]),
            parent_id=row["parent_id"],
            path_length=row["path_length"],
            status=AuthorityStatus(row["status"]),
            certificate=row["certificate"],
            chain=tuple(row["chain"]),
            issuers=tuple(map(_grant, texts(row["issuers"]))),
            self_service=texts(row["self_service"]),
            base_url=str(row["base_url"]),
            crl_shards=int(row["crl_shards"]),
            not_after=optional_moment(row["not_after"]),
            superseded_at=optional_moment(row["superseded_at"]),
            version=int(row["version"]),
        )
    except (ValueError, TypeError, KmsError):
        raise record_invalid() from None


def _grant(text: str) -> IssuerGrant:
    user, _, profile = text.partition(" ")
    return IssuerGrant(UserId(parse_uuid(user, field="issuers")), profile)


def _uuid(value: Any) -> UUID:  # noqa: ANN401 - what a row has
    if not isinstance(value, UUID):
        raise record_invalid()
    return value
