"""Parts that several commands need: settings of the token, connection strings, a database that is as it must be."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TypeVar

from kms.app.records import Records
from kms.config import Config, needed
from kms.domain.secret import Secret
from kms.hsm.provision import token_mac
from kms.hsm.settings import HsmSettings
from kms.pki.client_identity import host_clock
from kms.store import migrate as migrations
from kms.store.pool import Pool, check_server, open_pool

Found = TypeVar("Found")


def hsm_settings(config: Config) -> HsmSettings:
    """Return what the HSM package needs to know. It reads the PIN, which can be done once."""
    hsm = needed(config.hsm)
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
        processes=config.server.workers if config.server is not None else 1,
    )


def database_dsn(config: Config) -> str:
    """Return the connection string of the service's own login."""
    return needed(config.database).read_secret("database").decode()


def migration_dsn(config: Config) -> str:
    """Return the connection string of the login that owns the schema."""
    return needed(config.migration).read_secret("migration").decode()


@contextmanager
def token_records(config: Config) -> Iterator[Records]:
    """Yield what proves records, for a command that has the token to itself."""
    with token_mac(hsm_settings(config)) as mac:

        async def made(data: bytes) -> bytes:
            return mac(data)

        yield Records(made, host_clock)


@asynccontextmanager
async def ready_pool(config: Config, dsn: str) -> AsyncIterator[Pool]:
    """Yield the pool of a database that is as the service needs it, or raise STORE_UNAVAILABLE saying what to run."""
    async with open_pool(dsn, needed(config.database).connections_max) as pool:
        await check_server(pool, allow_unsafe=config.mode == "development")
        await migrations.check_schema(pool)
        yield pool


async def with_pool(config: Config, work: Callable[[Pool], Awaitable[Found]]) -> Found:
    """Return what *work* returns, done with the pool of a database that is as the service needs it."""
    async with ready_pool(config, database_dsn(config)) as pool:
        return await work(pool)
