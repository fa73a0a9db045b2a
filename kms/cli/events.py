"""`kms audit search` and `tail`: the trail, for users with the role auditor."""

import json
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from kms.cli.invocation import Invocation, command, group
from kms.cli.moments import MOMENTS, stamp
from kms.cli.output import print_json, print_table
from kms.domain.text import escaped, json_text
from kms.domain.trail import Outcome, Severity

if TYPE_CHECKING:
    from kms.v1 import audit_pb2

_PAGE: Final = 1000
_COLUMNS: Final = ("created_at", "severity", "event_type", "action", "outcome", "user_id", "resource_id", "peer", "request_id")

MomentOption = Annotated[datetime | None, typer.Option(formats=MOMENTS, help="UTC unless it says otherwise.")]


def search(
    invocation: Invocation,
    since: MomentOption = None,
    until: MomentOption = None,
    user: Annotated[str, typer.Option(metavar="ID", help="Only what this user did.")] = "",
    resource: Annotated[str, typer.Option(metavar="ID", help="Only what happened to this key or user.")] = "",
    event_type: Annotated[str, typer.Option("--type", metavar="TYPE", help="key.used, key.revoked, request.refused, …")] = "",
    action: Annotated[str, typer.Option(metavar="ACTION", help="sign, decrypt, revoked, …")] = "",
    outcome: Annotated[Outcome | None, typer.Option(help="Only events that ended so.")] = None,
    severity: Annotated[Severity | None, typer.Option(help="Only events as grave as this, or graver.")] = None,
    request_id: Annotated[str, typer.Option(metavar="ID", help="Only events of the call with this request id.")] = "",
    limit: Annotated[int, typer.Option(min=0, help="At most so many; 0: all.")] = 100,
) -> None:
    """Search the trail, the newest event first.

    Into a pipe: moment, severity, type, action, outcome, user, resource, address and request id, with tabs between.
    """
    with invocation.client() as client:
        from kms.cli.words import number
        from kms.rpc import enums
        from kms.v1 import audit_pb2

        request = audit_pb2.SearchEventsRequest(
            since=stamp(since),
            until=stamp(until),
            user_id=user,
            resource_id=resource,
            event_type=event_type,
            action=action,
            outcome=number(enums.OUTCOMES, outcome),
            severity_min=number(enums.SEVERITIES, severity),
            request_id=request_id,
            page_size=min(limit or _PAGE, _PAGE),
        )
        found = [_fields(event) for event in client.pages(client.audit.SearchEvents, request, "events", limit)]
    if invocation.as_json:
        print_json({"events": found})
    else:
        print_table([column.replace("_", " ") for column in _COLUMNS], [_row(event) for event in found])


def tail(
    invocation: Invocation,
    after: Annotated[str, typer.Option(metavar="CURSOR", help="Begin behind this cursor. Default: now.")] = "",
) -> None:
    """Follow the trail until Ctrl-C: one line for each event, each once, from about half a second after it was written.

    With --json one object a line, with the cursor that --after takes. A stream that ends in good order is opened again.
    """
    with invocation.client() as client:
        for answer in client.followed(after):
            for event in map(_fields, answer.events):
                if invocation.as_json:
                    print(json_text({**event, "cursor": answer.cursor}), flush=True)
                else:
                    print("  ".join(_row(event)), flush=True)


def register(app: typer.Typer) -> typer.Typer:
    """Add these commands to *app*, and return their group."""
    audit = group(app, "audit", "The trail: read it, and prove that nobody changed it.")
    command(
        audit,
        "search",
        "kms audit search --severity high",
        "kms audit search --resource 0b6f2c1e-8d2a-4f5b-9c3d-7e1f2a3b4c5d --since 2026-01-01 --json",
        "kms audit search --type request.refused --limit 0 | cut -f 6 | sort | uniq -c",
    )(search)
    command(audit, "tail", "kms audit tail", "kms audit tail --json | jq -r .action")(tail)
    return audit


def _fields(event: "audit_pb2.Event") -> dict[str, Any]:
    """Return *event* as `--json` shows it. What it does not have is absent."""
    from kms.cli.words import word
    from kms.rpc import enums

    details = json.loads(event.details_json or "{}")
    fields = {
        "id": event.id,
        "created_at": event.created_at.ToJsonString(),
        "event_type": event.event_type,
        "severity": word(enums.SEVERITIES, event.severity),
        "outcome": word(enums.OUTCOMES, event.outcome),
        "user_id": event.user_id,
        "peer": event.peer,
        "resource_type": event.resource_type,
        "resource_id": event.resource_id,
        "action": event.action,
        "risk_score": event.risk_score,
        "details": details,
    }
    return {name: value for name, value in fields.items() if value != ""}


def _row(event: dict[str, Any]) -> list[str]:
    shown = {**event, "request_id": event["details"].get("request_id", "")}
    # What a caller chose must not end the line or steer the terminal.
    return [escaped(str(shown.get(column, ""))) for column in _COLUMNS]
