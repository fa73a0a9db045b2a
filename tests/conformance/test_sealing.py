"""Tamper evidence, from outside: what the service did is sealed while it serves, and an auditor verifies it with a public key."""

import json
from typing import Any

import grpc
import psycopg
from psycopg.rows import dict_row

from kms.v1 import keys_pb2 as kpb
from tests.conformance.refusals import refusal
from tests.conformance.requests import made
from tests.conformance.test_outages import soon
from tests.fixtures.server import Deployment


def test_what_was_done_is_sealed_and_verified_offline_with_the_public_key(deployment: Deployment) -> None:
    checkpoints = deployment.directory / "checkpoints"
    exported = deployment.directory / "trail"

    def waiting(key_id: str) -> Any:  # noqa: ANN401  # a count, or None
        query = """
            SELECT count(*) AS sealed FROM audit.domain_events
            WHERE aggregate_id = %s AND commit_order < (SELECT max(horizon) FROM audit.checkpoints)
        """
        with psycopg.connect(deployment.database.admin_dsn, row_factory=dict_row) as connection:
            row = connection.execute(query, (key_id,)).fetchone()
        assert row is not None
        return row["sealed"] == 1

    with deployment.serving() as server:
        caller = server.caller()
        key = made(caller, "aes", name="k")
        soon(lambda: waiting(key.id))
        found = refusal(caller.keys.GetKey, kpb.GetKeyRequest(key="audit-checkpoints"))
        assert found.code == grpc.StatusCode.NOT_FOUND
    verifier = deployment.run("audit", "key").stdout.strip()
    assert verifier.startswith("test/audit+")
    with deployment.serving() as server:
        another = made(server.caller(caller.user_id), "aes", name="l")
        soon(lambda: waiting(another.id))
    assert deployment.run("audit", "key").stdout.strip() == verifier
    assert deployment.run("audit", "export", str(exported)).returncode == 0
    arguments = ("audit", "verify", str(exported), "--key", verifier, "--checkpoints", str(checkpoints), "--json")
    done = deployment.run(*arguments)
    report = json.loads(done.stdout)
    assert (done.returncode, report["finding"], report["unsealed"]) == (0, None, 0)
    assert report["checkpoints"] == len(checkpoints.read_text().splitlines()) >= 2
    done = deployment.run(*arguments, "--begins-at", "1")
    assert (done.returncode, json.loads(done.stdout)["finding"]["difference"]) == (6, "ROWS_LEFT_OUT")
    exported.write_text(exported.read_text().replace('"event_type":"key.created"', '"event_type":"key.updated"', 1))
    done = deployment.run(*arguments)
    assert (done.returncode, json.loads(done.stdout)["finding"]["difference"]) == (6, "ROW_CHANGED")
    with psycopg.connect(deployment.database.admin_dsn) as connection:
        row = connection.execute(
            "SELECT custody, bound_to FROM cryptography.keys WHERE key_name = 'audit-checkpoints'"
        ).fetchone()
    assert row == ("RESIDENT", "audit")
