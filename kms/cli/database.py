"""`kms backup`, `restore` and `epoch`: the database saved, brought back, and what a restored one must not bring back."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import typer

from kms.cli.failures import ExitCode
from kms.cli.interruption import interruptible
from kms.cli.invocation import Invocation, command, group
from kms.cli.output import print_fields, print_json

if TYPE_CHECKING:
    from kms.store.epoch import Beginning

FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="A file that kms backup made.", show_default=False)]
JournalOption = Annotated[
    list[Path] | None,
    typer.Option("--journal", metavar="FILE", help="The journal of revocations; repeat it for each machine's."),
]
RestoredKeyArgument = Annotated[UUID, typer.Argument(metavar="KEY", help="The key's id.", show_default=False)]


def backup(
    invocation: Invocation,
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE|DIR", help="A file that is not there yet, or a directory.", show_default=False)
    ],
    journal: JournalOption = None,
) -> None:
    """Write the whole database to one file of mode 0600.

    Needs [migration] with a login that sees every row: a superuser, or backup_user. Name the journals: without them a
    restored database has every key inactive. The file opens no key without the token; keep the two apart.
    """
    config = invocation.operator_config("migration")
    from kms.wiring import database as wiring

    path, manifest = wiring.backup(config, out, journal or [])
    found = {
        "file": str(path),
        "created_at": manifest.created_at,
        "rows": sum(manifest.rows.values()),
        "bytes": path.stat().st_size,
        "sha256": manifest.dump_sha256,
        "journals": len(manifest.journals),
    }
    _show(invocation, found)


def restore(
    invocation: Invocation,
    file: FileArgument,
    journal: JournalOption = None,
    drill: Annotated[
        bool, typer.Option("--drill", help="Only try: restore beside the database, open every envelope, and remove it all.")
    ] = False,
) -> None:
    """Make the database of [migration], which must not be there yet or be empty, from a backup.

    A new epoch begins: sessions are gone, the journal is replayed, and keys whose uses are counted, or which were changed
    after the backup, are inactive until kms epoch confirm. Without the journal every key is. Needs [hsm] too, since changed
    records get new MACs. --drill uses no key, and fails unless all open.
    """
    if drill:
        _drill(invocation, file, journal)
        return
    config = invocation.operator_config("migration", "hsm")
    from kms.wiring import database as wiring

    with interruptible():
        done = wiring.restore(config, file, journal or [])
    found = {
        "database": done.database,
        "backup_created_at": done.created_at,
        "rows": done.rows,
        "roles_made": list(done.roles_made),
        "migrations_applied": list(done.applied),
        **_told(done.beginning),
    }
    _show(invocation, found)


def begin(invocation: Invocation, journal: JournalOption = None) -> None:
    """Begin an epoch in a database that was recovered to a point in time, or restored by other means.

    Stop the service first. Does what kms restore does after restoring. Needs [migration] and [hsm]. Give every journal that there
    is, and be sure that none has lost its end; with none, every key is inactive.
    """
    config = invocation.operator_config("migration", "hsm")
    from kms.wiring import database as wiring

    _show(invocation, _told(wiring.begin_epoch(config, journal or [])))


def go_on(invocation: Invocation) -> None:
    """State that the database has lost nothing, though it lies elsewhere: a standby was promoted, or the cluster upgraded.

    If a single committed transaction may be missing, use kms epoch begin instead. Needs [migration] and [hsm].
    """
    config = invocation.operator_config("migration", "hsm")
    from kms.wiring import database as wiring

    _show(invocation, {"epoch": wiring.continue_epoch(config)})


def show(invocation: Invocation) -> None:
    """Show the epoch of the database, and the restored keys that wait for kms epoch confirm. Needs [database]."""
    config = invocation.operator_config("database")
    from kms.wiring import database as wiring

    epoch, waiting = wiring.epoch_status(config)
    found: dict[str, Any] = {
        "epoch": epoch.number if epoch else None,
        "cause": epoch.cause if epoch else None,
        "begun_at": epoch.begun_at.isoformat() if epoch else None,
        "may_be_served": epoch is None or epoch.is_here,
        "unconfirmed": [{"key": str(each.key_id), "owner": str(each.user_id), "epoch": each.epoch} for each in waiting],
    }
    if invocation.as_json:
        print_json(found)
        return
    print_fields({name.replace("_", " "): value for name, value in found.items() if name != "unconfirmed"})
    for each in waiting:
        print(f"unconfirmed  {each.key_id}  of user {each.user_id}")


def confirm(
    invocation: Invocation,
    key: RestoredKeyArgument,
    count: Annotated[int, typer.Option(metavar="N", min=0, help="How often the key was used by now.", show_default=False)],
) -> None:
    """State how often a restored key was used; it is then what it was before the restore.

    Count high where you are not sure: from the journal of its callers, never from the backup. Needs [database].
    """
    config = invocation.operator_config("database")
    from kms.wiring import database as wiring

    _show(invocation, {"key": str(key), "count": count, "active": wiring.confirm_restored_key(config, key, count)})


def register(app: typer.Typer) -> None:
    """Add these commands to *app*."""
    command(app, "backup", "kms backup --config admin.toml --out /backups --journal /var/lib/kms/journal")(backup)
    command(
        app,
        "restore",
        "kms restore --config admin.toml /backups/kms.kmsbackup --journal /var/lib/kms/journal",
        "kms restore --config admin.toml /backups/kms.kmsbackup --drill",
    )(restore)
    epochs = group(app, "epoch", "What a restored database must not bring back.")
    command(epochs, "show", "kms epoch show --config kms.toml")(show)
    command(epochs, "begin", "kms epoch begin --config admin.toml --journal /var/lib/kms/journal")(begin)
    command(epochs, "continue", "kms epoch continue --config admin.toml")(go_on)
    command(epochs, "confirm", "kms epoch confirm --config kms.toml 018f0000-0000-4000-8000-000000000000 --count 1200")(confirm)


def _drill(invocation: Invocation, file: Path, journal: list[Path] | None) -> None:
    if journal:
        raise typer.BadParameter("--drill begins no epoch: leave --journal out")
    config = invocation.operator_config("migration", "hsm")
    from kms.wiring import database as wiring

    with interruptible():
        found = wiring.restore_drill(config, file)
    told = {"opened": found.opened, "kek_missing": list(map(str, found.kek_missing)), "invalid": list(map(str, found.invalid))}
    _show(invocation, told)
    if found.kek_missing or found.invalid:
        raise typer.Exit(ExitCode.FAILED)


def _told(beginning: "Beginning") -> dict[str, Any]:
    return {
        "epoch": beginning.number,
        "replayed": sum(beginning.replayed.values()),
        "emptied": list(beginning.emptied),
        "deactivated": beginning.deactivated,
        "unconfirmed": beginning.unconfirmed,
        "invalid": list(map(str, beginning.invalid)),
        "superseded": list(map(str, beginning.superseded)),
        "lost_successors": list(map(str, beginning.lost_successors)),
    }


def _show(invocation: Invocation, found: Mapping[str, Any]) -> None:
    if invocation.as_json:
        print_json(found)
        return
    fields = {
        name.replace("_", " "): ", ".join(value) or "-" if isinstance(value, list) else value for name, value in found.items()
    }
    print_fields(fields)
