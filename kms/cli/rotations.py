"""`kms key rotate` and `kms rotation …`: giving keys successors, and looking at the log of it."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from kms.cli.failures import CallError
from kms.cli.invocation import Invocation, command, group
from kms.cli.options import KeyArgument
from kms.cli.output import print_fields, print_json, print_table

if TYPE_CHECKING:
    from kms.v1 import rotation_pb2

_PAGE: Final = 200
_COLUMNS: Final = ("created_at", "status", "old_key_id", "new_key_id", "affected_records_count", "reason", "id")

RotationArgument = Annotated[str, typer.Argument(metavar="ROTATION", help="A rotation's id.", show_default=False)]


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


def register(app: typer.Typer, keys: typer.Typer) -> None:
    """Add `rotate` to *keys*, the group `kms key`, and the group `kms rotation` to *app*."""
    command(keys, "rotate", "kms key rotate payments --reason 'a year old'")(rotate)
    rotations = group(app, "rotation", "Look at rotations, and try them again.")
    command(rotations, "list", "kms rotation list", "kms rotation list --key payments --status failed --json")(list_rotations)
    command(rotations, "show", "kms rotation show 3b3c7a53-8d2c-4d4c-9a4e-0c8f2d1a6b57")(show)
    command(rotations, "retry", "kms rotation retry 3b3c7a53-8d2c-4d4c-9a4e-0c8f2d1a6b57")(retry)


def _print_ended(invocation: Invocation, rotation: "rotation_pb2.Rotation") -> None:
    """Print a rotation of which an attempt has ended, and raise `CallError` unless it is completed."""
    from kms.v1 import rotation_pb2

    _print(invocation, rotation)
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
