"""Compares each key with what the trail says about it.

Every change of a key is an entry of the trail with the changed columns and the key's version after it. Every charged use is an
entry with the number of the use. So the entries of a key give its row. A row that an earlier one replaced, together with its MAC,
has an older version or a lower counter than the last entry says.

Entries are folded by version, and the highest number of a use counts. The trail's own order would not do: it is the order in
which transactions began to write, and two of them can change one key in the other order.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final
from uuid import UUID

BIGINT_MAX: Final = 2**63 - 1
FINDINGS_NAMED_MAX: Final = 20
_SHOWN_CHARACTERS_MAX: Final = 60

# What an entry says of a key, and so is compared. `version` and `usage_counter` are compared besides.
COLUMNS: Final = (
    "user_id", "key_name", "key_type", "key_purpose", "key_curve", "public_key", "key_derivation_path", "parent_key_id",
    "hsm_key_id", "key_status", "encryption_algorithm", "key_strength", "max_usage_count", "created_at", "activated_at",
    "expires_at", "compromised_at", "revoked_at", "metadata", "custody", "origin", "bound_to", "deactivated_at", "superseded_at",
    "destruction_scheduled_at", "destroyed_at", "compromise_occurred_at",
)  # fmt: skip
# The token or the service proves these, or nothing depends on them; no entry says them.
COLUMNS_NOT_COMPARED: Final = ("encrypted_private_key", "last_used_at", "record_mac")
_NEVER_CHANGE: Final = (
    "user_id", "key_type", "key_purpose", "key_curve", "public_key", "key_strength", "created_at", "custody", "origin",
    "bound_to",
)  # fmt: skip
# Their values say nothing about a user's business, so findings show them.
_SHOWN: Final = frozenset(
    ("version", "usage_counter", "max_usage_count", "key_status", *(name for name in COLUMNS if name.endswith("_at")))
)
# States that a key leaves for one of these only.
_LEFT_FOR: Final[Mapping[object, tuple[str, ...]]] = {"revoked": ("revoked",), "compromised": ("compromised", "revoked")}


class KeyDifference(StrEnum):
    """How a key differs from the trail."""

    KEY_DIFFERS = "KEY_DIFFERS"
    KEY_MISSING = "KEY_MISSING"
    KEY_UNKNOWN = "KEY_UNKNOWN"
    KEY_MOVE_FORBIDDEN = "KEY_MOVE_FORBIDDEN"


@dataclass(frozen=True, slots=True)
class Number:
    """A number of JSON as it is written: neither rounded nor limited, and never equal to a text."""

    text: str


@dataclass(frozen=True, slots=True)
class KeyChange:
    """An entry of the trail about a change: the key's version after it, and the changed columns as a JSON object."""

    key_id: UUID
    version: int
    data: str


@dataclass(frozen=True, slots=True)
class KeyUse:
    """An entry of the trail about a charged use: its number is the key's counter after it."""

    key_id: UUID
    number: int


@dataclass(frozen=True, slots=True)
class History:
    """What the trail says about a key: its changes by version, and the highest number of a use (None: no use).

    `conflict` is a version of which the trail has two different entries. `is_unsigned`: an entry is not under a checkpoint yet.
    """

    changes: tuple[tuple[int, str], ...] = ()
    used: int | None = None
    conflict: int | None = None
    is_unsigned: bool = False


@dataclass(frozen=True, slots=True)
class KeyFinding:
    """A difference of one key. `column` is empty where the whole row is missing or unknown."""

    difference: KeyDifference
    key_id: str
    column: str
    message: str


@dataclass(frozen=True, slots=True)
class KeyReport:
    """What comparing the keys found, in numbers of keys; `differences` counts the findings, of which at most 20 are named.

    `compared` keys were compared in every column, `partly` in those that the entries say, and `not_comparable` keys not at all.
    For `unsigned` keys the last entries are not under a checkpoint yet. `next_after` is the key after which the next call goes
    on. It is empty where these were the last.
    """

    compared: int = 0
    partly: int = 0
    not_comparable: int = 0
    unsigned: int = 0
    differences: int = 0
    findings: tuple[KeyFinding, ...] = ()
    next_after: str = ""


_DECODER: Final = json.JSONDecoder(parse_int=Number, parse_float=Number, parse_constant=Number)


def load(text: str | bytes) -> Any:  # noqa: ANN401  # whatever JSON holds
    """Return what *text* holds, numbers as `Number`. Raises ValueError, RecursionError."""
    return _DECODER.decode(text if isinstance(text, str) else text.decode())


def integer(value: object) -> int:
    """Return a number of JSON that a BIGINT column can hold. Raises ValueError."""
    if not isinstance(value, Number) or not value.text.isascii() or len(value.text) > len(str(BIGINT_MAX)):
        raise ValueError("expected a whole number")
    return int(value.text)


def joined(reports: Iterable[KeyReport]) -> KeyReport:
    """Return one report of several, each of which goes on where the one before ended."""
    found = KeyReport()
    for each in reports:
        found = KeyReport(
            found.compared + each.compared,
            found.partly + each.partly,
            found.not_comparable + each.not_comparable,
            found.unsigned + each.unsigned,
            found.differences + each.differences,
            (*found.findings, *each.findings)[:FINDINGS_NAMED_MAX],
            each.next_after,
        )
    return found


@dataclass(slots=True)
class KeyComparison:
    """Compares keys one after the other and counts. `is_whole`: the trail begins with its first row."""

    is_whole: bool
    _counts: Counter[str] = field(default_factory=Counter)
    _differences: int = 0
    _findings: list[KeyFinding] = field(default_factory=list)

    def row(self, key_id: UUID, row: Mapping[str, Any], history: History) -> None:
        """Compare the *row* of a key with its *history*."""
        first = history.changes[0][0] if history.changes else None
        if first is None and self.is_whole:
            self._note(KeyDifference.KEY_UNKNOWN, key_id, "", "the table has this key, and no entry of the trail tells of it")
            self._count("compared", history)
        elif first is None and history.used is None:
            self._count("not_comparable", history)
        else:
            self._count("compared" if first == 1 or self.is_whole else "partly", history)
            for difference, column, message in compared(row, history, is_whole=self.is_whole):
                self._note(difference, key_id, column, message)

    def missing(self, key_id: UUID, history: History) -> None:
        """Take a key of which the trail tells and the table does not."""
        self._count("compared", history)
        self._note(KeyDifference.KEY_MISSING, key_id, "", "the trail tells of this key, and the table does not have it")

    def skipped(self) -> None:
        """Take a key that cannot be compared."""
        self._counts["not_comparable"] += 1

    def report(self, next_after: UUID | None = None) -> KeyReport:
        """Return what was found."""
        compared, partly, not_comparable, unsigned = (
            self._counts[name] for name in ("compared", "partly", "not_comparable", "unsigned")
        )
        following = "" if next_after is None else str(next_after)
        return KeyReport(compared, partly, not_comparable, unsigned, self._differences, tuple(self._findings), following)

    def _count(self, how: str, history: History) -> None:
        self._counts[how] += 1
        self._counts["unsigned"] += history.is_unsigned

    def _note(self, difference: KeyDifference, key_id: UUID, column: str, message: str) -> None:
        self._differences += 1
        if len(self._findings) < FINDINGS_NAMED_MAX:
            self._findings.append(KeyFinding(difference, str(key_id), column, message))


def compared(row: Mapping[str, Any], history: History, *, is_whole: bool) -> Iterator[tuple[KeyDifference, str, str]]:
    """Yield each difference of a *row* from its *history*: kind, column, sentence.

    Where the entries begin with a later version than 1, columns that no entry names are left out. A counter may then be higher
    than the last entry says, since a use that began earlier can have ended later.
    """
    try:
        columns = _Columns.of(history.changes)
        used = max((each for each in (history.used, columns.stated) if each is not None), default=None)
        counter, version = integer(row.get("usage_counter")), integer(row.get("version"))
    except (ValueError, TypeError, AttributeError, RecursionError):
        yield KeyDifference.KEY_DIFFERS, "version", "an entry about this key, or its row, cannot be read"
        return
    has_all = columns.first == 1
    yield from columns.forbidden
    yield from _version_differences(version, columns, history, is_whole=is_whole)
    for name in COLUMNS:
        if name not in row:
            yield KeyDifference.KEY_DIFFERS, name, "the row was exported without this column"
        elif (name in columns.values or has_all) and columns.values.get(name) != (value := _comparable(name, row[name])):
            yield _differs(name, columns.values.get(name), value)
    expected = (used or 0) if has_all else used
    if expected is not None and (counter < expected or (has_all and counter != expected)):
        yield _differs("usage_counter", Number(str(expected)), Number(str(counter)))


def _version_differences(
    version: int, columns: "_Columns", history: History, *, is_whole: bool
) -> Iterator[tuple[KeyDifference, str, str]]:
    if history.conflict is not None:
        yield KeyDifference.KEY_DIFFERS, "version", f"the trail has two different entries of version {history.conflict}"
    if columns.gap is not None or (is_whole and columns.first not in (None, 1)):
        gap = columns.gap if columns.gap is not None else 1
        yield KeyDifference.KEY_DIFFERS, "version", f"the trail has no entry of version {gap}"
    if columns.last is not None and version != columns.last:
        yield _differs("version", Number(str(columns.last)), Number(str(version)))


@dataclass(slots=True)
class _Columns:
    """The columns as the entries leave them; `stated` is the count that an administrator confirmed. Filled entry by entry."""

    values: dict[str, Any] = field(default_factory=dict)
    first: int | None = None
    last: int | None = None
    gap: int | None = None
    stated: int | None = None
    forbidden: list[tuple[KeyDifference, str, str]] = field(default_factory=list)

    @classmethod
    def of(cls, changes: Iterable[tuple[int, str]]) -> "_Columns":
        found = cls()
        for version, data in changes:
            found._take(version, load(data))
        return found

    def _take(self, version: int, data: Mapping[str, Any]) -> None:
        changed = {name: _comparable(name, data[name]) for name in COLUMNS if name in data}
        if self.last is not None and version != self.last + 1 and self.gap is None:
            self.gap = self.last + 1
        for name, value in changed.items():
            if version > 1 and (why := self._forbidden(name, value)):
                message = f"the entry of version {version} says that {name} {why}, and no call of the service does that"
                self.forbidden.append((KeyDifference.KEY_MOVE_FORBIDDEN, name, message))
        if data.get("usage_counter") is not None:
            self.stated = max(integer(data["usage_counter"]), self.stated or 0)
        self.values |= changed
        self.first, self.last = self.first or version, version

    def _forbidden(self, name: str, value: Any) -> str | None:  # noqa: ANN401  # whatever JSON holds
        """Return what nothing in the service does with a column, or None."""
        if name in _NEVER_CHANGE:
            return "was changed"
        before = self.values.get(name)
        if name == "key_status" and value not in _LEFT_FOR.get(before, (value,)):
            return f"was {before} and is so no longer"
        if name == "max_usage_count" and before is not None and (value is None or integer(value) > integer(before)):
            return "was lifted"
        if name == "expires_at" and isinstance(before, datetime) and not (isinstance(value, datetime) and value <= before):
            return "was put off"
        return "was changed" if name == "destroyed_at" and before is not None else None


def _comparable(name: str, value: Any) -> Any:  # noqa: ANN401  # whatever JSON holds
    """Return a moment as such: its text depends on the time zone of the session that wrote it."""
    if name.endswith("_at") and isinstance(value, str):
        try:
            return datetime.fromisoformat(value).astimezone(UTC)
        except (ValueError, OverflowError):
            return value
    return value


def _differs(name: str, expected: object, found: object) -> tuple[KeyDifference, str, str]:
    told = f"{name} is not what the trail says"
    if name in _SHOWN:
        told += f": {_shown(found)} instead of {_shown(expected)}"
    return KeyDifference.KEY_DIFFERS, name, told


def _shown(value: object) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    return (value.text if isinstance(value, Number) else json.dumps(value, default=repr))[:_SHOWN_CHARACTERS_MAX]
