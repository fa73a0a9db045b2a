"""What an operator should see to, as a service in production mode tells it: at the start, by /readyz, by `kms status`."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import grpc
import psycopg
import pytest

from kms.dev.postgres import DURABLE
from kms.domain.ids import UserId
from kms.v1 import admin_pb2 as pb
from kms.v1 import keys_pb2 as kpb
from tests.conformance.requests import made
from tests.conformance.test_metrics import value
from tests.conformance.test_outages import soon
from tests.fixtures.clusters import Clusters
from tests.fixtures.postgres import template_of
from tests.fixtures.server import Deployment, deployed

# What PostgreSQL's disk has free is what the file says; all the rest of a process is as it is.
DISK = """
import os, pathlib
real = os.statvfs
def statvfs(path):
    seen = list(real(path))
    seen[4] = int(seen[2] * float(pathlib.Path({file!r}).read_text()))
    return os.statvfs_result(seen)
os.statvfs = statvfs
"""
UNDONE = b"""
    INSERT INTO cryptography.restored_keys SELECT id, user_id, 1, 'active', FALSE FROM cryptography.keys WHERE key_name = 'k';
    INSERT INTO audit.security_events (event_type, severity, created_at) VALUES ('far', 'low', '2999-01-01')
"""
STRANGERS = b"SELECT count(*) FROM audit.security_events WHERE event_details ->> 'authenticated' = 'false'"


def in_production(deployment: Deployment, more: str = "") -> None:
    text = deployment.config_file.read_text().replace('mode = "development"', 'mode = "production"')
    deployment.config_file.write_text(text.replace("[database]\n", f"[database]\n{more}"))


@pytest.fixture
def production(clusters: Clusters, token_template: Path, tmp_path: Path) -> Iterator[Deployment]:
    """A deployment in production mode with a database that is durable, and whose disk is as full as the file `free` says."""
    with clusters.migrated(DURABLE) as server, deployed(tmp_path, template_of(server), token_template) as own:
        in_production(own, 'disk_path = "."\n')
        assert own.run("hsm", "backup-confirmed").returncode == 0
        yield own


def test_a_database_that_may_lose_what_it_has_confirmed_is_not_served_in_production(deployment: Deployment) -> None:
    in_production(deployment)
    done = deployment.run("serve")
    assert done.returncode != 0
    assert "the database may lose what it has confirmed: set fsync = on and full_page_writes = on" in done.stderr


def test_without_a_memory_of_the_trail_nobody_serves_in_production_and_nobody_signs_elsewhere(deployment: Deployment) -> None:
    text = deployment.config_file.read_text().replace('[audit]\ncheckpoints = "checkpoints"\n', "")
    deployment.config_file.write_text(text)
    unsigned = "the trail is not signed: set audit.checkpoints to a file outside the database"
    with deployment.serving() as server:
        assert server.seen("/readyz") == (200, f"ready\nwarning: {unsigned}\n")
        assert [line["level"] for line in server.log() if line.get("advice") == unsigned] == ["warning"]
        made(server.caller(), "ed25519")
        with psycopg.connect(deployment.database.admin_dsn, autocommit=True) as admin:
            keys = admin.execute("SELECT count(*) FROM cryptography.keys WHERE bound_to <> ''").fetchone()
            checkpoints = admin.execute("SELECT count(*) FROM audit.checkpoints").fetchone()
    assert (keys, checkpoints) == ((0,), (0,))
    in_production(deployment)
    done = deployment.run("serve")
    assert done.returncode != 0
    assert "audit.checkpoints: missing, and needed in production mode" in done.stderr


def test_what_should_be_seen_to_is_told(production: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    free, site = production.directory / "free", production.directory / "site"
    site.mkdir()
    free.write_text("0.5")
    with_journal = production.config_file.read_text().replace("[server]\n", '[server]\njournal = "journal"\n')
    production.config_file.write_text(with_journal)
    (site / "sitecustomize.py").write_text(DISK.format(file=str(free)))
    monkeypatch.setenv("PYTHONPATH", str(site), prepend=":")
    with production.serving(is_forked=False) as server, psycopg.connect(production.database.admin_dsn, autocommit=True) as admin:
        assert server.seen("/readyz") == (200, "ready\n")
        made(server.caller(), "aes")
        auditor = server.auditor()

        def call_as_a_stranger() -> None:
            with suppress(grpc.RpcError):
                server.caller(UserId(uuid4())).keys.ListKeys(kpb.ListKeysRequest(), timeout=10)

        call_as_a_stranger()
        soon(lambda: admin.execute(STRANGERS).fetchone() == (1,))
        admin.execute(UNDONE)
        free.write_text("0.15")
        warnings = [
            "the database's disk is 15% free",
            "rows of the trail are in a DEFAULT partition: run `kms partitions drain`",
            "1 restored keys wait for a confirmation: see `kms epoch show`",
        ]
        told = "".join(["ready\n", *(f"warning: {warning}\n" for warning in warnings)])
        soon(lambda: server.seen("/readyz") == (200, told))
        assert list(auditor.admin.GetStatus(pb.GetStatusRequest()).detail.warnings) == warnings

        free.write_text("0.05")
        admin.execute(b"UPDATE cryptography.epochs SET timeline = 'FFFFFFFF'")
        soon(lambda: server.seen("/readyz")[0] == 503 and "5% free" in server.seen("/readyz")[1])
        lines = server.seen("/readyz")[1].splitlines()
        assert lines[0].startswith("epoch: epoch 1 of the database was begun without the token")
        assert "warning: refusals of callers who are not admitted are no longer recorded" in lines
        done = production.run("--config", str(server.client_config("operator")), "status", "--json")
        assert (done.returncode, [*json.loads(done.stdout)["faults"]]) == (1, ["epoch"])
        call_as_a_stranger()
        soon(lambda: value(server.metrics(), "kms_refusals_unrecorded_total") == 1)
        assert admin.execute(STRANGERS).fetchone() == (1,)
