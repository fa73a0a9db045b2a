"""Refused calls in the trail: at their own pace, on a connection of their own, so that a flood of them delays nothing.

Of each user and address the first few in a window have a row each; the rest of the window becomes one row with their number,
the first and the last moment and the reasons. Critical ones always have a row of their own. A stranger, whom nothing but a
certificate names, is told by his address; where the disk gets full, his refusals are no longer written.
"""

import asyncio
import contextlib
import json
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Final

import psycopg
import structlog

from kms.app.ports import Call, Stranger
from kms.domain.errors import INTERNAL, KmsError, Reason
from kms.domain.ids import KeyId
from kms.store.batches import DirectConnection, connect
from kms.store.pool import connection_settings

RECORD: Final = "SELECT audit.record_refusals(%(refusals)s) AS written"
SINGLE_MAX: Final = 20
_WAITING_MAX: Final = 10_000
_SOURCES_MAX: Final = 10_000
_BATCH_MAX: Final = 500
_FLUSH_SECONDS: Final = 0.1
_ANSWER_SECONDS: Final = 5.0
_RETRY_SECONDS: Final = 1.0
_CRITICAL: Final = frozenset({Reason.ENVELOPE_INVALID, Reason.RECORD_INVALID})
# What somebody who has no business here would meet, and what nobody should.
_HIGH: Final = frozenset(
    {
        Reason.KEY_PENDING_DESTRUCTION,
        Reason.KEY_COMPROMISED,
        Reason.KEY_REVOKED,
        Reason.PERMISSION_DENIED,
        Reason.INCORRECT_KEY,
        INTERNAL,
    }
)
_MEDIUM: Final = frozenset(
    {Reason.CREDENTIALS_INVALID, Reason.CIPHERTEXT_INVALID, Reason.WRONG_PURPOSE, Reason.REQUEST_ID_REUSED, Reason.KEY_DESTROYED}
)
_FAILURES: Final = frozenset(
    {
        Reason.ENVELOPE_INVALID,
        Reason.RECORD_INVALID,
        Reason.HSM_UNAVAILABLE,
        Reason.HSM_KEK_MISSING,
        Reason.HSM_MECHANISM_UNSUPPORTED,
        Reason.STORE_UNAVAILABLE,
        Reason.OUTCOME_UNKNOWN,
        Reason.DEADLINE_EXCEEDED,
        INTERNAL,
    }
)
_RISK_SCORES: Final = {"low": 10, "medium": 30, "high": 60, "critical": 95}
_LOG = structlog.get_logger("kms.store.refusals")
_Source = tuple[str, str]
_Row = tuple[float, dict[str, object]]


def severity(reason: str) -> str:
    """Return how grave a refusal is: low, medium, high or critical."""
    if reason in _CRITICAL:
        return "critical"
    if reason in _HIGH:
        return "high"
    return "medium" if reason in _MEDIUM else "low"


@dataclass(slots=True, eq=False)
class _Window:
    """Refusals of one source since `began_at` (monotonic): it counts, so it changes."""

    began_at: float
    singles: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    first_at: float = 0.0
    last_at: float = 0.0

    def add(self, reason: str, at: float) -> None:
        self.first_at = self.first_at if self.reasons else at
        self.last_at = at
        self.reasons[reason] += 1


class Refusals:
    """The queue. Nothing in it waits for the database; what the database does not take in time is counted together."""

    def __init__(self, *, window_seconds: float, records_strangers: Callable[[], bool]) -> None:
        self._window_seconds = window_seconds
        self._records_strangers = records_strangers
        self.unrecorded = 0
        self._windows: dict[_Source, _Window] = {}
        self._rows: deque[_Row] = deque()

    @property
    def waiting(self) -> int:
        """How many rows wait to be written."""
        return len(self._rows)

    def note(self, call: Call | Stranger, action: str, key: KeyId | None, reason: str) -> None:
        """Let a refusal be recorded. Never waits and never fails."""
        if isinstance(call, Stranger) and not self._records_strangers():
            self.unrecorded += 1
            return
        now = monotonic()
        source = _source(call)
        window = self._window(source, now)
        is_critical = reason in _CRITICAL
        is_full = len(self._rows) >= _WAITING_MAX
        if is_full or (not is_critical and window.singles >= SINGLE_MAX):
            window.add(reason, now)
            return
        window.singles += not is_critical
        row = _row(source, action, reason, _details(call))
        self._rows.append((now, {**row, "key_id": None if key is None else str(key)}))

    def take(self, *, is_last: bool = False) -> list[_Row]:
        """Return at most 500 rows to be written, each with its moment; windows that have ended become a row first."""
        now = monotonic()
        for source, window in list(self._windows.items()):
            if is_last or now - window.began_at >= self._window_seconds:
                del self._windows[source]
                if window.reasons:
                    self._rows.append((window.last_at, _summary(source, window)))
        return [self._rows.popleft() for _ in range(min(len(self._rows), _BATCH_MAX))]

    def put_back(self, rows: list[_Row]) -> None:
        """Return rows that could not be written."""
        self._rows.extendleft(reversed(rows))

    def _window(self, source: _Source, now: float) -> _Window:
        if source not in self._windows and len(self._windows) >= _SOURCES_MAX:
            source = ("", "")
        return self._windows.setdefault(source, _Window(now))


@asynccontextmanager
async def open_refusals(
    dsn: str, *, window_seconds: float = 10.0, records_strangers: Callable[[], bool] = lambda: True
) -> AsyncIterator[Refusals]:
    """Yield the queue, written by a task until the end of the block, when the rest is written too if the database answers."""
    refusals = Refusals(window_seconds=window_seconds, records_strangers=records_strangers)
    writer = _Writer(refusals, connection_settings(dsn))
    stopping = asyncio.Event()
    writing = asyncio.create_task(writer.run(stopping), name="refusals")
    try:
        yield refusals
    finally:
        stopping.set()
        await asyncio.wait({writing}, timeout=2 * _ANSWER_SECONDS)
        writing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await writing


@dataclass(slots=True, eq=False)
class _Writer:
    """The task that writes what waits. It holds the connection, so it changes."""

    refusals: Refusals
    settings: Mapping[str, Any]
    connection: DirectConnection | None = None

    async def run(self, stopping: asyncio.Event) -> None:
        """Write what waits until *stopping*, and then the rest."""
        is_written, is_last = True, False
        while not is_last:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), _FLUSH_SECONDS if is_written else _RETRY_SECONDS)
            is_last = stopping.is_set()
            is_written = await self._flush(is_last=is_last)
        await self._drop_connection()

    async def _flush(self, *, is_last: bool) -> bool:
        """Write what waits, or keep it and return False."""
        rows: list[_Row] = []
        try:
            while rows := self.refusals.take(is_last=is_last):
                await _record(await self._connected(), rows)
        except (KmsError, psycopg.Error) as error:
            waiting = self.refusals.waiting + len(rows)
            _LOG.warning("refusals wait: the database does not take them", waiting=waiting, error=type(error).__name__)
        except Exception:  # noqa: BLE001  # a bug must not end the writing: a critical refusal is told nowhere else
            _LOG.exception("bug in the writer of refusals", waiting=self.refusals.waiting + len(rows))
        else:
            return True
        self.refusals.put_back(rows)
        await self._drop_connection()
        return False

    async def _connected(self) -> DirectConnection:
        if self.connection is None or self.connection.is_lost:
            await self._drop_connection()
            self.connection = await connect(self.settings, seconds=_ANSWER_SECONDS)
        return self.connection

    async def _drop_connection(self) -> None:
        dropped, self.connection = self.connection, None
        if dropped is not None:
            await dropped.close()


async def _record(connection: DirectConnection, rows: list[_Row]) -> None:
    """Write the rows, and take each out of the list that need not be written again. Raises `psycopg.Error`."""
    size = len(rows)
    while rows:
        now = monotonic()
        try:
            text = json.dumps([_aged(row, at, now) for at, row in rows[:size]])
            await connection.ask(RECORD, {"refusals": text}, seconds=_ANSWER_SECONDS)
        except (psycopg.DataError, psycopg.IntegrityError, TypeError, ValueError):
            # A NUL in a text: once more would fail again. One by one, so that it takes no other with it.
            if size > 1:
                size = 1
                continue
            told = {name: repr(rows[0][1].get(name)) for name in ("action", "reason", "user_id", "peer")}
            _LOG.exception("a refusal that the database does not take", **told)
        del rows[:size]


def _aged(row: Mapping[str, object], at: float, now: float) -> dict[str, object]:
    """Return the row with how long ago it was: only the database's clock goes into the trail."""
    first_at = row.get("first_at")
    first = {"first_age_seconds": now - first_at} if isinstance(first_at, float) else {}
    return {**row, **first, "age_seconds": now - at}


def _source(call: Call | Stranger) -> _Source:
    return ("" if isinstance(call, Stranger) else str(call.user.user_id), call.peer)


def _details(call: Call | Stranger) -> dict[str, object]:
    if not isinstance(call, Stranger):
        return {"request_id": call.request_id}
    claimed = None if call.claimed is None else str(call.claimed)
    return {"request_id": call.request_id, "authenticated": False, "claimed_user_id": claimed}


def _row(source: _Source, action: str, reason: str, details: Mapping[str, object]) -> dict[str, object]:
    level = severity(reason)
    return {
        "user_id": source[0] or None,
        "peer": source[1] or None,
        "action": action,
        "reason": reason,
        "severity": level,
        "outcome": "failure" if reason in _FAILURES else "blocked",
        "risk_score": _RISK_SCORES[level],
        "details": details,
    }


def _summary(source: _Source, window: _Window) -> dict[str, object]:
    gravest = max(window.reasons, key=lambda reason: _RISK_SCORES[severity(reason)])
    stranger = {"authenticated": False} if source[1] and not source[0] else {}
    details = {"count": window.reasons.total(), "reasons": dict(window.reasons), **stranger}
    return {**_row(source, "many", gravest, details), "first_at": window.first_at}
