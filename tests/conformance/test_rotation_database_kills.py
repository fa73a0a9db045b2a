"""PostgreSQL that is killed at any step of a rotation: after its restart there is one successor, and nothing is lost."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest

from kms.dev.postgres import EmbeddedPostgres, embedded_postgres
from kms.hsm.one_session import one_session
from kms.v1 import crypto_pb2 as cpb
from kms.v1 import keys_pb2 as kpb
from kms.v1 import rotation_pb2 as rpb
from tests.conformance.requests import create
from tests.conformance.test_database_outages import SETTINGS, postmaster
from tests.conformance.test_rotation import rotate
from tests.conformance.test_rotation_kills import STEPS, await_standing, ended, standing_still, statuses, wait_for
from tests.fixtures.clusters import Clusters, passable_directory
from tests.fixtures.postgres import template_of
from tests.fixtures.server import Caller, deployed
from tests.fixtures.softhsm import settings_of
from tests.hostile.test_leftovers import age_marks, found

# The others are in the slow set: each costs a PostgreSQL, which starts twice, and a service.
ALWAYS = "switch, not committed"
LOGGED = """
    SELECT migration_status, (SELECT array_agg(event_type ORDER BY occurred_at, event_type)
        FROM audit.domain_events WHERE event_type <> 'key.created' AND aggregate_id = r.old_key_id)
    FROM cryptography.key_rotations AS r
"""


def kill_at(postgres: EmbeddedPostgres, step: str, caller: Caller) -> None:
    """Have the key k rotated, and kill PostgreSQL at *step*."""
    with (
        ThreadPoolExecutor(1) as pool,
        psycopg.connect(template_of(postgres).admin_dsn, autocommit=True) as admin,
        standing_still(admin, step),
    ):
        rotating = pool.submit(ended, caller)
        await_standing(admin, step)
        os.kill(postmaster(postgres), signal.SIGKILL)
        admin.close()
        rotating.result(60)


def is_completed(caller: Caller) -> bool:
    return statuses(caller) == [rpb.ROTATION_STATUS_COMPLETED]


def logged(postgres: EmbeddedPostgres) -> list[tuple[Any, ...]]:
    with psycopg.connect(template_of(postgres).admin_dsn) as admin:
        return admin.execute(LOGGED).fetchall()


@pytest.mark.timeout(180)
@pytest.mark.parametrize("step", [step if step == ALWAYS else pytest.param(step, marks=pytest.mark.slow) for step in STEPS])
def test_a_database_that_is_killed_in_a_rotation_has_one_successor_after_its_restart(
    clusters: Clusters, token_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    with passable_directory() as home, ExitStack() as stack:
        clusters.copy_migrated(home)
        with embedded_postgres(home, SETTINGS) as postgres:
            deployment = stack.enter_context(deployed(tmp_path, template_of(postgres), token_template))
            deployment.write_config(resident_keys_max=8)
            server = stack.enter_context(deployment.serving())
            caller = server.caller()
            key = caller.keys.CreateKey(create("aes", custody=kpb.CUSTODY_RESIDENT), timeout=30).key
            sealed = caller.crypto.Encrypt(cpb.EncryptRequest(key="k", plaintext=b"before"), timeout=15).ciphertext
            kill_at(postgres, step, caller)
        with embedded_postgres(home, SETTINGS) as postgres:
            wait_for(lambda: server.seen("/readyz")[0] == 200)
            if step.startswith("request") and not statuses(caller):
                rotate(caller)
            wait_for(lambda: is_completed(caller))
            keys = {each.name: each for each in caller.keys.ListKeys(kpb.ListKeysRequest()).keys}
            assert (sorted(keys), keys["k@1"].id) == (["k", "k@1"], key.id)
            assert caller.crypto.Decrypt(cpb.DecryptRequest(ciphertext=sealed)).plaintext == b"before"
            again = caller.crypto.Encrypt(cpb.EncryptRequest(key="k", plaintext=b"after"), timeout=15)
            assert again.key_id == keys["k"].id
            assert caller.crypto.Decrypt(cpb.DecryptRequest(ciphertext=again.ciphertext)).plaintext == b"after"
            assert logged(postgres) == [("completed", ["key.superseded"])]
            stack.close()
            # What was made in vain has a mark in the token, and goes once the mark is old enough. What has a row stays.
            for variable, value in deployment.token.environment.items():
                monkeypatch.setenv(variable, value)
            with one_session(settings_of(deployment.token)) as token:
                age_marks(token)
            found(deployment)
            left = found(deployment)[1]
            assert set(left.values()) == {"stored"}
            assert {str(key_id) for key_id in left} >= {each.id for each in keys.values()}
