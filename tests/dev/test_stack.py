"""The embedded stack: prepared from nothing, found again, never half made, never left behind."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from kms.dev.demo_certificates import certify
from kms.dev.demo_report import Report
from kms.dev.embedded_stack import dev_stack
from kms.dev.postgres import FAST_UNSAFE
from kms.dev.service_process import is_serving
from kms.dev.stack import Stack
from kms.dev.stack_files import StackFiles
from kms.domain.errors import KmsError
from tests.fixtures.clusters import passable_directory

SECRET_FILES = ("secrets/service.dsn", "secrets/migration.dsn", "secrets/server.key", "authority/authority.key", "token/pin")


@pytest.fixture(scope="module")
def first_start() -> Iterator[Path]:
    """The directory of a stack that was prepared from nothing and has served."""
    with passable_directory() as parent:
        with dev_stack(parent / "stack", port=0, settings=FAST_UNSAFE) as stack, stack.serving():
            stack.kms("key", "create", "kept", "--type", "aes")
        yield parent / "stack"


@pytest.fixture
def directory(first_start: Path) -> Iterator[Path]:
    """A copy of it, owners kept."""
    with passable_directory() as parent:
        subprocess.run(["cp", "-a", str(first_start), str(parent)], check=True)
        yield parent / "stack"


class DevSession:
    """`kms dev` in a process of its own, with what it said when it served."""

    def __init__(self, directory: Path) -> None:
        command = [sys.executable, "-m", "kms", "dev", "--directory", str(directory), "--port", "0", "--json"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def __enter__(self) -> tuple["subprocess.Popen[str]", dict[str, dict[str, str]]]:
        assert self.process.stdout is not None
        return self.process, json.loads(self.process.stdout.readline())

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def key_names(stack: Stack) -> list[str]:
    return [key["name"] for key in json.loads(stack.kms("--json", "key", "list"))["keys"]]


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_second_start_finds_the_keys_of_the_first(directory: Path) -> None:
    with dev_stack(directory, port=0, settings=FAST_UNSAFE) as stack, stack.serving() as service:
        assert key_names(stack) == ["kept"]
        assert is_serving(stack.client)
        log = service.log_file.read_text()
    assert service.process.returncode == 0
    assert not is_serving(stack.client)
    for name in SECRET_FILES:
        path = directory / name
        assert stat.S_IMODE(path.stat().st_mode) == 0o400, name
        assert path.read_text().strip() not in log


@pytest.mark.slow
def test_every_check_of_the_demonstration_of_certificates_holds(directory: Path) -> None:
    report = Report(quiet=True)
    with dev_stack(directory, port=0, settings=FAST_UNSAFE) as stack, stack.serving():
        certify(stack, report)
    assert report.failed == []
    assert len(report.checks) == 5


@pytest.mark.slow
def test_a_first_start_that_was_interrupted_is_begun_again(directory: Path) -> None:
    (directory / "token").rename(directory / "token.new")
    shutil.rmtree(StackFiles(directory, token=directory / "token").client)
    with dev_stack(directory, port=0, settings=FAST_UNSAFE) as stack:
        assert not (directory / "token.new").exists()
        assert stack.files.client_configuration.exists()
        with psycopg.connect(stack.superuser_dsn) as connection:
            rows = connection.execute("SELECT username FROM authentication.users ORDER BY 1").fetchall()
    assert [row[0] for row in rows if row[0].startswith("developer")] == ["developer", "developer-2"]


def test_a_command_or_service_that_fails_is_told_with_its_words(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KMS_LOG_LEVEL", "a variable of whoever starts the stack does not reach its commands")
    with dev_stack(directory, port=0, settings=FAST_UNSAFE) as stack:
        with pytest.raises(KmsError, match="no-such-command"):
            stack.kms("no-such-command")
        stack.files.configuration.write_text("nonsense")
        with pytest.raises(KmsError, match=r"(?s)serve\.log:\n.*not TOML"), stack.serving():
            pass


def test_kms_dev_says_how_to_use_it_and_stops_clean(directory: Path) -> None:
    with DevSession(directory) as (process, said):
        environment = {**os.environ, **said["environment"]}
        command = [sys.executable, "-m", "kms", "key", "create", "payments", "--type", "secp256k1"]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        process.send_signal(signal.SIGTERM)
        rest, errors = process.communicate(timeout=60)
    assert json.loads(rest) == {"state": "stopped"}
    assert errors == ""
    assert process.returncode == 0
    assert not (directory / "postgres/data/postmaster.pid").exists()


def test_nothing_outlives_a_kms_dev_that_is_killed(directory: Path) -> None:
    with DevSession(directory) as (process, _):
        children = [int(each) for each in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        shells = {pid: Path(f"/proc/{pid}/task/{pid}/children").read_text().split() for pid in children}
        pids = [int(pid) for each in shells.values() for pid in each]
        assert len(pids) >= 2
        process.kill()
        process.wait()
    deadline = time.monotonic() + 30
    while not all(map(is_gone, [*children, *pids])):
        assert time.monotonic() < deadline, "an orphan was left"
        time.sleep(0.05)
