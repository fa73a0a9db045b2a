"""What jobs keep in PostgreSQL: locks that one worker of the deployment holds at a time, and leases of items of work."""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, LiteralString
from uuid import UUID

from kms.domain.errors import KmsError
from kms.domain.key_row import record_invalid
from kms.jobs.job import Work
from kms.jobs.leases import Claim, LeaseLostError, LeasePolicy
from kms.store.batches import DirectConnection, connect
from kms.store.errors import translated, unavailable
from kms.store.pool import AS_JOB, Parameters, Pool

# Two numbers name the lock: other advisory locks of the service have one, so that no job's name meets them.
TAKE_LOCK: Final = "SELECT pg_try_advisory_lock(hashtext('kms.jobs'), hashtext(%(job)s)) AS is_held"
FREE_LOCK: Final = "SELECT pg_advisory_unlock(hashtext('kms.jobs'), hashtext(%(job)s)) AS was_held"
_ANSWER_SECONDS: Final = 5.0
_LOOK_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class AdvisoryLocks:
    """`DeploymentLocks` of the database that `settings` lead to.

    Each lock lives as long as its own connection, outside any transaction, so that it holds nobody up. PostgreSQL frees the
    lock of a worker that dies. A worker whose connection breaks may still be in its round when the next worker begins: the
    round is cancelled as soon as this worker notices. So a round must stay harmless when two workers do it.
    """

    settings: Mapping[str, Any]

    async def run_alone(self, name: str, work: Work) -> bool:
        """See `DeploymentLocks.run_alone`. Raises STORE_UNAVAILABLE, also when the lock is lost before the work has ended."""
        connection = await connect(self.settings, seconds=_ANSWER_SECONDS)
        try:
            with translated():
                is_held = await connection.ask(TAKE_LOCK, {"job": name}, seconds=_ANSWER_SECONDS)
            if is_held:
                try:
                    await _run_while_connected(connection, name, work)
                finally:
                    await _free(connection, name)
            return bool(is_held)
        finally:
            await connection.close()


async def _free(connection: DirectConnection, name: str) -> None:
    # The server notices the end of a connection a moment later. Without an answer that end frees the lock too.
    with suppress(KmsError), translated():
        await connection.ask(FREE_LOCK, {"job": name}, seconds=_ANSWER_SECONDS)


async def _run_while_connected(connection: DirectConnection, name: str, work: Work) -> None:
    working = asyncio.ensure_future(work())
    try:
        while not (await asyncio.wait({working}, timeout=_LOOK_SECONDS))[0]:
            if connection.is_lost:
                raise unavailable(f"the lock of the job {name} was lost with its connection")
        working.result()
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class LeaseStatements:
    """The SQL of one kind of items. Each statement calls a function that runs for the role `job_runner`.

    `claim` takes worker, items_max, lease_seconds, attempts_max and item (NULL: any). It returns rows of id, claim_number,
    attempts, step, step_state and the item's own columns. Every other statement takes item, worker and claim, and returns
    whether the claim still holds as `is_held`. Beside that `extend` takes lease_seconds; `finish_step` step, state and
    lease_seconds; `complete` the result; `fail` message, retry_seconds and attempts_max.
    """

    claim: LiteralString
    extend: LiteralString
    finish_step: LiteralString
    complete: LiteralString
    fail: LiteralString
    release: LiteralString


@dataclass(frozen=True, slots=True)
class PostgresLeases:
    """`LeasedItems` in a table. The database's clock says what is due, and when a lease ends.

    `wanted` returns what the `claim` statement takes beside the usual, at the moment of each claim.
    """

    pool: Pool
    statements: LeaseStatements
    wanted: Callable[[], Parameters] = dict

    async def claim(self, worker: UUID, items_max: int, policy: LeasePolicy, *, item_id: UUID | None = None) -> Sequence[Claim]:
        """See `LeasedItems.claim`."""
        parameters = {
            **self.wanted(),
            "worker": worker,
            "items_max": items_max,
            "lease_seconds": policy.lease_seconds,
            "attempts_max": policy.attempts_max,
            "item": item_id,
        }
        rows = await self.pool.fetch(AS_JOB, self.statements.claim, parameters)
        return [_claim(row) for row in rows]

    async def extend(self, worker: UUID, claim: Claim, policy: LeasePolicy) -> None:
        """See `LeasedItems.extend`."""
        await self._change(self.statements.extend, worker, claim, {"lease_seconds": policy.lease_seconds})

    async def finish_step(self, worker: UUID, claim: Claim, step: str, state: Mapping[str, object], policy: LeasePolicy) -> None:
        """See `LeasedItems.finish_step`."""
        parameters = {"step": step, "state": json.dumps(dict(state)), "lease_seconds": policy.lease_seconds}
        await self._change(self.statements.finish_step, worker, claim, parameters)

    async def complete(self, worker: UUID, claim: Claim, result: Mapping[str, object]) -> None:
        """See `LeasedItems.complete`."""
        await self._change(self.statements.complete, worker, claim, result)

    async def fail(self, worker: UUID, claim: Claim, message: str, retry_seconds: float, attempts_max: int) -> None:
        """See `LeasedItems.fail`."""
        parameters = {"message": message, "retry_seconds": retry_seconds, "attempts_max": attempts_max}
        await self._change(self.statements.fail, worker, claim, parameters)

    async def release(self, worker: UUID, claim: Claim) -> None:
        """See `LeasedItems.release`."""
        await self._change(self.statements.release, worker, claim, {})

    async def _change(self, statement: LiteralString, worker: UUID, claim: Claim, more: Parameters) -> None:
        parameters = {**more, "item": claim.item_id, "worker": worker, "claim": claim.number}
        async with self.pool.transaction(AS_JOB) as connection:
            row = await (await connection.execute(statement, parameters)).fetchone()
        if row is None or row["is_held"] is not True:
            raise LeaseLostError


def _claim(row: dict[str, Any]) -> Claim:
    """Return the claim in a row. Raises RECORD_INVALID for what no function of ours returns."""
    columns = {"id": UUID, "claim_number": int, "attempts": int, "step": str, "step_state": dict}
    known = {column: row.pop(column, None) for column in columns}
    if not all(isinstance(known[column], kind) for column, kind in columns.items()):
        raise record_invalid()
    number, attempts, step = known["claim_number"], known["attempts"], known["step"]
    return Claim(item_id=known["id"], number=number, attempts=attempts, step=step, step_state=known["step_state"], item=row)
