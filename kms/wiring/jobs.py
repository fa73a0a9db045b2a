"""Work that the service repeats for itself, which no call waits for."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final

import structlog

from kms.app.moving import Destruction
from kms.app.residents import Reconciliation
from kms.domain.errors import KmsError
from kms.domain.ids import KeyId
from kms.domain.residents import ADVICE, Finding
from kms.store.repeats import FORGET_MAX, StoredRepeats

UPKEEP_SECONDS: Final = 60.0
JOURNAL_SECONDS: Final = 10.0
RECONCILIATION_SECONDS: Final = 300.0
_LOG = structlog.get_logger("kms")


@asynccontextmanager
async def repeating(name: str, seconds: float, work: Callable[[], Awaitable[object]]) -> AsyncIterator[None]:
    """Do *work* at once and again *seconds* after each end of it, within the block.

    What fails is logged under *name* and done again when its time comes.
    """

    async def repeat() -> None:
        while True:
            try:
                await work()
            except KmsError as error:
                _LOG.warning("put off", job=name, reason=error.reason, message=error.message)
            except Exception:  # noqa: BLE001 - a bug in one round must not end all later ones
                _LOG.exception("bug", job=name)
            await asyncio.sleep(seconds)

    task = asyncio.create_task(repeat(), name=name)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def destroy_due(destruction: Destruction) -> None:
    """Destroy the keys whose time has come. That they are not usable does not wait for it."""
    for key_id in await destruction.destroy_due():
        _LOG.info("key destroyed", key=str(key_id))
    await destruction.remove_objects()


async def forget_answers(repeats: StoredRepeats) -> None:
    """Remove the answers that are no longer given to a repeat. That they are not given does not wait for it."""
    while await repeats.forget() >= FORGET_MAX:
        pass


def reconciling(reconciliation: Reconciliation) -> Callable[[], Awaitable[None]]:
    """Return what reconciles the token with the database once, and logs what is new since the last time."""
    known: dict[KeyId, Finding] = {}

    async def reconcile() -> None:
        found = await reconciliation.run()
        for key_id, finding in found.items():
            if (advice := ADVICE.get(finding)) and known.get(key_id) is not finding:
                _LOG.warning("resident key", key=str(key_id), finding=finding, advice=advice)
        known.clear()
        known.update(found)

    return reconcile
