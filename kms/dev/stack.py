"""A stack: a database, a SoftHSM token, an identity authority and the service, with everything prepared to serve.

For development, the demonstration and tests. The service and everything that prepares it are the ordinary `kms` commands with
an ordinary configuration file, so that what works here works elsewhere.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from kms.config import ClientConfig
from kms.dev.service_process import ServiceProcess, service_process
from kms.dev.softhsm import SoftToken, soft_token
from kms.dev.stack_files import StackFiles
from kms.domain.errors import KmsError, Reason
from kms.domain.secret import Secret
from kms.store.migrate import set_service_password

_TOKEN_LABEL: Final = "neo-kms development"  # noqa: S105 - a name, no secret
_USER: Final = "developer"
_USERS_MAX: Final = 9
_COMMAND_SECONDS: Final = 120


@dataclass(frozen=True, slots=True)
class StackDatabase:
    """A database that exists: the connection strings of its owner and of the service, and the service's password."""

    superuser_dsn: str = field(repr=False)
    service_dsn: str = field(repr=False)
    service_password: Secret


@dataclass(frozen=True, slots=True)
class Stack:
    """A stack that is ready to serve: database migrated, token initialised, one user with a client certificate."""

    files: StackFiles
    database: StackDatabase
    token: SoftToken
    address: str
    publishes_on: str

    @property
    def variables(self) -> dict[str, str]:
        """The variables by which a `kms` command finds this stack."""
        return {"KMS_CONFIG": str(self.files.configuration), **self.token.environment}

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a `kms` command on this stack: ours with `variables`, and no other setting."""
        return {**_without_settings(), **self.variables}

    @property
    def client(self) -> ClientConfig:
        """The user's way to the service."""
        return self.files.client_config(self.address)

    @property
    def superuser_dsn(self) -> str:
        """The connection string of the database's superuser."""
        return self.database.superuser_dsn

    def kms(self, *arguments: str, config: Path | None = None) -> str:
        """Run a `kms` command on this stack, with *config* as the user that it names, and return what it prints.

        Raises STORE_UNAVAILABLE with what it complains of.
        """
        return _kms(arguments if config is None else ("--config", str(config), *arguments), self.environment)

    @contextmanager
    def serving(self, *, workers: int | None = None) -> Iterator[ServiceProcess]:
        """Run `kms serve`, yield it when it is healthy, and stop it at the end. Raises STORE_UNAVAILABLE naming its log.

        *workers* None is as many as the configuration says.
        """
        with service_process(self.environment, self.files.service_log, self.client, workers=workers) as process:
            yield process


def prepared(files: StackFiles, database: StackDatabase, *, listen: str, address: str, publishes_on: str) -> Stack:
    """Return the stack whose files are in *files*, made on first use, on *database*.

    The service listens on *listen* and *publishes_on*, clients find it at *address*. An interrupted first preparation is simply
    begun again. Raises `KmsError`, saying why.
    """
    files.make_certificates()
    files.write_secrets(service_dsn=database.service_dsn, migration_dsn=database.superuser_dsn)
    stack = Stack(files, database, _initialised_token(files.token), address, publishes_on)
    files.write_configuration(listen=listen, address=address, publishes_on=publishes_on, token=stack.token)
    stack.kms("migrate")
    set_service_password(database.superuser_dsn, database.service_password)
    if not files.client_configuration.exists():
        _make_user(stack)
    return stack


def _initialised_token(directory: Path) -> SoftToken:
    if not directory.exists():
        # Made aside and renamed: a token that has no keys yet is never found.
        unfinished = directory.with_name(f"{directory.name}.new")
        shutil.rmtree(unfinished, ignore_errors=True)
        _kms(("hsm", "init"), _token_environment(soft_token(unfinished, _TOKEN_LABEL)))
        unfinished.rename(directory)
    return soft_token(directory, _TOKEN_LABEL)


def _token_environment(token: SoftToken) -> dict[str, str]:
    settings = {
        "KMS_MODE": "development",
        "KMS_HSM_MODULE": str(token.module),
        "KMS_HSM_TOKEN_LABEL": token.label,
        "KMS_HSM_PIN_FILE": str(token.pin_file),
    }
    return {**_without_settings(), **token.environment, **settings}


def _make_user(stack: Stack) -> None:
    """Make the user, under another name where an interrupted start has left its row without its certificate."""
    directory = stack.files.client
    directory.parent.mkdir(mode=0o700, exist_ok=True)
    for number in range(1, _USERS_MAX + 1):
        shutil.rmtree(directory, ignore_errors=True)
        try:
            stack.kms("user", "add-service", _USER if number == 1 else f"{_USER}-{number}", "--out", str(directory))
        except KmsError as error:
            if Reason.NAME_TAKEN not in error.message or number == _USERS_MAX:
                raise
        else:
            return


def _kms(arguments: tuple[str, ...], environment: Mapping[str, str]) -> str:
    result = subprocess.run(  # noqa: S603  # our own interpreter and module
        [sys.executable, "-m", "kms", *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_COMMAND_SECONDS,
        check=False,
    )
    if result.returncode != 0:
        raise KmsError(Reason.STORE_UNAVAILABLE, f"kms {' '.join(arguments)} failed: {result.stderr.strip()}")
    return result.stdout


def _without_settings() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("KMS_")}
