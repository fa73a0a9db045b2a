"""`kms partitions`: upkeep of the trail's partitions."""

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from kms.cli.failures import ExitCode
from kms.cli.invocation import Invocation, command, group
from kms.cli.output import print_json

BeforeOption = Annotated[
    datetime,
    typer.Option(
        "--before", metavar="DAY", formats=["%Y-%m-%d"], help="Put away what ends by this day (UTC).", show_default=False
    ),
]


def ensure(
    invocation: Invocation,
    ahead: Annotated[int, typer.Option("--ahead", metavar="DAYS", min=0, max=3600, help="How far ahead.")] = 732,
) -> None:
    """Make the partitions that are missing. kms migrate does this too, and kms serve at its start and every six hours."""
    config = invocation.operator_config("database")
    from kms.wiring import database as wiring

    made = list(wiring.ensure_partitions(config, ahead))
    if invocation.as_json:
        print_json({"made": made})
    else:
        print("\n".join(f"made {name}" for name in made) or "all partitions are there")


def check(invocation: Invocation) -> None:
    """Fail if a DEFAULT partition holds rows: they found no partition of their own, and slow everything down."""
    config = invocation.operator_config("database")
    from kms.wiring import database as wiring

    found = wiring.default_partition_rows(config)
    if invocation.as_json:
        print_json({"default_partitions": [{"name": each.default_partition, "rows": each.row_count} for each in found]})
    else:
        print(
            "\n".join(f"{each.default_partition} holds {each.row_count} rows" for each in found)
            or "no DEFAULT partition has rows"
        )
    if found:
        raise typer.Exit(ExitCode.FAILED)


def drain(invocation: Invocation) -> None:
    """Move the rows of the DEFAULT partitions where they belong, in one transaction. Writers of the trail wait meanwhile."""
    config = invocation.operator_config("database")
    from kms.wiring import database as wiring

    moved = wiring.drain_partitions(config)
    if invocation.as_json:
        print_json({"moved": moved})
    else:
        print(f"{moved} rows moved")


def archive(
    invocation: Invocation,
    before: BeforeOption,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", exists=True, file_okay=False, help="Where they go.", show_default=False)
    ],
) -> None:
    """Put old partitions of the trail into files, each with a manifest and its SHA-256, and drop them.

    pg_restore reads the files. Needs [migration] with a login that sees every row.
    """
    config = invocation.operator_config("migration")
    from kms.wiring import database as wiring

    done = wiring.archive_partitions(config, before.date(), out)
    if invocation.as_json:
        print_json({"archived": [{"table": each.table, "rows": each.rows, "file": each.file} for each in done]})
    else:
        print("\n".join(f"{each.table}: {each.rows} rows in {each.file}" for each in done) or "nothing is that old")


def register(app: typer.Typer) -> None:
    """Add these commands to *app*."""
    partitions = group(app, "partitions", "Upkeep of the trail's partitions.")
    command(partitions, "ensure", "kms partitions ensure --config kms.toml")(ensure)
    command(partitions, "check", "kms partitions check --config kms.toml --json")(check)
    command(partitions, "drain", "kms partitions drain --config kms.toml")(drain)
    command(partitions, "archive", "kms partitions archive --config admin.toml --before 2026-01-01 --out /archive")(archive)
