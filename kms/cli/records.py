"""`kms records`: the MACs by which the service knows its own records in the database."""

from typing import Annotated

import typer

from kms.cli.failures import ExitCode
from kms.cli.invocation import Invocation, command, group
from kms.cli.output import print_fields, print_json


def adopt(
    invocation: Invocation,
    again: Annotated[
        bool, typer.Option("--again", help="After restoring a backup from before the first adoption, which you trust.")
    ] = False,
) -> None:
    """Give each key's record that has no MAC its own, once, for a database from before there were MACs.

    Be sure that nobody changed the database: what it says now is what the service trusts from now on. Needs [hsm] and
    [migration]. Records that have a MAC stay as they are.
    """
    config = invocation.operator_config("hsm", "migration")
    from kms.wiring import records as wiring

    adopted = wiring.adopt_records(config, again=again)
    if invocation.as_json:
        print_json({"adopted": adopted})
    else:
        print(f"{adopted} records have their MAC. From now on a record without one is refused.")


def check(invocation: Invocation) -> None:
    """Prove the record of every key, and list those that are not as the service left them.

    Needs [hsm] and [migration]. Ends with 6 where there is any. A record that was put back, MAC and all, is found by
    kms audit verify.
    """
    config = invocation.operator_config("hsm", "migration")
    from kms.wiring import records as wiring

    found = wiring.check_records(config)
    lists = {"without_mac": [str(key) for key in found.without_mac], "invalid": [str(key) for key in found.invalid]}
    if invocation.as_json:
        print_json({"proven": found.proven, **lists})
    else:
        print_fields({"proven": found.proven, **{name.replace("_", " "): ", ".join(ids) or "-" for name, ids in lists.items()}})
    if found.without_mac or found.invalid:
        raise typer.Exit(ExitCode.NOT_VALID)


def register(app: typer.Typer) -> None:
    """Add these commands to *app*."""
    records = group(app, "records", "Prove the service's records in the database.")
    command(records, "adopt", "kms records adopt --config admin.toml")(adopt)
    command(records, "check", "kms records check --config admin.toml", "kms records check --config admin.toml --json")(check)
