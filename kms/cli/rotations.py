"""`kms key rotate`, `kms key rotation` and `kms rotation …`: giving keys successors, now or by policy, and the log of it."""

import sys
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from kms.cli.failures import CallError
from kms.cli.invocation import Invocation, command, group
from kms.cli.moments import MOMENTS, parse_span, span_seconds, stamp
from kms.cli.options import KeyArgument
from kms.cli.output import changing_line, print_fields, print_json, print_table
from kms.domain.text import json_text

if TYPE_CHECKING:
    from kms.v1 import keys_pb2, rotation_pb2

_PAGE: Final = 200
_USAGE_PAGE: Final = 50
_USAGE_COLUMNS: Final = (
    *("name", "superseded_at", "counted_since", "action", "user_id", "count", "last_used_at", "last_peer", "key_id"),
)
_COLUMNS: Final = ("created_at", "status", "old_key_id", "new_key_id", "affected_records_count", "reason", "id")

RotationArgument = Annotated[str, typer.Argument(metavar="ROTATION", help="A rotation's id.", show_default=False)]


def _share(text: str) -> int:
    number = text.removesuffix("%")
    if not number.isascii() or not number.isdigit() or len(number) > 3:
        raise typer.BadParameter("expected a share such as 80%")
    return int(number)


class Status(StrEnum):
    """How far a rotation is."""

    PENDING = "pending"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"


def rotate(
    invocation: Invocation,
    key: KeyArgument,
    reason: Annotated[str, typer.Option("--reason", help="Why: 1 to 100 characters, kept in the log.", show_default=False)],
    allow_compromised: Annotated[
        bool, typer.Option("--allow-compromised", help="Rotate a key that was marked compromised, too.")
    ] = False,
    request_id: Annotated[
        str, typer.Option(metavar="ID", help="Makes the command repeatable: the same ID, the same rotation.", show_default=False)
    ] = "",
) -> None:
    """Give a key a successor, which takes its name. The key becomes NAME@1: it decrypts and verifies, and signs no more.

    Fails with exit code 1 if the rotation failed, and with 5 if its first attempt did and another follows.
    """
    with invocation.client() as client:
        from kms.v1 import rotation_pb2

        request = rotation_pb2.RotateKeyRequest(
            key=key, reason=reason, allow_compromised=allow_compromised, request_id=request_id
        )
        _print_ended(invocation, client.call(client.rotation.RotateKey, request).rotation)


def retry(invocation: Invocation, rotation: RotationArgument) -> None:
    """Try a rotation again that failed, or that waits for its next attempt.

    A rotation that failed after the switch is completed. Before the switch, a rotation can be tried again for a day. Fails as kms
    key rotate does.
    """
    with invocation.client() as client:
        from kms.v1 import rotation_pb2

        request = rotation_pb2.RetryRotationRequest(rotation_id=rotation)
        _print_ended(invocation, client.call(client.rotation.RetryRotation, request).rotation)


def watch(invocation: Invocation, rotation: RotationArgument) -> None:
    """Follow a rotation until it is over. On a terminal one line changes; into a pipe each change is a line.

    Into a pipe: status, attempts, new key and error, with tabs between; with --json one object a line.
    Fails as kms key rotate does.
    """
    with invocation.client() as client:
        from kms.v1 import rotation_pb2

        last = rotation_pb2.Rotation()
        with changing_line() as show_line:
            for last in client.watched(rotation):
                fields = _fields(last)
                columns = (fields["status"], str(last.attempts), last.new_key_id, last.error_message)
                show_line(json_text(fields) if invocation.as_json else "\t".join(columns))
        if not invocation.as_json and sys.stdout.isatty():
            _print(invocation, last)
        _check_completed(last)


def policy(
    invocation: Invocation,
    key: KeyArgument,
    every: Annotated[
        str | None,
        typer.Option(metavar="SPAN", parser=parse_span, help="After it has been active so long: 90d.", show_default=False),
    ] = None,
    before_expiry: Annotated[
        str | None, typer.Option(metavar="SPAN", parser=parse_span, help="So long before it expires: 7d.", show_default=False)
    ] = None,
    at_usage: Annotated[
        int | None,
        typer.Option(metavar="SHARE", parser=_share, help="At such a share of its usage limit: 80%.", show_default=False),
    ] = None,
    on_compromise: Annotated[bool, typer.Option("--on-compromise", help="At once when it is marked compromised.")] = False,
    clear: Annotated[bool, typer.Option("--clear", help="Rotate the key no more without being asked.")] = False,
) -> None:
    """Say when a key is rotated without anybody asking, or show it: without options.

    What the options do not name does not rotate the key. The first that comes true does. The successor is under the same policy.
    """
    with invocation.client() as client:
        from google.protobuf.duration_pb2 import Duration

        from kms.v1 import keys_pb2, rotation_pb2

        wants = every is not None or before_expiry is not None or at_usage is not None or on_compromise
        if clear and wants:
            raise typer.BadParameter("--clear stands alone")
        if wants or clear:
            request = rotation_pb2.SetRotationPolicyRequest(key=key)
            if wants:
                wished = keys_pb2.RotationPolicy(
                    every=None if every is None else Duration(seconds=span_seconds(every)),
                    before_expiry=None if before_expiry is None else Duration(seconds=span_seconds(before_expiry)),
                    at_usage_percent=at_usage or 0,
                    on_compromise=on_compromise,
                )
                request.policy.CopyFrom(wished)
            client.call(client.rotation.SetRotationPolicy, request)
        _print_policy(invocation, client.call(client.keys.GetKey, keys_pb2.GetKeyRequest(key=key)).key)


def pause(invocation: Invocation, key: KeyArgument) -> None:
    """Let the policy of a key rest: the key is not rotated until kms rotation resume."""
    _set_paused(invocation, key, paused=True)


def resume(invocation: Invocation, key: KeyArgument) -> None:
    """Let a policy that was paused work again. What became due meanwhile is made up once."""
    _set_paused(invocation, key, paused=False)


def list_rotations(
    invocation: Invocation,
    key: Annotated[str, typer.Option(metavar="KEY", help="Only rotations from or to this key.", show_default=False)] = "",
    status: Annotated[Status | None, typer.Option(help="Only rotations that are so far.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="At most so many; 0: all.")] = 0,
) -> None:
    """List the rotations of your keys, or for a rotator those of all keys, the newest first.

    Into a pipe: when, status, old key, new key, dependents, reason and id, with tabs between.
    """
    with invocation.client() as client:
        from kms.v1 import rotation_pb2

        number = rotation_pb2.RotationStatus.Value(f"ROTATION_STATUS_{status.name if status else 'UNSPECIFIED'}")
        request = rotation_pb2.ListRotationsRequest(key=key, status=number, page_size=min(limit or _PAGE, _PAGE))
        found = [_fields(rotation) for rotation in client.pages(client.rotation.ListRotations, request, "rotations", limit)]
    if invocation.as_json:
        print_json({"rotations": found})
    else:
        print_table(_COLUMNS, [[str(rotation.get(column, "")) for column in _COLUMNS] for rotation in found])


def show(invocation: Invocation, rotation: RotationArgument) -> None:
    """Show a rotation."""
    with invocation.client() as client:
        from kms.v1 import rotation_pb2

        request = rotation_pb2.GetRotationRequest(rotation_id=rotation)
        _print(invocation, client.call(client.rotation.GetRotation, request).rotation)


def usage(
    invocation: Invocation,
    key: KeyArgument,
    since: Annotated[
        datetime | None, typer.Option(formats=MOMENTS, help="Count uses from this moment on. Default: 30 days ago.")
    ] = None,
) -> None:
    """Show how often the predecessors of a key are still used, by whom and by which operation: when can one of them go?

    The trail tells. It has neither kms verify nor refused calls. Each predecessor has a line, also if nobody used it.
    Into a pipe: name, superseded, counted since, operation, user, uses, last used, from which address, and id, with tabs between.
    """
    with invocation.client() as client:
        from kms.v1 import rotation_pb2

        request = rotation_pb2.GetLineageUsageRequest(key=key, since=stamp(since), page_size=_USAGE_PAGE)
        found, invalid = [], list[str]()
        for page in client.whole_pages(client.rotation.GetLineageUsage, request):
            found += [_usage_fields(each) for each in page.predecessors]
            invalid += page.invalid_key_ids
    if invocation.as_json:
        print_json({"predecessors": found, "invalid_key_ids": invalid})
    else:
        print_table([column.replace("_", " ") for column in _USAGE_COLUMNS], [row for each in found for row in _usage_rows(each)])
    if invalid:
        message = f"the records of these predecessors are not as the service left them: {', '.join(invalid)}"
        raise CallError("DATA_LOSS", "RECORD_INVALID", message, {})


def register(app: typer.Typer, keys: typer.Typer) -> None:
    """Add `rotate` to *keys*, the group `kms key`, and the group `kms rotation` to *app*."""
    command(keys, "rotate", "kms key rotate payments --reason 'a year old'")(rotate)
    rotations = group(app, "rotation", "Look at rotations, and try them again.")
    command(rotations, "list", "kms rotation list", "kms rotation list --key payments --status failed --json")(list_rotations)
    command(rotations, "usage", "kms rotation usage backups", "kms rotation usage backups --since 2026-01-01 --json")(usage)
    command(rotations, "show", "kms rotation show 3b3c7a53-8d2c-4d4c-9a4e-0c8f2d1a6b57")(show)
    command(
        keys,
        "rotation",
        "kms key rotation payments --every 90d --before-expiry 7d --at-usage 80% --on-compromise",
        "kms key rotation payments",
        "kms key rotation payments --clear",
    )(policy)
    command(rotations, "pause", "kms rotation pause payments")(pause)
    command(rotations, "resume", "kms rotation resume payments")(resume)
    command(
        rotations,
        "watch",
        "kms rotation watch 3b3c7a53-8d2c-4d4c-9a4e-0c8f2d1a6b57",
        "kms rotation watch 3b3c7a53-8d2c-4d4c-9a4e-0c8f2d1a6b57 --json | jq -r .status",
    )(watch)
    command(rotations, "retry", "kms rotation retry 3b3c7a53-8d2c-4d4c-9a4e-0c8f2d1a6b57")(retry)


def _set_paused(invocation: Invocation, key: str, *, paused: bool) -> None:
    """Set the policy of a key as it is, but for its rest. Another change meanwhile is STALE."""
    with invocation.client() as client:
        from kms.v1 import keys_pb2, rotation_pb2

        shown = client.call(client.keys.GetKey, keys_pb2.GetKeyRequest(key=key)).key
        if not shown.HasField("rotation_policy"):
            raise CallError("FAILED_PRECONDITION", "NO_POLICY", "the key has no policy: see kms key rotation", {"key": key})
        shown.rotation_policy.paused = paused
        request = rotation_pb2.SetRotationPolicyRequest(key=shown.id, policy=shown.rotation_policy)
        client.call(client.rotation.SetRotationPolicy, request)
        _print_policy(invocation, client.call(client.keys.GetKey, keys_pb2.GetKeyRequest(key=shown.id)).key)


def _print_policy(invocation: Invocation, key: "keys_pb2.Key") -> None:
    from kms.cli.words import key_fields

    shown = key_fields(key)
    policy = shown.get("rotation_policy", {})
    fields = {
        "key_id": key.id,
        **policy,
        **({"next_rotation_at": shown["next_rotation_at"]} if "next_rotation_at" in shown else {}),
    }
    if invocation.as_json:
        print_json(fields)
    elif policy:
        print_fields({name.replace("_", " "): value for name, value in fields.items()})
    else:
        print_fields({"key id": key.id, "policy": "none"})


def _print_ended(invocation: Invocation, rotation: "rotation_pb2.Rotation") -> None:
    """Print a rotation of which an attempt has ended, and raise `CallError` unless it is completed."""
    _print(invocation, rotation)
    _check_completed(rotation)


def _check_completed(rotation: "rotation_pb2.Rotation") -> None:
    from kms.v1 import rotation_pb2

    if rotation.status == rotation_pb2.ROTATION_STATUS_FAILED:
        raise CallError("FAILED_PRECONDITION", "ROTATION_FAILED", f"the rotation failed: {rotation.error_message}", {})
    if rotation.status != rotation_pb2.ROTATION_STATUS_COMPLETED:
        message = f"the rotation is tried again later: {rotation.error_message}; see kms rotation show {rotation.id}"
        raise CallError("UNAVAILABLE", "ROTATION_PENDING", message, {})


def _print(invocation: Invocation, rotation: "rotation_pb2.Rotation") -> None:
    fields = _fields(rotation)
    if invocation.as_json:
        print_json(fields)
    else:
        print_fields({name.replace("_", " "): value for name, value in fields.items()})


def _fields(rotation: "rotation_pb2.Rotation") -> dict[str, Any]:
    """Return *rotation* as `--json` shows it. What it does not have yet is absent."""
    from kms.v1 import rotation_pb2

    fields: dict[str, Any] = {
        "id": rotation.id,
        "old_key_id": rotation.old_key_id,
        "new_key_id": rotation.new_key_id,
        "reason": rotation.reason,
        "initiated_by": rotation.initiated_by,
        "status": rotation_pb2.RotationStatus.Name(rotation.status).removeprefix("ROTATION_STATUS_").lower(),
        "affected_records_count": rotation.affected_records_count,
        "error_message": rotation.error_message,
        "created_at": rotation.created_at.ToJsonString(),
        "completed_at": rotation.completed_at.ToJsonString() if rotation.HasField("completed_at") else "",
    }
    return {name: value for name, value in fields.items() if value != ""}


def _usage_fields(found: "rotation_pb2.PredecessorUsage") -> dict[str, Any]:
    """Return a predecessor and its uses as `--json` shows them."""
    uses = [
        {
            "action": use.action,
            "user_id": use.user_id,
            "count": use.count,
            "last_used_at": use.last_used_at.ToJsonString(),
            "last_peer": use.last_peer,
        }
        for use in found.uses
    ]
    return {
        "key_id": found.key_id,
        "name": found.name,
        "superseded_at": found.superseded_at.ToJsonString(),
        "counted_since": found.counted_since.ToJsonString(),
        "uses": uses,
    }


def _usage_rows(predecessor: dict[str, Any]) -> list[list[str]]:
    lines = predecessor["uses"] or [{"count": 0}]
    return [[str({**predecessor, **line}.get(column, "")) for column in _USAGE_COLUMNS] for line in lines]
