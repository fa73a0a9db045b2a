"""`kms status`: how the service is."""

from typing import TYPE_CHECKING, Any

import typer

from kms.cli.failures import CallError, ExitCode
from kms.cli.invocation import Invocation, command
from kms.cli.output import print_fields, print_json

if TYPE_CHECKING:
    from kms.v1 import admin_pb2


def status(invocation: Invocation) -> None:
    """Print how the service is; end with code 1 when it is not ready.

    Of several workers one answers. Users with the role auditor see more: token, ledger, warnings.
    """
    from kms.v1 import admin_pb2

    with invocation.client() as client:
        try:
            fields = _fields(client.call(client.admin.GetStatus, admin_pb2.GetStatusRequest()))
        except CallError as error:
            if error.reason != "STORE_UNAVAILABLE":
                raise
            fields = {"ready": False, "faults": {"database": error.message}}
    if invocation.as_json:
        print_json(fields)
    else:
        print_fields(_flat(fields))
    if not fields["ready"]:
        raise typer.Exit(ExitCode.FAILED)


def register(app: typer.Typer) -> None:
    """Add this command to *app*."""
    command(app, "status", "kms status", "kms status --json | jq .detail.warnings")(status)


def _fields(answer: "admin_pb2.GetStatusResponse") -> dict[str, Any]:
    fields: dict[str, Any] = {
        "ready": answer.ready,
        "faults": {fault.part: fault.message for fault in answer.faults},
        "version": answer.version,
        "deployment_id": answer.deployment_id,
        "mode": answer.mode,
        "server_time": answer.server_time.ToJsonString(),
        "worker": answer.worker,
    }
    if answer.HasField("detail"):
        detail = answer.detail
        told = {field.name: getattr(detail, field.name) for field in detail.DESCRIPTOR.fields}
        seen = detail.disk_free_ratio if detail.HasField("disk_free_ratio") else None
        fields["detail"] = {**told, "disk_free_ratio": seen, "warnings": list(detail.warnings)}
    return fields


def _flat(fields: dict[str, Any]) -> dict[str, object]:
    """Return *fields* for people: a line each, with a line for every fault and every warning."""
    detail = dict(fields.get("detail", {}))
    warnings = detail.pop("warnings", [])
    lines: dict[str, object] = {"ready": "yes" if fields["ready"] else "no"}
    lines |= {f"fault: {part}": message for part, message in fields["faults"].items()}
    lines |= {name: value for name, value in fields.items() if name not in ("ready", "faults", "detail")}
    lines |= {name: f"{value:.2f}" if isinstance(value, float) else value for name, value in detail.items() if value is not None}
    return lines | {f"warning {number}": warning for number, warning in enumerate(warnings, start=1)}
