"""`kms hsm`: the token."""

from typing import TYPE_CHECKING, Annotated
from uuid import UUID

import typer

from kms.cli.failures import ExitCode
from kms.cli.invocation import Invocation, command, group
from kms.cli.output import print_json, print_table
from kms.domain.ids import KeyId

if TYPE_CHECKING:
    from kms.domain.residents import Finding


def init(invocation: Invocation) -> None:
    """Make the service's own keys in the token: those that wrap and seal all others, a canary under each, and a MAC key.

    Adds what is missing (a token of an earlier version has no MAC key) and refuses a token that has them all: nothing is
    ever overwritten. Copy the token afterwards.
    """
    config = invocation.operator_config("hsm")
    from kms.wiring import token as wiring

    wiring.hsm_init(config)
    if invocation.as_json:
        print_json({"initialised": True})
    else:
        print("The token has its keys. Copy it now, then run with the copy: kms hsm backup-confirmed")


def probe(invocation: Invocation) -> None:
    """Say what the token can do, and whether the service can use it."""
    config = invocation.operator_config("hsm")
    from kms.wiring import token as wiring

    found = wiring.hsm_probe(config)
    if invocation.as_json:
        print_json(found.as_json())
    else:
        print(found)


def backup_confirmed(invocation: Invocation) -> None:
    """Test a copy of the token and put on record that it exists.

    Run it with the copy, not the original, in [hsm]. Needs [database] too. In production `kms serve` refuses to start
    without that record: losing the token loses every key.
    """
    config = invocation.operator_config("hsm", "database")
    from kms.wiring import token as wiring

    wiring.confirm_backup(config)
    if invocation.as_json:
        print_json({"backup_confirmed": True})
    else:
        print("The copy opens what the token sealed; it is on record.")


def check(
    invocation: Invocation,
    remove: Annotated[
        UUID | None,
        typer.Option("--remove", metavar="ID", help="Remove this key from the token, for ever. It must have no row."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="With --remove: do not ask.")] = False,
) -> None:
    """Compare the RESIDENT keys in the token with the database, and remove what is left of creations that failed.

    A key is removed if its creation did not end within an hour and the database has no row for it. A key that was finished
    stays in the token, also where its row is missing: whoever owns the database can delete rows. Such a key is listed. The
    service does the same at its start and every five minutes. Needs [database] too. Exits with 1 where something needs you.
    """
    config = invocation.operator_config("hsm", "database")
    from kms.domain.residents import ADVICE, NEEDS_OPERATOR
    from kms.wiring import token as wiring

    if remove is not None:
        wiring.remove_resident(config, KeyId(remove), _agree if yes else _ask)
        if invocation.as_json:
            print_json({"removed": str(remove)})
        else:
            print(f"{remove} is removed from the token.")
        return
    found = wiring.check_residents(config)
    if invocation.as_json:
        print_json({"keys": [{"id": str(key_id), "finding": finding} for key_id, finding in found.items()]})
    else:
        print_table(
            ("key", "finding", "what that means"),
            [(str(key_id), finding, ADVICE.get(finding, "")) for key_id, finding in found.items()],
        )
    if not NEEDS_OPERATOR.isdisjoint(found.values()):
        raise typer.Exit(ExitCode.FAILED)


def register(app: typer.Typer) -> None:
    """Add these commands to *app*."""
    tokens = group(app, "hsm", "Prepare and examine the token.")
    command(tokens, "init", "kms hsm init --config kms.toml")(init)
    command(tokens, "probe", "kms hsm probe --config kms.toml", "kms hsm probe --config kms.toml --json")(probe)
    command(
        tokens,
        "check",
        "kms hsm check --config kms.toml",
        "kms hsm check --config kms.toml --remove 018f0000-0000-4000-8000-000000000000",
    )(check)
    command(tokens, "backup-confirmed", "kms hsm backup-confirmed --config copy.toml")(backup_confirmed)


def _ask(finding: "Finding") -> None:
    typer.confirm(f"This is a key that is {finding}. Once removed it is lost for ever. Remove it?", abort=True, err=True)


def _agree(_finding: "Finding") -> None:
    pass
