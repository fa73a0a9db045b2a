"""What a stack keeps in its directory, and the configuration that names it all."""

import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kms.config import ClientConfig
from kms.dev.softhsm import SoftToken
from kms.pki.authority import CERTIFICATE_FILE, KEY_FILE, issue_server, make_authority
from kms.pki.client_identity import host_clock
from kms.pki.private_file import write_private

DEPLOYMENT: Final = "dev"
_HOSTS: Final = ("localhost", "kms", "127.0.0.1", "::1")  # `kms` is the service of docker-compose.yml
Settings = Mapping[str, str | Path]


@dataclass(frozen=True, slots=True)
class StackFiles:
    """The paths below one directory, and the writing of those files that are made anew at every start.

    The token is in a directory of its own, so that a copy of it is no copy of the rest.
    """

    directory: Path
    token: Path

    @property
    def configuration(self) -> Path:
        """The configuration of every `kms` command on this stack."""
        return self.directory / "kms.toml"

    @property
    def postgres(self) -> Path:
        """The database's directory."""
        return self.directory / "postgres"

    @property
    def service_log(self) -> Path:
        """What `kms serve` writes, one JSON object a line."""
        return self.directory / "serve.log"

    @property
    def authority_cert(self) -> Path:
        """The identity authority's certificate."""
        return self.directory / "authority" / CERTIFICATE_FILE

    @property
    def client(self) -> Path:
        """The directory of the user that the stack makes: certificate, key and a configuration of its own."""
        return self.directory / "clients" / "developer"

    @property
    def client_cert(self) -> Path:
        """That user's certificate."""
        return self.client / "client.crt"

    @property
    def client_key(self) -> Path:
        """That user's private key."""
        return self.client / "client.key"

    @property
    def client_configuration(self) -> Path:
        """That user's configuration: written last, so where it is the others are."""
        return self.client / "client.toml"

    def make_certificates(self) -> None:
        """Make the authority on first use, and a new server certificate: it is never found expired."""
        now = host_clock()
        authority = make_authority(self.directory / "authority", now=now)
        issue_server(authority, _HOSTS, now=now).write(self.secret("server.crt"), self.secret("server.key"))

    def write_secrets(self, *, service_dsn: str, migration_dsn: str) -> None:
        """Write the connection strings, each to a file of mode 0400."""
        write_private(self.secret("service.dsn"), service_dsn.encode())
        write_private(self.secret("migration.dsn"), migration_dsn.encode())

    def client_config(self, address: str) -> ClientConfig:
        """Return that user's way to the service at *address*."""
        return ClientConfig(server=address, ca_file=self.authority_cert, cert_file=self.client_cert, key_file=self.client_key)

    def write_configuration(self, *, listen: str, address: str, publishes_on: str, token: SoftToken) -> None:
        """Write `kms.toml`, with all paths absolute: the service listens on *listen*, clients find it at *address*.

        It publishes CRLs and OCSP answers on *publishes_on*.
        """
        sections: dict[str, Settings] = {
            "server": {
                "listen": listen,
                "tls_cert_file": self.secret("server.crt"),
                "tls_key_file": self.secret("server.key"),
                "client_ca_file": self.authority_cert,
            },
            "hsm": {"module": token.module, "token_label": token.label, "pin_file": token.pin_file},
            "database": {"dsn_file": self.secret("service.dsn")},
            "publishing": {"listen": publishes_on},
            "audit": {"checkpoints": self.directory / "checkpoints"},
            "migration": {"dsn_file": self.secret("migration.dsn")},
            "authority": {"cert_file": self.authority_cert, "key_file": self.authority_cert.with_name(KEY_FILE)},
            "client": {
                "server": address,
                "ca_file": self.authority_cert,
                "cert_file": self.client_cert,
                "key_file": self.client_key,
            },
        }
        lines = [f"# Written anew at every start of the stack in {self.directory.name}."]
        lines += _lines({"deployment_id": DEPLOYMENT, "mode": "development"})
        for name, values in sections.items():
            lines += ["", f"[{name}]", *_lines(values)]
        self.configuration.write_text("".join(line + "\n" for line in lines))

    def secret(self, name: str) -> Path:
        """Return the path of a file that nobody else may read; its directory is made if it is not there."""
        directory = self.directory / "secrets"
        directory.mkdir(mode=0o700, exist_ok=True)
        return directory / name


def free_port() -> int:
    """Return a TCP port of this host that nobody listens on at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _lines(values: Settings) -> list[str]:
    # A JSON string is a TOML string, once it leaves characters as they are.
    return [f"{name} = {json.dumps(str(value), ensure_ascii=False)}" for name, value in values.items()]
