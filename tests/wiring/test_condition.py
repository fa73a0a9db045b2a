"""What is said to be at fault."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from kms.domain.errors import KmsError, Reason
from kms.jobs.job import Job, JobStatus
from kms.store.disk import Disk
from kms.store.pool import open_pool
from kms.store.sealer import HistoryWatch
from kms.wiring.condition import Condition, SealWatch
from tests.fixtures.postgres import Database


def status(age: float, why: str) -> JobStatus:
    job = Job("destruction", 60, asyncio.Event().wait, warns_after_seconds=600)
    return JobStatus(job, age, age, 0, 1, why)


def test_what_lasts_too_long_or_was_changed_under_the_service_is_a_warning() -> None:
    well = cast(Any, SimpleNamespace(is_available=lambda: True))
    watch = SealWatch(1.0, is_late=True)
    condition = Condition(
        well,
        well,
        well,
        well,
        Disk(None),
        lambda: True,
        {},
        watch,
        HistoryWatch("another"),
        cast(Any, SimpleNamespace(faults=[], warnings=["it ends soon"])),
        cast(Any, SimpleNamespace(warnings=["copy the token"])),
        ("set this",),
        lambda: [status(660.0, "HSM_UNAVAILABLE"), status(1.0, "HSM_UNAVAILABLE")],
        schema_fault="run that",
    )
    late = "rows of the trail are not sealed: the log of the worker that seals says why"
    stopped = "job destruction has not succeeded for 11 minutes: HSM_UNAVAILABLE"
    warnings = ["run that", "set this", "another", late, "it ends soon", "copy the token", stopped]
    assert condition.look() == (True, "\n".join(["ready", *(f"warning: {warning}" for warning in warnings)]))


async def test_a_database_that_ends_between_two_looks_is_no_fault_of_the_epoch(database: Database) -> None:
    absent = cast(Any, None)
    async with open_pool(database.dsn, 1, wait_seconds=0.3) as pool:
        condition = Condition(absent, absent, pool, absent, Disk(None), lambda: True, {}, absent, absent, absent, absent)
        name = sql.Identifier(database.name)
        with psycopg.connect(make_conninfo(database.admin_dsn, dbname="postgres"), autocommit=True) as admin:
            admin.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS false").format(name))
            admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (database.name,))
            with pytest.raises(KmsError) as caught:
                await condition.check()
            admin.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS true").format(name))
    assert caught.value.reason is Reason.STORE_UNAVAILABLE
    assert condition.epoch_fault == ""
