"""The parts of ACME."""

import asyncio
import ipaddress
import ssl
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import structlog

from kms.app.records import Records
from kms.certificates.acme.accounts import ClientAccounts, ManagingAccounts
from kms.certificates.acme.acme_service import AcmeServicer
from kms.certificates.acme.jobs import forgetting_job
from kms.certificates.acme.nonces import PROCESS_BYTES, Nonces
from kms.certificates.acme.orders import Ordering
from kms.certificates.acme.postgres import StoredAccounts, StoredNonces, StoredOrders
from kms.certificates.acme.probes import NetworkProbes
from kms.certificates.acme.renewal import Renewal
from kms.certificates.acme.requests import Authenticating
from kms.certificates.acme.revoking import ClientRevoking
from kms.certificates.acme.server import Acme, serving_acme
from kms.certificates.issuing import Issuing
from kms.certificates.postgres.authorities import StoredAuthorities
from kms.certificates.postgres.certificates import StoredCertificates
from kms.certificates.publishing.bounded import HttpLimits
from kms.certificates.record import record_bytes
from kms.certificates.revoking import Revoking
from kms.config import AcmeConfig
from kms.jobs.job import Job
from kms.pki.client_identity import host_clock
from kms.pki.trust import Trust
from kms.store.journal import Journal
from kms.store.journal_knowledge import JournalKnowledge
from kms.store.pool import Pool
from kms.wiring.key_uses import KeyUses

_LOG = structlog.get_logger("kms")


@dataclass(frozen=True, slots=True)
class AcmeParts:
    """What is stored of accounts and orders, and what works with it."""

    config: AcmeConfig | None
    authorities: StoredAuthorities
    certificates: StoredCertificates
    issuing: Issuing
    revoking: Revoking
    uses: KeyUses
    accounts: StoredAccounts
    pool: Pool
    records: Records

    def jobs(self) -> list[Job]:
        """Return the jobs of each worker."""
        return [forgetting_job(StoredNonces(self.pool))]

    def servicer(self) -> AcmeServicer:
        """Return the servicer of AcmeService."""
        accounts = ManagingAccounts(self.accounts, self.issuing, self.uses.hsm.mac)
        return AcmeServicer(accounts, self.config.url if self.config else "")

    @asynccontextmanager
    async def serving(self, trust: Trust, *, shares_port: bool) -> AsyncIterator[None]:
        """Serve ACME on the address of the configuration within the block; without one: nowhere."""
        if self.config is None:
            yield
            return
        limits = HttpLimits(self.config.connections_max, self.config.connection_seconds, self.config.connection_seconds)
        async with AsyncExitStack() as stack:
            background = await stack.enter_async_context(_background())
            acme = await self._acme(self.config, background)
            context = await asyncio.to_thread(FollowedContext, trust)
            port = await stack.enter_async_context(
                serving_acme(self.config.listen, acme, limits, context.context, shares_port=shares_port)
            )
            _LOG.info("serving ACME", address=self.config.listen, url=self.config.url, port=port)
            yield

    async def _acme(self, config: AcmeConfig, background: "_Background") -> Acme:
        hsm, issuing = self.uses.hsm, self.issuing
        # All workers have the same key, so each takes the nonces of the others.
        key, process = await hsm.mac(record_bytes(b"ACME nonces")), await hsm.random(PROCESS_BYTES)
        nonces = Nonces(key, process, host_clock, StoredNonces(self.pool))
        clients = ClientAccounts(self.accounts, self.uses.access, issuing, hsm.mac)
        renewal = Renewal(self.authorities, self.certificates)
        orders = StoredOrders(self.pool, self.records, config.orders_per_hour_max)
        networks = [ipaddress.ip_network(network) for network in config.networks]
        probes = NetworkProbes(list(map(_place, config.resolvers)), networks, config.http_port)
        return Acme(
            config.url,
            nonces,
            Authenticating(clients, nonces),
            clients,
            Ordering(orders, clients, issuing, renewal, probes, background.begin),
            renewal,
            ClientRevoking(self.accounts, clients, orders, issuing, renewal, self.revoking.revoke),
            issuing,
        )


def acme_parts(
    config: AcmeConfig | None,
    pool: Pool,
    records: Records,
    uses: KeyUses,
    authorities: StoredAuthorities,
    certificates: StoredCertificates,
    issuing: Issuing,
    revoking: Revoking,
    journal: Journal | None,
    knowledge: JournalKnowledge | None,
) -> AcmeParts:
    """Return the parts, as `kms serve` has them."""
    accounts = StoredAccounts(pool, records, knowledge, journal)
    return AcmeParts(config, authorities, certificates, issuing, revoking, uses, accounts, pool, records)


class FollowedContext:
    """A TLS context that follows our certificate: a renewed one is shown from the next handshake on."""

    def __init__(self, trust: Trust) -> None:
        self._trust = trust
        self._pair = trust.pair
        self._newest = _loaded(trust)
        self.context = _loaded(trust)
        self.context.sni_callback = self._renew

    def _renew(self, connection: ssl.SSLSocket | ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        if (pair := self._trust.pair) is not self._pair:
            try:
                self._newest = _loaded(self._trust)
            except (OSError, ssl.SSLError):
                return  # the files have changed once more: the next handshake looks again
            self._pair = pair
        connection.context = self._newest


def _loaded(trust: Trust) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(trust.files.certificate, trust.files.key)
    return context


class _Background:
    """Work that nobody waits for."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, work: Coroutine[Any, Any, None]) -> None:
        """Begin *work*."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # The client's next look begins the step again.
            _LOG.warning("a challenge was not completed", error=type(error).__name__)

    async def end(self) -> None:
        """Give up what is not done."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def _background() -> AsyncIterator[_Background]:
    background = _Background()
    try:
        yield background
    finally:
        await background.end()


def _place(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
