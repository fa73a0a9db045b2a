"""`kms user`: who may call."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from kms.cli.invocation import Invocation, command, group
from kms.cli.output import print_fields, print_json, write_file
from kms.domain.ids import identity_uri

if TYPE_CHECKING:
    from kms.config import Config
    from kms.pki.authority import Issued

_CERT: Final = "client.crt"
_KEY: Final = "client.key"
_CONFIG: Final = "client.toml"
_EVERY_INTERFACE: Final = ("0.0.0.0", "[::]")  # noqa: S104 - where a server may listen, and no client connects to


def add_service(
    invocation: Invocation,
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the user is called.", show_default=False)],
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where its files go. Default: ./NAME")] = None,
    server: Annotated[
        str | None, typer.Option("--server", metavar="HOST:PORT", help="Where it reaches the service. Default: as configured.")
    ] = None,
    role: Annotated[
        str | None,
        typer.Option(
            metavar="ROLE",
            help="auditor: it reads the trail, and nothing else. recovery: it also decrypts with keys of its own that are "
            "compromised or revoked. rotator: it rotates the keys of all users, and uses none. Default: none.",
        ),
    ] = None,
) -> None:
    """Make a user that is a program, and print the URI that its client certificate must name.

    Needs [database]. With [authority], the development authority, it also writes a certificate, its private key (mode 0400)
    and a configuration for this command to a new directory. With an authority of your own, issue the certificate there.
    """
    config = invocation.operator_config("database")
    from kms.wiring import users as wiring

    if config.authority is None:
        user_id = wiring.add_service(config, name, role)
        _print(invocation, {"id": str(user_id), "name": name, "uri": identity_uri(config.deployment_id, user_id)})
        return
    from kms.pki.authority import issue_client, load_authority

    # All that can fail without the database comes before the row, so that no user is left without its files.
    address = _client_address(config, server)
    authority = load_authority(config.authority.cert_file, config.authority.key_file)
    directory = _new_directory(out or Path(name))
    try:
        user_id = wiring.add_service(config, name, role)
    except BaseException:
        directory.rmdir()
        raise
    uri = identity_uri(config.deployment_id, user_id)
    issued = issue_client(authority, uri, now=datetime.now(UTC))  # noqa: TID251 - no database's clock is in this
    _write(directory, issued, address, config.client.ca_file if config.client else config.authority.cert_file)
    files = {"cert_file": str(directory / _CERT), "key_file": str(directory / _KEY), "config_file": str(directory / _CONFIG)}
    _print(invocation, {"id": str(user_id), "name": name, "uri": uri, **files})


def register(app: typer.Typer) -> None:
    """Add these commands to *app*."""
    users = group(app, "user", "Make users.")
    command(
        users,
        "add-service",
        "kms user add-service billing --config kms.toml --out /etc/billing/kms --server kms.example:7443",
        "kms user add-service inspector --role auditor",
        "kms --config /etc/billing/kms/client.toml key list",
    )(add_service)


def _new_directory(directory: Path) -> Path:
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        raise typer.BadParameter(f"--out: expected a directory that does not exist yet, not {directory}") from None
    return directory


def _client_address(config: "Config", given: str | None) -> str:
    listens = config.server.listen if config.server else "127.0.0.1:7443"
    address = given or (config.client.server if config.client else listens)
    if address.rpartition(":")[0] in _EVERY_INTERFACE:
        raise typer.BadParameter(f"--server: expected the HOST:PORT at which a client reaches the service, not {address}")
    return address


def _write(directory: Path, issued: "Issued", address: str, ca_file: Path) -> None:
    issued.write(directory / _CERT, directory / _KEY)
    # A JSON string is a TOML string.
    settings = {"server": address, "ca_file": str(ca_file.absolute()), "cert_file": _CERT, "key_file": _KEY}
    lines = ("[client]", *(f"{setting} = {json.dumps(value)}" for setting, value in settings.items()))
    write_file(directory / _CONFIG, "".join(line + "\n" for line in lines).encode())


def _print(invocation: Invocation, found: dict[str, str]) -> None:
    if invocation.as_json:
        print_json(found)
    else:
        print_fields({field.replace("_", " "): value for field, value in found.items()})
