"""Events of the trail, wire to domain and back."""

import hashlib
import json
from dataclasses import astuple
from datetime import UTC, datetime
from typing import Final
from uuid import UUID

from kms.domain.errors import malformed
from kms.domain.fields import NUMBER_MAX, open_token, parse_filter, token_of
from kms.domain.ids import UserId, parse_uuid
from kms.domain.key_check import KeyReport
from kms.domain.text import json_text
from kms.domain.trail import Cursor, Event, EventFilter, Place, Stretch
from kms.domain.trail_check import TrailReport
from kms.rpc import convert, enums
from kms.v1 import audit_pb2

PAGE_DEFAULT: Final = 100


def event_filter(request: audit_pb2.SearchEventsRequest) -> EventFilter:
    """Return which events a search is for, or raise MALFORMED naming the field."""
    return EventFilter(
        since=convert.moment(request, "since"),
        until=convert.moment(request, "until"),
        user_id=UserId(parse_uuid(request.user_id, field="user_id")) if request.user_id else None,
        resource_id=parse_uuid(request.resource_id, field="resource_id") if request.resource_id else None,
        event_type=parse_filter(request.event_type, field="event_type"),
        action=parse_filter(request.action, field="action"),
        outcome=enums.optional(enums.OUTCOMES, request.outcome, "outcome"),
        severity_min=enums.optional(enums.SEVERITIES, request.severity_min, "severity_min") or EventFilter().severity_min,
        request_id=parse_filter(request.request_id, field="request_id"),
    )


def wire_event(event: Event) -> audit_pb2.Event:
    """Return *event* as a client sees it."""
    return audit_pb2.Event(
        id=str(event.event_id),
        created_at=convert.stamp(event.created_at),
        event_type=event.event_type,
        severity=enums.number_of(enums.SEVERITIES, event.severity),
        outcome=enums.number_of(enums.OUTCOMES, event.outcome) if event.outcome else audit_pb2.OUTCOME_UNSPECIFIED,
        user_id=str(event.user_id or ""),
        peer=event.peer,
        resource_type=event.resource_type,
        resource_id=str(event.resource_id or ""),
        action=event.action,
        risk_score=event.risk_score,
        details_json=json_text(event.details, sort_keys=True),
    )


def wire_stretch(stretch: Stretch) -> audit_pb2.TailEventsResponse:
    """Return *stretch* as a client sees it."""
    cursor = token_of(stretch.cursor.commit_order, str(stretch.cursor.event_id))
    return audit_pb2.TailEventsResponse(events=[wire_event(event) for event in stretch.events], cursor=cursor)


def wire_report(report: TrailReport) -> audit_pb2.VerifyTrailResponse:
    """Return *report* as a client sees it."""
    found = report.finding
    return audit_pb2.VerifyTrailResponse(
        begun_at=report.begun_at,
        verified_size=report.verified_size,
        checkpoints=report.checkpoints,
        unsealed=report.unsealed,
        epochs=[audit_pb2.TrailEpoch(number=each.epoch, goes_on_from=each.goes_on_from) for each in report.epochs],
        finding=None
        if found is None
        else audit_pb2.TrailFinding(
            difference=found.difference, after_size=found.after_size, by_size=found.by_size, message=found.message
        ),
        keys=None if report.keys is None else _wire_keys(report.keys),
    )


def _wire_keys(found: KeyReport) -> audit_pb2.KeyComparison:
    return audit_pb2.KeyComparison(
        compared=found.compared,
        partly=found.partly,
        not_comparable=found.not_comparable,
        unsigned=found.unsigned,
        differences=found.differences,
        findings=[
            audit_pb2.KeyFinding(difference=each.difference, key_id=each.key_id, column=each.column, message=each.message)
            for each in found.findings
        ],
        next_after=found.next_after,
    )


def page_token(place: Place | None, which: EventFilter) -> str:
    """Return the token of the page that begins at *place*, empty where there is none."""
    return "" if place is None else token_of(_fingerprint(which), place.created_at.isoformat(), str(place.event_id))


def parse_page_token(token: str, which: EventFilter) -> Place | None:
    """Return where the page begins, None for the first, or raise MALFORMED for what no page of this search gave."""
    if not token:
        return None
    expected = malformed("page_token", "expected next_page_token of the page before, with the same filter")
    match open_token(token, expected=expected):
        case [fingerprint, str(created_at), str(event_id)] if fingerprint == _fingerprint(which):
            pass
        case _:
            raise expected
    try:
        return Place(datetime.fromisoformat(created_at).astimezone(UTC), UUID(event_id))
    except (ValueError, OverflowError):
        raise expected from None


def parse_cursor(token: str) -> Cursor | None:
    """Return the cursor, None for an empty one, or raise MALFORMED."""
    if not token:
        return None
    expected = malformed("cursor", "expected the cursor of an answer of TailEvents")
    match open_token(token, expected=expected):
        case [int(order), str(event_id)] if type(order) is int and 0 <= order <= NUMBER_MAX:
            pass
        case _:
            raise expected
    try:
        return Cursor(order, UUID(event_id))
    except ValueError:
        raise expected from None


def _fingerprint(which: EventFilter) -> str:
    return hashlib.sha256(json.dumps(astuple(which), default=str).encode()).hexdigest()[:16]
