"""A worker that signs the trail is killed at every point between rows and checkpoint: the trail goes on, and in one history."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import psycopg
import pytest

from kms.dev.postgres import EmbeddedPostgres
from kms.domain.checkpoint import parse_unsigned
from tests.conformance.requests import made
from tests.fixtures.postgres import cloned
from tests.fixtures.server import Deployment, RunningServer, deployed
from tests.hostile.test_two_histories import WAITING, notes_of, until

# The process kills itself at the point that the file names, once; all the rest of it is as it is.
SITE: Final = """
import os, pathlib, signal
from kms.app import sealing
from kms.store import checkpoint_file, sealed_trail

def die(point):
    file = pathlib.Path({file!r})
    if file.exists() and file.read_text() == point:
        file.rename(str(file) + ".done")
        os.kill(os.getpid(), signal.SIGKILL)

real_note, real_write, real_append = sealing.signed_note, checkpoint_file._write, sealed_trail.StoredSealedTrail.append

def signed_note(checkpoint, key, signature):
    die("signed")
    return real_note(checkpoint, key, signature)

def write(file, content):
    if pathlib.Path({file!r}).exists() and pathlib.Path({file!r}).read_text() == "half written":
        file.seek(0, os.SEEK_END)
        file.write(content[: len(content) // 2])
        die("half written")
    real_write(file, content)
    die("written")

async def append(self, previous_size, checkpoint):
    await real_append(self, previous_size, checkpoint)
    die("appended")

sealing.signed_note, checkpoint_file._write, sealed_trail.StoredSealedTrail.append = signed_note, write, append
"""
pytestmark = pytest.mark.timeout(400)  # workers start, and start again, however slow the machine is
RESTORED: Final = """
    SELECT count(*) FROM audit.security_events WHERE event_type = 'audit.checkpoint_restored' AND severity = 'high'
"""
POINTS: Final = ("signed", "half written", "written", "appended")


@contextmanager
def dying(deployment: Deployment, point_file: Path) -> Iterator[RunningServer]:
    """Run a service of two workers, each of which dies where *point_file* says."""
    site = deployment.directory / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITE.format(file=str(point_file)))
    deployment.write_config(sessions_max=40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(site), prepend=":")
        with deployment.serving("--workers", "2") as server:
            yield server


@pytest.fixture(scope="module")
def service(
    postgres: EmbeddedPostgres, token_template: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """The service. At the end the trail verifies with what the machine remembers."""
    directory = tmp_path_factory.mktemp("dying")
    with (
        cloned(postgres) as database,
        deployed(directory, database, token_template) as deployment,
        dying(deployment, directory / "point") as server,
    ):
        yield server
        key, trail = deployment.run("audit", "key").stdout.strip(), directory / "trail"
        assert deployment.run("audit", "export", str(trail)).returncode == 0
        checkpoints = str(directory / "checkpoints")
        done = deployment.run("audit", "verify", str(trail), "--key", key, "--checkpoints", checkpoints, "--json")
        assert (done.returncode, json.loads(done.stdout)["finding"]) == (0, None)


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_a_sealer_that_is_killed_leaves_one_history_that_goes_on(service: RunningServer, point: str) -> None:
    directory = service.deployment.directory
    memory, point_file = directory / "checkpoints", directory / "point"

    with psycopg.connect(service.deployment.database.admin_dsn, autocommit=True) as admin:

        def count(query: str) -> int:
            row = admin.execute(query.encode()).fetchone()
            assert row is not None
            return int(row[0])

        def is_settled() -> bool:
            return count(WAITING) == 0

        def there() -> list[str]:
            return [note for (note,) in admin.execute("SELECT note FROM audit.checkpoints ORDER BY tree_size").fetchall()]

        until(lambda: len(service.workers()) == 2 and memory.exists() and is_settled())
        restored = count(RESTORED)
        point_file.write_text(point)
        made(service.caller(), "ed25519")
        until((directory / "point.done").exists)
        (directory / "point.done").unlink()
        left = memory.read_bytes()
        until(is_settled)
        until(lambda: notes_of(memory) == there())
        # Whatever was left on disk in whole is still there: what was signed is not signed otherwise.
        assert memory.read_bytes().startswith(left[: left.rfind(b"\n") + 1])
        sizes = [parse_unsigned(note).tree_size for note in notes_of(memory)]
        assert sizes == sorted(set(sizes))
        refused = admin.execute("SELECT FROM audit.security_events WHERE event_type = 'audit.history_refused'").fetchall()
        assert refused == []
        # A note on disk that the database does not have yet is put there, and no other.
        assert count(RESTORED) - restored == (point == "written")
