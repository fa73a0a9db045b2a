"""`kms ca`: making certificate authorities, and changing them."""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from kms.cli import pem
from kms.cli.inputs import STDIN, read_file
from kms.cli.invocation import Invocation, command, group
from kms.cli.moments import ValidityOption, duration
from kms.cli.options import OutOption
from kms.cli.output import print_fields, print_json, print_table
from kms.domain.keys import Custody

if TYPE_CHECKING:
    from kms.v1 import certificates_pb2

_PAGE: Final = 200
_COLUMNS: Final = ("name", "generation", "status", "not_after", "subject", "id")
_FILE_BYTES_MAX: Final = 1_048_576
AuthorityArgument = Annotated[
    str, typer.Argument(metavar="AUTHORITY", help="NAME, NAME/GENERATION or an authority's id.", show_default=False)
]
FormOption = Annotated[pem.Form, typer.Option("--format", help="How it is written.")]


class AuthorityKeyType(StrEnum):
    """The types of keys that authorities have."""

    SECP256R1 = "secp256r1"
    RSA = "rsa"
    ED25519 = "ed25519"
    SECP256K1 = "secp256k1"


def create(
    invocation: Invocation,
    name: Annotated[str, typer.Argument(metavar="NAME", help="1 to 63 of a-z 0-9 -", show_default=False)],
    subject: Annotated[str, typer.Option(metavar="DN", help="RFC 4514: CN=Example Root,O=Example.", show_default=False)],
    key_type: Annotated[AuthorityKeyType, typer.Option("--type", help="What kind of key.")] = AuthorityKeyType.SECP256R1,
    size_bits: Annotated[
        int | None, typer.Option("--size", metavar="BITS", min=0, max=65536, help="rsa: 2048, 3072, 4096.")
    ] = None,
    custody_min: Annotated[
        Custody | None, typer.Option(case_sensitive=False, help="Refuse any weaker custody. Default for a root: resident.")
    ] = None,
    parent: Annotated[str, typer.Option(metavar="AUTHORITY", help="Make an intermediate of it.", show_default=False)] = "",
    external: Annotated[bool, typer.Option("--external", help="Another authority signs it: write the request.")] = False,
    validity: ValidityOption = None,
    path_length: Annotated[
        int | None, typer.Option(min=0, max=16, help="How many authorities may stand below it.", show_default=False)
    ] = None,
    permit: Annotated[
        list[str] | None, typer.Option(metavar="KIND:NAME", help="It may certify only these: dns:example.com. May be repeated.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(metavar="KIND:NAME", help="It may not certify these.")] = None,
    base_url: Annotated[
        str, typer.Option(metavar="URL", help="Where its certificate, CRLs and OCSP answers are published.", show_default=False)
    ] = "",
    crl_shards: Annotated[int, typer.Option(min=0, max=65536, help="Into how many CRLs to split; 0: one.")] = 0,
    out: OutOption = None,
) -> None:
    """Make an authority, and its key in the HSM. You manage it, and issue nothing from it: see kms ca allow.

    With --external the request is written: another authority signs it, and kms ca import brings the certificate back.
    """
    with invocation.client() as client:
        from kms.cli.words import number
        from kms.domain.algorithms import KeyType
        from kms.rpc import enums
        from kms.v1 import certificates_pb2

        request = certificates_pb2.CreateCertificateAuthorityRequest(
            name=name,
            subject=subject,
            key_type=number(enums.KEY_TYPES, KeyType(key_type)),
            size_bits=size_bits or 0,
            custody_min=number(enums.CUSTODIES, custody_min),
            parent=parent,
            external=external,
            validity=duration(validity),
            path_length=path_length,
            permitted=permit or [],
            excluded=exclude or [],
            base_url=base_url,
            crl_shards=crl_shards,
        )
        made = client.call(client.certificates.CreateCertificateAuthority, request)
    _show_made(invocation, made.authority, made.csr, out)


def list_authorities(
    invocation: Invocation, limit: Annotated[int, typer.Option(min=0, help="At most so many names; 0: all.")] = 0
) -> None:
    """List all authorities in the order of their names, the newest generation of each first.

    Into a pipe: name, generation, status, end, subject and id, with tabs between.
    """
    with invocation.client() as client:
        from kms.v1 import certificates_pb2

        request = certificates_pb2.ListCertificateAuthoritiesRequest(page_size=min(limit or _PAGE, _PAGE))
        pages = client.whole_pages(client.certificates.ListCertificateAuthorities, request)
        found = [fields_of(authority) for page in pages for authority in page.authorities]
    if limit:
        names = list(dict.fromkeys(each["name"] for each in found))[:limit]
        found = [each for each in found if each["name"] in names]
    if invocation.as_json:
        print_json({"authorities": found})
    else:
        print_table(_COLUMNS, [[str(each.get(column, "")) for column in _COLUMNS] for each in found])


def show(invocation: Invocation, authority: AuthorityArgument) -> None:
    """Show what is known of an authority. Its manager sees who issues from it."""
    _show(invocation, _get(invocation, authority))


def export(
    invocation: Invocation,
    authority: AuthorityArgument,
    chain: Annotated[bool, typer.Option("--chain", help="Also the certificates above it.")] = False,
    cross: Annotated[bool, typer.Option("--cross", help="Also those that other generations made of it.")] = False,
    form: FormOption = pem.Form.PEM,
    out: OutOption = None,
) -> None:
    """Write the certificate of an authority, for those who are to trust it."""
    found = _get(invocation, authority)
    if not found.certificate:
        raise typer.BadParameter("the authority waits for its certificate: see kms ca import")
    if form is pem.Form.DER and (chain or cross):
        raise typer.BadParameter("--format der holds one certificate")
    ders = [found.certificate, *(found.chain if chain else ()), *(found.cross_certificates if cross else ())]
    if invocation.as_json:
        print_json({"certificates": [pem.pem(pem.CERTIFICATE, der) for der in ders]})
    else:
        pem.write(pem.CERTIFICATE, ders, form, out)


def import_certificate(
    invocation: Invocation,
    authority: AuthorityArgument,
    file: Annotated[Path | None, typer.Option("--in", metavar="FILE", help="PEM: its certificate, then those above it.")] = None,
) -> None:
    """Give an authority that is pending the certificate that another authority made of its request."""
    with invocation.client() as client:
        from kms.v1 import certificates_pb2

        data = read_file(file or STDIN, bytes_max=_FILE_BYTES_MAX)
        request = certificates_pb2.ImportAuthorityCertificateRequest(authority=authority, certificates=data)
        _show(invocation, client.call(client.certificates.ImportAuthorityCertificate, request).authority)


def rotate(invocation: Invocation, authority: AuthorityArgument, validity: ValidityOption = None, out: OutOption = None) -> None:
    """Make the next generation of an authority, with a key of its own. The one before issues nothing more.

    Generations of a root certify each other: see kms ca export --cross. For an authority that another signs, the request is
    written.
    """
    with invocation.client() as client:
        from kms.v1 import certificates_pb2

        request = certificates_pb2.RotateCertificateAuthorityRequest(authority=authority, validity=duration(validity))
        made = client.call(client.certificates.RotateCertificateAuthority, request)
    _show_made(invocation, made.authority, made.csr, out)


def allow(
    invocation: Invocation,
    authority: AuthorityArgument,
    user: Annotated[str, typer.Argument(metavar="USER", help="A user's id; self: each user, for himself.", show_default=False)],
    profile: Annotated[list[str], typer.Argument(metavar="PROFILE…", help="server, client, …", show_default=False)],
    revoke: Annotated[bool, typer.Option("--revoke", help="Let them no more.")] = False,
) -> None:
    """Let a user issue certificates of profiles from an authority of yours, or let them no more.

    The user also takes the role certificate-issuer. For USER self the profile is client: each user gets certificates that name
    them.
    """
    with invocation.client() as client:
        from kms.v1 import certificates_pb2

        request = certificates_pb2.UpdateCertificateAuthorityRequest(authority=authority)
        if user == "self":
            before = client.call(
                client.certificates.GetCertificateAuthority, certificates_pb2.GetCertificateAuthorityRequest(authority=authority)
            ).authority
            kept = [each for each in before.self_service if each not in profile]
            request.self_service.extend(kept if revoke else [*kept, *profile])
            request.set_self_service, request.version = True, before.version
        else:
            grants = [certificates_pb2.IssuerGrant(user_id=user, profile=each) for each in profile]
            (request.disallow if revoke else request.allow).extend(grants)
        _show(invocation, client.call(client.certificates.UpdateCertificateAuthority, request).authority)


def disable(invocation: Invocation, authority: AuthorityArgument) -> None:
    """Let an authority issue nothing more, for good. Its CRLs and OCSP answers are signed until its certificate ends."""
    with invocation.client() as client:
        from kms.v1 import certificates_pb2

        request = certificates_pb2.UpdateCertificateAuthorityRequest(authority=authority, disable=True)
        _show(invocation, client.call(client.certificates.UpdateCertificateAuthority, request).authority)


def hand_over(
    invocation: Invocation,
    authority: AuthorityArgument,
    user: Annotated[str, typer.Argument(metavar="USER", help="The id of the next manager.", show_default=False)],
) -> None:
    """Give an authority of yours to another manager, who must not be one of its issuers."""
    with invocation.client() as client:
        from kms.v1 import certificates_pb2

        request = certificates_pb2.UpdateCertificateAuthorityRequest(authority=authority, manager_id=user)
        _show(invocation, client.call(client.certificates.UpdateCertificateAuthority, request).authority)


def register(app: typer.Typer) -> None:
    """Add the group `kms ca` to *app*."""
    found = group(app, "ca", "Make certificate authorities, and change them.")
    command(
        found,
        "create",
        "kms ca create root --subject 'CN=Example Root,O=Example'",
        "kms ca create web --subject 'CN=Example Web' --parent root --permit dns:example.com",
        "kms ca create site --subject 'CN=Example Site' --external --out site.csr",
    )(create)
    command(found, "list", "kms ca list", "kms ca list --json | jq -r '.authorities[].name'")(list_authorities)
    command(found, "show", "kms ca show root", "kms ca show root/1 --json")(show)
    command(found, "export", "kms ca export root --out root.pem", "kms ca export web --chain")(export)
    command(found, "import", "kms ca import site/1 --in chain.pem")(import_certificate)
    command(found, "rotate", "kms ca rotate root")(rotate)
    command(
        found,
        "allow",
        "kms ca allow web 3b3c7a53-8d2c-4d4c-9a4e-0c8f2d1a6b57 server client",
        "kms ca allow web self client",
        "kms ca allow web 3b3c7a53-8d2c-4d4c-9a4e-0c8f2d1a6b57 server --revoke",
    )(allow)
    command(found, "disable", "kms ca disable web/1")(disable)
    command(found, "hand-over", "kms ca hand-over web 3b3c7a53-8d2c-4d4c-9a4e-0c8f2d1a6b57")(hand_over)


def fields_of(authority: "certificates_pb2.CertificateAuthority") -> dict[str, Any]:
    """Return an authority as `--json` shows it. What it does not have is absent."""
    from kms.v1 import certificates_pb2

    fields: dict[str, Any] = {
        "id": authority.id,
        "name": authority.name,
        "generation": authority.generation,
        "status": certificates_pb2.AuthorityStatus.Name(authority.status).removeprefix("AUTHORITY_STATUS_").lower(),
        "subject": authority.subject,
        "manager_id": authority.manager_id,
        "parent_id": authority.parent_id,
        "issuers": [{"user_id": grant.user_id, "profile": grant.profile} for grant in authority.issuers],
        "self_service": list(authority.self_service),
        "base_url": authority.base_url,
        "crl_shards": authority.crl_shards,
        "created_at": authority.created_at.ToJsonString(),
        "not_after": authority.not_after.ToJsonString() if authority.HasField("not_after") else "",
        "superseded_at": authority.superseded_at.ToJsonString() if authority.HasField("superseded_at") else "",
        "version": authority.version,
    }
    return {name: value for name, value in fields.items() if value not in ("", [])}


def _get(invocation: Invocation, authority: str) -> "certificates_pb2.CertificateAuthority":
    with invocation.client() as client:
        from kms.v1 import certificates_pb2

        request = certificates_pb2.GetCertificateAuthorityRequest(authority=authority)
        return client.call(client.certificates.GetCertificateAuthority, request).authority


def _show_made(invocation: Invocation, authority: "certificates_pb2.CertificateAuthority", csr: bytes, out: Path | None) -> None:
    """Show an authority that was made; of one that waits for its certificate, write the request."""
    if csr and not invocation.as_json:
        pem.write(pem.REQUEST, [csr], pem.Form.PEM, out)
        return
    if csr and out is not None:
        pem.write(pem.REQUEST, [csr], pem.Form.PEM, out)
    _show(invocation, authority, csr)


def _show(invocation: Invocation, authority: "certificates_pb2.CertificateAuthority", csr: bytes = b"") -> None:
    fields = fields_of(authority)
    if invocation.as_json:
        print_json({**fields, **({"csr": pem.pem(pem.REQUEST, csr)} if csr else {})})
        return
    fields["issuers"] = _words([f"{grant.user_id} {grant.profile}" for grant in authority.issuers])
    fields["self_service"] = _words(list(authority.self_service))
    print_fields({name.replace("_", " "): value for name, value in fields.items() if value != ""})


def _words(texts: Sequence[str]) -> str:
    return ", ".join(texts)
