"""What the one-shot containers of `docker-compose.yml` run: `python -m kms.dev.container secrets|prepare|health`.

Everything is kept in two directories, each a volume: /var/lib/kms/service, and /var/lib/kms/hsm with the token.
"""

import secrets
import sys
from pathlib import Path
from typing import Final, NoReturn

from kms.dev.service_process import is_serving
from kms.dev.stack import StackDatabase, prepared
from kms.dev.stack_files import StackFiles
from kms.domain.errors import KmsError
from kms.domain.secret import Secret
from kms.pki.private_file import write_private

_FILES: Final = StackFiles(Path("/var/lib/kms/service"), token=Path("/var/lib/kms/hsm/token"))
_LISTEN: Final = "0.0.0.0:7443"
_ADDRESS: Final = "localhost:7443"
_SERVER: Final = "host=postgres dbname=kms"


def make_secrets() -> None:
    """Make the passwords of the database's two logins, once."""
    for login in ("postgres", "kms_service"):
        if not _password_file(login).exists():
            write_private(_password_file(login), secrets.token_urlsafe(32).encode())


def prepare() -> None:
    """Bring database, token and certificates to where `kms serve` can start. Raises `KmsError`."""
    superuser, service = (_password_file(login).read_text() for login in ("postgres", "kms_service"))
    database = StackDatabase(
        superuser_dsn=f"{_SERVER} user=postgres password={superuser}",
        service_dsn=f"{_SERVER} user=kms_service password={service}",
        service_password=Secret(service.encode()),
    )
    prepared(_FILES, database, listen=_LISTEN, address=_ADDRESS)


def main() -> NoReturn:
    """Do what the one argument says, and end with 0 if that succeeded."""
    match sys.argv[1:]:
        case ["secrets"]:
            make_secrets()
        case ["prepare"]:
            try:
                prepare()
            except KmsError as error:
                sys.exit(error.message)
        case ["health"]:
            sys.exit(0 if is_serving(_FILES.client_config(_ADDRESS)) else 1)
        case _:
            sys.exit("expected one argument: secrets, prepare or health")
    sys.exit(0)


def _password_file(login: str) -> Path:
    return _FILES.secret(f"{login}.password")


if __name__ == "__main__":
    main()
