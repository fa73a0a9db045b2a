"""Connections to PostgreSQL, and transactions that say for whom they act.

The service's login has no rights of its own. Each transaction first takes a role and names a user, by one statement, until
its end; row security does the rest. Without that statement, or with a wrong one, there are no rows.
"""

import asyncio
import select
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, LiteralString, TypeVar

import psycopg
import psycopg_pool
from psycopg import AsyncConnection
from psycopg import errors as pg
from psycopg.abc import Buffer
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import PipelineStatus, TransactionStatus
from psycopg.rows import DictRow, dict_row
from psycopg.types.datetime import TimestamptzLoader
from psycopg_pool import AsyncConnectionPool

from kms.domain.errors import KmsError
from kms.domain.ids import UserId
from kms.store.errors import NO_REFUSALS, Refusals, translated, unavailable
from kms.store.login_settings import take_own_settings

ACT_AS: Final = "SELECT set_config('role', %s, true), set_config('app.user_id', %s, true)"
CONFIGURE: Final = """
    SELECT set_config('statement_timeout', '30s', false), set_config('lock_timeout', '10s', false),
        set_config('idle_in_transaction_session_timeout', '60s', false)
"""

# A server that vanished without a word is noticed within about 15 seconds.
_CONNECTION_DEFAULTS: Final[Mapping[str, Any]] = {
    "application_name": "kms",
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 5,
    "tcp_user_timeout": 15_000,
}
_LAST_MOMENT: Final = datetime.max.replace(tzinfo=UTC)
_IDLE_CONNECTIONS: Final = 2
_RECONNECT_SECONDS: Final = 3.0
_CLOSE_SECONDS: Final = 5.0
_UNHEARD_SECONDS: Final = 0.5

# How the database refuses what a caller asks for. Anyone can make it do so, so these must not cost a connection each.
_REFUSALS: Final = (
    KmsError,
    psycopg.IntegrityError,
    psycopg.DataError,
    pg.SerializationFailure,
    pg.ObjectNotInPrerequisiteState,
    pg.NoDataFound,
)
# The server may keep a statement that psycopg prepared in vain. Its memory is freed with the connection.
_REFUSALS_MAX: Final = 100

Parameters = Mapping[str, object]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Acting:
    """A database role, and the user for whom it acts (empty: nobody)."""

    role: LiteralString
    user_id: str = ""


AS_JOB: Final = Acting("job_runner")
AS_ADMINISTRATOR: Final = Acting("admin_users")
AS_AUDITOR: Final = Acting("auditor_users")
BEFORE_LOGIN: Final = Acting("none")


def as_user(user_id: UserId) -> Acting:
    """Act as the user: his rows and no others."""
    return Acting("authenticated_users", str(user_id))


class _MomentLoader(TimestamptzLoader):
    """Reads a moment that no calendar has, such as infinity, as the last one.

    No record of ours has either, so the MAC of that row fails, and the rows beside it are read.
    """

    def load(self, data: Buffer) -> datetime:
        """Return the moment."""
        try:
            return super().load(data)
        except psycopg.DataError:
            return _LAST_MOMENT


class PooledConnection(AsyncConnection[DictRow]):
    """A connection that counts the refusals it has seen."""

    refusals: int = 0


class Pool:
    """Connections of the service. Its methods raise STORE_UNAVAILABLE; the pool recovers when the database does.

    A call that is cancelled, as one is whose deadline passes, gives its place up while it waits. Once it has a connection, the
    connection is always given back: psycopg's own pool loses one whose return is cancelled. One whose state is not known is
    closed first, and the pool opens another.
    """

    def __init__(self, connections: AsyncConnectionPool[PooledConnection], *, wait_seconds: float) -> None:
        self._connections = connections
        self._wait_seconds = wait_seconds
        self._room = asyncio.Semaphore(connections.max_size)
        self._unheard: set[asyncio.Task[Any]] = set()

    async def fetch(
        self,
        acting: Acting,
        query: LiteralString,
        parameters: Parameters | None = None,
        *,
        refusals: Refusals = NO_REFUSALS,
    ) -> list[DictRow]:
        """Return the rows of one query: one round trip, one transaction. *refusals* says what its exceptions mean."""
        return (await self.fetch_each(acting, (query, parameters), refusals=refusals))[0]

    async def fetch_each(
        self, acting: Acting, *queries: tuple[LiteralString, Parameters | None], refusals: Refusals = NO_REFUSALS
    ) -> list[list[DictRow]]:
        """Return the rows of each query: one round trip, one transaction. *refusals* says what their exceptions mean.

        No lock is held until this process has answered. A call that is cancelled leaves open whether what they write was stored.
        """
        with translated(refusals):
            await self._enter()
            # To cancel a query costs the server a connection, to let it end a millisecond.
            return await self._to_its_end(self._fetch_each(acting, queries))

    @asynccontextmanager
    async def transaction(self, acting: Acting) -> AsyncIterator[AsyncConnection[DictRow]]:
        """Run the block in one transaction, committed at its end or rolled back when it raises.

        The connection is in pipeline mode: a statement is sent at once, its error comes when its rows are fetched.
        """
        with translated():
            await self._enter()
            async with self._connection() as connection, connection.pipeline(), connection.transaction():
                await connection.execute(ACT_AS, (acting.role, acting.user_id))
                yield connection

    async def _enter(self) -> None:
        try:
            async with asyncio.timeout(self._wait_seconds):
                await self._room.acquire()
        except TimeoutError:
            raise unavailable("the database does not answer as fast as it is asked") from None

    async def _fetch_each(
        self, acting: Acting, queries: Sequence[tuple[LiteralString, Parameters | None]]
    ) -> list[list[DictRow]]:
        async with self._connection() as connection:
            # Between two synchronisations of a pipeline the server runs one implicit transaction.
            async with connection.pipeline():
                await connection.execute(ACT_AS, (acting.role, acting.user_id))
                cursors = [await connection.execute(query, parameters) for query, parameters in queries]
            return [await cursor.fetchall() for cursor in cursors]

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[PooledConnection]:
        """Yield a connection to whoever has entered, and leave at the end."""
        try:
            connection = await self._to_its_end(self._take(), unheard=self._connections.putconn)
        except BaseException:
            self._room.release()
            raise
        is_whole = False
        try:
            yield connection
            is_whole = True
        except _REFUSALS:
            connection.refusals += 1
            is_whole = connection.refusals < _REFUSALS_MAX and _is_idle(connection)
            raise
        finally:
            await self._to_its_end(self._give_back(connection, is_whole=is_whole))

    async def _take(self) -> PooledConnection:
        # The pool's own check of a connection costs a round trip, and it waits longer after each one that fails it.
        while _was_closed(connection := await self._connections.getconn()):
            await connection.close()
            await self._connections.putconn(connection)
        return connection

    async def _give_back(self, connection: PooledConnection, *, is_whole: bool) -> None:
        try:
            if not is_whole:
                # Cancelled in the middle of an exchange, or an unexpected error: what it has prepared is not known.
                await connection.close()
            await self._connections.putconn(connection)
        finally:
            self._room.release()

    async def _to_its_end(
        self, work: Coroutine[Any, Any, T], *, unheard: Callable[[T], Coroutine[Any, Any, None]] | None = None
    ) -> T:
        """Return the result of *work*. If the caller is cancelled it goes on for a while, and its result goes to *unheard*."""
        task = asyncio.create_task(work)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            self._keep(_finish(task, unheard))
            raise

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        # The loop itself holds tasks weakly.
        task = asyncio.create_task(work)
        self._unheard.add(task)
        task.add_done_callback(self._unheard.discard)


async def _finish(task: asyncio.Task[T], unheard: Callable[[T], Coroutine[Any, Any, None]] | None) -> None:
    with suppress(psycopg.Error, psycopg_pool.PoolTimeout, KmsError, TimeoutError):
        result = await asyncio.wait_for(task, _UNHEARD_SECONDS)
        if unheard is not None:
            await unheard(result)


@asynccontextmanager
async def open_pool(dsn: str, connections_max: int, *, wait_seconds: float = 5.0) -> AsyncIterator[Pool]:
    """Connect to *dsn* and yield the pool; a call waits at most *wait_seconds* for a connection.

    Raises STORE_UNAVAILABLE if nobody answers there, or if the login has rights that the service must not have.
    """
    settings = connection_settings(dsn)
    await _check_login(settings)
    connections = AsyncConnectionPool(
        connection_class=PooledConnection,
        # With another threshold psycopg counts uses first. Then it believes that a statement is prepared which the server has
        # skipped after an error in the pipeline (docs/upstream). What it prepares at the first use it checks.
        kwargs={**settings, "autocommit": True, "row_factory": dict_row, "prepare_threshold": 0},
        min_size=min(_IDLE_CONNECTIONS, connections_max),
        max_size=connections_max,
        timeout=wait_seconds,
        reconnect_timeout=_RECONNECT_SECONDS,
        configure=_configure,
        name="kms",
        open=False,
    )
    try:
        await connections.open()
        yield Pool(connections, wait_seconds=wait_seconds)
    finally:
        await connections.close(_CLOSE_SECONDS)


def connection_settings(dsn: str) -> dict[str, Any]:
    """Return libpq's settings in *dsn* with our defaults below them, or raise STORE_UNAVAILABLE for one that is none."""
    try:
        return {**_CONNECTION_DEFAULTS, **conninfo_to_dict(dsn)}
    except psycopg.ProgrammingError:
        # libpq's message quotes the string, which holds a password.
        expected = "expected postgresql://user@host/database or 'host=… user=… dbname=…'"
        raise unavailable(f"the connection string cannot be read: {expected}") from None


async def _configure(connection: PooledConnection) -> None:
    connection.adapters.register_loader("timestamptz", _MomentLoader)
    await take_own_settings(connection)
    await connection.execute(CONFIGURE)


def _is_idle(connection: AsyncConnection[DictRow]) -> bool:
    """Whether the connection is outside any transaction and pipeline."""
    pgconn = connection.pgconn
    return pgconn.transaction_status == TransactionStatus.IDLE and pgconn.pipeline_status == PipelineStatus.OFF


def _was_closed(connection: AsyncConnection[DictRow]) -> bool:
    """Whether the server has closed an idle connection: it has nothing else to say, so there is something to read."""
    waiting = select.poll()
    waiting.register(connection.pgconn.socket, select.POLLIN)
    return bool(waiting.poll(0))


LOGIN: Final = """
    SELECT r.rolname AS name, r.rolsuper OR r.rolbypassrls OR r.rolcreaterole OR r.rolcreatedb OR r.rolreplication AS is_mighty,
        EXISTS (SELECT FROM pg_catalog.pg_class AS c WHERE c.relowner = r.oid)
            OR EXISTS (SELECT FROM pg_catalog.pg_namespace AS n WHERE n.nspowner = r.oid)
            OR EXISTS (SELECT FROM pg_catalog.pg_proc AS p WHERE p.proowner = r.oid)
            OR EXISTS (SELECT FROM pg_catalog.pg_database AS d WHERE d.datdba = r.oid) AS is_owner,
        EXISTS (SELECT FROM pg_catalog.pg_auth_members AS m WHERE m.member = r.oid AND (m.inherit_option OR m.admin_option))
            AS is_heir,
        EXISTS (
            SELECT FROM pg_catalog.pg_largeobject_metadata AS l
            WHERE l.lomowner = r.oid
                OR l.lomowner IN (SELECT m.roleid FROM pg_catalog.pg_auth_members AS m WHERE m.member = r.oid)
        ) AS has_large_objects,
        ARRAY(
            SELECT g.rolname::text
            FROM pg_catalog.pg_auth_members AS m JOIN pg_catalog.pg_roles AS g ON g.oid = m.roleid
            WHERE m.member = r.oid AND m.set_option
        ) AS roles
    FROM pg_catalog.pg_roles AS r
    WHERE r.rolname = session_user
"""
_ROLES: Final = {"authenticated_users", "admin_users", "auditor_users", "job_runner"}


async def _check_login(settings: Mapping[str, Any]) -> None:
    with translated():
        try:
            connection = await AsyncConnection[DictRow].connect(**settings, autocommit=True, row_factory=dict_row)
        except psycopg.OperationalError as error:
            raise unavailable(f"no connection to the database: {error}") from None
        async with connection:
            await take_own_settings(connection)
            login = await (await connection.execute(LOGIN)).fetchone()
    if login is None or login["is_mighty"] or login["is_owner"] or login["is_heir"] or not set(login["roles"]) <= _ROLES:
        name = "?" if login is None else login["name"]
        raise unavailable(
            f"the login {name} may do more than the service should: row security would not hold for it; use kms_service"
        )
    if login["has_large_objects"]:
        raise unavailable(
            f"the login {login['name']}, or a role that it takes, owns large objects, which fail backups: find out who made "
            "them, remove them with lo_unlink, and run schema/bootstrap.sql"
        )
    if set(login["roles"]) != _ROLES:
        raise unavailable(f"the login {login['name']} cannot take the service's roles; run `kms migrate`, and use kms_service")


SERVER: Final = """
    SELECT current_setting('server_version_num')::int AS version, current_setting('server_encoding') AS encoding,
        current_setting('fsync')::bool AND current_setting('full_page_writes')::bool AS is_durable,
        pg_is_in_recovery() AS is_standby
"""


async def check_server(pool: Pool, *, allow_unsafe: bool = False) -> None:
    """Raise STORE_UNAVAILABLE for a server that the service must not use; *allow_unsafe* lets `fsync = off` pass."""
    server = (await pool.fetch(BEFORE_LOGIN, SERVER))[0]
    if server["version"] < 160_000:
        raise unavailable(f"PostgreSQL 16 or later is needed, not {server['version'] // 10_000}")
    if server["encoding"] != "UTF8":
        raise unavailable(f"the database's encoding must be UTF8, not {server['encoding']}")
    if server["is_standby"]:
        raise unavailable("the database is a standby, which cannot write")
    if not server["is_durable"] and not allow_unsafe:
        raise unavailable("the database may lose what it has confirmed: set fsync = on and full_page_writes = on")
