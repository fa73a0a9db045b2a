"""A PostgreSQL 17 of our own, from a wheel, in one directory: for development, the demonstration and tests.

The server listens on a Unix socket only. The superuser is known by the operating system's user (`peer`), everyone else
by SCRAM, so no password is ever an argument. It lives no longer than the process that started it.
"""

import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from kms.dev.bound_process import bound
from kms.dev.postgres_binaries import Account, reachable_binaries, server_account
from kms.domain.errors import KmsError, Reason
from kms.pki.private_file import write_private

SUPERUSER: Final = "postgres"
SERVICE_USER: Final = "kms_service"
DURABLE: Final[Mapping[str, str]] = {}
FAST_UNSAFE: Final[Mapping[str, str]] = {"fsync": "off", "full_page_writes": "off", "synchronous_commit": "off"}

_START_SECONDS: Final = 90.0  # a busy disk takes its time
_STOP_SECONDS: Final = 30.0
_POLL_SECONDS: Final = 0.02
_SOCKET_PATH_BYTES_MAX: Final = 100  # sun_path has 108, of which PostgreSQL wants some for the lock file's suffix
_SOCKET_NAME: Final = ".s.PGSQL.5432"

_SETTINGS: Final[Mapping[str, str]] = {
    "listen_addresses": "",
    "shared_preload_libraries": "pg_stat_statements",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_parameter_max_length": "0",
    "log_parameter_max_length_on_error": "0",
}


@dataclass(frozen=True, slots=True)
class EmbeddedPostgres:
    """A running server. Its methods give connection strings; `embedded_postgres` starts and stops it."""

    directory: Path
    socket_directory: Path
    bin_directory: Path

    def superuser_dsn(self, database: str = "postgres") -> str:
        """Return the connection string of the superuser: without a password, for the user that started the server alone."""
        return self._dsn(SUPERUSER, database)

    def service_dsn(self, database: str) -> str:
        """Return the connection string of the service's role. It contains the password."""
        return f"{self._dsn(SERVICE_USER, database)} password={_quoted(self.service_password())}"

    def service_password(self) -> str:
        """Return the password of the service's role, made at the first call and kept in a file of mode 0400."""
        path = self.directory / "service.password"
        if not path.exists():
            write_private(path, secrets.token_urlsafe(32).encode())
        return path.read_text()

    @property
    def log_file(self) -> Path:
        """Where the server writes its log."""
        return self.directory / "postgres.log"

    def _dsn(self, user: str, database: str) -> str:
        return f"host={_quoted(str(self.socket_directory))} user={user} dbname={_quoted(database)}"


@contextmanager
def embedded_postgres(directory: Path, settings: Mapping[str, str] = DURABLE) -> Iterator[EmbeddedPostgres]:
    """Start the server whose data is in *directory*, made on first use, and stop it at the end.

    *settings* are PostgreSQL's, over our own; `FAST_UNSAFE` suits tests. Started by root it runs as `postgres` or `nobody`,
    to whom *directory* must be reachable. Raises STORE_UNAVAILABLE, saying why, if it does not start.
    """
    directory = directory.absolute()
    if set('"$`\\') & set(str(directory)):
        raise KmsError(Reason.STORE_UNAVAILABLE, f"initdb, which asks a shell, cannot work in {directory}: choose a plainer name")
    directory.mkdir(mode=0o711, parents=True, exist_ok=True)
    account = server_account()
    account.check_reaches(directory)
    binaries = reachable_binaries(directory, account)
    data = directory / "data"
    if not data.exists():
        _make_cluster(binaries, data, account, durable=settings.get("fsync") != "off")
    _await_end_of_predecessor(data)
    _write_access_rules(data)
    with _socket_directory(directory, account) as sockets:
        server = EmbeddedPostgres(directory, sockets, binaries)
        arguments = {**_SETTINGS, "unix_socket_directories": _listed(sockets), **settings}
        process = _start(server, data, account, arguments)
        try:
            _await_ready(process, data, server.log_file)
            yield server
        finally:
            _stop(process)


@contextmanager
def temporary_postgres(settings: Mapping[str, str] = FAST_UNSAFE) -> Iterator[EmbeddedPostgres]:
    """Start an empty server in a temporary directory that is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="kms-postgres-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        directory.chmod(0o711)  # the server's user passes through it to its data
        with embedded_postgres(directory, settings) as server:
            yield server


def _make_cluster(binaries: Path, data: Path, account: Account, *, durable: bool) -> None:
    # Made aside and renamed, so that an interrupted initdb leaves nothing that looks like data.
    unfinished = data.with_name("data.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    account.make_directory(unfinished)
    options = [
        "--username",
        SUPERUSER,
        "--auth=peer",
        "--encoding=UTF8",
        "--locale-provider=libc",
        "--locale=C",
        "--data-checksums",
    ]
    command = [str(binaries / "initdb"), "-D", str(unfinished), *options, *([] if durable else ["--no-sync"])]
    result = account.run(command)
    if result.returncode != 0:
        raise KmsError(Reason.STORE_UNAVAILABLE, f"initdb could not make {data}: {result.stderr.strip()}")
    unfinished.rename(data)


def _write_access_rules(data: Path) -> None:
    owner = pwd.getpwuid(os.geteuid()).pw_name
    (data / "pg_ident.conf").write_text(f'starter "{owner}" {SUPERUSER}\n')
    rules = (f"local all {SUPERUSER} peer map=starter", "local all all scram-sha-256")
    (data / "pg_hba.conf").write_text("".join(rule + "\n" for rule in rules))


@contextmanager
def _socket_directory(directory: Path, account: Account) -> Iterator[Path]:
    near = directory / "socket"
    # libpq takes a comma for the end of a host.
    if len(os.fsencode(near / _SOCKET_NAME)) <= _SOCKET_PATH_BYTES_MAX and "," not in str(near):
        if not near.exists():
            account.make_directory(near)
        yield near
        return
    with tempfile.TemporaryDirectory(prefix="kms-socket-", dir="/tmp") as far:  # short, and the name is random
        account.own(Path(far))
        yield Path(far)


def _start(server: EmbeddedPostgres, data: Path, account: Account, settings: Mapping[str, str]) -> subprocess.Popen[bytes]:
    options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    command = bound([str(server.bin_directory / "postgres"), "-D", str(data), *options], signal.SIGINT)  # fast shutdown
    with open(os.open(server.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as log:
        return account.start(command, log=log)


def _await_ready(process: subprocess.Popen[bytes], data: Path, log_file: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while _postmaster(data, "ready") is None:
        if process.poll() is not None or time.monotonic() > deadline:
            raise KmsError(Reason.STORE_UNAVAILABLE, f"the embedded PostgreSQL did not start; its log is {log_file}")
        time.sleep(_POLL_SECONDS)


def _await_end_of_predecessor(data: Path) -> None:
    """Wait for the server of a process that was killed a moment ago. A stale pid file is PostgreSQL's to remove."""
    deadline = time.monotonic() + _STOP_SECONDS
    while (pid := _postmaster(data, "any")) is not None and _is_alive(pid):
        if time.monotonic() > deadline:
            raise KmsError(Reason.STORE_UNAVAILABLE, f"process {pid} already serves {data}")
        time.sleep(_POLL_SECONDS)


def _postmaster(data: Path, status: Literal["ready", "any"]) -> int | None:
    """Return the process id in postmaster.pid, whose eighth line is the server's status."""
    try:
        lines = (data / "postmaster.pid").read_text().splitlines()
    except FileNotFoundError:
        return None
    if not lines or (status == "ready" and (len(lines) < 8 or lines[7].strip() != "ready")):
        return None
    return int(lines[0])


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        process.stdin.close()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        raise KmsError(Reason.STORE_UNAVAILABLE, "the embedded PostgreSQL did not stop in time") from None


def _quoted(value: str) -> str:
    """Return *value* as libpq reads it in a connection string."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _listed(path: Path) -> str:
    """Return *path* as one element of a list of directories in PostgreSQL's settings."""
    return '"' + str(path).replace('"', '""') + '"'
