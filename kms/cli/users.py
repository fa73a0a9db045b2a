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


def add_service(
    invocation: Invocation,
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the user is called.", show_default=False)],
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where its files go. Default: ./NAME")] = None,
) -> None:
    """Make a user that is a program, with a client certificate from the development authority.

    Writes the certificate, its private key (mode 0400) and a configuration for this command to a new directory. Needs
    [database] and [authority]. With an authority of your own, issue a certificate whose one URI name is the one printed.
    """
    config = invocation.operator_config("database", "authority")
    from kms import wiring
    from kms.pki.authority import issue_client, load_authority

    assert config.authority is not None  # noqa: S101 - `needs` has seen to it
    # All that can fail without the database comes before the row, so that no user is left without its files.
    authority = load_authority(config.authority.cert_file, config.authority.key_file)
    directory = _new_directory(out or Path(name))
    try:
        user_id = wiring.add_service(config, name)
    except BaseException:
        directory.rmdir()
        raise
    uri = identity_uri(config.deployment_id, user_id)
    issued = issue_client(authority, uri, now=datetime.now(UTC))  # noqa: TID251 - no database's clock is in this
    _write(directory, issued, config)
    found = {"id": str(user_id), "name": name, "uri": uri, "cert_file": str(directory / _CERT), "key_file": str(directory / _KEY)}
    found["config_file"] = str(directory / _CONFIG)
    if invocation.as_json:
        print_json(found)
    else:
        print_fields({field.replace("_", " "): value for field, value in found.items()})


def register(app: typer.Typer) -> None:
    """Add these commands to *app*."""
    users = group(app, "user", "Make users.")
    command(
        users,
        "add-service",
        "kms user add-service billing --config admin.toml --out /etc/billing/kms",
        "kms --config /etc/billing/kms/client.toml key list",
    )(add_service)


def _new_directory(directory: Path) -> Path:
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        raise typer.BadParameter(f"--out: expected a directory that does not exist yet, not {directory}") from None
    return directory


def _write(directory: Path, issued: "Issued", config: "Config") -> None:
    issued.write(directory / _CERT, directory / _KEY)
    server = config.client.server if config.client else config.server.listen if config.server else "127.0.0.1:7443"
    assert config.authority is not None  # noqa: S101 - the caller has seen to it
    # A JSON string is a TOML string.
    settings = {"server": server, "ca_file": str(config.authority.cert_file.absolute()), "cert_file": _CERT, "key_file": _KEY}
    lines = ("[client]", *(f"{setting} = {json.dumps(value)}" for setting, value in settings.items()))
    write_file(directory / _CONFIG, "".join(line + "\n" for line in lines).encode())
