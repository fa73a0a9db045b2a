"""The only module that knows everything: builds the parts from the configuration and joins them.

Each public function is what one `kms` command does. All raise `KmsError` or `ConfigError` with a sentence that says what
to do.
"""

import asyncio
import logging
import resource
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import date
from pathlib import Path
from typing import Final, TypeVar
from uuid import UUID

import structlog
import uvloop

from kms.app.access import Access
from kms.app.encryption import Encryption
from kms.app.keyring import Keyring
from kms.app.moving import Destruction, Moving
from kms.app.ports import Lifecycle
from kms.app.repeats import Uses
from kms.app.signing import Signing
from kms.config import Config, ConfigError, ServerConfig
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import UserId
from kms.domain.secret import Secret
from kms.hsm import probe, provision
from kms.hsm.drill import Drill, open_envelopes
from kms.hsm.settings import HsmSettings
from kms.hsm.token_hsm import HsmStatus, TokenHsm, open_hsm
from kms.hsm.wrapping_keys import Kind, WrappingKey
from kms.pki.client_identity import ClientIdentity, host_clock
from kms.pki.public_keys import PublicKeyOperations
from kms.rpc.crypto import CryptoServicer
from kms.rpc.edge import Edge
from kms.rpc.keys import KeyServicer
from kms.rpc.server import Server, TlsFiles, check_pair
from kms.store import epoch as epochs
from kms.store import migrate as migrations
from kms.store import partitions
from kms.store import restore as restoration
from kms.store.backup import backup as make_backup
from kms.store.backup_file import Manifest
from kms.store.epoch import Beginning
from kms.store.journal import Journal
from kms.store.journaled import JournaledLifecycle
from kms.store.keys import StoredKeys
from kms.store.ledger import StoredLedger, open_ledger
from kms.store.lifecycle import StoredLifecycle
from kms.store.pool import Pool, check_server, open_pool
from kms.store.restore_drill import held_keys
from kms.store.users import StoredUsers
from kms.store.watch import watched
from kms.store.wrapping import Kind as StoredKind
from kms.store.wrapping import StoredWrappingKeys, TokenKey

Section = TypeVar("Section")
_DESTRUCTION_SECONDS: Final = 60.0
Found = TypeVar("Found")
_STORED_KINDS: Final[dict[Kind, StoredKind]] = {Kind.KEK: "kek", Kind.SEALING: "sealing"}
_LOG = structlog.get_logger("kms")


def serve(config: Config) -> None:
    """Run the service until SIGTERM or SIGINT, then let the calls in flight end. SIGUSR1 logs the state of the HSM."""
    _configure_log(config.log_level)
    # A connection is a file descriptor, and the usual soft limit is lower than what one client can open.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    uvloop.run(_serve(config))


def migrate(config: Config) -> list[str]:
    """Bring the database to the schema of this program; return the names of the files that were run."""
    return migrations.migrate(_migration_dsn(config))


def check_schema(config: Config) -> None:
    """Raise STORE_UNAVAILABLE unless the database is at the schema of this program."""
    waiting = migrations.check(_migration_dsn(config))
    if waiting:
        raise KmsError(Reason.STORE_UNAVAILABLE, f"{len(waiting)} migrations are pending, from {waiting[0]}: run `kms migrate`")


def set_service_password(config: Config, password: Secret) -> None:
    """Give the login `kms_service` its password."""
    migrations.set_service_password(_migration_dsn(config), password)


def hsm_init(config: Config) -> provision.TokenDescription:
    """Make the KEK, the sealing key and their canary in the token. Raises NAME_TAKEN where it has them already."""
    return provision.init(_hsm_settings(config))


def hsm_probe(config: Config) -> probe.Report:
    """Return what the token can do, tried on throw-away keys."""
    return probe.examine(_hsm_settings(config))


def confirm_backup(config: Config) -> None:
    """Open the canaries of the token that is configured, a copy, and record that a tested copy exists."""
    found = provision.check_copy(_hsm_settings(config))
    asyncio.run(_confirm_backup(config, found))


def add_service(config: Config, name: str) -> UserId:
    """Make a user that is a program, known by its client certificate. Raises MALFORMED or NAME_TAKEN."""
    return asyncio.run(_add_service(config, name))


def backup(config: Config, out: Path, journals: Sequence[Path]) -> tuple[Path, Manifest]:
    """Write the database to the file *out*, or into the directory; return where it is and what it holds."""
    return make_backup(_migration_dsn(config), out, journals)


def restore(config: Config, file: Path, journals: Sequence[Path]) -> restoration.Restored:
    """Restore a backup as the database of [migration], which is not there yet, in a new epoch."""
    return restoration.restore(_migration_dsn(config), file, journals)


def restore_drill(config: Config, file: Path) -> Drill:
    """Restore a backup beside the database, open each envelope in the token without using it, and drop what was restored."""
    with restoration.drilled(_migration_dsn(config), file) as (dsn, _):
        return open_envelopes(_hsm_settings(config), held_keys(dsn))


def begin_epoch(config: Config, journals: Sequence[Path]) -> Beginning:
    """Begin an epoch in a database that was recovered or restored by other means."""
    return restoration.begin_recovered(_migration_dsn(config), journals)


def continue_epoch(config: Config) -> int:
    """Begin an epoch in which nothing is in doubt, and return its number."""
    return restoration.continue_moved(_migration_dsn(config))


def epoch_status(config: Config) -> tuple[epochs.Epoch | None, Sequence[epochs.UnconfirmedKey]]:
    """Return the epoch of the database, and the restored keys that wait for a confirmation."""
    return asyncio.run(_epoch_status(config))


def confirm_restored_key(config: Config, key_id: UUID, count: int) -> bool:
    """State how often a restored key was used; return whether it is active again."""
    return asyncio.run(_with_pool(config, lambda pool: epochs.confirm_key(pool, key_id, count)))


def ensure_partitions(config: Config, ahead_days: int) -> Sequence[str]:
    """Make the partitions that are missing, and return their names."""
    return asyncio.run(_with_pool(config, lambda pool: partitions.ensure(pool, ahead_days)))


def default_partition_rows(config: Config) -> Sequence[partitions.DefaultRows]:
    """Return the DEFAULT partitions that hold rows."""
    return asyncio.run(_with_pool(config, partitions.default_rows))


def drain_partitions(config: Config) -> int:
    """Move the rows of the DEFAULT partitions where they belong, and return how many."""
    return asyncio.run(_with_pool(config, partitions.drain))


def archive_partitions(config: Config, before: date, directory: Path) -> list[partitions.Archived]:
    """Put the partitions that end by *before* into files, and drop them."""
    return partitions.archive(_migration_dsn(config), before, directory)


async def _serve(config: Config) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    server_config = _needed(config.server)
    async with running(config) as (port, hsm):
        loop.add_signal_handler(signal.SIGUSR1, lambda: _log_status(hsm.status()))
        _LOG.info("serving", address=server_config.listen, port=port, deployment=config.deployment_id, mode=config.mode)
        await stopping.wait()
        _LOG.info("draining", seconds=server_config.call_seconds_max)
    _LOG.info("stopped")


@asynccontextmanager
async def running(config: Config) -> AsyncIterator[tuple[int, TokenHsm]]:
    """Serve within the block; yield the port and the HSM. Leaving it drains: calls in flight end, no new one is taken."""
    server_config = _needed(config.server)
    tls = TlsFiles(server_config.tls_cert_file, server_config.tls_key_file, server_config.client_ca_file)
    check_pair(tls)
    identity = ClientIdentity(
        server_config.client_ca_file, deployment=config.deployment_id, clock=host_clock, crl_file=server_config.client_crl_file
    )
    async with AsyncExitStack() as stack:
        dsn = _database_dsn(config)
        pool = await stack.enter_async_context(_ready_pool(config, dsn))
        await epochs.check_epoch(pool)
        await stack.enter_async_context(partitions.kept_up(pool))
        hsm = await open_hsm(_hsm_settings(config))
        stack.push_async_callback(hsm.close)
        await _check_token(config, hsm, StoredWrappingKeys(pool))
        ledger = await stack.enter_async_context(open_ledger(dsn, pool))
        lifecycle = _lifecycle(pool, server_config.journal)
        await stack.enter_async_context(_destroying(Destruction(lifecycle, hsm)))
        store_answers = await stack.enter_async_context(watched(pool))

        def is_ready() -> bool:
            return hsm.is_available() and store_answers()

        server = _server(pool, hsm, ledger, lifecycle, identity, server_config, is_ready=is_ready)
        port = await server.start(server_config.listen, tls)
        stack.push_async_callback(server.stop, server_config.call_seconds_max)
        yield port, hsm


def _server(
    pool: Pool,
    hsm: TokenHsm,
    ledger: StoredLedger,
    lifecycle: Lifecycle,
    identity: ClientIdentity,
    config: ServerConfig,
    *,
    is_ready: Callable[[], bool],
) -> Server:
    keys, public_keys = StoredKeys(pool), PublicKeyOperations()
    edge = Edge(
        identity,
        Access(StoredUsers(pool)),
        ledger,
        call_seconds_max=config.call_seconds_max,
        calls_per_user_max=config.calls_per_user_max,
    )
    return Server(
        edge,
        KeyServicer(Keyring(keys, hsm), Moving(keys, lifecycle)),
        CryptoServicer(Signing(keys, hsm, public_keys), Encryption(keys, hsm, public_keys), Uses(keys, hsm, ledger)),
        calls_max=config.calls_max,
        is_ready=is_ready,
    )


def _lifecycle(pool: Pool, journal_file: Path | None) -> Lifecycle:
    if journal_file is None:
        return StoredLifecycle(pool)
    journal = Journal(journal_file)
    try:
        journal.begin(at=host_clock())
    except OSError as error:
        raise KmsError(Reason.STORE_UNAVAILABLE, f"the journal {journal_file} cannot be written: {error.strerror}") from None
    return JournaledLifecycle(StoredLifecycle(pool), journal)


def _database_dsn(config: Config) -> str:
    return _needed(config.database).read_secret("database").decode()


@asynccontextmanager
async def _ready_pool(config: Config, dsn: str) -> AsyncIterator[Pool]:
    """Yield the pool of a database that is as the service needs it, or raise STORE_UNAVAILABLE saying what to run."""
    async with open_pool(dsn, _needed(config.database).connections_max) as pool:
        await check_server(pool, allow_unsafe=config.mode == "development")
        await migrations.check_schema(pool)
        yield pool


@asynccontextmanager
async def _destroying(destruction: Destruction) -> AsyncIterator[None]:
    """Destroy keys whose time has come, within the block. That they are not usable does not wait for it."""

    async def repeat() -> None:
        while True:
            try:
                for key_id in await destruction.destroy_due():
                    _LOG.info("key destroyed", key=str(key_id))
            except KmsError as error:
                _LOG.warning("destruction put off", reason=error.reason, message=error.message)
            await asyncio.sleep(_DESTRUCTION_SECONDS)

    task = asyncio.create_task(repeat())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _check_token(config: Config, hsm: TokenHsm, known: StoredWrappingKeys) -> None:
    """Record the token's keys. Raises HSM_KEK_MISSING for another token, and in production for one without a tested copy."""
    serial, found = hsm.wrapping_keys().token_serial, _token_keys(hsm.wrapping_keys().keys)
    serials = {key.token_serial for key in await known.read()}
    if serials - {serial}:
        _LOG.warning("another token serial", seen=serial, before=sorted(serials - {serial}))
    await known.register(found, serial)
    unconfirmed = [key for key in await known.read() if key.backup_confirmed_at is None]
    if unconfirmed and config.mode == "production":
        raise KmsError(
            Reason.HSM_UNAVAILABLE,
            "no tested copy of the token is on record, and losing the token loses every key: copy it, then run "
            "`kms hsm backup-confirmed` with the copy in the configuration",
        )


async def _confirm_backup(config: Config, found: provision.TokenDescription) -> None:
    async with _ready_pool(config, _database_dsn(config)) as pool:
        known = StoredWrappingKeys(pool)
        before = {key.key_id for key in await known.read()}
        # A copy may have a serial of its own; only where the database knows nothing yet is it written down.
        if not before:
            await known.register(_token_keys(found.wrapping_keys), found.serial)
        elif not before <= {key.key_id for key in found.wrapping_keys}:
            raise KmsError(Reason.HSM_KEK_MISSING, "this is no copy of the token: keys that the database knows are not in it")
        await known.confirm_backup()


def _token_keys(keys: tuple[WrappingKey, ...]) -> list[TokenKey]:
    return [TokenKey(key.key_id, _STORED_KINDS[key.kind], key.generation) for key in keys]


async def _epoch_status(config: Config) -> tuple[epochs.Epoch | None, Sequence[epochs.UnconfirmedKey]]:
    async with _ready_pool(config, _database_dsn(config)) as pool:
        return await epochs.current_epoch(pool), await epochs.unconfirmed_keys(pool)


async def _with_pool(config: Config, work: Callable[[Pool], Awaitable[Found]]) -> Found:
    async with _ready_pool(config, _database_dsn(config)) as pool:
        return await work(pool)


async def _add_service(config: Config, name: str) -> UserId:
    async with _ready_pool(config, _database_dsn(config)) as pool:
        return await StoredUsers(pool).create_service(name)


def _hsm_settings(config: Config) -> HsmSettings:
    hsm = _needed(config.hsm)
    return HsmSettings(
        module=hsm.module,
        token_label=hsm.token_label,
        pin=Secret(hsm.read_secret("hsm")),
        lanes=hsm.lanes,
        sessions_max=hsm.sessions_max,
        queue_max=hsm.queue_max,
        handles_max=hsm.handles_max,
        handle_idle_seconds=hsm.handle_idle_seconds,
        stuck_seconds=hsm.stuck_seconds,
        resident_keys_max=hsm.resident_keys_max,
        allow_sealed=config.mode == "development" if hsm.allow_sealed is None else hsm.allow_sealed,
    )


def _migration_dsn(config: Config) -> str:
    return _needed(config.migration).read_secret("migration").decode()


def _log_status(status: HsmStatus) -> None:
    _LOG.info(
        "hsm status",
        available=status.is_available,
        sessions=status.sessions,
        lanes=status.lanes,
        lanes_abandoned=status.lanes_abandoned,
        handles=status.handles,
        memory_locked=status.is_memory_locked,
    )


def _needed(section: Section | None) -> Section:
    """Return the section; `load(needs=…)` has told the user by name if it is missing."""
    if section is None:
        raise ConfigError(["a section of the configuration that this command needs is missing"])
    return section


def _configure_log(level: str) -> None:
    """Write one JSON object a line to standard error."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(level=logging.WARNING, handlers=[_Forwarded()], force=True)


class _Forwarded(logging.Handler):
    """Libraries log with the standard library; one line of theirs becomes one of ours."""

    def emit(self, record: logging.LogRecord) -> None:
        """Log *record*."""
        error = record.exc_info[1] if record.exc_info else None
        _LOG.warning("library", logger=record.name, message=record.getMessage(), error=type(error).__name__ if error else None)
