"""The token's own keys as the database knows them: which envelopes name them, where they were seen, whether a copy exists."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal
from uuid import UUID

from kms.domain.errors import KmsError, Reason
from kms.store.errors import unavailable
from kms.store.pool import AS_JOB, Pool

READ: Final = """
    SELECT id, kind, generation, token_serial, created_at, backup_confirmed_at, retired_at, destroyed_at
    FROM cryptography.wrapping_keys
    ORDER BY kind, generation
"""
# Two services that register at once do the same: the loser waits for the winner. Every lock is taken in order of the id, as by
# whoever stores an envelope.
REGISTER: Final = """
    INSERT INTO cryptography.wrapping_keys AS known (id, kind, generation, token_serial)
    VALUES (%(id)s, %(kind)s, %(generation)s, %(serial)s)
    ON CONFLICT (kind, generation) DO UPDATE SET token_serial = excluded.token_serial WHERE known.id = excluded.id
    RETURNING id
"""
CONFIRM_BACKUP: Final = """
    UPDATE cryptography.wrapping_keys SET backup_confirmed_at = clock_timestamp()
    WHERE id = ANY (ARRAY(SELECT id FROM cryptography.wrapping_keys ORDER BY id FOR NO KEY UPDATE))
    RETURNING id
"""

RETIRE: Final = "SELECT cryptography.retire_wrapping_keys(%(generation)s, %(held)s::uuid[]) AS used"
NOTE_DESTROYED: Final = "SELECT cryptography.note_wrapping_keys_destroyed(%(generation)s)"
COUNT: Final = "SELECT kek_id, sealing_key_id, envelopes, example FROM cryptography.count_envelopes()"
PROGRESS: Final = """
    SELECT sealing_key_id, sum(moved)::bigint AS moved, sum(moved_sealed)::bigint AS moved_sealed,
        sum(not_opened)::bigint AS not_opened, max(last_moved_at) AS last_moved_at,
        (array_agg(error_message ORDER BY slice) FILTER (WHERE error_message IS NOT NULL))[1] AS error_message
    FROM cryptography.rewrapping
    GROUP BY sealing_key_id
"""

Kind = Literal["kek", "sealing"]
# What a SEALED or a RESIDENT envelope names.
_NO_KEK: Final = UUID(int=0)


@dataclass(frozen=True, slots=True)
class TokenKey:
    """A wrapping key found in the token. `key_id` is its CKA_ID; generations count from 1 per kind."""

    key_id: UUID
    kind: Kind
    generation: int


@dataclass(frozen=True, slots=True)
class WrappingKey:
    """A wrapping key that the database knows. `token_serial` is where it was last seen."""

    key_id: UUID
    kind: Kind
    generation: int
    token_serial: str
    created_at: datetime
    backup_confirmed_at: datetime | None
    retired_at: datetime | None = None
    destroyed_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Named:
    """How many envelopes name a KEK (all zeros for none) and a sealing key. None stands for what is no envelope.

    `example` is a key with such an envelope.
    """

    kek_id: UUID | None
    sealing_key_id: UUID | None
    envelopes: int
    example: UUID

    def is_of(self, keys: Collection[UUID]) -> bool:
        """Whether the envelopes name one of *keys*."""
        return self.kek_id in keys or self.sealing_key_id in keys

    def is_damaged(self, known: Collection[UUID]) -> bool:
        """Whether the envelopes name a key that is not *known*, or none."""
        return self.sealing_key_id not in known or (self.kek_id not in known and self.kek_id != _NO_KEK)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far envelopes have left a sealing key. Of those that were moved `moved_sealed` passed through the host.

    `not_opened` did not open when they were last tried. `last_moved_at` is when the last one left.
    """

    moved: int
    moved_sealed: int
    not_opened: int
    last_moved_at: datetime | None
    error_message: str


@dataclass(frozen=True, slots=True)
class StoredWrappingKeys:
    """`cryptography.wrapping_keys`."""

    pool: Pool

    async def read(self) -> Sequence[WrappingKey]:
        """Return what is known, by kind and generation."""
        rows = await self.pool.fetch(AS_JOB, READ)
        return [
            WrappingKey(
                row["id"],
                row["kind"],
                row["generation"],
                row["token_serial"],
                row["created_at"],
                row["backup_confirmed_at"],
                row["retired_at"],
                row["destroyed_at"],
            )
            for row in rows
        ]

    async def retire(self, generation: int, held: Sequence[UUID]) -> int:
        """Have no envelope name *generation* from now on, unless one does. Return how many keys have an envelope that does.

        *held* are the ids of its keys in the token.
        """
        return int((await self.pool.fetch(AS_JOB, RETIRE, {"generation": generation, "held": list(held)}))[0]["used"])

    async def note_destroyed(self, generation: int) -> None:
        """Record that the keys of *generation*, which is retired, were removed from the token."""
        await self.pool.fetch(AS_JOB, NOTE_DESTROYED, {"generation": generation})

    async def envelopes(self) -> Sequence[Named]:
        """Return how many envelopes name each pair of wrapping keys, whether these are known or not. Reads all envelopes."""
        rows = await self.pool.fetch(AS_JOB, COUNT)
        return [Named(row["kek_id"], row["sealing_key_id"], row["envelopes"], row["example"]) for row in rows]

    async def progress(self) -> dict[UUID, Progress]:
        """Return how far envelopes have left each sealing key from which they are moved."""
        rows = await self.pool.fetch(AS_JOB, PROGRESS)
        return {
            row["sealing_key_id"]: Progress(
                row["moved"], row["moved_sealed"], row["not_opened"], row["last_moved_at"], row["error_message"] or ""
            )
            for row in rows
        }

    async def register(self, found: Sequence[TokenKey], serial: str) -> None:
        """Record the keys of the token with *serial*: all of them, or none and an error.

        Raises HSM_KEK_MISSING where the database knows another key by that kind and generation: it is another token.
        """
        known = {(TokenKey(key.key_id, key.kind, key.generation), key.token_serial) for key in await self.read()}
        changed = [key for key in found if (key, serial) not in known]
        async with self.pool.transaction(AS_JOB) as connection:
            for key in sorted(changed, key=lambda key: key.key_id):
                parameters = {"id": key.key_id, "kind": key.kind, "generation": key.generation, "serial": serial}
                row = await (await connection.execute(REGISTER, parameters)).fetchone()
                if row is None:
                    raise _other_token(key)

    async def confirm_backup(self) -> int:
        """Record that a tested copy of the token exists, for all keys known by now; return their number."""
        async with self.pool.transaction(AS_JOB) as connection:
            confirmed = await (await connection.execute(CONFIRM_BACKUP)).fetchall()
            if not confirmed:
                raise unavailable("the database knows no wrapping key of the token; run `kms hsm init` first")
        return len(confirmed)


def _other_token(key: TokenKey) -> KmsError:
    return KmsError(
        Reason.HSM_KEK_MISSING,
        f"the token's {key.kind} key of generation {key.generation} is not the one that this database's keys were wrapped with; "
        "this is another token, or another database. Configure the token that this database was served with, or a copy of it "
        "(hsm.module, hsm.token_label), or the database that belongs to this token (database.dsn); nothing is lost yet",
        kind=key.kind,
    )
