"""What the commands about the database do: migrations, backup and restore, epochs, partitions."""

import asyncio
from collections.abc import Sequence
from datetime import date
from functools import partial
from pathlib import Path
from uuid import UUID

from kms.certificates.postgres.replaying import renew_revoked
from kms.config import Config
from kms.domain.errors import KmsError, Reason
from kms.hsm.drill import Drill, open_envelopes
from kms.hsm.provision import token_mac
from kms.store import epoch as epochs
from kms.store import migrate as migrations
from kms.store import partitions
from kms.store import restore as restoration
from kms.store.backup import backup as make_backup
from kms.store.backup_file import Manifest
from kms.store.epoch import Beginning
from kms.store.journal import Event, read_journal
from kms.store.journal_knowledge import JournalKnowledge
from kms.store.restore_drill import held_keys
from kms.wiring.parts import database_dsn, hsm_settings, migration_dsn, ready_pool, token_records, with_pool


def migrate(config: Config) -> list[str]:
    """Bring the database to the schema of this program, with partitions two years ahead; return the files that were run."""
    done = migrations.migrate(migration_dsn(config))
    partitions.ensure_by(migration_dsn(config))
    return done


def check_schema(config: Config) -> None:
    """Raise STORE_UNAVAILABLE unless the database is at the schema of this program."""
    waiting = migrations.check(migration_dsn(config))
    if waiting:
        raise KmsError(Reason.STORE_UNAVAILABLE, f"{len(waiting)} migrations are pending, from {waiting[0]}: run `kms migrate`")


def backup(config: Config, out: Path, journals: Sequence[Path]) -> tuple[Path, Manifest]:
    """Write the database to the file *out*, or into the directory; return where it is and what it holds."""
    return make_backup(migration_dsn(config), out, journals)


def restore(config: Config, file: Path, journals: Sequence[Path]) -> restoration.Restored:
    """Restore a backup as the database of [migration], which is not there yet, in a new epoch."""
    with token_mac(hsm_settings(config)) as mac:
        restored = restoration.restore(migration_dsn(config), file, journals, mac=mac)
        renew_revoked(migration_dsn(config), _revoked_certificates(journals), mac)
        return restored


def restore_drill(config: Config, file: Path) -> Drill:
    """Restore a backup beside the database, open each envelope in the token without using it, and drop what was restored."""
    with restoration.drilled(migration_dsn(config), file) as (dsn, _):
        return open_envelopes(hsm_settings(config), held_keys(dsn))


def begin_epoch(config: Config, journals: Sequence[Path]) -> Beginning:
    """Begin an epoch in a database that was recovered or restored by other means."""
    with token_mac(hsm_settings(config)) as mac:
        begun = restoration.begin_recovered(migration_dsn(config), journals, mac=mac)
        renew_revoked(migration_dsn(config), _revoked_certificates(journals), mac)
        return begun


def _revoked_certificates(journals: Sequence[Path]) -> set[UUID]:
    lines = [line for path in journals for line in read_journal(path)]
    return {line.subject for line in lines if line.event is Event.CERTIFICATE_REVOKED}


def continue_epoch(config: Config) -> int:
    """Begin an epoch in which nothing is in doubt, and return its number."""
    with token_mac(hsm_settings(config)) as mac:
        return restoration.continue_moved(migration_dsn(config), mac)


def epoch_status(config: Config) -> tuple[epochs.Epoch | None, Sequence[epochs.UnconfirmedKey]]:
    """Return the epoch of the database, and the restored keys that wait for a confirmation."""
    return asyncio.run(_epoch_status(config))


def confirm_restored_key(config: Config, key_id: UUID, count: int) -> bool:
    """State how often a restored key was used; return whether it is active again."""
    journal = config.server.journal if config.server is not None else None
    knowledge = None if journal is None else JournalKnowledge(journal)
    with token_records(config) as records:
        confirm = partial(epochs.confirm_key, records=records, key_id=key_id, count=count, knowledge=knowledge)
        return asyncio.run(with_pool(config, confirm))


def ensure_partitions(config: Config, ahead_days: int) -> Sequence[str]:
    """Make the partitions that are missing, and return their names."""
    return asyncio.run(with_pool(config, lambda pool: partitions.ensure(pool, ahead_days)))


def default_partition_rows(config: Config) -> Sequence[partitions.DefaultRows]:
    """Return the DEFAULT partitions that hold rows."""
    return asyncio.run(with_pool(config, partitions.default_rows))


def drain_partitions(config: Config) -> int:
    """Move the rows of the DEFAULT partitions where they belong, and return how many."""
    return asyncio.run(with_pool(config, partitions.drain))


def archive_partitions(config: Config, before: date, directory: Path) -> list[partitions.Archived]:
    """Put the partitions that end by *before* into files, and drop them."""
    return partitions.archive(migration_dsn(config), before, directory)


async def _epoch_status(config: Config) -> tuple[epochs.Epoch | None, Sequence[epochs.UnconfirmedKey]]:
    async with ready_pool(config, database_dsn(config)) as pool:
        return await epochs.current_epoch(pool), await epochs.unconfirmed_keys(pool)
