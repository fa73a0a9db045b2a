"""`kms hsm`: the token."""

import typer

from kms.cli.invocation import Invocation, command, group
from kms.cli.output import print_json


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


def register(app: typer.Typer) -> None:
    """Add these commands to *app*."""
    tokens = group(app, "hsm", "Prepare and examine the token.")
    command(tokens, "init", "kms hsm init --config kms.toml")(init)
    command(tokens, "probe", "kms hsm probe --config kms.toml", "kms hsm probe --config kms.toml --json")(probe)
    command(tokens, "backup-confirmed", "kms hsm backup-confirmed --config copy.toml")(backup_confirmed)
