"""The trail as an auditor reads it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final
from uuid import UUID

from kms.domain.ids import UserId


class Severity(StrEnum):
    """How grave an event is, from the least on."""

    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"
    CRITICAL = "critical"


class Outcome(StrEnum):
    """What became of what was tried. BLOCKED: it was refused; FAILURE: it could not be done."""

    SUCCESS = "success"
    FAILURE = "failure"
    BLOCKED = "blocked"


SEVERITIES: Final = tuple(Severity)


@dataclass(frozen=True, slots=True)
class Event:
    """One line of the trail. `details` are what it holds besides: nothing secret. `peer` is an address without its port."""

    event_id: UUID
    created_at: datetime
    event_type: str
    severity: Severity
    outcome: Outcome | None
    user_id: UserId | None
    peer: str
    resource_type: str
    resource_id: UUID | None
    action: str
    risk_score: int
    details: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class EventFilter:
    """Which events: those for which everything given holds. `since` is the first moment, `until` the first one behind."""

    since: datetime | None = None
    until: datetime | None = None
    user_id: UserId | None = None
    resource_id: UUID | None = None
    event_type: str | None = None
    action: str | None = None
    outcome: Outcome | None = None
    severity_min: Severity = Severity.LOW
    request_id: str | None = None

    @property
    def severities(self) -> tuple[Severity, ...]:
        """The severities from `severity_min` on."""
        return SEVERITIES[SEVERITIES.index(self.severity_min) :]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a search stands: events before this one, in the order of time and id, are still to come."""

    created_at: datetime
    event_id: UUID


@dataclass(frozen=True, slots=True)
class Found:
    """What a call of a search gave, the newest first, and where the next goes on; None where nothing is left.

    It can hold fewer events than were asked for, or none, and still go on: how far one call looks is bounded.
    """

    events: Sequence[Event]
    next_place: Place | None


@dataclass(frozen=True, slots=True, order=True)
class Cursor:
    """Where a reader of the whole trail stands, in the order in which transactions made it: behind this event."""

    commit_order: int
    event_id: UUID


@dataclass(frozen=True, slots=True)
class Stretch:
    """The next events of the whole trail, in its order, and where it stands behind them."""

    events: Sequence[Event]
    cursor: Cursor
