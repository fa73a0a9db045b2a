"""What `kms serve` does."""

import asyncio
import resource
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final

import structlog
import uvloop

from kms.app.access import Access
from kms.app.auditing import Auditing
from kms.app.encryption import Encryption
from kms.app.keyring import Keyring
from kms.app.moving import Destruction, Moving
from kms.app.ports import Lifecycle
from kms.app.repeats import Uses
from kms.app.signing import Signing
from kms.config import Config, ServerConfig
from kms.domain.errors import KmsError, Reason
from kms.hsm.token_hsm import HsmStatus, TokenHsm, open_hsm
from kms.pki.client_identity import ClientIdentity, host_clock
from kms.pki.public_keys import PublicKeyOperations
from kms.rpc.audit import AuditServicer
from kms.rpc.crypto import CryptoServicer
from kms.rpc.edge import Edge
from kms.rpc.keys import KeyServicer
from kms.rpc.server import Server, TlsFiles, check_pair
from kms.store import epoch as epochs
from kms.store import partitions
from kms.store.disk import Disk
from kms.store.journal import Journal
from kms.store.journaled import JournaledLifecycle
from kms.store.keys import StoredKeys
from kms.store.ledger import StoredLedger, open_ledger
from kms.store.lifecycle import StoredLifecycle
from kms.store.pool import Pool
from kms.store.repeats import StoredRepeats
from kms.store.trail import StoredTrail
from kms.store.users import StoredUsers
from kms.store.watch import watched
from kms.store.wrapping import StoredWrappingKeys
from kms.telemetry import Telemetry
from kms.wiring.condition import CHECK_SECONDS, Condition
from kms.wiring.endpoint import seen
from kms.wiring.jobs import UPKEEP_SECONDS, destroy_due, forget_answers, repeating
from kms.wiring.log import configure_log
from kms.wiring.parts import database_dsn, hsm_settings, needed, ready_pool
from kms.wiring.token import check_token
from kms.wiring.tracing import tracing

HSM_OPERATIONS: Final = ("generate", "discard", "sign", "encrypt", "decrypt", "decrypt_rsa", "random", "mac")
_LOG = structlog.get_logger("kms")


def serve(config: Config) -> None:
    """Run the service until SIGTERM or SIGINT, then let the calls in flight end. SIGUSR1 logs the state of the HSM."""
    configure_log(config.log_level)
    # A connection is a file descriptor, and the usual soft limit is lower than what one client can open.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    uvloop.run(_serve(config))


async def _serve(config: Config) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    server_config = needed(config.server)
    async with running(config) as (port, hsm):
        loop.add_signal_handler(signal.SIGUSR1, lambda: _log_status(hsm.status()))
        _LOG.info("serving", address=server_config.listen, port=port, deployment=config.deployment_id, mode=config.mode)
        await stopping.wait()
        _LOG.info("draining", seconds=server_config.call_seconds_max)
    _LOG.info("stopped")


@asynccontextmanager
async def running(config: Config) -> AsyncIterator[tuple[int, TokenHsm]]:
    """Serve within the block; yield the port and the HSM. Leaving it drains: calls in flight end, no new one is taken."""
    server_config = needed(config.server)
    tls = TlsFiles(server_config.tls_cert_file, server_config.tls_key_file, server_config.client_ca_file)
    check_pair(tls)
    identity = ClientIdentity(
        server_config.client_ca_file, deployment=config.deployment_id, clock=host_clock, crl_file=server_config.client_crl_file
    )
    async with AsyncExitStack() as stack:
        dsn = database_dsn(config)
        pool = await stack.enter_async_context(ready_pool(config, dsn))
        await epochs.check_epoch(pool)
        await stack.enter_async_context(partitions.kept_up(pool))
        hsm = await open_hsm(hsm_settings(config))
        stack.push_async_callback(hsm.close)
        await check_token(config, hsm, StoredWrappingKeys(pool))
        telemetry = Telemetry(stack.enter_context(tracing(config.tracing, config.deployment_id)))
        disk = Disk(needed(config.database).disk_path)
        await stack.enter_async_context(repeating("disk", CHECK_SECONDS, disk.watch))
        ledger = await stack.enter_async_context(
            open_ledger(dsn, pool, settled=telemetry.settled, records_strangers=disk.has_room_for_strangers)
        )
        lifecycle = _lifecycle(pool, server_config.journal)
        await stack.enter_async_context(
            repeating("destruction", UPKEEP_SECONDS, partial(destroy_due, Destruction(lifecycle, hsm)))
        )
        await stack.enter_async_context(repeating("repeats", UPKEEP_SECONDS, partial(forget_answers, StoredRepeats(pool))))
        store_answers = await stack.enter_async_context(watched(pool))
        condition = Condition(hsm, ledger, pool, disk, store_answers)
        await stack.enter_async_context(repeating("condition", CHECK_SECONDS, condition.check))
        await stack.enter_async_context(seen(config.metrics.listen if config.metrics else None, telemetry, condition))
        server = _server(pool, hsm, ledger, lifecycle, identity, telemetry, server_config, is_ready=condition.is_ready)
        port = await server.start(server_config.listen, tls)
        stack.push_async_callback(server.stop, server_config.call_seconds_max)
        stack.callback(condition.stop)
        yield port, hsm


def _server(
    pool: Pool,
    hsm: TokenHsm,
    ledger: StoredLedger,
    lifecycle: Lifecycle,
    identity: ClientIdentity,
    telemetry: Telemetry,
    config: ServerConfig,
    *,
    is_ready: Callable[[], bool],
) -> Server:
    public_keys = PublicKeyOperations()
    keys = telemetry.observed(StoredKeys(pool), "store", "insert", "find", "find_usable", "page", of="keys.")
    users = telemetry.observed(StoredUsers(pool), "store", "find", of="users.")
    ledger = telemetry.observed(ledger, "store", "settle", "earlier", of="ledger.")
    lifecycle = telemetry.observed(lifecycle, "store", "move", of="lifecycle.")
    hsm = telemetry.observed(hsm, "hsm", *HSM_OPERATIONS)
    uses = Uses(keys, hsm, ledger)
    edge = Edge(
        identity,
        Access(users),
        ledger,
        telemetry,
        call_seconds_max=config.call_seconds_max,
        calls_per_user_max=config.calls_per_user_max,
    )
    return Server(
        edge,
        KeyServicer(Keyring(keys, hsm), Moving(keys, lifecycle), uses),
        CryptoServicer(Signing(keys, hsm, public_keys), Encryption(keys, hsm, public_keys), uses),
        AuditServicer(Auditing(StoredTrail(pool))),
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
