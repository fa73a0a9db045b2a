"""`kms acme`: accounts for ACME clients, such as certbot."""

import base64
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from kms.cli.invocation import Invocation, command, group
from kms.cli.output import print_fields, print_json, print_table

if TYPE_CHECKING:
    from kms.v1 import acme_pb2

_PAGE: Final = 200
_COLUMNS: Final = ("created_at", "authority", "status", "contacts", "id")


def create(
    invocation: Invocation,
    authority: Annotated[str, typer.Argument(metavar="AUTHORITY", help="The name of an authority.", show_default=False)],
) -> None:
    """Make an account for one client, which issues server certificates from an authority as you may.

    Hand the client the directory, the key id and the secret within 7 days. The secret is shown once.
    """
    with invocation.client() as client:
        from kms.v1 import acme_pb2

        made = client.call(client.acme.CreateAcmeAccount, acme_pb2.CreateAcmeAccountRequest(authority=authority))
    secret = base64.urlsafe_b64encode(made.secret).rstrip(b"=").decode()
    fields = {"directory": made.directory_url, "key_id": made.account.id, "secret": secret}
    fields["bind_before"] = made.account.bind_before.ToJsonString()
    _print(invocation, {name: value for name, value in fields.items() if value})


def list_accounts(
    invocation: Invocation, limit: Annotated[int, typer.Option(min=0, help="At most so many; 0: all.")] = 0
) -> None:
    """List your accounts, the newest first.

    Into a pipe: when, authority, status, contacts and id, with tabs between.
    """
    with invocation.client() as client:
        from kms.v1 import acme_pb2

        request = acme_pb2.ListAcmeAccountsRequest(page_size=min(limit or _PAGE, _PAGE))
        found = [_fields(account) for account in client.pages(client.acme.ListAcmeAccounts, request, "accounts", limit)]
    if invocation.as_json:
        print_json({"accounts": found})
    else:
        rows = [{**account, "contacts": " ".join(account.get("contacts", ()))} for account in found]
        print_table(_COLUMNS, [[str(row.get(column, "")) for column in _COLUMNS] for row in rows])


def deactivate(
    invocation: Invocation,
    account: Annotated[str, typer.Argument(metavar="ACCOUNT", help="An account's id.", show_default=False)],
) -> None:
    """End an account for good. Its client gets nothing more; the certificates that it has stay valid."""
    with invocation.client() as client:
        from kms.v1 import acme_pb2

        request = acme_pb2.DeactivateAcmeAccountRequest(account_id=account)
        _print(invocation, _fields(client.call(client.acme.DeactivateAcmeAccount, request).account))


def register(app: typer.Typer) -> None:
    """Add the group `kms acme` to *app*."""
    found = group(app, "acme", "Let ACME clients such as certbot get server certificates.")
    command(found, "create", "kms acme create web", "kms acme create web --json | jq -r .secret")(create)
    command(found, "list", "kms acme list", "kms acme list --json | jq -r '.accounts[].id'")(list_accounts)
    command(found, "deactivate", "kms acme deactivate 3b3c7a53-8d2c-4d4c-9a4e-0c8f2d1a6b57")(deactivate)


def _fields(account: "acme_pb2.AcmeAccount") -> dict[str, Any]:
    from kms.v1 import acme_pb2

    status = acme_pb2.AcmeAccountStatus.Name(account.status).removeprefix("ACME_ACCOUNT_STATUS_").lower()
    fields = {
        "id": account.id,
        "authority": account.authority,
        "status": status,
        "contacts": list(account.contacts),
        "thumbprint": account.thumbprint,
        "created_at": account.created_at.ToJsonString(),
        "bind_before": account.bind_before.ToJsonString() if status == "pending" else "",
    }
    return {name: value for name, value in fields.items() if value}


def _print(invocation: Invocation, fields: dict[str, Any]) -> None:
    if invocation.as_json:
        print_json(fields)
    else:
        print_fields({name: " ".join(value) if isinstance(value, list) else value for name, value in fields.items()})
