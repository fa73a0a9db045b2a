"""The commands of whoever runs the service: token, database, users; each in a process of its own, on real parts."""

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import psycopg
import pytest

from kms.cli.client import connect
from kms.config import load
from kms.dev.demo import conclude, demonstrate, look_inside
from kms.dev.demo_report import Report
from tests.fixtures.server import Deployment


def test_a_user_that_is_added_can_call_with_what_was_written(deployment: Deployment, tmp_path: Path) -> None:
    done = deployment.run("user", "add-service", "billing", "--out", str(tmp_path / "billing"), "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found.keys() == {"id", "name", "uri", "cert_file", "key_file", "config_file"}
    assert found["uri"] == f"kms://test/user/{UUID(found['id'])}"
    assert stat.S_IMODE(Path(found["key_file"]).stat().st_mode) == 0o400
    config_file = Path(found["config_file"])
    with deployment.serving() as server:
        config_file.write_text(config_file.read_text().replace("127.0.0.1:0", server.address))
        listed = deployment.run("--config", str(config_file), "key", "list", "--json")
    assert (listed.returncode, listed.stderr, json.loads(listed.stdout)) == (0, "", {"keys": []})


def test_a_user_that_is_refused_leaves_no_directory(deployment: Deployment, tmp_path: Path) -> None:
    deployment.new_user("billing")
    done = deployment.run("user", "add-service", "billing", "--out", str(tmp_path / "billing"))
    assert done.returncode == 1
    assert done.stderr.startswith("kms: NAME_TAKEN: ")
    assert not (tmp_path / "billing").exists()


def test_files_of_an_earlier_user_are_not_overwritten(deployment: Deployment, tmp_path: Path) -> None:
    done = deployment.run("user", "add-service", "billing", "--out", str(tmp_path))
    assert done.returncode == 2
    assert str(tmp_path) in done.stderr
    with psycopg.connect(deployment.database.admin_dsn) as connection:
        assert connection.execute("SELECT count(*) FROM authentication.users").fetchone() == (0,)


def test_a_second_migration_finds_nothing_to_do(deployment: Deployment) -> None:
    done = deployment.run("migrate", "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, {"applied": [], "up_to_date": True})
    assert deployment.run("migrate", "--check").returncode == 0


def test_a_migration_makes_the_partitions_that_are_missing(deployment: Deployment) -> None:
    with psycopg.connect(deployment.database.admin_dsn, autocommit=True) as connection:
        name = f"audit.domain_events_{datetime.now(UTC).year + 1}"
        connection.execute(f"DROP TABLE {name}".encode())
        assert deployment.run("migrate").returncode == 0
        assert connection.execute("SELECT to_regclass(%s) IS NOT NULL", (name,)).fetchone() == (True,)


def test_a_database_without_schema_fails_the_check(deployment: Deployment) -> None:
    with psycopg.connect(deployment.database.admin_dsn, autocommit=True) as connection:
        connection.execute("DROP SCHEMA cryptography, authentication CASCADE")
        connection.execute("DELETE FROM schema_migrations")
    done = deployment.run("migrate", "--check", "--json")
    assert done.returncode == 5
    assert json.loads(done.stderr)["reason"] == "STORE_UNAVAILABLE"


def test_a_token_that_has_its_keys_is_not_initialised_again(deployment: Deployment) -> None:
    done = deployment.run("hsm", "init")
    assert done.returncode != 0
    assert done.stderr.startswith("kms: ")
    assert done.stderr.count("\n") == 1


def test_the_probe_tells_what_the_token_can_do(deployment: Deployment) -> None:
    done = deployment.run("hsm", "probe", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["token_label"] == deployment.token.label


def test_a_copy_of_the_token_is_tested_and_put_on_record(deployment: Deployment) -> None:
    done = deployment.run("hsm", "backup-confirmed", "--json")
    assert (done.returncode, done.stderr, json.loads(done.stdout)) == (0, "", {"backup_confirmed": True})


def test_no_command_shows_a_pin_or_a_connection_string(deployment: Deployment, tmp_path: Path) -> None:
    secrets = [deployment.token.pin_file.read_text(), deployment.database.dsn.rpartition("password=")[2].strip("'")]
    wrong = tmp_path / "wrong-dsn"
    wrong.write_text(deployment.database.dsn.replace("dbname='", "dbname='absent_"))
    wrong.chmod(0o400)
    outputs = [deployment.run(*command) for command in (("migrate",), ("hsm", "backup-confirmed"))]
    config = deployment.config_file.read_text()
    deployment.config_file.write_text(config.replace('dsn_file = "dsn"', f'dsn_file = "{wrong}"'))
    outputs.append(deployment.run("user", "add-service", "any", "--out", str(tmp_path / "any")))
    assert outputs[-1].returncode == 5
    (tmp_path / "wrong-pin").write_text("not-the-pin-1234")
    (tmp_path / "wrong-pin").chmod(0o400)
    deployment.write_config(pin_file=str(tmp_path / "wrong-pin"))
    outputs.append(deployment.run("hsm", "init"))
    assert outputs[-1].returncode != 0
    for done in outputs:
        assert "Traceback" not in done.stderr
        assert not [secret for secret in (*secrets, "not-the-pin-1234") if secret in done.stdout + done.stderr]


def test_a_token_that_is_not_there_ends_with_5(deployment: Deployment) -> None:
    deployment.write_config(token_label="absent")  # noqa: S106 - a label
    for command in (("hsm", "init"), ("hsm", "probe"), ("serve",)):
        done = deployment.run(*command)
        assert (done.returncode, done.stderr.splitlines()[-1].split(":")[:2]) == (5, ["kms", " HSM_UNAVAILABLE"]), command


def test_every_check_of_the_demonstration_holds(deployment: Deployment) -> None:
    report = Report(quiet=True)
    with deployment.serving() as server:
        section = load(server.client_config("demo")).client
        assert section is not None
        with connect(section) as client:
            demonstrate(client, report)
            look_inside(deployment.database.admin_dsn, client, report)
    assert len(report.checks) > 24
    assert report.failed == []


def test_the_demonstration_fails_if_one_check_does(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report()
    report.check(True, "this holds")
    report.check(False, "this does not")
    assert conclude(report, as_json=False) == 1
    assert "1 of 2 checks FAILED:\n  this does not" in capsys.readouterr().out


def test_the_demonstration_is_stopped_by_an_interrupt_and_leaves_nothing() -> None:
    with tempfile.TemporaryDirectory(prefix="kms-test-demo-") as name:
        directory = Path(name)
        directory.chmod(0o711)  # PostgreSQL's user passes through it to its data
        process = subprocess.Popen(
            [sys.executable, "-m", "kms.dev.demo"],
            env={**os.environ, "TMPDIR": name},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        while "CreateKey" not in (line := process.stdout.readline()):
            assert line, process.communicate()[1]
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (130, "\nstopped; nothing is left running\n")
        assert list(directory.iterdir()) == []
        assert _processes_in(directory) == []


def _processes_in(directory: Path) -> list[str]:
    """Return the command lines that name *directory*, giving those that are just ending a moment."""
    found: list[str] = []
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        found = [line for line in map(_command_line, Path("/proc").glob("[0-9]*/cmdline")) if str(directory) in line]
        if not found:
            break
        time.sleep(0.1)
    return found


def _command_line(file: Path) -> str:
    try:
        return file.read_text(errors="replace").replace("\0", " ")
    except OSError:
        return ""  # it has ended


def test_without_the_development_authority_a_user_is_made_and_his_uri_printed(deployment: Deployment, tmp_path: Path) -> None:
    text = deployment.config_file.read_text()
    deployment.config_file.write_text(text.replace('[authority]\ncert_file = "authority.crt"\nkey_file = "authority.key"\n', ""))
    done = deployment.run("user", "add-service", "billing", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["uri"] == f"kms://test/user/{found['id']}"
    assert sorted(found) == ["id", "name", "uri"]


def test_a_client_is_not_told_to_connect_to_every_interface(deployment: Deployment, tmp_path: Path) -> None:
    deployment.config_file.write_text(deployment.config_file.read_text().replace("127.0.0.1:0", "0.0.0.0:7443"))
    refused = deployment.run("user", "add-service", "billing", "--out", str(tmp_path / "billing"))
    assert (refused.returncode, "--server" in refused.stderr) == (2, True)
    assert not (tmp_path / "billing").exists()
    done = deployment.run("user", "add-service", "billing", "--out", str(tmp_path / "billing"), "--server", "kms.example:7443")
    assert done.returncode == 0, done.stderr
    assert 'server = "kms.example:7443"' in (tmp_path / "billing" / "client.toml").read_text()
