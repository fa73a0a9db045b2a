"""`kms hsm`: the token."""

import typer

from kms.cli.invocation import Invocation, command, group
from kms.cli.output import print_json


def init(invocation: Invocation) -> None:
    """Make the service's own keys in the token: those that wrap and seal all others, and a canary under each.

    Refuses a token that has them: nothing is ever overwritten. Back up the token afterwards.
    """
    config = invocation.config("hsm")
    from kms import wiring

    wiring.hsm_init(config)
    if invocation.as_json:
        print_json({"initialised": True})
    else:
        print("The token has its keys. Back it up now, then run: kms hsm backup-confirmed")


def probe(invocation: Invocation) -> None:
    """Say what the token can do, and whether the service can use it."""
    config = invocation.config("hsm")
    from kms import wiring

    found = wiring.hsm_probe(config)
    print(found)


def backup_confirmed(invocation: Invocation) -> None:
    """Say that the token has been backed up. Without it nothing stored can ever be opened on another token."""
    config = invocation.config("hsm")
    from kms import wiring

    wiring.confirm_backup(config)
    if invocation.as_json:
        print_json({"backup_confirmed": True})
    else:
        print("The backup is noted.")


def register(app: typer.Typer) -> None:
    """Add these commands to *app*."""
    tokens = group(app, "hsm", "Prepare and examine the token.")
    command(tokens, "init", "kms hsm init --config kms.toml")(init)
    command(tokens, "probe", "kms hsm probe --config kms.toml", "kms hsm probe --config kms.toml --json")(probe)
    command(tokens, "backup-confirmed", "kms hsm backup-confirmed --config kms.toml")(backup_confirmed)
