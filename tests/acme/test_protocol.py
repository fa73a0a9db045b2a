"""The protocol of ACME, against a real server: what clients do right, and what they are refused."""

import base64
import hashlib
import json
from datetime import datetime
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from kms.v1 import acme_pb2 as pb
from kms.v1 import certificates_pb2
from tests.acme.client import AcmeClient, b64, jwk_of
from tests.acme.conftest import ORDERS_MAX, AcmeServer
from tests.acme.orders import answered, der_of, issued, proven
from tests.acme.stubs import serving_files
from tests.conformance.certificates import allow, issuer_of
from tests.conformance.refusals import refusal


def identifier_of(pem: bytes) -> str:
    """Return the identifier of a certificate by RFC 9773."""
    certificate = x509.load_pem_x509_certificates(pem)[0]
    found = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier or b""
    number = certificate.serial_number
    return f"{b64(found)}.{b64(number.to_bytes(number.bit_length() // 8 + 1))}"


def test_names_are_proven_and_their_certificate_is_issued(acme: AcmeServer, client: AcmeClient) -> None:
    done = issued(acme, client, "www.example.test", "example.test")
    chain = x509.load_pem_x509_certificates(done["chain"])
    names = chain[0].extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert set(names.get_values_for_type(x509.DNSName)) == {"www.example.test", "example.test"}
    chain[0].verify_directly_issued_by(chain[1])
    expires = datetime.fromisoformat(done["expires"])
    assert expires == chain[0].not_valid_after_utc
    assert client.post(f"{client.kid}/orders").json == {"orders": [done["url"]]}


def test_the_certificate_is_listed_as_that_of_the_user_who_made_the_account(acme: AcmeServer, client: AcmeClient) -> None:
    issued(acme, client, "owned.example.test")
    request = certificates_pb2.ListCertificatesRequest(authority=acme.platform.name, page_size=1)
    [found] = acme.platform.issuer.certificates.ListCertificates(request).certificates
    assert list(found.names) == ["dns:owned.example.test"]
    assert found.owner_id == found.requested_by == str(acme.platform.issuer.user_id)


def test_a_wildcard_is_proven_by_dns_alone(acme: AcmeServer, client: AcmeClient) -> None:
    made = client.order("*.wild.test")
    [url] = made.json["authorizations"]
    found = client.post(url).json
    assert (found["wildcard"], found["identifier"]["value"]) == (True, "wild.test")
    [challenge] = found["challenges"]
    assert challenge["type"] == "dns-01"
    digest = hashlib.sha256(f"{challenge['token']}.{client.thumbprint}".encode()).digest()
    acme.names.put("_acme-challenge.wild.test", b64(digest))
    client.post(challenge["url"], {})
    assert client.waited(url, "pending")["status"] == "valid"
    assert client.finalize(client.post(made.headers["location"]).json, "*.wild.test").json["status"] == "valid"


def test_an_answer_is_refused_that_proves_nothing(acme: AcmeServer, client: AcmeClient) -> None:
    """Another text, a redirection, a page that is not there, and a name that the DNS does not have."""
    bent: list[tuple[str, dict[str, Any], str]] = [
        ("text.test", {"content": b"something else"}, "incorrectResponse"),
        ("moved.test", {"status": 301, "header": ("Location", "http://www.test/")}, "incorrectResponse"),
        ("absent.test", {"status": 404}, "incorrectResponse"),
        ("missing.test", {}, "dns"),
    ]
    acme.names.put("_acme-challenge.text.test", "another digest")
    for name, stub, problem in bent:
        made = client.order(name)
        if problem == "dns":
            [url] = made.json["authorizations"]
            client.post(client.challenge(url, "dns-01")["url"], {})
            found = client.waited(url, "pending")
        else:
            found = answered(acme, client, made.json["authorizations"][0], **stub)
        [challenge] = found["challenges"]
        assert (found["status"], challenge["status"]) == ("invalid", "invalid")
        assert challenge["error"]["type"].endswith(problem)
        assert b"something else" not in json.dumps(found).encode()
        order = client.post(made.headers["location"]).json
        assert order["status"] == "invalid"
        assert client.finalize(order, name).problem == "orderNotReady"


def test_addresses_of_this_host_are_asked_only_where_the_operator_says_so(acme: AcmeServer, client: AcmeClient) -> None:
    """The configuration names 127.0.0.1 alone."""
    for address in ("127.0.0.2", "169.254.169.254", "224.0.0.1"):
        name = f"near-{address.replace('.', '-')}.test"
        acme.names.addresses[name] = address
        host = address if address.startswith("127.") else "127.0.0.1"
        found = answered(acme, client, client.order(name).json["authorizations"][0], host=host)
        assert found["challenges"][0]["error"]["type"].endswith("connection")


def test_a_request_for_other_names_is_refused_and_the_order_stays_ready(acme: AcmeServer, client: AcmeClient) -> None:
    order = proven(acme, client, "a.csr.test", "b.csr.test")
    subject = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Somebody")])
    assert client.finalize(order, "a.csr.test").problem == "badCSR"
    assert client.finalize(order, "a.csr.test", "b.csr.test", "c.csr.test").problem == "badCSR"
    assert client.finalize(order, "a.csr.test", "b.csr.test", subject=subject).problem == "badCSR"
    assert client.finalize(order, "a.csr.test", "b.csr.test", key=client.key).problem == "badCSR"
    assert client.post(order["finalize"], {"csr": "AAAA"}).problem == "badCSR"
    assert client.post(order["finalize"], {"csr": "A A"}).problem == "malformed"
    common = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a.csr.test")])
    assert client.finalize(order, "a.csr.test", "b.csr.test", subject=common).json["status"] == "valid"


def test_a_finalized_order_is_finalized_once(acme: AcmeServer, client: AcmeClient) -> None:
    done = issued(acme, client, "once.test")
    assert client.finalize(done, "once.test").problem == "orderNotReady"
    assert client.post(done["certificate"]).body == done["chain"]


def test_a_certificate_is_revoked_by_its_account_once(acme: AcmeServer, client: AcmeClient) -> None:
    chain = issued(acme, client, "revoked.test")["chain"]
    url, wish = client.url("revokeCert"), {"certificate": der_of(chain), "reason": 4}
    assert acme.client().post(url, wish).problem == "unauthorized"
    assert client.post(url, {**wish, "reason": 2}).problem == "badRevocationReason"
    assert client.post(url, wish).status == 200
    assert client.post(url, wish).problem == "alreadyRevoked"


def test_a_certificate_is_revoked_by_its_own_key(acme: AcmeServer, client: AcmeClient) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    order = proven(acme, client, "lost-account.test")
    done = client.finalize(order, "lost-account.test", key=key).json
    wish = {"certificate": der_of(client.post(done["certificate"]).body)}
    stranger, holder = AcmeClient(client.directory_url, client.ca_file), AcmeClient(client.directory_url, client.ca_file, key)
    assert stranger.post(client.url("revokeCert"), wish).problem == "unauthorized"
    assert holder.post(client.url("revokeCert"), wish).status == 200


def test_renewal_is_suggested_in_the_last_third_and_at_once_after_a_revocation(acme: AcmeServer, client: AcmeClient) -> None:
    chain = issued(acme, client, "renewed.test")["chain"]
    certificate, identifier = x509.load_pem_x509_certificates(chain)[0], identifier_of(chain)
    url = f"{client.url('renewalInfo')}/{identifier}"
    reply = client.send("GET", url)
    assert int(reply.headers["retry-after"]) > 0
    window = {name: datetime.fromisoformat(text) for name, text in reply.json["suggestedWindow"].items()}
    life = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    assert certificate.not_valid_before_utc + life / 2 < window["start"] < window["end"] < certificate.not_valid_after_utc
    issued(acme, client, "renewed.test", replaces=identifier)
    assert client.order("renewed.test", replaces=identifier).problem == "alreadyReplaced"
    assert acme.client().order("renewed.test", replaces=identifier).problem == "malformed"
    client.post(client.url("revokeCert"), {"certificate": der_of(chain)})
    window = client.send("GET", url).json["suggestedWindow"]
    assert datetime.fromisoformat(window["end"]) <= datetime.now(certificate.not_valid_after_utc.tzinfo)
    for other in ("AAAA.AAAA", "nothing", f"{identifier}A"):
        assert client.send("GET", f"{client.url('renewalInfo')}/{other}").status in (400, 404)


def test_an_account_is_found_by_its_key_and_is_bound_once(acme: AcmeServer) -> None:
    made = acme.new_account()
    client = AcmeClient(made.directory_url, acme.ca_file)
    assert client.post(client.url("newAccount"), {"onlyReturnExisting": True}).problem == "accountDoesNotExist"
    assert client.post(client.url("newAccount"), {}).problem == "externalAccountRequired"
    first = client.register(made.account.id, made.secret, contact=["mailto:admin@example.com"])
    assert (first.status, first.json["contact"]) == (201, ["mailto:admin@example.com"])
    client.kid = ""
    again = client.post(client.url("newAccount"), {})
    assert (again.status, again.headers["location"]) == (200, first.headers["location"])
    other = AcmeClient(made.directory_url, acme.ca_file)
    assert other.register(made.account.id, made.secret).problem == "unauthorized"


def test_a_binding_is_refused_that_was_not_made_with_the_secret(acme: AcmeServer) -> None:
    made, other = acme.new_account(), acme.new_account()
    client = AcmeClient(made.directory_url, acme.ca_file)
    url, right = client.url("newAccount"), made.account.id
    bindings = [
        client.binding(right, other.secret),
        client.binding(right, made.secret, alg="none"),
        client.binding(right, made.secret, url=client.url("newOrder")),
        client.binding(right, made.secret, nonce=client.new_nonce()),
        client.binding("nobody", made.secret),
        AcmeClient(made.directory_url, acme.ca_file).binding(right, made.secret),
    ]
    for binding in bindings:
        reply = client.post(url, {"externalAccountBinding": binding})
        assert reply.status >= 400
        assert reply.problem in ("malformed", "unauthorized", "badSignatureAlgorithm")
    assert client.register(right, made.secret).status == 201


def test_an_account_changes_its_contacts_and_its_key_and_ends(acme: AcmeServer, client: AcmeClient) -> None:
    assert client.post(client.kid, {"contact": ["mailto:a@example.com"]}).json["contact"] == ["mailto:a@example.com"]
    assert client.post(client.kid, {"contact": ["tel:1"]}).problem == "unsupportedContact"
    assert client.post(client.kid, {"contact": ["mailto:a,b@example.com"]}).problem == "invalidContact"
    new, url = AcmeClient(client.directory_url, client.ca_file), client.url("keyChange")
    wish = {"account": client.kid, "oldKey": client.jwk}
    inner = new.signed({"alg": "ES256", "jwk": new.jwk, "url": url}, wish)
    assert client.post(url, new.signed({"alg": "ES256", "jwk": new.jwk, "url": url}, {**wish, "oldKey": new.jwk})).problem
    assert client.post(url, client.signed({"alg": "ES256", "jwk": new.jwk, "url": url}, wish)).status == 401
    assert client.post(url, inner).status == 200
    assert client.post(client.kid).status == 401, "the old key is of no use"
    new.kid = client.kid
    assert new.post(new.kid).status == 200
    assert new.post(new.kid, {"status": "deactivated"}).json["status"] == "deactivated"
    assert new.order("late.test").problem == "unauthorized"


def test_what_is_another_accounts_is_not_there(acme: AcmeServer, client: AcmeClient) -> None:
    order = proven(acme, client, "mine.test")
    other = acme.client()
    for url in (order["url"], *order["authorizations"]):
        assert other.post(url).status == 404
    assert other.finalize(order, "mine.test").status == 404
    assert other.post(client.kid).problem == "unauthorized"
    assert other.post(f"{client.kid}/orders").problem == "unauthorized"


def test_a_nonce_serves_once_and_must_be_ours(acme: AcmeServer, client: AcmeClient) -> None:
    nonce = client.new_nonce()
    assert client.post(client.kid, nonce=nonce).status == 200
    again = client.post(client.kid, nonce=nonce)
    assert (again.problem, bool(again.headers["replay-nonce"])) == ("badNonce", True)
    data = bytearray(base64.urlsafe_b64decode(client.new_nonce() + "=="))
    for place in (0, 8, 16, len(data) - 1):
        changed = bytes(data[:place]) + bytes([data[place] ^ 1]) + bytes(data[place + 1 :])
        assert client.post(client.kid, nonce=b64(changed)).problem == "badNonce"
    assert client.post(client.kid, nonce="AAAA").problem == "badNonce"
    assert client.post(client.kid, nonce=b64(bytes(data))).status == 200, "none of these has used it up"


def test_requests_are_refused_that_are_not_signed_as_they_should_be(acme: AcmeServer, client: AcmeClient) -> None:
    url, other = client.kid, acme.client()
    assert client.post(url, sent_to=f"{url}/orders").problem == "unauthorized", "signed for another address"
    assert client.post(url, alg="none").problem == "badSignatureAlgorithm"
    assert client.post(url, alg="HS256").problem == "badSignatureAlgorithm"
    assert client.post(url, jwk=client.jwk).problem == "malformed", "both kid and jwk"
    assert client.post(url, kid=None).problem == "malformed", "neither"
    assert client.post(url, kid=None, jwk=jwk_of(client.key) | {"d": "AAAA"}).problem == "badPublicKey"
    assert client.post(url, kid=None, jwk={"kty": "oct", "k": "AAAA"}).problem == "badPublicKey"
    assert client.post(url, kid=other.kid).status == 401, "another's account"
    assert client.post(url, kid=f"{url}0").problem == "accountDoesNotExist"
    assert client.post(url, crit=["b64"], b64=False).problem == "malformed"
    signed = client.signed({"alg": "ES256", "kid": url, "url": url, "nonce": client.new_nonce()}, None)
    bodies: list[bytes] = [
        json.dumps({**signed, "header": {"kid": url}}).encode(),
        json.dumps({**signed, "payload": b64(b"{}")}).encode(),
        json.dumps({**signed, "signature": signed["signature"] + "="}).encode(),
        json.dumps(signed).replace("{", '{"payload": "", ', 1).encode(),
        b"[" * 50_000,
        b"",
        b"\xff",
    ]
    for body in bodies:
        reply = client.send("POST", url, body)
        assert 400 <= reply.status < 500, body[:100]
        assert reply.problem == "malformed"
    assert client.send("POST", url, b"x" * 200_000).status == 413
    assert client.send("POST", url, json.dumps(signed).encode(), "application/json").status == 415
    assert client.send("GET", url).status == 405
    assert client.send("GET", f"{client.directory_url}/more").status == 404
    assert client.send("GET", client.directory_url.replace(acme.platform.name, "no-such")).status == 404


def test_identifiers_are_refused_that_no_certificate_may_have(client: AcmeClient) -> None:
    for name in ("a\0b.test", "*.*.test", "a..test", "192.0.2.1", "x" * 64 + ".test", "", "*.test"):
        assert client.order(name).problem == "rejectedIdentifier", name
    unsupported = {"identifiers": [{"type": "email", "value": "a@b.test"}]}
    assert client.post(client.url("newOrder"), unsupported).problem == "unsupportedIdentifier"
    assert client.order().problem == "malformed"
    assert client.order(*[f"{number}.test" for number in range(101)]).problem == "malformed"
    assert client.order("a.test", notAfter="2030-01-01T00:00:00Z").problem == "malformed"
    assert client.post(client.url("newOrder"), {"identifiers": "a"}).problem == "malformed"


def test_an_address_is_proven_over_http(acme: AcmeServer, client: AcmeClient) -> None:
    made = client.post(client.url("newOrder"), {"identifiers": [{"type": "ip", "value": "127.0.0.1"}]})
    [url] = made.json["authorizations"]
    assert [each["type"] for each in client.post(url).json["challenges"]] == ["http-01"]
    assert answered(acme, client, url)["status"] == "valid"


def test_the_challenges_of_an_order_are_answered_all_at_once(acme: AcmeServer, client: AcmeClient) -> None:
    """Each changes the one row of the order, when it begins and when it ends."""
    made = client.order(*[f"{number}.many.test" for number in range(20)]).json
    challenges = [client.challenge(url, "http-01") for url in made["authorizations"]]
    texts = {each["token"]: f"{each['token']}.{client.thumbprint}".encode() for each in challenges}
    with serving_files(acme.http_port, {f"/.well-known/acme-challenge/{token}": text for token, text in texts.items()}):
        for each in challenges:
            client.post(each["url"], {})
        assert {client.waited(url, "pending")["status"] for url in made["authorizations"]} == {"valid"}


def test_an_account_makes_so_many_orders_an_hour(client: AcmeClient) -> None:
    replies = [client.order("many.test") for _ in range(ORDERS_MAX + 1)]
    assert [reply.status for reply in replies] == [201] * ORDERS_MAX + [429]
    assert replies[-1].problem == "rateLimited"


def test_an_authorization_that_was_given_up_proves_nothing(acme: AcmeServer, client: AcmeClient) -> None:
    order = proven(acme, client, "given-up.test")
    assert client.post(order["authorizations"][0], {"status": "deactivated"}).json["status"] == "deactivated"
    assert client.finalize(order, "given-up.test").problem == "orderNotReady"


def test_only_an_issuer_of_server_certificates_makes_accounts(acme: AcmeServer) -> None:
    request = pb.CreateAcmeAccountRequest(authority=acme.platform.name)
    for other in (acme.platform.manager, issuer_of(acme.running), acme.running.caller()):
        assert refusal(other.acme.CreateAcmeAccount, request).reason == "PERMISSION_DENIED"
    request = pb.CreateAcmeAccountRequest(authority="no-such")
    assert refusal(acme.platform.issuer.acme.CreateAcmeAccount, request).reason == "AUTHORITY_NOT_FOUND"


def test_a_user_lists_and_ends_accounts_of_their_own(acme: AcmeServer) -> None:
    # Of a user of its own: other tests leave rows that nobody believes among the accounts of the shared one.
    issuer = issuer_of(acme.running)
    allow(acme.platform.manager, acme.platform.name, (issuer, "server"))
    issuer.acme.CreateAcmeAccount(pb.CreateAcmeAccountRequest(authority=acme.platform.name))
    made = issuer.acme.CreateAcmeAccount(pb.CreateAcmeAccountRequest(authority=acme.platform.name))
    client = AcmeClient(made.directory_url, acme.ca_file)
    client.register(made.account.id, made.secret)
    account_id = client.kid.rpartition("/")[2]
    listed = issuer.acme.ListAcmeAccounts(pb.ListAcmeAccountsRequest(page_size=1))
    assert [(each.id, each.status) for each in listed.accounts] == [(account_id, pb.ACME_ACCOUNT_STATUS_VALID)]
    assert listed.accounts[0].thumbprint == client.thumbprint
    following = pb.ListAcmeAccountsRequest(page_size=200, page_token=listed.next_page_token)
    assert [each.status for each in issuer.acme.ListAcmeAccounts(following).accounts] == [pb.ACME_ACCOUNT_STATUS_PENDING]
    end, manager = pb.DeactivateAcmeAccountRequest(account_id=account_id), acme.platform.manager
    assert refusal(manager.acme.DeactivateAcmeAccount, end).reason == "ACME_ACCOUNT_NOT_FOUND"
    assert issuer.acme.DeactivateAcmeAccount(end).account.status == pb.ACME_ACCOUNT_STATUS_DEACTIVATED
    assert client.order("ended.test").problem == "unauthorized"


def test_a_client_gets_nothing_more_once_its_user_may_not_issue(acme: AcmeServer) -> None:
    user = issuer_of(acme.running)
    allow(acme.platform.manager, acme.platform.name, (user, "server"))
    made = user.acme.CreateAcmeAccount(pb.CreateAcmeAccountRequest(authority=acme.platform.name))
    client = AcmeClient(made.directory_url, acme.ca_file)
    client.register(made.account.id, made.secret)
    order = proven(acme, client, "dismissed.test")
    grant = certificates_pb2.IssuerGrant(user_id=str(user.user_id), profile="server")
    change = certificates_pb2.UpdateCertificateAuthorityRequest(authority=acme.platform.name, disallow=[grant])
    acme.platform.manager.certificates.UpdateCertificateAuthority(change)
    failed = client.finalize(order, "dismissed.test").json
    assert (failed["status"], failed["error"]["type"]) == ("invalid", "urn:ietf:params:acme:error:unauthorized")
    assert client.order("dismissed.test").problem == "unauthorized"


@pytest.mark.parametrize("name", ["Example.TEST", "bücher.test"])
def test_a_name_has_one_spelling(client: AcmeClient, name: str) -> None:
    found = client.order(name, name.lower()).json["identifiers"]
    assert found == [{"type": "dns", "value": {"Example.TEST": "example.test", "bücher.test": "xn--bcher-kva.test"}[name]}]
