"""Folding what the trail says of a key, and comparing it with the key's row."""

import json
from collections.abc import Iterator
from typing import Any, Final
from uuid import UUID, uuid4

import pytest

from kms.domain.errors import KmsError
from kms.domain.key_check import (
    COLUMNS,
    FINDINGS_NAMED_MAX,
    History,
    KeyChange,
    KeyComparison,
    KeyReport,
    KeyUse,
    compared,
    joined,
    load,
)
from kms.domain.trail_lines import KeyRow, KeysEnd, Leaf, key_line, keys_end_line, parse_line
from kms.store.key_histories import StoredKeyHistories, key_histories

KEY: Final = UUID("00000000-0000-4000-8000-0000000000a1")
CREATED: Final = {
    "user_id": "00000000-0000-4000-8000-0000000000b1", "key_name": "k", "key_type": "ed25519", "key_status": "active",
    "max_usage_count": 10, "created_at": "2026-01-01T00:00:00.25+00:00", "metadata": {"a": "1"}, "custody": "SEALED",
    "reason": "of no column",
}  # fmt: skip


def row(**values: Any) -> dict[str, Any]:  # noqa: ANN401
    """The row of a key that was created and nothing else, but for *values*."""
    plain = {name: CREATED.get(name) for name in COLUMNS} | {"id": str(KEY), "version": 1, "usage_counter": 0} | values
    found: dict[str, Any] = load(json.dumps(plain))
    return found


def history(*changes: dict[str, Any], used: int | None = None, first: int = 1) -> History:
    return History(tuple((first + n, json.dumps(each)) for n, each in enumerate(changes)), used)


def columns(found: dict[str, Any], told: History, *, is_whole: bool = True) -> list[tuple[str, str]]:
    return [(difference.removeprefix("KEY_"), column) for difference, column, _ in compared(found, told, is_whole=is_whole)]


REVOKED: Final = {"key_status": "revoked", "revoked_at": "2026-01-02T00:00:00+00:00"}


def test_a_row_is_what_its_entries_leave() -> None:
    assert columns(row(), history(CREATED)) == []
    assert columns(row(version=2, **REVOKED), history(CREATED, REVOKED)) == []
    assert columns(row(version=3, **REVOKED), history(CREATED, {"expires_at": None}, REVOKED)) == []


@pytest.mark.parametrize("name", COLUMNS)
def test_a_change_of_any_column_is_found(name: str) -> None:
    assert columns(row(**{name: "other"}), history(CREATED)) == [("DIFFERS", name)]
    found = row()
    del found[name]
    assert columns(found, history(CREATED)) == [("DIFFERS", name)]


def test_an_older_row_differs_in_its_version_and_in_what_changed() -> None:
    assert columns(row(), history(CREATED, REVOKED)) == [
        ("DIFFERS", "version"), ("DIFFERS", "key_status"), ("DIFFERS", "revoked_at")
    ]  # fmt: skip


def test_the_counter_is_the_highest_number_of_a_use_or_what_an_administrator_confirmed() -> None:
    assert columns(row(usage_counter=3), history(CREATED, used=3)) == []
    for counter in (0, 2, 4):
        assert columns(row(usage_counter=counter), history(CREATED, used=3)) == [("DIFFERS", "usage_counter")]
    assert columns(row(usage_counter=1), history(CREATED)) == [("DIFFERS", "usage_counter")]
    confirmed = history(CREATED, {"usage_counter": 7}, used=3)
    assert columns(row(version=2, usage_counter=7), confirmed) == []
    assert columns(row(version=2, usage_counter=3), confirmed) == [("DIFFERS", "usage_counter")]
    assert columns(row(version=2, usage_counter=8), history(CREATED, {"usage_counter": 7}, used=8)) == []


def test_a_moment_is_one_in_every_time_zone_and_another_a_microsecond_later() -> None:
    told = history({**CREATED, "created_at": "2026-01-01T05:45:00.25+05:45"})
    assert columns(row(), told) == []
    assert columns(row(created_at="2026-01-01T00:00:00.250001+00:00"), told) == [("DIFFERS", "created_at")]
    assert columns(row(expires_at="infinity"), history({**CREATED, "expires_at": "infinity"})) == []


def test_a_number_is_compared_as_it_is_written_and_is_no_text() -> None:
    big = 2**63 - 1
    assert columns(row(max_usage_count=big), history({**CREATED, "max_usage_count": big})) == []
    assert columns(row(max_usage_count=big), history({**CREATED, "max_usage_count": big - 1})) == [("DIFFERS", "max_usage_count")]
    assert columns(row(metadata={"a": 1}), history(CREATED)) == [("DIFFERS", "metadata")]
    assert columns(row(metadata={"a": True}), history({**CREATED, "metadata": {"a": 1}})) == [("DIFFERS", "metadata")]


def test_an_entry_that_is_missing_or_double_is_found() -> None:
    gap = History(((1, json.dumps(CREATED)), (3, "{}")))
    assert columns(row(version=3), gap) == [("DIFFERS", "version")]
    assert columns(row(version=2), history({}, first=2)) == [("DIFFERS", "version")]
    conflict = History(((1, json.dumps(CREATED)),), conflict=1)
    assert columns(row(), conflict) == [("DIFFERS", "version")]


FORBIDDEN: Final[dict[str, tuple[dict[str, Any], dict[str, Any], str]]] = {
    "a revoked key is revived": (REVOKED, {"key_status": "active"}, "key_status"),
    "a revoked key is called compromised": (REVOKED, {"key_status": "compromised"}, "key_status"),
    "a compromised key is revived": ({"key_status": "compromised"}, {"key_status": "inactive"}, "key_status"),
    "a limit is lifted": ({}, {"max_usage_count": None}, "max_usage_count"),
    "a limit is raised": ({}, {"max_usage_count": 11}, "max_usage_count"),
    "an end is put off": (
        {"expires_at": "2027-01-01T00:00:00+00:00"}, {"expires_at": "2027-01-02T00:00:00+00:00"}, "expires_at"
    ),
    "an end is taken away": ({"expires_at": "2027-01-01T00:00:00+00:00"}, {"expires_at": None}, "expires_at"),
    "a destroyed key comes back": ({"destroyed_at": "2027-01-01T00:00:00+00:00"}, {"destroyed_at": None}, "destroyed_at"),
    "a key has another owner": ({}, {"user_id": str(UUID(int=9))}, "user_id"),
    "a public key is another": ({}, {"public_key": "other"}, "public_key"),
}  # fmt: skip
PERMITTED: Final[dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    "a compromised key is revoked": ({"key_status": "compromised"}, {"key_status": "revoked"}),
    "a key comes back": ({"key_status": "inactive"}, {"key_status": "active"}),
    "a limit falls": ({}, {"max_usage_count": 9}),
    "an end comes nearer": ({"expires_at": "2027-01-02T00:00:00+00:00"}, {"expires_at": "2027-01-01T00:00:00+00:00"}),
    "a limit is set": ({"max_usage_count": None}, {"max_usage_count": 99}),
}


@pytest.mark.parametrize("move", FORBIDDEN)
def test_an_entry_of_what_no_call_does_is_found(move: str) -> None:
    before, after, column = FORBIDDEN[move]
    told = history(CREATED, before, after)
    assert columns(row(**{"version": 3, **before, **after}), told) == [("MOVE_FORBIDDEN", column)]


@pytest.mark.parametrize("move", PERMITTED)
def test_an_entry_of_what_calls_do_is_none(move: str) -> None:
    before, after = PERMITTED[move]
    created = {**CREATED, **before} if move == "a limit is set" else CREATED
    assert columns(row(**{"version": 3, **before, **after}), history(created, before, after)) == []


def test_of_a_key_whose_first_entries_are_elsewhere_only_what_the_others_say_is_compared() -> None:
    told = history(REVOKED, first=5)
    assert columns(row(version=5, usage_counter=8, **REVOKED), told, is_whole=False) == []
    assert columns(row(version=4), told, is_whole=False) == [
        ("DIFFERS", "version"), ("DIFFERS", "key_status"), ("DIFFERS", "revoked_at")
    ]  # fmt: skip
    used = history(REVOKED, first=5, used=8)
    assert columns(row(version=5, usage_counter=7, **REVOKED), used, is_whole=False) == [("DIFFERS", "usage_counter")]
    assert columns(row(version=5, usage_counter=9, **REVOKED), used, is_whole=False) == []


@pytest.mark.parametrize("data", [None, "", "[]", "[" * 100_000, '{"usage_counter": "7"}', '{"usage_counter": 1e999}'])
def test_an_entry_that_cannot_be_read_is_found(data: str) -> None:
    assert columns(row(), History(((1, json.dumps(CREATED)), (2, data)))) == [("DIFFERS", "version")]
    assert columns(row(usage_counter="0"), history(CREATED)) == [("DIFFERS", "version")]


def test_keys_are_counted_by_how_they_were_compared() -> None:
    whole, later = KeyComparison(is_whole=True), KeyComparison(is_whole=False)
    for each in (whole, later):
        each.row(KEY, row(), history(CREATED))
        each.row(KEY, row(), History())
        each.row(KEY, row(usage_counter=4), history(used=4))
        each.row(KEY, row(version=2, **REVOKED), history(REVOKED, first=2))
        each.missing(KEY, History(is_unsigned=True))
        each.skipped()
    found = whole.report()
    assert (found.compared, found.partly, found.not_comparable, found.unsigned) == (5, 0, 1, 1)
    assert [each.difference for each in found.findings] == ["KEY_UNKNOWN", "KEY_UNKNOWN", "KEY_DIFFERS", "KEY_MISSING"]
    found = later.report(KEY)
    assert (found.compared, found.partly, found.not_comparable, found.next_after) == (2, 2, 2, str(KEY))
    assert [each.difference for each in found.findings] == ["KEY_MISSING"]


def test_all_differences_are_counted_and_the_first_are_named() -> None:
    comparison = KeyComparison(is_whole=True)
    for _ in range(FINDINGS_NAMED_MAX + 5):
        comparison.missing(KEY, History())
    found = comparison.report(KEY)
    assert (found.differences, len(found.findings)) == (FINDINGS_NAMED_MAX + 5, FINDINGS_NAMED_MAX)
    twice = joined([found, comparison.report()])
    assert (twice.differences, len(twice.findings), twice.next_after) == (2 * found.differences, FINDINGS_NAMED_MAX, "")
    assert twice.compared == 2 * found.compared
    assert joined([]) == KeyReport()


@pytest.fixture
def histories() -> Iterator[StoredKeyHistories]:
    with key_histories() as found:
        yield found


def test_histories_come_back_by_version_whatever_order_they_came_in(histories: StoredKeyHistories) -> None:
    other = uuid4()
    entries: list[KeyChange | KeyUse] = [KeyChange(KEY, 2, "b"), KeyUse(KEY, 5), KeyChange(KEY, 1, "a"), KeyUse(KEY, 4)]
    for number, each in enumerate(entries, 1):
        histories.take(each, number)
    histories.take(KeyChange(other, 1, "x"), 5)
    assert histories.find(KEY, 4) == History(((1, "a"), (2, "b")), 5)
    assert histories.find(KEY, 3) == History(((1, "a"), (2, "b")), 5, None, is_unsigned=True)
    assert histories.find(uuid4(), 0) == History()
    histories.take(KeyChange(KEY, 2, "b"), 4)
    assert histories.find(KEY, 4).conflict is None
    histories.take(KeyChange(KEY, 2, "c"), 4)
    assert histories.find(KEY, 4) == History(((1, "a"), (2, "b")), 5, 2)
    assert histories.see(KEY)
    assert not histories.see(KEY)
    assert histories.see(uuid4())
    assert list(histories.unseen()) == [other]


def test_a_line_of_a_key_is_read_as_it_was_written() -> None:
    line = key_line(json.dumps({"id": str(KEY), "usage_counter": 2**63 - 1}), json.dumps([[3, '{"a": 1}']]), 4)
    found = parse_line(line.encode())
    assert found == KeyRow(KEY, load(json.dumps({"id": str(KEY), "usage_counter": 2**63 - 1})), (
        KeyChange(KEY, 3, '{"a": 1}'), KeyUse(KEY, 4)
    ))  # fmt: skip
    assert parse_line(key_line(json.dumps({"id": str(KEY)}), "[]", None).encode()) == KeyRow(KEY, {"id": str(KEY)}, ())
    assert parse_line(keys_end_line(KeysEnd(3)).encode()) == KeysEnd(3)


@pytest.mark.parametrize(
    "line",
    [
        b'{"key":{}}', b'{"key":{"id":"x"},"later":{"changes":[],"used":null}}', b'{"keys":"3"}', b'{"keys":1.5}', b'{"key":[]}',
        b'{"key":{"id":"00000000-0000-4000-8000-0000000000a1"},"later":{"changes":[["1","{}"]],"used":null}}',
        b'{"key":{"id":"00000000-0000-4000-8000-0000000000a1"},"later":{"changes":[],"used":99999999999999999999}}',
    ],
)  # fmt: skip
def test_what_is_no_line_of_a_key_is_malformed(line: bytes) -> None:
    with pytest.raises(KmsError):
        parse_line(line)


def entry(**fields: str | None) -> KeyChange | KeyUse | None:
    found = parse_line(json.dumps({"commit_order": "1", "id": "i", "table": "t", **fields}).encode())
    assert isinstance(found, Leaf)
    return found.entry


def test_rows_of_the_trail_say_what_they_are_about() -> None:
    change = {"table": "audit.domain_events", "aggregate_id": str(KEY), "aggregate_version": "2", "event_data": "{}"}
    assert entry(**change, aggregate_type="key") == KeyChange(KEY, 2, "{}")
    assert entry(**change, aggregate_type="user") is None
    use = {"table": "audit.security_events", "resource_id": str(KEY)}
    assert entry(**use, event_type="key.used", event_details='{"use_number": 7}') == KeyUse(KEY, 7)
    assert entry(**use, event_type="key.used", event_details='{"use_number": null}') is None
    assert entry(**use, event_type="key.created", event_details='{"use_number": 7}') is None
    for number in ("0", str(2**63), "x"):
        with pytest.raises(KmsError):
            entry(**{**change, "aggregate_version": number}, aggregate_type="key")
