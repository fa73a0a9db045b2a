"""What the authority refuses through gRPC: to former managers and issuers, for other users, and for compromised keys."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from kms.v1 import certificates_pb2 as pb
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
)
from tests.conformance.requests import made
from tests.fixtures.server import Caller, RunningServer

_ELSEWHERE = ec.generate_private_key(ec.SECP256R1())


@pytest.fixture(scope="module")
def shop(server: RunningServer) -> Platform:
    """A root whose issuer issues every profile."""
    return platform(server)


def update(manager: Caller, name: str, **fields: object) -> pb.CertificateAuthority:
    given: dict[str, Any] = fields
    request = pb.UpdateCertificateAuthorityRequest(authority=name, **given)
    return manager.certificates.UpdateCertificateAuthority(request).authority


def bring(manager: Caller, name: str, request: bytes) -> pb.CertificateAuthority:
    """Give a pending authority what an authority elsewhere makes of its *request*."""
    certificates = pem(*signed_elsewhere(request, _ELSEWHERE))
    message = pb.ImportAuthorityCertificateRequest(authority=name, certificates=certificates)
    return manager.certificates.ImportAuthorityCertificate(message).authority


def get(caller: Caller, name: str) -> pb.CertificateAuthority:
    return caller.certificates.GetCertificateAuthority(pb.GetCertificateAuthorityRequest(authority=name)).authority


def rotate(manager: Caller, name: str) -> pb.RotateCertificateAuthorityResponse:
    return manager.certificates.RotateCertificateAuthority(pb.RotateCertificateAuthorityRequest(authority=name))


def revoke(caller: Caller, certificate_id: str, reason: int) -> None:
    request = pb.RevokeCertificateRequest(certificate_id=certificate_id, reason=reason)  # type: ignore[arg-type]
    caller.certificates.RevokeCertificate(request)


def renew(caller: Caller, certificate_id: str) -> pb.Certificate:
    return caller.certificates.RenewCertificate(pb.RenewCertificateRequest(certificate_id=certificate_id)).certificate


def grant(user: Caller, profile: str) -> pb.IssuerGrant:
    return pb.IssuerGrant(user_id=str(user.user_id), profile=profile)


def test_a_former_manager_takes_no_authority_back(server: RunningServer) -> None:
    former, manager, name = manager_of(server), manager_of(server), new_name("external")
    first, second = create(former, name, external=True).csr, create(former, name, external=True).csr
    later = create(former, name, external=True).csr
    bring(former, f"{name}/2", second)
    assert get(former, f"{name}/1").status == pb.AUTHORITY_STATUS_DISABLED, "a later generation is active"
    assert refused(bring, former, f"{name}/1", first) == "AUTHORITY_INACTIVE"
    update(former, name, manager_id=str(manager.user_id))
    assert refused(bring, former, f"{name}/3", later) == "AUTHORITY_INACTIVE", "it was given up when the authority went over"
    found = get(former, name)
    assert (found.generation, found.status, found.manager_id) == (2, pb.AUTHORITY_STATUS_ACTIVE, str(manager.user_id))


def test_generations_that_never_become_active_are_few(server: RunningServer) -> None:
    manager, name = manager_of(server), new_name("external")
    for _ in range(16):
        last = create(manager, name, external=True)
    assert refused(create, manager, name, external=True) == "NAME_TAKEN"
    bring(manager, f"{name}/16", last.csr)
    assert rotate(manager, name).authority.generation == 17
    update(manager, f"{name}/17", disable=True)
    assert refused(rotate, manager, name) == "NAME_TAKEN"


def test_who_was_let_go_before_a_generation_is_active_does_not_issue_from_it(server: RunningServer) -> None:
    manager, issuer, other, name = manager_of(server), issuer_of(server), issuer_of(server), new_name("external")
    bring(manager, name, create(manager, name, external=True).csr)
    allow(manager, name, (issuer, "server"))
    begun = rotate(manager, name)
    assert rotate(manager, name).authority.id == begun.authority.id, "it waits for its certificate"
    update(manager, name, disallow=[grant(issuer, "server")], allow=[grant(other, "server")])
    assert bring(manager, f"{name}/2", begun.csr).generation == 2
    assert refused(issue_from, issuer, name) == "PERMISSION_DENIED"
    assert issue_from(other, name).certificate.authority_id == begun.authority.id


def test_who_hands_an_authority_over_is_not_its_issuer_by_that(server: RunningServer) -> None:
    manager, other, name = manager_and_issuer_of(server), manager_of(server), new_name()
    create(manager, name)
    change = {"manager_id": str(other.user_id), "allow": [grant(manager, "server")]}
    assert refused(update, manager, name, **change) == "MALFORMED"
    assert get(manager, name).manager_id == str(manager.user_id)


def test_a_certificate_for_another_user_takes_a_user_and_their_own_key(shop: Platform) -> None:
    assert refused(shop.issue, profile="client", csr=csr(), user_id=str(uuid4())) == "MALFORMED"
    made(shop.issuer, "secp256r1", name="for-another")
    request = {"profile": "client", "key": "for-another"}
    assert refused(shop.issue, **request, user_id=str(shop.manager.user_id)) == "MALFORMED"
    assert shop.issue(**request, user_id=str(shop.issuer.user_id)).certificate.owner_id == str(shop.issuer.user_id)


def test_a_subject_may_be_as_long_as_its_attributes_allow(shop: Platform) -> None:
    subject = f"CN=www.example.com,O={'o' * 64},OU={'u' * 64},ST={'s' * 128},L={'l' * 128}"
    assert shop.issue(subject=subject).certificate.subject.count("u") >= 64


def test_who_renews_for_themselves_keeps_no_subject_that_another_chose(server: RunningServer, caller: Caller) -> None:
    shop = platform(server)
    update(shop.manager, shop.name, self_service=["client"], set_self_service=True)
    theirs = shop.issue(profile="client", user_id=str(caller.user_id), subject="CN=admin", csr=csr()).certificate
    own = issue_from(caller, shop.name, profile="client", csr=csr()).certificate
    assert refused(renew, caller, theirs.id) == "PERMISSION_DENIED"
    assert renew(caller, own.id).names == own.names


def test_a_key_that_was_compromised_is_certified_no_more(server: RunningServer, shop: Platform) -> None:
    key, other = ec.generate_private_key(ec.SECP256R1()), platform(server)
    request = csr("dns:www.example.com", key=key)
    first, second = shop.issue(csr=request).certificate, shop.issue(csr=request).certificate
    revoke(shop.issuer, first.id, pb.REVOCATION_REASON_SUPERSEDED)
    third = shop.issue(csr=request).certificate
    revoke(shop.issuer, second.id, pb.REVOCATION_REASON_KEY_COMPROMISE)
    for issued_by in (shop, other):
        assert refused(issued_by.issue, csr=request) == "CERTIFICATE_INVALID"
    assert refused(renew, shop.issuer, third.id) == "CERTIFICATE_INVALID"


def test_an_issuer_renews_for_another_only_while_their_key_may_be_used(server: RunningServer, shop: Platform) -> None:
    owner = issuer_of(server)
    allow(shop.manager, shop.name, (owner, "server"))
    key = made(owner, "secp256r1", name="theirs")
    first = issue_from(owner, shop.name, key="theirs", names=["dns:www.example.com"]).certificate
    second = renew(shop.issuer, first.id)
    assert (second.key_id, second.owner_id) == (key.id, str(owner.user_id))
    owner.keys.RevokeKey(kpb.RevokeKeyRequest(key="theirs", reason="lost"))
    assert refused(renew, shop.issuer, second.id) == "KEY_REVOKED"


@pytest.fixture
def below(server: RunningServer, shop: Platform) -> tuple[str, Caller, pb.CertificateAuthority]:
    """An intermediate below the root, and its issuer."""
    manager, issuer, name = manager_and_issuer_of(server), issuer_of(server), new_name("web")
    allow(shop.manager, shop.name, (manager, "intermediate"))
    authority = create(manager, name, parent=shop.name).authority
    allow(manager, name, (issuer, "server"))
    return name, issuer, authority


def test_an_authority_whose_certificate_is_revoked_issues_nothing(
    shop: Platform, below: tuple[str, Caller, pb.CertificateAuthority]
) -> None:
    name, issuer, authority = below
    issued = issue_from(issuer, name).certificate
    listed = shop.manager.certificates.ListCertificates(pb.ListCertificatesRequest(authority=shop.name)).certificates
    own = next(each for each in listed if each.certificate == authority.certificate)
    revoke(shop.manager, own.id, pb.REVOCATION_REASON_CA_COMPROMISE)
    assert refused(issue_from, issuer, name) == "AUTHORITY_INACTIVE"
    assert refused(renew, issuer, issued.id) == "AUTHORITY_INACTIVE"
    revoke(issuer, issued.id, pb.REVOCATION_REASON_CA_COMPROMISE)


def test_a_list_of_authorities_is_without_certificates(shop: Platform) -> None:
    listed = shop.manager.certificates.ListCertificateAuthorities(pb.ListCertificateAuthoritiesRequest()).authorities
    assert {bytes(each.certificate) for each in listed} == {b""}
    assert not any(each.chain for each in listed)


@contextmanager
def cut_off_at(server: RunningServer, event: str) -> Iterator[None]:
    """Have no authority change as *event* says within the block: who rolls one over gets so far and no further."""
    with psycopg.connect(server.deployment.database.admin_dsn, autocommit=True) as admin:
        row = admin.execute("SELECT pg_get_functiondef('cryptography.change_authority'::regproc)").fetchone()
        assert row is not None
        admin.execute(
            row[0].replace("\nBEGIN\n", f"\nBEGIN\n    IF event = '{event}' THEN RETURN 'STALE'; END IF;\n", 1).encode()
        )
        try:
            yield
        finally:
            admin.execute(row[0].encode())


def certificates_of(shop: Platform) -> list[pb.Certificate]:
    """Return the certificates that are valid of all generations of an authority, the CA's alone."""
    request = pb.ListCertificatesRequest
    issuers = [f"{shop.name}/1", f"{shop.name}/2"]
    found = [
        each for name in issuers for each in shop.manager.certificates.ListCertificates(request(authority=name)).certificates
    ]
    return [each for each in found if each.status == pb.CERTIFICATE_STATUS_VALID]


@pytest.mark.parametrize("event", ["authority.certified", "authority.superseded"])
def test_a_roll_over_that_was_cut_off_goes_on(server: RunningServer, event: str) -> None:
    shop = platform(server)
    with cut_off_at(server, event):
        assert refused(rotate, shop.manager, shop.name) == "STALE"
    rotated = rotate(shop.manager, shop.name).authority
    assert (rotated.generation, rotated.status) == (2, pb.AUTHORITY_STATUS_ACTIVE)
    assert [len(get(shop.manager, f"{shop.name}/{generation}").cross_certificates) for generation in (1, 2)] == [1, 1]
    assert len(certificates_of(shop)) == 4, "two of themselves, and two of each other"
    assert shop.issue().certificate.authority_id == rotated.id


def test_what_was_issued_to_a_generation_that_is_given_up_is_revoked(server: RunningServer) -> None:
    shop, other = platform(server), manager_of(server)
    with cut_off_at(server, "authority.superseded"):
        assert refused(rotate, shop.manager, shop.name) == "STALE"
    assert len(certificates_of(shop)) == 4
    update(shop.manager, shop.name, manager_id=str(other.user_id))
    assert get(shop.manager, f"{shop.name}/2").status == pb.AUTHORITY_STATUS_DISABLED
    handed = Platform(shop.name, other, shop.issuer, shop.authority)
    assert [each.certificate for each in certificates_of(handed)] == [shop.authority.certificate]
