"""The jobs of the service, and the work of some."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

from kms.jobs.job import Job, Scope
from kms.rotation.jobs import rewrapping_job
from kms.rotation.master_keys import MasterKeys
from kms.store.ledger import open_ledger
from kms.store.pool import Pool
from kms.store.repeats import StoredRepeats
from kms.wiring.acme import AcmeParts
from kms.wiring.certificates import CertificateParts
from kms.wiring.jobs import JobParts, forget_answers, upkeep_jobs
from kms.wiring.rotation import RotationParts
from tests.fixtures.postgres import Database
from tests.store.uses import a_repeat, make_key, make_user, rows, sign


def jobs(parts: Mapping[str, object]) -> list[Job]:
    """Return the jobs of a worker with *parts*; the rest of it is absent."""
    absent = cast(Any, SimpleNamespace(opens=None, check=None, watch=None, ask=None, records=None, serve_term=None, write=None))
    working = cast(Any, SimpleNamespace(do_due=None, ask_for_due=None))
    master_keys, rewrapping = MasterKeys(absent, absent, needs_copy=False), rewrapping_job(absent, absent)
    rotation = RotationParts(absent, absent, working, working, absent, master_keys, rewrapping)
    revoking = cast(Any, SimpleNamespace(jobs=list))
    acme = AcmeParts(None, absent, absent, absent, absent, absent, absent, absent, absent)
    certificates = CertificateParts(absent, absent, absent, absent, absent, revoking, acme, None, {})
    fields = {**dict.fromkeys(JobParts.__dataclass_fields__, absent), "rotation": rotation, "certificates": certificates}
    return upkeep_jobs(JobParts(**{**fields, **parts}))


def named(parts: Mapping[str, object]) -> list[str]:
    return [job.name for job in jobs(parts)]


def test_a_worker_has_the_jobs_that_its_parts_are_for() -> None:
    rotation = ["rotations", "rotation policies", "master_keys", "rewrapping"]
    every = ["partitions", "destruction", "repeats", "condition", "disk", *rotation, "certificates", "acme", "trust", "database"]
    none = {"is_first": False, "journal": None, "uses": None, "sealer": None}
    assert named(none) == every
    assert named({**none, "is_first": True}) == [*every, "residents"]
    assert named({"is_first": False, "sealer": None}) == [*every, "journal", "uses"]
    assert named({"is_first": False, "journal": None, "uses": None}) == [*every, "checkpoints"]


def test_one_worker_at_a_time_looks_for_keys_that_are_due() -> None:
    assert [job.name for job in jobs({}) if job.scope is Scope.ONE_WORKER] == ["rotation policies"]


async def test_answers_that_are_no_longer_given_are_removed_all_of_them(database: Database, store: Pool) -> None:
    alice = await make_user(store, "alice")
    key = await make_key(store, alice)
    async with open_ledger(database.dsn, store) as ledger:
        await ledger.settle(sign(alice, key, repeat=a_repeat("order-1")))
    rows(
        database,
        """INSERT INTO cryptography.request_records (user_id, rpc, request_id, body_mac, result, event_id, created_at)
        SELECT user_id, rpc, 'old-' || n, body_mac, result, event_id, created_at - interval '25 h'
        FROM cryptography.request_records, generate_series(1, 20001) AS n""",
    )
    await forget_answers(StoredRepeats(store))
    assert rows(database, "SELECT request_id FROM cryptography.request_records") == [{"request_id": "order-1"}]
