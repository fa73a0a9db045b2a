"""`kms cert`: certificates of the service's authorities, and of others for keys in the HSM."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from kms.cli import pem
from kms.cli.authorities import AuthorityArgument, FormOption
from kms.cli.inputs import STDIN, read_file
from kms.cli.invocation import Invocation, command, group
from kms.cli.moments import ValidityOption, duration
from kms.cli.options import KeyArgument, OutOption
from kms.cli.output import print_fields, print_json, print_table

if TYPE_CHECKING:
    from kms.v1 import certificates_pb2

_PAGE: Final = 200
_FILE_BYTES_MAX: Final = 262_144
_COLUMNS: Final = ("created_at", "status", "profile", "not_after", "serial_number", "subject", "names", "id")
CertificateArgument = Annotated[str, typer.Argument(metavar="CERTIFICATE", help="A certificate's id.", show_default=False)]
CsrOption = Annotated[
    Path | None, typer.Option("--csr", metavar="FILE", help="A request (PKCS#10) in PEM or DER; - for standard input.")
]
SubjectOption = Annotated[str, typer.Option(metavar="DN", help="RFC 4514: CN=www.example.com.", show_default=False)]
NamesOption = Annotated[
    list[str] | None,
    typer.Option("--name", metavar="KIND:NAME", help="dns:www.example.com, ip:…, uri:…, email:…. May be repeated."),
]
RequestIdOption = Annotated[
    str, typer.Option(metavar="ID", help="Makes the command repeatable: the same ID, the same certificate.", show_default=False)
]
ChainOption = Annotated[bool, typer.Option("--chain", help="Also the certificates of the authorities above.")]


def issue(
    invocation: Invocation,
    authority: AuthorityArgument,
    profile: Annotated[str, typer.Option(help="server, client, code-signing, …", show_default=False)],
    csr: CsrOption = None,
    key: Annotated[str, typer.Option(metavar="KEY", help="A signing key of yours instead.", show_default=False)] = "",
    subject: SubjectOption = "",
    names: NamesOption = None,
    user: Annotated[
        str, typer.Option(metavar="USER", help="The id of the user for whom it is: it has their URI.", show_default=False)
    ] = "",
    validity: ValidityOption = None,
    request_id: RequestIdOption = "",
    chain: ChainOption = False,
    out: OutOption = None,
) -> None:
    """Issue a certificate for the key of a request, or for a key of yours in the HSM. The certificate is written in PEM.

    Subject and names are those of the request unless options give others.
    """
    if (csr is None) == (not key):
        raise typer.BadParameter("give one of --csr and --key")
    with invocation.client() as client:
        from kms.v1 import certificates_pb2

        request = certificates_pb2.IssueCertificateRequest(
            authority=authority,
            profile=profile,
            subject=subject,
            names=names or [],
            user_id=user,
            validity=duration(validity),
            request_id=request_id,
        )
        if csr is None:
            request.key = key
        else:
            request.csr = read_file(csr, bytes_max=_FILE_BYTES_MAX)
        issued = client.call(client.certificates.IssueCertificate, request)
    _write(invocation, issued.certificate, issued.chain if chain else (), out)


def request(
    invocation: Invocation,
    key: KeyArgument,
    subject: SubjectOption = "",
    names: NamesOption = None,
    form: FormOption = pem.Form.PEM,
    out: OutOption = None,
) -> None:
    """Write a request (PKCS#10) for a key of yours, signed by it, for an authority elsewhere."""
    with invocation.client() as client:
        from kms.v1 import certificates_pb2

        asked = certificates_pb2.CreateCertificateRequestRequest(key=key, subject=subject, names=names or [])
        csr = client.call(client.certificates.CreateCertificateRequest, asked).csr
    if invocation.as_json:
        print_json({"csr": pem.pem(pem.REQUEST, csr)})
    else:
        pem.write(pem.REQUEST, [csr], form, out)


def import_certificate(
    invocation: Invocation,
    key: KeyArgument,
    file: Annotated[Path | None, typer.Option("--in", metavar="FILE", help="The certificate, in PEM or DER.")] = None,
) -> None:
    """Store a certificate that an authority elsewhere issued for a key of yours."""
    with invocation.client() as client:
        from kms.v1 import certificates_pb2

        data = read_file(file or STDIN, bytes_max=_FILE_BYTES_MAX)
        asked = certificates_pb2.ImportCertificateRequest(key=key, certificate=data)
        _show(invocation, client.call(client.certificates.ImportCertificate, asked).certificate)


def list_certificates(
    invocation: Invocation,
    authority: Annotated[str, typer.Option(metavar="AUTHORITY", help="Only those that it issued.", show_default=False)] = "",
    key: Annotated[str, typer.Option(metavar="KEY", help="Only those of this key.", show_default=False)] = "",
    limit: Annotated[int, typer.Option(min=0, help="At most so many; 0: all.")] = 0,
) -> None:
    """List your certificates, the newest first; with --authority all that it issued, for its manager and its issuers.

    Into a pipe: when, status, profile, end, serial number, subject, names and id, with tabs between.
    """
    with invocation.client() as client:
        from kms.v1 import certificates_pb2

        asked = certificates_pb2.ListCertificatesRequest(authority=authority, key=key, page_size=min(limit or _PAGE, _PAGE))
        found = [fields_of(each) for each in client.pages(client.certificates.ListCertificates, asked, "certificates", limit)]
    if invocation.as_json:
        print_json({"certificates": found})
    else:
        rows = [{**each, "names": " ".join(each.get("names", ()))} for each in found]
        print_table(_COLUMNS, [[str(row.get(column, "")) for column in _COLUMNS] for row in rows])


def show(
    invocation: Invocation,
    certificate: CertificateArgument,
    chain: ChainOption = False,
    form: FormOption = pem.Form.PEM,
    out: OutOption = None,
) -> None:
    """Show a certificate; with --out write it to a file."""
    with invocation.client() as client:
        from kms.v1 import certificates_pb2

        asked = certificates_pb2.GetCertificateRequest(certificate_id=certificate)
        found = client.call(client.certificates.GetCertificate, asked)
    if form is pem.Form.DER and chain:
        raise typer.BadParameter("--format der holds one certificate")
    ders = [found.certificate.certificate, *(found.chain if chain else ())]
    if out is not None and ders[0]:
        pem.write(pem.CERTIFICATE, ders, form, out)
    else:
        _show(invocation, found.certificate, *ders[1:])


def renew(
    invocation: Invocation,
    certificate: CertificateArgument,
    csr: CsrOption = None,
    validity: ValidityOption = None,
    request_id: RequestIdOption = "",
    chain: ChainOption = False,
    out: OutOption = None,
) -> None:
    """Issue a certificate that says what another says. The other is superseded, and stays valid until it ends.

    Its key is that of --csr, or the key of yours that has the name of the other's key, or the same key.
    """
    with invocation.client() as client:
        from kms.v1 import certificates_pb2

        asked = certificates_pb2.RenewCertificateRequest(
            certificate_id=certificate,
            csr=b"" if csr is None else read_file(csr, bytes_max=_FILE_BYTES_MAX),
            validity=duration(validity),
            request_id=request_id,
        )
        issued = client.call(client.certificates.RenewCertificate, asked)
    _write(invocation, issued.certificate, issued.chain if chain else (), out)


def register(app: typer.Typer) -> typer.Typer:
    """Add the group `kms cert` to *app*, and return it."""
    found = group(app, "cert", "Issue certificates, and look at them.")
    command(
        found,
        "issue",
        "kms cert issue web --profile server --csr www.csr --out www.pem",
        "kms cert issue web --profile server --key tls --subject CN=www.example.com --name dns:www.example.com",
        "kms cert issue web --profile client --csr client.csr --user 3b3c7a53-8d2c-4d4c-9a4e-0c8f2d1a6b57",
    )(issue)
    command(found, "request", "kms cert request tls --subject CN=www.example.com --name dns:www.example.com --out tls.csr")(
        request
    )
    command(found, "import", "kms cert import tls --in tls.pem")(import_certificate)
    command(found, "list", "kms cert list", "kms cert list --authority web --json", "kms cert list --key tls")(list_certificates)
    command(
        found,
        "show",
        "kms cert show 3b3c7a53-8d2c-4d4c-9a4e-0c8f2d1a6b57",
        "kms cert show 3b3c7a53-8d2c-4d4c-9a4e-0c8f2d1a6b57 --chain --out www.pem",
    )(show)
    command(found, "renew", "kms cert renew 3b3c7a53-8d2c-4d4c-9a4e-0c8f2d1a6b57 --csr next.csr --out www.pem")(renew)
    return found


def fields_of(certificate: "certificates_pb2.Certificate") -> dict[str, Any]:
    """Return a certificate as `--json` shows it. What it does not have is absent."""
    from kms.v1 import certificates_pb2

    fields: dict[str, Any] = {
        "id": certificate.id,
        "authority_id": certificate.authority_id,
        "profile": certificate.profile,
        "status": certificates_pb2.CertificateStatus.Name(certificate.status).removeprefix("CERTIFICATE_STATUS_").lower(),
        "serial_number": certificate.serial_number,
        "subject": certificate.subject,
        "issuer": certificate.issuer,
        "names": list(certificate.names),
        "not_before": certificate.not_before.ToJsonString(),
        "not_after": certificate.not_after.ToJsonString(),
        "owner_id": certificate.owner_id,
        "key_id": certificate.key_id,
        "requested_by": certificate.requested_by,
        "fingerprint": certificate.fingerprint,
        "created_at": certificate.created_at.ToJsonString(),
        "superseded_at": certificate.superseded_at.ToJsonString() if certificate.HasField("superseded_at") else "",
        "replaces": certificate.replaces,
    }
    if certificate.HasField("revoked_at"):
        reason = certificates_pb2.RevocationReason.Name(certificate.revocation_reason)
        fields["revoked_at"] = certificate.revoked_at.ToJsonString()
        fields["revocation_reason"] = reason.removeprefix("REVOCATION_REASON_").lower()
    return {name: value for name, value in fields.items() if value not in ("", [])}


def _write(invocation: Invocation, certificate: "certificates_pb2.Certificate", chain: Sequence[bytes], out: Path | None) -> None:
    """Write a certificate that was issued, and *chain* after it; with --json show it."""
    ders = [certificate.certificate, *chain]
    if not invocation.as_json:
        pem.write(pem.CERTIFICATE, ders, pem.Form.PEM, out)
        return
    if out is not None:
        pem.write(pem.CERTIFICATE, ders, pem.Form.PEM, out)
    _show(invocation, certificate, *chain)


def _show(invocation: Invocation, certificate: "certificates_pb2.Certificate", *chain: bytes) -> None:
    fields = fields_of(certificate)
    text = pem.pem(pem.CERTIFICATE, certificate.certificate, *chain) if certificate.certificate else ""
    if invocation.as_json:
        print_json({**fields, "certificate_pem": text})
        return
    print_fields(
        {name.replace("_", " "): " ".join(value) if isinstance(value, list) else value for name, value in fields.items()}
    )
    print(text, end="")
