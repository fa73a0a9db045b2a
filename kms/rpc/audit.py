"""The servicer of AuditService."""

from collections.abc import AsyncIterator
from dataclasses import dataclass

from kms.app.auditing import Auditing
from kms.app.ports import Call
from kms.domain.ids import parse_uuid
from kms.rpc import events
from kms.v1 import audit_pb2


@dataclass(frozen=True, slots=True)
class AuditServicer:
    """Decodes, calls `Auditing`, encodes."""

    auditing: Auditing

    async def SearchEvents(self, request: audit_pb2.SearchEventsRequest, call: Call) -> audit_pb2.SearchEventsResponse:
        """Return a page of events."""
        which = events.event_filter(request)
        before = events.parse_page_token(request.page_token, which)
        found = await self.auditing.search(call, which, before=before, limit=request.page_size or events.PAGE_DEFAULT)
        token = events.page_token(found.next_place, which)
        return audit_pb2.SearchEventsResponse(events=[events.wire_event(event) for event in found.events], next_page_token=token)

    async def TailEvents(self, request: audit_pb2.TailEventsRequest, call: Call) -> AsyncIterator[audit_pb2.TailEventsResponse]:
        """Follow the trail."""
        async for stretch in self.auditing.tail(call, events.parse_cursor(request.cursor)):
            yield events.wire_stretch(stretch)

    async def VerifyTrail(self, request: audit_pb2.VerifyTrailRequest, call: Call) -> audit_pb2.VerifyTrailResponse:
        """Compare the trail with its checkpoints, and keys with the trail."""
        after = parse_uuid(request.keys_after, field="keys_after") if request.keys_after else None
        found = await self.auditing.verify(call, request.from_size, request.to_size or None, after)
        return events.wire_report(found)
