"""Help, usage and configuration: what the `kms` command says before any server is asked."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import structlog
import typer

from kms.cli.failures import CallError, ExitCode, failure_of
from kms.cli.invocation import Invocation
from kms.cli.main import app
from kms.domain.errors import KmsError, Reason
from tests.cli.running import Kms


def _commands() -> list[tuple[str, ...]]:
    root = typer.main.get_command(app)
    found: list[tuple[str, ...]] = []
    for name, command in root.commands.items():  # type: ignore[attr-defined]
        below = getattr(command, "commands", None)
        found += [(name, each) for each in below] if below else [(name,)]
    return found


COMMANDS = _commands()


def test_the_command_has_what_the_readme_names() -> None:
    assert {" ".join(command) for command in COMMANDS} == {
        *("serve", "work", "migrate", "dev", "demo", "version", "hsm init", "hsm probe", "hsm check"),
        *("kek rotate", "kek list", "kek watch", "kek retire", "kek destroy"),
        *("hsm backup-confirmed", "user add-service", "key rotate", "rotation list", "rotation show", "rotation usage"),
        *("key rotation", "rotation pause", "rotation resume", "rotation watch", "rotation retry"),
        *("key create", "key list", "key show", "key public", "sign", "verify", "encrypt", "decrypt", "reencrypt", "datakey"),
        "random",
        *("ca create", "ca list", "ca show", "ca export", "ca import", "ca rotate", "ca allow", "ca disable", "ca hand-over"),
        *("cert issue", "cert request", "cert import", "cert list", "cert show", "cert renew", "cert revoke"),
        *("crl show", "crl publish", "acme create", "acme list", "acme deactivate"),
        *("key activate", "key deactivate", "key reactivate", "key revoke", "key compromise"),
        *("key destroy", "key cancel-destruction", "key update"),
        *("backup", "restore", "epoch show", "epoch begin", "epoch continue", "epoch confirm"),
        *("status", "audit search", "audit tail", "audit key", "audit export", "audit verify"),
        *("records adopt", "records check"),
        *("partitions ensure", "partitions check", "partitions drain", "partitions archive"),
    }


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_shows_examples_and_the_global_options(kms: Kms, command: tuple[str, ...]) -> None:
    ended = kms(*command, "--help")
    assert ended.code == 0
    text = ended.out.decode()
    assert f"    kms {' '.join(command)}" in text.partition("Examples:")[2]
    assert "--config FILE" in text
    assert "--json" in text


def test_the_help_tells_every_exit_code(kms: Kms) -> None:
    text = kms("--help").out.decode()
    told = {int(line.split()[0]) for line in text.splitlines() if line.strip()[:1].isdigit()}
    assert told | {ExitCode.INTERRUPTED} == set(ExitCode)


def test_help_comes_without_loading_grpc_or_the_configuration() -> None:
    script = (
        "import sys; sys.argv = ['kms', '--help']\n"
        "from kms.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'grpc', 'google.protobuf', 'pydantic', 'cryptography', 'rich', 'psycopg', 'pkcs11'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=30)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_the_package_runs_as_a_module() -> None:
    ended = subprocess.run([sys.executable, "-m", "kms", "version"], capture_output=True, text=True, check=False, timeout=30)
    assert (ended.returncode, ended.stdout.split()[0]) == (0, "kms")


@pytest.mark.parametrize("arguments", [("--json", "version"), ("version", "--json")])
def test_json_may_stand_before_or_after_the_command(kms: Kms, arguments: tuple[str, ...]) -> None:
    assert kms(*arguments).json.keys() == {"version"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("verion",), "No such command"),
        (("key",), "Missing command"),
        (("key", "create", "k"), "--type"),
        (("key", "create", "k", "--type", "dsa"), "secp256k1"),
        (("key", "create", "k", "--type", "aes", "--metadata", "novalue"), "NAME=VALUE"),
        (("key", "create", "k", "--type", "aes", "--metadata", "a=1", "--metadata", "a=2"), "twice"),
        (("random", "0"), "BYTES"),
        (("datakey", "k", "--plaintext-out", "-"), "--out FILE"),
        (("verify", "k", "--signature", "-"), "standard input"),
        (("reencrypt", "--in-list", "files"), "--out-dir"),
        (("reencrypt", "--rate", "5"), "--in-list"),
        (("reencrypt", "--in-list", "files", "--out-dir", "moved", "--in", "a"), "--in"),
        (("serve", "--pin", "1234"), "--pin"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_command_line_that_cannot_be_used_ends_with_2_and_one_line(kms: Kms, arguments: tuple[str, ...], said: str) -> None:
    ended = kms(*arguments)
    assert ended.code == 2
    assert ended.out == b""
    assert ended.err.startswith("kms: USAGE: ")
    assert ended.err.count("\n") == 1
    assert said in ended.err


def test_a_usage_error_is_json_when_asked(kms: Kms) -> None:
    ended = kms("key", "create", "--json")
    assert ended.code == 2
    assert ended.failure.keys() == {"code", "reason", "message", "metadata"}
    assert ended.failure["reason"] == "USAGE"


def test_every_fault_of_the_configuration_is_told_at_once(kms: Kms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KMS_HSM_TOKEN_LABLE", "x")
    file = tmp_path / "kms.toml"
    file.write_text('mode = "fast"\n[server]\nlisten = "nowhere"\ncolour = 1\n[hsm]\npin = "1234567"\n')
    ended = kms("serve", "--config", file)
    assert ended.code == 2
    lines = ended.err.splitlines()
    assert all(line.startswith("kms: CONFIGURATION: ") for line in lines)
    for setting in (
        "mode",
        "server.listen",
        "server.colour",
        "server.tls_cert_file",
        "hsm.pin",
        "hsm.module",
        "KMS_HSM_TOKEN_LABLE",
    ):
        assert any(f" {setting}:" in line for line in lines), setting
    assert "1234567" not in ended.err


def test_a_command_without_a_configuration_is_told_how_to_name_one(kms: Kms) -> None:
    ended = kms("key", "list")
    assert ended.code == 2
    assert "[client]: missing" in ended.err
    assert "--config FILE or KMS_CONFIG" in ended.err


def test_the_configuration_may_be_named_by_the_environment(kms: Kms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KMS_CONFIG", str(tmp_path / "absent.toml"))
    ended = kms("key", "list", "--json")
    assert ended.code == 2
    assert "absent.toml" in ended.failure["message"]


def test_a_secret_of_the_configuration_stays_out_of_its_faults(kms: Kms, tmp_path: Path) -> None:
    file = tmp_path / "kms.toml"
    file.write_text('[migration]\ndsn = "host=db password=hunter2"\n')
    ended = kms("migrate", "--config", file)
    assert ended.code == 2
    assert "hunter2" not in ended.err + ended.out.decode()


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        ("NOT_FOUND", 3),
        ("PERMISSION_DENIED", 4),
        ("UNAUTHENTICATED", 4),
        ("UNAVAILABLE", 5),
        ("DEADLINE_EXCEEDED", 5),
        ("RESOURCE_EXHAUSTED", 5),
        ("INVALID_ARGUMENT", 1),
        ("FAILED_PRECONDITION", 1),
        ("INTERNAL", 1),
    ],
)
def test_each_status_has_its_exit_code(code: str, exit_code: int) -> None:
    failure = failure_of(CallError(code, "ANY", "any", {}))
    assert failure is not None
    assert failure.exit_code == exit_code


def test_an_error_of_our_own_ends_as_the_same_error_of_the_server_does() -> None:
    failure = failure_of(KmsError(Reason.HSM_UNAVAILABLE, "the token does not answer"))
    assert failure is not None
    assert (failure.code, failure.exit_code) == ("UNAVAILABLE", 5)


def test_a_bug_is_not_reported_as_a_failure() -> None:
    assert failure_of(ZeroDivisionError()) is None


@pytest.mark.parametrize("arguments", [("version",), ("--help",)], ids=" ".join)
def test_output_into_a_closed_pipe_ends_without_a_traceback(arguments: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "kms", *arguments]
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    ended = subprocess.run(command, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True, check=False, timeout=30)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (1, "")


def test_what_a_part_of_the_service_logs_is_not_mixed_with_the_answer(
    capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    request.addfinalizer(partial(structlog.configure, **structlog.get_config()))
    Invocation().operator_config()
    structlog.get_logger().warning("reconnected")
    structlog.get_logger().info("connected")
    out, err = capsys.readouterr()
    assert out == ""
    assert "reconnected" in err
    assert " connected" not in err


def test_an_interrupt_ends_with_130_and_one_line() -> None:
    command = [sys.executable, "-m", "kms", "sign", "any", "--config", "/dev/stdin"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdin is not None
    # It waits for its configuration, and is known to have come that far when it has the pipe open a second time.
    pipe = os.readlink(f"/proc/self/fd/{process.stdin.fileno()}")
    while _open_files(process.pid).count(pipe) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == "kms: INTERRUPTED: stopped\n"
    assert process.returncode == 130


def _open_files(pid: int) -> list[str]:
    directory, found = f"/proc/{pid}/fd", []
    for name in os.listdir(directory):
        with suppress(FileNotFoundError):  # closed a moment ago
            found.append(os.readlink(f"{directory}/{name}"))
    return found
