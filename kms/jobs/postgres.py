"""What jobs keep in PostgreSQL: locks that one worker of the deployment holds at a time."""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from kms.domain.errors import KmsError
from kms.jobs.job import Work
from kms.store.batches import DirectConnection, connect
from kms.store.errors import translated, unavailable

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
