"""`kms key activate`, `deactivate`, `reactivate`, `revoke`, `compromise`, `destroy`, `cancel-destruction`, `update`."""

from datetime import datetime
from typing import Annotated, Any

import typer

from kms.cli.invocation import Invocation, command
from kms.cli.keys import parse_metadata, show_key
from kms.cli.moments import MOMENTS, ExpiresOption, LimitOption, stamp
from kms.cli.options import KeyArgument
from kms.domain.fields import NUMBER_MAX

VersionOption = Annotated[
    int,
    typer.Option(
        "--version", min=0, max=NUMBER_MAX, help="Refuse (STALE) if the key is at another version; 0: any.", show_default=False
    ),
]
ReasonOption = Annotated[str, typer.Option("--reason", help="Why: 1 to 200 characters, kept in the trail.", show_default=False)]


def activate(invocation: Invocation, key: KeyArgument, version: VersionOption = 0) -> None:
    """Make a pre-active key active now."""
    _move(invocation, "ActivateKey", key=key, version=version)


def deactivate(invocation: Invocation, key: KeyArgument, version: VersionOption = 0) -> None:
    """Make an active key inactive: it decrypts, and protects nothing new."""
    _move(invocation, "DeactivateKey", key=key, version=version)


def reactivate(invocation: Invocation, key: KeyArgument, version: VersionOption = 0) -> None:
    """Make an inactive key active again."""
    _move(invocation, "ReactivateKey", key=key, version=version)


def revoke(invocation: Invocation, key: KeyArgument, reason: ReasonOption, version: VersionOption = 0) -> None:
    """Revoke a key, for good. No use that begins after this has returned succeeds, but `kms decrypt --allow-revoked`."""
    _move(invocation, "RevokeKey", key=key, version=version, reason=reason)


def compromise(
    invocation: Invocation,
    key: KeyArgument,
    reason: ReasonOption,
    occurred: Annotated[datetime | None, typer.Option("--occurred", formats=MOMENTS, help="When it happened, if known.")] = None,
    version: VersionOption = 0,
) -> None:
    """Mark a key compromised: it protects no more, and decrypts only for `kms decrypt --allow-compromised`."""
    _move(invocation, "MarkKeyCompromised", key=key, version=version, reason=reason, occurred_at=stamp(occurred))


def destroy(
    invocation: Invocation,
    key: KeyArgument,
    days: Annotated[int, typer.Option("--days", min=7, max=90, help="When it falls due.")] = 30,
    version: VersionOption = 0,
) -> None:
    """Schedule the destruction of a key that is not active. Until it is due it can be cancelled."""
    _move(invocation, "ScheduleKeyDestruction", key=key, version=version, pending_days=days)


def cancel_destruction(invocation: Invocation, key: KeyArgument, version: VersionOption = 0) -> None:
    """Cancel a destruction that is not due yet."""
    _move(invocation, "CancelKeyDestruction", key=key, version=version)


def update(
    invocation: Invocation,
    key: KeyArgument,
    limit: LimitOption = None,
    expires: ExpiresOption = None,
    metadata: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="Replaces all of it. May be repeated.")] = None,
    version: VersionOption = 0,
) -> None:
    """Lower a key's limit, bring its expiry forward, or replace its metadata; never the reverse."""
    from kms.v1 import keys_pb2

    entries = None if metadata is None else keys_pb2.KeyMetadata(entries=parse_metadata(metadata))
    _move(invocation, "UpdateKey", key=key, version=version, max_usage_count=limit, expires_at=stamp(expires), metadata=entries)


def register(keys: typer.Typer) -> None:
    """Add these commands to *keys*, the group `kms key`."""
    command(keys, "activate", "kms key activate payments")(activate)
    command(keys, "deactivate", "kms key deactivate payments --version 3")(deactivate)
    command(keys, "reactivate", "kms key reactivate payments")(reactivate)
    command(keys, "revoke", "kms key revoke payments --reason 'left the company'")(revoke)
    command(keys, "compromise", "kms key compromise payments --reason 'laptop stolen' --occurred 2026-11-20")(compromise)
    command(keys, "destroy", "kms key destroy payments --days 7")(destroy)
    command(keys, "cancel-destruction", "kms key cancel-destruction payments")(cancel_destruction)
    command(keys, "update", "kms key update payments --limit 500 --expires 2027-01-01")(update)


def _move(invocation: Invocation, method: str, **fields: Any) -> None:  # noqa: ANN401 - the fields of the method's request
    with invocation.client() as client:
        from kms.v1 import keys_pb2

        request = getattr(keys_pb2, f"{method}Request")(**fields)
        show_key(invocation, client.call(getattr(client.keys, method), request).key)
