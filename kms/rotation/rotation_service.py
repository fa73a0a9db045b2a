"""The servicer of RotationService."""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from kms.app.ports import Call
from kms.domain.errors import KmsError, malformed
from kms.domain.fields import open_token, parse_optional_number, token_of
from kms.domain.ids import parse_key_ref, parse_uuid
from kms.domain.keys import KeyRecord
from kms.rotation.policy import RotationPolicy, Triggers
from kms.rotation.rotating import Rotating
from kms.rotation.rotation import Rotation, RotationFilter, RotationPlace, RotationStatus
from kms.rotation.scheduling import Schedule, Scheduling
from kms.rotation.usage import CountedUses, LineageUsage
from kms.rpc import convert, enums
from kms.v1 import keys_pb2
from kms.v1 import rotation_pb2 as pb

PAGE_DEFAULT: Final = 50
PAGE_MAX: Final = 200
USAGE_PAGE_DEFAULT: Final = 20
USAGE_PAGE_MAX: Final = 50
STATUSES: Final[Mapping["pb.RotationStatus.ValueType", RotationStatus]] = {
    pb.ROTATION_STATUS_PENDING: RotationStatus.PENDING,
    pb.ROTATION_STATUS_IN_PROGRESS: RotationStatus.IN_PROGRESS,
    pb.ROTATION_STATUS_COMPLETED: RotationStatus.COMPLETED,
    pb.ROTATION_STATUS_FAILED: RotationStatus.FAILED,
}


@dataclass(frozen=True, slots=True)
class RotationServicer:
    """Decodes, calls `Rotating`, `Scheduling` and `LineageUsage`, encodes."""

    rotating: Rotating
    scheduling: Scheduling
    usage: LineageUsage

    async def RotateKey(self, request: pb.RotateKeyRequest, call: Call) -> pb.RotateKeyResponse:
        """Rotate a key."""
        rotation = await self.rotating.rotate(
            call,
            parse_key_ref(request.key),
            request.reason,
            convert.repeatable(request),
            allow_compromised=request.allow_compromised,
        )
        return pb.RotateKeyResponse(rotation=wire_rotation(rotation))

    async def RetryRotation(self, request: pb.RetryRotationRequest, call: Call) -> pb.RetryRotationResponse:
        """Try a rotation again."""
        rotation_id = parse_uuid(request.rotation_id, field="rotation_id")
        return pb.RetryRotationResponse(rotation=wire_rotation(await self.rotating.retry(call, rotation_id)))

    async def SetRotationPolicy(self, request: pb.SetRotationPolicyRequest, call: Call) -> pb.SetRotationPolicyResponse:
        """Set or clear the policy of a key."""
        policy = request.policy
        schedule = await self.scheduling.set(
            call,
            parse_key_ref(request.key),
            _triggers(policy) if request.HasField("policy") else None,
            is_paused=policy.paused,
            version=parse_optional_number(policy.version, field="version"),
        )
        wire = None if schedule.policy is None else _wire_policy(schedule.policy)
        return pb.SetRotationPolicyResponse(policy=wire, next_rotation_at=_next_rotation_at(schedule))

    async def GetRotation(self, request: pb.GetRotationRequest, call: Call) -> pb.GetRotationResponse:
        """Return a rotation."""
        rotation_id = parse_uuid(request.rotation_id, field="rotation_id")
        return pb.GetRotationResponse(rotation=wire_rotation(await self.rotating.find(call.user, rotation_id)))

    async def WatchRotation(self, request: pb.WatchRotationRequest, call: Call) -> AsyncIterator[pb.WatchRotationResponse]:
        """Follow a rotation until it is over."""
        rotation_id = parse_uuid(request.rotation_id, field="rotation_id")
        async for rotation in self.rotating.watch(call.user, rotation_id):
            yield pb.WatchRotationResponse(rotation=wire_rotation(rotation))

    async def ListRotations(self, request: pb.ListRotationsRequest, call: Call) -> pb.ListRotationsResponse:
        """List rotations, the newest first."""
        limit = parse_optional_number(request.page_size, field="page_size", most=PAGE_MAX) or PAGE_DEFAULT
        status = enums.optional(STATUSES, request.status, "status")
        caller, key_id = call.user, None
        if request.key:
            key_id = (await self.rotating.key(caller, parse_key_ref(request.key))).identity.key_id
        which = RotationFilter(key_id, status)
        place = _parse_page_token(request.page_token, which)
        found = await self.rotating.rotations.page(caller, which, after=place, limit=limit + 1)
        rotations = [wire_rotation(rotation) for rotation in found[:limit]]
        token = _page_token(found[limit - 1], which) if len(found) > limit else ""
        return pb.ListRotationsResponse(rotations=rotations, next_page_token=token)

    async def GetLineageUsage(self, request: pb.GetLineageUsageRequest, call: Call) -> pb.GetLineageUsageResponse:
        """Tell how often the predecessors of a key are still used."""
        limit = parse_optional_number(request.page_size, field="page_size", most=USAGE_PAGE_MAX) or USAGE_PAGE_DEFAULT
        since, caller = convert.moment(request, "since"), call.user.user_id
        lineage = await self.usage.lineage(caller, parse_key_ref(request.key))
        which = (str(lineage), "" if since is None else since.isoformat())
        page = await self.usage.page(caller, lineage, since, after=_parse_usage_token(request.page_token, which), limit=limit)
        return pb.GetLineageUsageResponse(
            predecessors=[wire_usage(key, counted) for key, counted in page.keys],
            next_page_token="" if page.goes_on_after is None else token_of(*which, page.goes_on_after),
            invalid_key_ids=map(str, page.invalid),
        )


def wire_rotation(rotation: Rotation) -> pb.Rotation:
    """Return a rotation as a client sees it."""
    return pb.Rotation(
        id=str(rotation.rotation_id),
        old_key_id=str(rotation.old_key_id),
        new_key_id="" if rotation.new_key_id is None else str(rotation.new_key_id),
        reason=rotation.reason,
        initiated_by="" if rotation.initiated_by is None else str(rotation.initiated_by),
        status=enums.number_of(STATUSES, rotation.status),
        affected_records_count=rotation.affected_records_count,
        error_message=rotation.error_message,
        created_at=convert.stamp(rotation.created_at),
        completed_at=convert.stamp(rotation.completed_at),
        attempts=rotation.attempts,
    )


async def add_schedule(scheduling: Scheduling, key: KeyRecord, wire: keys_pb2.Key) -> None:
    """Add the policy of a proven key, and its next rotation, to what a client sees of the key. Raises RECORD_INVALID."""
    schedule = await scheduling.of(key)
    if schedule.policy is not None:
        wire.rotation_policy.CopyFrom(_wire_policy(schedule.policy))
    wire.MergeFrom(keys_pb2.Key(next_rotation_at=_next_rotation_at(schedule)))


def _triggers(policy: keys_pb2.RotationPolicy) -> Triggers:
    return Triggers(
        every=convert.span(policy, "every"),
        before_expiry=convert.span(policy, "before_expiry"),
        at_usage_percent=parse_optional_number(policy.at_usage_percent, field="at_usage_percent", most=99),
        on_compromise=policy.on_compromise,
    )


def _wire_policy(policy: RotationPolicy) -> keys_pb2.RotationPolicy:
    triggers = policy.triggers
    return keys_pb2.RotationPolicy(
        every=_duration(triggers.every),
        before_expiry=_duration(triggers.before_expiry),
        at_usage_percent=triggers.at_usage_percent or 0,
        on_compromise=triggers.on_compromise,
        paused=policy.is_paused,
        version=policy.version,
    )


def _duration(span: timedelta | None) -> Duration | None:
    return None if span is None else Duration(seconds=span // timedelta(seconds=1))


def _next_rotation_at(schedule: Schedule) -> Timestamp | None:
    return None if schedule.due is None else convert.stamp(schedule.due.at)


def _page_token(last: Rotation, which: RotationFilter) -> str:
    return token_of(*_fingerprint(which), last.created_at.isoformat(), str(last.rotation_id))


def _parse_page_token(token: str, which: RotationFilter) -> RotationPlace | None:
    if not token:
        return None
    expected = malformed("page_token", "expected next_page_token of the page before, with the same filter")
    match open_token(token, expected=expected):
        case [key_id, status, str(moment), str(rotation_id)] if (key_id, status) == _fingerprint(which):
            pass
        case _:
            raise expected
    try:
        created_at = datetime.fromisoformat(moment)
        place = RotationPlace(created_at, UUID(rotation_id))
    except ValueError:
        raise expected from None
    if created_at.tzinfo is None:
        raise expected
    return place


def _fingerprint(which: RotationFilter) -> tuple[str, str]:
    return str(which.key_id or ""), str(which.status or "")


def wire_usage(key: KeyRecord, counted: CountedUses) -> pb.PredecessorUsage:
    """Return the uses of a predecessor as a client sees them."""
    uses = [
        pb.PredecessorUsage.Use(
            action=use.action,
            user_id="" if use.user_id is None else str(use.user_id),
            count=use.count,
            last_used_at=convert.stamp(use.last_used_at),
            last_peer=use.last_peer,
        )
        for use in counted.uses
    ]
    return pb.PredecessorUsage(
        key_id=str(key.identity.key_id),
        name=key.name,
        superseded_at=convert.stamp(key.superseded_at),
        counted_since=convert.stamp(counted.since),
        uses=uses,
    )


def _parse_usage_token(token: str, which: tuple[str, str]) -> str:
    if not token:
        return ""
    expected = malformed("page_token", "expected next_page_token of the page before, with the same key and since")
    match open_token(token, expected=expected):
        case [lineage, since, str(after)] if (lineage, since) == which:
            pass
        case _:
            raise expected
    try:
        return str(parse_key_ref(after))
    except KmsError:
        raise expected from None
