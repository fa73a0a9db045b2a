"""Authorities and certificates through gRPC, verified by what did not make them."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf.duration_pb2 import Duration

from kms.domain.ids import UserId, identity_uri
from kms.v1 import certificates_pb2 as pb
from kms.v1 import crypto_pb2 as cpb
from kms.v1 import keys_pb2 as kpb
from tests.conformance.certificates import (
    Platform,
    allow,
    create,
    csr,
    issue_from,
    issuer_of,
    manager_and_issuer_of,
    manager_of,
    new_name,
    pem,
    platform,
    refused,
    signed_elsewhere,
    verified,
)
from tests.conformance.requests import made
from tests.fixtures.server import DEPLOYMENT, Caller, RunningServer

KEY_TYPES = {"secp256r1": kpb.KEY_TYPE_SECP256R1, "rsa": kpb.KEY_TYPE_RSA, "ed25519": kpb.KEY_TYPE_ED25519}
OK = "leaf.pem: OK"


@pytest.fixture(scope="module")
def shop(server: RunningServer) -> Platform:
    """A root whose issuer issues every profile."""
    return platform(server, base_url="http://pki.example.com")


def uri_of(user: UserId) -> str:
    return f"uri:{identity_uri(DEPLOYMENT, user)}"


def rows(server: RunningServer, query: str, *parameters: object) -> list[Any]:
    with psycopg.connect(server.deployment.database.admin_dsn) as connection:
        return connection.execute(query.encode(), parameters).fetchall()


@pytest.mark.parametrize("key_type", KEY_TYPES)
def test_authorities_of_each_key_type_issue_certificates_that_openssl_accepts(
    server: RunningServer, tmp_path: Path, key_type: str
) -> None:
    shop = platform(server, key_type=KEY_TYPES[key_type], base_url="http://pki.example.com")
    issued = shop.issue(subject="CN=www.example.com")
    assert issued.chain == [shop.authority.certificate]
    assert verified(tmp_path, issued.certificate.certificate, (shop.authority.certificate,)) == OK
    found = x509.load_der_x509_certificate(issued.certificate.certificate)
    assert f"{found.serial_number:x}" == issued.certificate.serial_number
    assert issued.certificate.status == pb.CERTIFICATE_STATUS_VALID


def test_an_intermediate_and_its_limits_hold_below_a_root(server: RunningServer, shop: Platform, tmp_path: Path) -> None:
    manager, issuer, name = manager_and_issuer_of(server), issuer_of(server), new_name("web")
    assert refused(create, manager, name, parent=shop.name) == "PERMISSION_DENIED", "nobody has let them"
    without_role = manager_of(server)
    allow(shop.manager, shop.name, (manager, "intermediate"), (without_role, "intermediate"))
    assert refused(create, without_role, name, parent=shop.name) == "PERMISSION_DENIED"
    made_ = create(manager, name, parent=shop.name, permitted=["dns:example.com"]).authority
    assert (made_.parent_id, list(made_.chain)) == (shop.authority.id, [shop.authority.certificate])
    allow(manager, name, (issuer, "server"))

    def issue(host: str) -> pb.IssueCertificateResponse:
        request = pb.IssueCertificateRequest(authority=name, profile="server", csr=csr(f"dns:{host}"))
        return issuer.certificates.IssueCertificate(request)

    issued = issue("www.example.com")
    roots, between = (shop.authority.certificate,), (made_.certificate,)
    assert list(issued.chain) == [made_.certificate, shop.authority.certificate]
    assert verified(tmp_path, issued.certificate.certificate, roots, between) == OK
    assert refused(issue, "www.example.net") == "CERTIFICATE_INVALID"
    listed = shop.manager.certificates.ListCertificates(pb.ListCertificatesRequest(authority=shop.name)).certificates
    [of_authority] = [each for each in listed if each.certificate == made_.certificate]
    revoke = pb.RevokeCertificateRequest(certificate_id=of_authority.id, reason=pb.REVOCATION_REASON_CA_COMPROMISE)
    shop.manager.certificates.RevokeCertificate(revoke)
    assert refused(issue, "www.example.com") == "AUTHORITY_INACTIVE", "a revoked authority issues nothing"


def test_an_intermediate_of_an_external_root_takes_its_certificate_and_no_other(server: RunningServer, tmp_path: Path) -> None:
    manager, issuer, name = manager_of(server), issuer_of(server), new_name("external")
    pending = create(manager, name, external=True)
    assert pending.authority.status == pb.AUTHORITY_STATUS_PENDING
    root_key = ec.generate_private_key(ec.SECP256R1())
    other, root = signed_elsewhere(csr(subject=name), root_key)
    again = manager.certificates.CreateCertificateRequest(pb.CreateCertificateRequestRequest(authority=f"{name}/1")).csr
    mine, root = signed_elsewhere(again, root_key)

    def bring(*ders: bytes) -> pb.CertificateAuthority:
        request = pb.ImportAuthorityCertificateRequest(authority=f"{name}/1", certificates=pem(*ders))
        return manager.certificates.ImportAuthorityCertificate(request).authority

    for chain in ((other, root), (mine,), (root,), (mine, other)):
        assert refused(bring, *chain) == "CERTIFICATE_INVALID"
    assert refused(lambda: issue_from(issuer, name)) == "AUTHORITY_INACTIVE"
    active = bring(mine, root)
    assert active.status == pb.AUTHORITY_STATUS_ACTIVE
    assert refused(bring, mine, root) == "AUTHORITY_INACTIVE", "it has one"
    allow(manager, name, (issuer, "server"))
    issued = issue_from(issuer, name)
    assert verified(tmp_path, issued.certificate.certificate, (root,), (mine,)) == OK


def test_each_generation_of_a_root_is_trusted_by_who_trusts_the_other(server: RunningServer, tmp_path: Path) -> None:
    shop = platform(server, path_length=0)
    before = shop.issue().certificate.certificate
    rotated = shop.manager.certificates.RotateCertificateAuthority(pb.RotateCertificateAuthorityRequest(authority=shop.name))
    new = rotated.authority
    assert (new.generation, new.status) == (2, pb.AUTHORITY_STATUS_ACTIVE)
    old = get(shop.manager, f"{shop.name}/1")
    assert old.status == pb.AUTHORITY_STATUS_SUPERSEDED
    after = shop.issue()
    assert list(after.chain) == [new.certificate], "who issued from one generation issues from the next"
    roots = {"old": old, "new": new}
    for leaf, trusted in itertools.product((before, after.certificate.certificate), roots.values()):
        crossed = (*old.cross_certificates, *new.cross_certificates)
        assert verified(tmp_path, leaf, (trusted.certificate,), crossed) == OK
    assert refused(lambda: issue_from(shop.issuer, f"{shop.name}/1")) == "AUTHORITY_INACTIVE"


def get(caller: Caller, name: str) -> pb.CertificateAuthority:
    return caller.certificates.GetCertificateAuthority(pb.GetCertificateAuthorityRequest(authority=name)).authority


def test_a_role_opens_no_authority_and_the_manager_issues_nothing(server: RunningServer, shop: Platform, caller: Caller) -> None:
    outsider, manager = issuer_of(server), manager_of(server)
    assert refused(lambda: issue_from(outsider, shop.name)) == "PERMISSION_DENIED"
    assert refused(lambda: issue_from(shop.manager, shop.name)) == "PERMISSION_DENIED"
    assert refused(create, caller, new_name()) == "PERMISSION_DENIED"
    assert refused(create, outsider, new_name()) == "PERMISSION_DENIED"
    assert refused(allow, manager, shop.name, (outsider, "server")) == "PERMISSION_DENIED", "another manages it"
    assert refused(allow, shop.manager, shop.name, (shop.manager, "server")) == "MALFORMED"
    assert refused(create, manager, shop.name) == "NAME_TAKEN"
    # An entry without the role does not do either.
    allow(shop.manager, shop.name, (caller, "server"))
    assert refused(lambda: issue_from(caller, shop.name)) == "PERMISSION_DENIED"
    assert [each.user_id for each in get(caller, shop.name).issuers] == [], "who issues is the manager's to know"


def test_a_user_gets_a_client_certificate_for_themselves_only(server: RunningServer, new_caller: Callable[[], Caller]) -> None:
    shop, user, other = platform(server), new_caller(), new_caller()
    request = pb.UpdateCertificateAuthorityRequest(authority=shop.name, self_service=["client"], set_self_service=True)

    def ask(**fields: object) -> pb.Certificate:
        return issue_from(user, shop.name, **{"profile": "client", "csr": csr(), **fields}).certificate

    assert refused(ask) == "PERMISSION_DENIED"
    shop.manager.certificates.UpdateCertificateAuthority(request)
    issued = ask()
    assert (list(issued.names), issued.subject, issued.owner_id) == ([uri_of(user.user_id)], "", str(user.user_id))
    for fields in (
        {"names": [uri_of(other.user_id)]},
        {"names": [uri_of(user.user_id), "dns:a.example.com"]},
        {"subject": "CN=admin"},
        {"user_id": str(other.user_id)},
        {"csr": csr("dns:a.example.com")},
        {"csr": csr(subject="admin")},
        {"profile": "server", "csr": csr("dns:a.example.com")},
    ):
        assert refused(ask, **fields) == "PERMISSION_DENIED", fields
    theirs = issue_from(shop.issuer, shop.name, profile="client", csr=csr(), user_id=str(other.user_id)).certificate
    assert (list(theirs.names), theirs.owner_id) == ([uri_of(other.user_id)], str(other.user_id))
    assert find(other, theirs.id).serial_number == theirs.serial_number
    assert refused(find, user, theirs.id) == "CERTIFICATE_NOT_FOUND"


def find(caller: Caller, certificate_id: str) -> pb.Certificate:
    return caller.certificates.GetCertificate(pb.GetCertificateRequest(certificate_id=certificate_id)).certificate


def test_a_repeat_gets_the_same_certificate_without_another_signature(server: RunningServer, shop: Platform) -> None:
    request: dict[str, Any] = {"csr": csr("dns:www.example.com"), "request_id": "order-1"}
    one, two = shop.issue(**request), shop.issue(**request)
    assert one == two
    another = {**request, "subject": "O=another"}
    assert refused(lambda: shop.issue(**another)) == "REQUEST_ID_REUSED"
    query = "SELECT count(*) FROM audit.security_events WHERE action = 'sign' AND event_details ->> 'requested_by' = %s"
    before = rows(server, query, str(shop.issuer.user_id))
    shop.issue(**request)
    assert rows(server, query, str(shop.issuer.user_id)) == before


def test_the_trail_has_the_intent_the_use_of_the_key_and_the_outcome(server: RunningServer, shop: Platform) -> None:
    issued = shop.issue().certificate
    query = """
        SELECT event_type, user_id, event_details ->> 'requested_by' FROM audit.security_events
        WHERE resource_id = %s OR event_details ->> 'certificate' = %s ORDER BY created_at
    """
    found = rows(server, query, issued.id, issued.id)
    assert [event for event, _, _ in found] == ["certificate.intended", "key.used", "certificate.issued"]
    assert {str(user) for _, user, _ in found[::2]} == {str(shop.issuer.user_id)}
    assert found[1][2] == str(shop.issuer.user_id), "the key is the service's, the request is the issuer's"


def test_a_key_of_the_caller_is_certified_renewed_and_listed(shop: Platform, tmp_path: Path) -> None:
    made(shop.issuer, "secp256k1", name="tls")
    first = shop.issue(key="tls", names=["dns:own.example.com"], subject="CN=own.example.com").certificate
    assert verified(tmp_path, first.certificate, (shop.authority.certificate,)) == OK
    request = pb.RenewCertificateRequest(certificate_id=first.id)
    second = shop.issuer.certificates.RenewCertificate(request).certificate
    assert (list(second.names), second.subject, second.key_id) == (list(first.names), first.subject, first.key_id)
    assert (second.replaces, second.serial_number != first.serial_number) == (first.id, True)
    assert find(shop.issuer, first.id).HasField("superseded_at")
    listed = shop.issuer.certificates.ListCertificates(pb.ListCertificatesRequest(key="tls"))
    assert [each.id for each in listed.certificates] == [second.id, first.id]
    page = shop.issuer.certificates.ListCertificates(pb.ListCertificatesRequest(key="tls", page_size=1))
    rest = pb.ListCertificatesRequest(key="tls", page_size=1, page_token=page.next_page_token)
    assert [each.id for each in shop.issuer.certificates.ListCertificates(rest).certificates] == [first.id]
    of_manager = shop.manager.certificates.ListCertificates(pb.ListCertificatesRequest(authority=shop.name))
    assert {first.id, second.id} <= {each.id for each in of_manager.certificates}


def test_a_request_goes_to_an_authority_elsewhere_and_its_certificate_comes_back(caller: Caller) -> None:
    made(caller, "ed25519", name="code")
    create_request = pb.CreateCertificateRequestRequest(key="code", subject="CN=Ann", names=["email:ann@example.com"])
    sent = caller.certificates.CreateCertificateRequest(create_request).csr
    found = x509.load_der_x509_csr(sent)
    assert found.is_signature_valid
    certificate, _ = signed_elsewhere(sent, ec.generate_private_key(ec.SECP256R1()))
    kept = caller.certificates.ImportCertificate(pb.ImportCertificateRequest(key="code", certificate=certificate)).certificate
    assert (kept.authority_id, kept.certificate) == ("", certificate)
    assert find(caller, kept.id) == kept
    made(caller, "ed25519", name="other")
    request = pb.ImportCertificateRequest(key="other", certificate=certificate)
    assert refused(caller.certificates.ImportCertificate, request) == "CERTIFICATE_INVALID"


def test_keys_of_authorities_are_for_nothing_else(server: RunningServer, shop: Platform) -> None:
    [[key, owner]] = rows(
        server, "SELECT key_id, key_owner_id FROM cryptography.certificate_authorities WHERE id = %s", shop.authority.id
    )
    for caller in (shop.manager, shop.issuer):
        assert refused(caller.crypto.Sign, cpb.SignRequest(key=str(key), message=b"m")) == "KEY_NOT_FOUND"
    # Whoever gets a certificate in the name of the service's own user does not use them either.
    service = server.caller(UserId(owner))
    assert refused(service.crypto.Sign, cpb.SignRequest(key=str(key), message=b"m")) == "WRONG_PURPOSE"


def test_a_profile_of_the_configuration_is_issued_where_the_manager_lets_somebody(shop: Platform) -> None:
    issued = shop.issue(profile="device", csr=csr(subject="Device 7"))
    certificate = x509.load_der_x509_certificate(issued.certificate.certificate)
    purposes = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert [purpose.dotted_string for purpose in purposes] == ["1.3.6.1.4.1.99999.1"]
    assert refused(shop.issue, profile="device", csr=csr()) == "CERTIFICATE_INVALID"
    assert refused(shop.issue, profile="gadget", csr=csr()) == "MALFORMED"


def test_a_disabled_authority_issues_nothing_and_its_validity_bounds_what_it_issues(server: RunningServer) -> None:
    shop = platform(server, validity=Duration(seconds=3600), custody_min=kpb.CUSTODY_UNSPECIFIED)
    query = (
        "SELECT custody FROM cryptography.keys WHERE id = (SELECT key_id FROM cryptography.certificate_authorities WHERE id = %s)"
    )
    assert rows(server, query, shop.authority.id) == [("RESIDENT",)], "the key of a root never leaves the token"
    issued = shop.issue().certificate
    assert issued.not_after.seconds == shop.authority.not_after.seconds
    request = pb.UpdateCertificateAuthorityRequest(authority=shop.name, disable=True, version=1)
    assert refused(shop.manager.certificates.UpdateCertificateAuthority, request) == "STALE"
    request.version = 0
    shop.manager.certificates.UpdateCertificateAuthority(request)
    assert refused(shop.issue) == "AUTHORITY_INACTIVE"


def test_authorities_are_listed_by_name(server: RunningServer, shop: Platform, caller: Caller) -> None:
    names, token = list[str](), ""
    while True:
        request = pb.ListCertificateAuthoritiesRequest(page_size=1, page_token=token)
        page = caller.certificates.ListCertificateAuthorities(request)
        names += [each.name for each in page.authorities]
        if not (token := page.next_page_token):
            break
    assert shop.name in names
    assert names == sorted(names)
