"""What the one-shot containers of `docker-compose.yml` run: `python -m kms.dev.container password|prepare|health`.

Everything is kept in three directories, each a volume: below /var/lib/kms `service`, `hsm` with the token, and `password` with
that of the database's owner, which the service itself never sees.
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
_OWNER_PASSWORD: Final = Path("/var/lib/kms/password/postgres")
_LISTEN: Final = "0.0.0.0:7443"
_ADDRESS: Final = "localhost:7443"
_PUBLISHES_ON: Final = "0.0.0.0:7480"
_SERVER: Final = "host=postgres dbname=kms"


def prepare() -> None:
    """Bring database, token and certificates to where `kms serve` can start. Raises `KmsError`."""
    service = _password(_FILES.secret("service.password"))
    database = StackDatabase(
        superuser_dsn=f"{_SERVER} user=postgres password={_password(_OWNER_PASSWORD)}",
        service_dsn=f"{_SERVER} user=kms_service password={service}",
        service_password=Secret(service.encode()),
    )
    prepared(_FILES, database, listen=_LISTEN, address=_ADDRESS, publishes_on=_PUBLISHES_ON)


def main() -> NoReturn:
    """Do what the one argument says, and end with 0 if that succeeded."""
    match sys.argv[1:]:
        case ["password"]:
            _password(_OWNER_PASSWORD)
        case ["prepare"]:
            try:
                prepare()
            except KmsError as error:
                sys.exit(error.message)
        case ["health"]:
            sys.exit(0 if is_serving(_FILES.client_config(_ADDRESS)) else 1)
        case _:
            sys.exit("expected one argument: password, prepare or health")
    sys.exit(0)


def _password(path: Path) -> str:
    """Return the password in *path*, made at random if there is none yet."""
    if not path.exists():
        write_private(path, secrets.token_urlsafe(32).encode())
    return path.read_text()


if __name__ == "__main__":
    main()
