"""The port `Ledger`: uses are charged and recorded together, durably, many at once (group commit).

One task takes everything that waits and settles it by one statement on a connection of its own. While that commits, the next
batch gathers: the more calls, the more of them share a commit. No lock is held across a round trip.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from copy import copy
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Final

import psycopg
import structlog
from psycopg import errors as pg

from kms.app.access import credentials_invalid
from kms.app.keyring import key_not_found
from kms.app.ports import Call, Entry, Repeat, Stranger
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyId, UserId
from kms.domain.key_row import record_invalid
from kms.domain.lifecycle import State, check_use
from kms.domain.permissions import check_use_permitted
from kms.store.batches import BatchConnection, connect, encoded
from kms.store.errors import unavailable, unexpected
from kms.store.pool import Pool, connection_settings
from kms.store.refusals import Refusals, open_refusals
from kms.store.repeats import StoredRepeats

BATCH_MAX: Final = 256
_RETRY_SECONDS: Final = 0.1
# The number of a batch is not the next one: after a day without a batch the database forgets the last. Or the statement was
# prepared before a function changed its type.
_OF_THE_CONNECTION: Final = (pg.SerializationFailure, pg.FeatureNotSupported)
_LOG = structlog.get_logger("kms.store.ledger")
Settled = Callable[[int, float], None]


@dataclass(slots=True, eq=False)
class _Waiting:
    """An entry on its way; it changes as it goes. A caller who gives up cancels `outcome`."""

    entry: Entry
    text: str
    outcome: asyncio.Future[None]
    is_sent: bool = False


@dataclass(slots=True)
class LedgerStatus:
    """What the ledger has done so far. `commit_seconds` is the sum over `batches`; `unrecorded` are refusals of strangers."""

    waiting: int = 0
    batches: int = 0
    entries: int = 0
    charges: int = 0
    commit_seconds: float = 0.0
    losses: int = 0
    refusals_waiting: int = 0
    refusals_unrecorded: int = 0


@dataclass(slots=True, eq=False)
class _Writer:
    """The task that settles batches. It holds the queue and the connection, so it changes."""

    settings: Mapping[str, Any]
    queue_max: int
    answer_seconds: float
    settled: Settled
    connection: BatchConnection | None = None
    status: LedgerStatus = field(default_factory=LedgerStatus)
    queue: deque[_Waiting] = field(default_factory=deque)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    is_closing: bool = False

    def put(self, entry: Entry) -> _Waiting:
        """Let an entry wait for the next batch, or raise STORE_UNAVAILABLE."""
        if self.is_closing:
            raise unavailable("the service is stopping")
        if len(self.queue) >= self.queue_max:
            raise unavailable("too many uses wait to be recorded")
        waiting = _Waiting(entry, encoded(entry), asyncio.get_running_loop().create_future())
        self.queue.append(waiting)
        self.arrived.set()
        return waiting

    async def run(self) -> None:
        """Settle what arrives, until closed and empty."""
        while not (self.is_closing and not self.queue):
            await self.arrived.wait()
            while batch := self._take():
                try:
                    await self._write(batch)
                except Exception as error:  # noqa: BLE001  # a bug must not stop everybody's uses: those in the batch get it
                    _LOG.exception("bug in the ledger")
                    _fail(batch, error)
                    await self.drop_connection()
            if not self.is_closing:
                self.arrived.clear()

    async def connected(self) -> BatchConnection:
        """Return the connection, a new one if it was lost. Raises STORE_UNAVAILABLE."""
        if self.connection is not None and self.connection.connection.is_lost:
            await self.drop_connection()
        if self.connection is None:
            self.connection = BatchConnection(await connect(self.settings, seconds=self.answer_seconds))
        return self.connection

    async def drop_connection(self) -> None:
        """Forget the connection."""
        dropped, self.connection = self.connection, None
        if dropped is not None:
            await dropped.connection.close()

    def _take(self) -> list[_Waiting]:
        return [self.queue.popleft() for _ in range(min(len(self.queue), BATCH_MAX))]

    async def _write(self, batch: list[_Waiting]) -> psycopg.Error | None:
        try:
            connection = await self.connected()
        except KmsError as error:
            # Nobody waits for a database that is away: the callers try again, and know better for how long.
            _fail([*batch, *self.queue], error)
            self.queue.clear()
            return None
        # After connecting, which takes time: who has given up meanwhile was told that nothing was charged.
        batch = [waiting for waiting in batch if not waiting.outcome.done()]
        if not batch:
            return None
        for waiting in batch:
            waiting.is_sent = True
        began = monotonic()
        try:
            verdicts = await connection.settle([waiting.text for waiting in batch], seconds=self.answer_seconds)
        except psycopg.Error as error:
            if connection.connection.is_lost:
                await self._after_loss(connection, batch)
                return None
            if isinstance(error, _OF_THE_CONNECTION) and connection.number:
                # Nothing has happened, and a new connection may do. What fails there too has another cause.
                for waiting in batch:
                    waiting.is_sent = False
                await self.drop_connection()
                return await self._write(batch)
            await self._after_fault(batch, error)
            return error
        self._count(batch, verdicts, monotonic() - began)
        _deliver(batch, verdicts)
        return None

    async def _after_fault(self, batch: list[_Waiting], error: psycopg.Error) -> None:
        """Find out whose fault it is: the server has undone the batch, so its entries are tried one by one."""
        for waiting in batch:
            waiting.is_sent = False
        if len(batch) == 1:
            _fail(batch, unavailable("the use could not be recorded in time") if _passes(error) else unexpected(error))
            return
        stuck: set[KeyId] = set()
        for waiting in batch:
            if waiting.outcome.done():
                continue
            if waiting.entry.key_id in stuck:
                _fail([waiting], unavailable("the use could not be recorded in time"))
            elif isinstance(await self._write([waiting]), pg.LockNotAvailable):
                stuck.add(waiting.entry.key_id)

    async def _after_loss(self, lost: BatchConnection, batch: list[_Waiting]) -> None:
        """Learn on a new connection whether the batch was settled, as long as anybody waits for it."""
        self.status.losses += 1
        writer_id, number = lost.writer_id, lost.number
        await self.drop_connection()
        while any(not waiting.outcome.done() for waiting in batch):
            try:
                fresh = await self.connected()
                verdicts = await fresh.settled(writer_id, number, len(batch), seconds=self.answer_seconds)
            except (KmsError, psycopg.Error):
                await self.drop_connection()
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            if verdicts is None:
                for waiting in batch:
                    waiting.is_sent = False
                self.queue.extendleft(reversed(batch))
                return
            _deliver(batch, verdicts)
            return

    def _count(self, batch: Sequence[_Waiting], verdicts: Sequence[str], seconds: float) -> None:
        self.status.batches += 1
        self.status.entries += len(batch)
        self.status.commit_seconds += seconds
        self.settled(len(batch), seconds)
        self.status.charges += sum(
            waiting.entry.is_charged and verdict == "OK" for waiting, verdict in zip(batch, verdicts, strict=True)
        )


@dataclass(frozen=True, slots=True)
class StoredLedger:
    """`Ledger` in `cryptography.keys`, `cryptography.request_records` and `audit.security_events`."""

    _writer: _Writer
    _repeats: StoredRepeats
    _refusals: Refusals

    async def settle(self, entry: Entry) -> None:
        """Charge and record a use, or raise what the database says at that very moment.

        The state's reason, KEY_NOT_FOUND, USAGE_LIMIT_REACHED, CREDENTIALS_INVALID, PERMISSION_DENIED, REQUEST_ID_REUSED; STALE
        where the key's version changed, and where the same request was answered meanwhile: begin again, with `earlier`.
        STORE_UNAVAILABLE only where certainly nothing was charged, OUTCOME_UNKNOWN where that could not be learnt in time.
        """
        waiting = self._writer.put(entry)
        try:
            async with asyncio.timeout(self._writer.answer_seconds):
                await waiting.outcome
        except TimeoutError:
            raise _outcome_unknown() if waiting.is_sent else unavailable("the use could not be recorded in time") from None
        except asyncio.CancelledError:
            # The call's time is up. What was not sent is dropped; of what was sent, the caller is told that it may count.
            if waiting.is_sent:
                raise _outcome_unknown() from None
            raise

    async def earlier(self, user_id: UserId, rpc: str, request_id: str) -> Repeat | None:
        """Return what was kept under this id less than 24 hours ago, or None."""
        return await self._repeats.earlier(user_id, rpc, request_id)

    def note_refusal(self, call: Call | Stranger, action: str, key: KeyId | None, reason: str) -> None:
        """Record a refusal, without waiting for it: in a queue and at a rate of its own. Of strangers it may be left out."""
        self._refusals.note(call, action, key, reason)

    def status(self) -> LedgerStatus:
        """Return what the ledger has done so far."""
        status = self._writer.status
        status.waiting = len(self._writer.queue)
        status.refusals_waiting, status.refusals_unrecorded = self._refusals.waiting, self._refusals.unrecorded
        return status


@asynccontextmanager
async def open_ledger(
    dsn: str,
    pool: Pool,
    *,
    queue_max: int = 4096,
    answer_seconds: float = 5.0,
    settled: Settled = lambda entries, seconds: None,
    records_strangers: Callable[[], bool] = lambda: True,
) -> AsyncIterator[StoredLedger]:
    """Connect to *dsn* and yield the ledger; at the end everything that waits is settled. *pool* serves its reads.

    At most *queue_max* uses wait, none longer than *answer_seconds*. *settled* is told of each batch, *records_strangers* is
    asked before the refusal of a stranger is recorded. Raises STORE_UNAVAILABLE if nobody answers there.
    """
    writer = _Writer(connection_settings(dsn), queue_max, answer_seconds, settled)
    await writer.connected()
    async with open_refusals(dsn, records_strangers=records_strangers) as refusals:
        running = asyncio.create_task(writer.run(), name="ledger")
        try:
            yield StoredLedger(writer, StoredRepeats(pool), refusals)
        finally:
            writer.is_closing = True
            writer.arrived.set()
            await asyncio.wait({running}, timeout=2 * answer_seconds)
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
            _fail(writer.queue, unavailable("the service is stopping"))
            await writer.drop_connection()


def _deliver(batch: Sequence[_Waiting], verdicts: Sequence[str]) -> None:
    for waiting, verdict in zip(batch, verdicts, strict=True):
        if waiting.outcome.done():
            continue
        refusal = _refusal(verdict, waiting.entry)
        if refusal is None:
            waiting.outcome.set_result(None)
        else:
            waiting.outcome.set_exception(refusal)


def _fail(batch: Sequence[_Waiting] | deque[_Waiting], error: Exception) -> None:
    for waiting in batch:
        if not waiting.outcome.done():
            # Each caller has an error of their own, since it is given the caller's key on its way.
            waiting.outcome.set_exception(copy(error) if isinstance(error, KmsError) else error)


def _passes(error: psycopg.Error) -> bool:
    """Whether the server was only too slow, too full or too busy."""
    return isinstance(error, psycopg.OperationalError)


def _outcome_unknown() -> KmsError:
    return KmsError(Reason.OUTCOME_UNKNOWN, "the use may have been charged; repeat the call with the same request_id")


def _refusal(verdict: str, entry: Entry) -> KmsError | None:
    """Return the error that a verdict of `cryptography.settle` stands for."""
    match verdict:
        case "OK":
            return None
        case "CREDENTIALS_INVALID":
            return credentials_invalid()
        case "KEY_NOT_FOUND":
            return key_not_found()
        case "USAGE_LIMIT_REACHED":
            return KmsError(Reason.USAGE_LIMIT_REACHED, "the key has been used as often as it may be")
        case "STALE":
            return KmsError(Reason.STALE, "the key was changed meanwhile")
        case "REPEATED":
            return KmsError(Reason.STALE, "the same request was answered meanwhile", repeated="true")
        case "REQUEST_ID_REUSED":
            return KmsError(Reason.REQUEST_ID_REUSED, "this request_id was used for another request", field="request_id")
    return _state_refusal(verdict, entry)


def _state_refusal(verdict: str, entry: Entry) -> KmsError:
    """Return the error of a verdict that names a missing permission or the key's state."""
    try:
        if verdict == "PERMISSION_DENIED":
            check_use_permitted(frozenset(), entry.use)
        else:
            check_use(State(verdict.removeprefix("KEY_").lower()), entry.use)
    except KmsError as refusal:
        return refusal
    except ValueError:
        pass
    # The verdict is not a word of ours, or names a state that refuses nothing: somebody replaced the function.
    return record_invalid(entry.key_id)
