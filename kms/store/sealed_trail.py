"""The port `SealedTrail`: rows of the trail in their order, and checkpoints."""
# ruff: noqa: S608  # queries are put together from literals alone: LiteralString, which basedpyright checks

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from psycopg import errors as pg
from psycopg.rows import DictRow

from kms.app.records import Records
from kms.app.trail_ports import KeptNote, StoredCheckpoint
from kms.domain.errors import KmsError, Reason
from kms.domain.history import HistoryError
from kms.domain.key_row import record_invalid
from kms.domain.merkle import Frontier
from kms.domain.trail_lines import Leaf, RowPlace, Unplaced
from kms.store.pool import AS_AUDITOR, AS_JOB, Pool

HORIZON: Final = "SELECT audit.order_horizon() AS horizon"
# Asked when rows were read: what they saw committed is below it.
NEXT_ORDER: Final = "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint + audit.order_base() AS next_order"
EPOCH: Final = """
    SELECT number, cause, begun_at, backup_created_at, system_identifier, timeline, database_oid, record_mac
    FROM cryptography.epochs
    ORDER BY number DESC
    LIMIT 1
"""
# Planning a range anew, over every partition, costs ten times as much as reading it.
ANY_RANGE: Final = "SELECT set_config('plan_cache_mode', 'force_generic_plan', true)"
LINES: Final = """
    SELECT commit_order, table_name, id, line
    FROM audit.trail_lines(%(order)s, %(table)s, %(id)s, %(below)s, %(limit)s)
"""
LEAVES: Final = r"""
    SELECT commit_order, table_name, id, sha256('\x00'::bytea || convert_to(line, 'UTF8')) AS hash
    FROM audit.trail_lines(%(order)s, %(table)s, %(id)s, %(below)s, %(limit)s)
"""
# The columns are NOT NULL, until somebody who may says otherwise.
UNPLACED: Final = """
    (SELECT 'audit.domain_events' AS table_name, id FROM audit.domain_events WHERE commit_order IS NULL LIMIT 1)
    UNION ALL
    (SELECT 'audit.security_events', id FROM audit.security_events WHERE commit_order IS NULL LIMIT 1)
"""
_CHECKPOINT: Final = "SELECT tree_size, root_hash, horizon, frontier, epoch, note FROM audit.checkpoints"
LAST: Final = f"{_CHECKPOINT} ORDER BY tree_size DESC LIMIT 1"
AT: Final = f"{_CHECKPOINT} WHERE tree_size = %(size)s"
# Where partitions were archived, the rows behind the first checkpoint that reaches beyond them are all there; where none does,
# those behind the last that were not archived too.
AT_MOST: Final = f"""
    {_CHECKPOINT}
    WHERE tree_size = greatest(
        (SELECT max(tree_size) FROM audit.checkpoints WHERE tree_size <= %(size)s),
        coalesce(
            (
                SELECT tree_size FROM audit.checkpoints
                WHERE horizon > (SELECT max(last_order) FROM audit.archived_partitions)
                ORDER BY horizon LIMIT 1
            ),
            (SELECT max(tree_size) FROM audit.checkpoints WHERE EXISTS (SELECT FROM audit.archived_partitions))
        )
    )
"""
NOTES: Final = """
    SELECT tree_size, horizon, note FROM audit.checkpoints WHERE tree_size > %(size)s ORDER BY tree_size LIMIT %(limit)s
"""
NOTES_SINCE: Final = """
    SELECT note, horizon FROM audit.checkpoints
    WHERE (epoch, tree_size) > (%(epoch)s, %(size)s) ORDER BY epoch, tree_size LIMIT %(limit)s
"""
APPEND: Final = """
    SELECT audit.append_checkpoint(
        %(previous)s, %(size)s, %(root)s, %(horizon)s, %(frontier)s::bytea[], %(epoch)s, %(note)s
    )
"""
# Counted to 10,000: what waits is next to nothing, or sealing has stopped.
STATUS: Final = """
    SELECT coalesce(last.tree_size, 0) AS tree_size,
        extract(epoch FROM clock_timestamp() - last.created_at)::double precision AS seconds_since, (
        SELECT count(*) FROM (
            (SELECT FROM audit.security_events WHERE commit_order >= coalesce(last.horizon, 0) LIMIT 10000)
            UNION ALL
            (SELECT FROM audit.domain_events WHERE commit_order >= coalesce(last.horizon, 0) LIMIT 10000)
        ) AS behind
    ) AS waiting
    FROM (SELECT) AS one
        LEFT JOIN (SELECT tree_size, created_at, horizon FROM audit.checkpoints ORDER BY tree_size DESC LIMIT 1) AS last ON TRUE
"""


@dataclass(frozen=True, slots=True)
class SealStatus:
    """How far the trail is sealed: rows under the last checkpoint, how long ago it was made, and rows behind it.

    `waiting` counts to 10,000 in each table, and what is not committed is not in it.
    """

    tree_size: int
    seconds_since: float | None
    waiting: int


@dataclass(frozen=True, slots=True)
class StoredSealedTrail:
    """`SealedTrail` in `audit.domain_events`, `audit.security_events` and `audit.checkpoints`."""

    pool: Pool
    records: Records | None = None

    async def horizon(self) -> int:
        """Return the order below which no row appears any more."""
        return int((await self.pool.fetch(AS_AUDITOR, HORIZON))[0]["horizon"])

    async def next_order(self) -> int:
        """Return an order that is above that of every row that was seen before."""
        return int((await self.pool.fetch(AS_AUDITOR, NEXT_ORDER))[0]["next_order"])

    async def epoch(self) -> int:
        """Return the number of the epoch. Raises RECORD_INVALID for one that is gone or planted, where *records* can tell."""
        rows = await self.pool.fetch(AS_JOB, EPOCH)
        if not rows:
            raise record_invalid()
        epoch = rows[0]
        if self.records is not None:
            await self.records.prove_epoch(epoch)
        return int(epoch["number"])

    async def leaves(self, after: RowPlace, below: int | None, limit: int) -> Sequence[Leaf]:
        """Return about *limit* rows that stand behind *after*, of an order below *below* (None: to the end), hashed."""
        _, rows = await self.pool.fetch_each(AS_AUDITOR, (ANY_RANGE, None), (LEAVES, _range(after, below, limit)))
        return [Leaf(_place(row), row["hash"]) for row in rows]

    async def lines(self, after: RowPlace, below: int | None, limit: int) -> Sequence[tuple[RowPlace, str]]:
        """Return the same rows, each as its canonical line."""
        _, rows = await self.pool.fetch_each(AS_AUDITOR, (ANY_RANGE, None), (LINES, _range(after, below, limit)))
        return [(_place(row), row["line"]) for row in rows]

    async def unplaced(self) -> Sequence[Unplaced]:
        """Return a row without an order of each table that has one."""
        return [Unplaced(row["table_name"], str(row["id"])) for row in await self.pool.fetch(AS_AUDITOR, UNPLACED)]

    async def last(self) -> StoredCheckpoint | None:
        """Return the newest checkpoint."""
        return _checkpoint(await self.pool.fetch(AS_AUDITOR, LAST))

    async def at_most(self, size: int) -> StoredCheckpoint | None:
        """Return the newest checkpoint with at most *size* rows, or the oldest whose later rows are all in the database."""
        return _checkpoint(await self.pool.fetch(AS_AUDITOR, AT_MOST, {"size": size}))

    async def notes(self, after_size: int, limit: int) -> Sequence[tuple[int, int, str]]:
        """Return size, horizon and note of at most *limit* checkpoints with more than *after_size* rows, in their order."""
        rows = await self.pool.fetch(AS_AUDITOR, NOTES, {"size": after_size, "limit": limit})
        return [(row["tree_size"], row["horizon"], row["note"]) for row in rows]

    async def at(self, size: int) -> StoredCheckpoint | None:
        """Return the checkpoint of *size* rows."""
        return _checkpoint(await self.pool.fetch(AS_AUDITOR, AT, {"size": size}))

    async def notes_since(self, epoch: int, size: int, limit: int) -> Sequence[KeptNote]:
        """Return the notes after that of *size* rows in *epoch*, at most *limit*, in the order in which they were made."""
        rows = await self.pool.fetch(AS_AUDITOR, NOTES_SINCE, {"epoch": epoch, "size": size, "limit": limit})
        return [KeptNote(row["note"], row["horizon"]) for row in rows]

    async def append(self, previous_size: int, checkpoint: StoredCheckpoint) -> None:
        """Append a checkpoint behind that of *previous_size* rows, or raise STALE where that is not the last."""
        parameters = {
            "previous": previous_size,
            "size": checkpoint.tree.size,
            "root": checkpoint.tree.root(),
            "horizon": checkpoint.horizon,
            "frontier": list(checkpoint.tree.hashes),
            "epoch": checkpoint.epoch,
            "note": checkpoint.note,
        }
        async with self.pool.transaction(AS_JOB) as connection:
            try:
                await (await connection.execute(APPEND, parameters)).fetchone()
            except pg.SerializationFailure:
                raise KmsError(Reason.STALE, "another worker has sealed these rows") from None

    async def status(self) -> SealStatus:
        """Return how far the trail is sealed."""
        return SealStatus(**(await self.pool.fetch(AS_AUDITOR, STATUS))[0])


def _range(after: RowPlace, below: int | None, limit: int) -> dict[str, object]:
    return {"order": after.order, "table": after.table, "id": after.row_id, "below": below, "limit": limit}


def _place(row: DictRow) -> RowPlace:
    return RowPlace(row["commit_order"], row["table_name"], str(row["id"]))


def _checkpoint(rows: Sequence[DictRow]) -> StoredCheckpoint | None:
    if not rows:
        return None
    row = rows[0]
    try:
        tree = Frontier(row["tree_size"], tuple(row["frontier"]))
    except ValueError:
        tree = None
    if tree is None or tree.root() != row["root_hash"]:
        size = row["tree_size"]
        raise HistoryError(f"a checkpoint of {size} rows whose tree has its root hash", "one that was changed")
    return StoredCheckpoint(tree, row["horizon"], row["epoch"], row["note"])
