"""Refusals in the trail: each is there or counted, and a flood of them delays no charge."""

import asyncio
import time
from collections.abc import Mapping
from typing import Any, cast
from uuid import uuid4

import pytest
import structlog
from structlog.testing import LogCapture

from kms.app.ports import Call, Stranger, User
from kms.domain.errors import Reason
from kms.domain.ids import KeyId, UserId
from kms.store import batches
from kms.store import refusals as refusing
from kms.store.batches import DirectConnection
from kms.store.ledger import open_ledger
from kms.store.pool import Pool
from kms.store.refusals import SINGLE_MAX, open_refusals, severity
from tests.fixtures.postgres import Database
from tests.store.uses import a_call, make_key, make_user, rows, sign

REFUSED = """
    SELECT user_id, host(source_ip) AS peer, resource_type, resource_id, action, outcome, severity, risk_score, event_details
    FROM audit.security_events WHERE event_type = 'request.refused' ORDER BY created_at
"""


@pytest.fixture
async def alice(store: Pool) -> User:
    return await make_user(store, "alice")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> LogCapture:
    """What the writer logs. Not by what is printed: another test may have configured the log, and loggers are cached."""
    capture = LogCapture()
    monkeypatch.setattr(refusing, "_LOG", structlog.wrap_logger(None, processors=[capture]))
    return capture


def refused(database: Database) -> list[dict[str, Any]]:
    return rows(database, REFUSED)


async def test_a_refusal_is_a_line_of_the_trail(database: Database, store: Pool, alice: User) -> None:
    call, key = a_call(alice), KeyId(uuid4())
    async with open_ledger(database.dsn, store) as ledger:
        ledger.note_refusal(call, "sign", key, Reason.KEY_REVOKED)
        ledger.note_refusal(call, "create", None, Reason.STORE_UNAVAILABLE)
    line = {
        "user_id": alice.user_id,
        "peer": "192.0.2.7",
        "resource_type": "key",
        "resource_id": key,
        "action": "sign",
        "outcome": "blocked",
        "severity": "high",
        "risk_score": 60,
        "event_details": {"reason": "KEY_REVOKED", "request_id": call.request_id},
    }
    other = {
        "resource_type": None,
        "resource_id": None,
        "action": "create",
        "outcome": "failure",
        "severity": "low",
        "risk_score": 10,
        "event_details": {"reason": "STORE_UNAVAILABLE", "request_id": call.request_id},
    }
    assert refused(database) == [line, {**line, **other}]


async def test_more_than_a_few_become_one_row_with_their_number(database: Database, alice: User) -> None:
    async with open_refusals(database.dsn) as refusals:
        for number in range(1000):
            refusals.note(a_call(alice), "sign", None, Reason.KEY_REVOKED if number % 2 else Reason.MALFORMED)
    found = refused(database)
    assert len(found) == SINGLE_MAX + 1
    assert found[-1]["event_details"]["count"] == 1000 - SINGLE_MAX
    assert found[-1]["event_details"]["reasons"] == {"KEY_REVOKED": 490, "MALFORMED": 490}
    assert {"first", "last"} <= set(found[-1]["event_details"])
    assert found[-1]["severity"] == "high"
    assert found[-1]["user_id"] == alice.user_id


async def test_users_and_addresses_are_counted_apart(database: Database, store: Pool, alice: User) -> None:
    bob = await make_user(store, "bob")
    async with open_refusals(database.dsn) as refusals:
        for call in (Call(alice, "1", "192.0.2.1"), Call(alice, "1", "192.0.2.2"), Call(bob, "1", "192.0.2.1")):
            for _ in range(SINGLE_MAX + 5):
                refusals.note(call, "sign", None, Reason.MALFORMED)
    counts = [row["event_details"]["count"] for row in refused(database) if "count" in row["event_details"]]
    assert counts == [5, 5, 5]


async def test_a_window_ends_and_another_begins(database: Database, alice: User) -> None:
    async with open_refusals(database.dsn, window_seconds=0.2) as refusals:
        for _ in range(2):
            for _ in range(SINGLE_MAX + 3):
                refusals.note(a_call(alice), "sign", None, Reason.MALFORMED)
            await asyncio.sleep(0.5)
        assert len(refused(database)) == 2 * (SINGLE_MAX + 1)


async def test_critical_ones_are_never_counted_together(database: Database, alice: User) -> None:
    async with open_refusals(database.dsn) as refusals:
        for _ in range(100):
            refusals.note(a_call(alice), "sign", None, Reason.ENVELOPE_INVALID)
    found = refused(database)
    assert len(found) == 100
    assert {(row["severity"], row["outcome"], row["risk_score"]) for row in found} == {("critical", "failure", 95)}


async def test_a_user_that_is_unknown_is_left_out(database: Database) -> None:
    async with open_refusals(database.dsn) as refusals:
        refusals.note(Call(User(UserId(uuid4()), "nobody", 0), "1", "unix:"), "sign", None, Reason.CREDENTIALS_INVALID)
    assert [(row["user_id"], row["peer"]) for row in refused(database)] == [(None, None)]


async def test_a_text_that_the_database_does_not_take_stops_nothing(database: Database, alice: User) -> None:
    async with open_refusals(database.dsn) as refusals:
        refusals.note(a_call(alice), "si\x00gn", None, Reason.MALFORMED)
        await asyncio.sleep(0.4)
        refusals.note(a_call(alice), "sign", None, Reason.MALFORMED)
    assert [row["action"] for row in refused(database)] == ["sign"]


async def test_one_that_the_database_does_not_take_drops_no_other(database: Database, alice: User, log: LogCapture) -> None:
    async with open_refusals(database.dsn) as refusals:
        for number in range(40):
            refusals.note(a_call(alice), "si\x00gn" if number == 20 else str(number), None, Reason.ENVELOPE_INVALID)
        # What only a bug can put there is told, too, and what stands with it is written.
        refusals.note(a_call(alice), cast(str, object()), None, Reason.MALFORMED)
        refusals.note(a_call(alice), "behind", None, Reason.MALFORMED)
    assert {row["action"] for row in refused(database)} == {*(str(number) for number in range(40) if number != 20), "behind"}
    assert [line["action"][:8] for line in log.entries if line["log_level"] == "error"] == [repr("si\x00gn")[:8], "<object "]


@pytest.mark.parametrize("times", [1, 1000])
async def test_a_bug_in_the_writing_loses_no_refusal_and_is_in_the_log(
    database: Database, store: Pool, alice: User, monkeypatch: pytest.MonkeyPatch, log: LogCapture, times: int
) -> None:
    failures = [RuntimeError("a bug")] * times

    async def connect(settings: Mapping[str, Any], *, seconds: float) -> DirectConnection:
        if failures:
            raise failures.pop()
        return await batches.connect(settings, seconds=seconds)

    monkeypatch.setattr(refusing, "connect", connect)
    monkeypatch.setattr(refusing, "_RETRY_SECONDS", 0.05)
    async with open_ledger(database.dsn, store) as ledger:
        for _ in range(3):
            ledger.note_refusal(a_call(alice), "sign", None, Reason.ENVELOPE_INVALID)
            await asyncio.sleep(0.3)
        assert ledger.status().refusals_waiting == (0 if times == 1 else 3)
        failures.clear()
    assert len(refused(database)) == 3
    assert {line["event"] for line in log.entries if line["log_level"] == "error"} == {"bug in the writer of refusals"}


async def test_while_nobody_answers_noting_waits_for_nothing(alice: User) -> None:
    async with open_refusals("host=/nowhere user=kms_service dbname=kms") as refusals:
        began = time.monotonic()
        for _ in range(20_000):
            refusals.note(a_call(alice), "sign", None, Reason.ENVELOPE_INVALID)
        await asyncio.sleep(0.3)
        assert time.monotonic() - began < 15


async def test_a_flood_of_refusals_does_not_stop_charges(database: Database, store: Pool, alice: User) -> None:
    key = await make_key(store, alice)
    async with open_ledger(database.dsn, store) as ledger:
        for _ in range(100):
            for _ in range(50):
                ledger.note_refusal(a_call(alice), "sign", None, Reason.MALFORMED)
            await ledger.settle(sign(alice, key))
        assert ledger.status().charges == 100
    assert sum(row["event_details"].get("count", 1) for row in refused(database)) == 5000


async def test_strangers_are_counted_by_address_and_never_stand_as_the_user_they_claim_to_be(
    database: Database, alice: User
) -> None:
    async with open_refusals(database.dsn) as refusals:
        for _ in range(SINGLE_MAX + 5):
            refusals.note(Stranger("1", "192.0.2.1", alice.user_id), "sign", None, Reason.CREDENTIALS_INVALID)
        refusals.note(Stranger("2", "192.0.2.2", None), "sign", None, Reason.CREDENTIALS_INVALID)
    found = refused(database)
    assert {row["user_id"] for row in found} == {None}
    assert {row["event_details"]["authenticated"] for row in found} == {False}
    assert found[0]["event_details"]["claimed_user_id"] == str(alice.user_id)
    assert [row["event_details"].get("count", 1) for row in found if row["peer"] == "192.0.2.1"] == [1] * SINGLE_MAX + [5]
    assert [row["event_details"]["claimed_user_id"] for row in found if row["peer"] == "192.0.2.2"] == [None]


async def test_with_less_than_a_tenth_of_the_disk_free_strangers_are_not_written_and_users_are(
    database: Database, alice: User
) -> None:
    free = [0.05]
    stranger = Stranger("1", "192.0.2.1", None)
    async with open_refusals(database.dsn, records_strangers=lambda: free[0] >= 0.10) as refusals:
        refusals.note(stranger, "sign", None, Reason.CREDENTIALS_INVALID)
        refusals.note(a_call(alice), "sign", None, Reason.MALFORMED)
        assert refusals.unrecorded == 1
        free[0] = 0.10
        refusals.note(stranger, "sign", None, Reason.CREDENTIALS_INVALID)
        assert refusals.unrecorded == 1
    assert [row["user_id"] for row in refused(database)] == [alice.user_id, None]


def test_every_reason_has_a_severity() -> None:
    assert {severity(reason) for reason in Reason} == {"low", "medium", "high", "critical"}
    assert [reason for reason in Reason if severity(reason) == "critical"] == [Reason.ENVELOPE_INVALID, Reason.RECORD_INVALID]
