"""What `kms work` does: the jobs of rotation, without serving."""

import asyncio
import os
import signal
from contextlib import AsyncExitStack
from typing import Final
from uuid import UUID

import structlog
import uvloop

from kms.app.records import Records
from kms.config import Config
from kms.hsm.token_hsm import open_hsm
from kms.jobs.postgres import AdvisoryLocks
from kms.jobs.runner import JobRunner
from kms.pki.client_identity import host_clock
from kms.store import epoch as epochs
from kms.store.journal_knowledge import JournalKnowledge
from kms.store.pool import connection_settings
from kms.store.wrapping import StoredWrappingKeys
from kms.wiring.log import configure_log
from kms.wiring.memory import open_journal, was_served
from kms.wiring.parts import database_dsn, hsm_settings, ready_pool
from kms.wiring.rotation import rotation_parts
from kms.wiring.token import check_token

_LOG: Final = structlog.get_logger("kms")


class _Nothing:
    """The keys that this process remembers: it serves nobody."""

    def drop(self, key_id: UUID | None) -> None:
        """Forget nothing."""


def work(config: Config) -> None:
    """Do rotations that are due until SIGTERM or SIGINT. What is under way then is given back to other workers."""
    configure_log(config.log_level)
    uvloop.run(_work(config))


async def _work(config: Config) -> None:
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    async with AsyncExitStack() as stack:
        dsn = database_dsn(config)
        pool = await stack.enter_async_context(ready_pool(config, dsn))
        hsm = await open_hsm(hsm_settings(config))
        stack.push_async_callback(hsm.close)
        master_keys = await check_token(config, hsm, StoredWrappingKeys(pool))
        records = Records(hsm.mac, host_clock)
        journal = open_journal(config, *await epochs.check_epoch(pool, records, was_served=was_served(config)))
        knowledge = None if journal is None else JournalKnowledge(journal.path)
        parts = await stack.enter_async_context(rotation_parts(pool, records, hsm, master_keys, _Nothing(), journal, knowledge))
        await stack.enter_async_context(JobRunner(AdvisoryLocks(connection_settings(dsn))).running(*parts.jobs()))
        _LOG.info("working", deployment=config.deployment_id, mode=config.mode, pid=os.getpid())
        await stopping.wait()
    _LOG.info("stopped")
