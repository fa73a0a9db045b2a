"""RESIDENT keys that were not finished: what the token holds, what the database says, and which objects may be removed.

Before the service makes a RESIDENT key, it writes a mark with the key's id and the time into the token. It removes the mark
when the key's row is stored. So a mark says that a creation has not ended. Without a mark, the key was finished once.

Whoever owns the database can delete a row. A missing row alone is therefore never a reason to remove an object: it may
be the only copy of a key. Only an old mark is one. A row counts as stored only if it is proven to be the service's own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final

from kms.domain.ids import KeyId

CREATION_HOURS_MAX: Final = 1
"""After this a creation is over: no call takes longer than ten minutes."""


@dataclass(frozen=True, slots=True)
class Mark:
    """What says that the creation of a key has begun. None: the mark cannot be read."""

    made_at: datetime | None


@dataclass(frozen=True, slots=True)
class Holdings:
    """The RESIDENT keys whose object the token holds, with what each is bound to, and the marks."""

    objects: Mapping[KeyId, str]
    marks: Mapping[KeyId, Mark]


class Row(StrEnum):
    """What the database says of a key for which it has a row."""

    PROVEN = "proven"
    UNPROVEN = "unproven"


class Finding(StrEnum):
    """What an object or a mark in the token turns out to be."""

    STORED = "stored"
    """A finished key. Nothing to do."""
    STORED_WITH_MARK = "stored_with_mark"
    """A finished key whose mark stayed. The mark may go."""
    PENDING = "pending"
    """A creation that may still go on."""
    ORPHAN = "orphan"
    """A creation that ended without a row. The object and the mark may go."""
    MARK_ALONE = "mark_alone"
    """A creation that ended without an object. The mark may go."""
    ROW_MISSING = "row_missing"
    """A finished key without a row: somebody deleted the row. The object is the only copy of the key."""
    ROW_UNPROVEN = "row_unproven"
    """A key whose row is not proven to be the service's own. Nothing is touched."""
    MARK_UNREADABLE = "mark_unreadable"
    """A key without a row whose mark has no time, or one that lies ahead. Nothing is touched."""


NEEDS_OPERATOR: Final = frozenset({Finding.ROW_MISSING, Finding.ROW_UNPROVEN, Finding.MARK_UNREADABLE})
"""What reconciliation leaves alone and reports."""

REMOVABLE_BY_OPERATOR: Final = frozenset({Finding.ROW_MISSING, Finding.MARK_UNREADABLE})
"""What an operator may remove by the key's id."""


ADVICE: Final[Mapping[Finding, str]] = {
    Finding.STORED_WITH_MARK: "the mark of its creation had stayed, and is removed",
    Finding.ORPHAN: "its creation ended without a row: the key is removed from the token",
    Finding.MARK_ALONE: "its creation ended without a key: the mark is removed",
    Finding.ROW_MISSING: "its row may have been deleted: restore it from a backup, or remove the key for ever with --remove ID",
    Finding.ROW_UNPROVEN: "its row is not proven to be the service's own: compare it with a backup",
    Finding.MARK_UNREADABLE: "its mark has no time, or one that lies ahead: check the clock, or remove the key with --remove ID",
}
"""What a reader of a finding should know or do."""


def findings(held: Holdings, rows: Mapping[KeyId, Row], *, now: datetime) -> dict[KeyId, Finding]:
    """Return what each object and mark of *held* is. *rows* has each key for which there is a row, read after *held*."""
    return {
        key_id: _finding(has_object=key_id in held.objects, mark=held.marks.get(key_id), row=rows.get(key_id), now=now)
        for key_id in sorted(held.objects.keys() | held.marks.keys())
    }


def _finding(*, has_object: bool, mark: Mark | None, row: Row | None, now: datetime) -> Finding:
    if mark is None:
        return {Row.PROVEN: Finding.STORED, Row.UNPROVEN: Finding.ROW_UNPROVEN, None: Finding.ROW_MISSING}[row]
    if has_object and row is not None:
        return Finding.STORED_WITH_MARK if row is Row.PROVEN else Finding.ROW_UNPROVEN
    age = None if mark.made_at is None else now - mark.made_at
    delay = timedelta(hours=CREATION_HOURS_MAX)
    if age is None or age <= -delay:
        return Finding.MARK_UNREADABLE
    if age <= delay:
        return Finding.PENDING
    return Finding.ORPHAN if has_object else Finding.MARK_ALONE
