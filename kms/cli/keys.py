"""`kms key`: making keys and looking at them."""

import sys
from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from kms.cli.invocation import Invocation, command, group
from kms.cli.moments import MOMENTS, ExpiresOption, LimitOption, stamp
from kms.cli.options import KeyArgument, OutOption
from kms.cli.output import STDOUT, Encoding, json_bytes, print_fields, print_json, print_table, write_bytes
from kms.domain.algorithms import KeyType, Purpose
from kms.domain.keys import Custody
from kms.domain.lifecycle import State

if TYPE_CHECKING:
    from kms.v1 import keys_pb2

_PAGE: Final = 200
_COLUMNS: Final = ("name", "type", "size_bits", "purpose", "state", "custody", "id")


class KeyForm(StrEnum):
    """How a public key is written: SubjectPublicKeyInfo (RFC 5280) in PEM or in DER."""

    PEM = "pem"
    DER = "der"


def create(
    invocation: Invocation,
    name: Annotated[str, typer.Argument(metavar="NAME", help="1 to 90 of A-Z a-z 0-9 . _ / -", show_default=False)],
    key_type: Annotated[KeyType, typer.Option("--type", help="What kind of key.")],
    purpose: Annotated[Purpose | None, typer.Option(help="Default: encryption for aes, else signing.")] = None,
    size_bits: Annotated[
        int | None, typer.Option("--size", metavar="BITS", min=0, max=65536, help="rsa: 2048, 3072, 4096; aes: 128, 192, 256.")
    ] = None,
    custody_min: Annotated[Custody | None, typer.Option(case_sensitive=False, help="Refuse any weaker custody.")] = None,
    metadata: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="May be repeated.")] = None,
    limit: LimitOption = None,
    expires: ExpiresOption = None,
    activates: Annotated[datetime | None, typer.Option(formats=MOMENTS, help="Pre-active until then. Default: at once.")] = None,
) -> None:
    """Make a key in the HSM."""
    entries = parse_metadata(metadata or [])
    with invocation.client() as client:
        from kms.cli.words import number
        from kms.rpc import enums
        from kms.v1 import keys_pb2

        request = keys_pb2.CreateKeyRequest(
            name=name,
            type=number(enums.KEY_TYPES, key_type),
            purpose=number(enums.PURPOSES, purpose or _usual_purpose(key_type)),
            size_bits=size_bits or 0,
            custody_min=number(enums.CUSTODIES, custody_min),
            metadata=entries,
            max_usage_count=limit,
            expires_at=stamp(expires),
            activated_at=stamp(activates),
        )
        show_key(invocation, client.call(client.keys.CreateKey, request).key)


def list_keys(
    invocation: Invocation,
    key_type: Annotated[KeyType | None, typer.Option("--type", help="Only keys of this type.")] = None,
    purpose: Annotated[Purpose | None, typer.Option(help="Only keys of this purpose.")] = None,
    state: Annotated[State | None, typer.Option(help="Only keys in this state.")] = None,
    prefix: Annotated[str, typer.Option(help="Only keys whose name begins so.")] = "",
    lineage: Annotated[str, typer.Option(metavar="KEY", help="Only this key, its predecessors and successors.")] = "",
    limit: Annotated[int, typer.Option(min=0, help="At most so many; 0: all.")] = 0,
) -> None:
    """List your keys in the order of their names.

    Into a pipe: name, type, size in bits, purpose, state, custody and id, with tabs between.
    """
    with invocation.client() as client:
        from kms.cli.words import key_fields, number
        from kms.rpc import enums
        from kms.v1 import keys_pb2

        request = keys_pb2.ListKeysRequest(
            page_size=min(limit or _PAGE, _PAGE),
            type=number(enums.KEY_TYPES, key_type),
            purpose=number(enums.PURPOSES, purpose),
            state=number(enums.STATES, state),
            name_prefix=prefix,
            lineage=lineage,
        )
        found = [key_fields(key) for key in client.pages(client.keys.ListKeys, request, "keys", limit)]
    if invocation.as_json:
        print_json({"keys": found})
    else:
        print_table(_COLUMNS, [[str(key[column]) for column in _COLUMNS] for key in found])


def show(invocation: Invocation, key: KeyArgument) -> None:
    """Show what is known of a key, in any state."""
    with invocation.client() as client:
        from kms.v1 import keys_pb2

        show_key(invocation, client.call(client.keys.GetKey, keys_pb2.GetKeyRequest(key=key)).key)


def public(
    invocation: Invocation,
    key: KeyArgument,
    form: Annotated[KeyForm, typer.Option("--format", help="How it is written.")] = KeyForm.PEM,
    out: OutOption = None,
) -> None:
    """Write the public half of a key."""
    with invocation.client() as client:
        from kms.v1 import keys_pb2

        found = client.call(client.keys.GetPublicKey, keys_pb2.GetPublicKeyRequest(key=key))
    pem = found.public_key_pem.encode()
    if not invocation.as_json and form is KeyForm.PEM and out in (None, STDOUT) and sys.stdout.isatty():
        print(found.public_key_pem, end="")
        return
    if not invocation.as_json:
        write_bytes(pem if form is KeyForm.PEM else found.public_key_der, out, Encoding.RAW if form is KeyForm.PEM else None)
        return
    print_json({"key_id": found.key_id, **_public_key_fields(pem, found.public_key_der, form, out)})


def register(app: typer.Typer) -> typer.Typer:
    """Add these commands to *app*, and return their group."""
    keys = group(app, "key", "Make keys, look at them, and move them between states.")
    command(
        keys,
        "create",
        "kms key create payments --type secp256k1",
        "kms key create invoices --type rsa --size 4096 --metadata team=billing",
        "kms key create backups --type aes --custody-min wrapped --json",
        "kms key create vouchers --type ed25519 --limit 1000 --expires 2027-01-01",
    )(create)
    command(
        keys,
        "list",
        "kms key list",
        "kms key list --type rsa --json",
        "kms key list --prefix pay | cut -f 1",
        "kms key list --lineage payments",
    )(list_keys)
    command(keys, "show", "kms key show payments", "kms key show payments --json | jq -r .custody")(show)
    command(keys, "public", "kms key public payments", "kms key public payments --format der --out payments.der")(public)
    return keys


def _usual_purpose(key_type: KeyType) -> Purpose:
    return Purpose.ENCRYPTION if key_type is KeyType.AES else Purpose.SIGNING


def parse_metadata(entries: list[str]) -> dict[str, str]:
    """Return NAME=VALUE arguments as a dictionary. Raises BadParameter."""
    parted = [entry.partition("=") for entry in entries]
    if any(not name or not equals for name, equals, _ in parted):
        raise typer.BadParameter("--metadata: expected NAME=VALUE")
    if len({name for name, _, _ in parted}) != len(parted):
        raise typer.BadParameter("--metadata: a name is given twice")
    return {name: value for name, _, value in parted}


def show_key(invocation: Invocation, key: "keys_pb2.Key") -> None:
    """Print a key."""
    from kms.cli.words import key_fields

    fields = key_fields(key)
    if invocation.as_json:
        print_json(fields)
        return
    pem = str(fields.pop("public_key_pem", ""))
    shown = {**fields, "metadata": _pairs(key.metadata), "rotation_policy": _pairs(fields.get("rotation_policy", {}))}
    print_fields({name.replace("_", " "): value for name, value in shown.items() if value != ""})
    if pem:
        print(pem, end="")


def _pairs(fields: Mapping[str, object]) -> str:
    return " ".join(f"{name}={value}" for name, value in sorted(fields.items()))


def _public_key_fields(pem: bytes, der: bytes, form: KeyForm, out: Path | None) -> dict[str, Any]:
    if form is KeyForm.PEM and out is None:
        return {"public_key_pem": pem.decode()}
    return json_bytes(f"public_key_{form}", pem if form is KeyForm.PEM else der, None, out)
