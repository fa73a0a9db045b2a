"""`kms cert revoke` and `kms crl`: certificates that end before their time, and the lists of them."""

from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from kms.cli import pem
from kms.cli.authorities import AuthorityArgument, FormOption
from kms.cli.certificates import CertificateArgument, fields_of
from kms.cli.invocation import Invocation, command, group
from kms.cli.options import OutOption
from kms.cli.output import print_fields, print_json

if TYPE_CHECKING:
    from kms.v1 import certificates_pb2

_LABEL: Final = "X509 CRL"
_SHARDS_MAX: Final = 65_536
ShardOption = Annotated[int, typer.Option(min=0, max=_SHARDS_MAX, help="0: that of certificates without a shard.")]


class RevocationReason(Enum):
    """The reasons of RFC 5280 that are offered."""

    UNSPECIFIED = "unspecified"
    KEY_COMPROMISE = "key-compromise"
    CA_COMPROMISE = "ca-compromise"
    AFFILIATION_CHANGED = "affiliation-changed"
    SUPERSEDED = "superseded"
    CESSATION_OF_OPERATION = "cessation-of-operation"
    PRIVILEGE_WITHDRAWN = "privilege-withdrawn"
    AA_COMPROMISE = "aa-compromise"


def revoke(
    invocation: Invocation,
    certificate: CertificateArgument,
    reason: Annotated[
        RevocationReason, typer.Option(case_sensitive=False, help="Why, as the CRL says it.")
    ] = RevocationReason.UNSPECIFIED,
) -> None:
    """Revoke a certificate for good, and publish the CRL that lists it.

    Its owner may, who issues its profile, and the manager of its authority.
    """
    with invocation.client() as client:
        from kms.v1 import certificates_pb2

        number = certificates_pb2.RevocationReason.Value(f"REVOCATION_REASON_{reason.name}")
        asked = certificates_pb2.RevokeCertificateRequest(certificate_id=certificate, reason=number)
        fields = fields_of(client.call(client.certificates.RevokeCertificate, asked).certificate)
    if invocation.as_json:
        print_json(fields)
    else:
        shown = ("id", "serial_number", "status", "revoked_at", "revocation_reason")
        print_fields({name.replace("_", " "): fields[name] for name in shown})


def show(
    invocation: Invocation,
    authority: AuthorityArgument,
    shard: ShardOption = 0,
    form: FormOption = pem.Form.PEM,
    out: OutOption = None,
) -> None:
    """Show the newest CRL of an authority; with --out write it to a file."""
    with invocation.client() as client:
        from kms.v1 import certificates_pb2

        crl = client.call(client.certificates.GetCrl, certificates_pb2.GetCrlRequest(authority=authority, shard=shard)).crl
    if out is not None:
        pem.write(_LABEL, [crl.crl], form, out)
    if invocation.as_json:
        print_json({**_fields(crl), "crl_pem": pem.pem(_LABEL, crl.crl)})
    elif out is None:
        print_fields({name.replace("_", " "): str(value) for name, value in _fields(crl).items()})
        print(pem.pem(_LABEL, crl.crl), end="")


def publish(invocation: Invocation, authority: AuthorityArgument, shard: ShardOption = 0) -> None:
    """Sign a new CRL of an authority at once. Its manager may.

    The service does this by itself every day, and whenever something is revoked.
    """
    with invocation.client() as client:
        from kms.v1 import certificates_pb2

        asked = certificates_pb2.PublishCrlRequest(authority=authority, shard=shard)
        made = _fields(client.call(client.certificates.PublishCrl, asked).crl)
    if invocation.as_json:
        print_json(made)
    else:
        print_fields({name.replace("_", " "): str(value) for name, value in made.items()})


def register(app: typer.Typer, certificates: typer.Typer) -> None:
    """Add `revoke` to the group *certificates*, and the group `kms crl` to *app*."""
    command(certificates, "revoke", "kms cert revoke 3b3c7a53-8d2c-4d4c-9a4e-0c8f2d1a6b57 --reason key-compromise")(revoke)
    found = group(app, "crl", "Lists of revoked certificates.")
    command(found, "show", "kms crl show web", "kms crl show web --format der --out web.crl")(show)
    command(found, "publish", "kms crl publish web")(publish)


def _fields(crl: "certificates_pb2.Crl") -> dict[str, Any]:
    return {
        "authority_id": crl.authority_id,
        "shard": crl.shard,
        "number": crl.number,
        "this_update": crl.this_update.ToJsonString(),
        "next_update": crl.next_update.ToJsonString(),
    }
