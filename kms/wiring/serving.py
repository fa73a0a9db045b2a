"""What `kms serve` does."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import structlog
import uvloop

from kms.app.auditing import Auditing
from kms.app.moving import Moving
from kms.app.ports import Ledger, Lifecycle
from kms.app.records import Records
from kms.app.status import Administration
from kms.config import Config, ServerConfig, needed
from kms.hsm.token_hsm import HsmStatus, TokenHsm, open_hsm
from kms.jobs.postgres import AdvisoryLocks
from kms.jobs.runner import JobRunner
from kms.keys.ledger.counts import Counts
from kms.pki.client_identity import ClientIdentity, host_clock
from kms.rotation.rotating import Rotating
from kms.rotation.rotation_service import RotationServicer, add_schedule
from kms.rotation.scheduling import Scheduling
from kms.rotation.usage import LineageUsage
from kms.rpc.admin import AdminServicer
from kms.rpc.audit import AuditServicer
from kms.rpc.connections import Connections
from kms.rpc.crypto import CryptoServicer
from kms.rpc.edge import Edge
from kms.rpc.keys import KeyServicer
from kms.rpc.server import Server
from kms.store import epoch as epochs
from kms.store.cached import CachedKeys, CachedUsers, ForgettingLedger, ForgettingLifecycle
from kms.store.changes import heard
from kms.store.disk import Disk
from kms.store.journal import Journal
from kms.store.journal_knowledge import JournalKnowledge, KnownKeys
from kms.store.journaled import JournaledLifecycle
from kms.store.journaled_uses import JournaledUses
from kms.store.keys import StoredKeys
from kms.store.ledger import open_ledger
from kms.store.lifecycle import StoredLifecycle
from kms.store.pool import Pool, connection_settings
from kms.store.sealer import HistoryWatch
from kms.store.trail import StoredTrail
from kms.store.users import StoredUsers
from kms.store.watch import DatabaseProbe
from kms.store.wrapping import StoredWrappingKeys
from kms.telemetry import Spans, Telemetry
from kms.wiring import collection
from kms.wiring.audit import seal_seconds, trail_sealer, verifying
from kms.wiring.certificates import CertificateParts, certificate_parts
from kms.wiring.condition import Condition, SealWatch
from kms.wiring.control import Report
from kms.wiring.descriptors import raise_descriptor_limit
from kms.wiring.jobs import CHECKPOINTS, JobParts, serving_jobs, upkeep_jobs
from kms.wiring.key_uses import KeyUses, key_uses
from kms.wiring.limits import call_limits, connection_limits, transport_limits
from kms.wiring.log import configure_log
from kms.wiring.memory import open_journal, was_served
from kms.wiring.parts import database_dsn, hsm_settings, ready_pool
from kms.wiring.reports import ProcessReports
from kms.wiring.rotation import RotationParts, rotation_parts
from kms.wiring.seen import Pulse, seen
from kms.wiring.supervised import Stopping, Supervised
from kms.wiring.token import check_token
from kms.wiring.trust import open_trust, tls_material

HSM_OPERATIONS: Final = ("generate", "confirm", "abandon", "sign", "encrypt", "decrypt", "decrypt_rsa", "random", "mac")
_ROTATION_LOOK_SECONDS: Final = 0.05
_WATCH_SECONDS: Final = 0.25
_LOG = structlog.get_logger("kms")


@dataclass(frozen=True, slots=True)
class Service:
    """A service that runs."""

    port: int
    hsm: TokenHsm
    server: Server
    condition: Condition


def serve(config: Config, supervised: Supervised | None = None) -> None:
    """Run the service until SIGTERM or SIGINT, then let the calls in flight end; a second signal hurries.

    SIGUSR1 logs the state of the HSM. As a worker it follows its supervisor, and shares the port with other workers.
    """
    configure_log(config.log_level, worker=supervised.number if supervised else None)
    raise_descriptor_limit()
    uvloop.run(_serve(config, supervised))


async def _serve(config: Config, supervised: Supervised | None) -> None:
    stopping = Stopping()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        # The signals of a worker may be those of its process group or its unit, beside the supervisor's order.
        loop.add_signal_handler(number, stopping.drain if supervised else stopping.insist)
    if supervised is not None:
        supervised.attend(stopping)
    server_config = needed(config.server)
    async with running(config, supervised) as service:

        def log_status() -> None:
            _log_status(service.hsm.status())

        loop.add_signal_handler(signal.SIGUSR1, log_status)
        collection.serve()
        address, deployment = server_config.listen, config.deployment_id
        _LOG.info("serving", address=address, port=service.port, deployment=deployment, mode=config.mode, pid=os.getpid())
        if supervised is not None:
            supervised.serving(log_status)
        await stopping.is_draining.wait()
        _LOG.info("draining", seconds=server_config.call_seconds_max)
        service.condition.stop()
        await _drain(service.server, stopping, server_config.call_seconds_max)
    _LOG.info("stopped")
    if supervised is not None:
        supervised.say(Report.STOPPED)


async def _drain(server: Server, stopping: Stopping, seconds: float) -> None:
    """Let the calls in flight end, for at most *seconds* and until it is hurried."""
    draining = asyncio.create_task(server.stop(seconds))
    hurried = asyncio.create_task(stopping.is_hurried.wait())
    await asyncio.wait({draining, hurried}, return_when=asyncio.FIRST_COMPLETED)
    hurried.cancel()
    await server.stop(0)
    await draining


@asynccontextmanager
async def running(config: Config, supervised: Supervised | None = None) -> AsyncIterator[Service]:
    """Serve within the block, alone or as one of several workers. Leaving it gives up what is still in flight."""
    server_config = needed(config.server)
    seen_on = _seen_on(config, supervised)
    trust = open_trust(server_config)
    identity = ClientIdentity(trust, deployment=config.deployment_id, clock=host_clock)
    async with AsyncExitStack() as stack:
        dsn = database_dsn(config)
        pool = await stack.enter_async_context(ready_pool(config, dsn))
        hsm = await open_hsm(hsm_settings(config))
        stack.push_async_callback(hsm.close)
        master_keys = await check_token(config, hsm, StoredWrappingKeys(pool))
        records = Records(hsm.mac, host_clock)
        epoch = await epochs.check_epoch(pool, records, was_served=was_served(config))
        telemetry = Telemetry(stack.enter_context(_tracing(config)))
        disk = Disk(needed(config.database).disk_path)
        stored_keys = StoredKeys(pool, records)
        keys = CachedKeys(telemetry.observed(stored_keys, "store", "insert", "find", "find_usable", "page", of="keys."))
        users = CachedUsers(telemetry.observed(StoredUsers(pool), "store", "find", of="users."))
        await stack.enter_async_context(heard(dsn, {"key": keys.drop, "user": users.drop}))
        ledger = await stack.enter_async_context(
            open_ledger(dsn, pool, settled=telemetry.settled, records_strangers=disk.has_room_for_strangers)
        )
        journal = open_journal(config, *epoch)
        knowledge = await _knowledge(journal)
        known_keys = keys if knowledge is None else KnownKeys(keys, knowledge)
        moves = telemetry.observed(_lifecycle(pool, records, journal, knowledge), "store", "move", of="lifecycle.")
        lifecycle = ForgettingLifecycle(moves, keys)
        rotation = await stack.enter_async_context(rotation_parts(pool, records, hsm, master_keys, keys, journal, knowledge))
        settled = telemetry.observed(ledger, "store", "settle", "earlier", of="ledger.")
        observed = telemetry.observed(hsm, "hsm", *HSM_OPERATIONS)
        uses = key_uses(known_keys, users, observed, ForgettingLedger(settled, keys, users), keys.counts)
        certificates = certificate_parts(config, pool, records, uses, journal, knowledge, disk.has_room_for_strangers)
        runner = JobRunner(AdvisoryLocks(connection_settings(dsn)))
        history, probe, pulse = HistoryWatch(), DatabaseProbe(pool), Pulse()
        sealer = trail_sealer(config, dsn, pool, records, hsm, history, partial(runner.note_success, CHECKPOINTS))
        caches = {"keys": keys.status, "users": users.status}
        advice = _told_advice(config)
        watch = SealWatch(seal_seconds(config))
        condition = Condition(
            hsm,
            ledger,
            pool,
            records,
            disk,
            probe.answers,
            caches,
            watch,
            history,
            trust,
            master_keys,
            advice,
            jobs=runner.statuses,
        )
        is_first = supervised is None or supervised.number == 1
        told = await stack.enter_async_context(_told_uses(journal, keys.counts))
        parts = JobParts(
            pool,
            stored_keys,
            hsm,
            lifecycle,
            journal,
            told,
            disk,
            probe,
            condition,
            sealer,
            rotation,
            certificates,
            trust,
            is_first,
        )
        await stack.enter_async_context(runner.running(*upkeep_jobs(parts)))
        await stack.enter_async_context(seen(seen_on, telemetry, condition, pulse))
        connections = Connections(connection_limits(server_config))
        server = _server(
            Auditing(StoredTrail(pool), verifying(config, pool, records)),
            uses,
            ledger,
            lifecycle,
            rotation,
            certificates,
            identity,
            telemetry,
            connections,
            server_config,
            ProcessReports(condition, config.deployment_id, config.mode, supervised.number if supervised else 0),
            shares_port=supervised is not None,
        )
        await stack.enter_async_context(certificates.over_http(trust, shares_port=supervised is not None))
        port = await server.start(server_config.listen, partial(tls_material, trust))
        stack.push_async_callback(server.stop, 0)
        await stack.enter_async_context(runner.running(*serving_jobs(server, connections, port, pulse)))
        yield Service(port, hsm, server, condition)


def _seen_on(config: Config, supervised: Supervised | None) -> str | Path | None:
    """Return where metrics and readiness are seen: of a worker its supervisor says where."""
    if supervised is not None:
        return supervised.metrics
    return config.metrics.listen if config.metrics else None


async def _knowledge(journal: Journal | None) -> JournalKnowledge | None:
    """Return what is known by *journal*, read once from its beginning."""
    knowledge = None if journal is None else JournalKnowledge(journal.path)
    if knowledge is not None:
        await asyncio.to_thread(knowledge.follow)
    return knowledge


def _tracing(config: Config) -> AbstractContextManager[Spans | None]:
    if config.tracing is None:
        return nullcontext()
    # Only now: OpenTelemetry is a twentieth of what a start loads.
    from kms.wiring.tracing import tracing

    return tracing(config.tracing, config.deployment_id)


def _server(
    auditing: Auditing,
    uses: KeyUses,
    ledger: Ledger,
    lifecycle: Lifecycle,
    rotation: RotationParts,
    certificates: CertificateParts,
    identity: ClientIdentity,
    telemetry: Telemetry,
    connections: Connections,
    config: ServerConfig,
    reports: ProcessReports,
    *,
    shares_port: bool,
) -> Server:
    keys = uses.keys
    scheduling = Scheduling(keys, rotation.policies, rotation.rotations)
    edge = Edge(identity, uses.access, ledger, telemetry, connections, call_limits(config))
    return Server(
        edge,
        KeyServicer(uses.keyring, Moving(keys, lifecycle), uses.repeats, partial(add_schedule, scheduling)),
        CryptoServicer(uses.charged),
        AuditServicer(auditing),
        AdminServicer(Administration(reports)),
        RotationServicer(
            Rotating(
                keys,
                uses.hsm,
                rotation.rotations,
                uses.repeats,
                rotation.worker.do_item,
                partial(asyncio.sleep, _ROTATION_LOOK_SECONDS),
                partial(asyncio.sleep, _WATCH_SECONDS),
            ),
            scheduling,
            LineageUsage(keys, rotation.uses),
        ),
        certificates.servicer(uses),
        certificates.acme.servicer(),
        transport=transport_limits(config),
        faults=lambda: reports.condition.faults,
        shares_port=shares_port,
    )


@asynccontextmanager
async def _told_uses(journal: Journal | None, counts: Counts) -> AsyncIterator[JournaledUses | None]:
    """Yield what tells the journal of uses. At the end, when no call is served any more, it tells the last of them."""
    uses = None if journal is None else JournaledUses(journal, counts, host_clock)
    try:
        yield uses
    finally:
        if uses is not None:
            await uses.write()


def _told_advice(config: Config) -> list[str]:
    """Return what should be configured otherwise, though the service can do without; the log has it too."""
    advice = [*_without_memory(config), *_without_journal(config)]
    for sentence in advice:
        _LOG.warning("configuration", advice=sentence)
    return advice


def _without_journal(config: Config) -> list[str]:
    if config.mode != "production" or needed(config.server).journal is not None:
        return []
    return ["nothing outside the database knows of revoked keys: set server.journal"]


def _without_memory(config: Config) -> list[str]:
    if config.audit is not None and config.audit.checkpoints is not None:
        return []
    # In production mode the configuration is at fault.
    return ["the trail is not signed: set audit.checkpoints to a file outside the database"]


def _lifecycle(pool: Pool, records: Records, journal: Journal | None, knowledge: JournalKnowledge | None) -> Lifecycle:
    stored = StoredLifecycle(pool, records, knowledge)
    return stored if journal is None else JournaledLifecycle(stored, journal, host_clock)


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
