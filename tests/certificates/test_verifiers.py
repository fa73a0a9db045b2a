"""Other implementations agree: they accept what the service certifies, for what it certifies and for nothing else."""

from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509

from kms.certificates.constraints import parse_constraints
from kms.certificates.names import EMPTY, Subject, parse_names, parse_subject_text
from kms.certificates.profiles import BUILT_IN, CLIENT, CODE_SIGNING, OCSP, SERVER, Profile, PublicKeyType
from kms.certificates.x509.certificates import parse_certificate
from kms.domain.errors import KmsError
from tests.certificates import peers
from tests.certificates.making import NOW, SoftAuthority, root
from tests.certificates.softkeys import soft_key

LEAF = soft_key(PublicKeyType.P256, 5)
SIGNERS = [PublicKeyType.P256, PublicKeyType.SECP256K1, PublicKeyType.ED25519, PublicKeyType.RSA]
CONSTRAINTS = parse_constraints(["dns:example.com", "email:example.com"], ["dns:a.example.com"])


# What each kind of end entity is called, and how OpenSSL and certvalidator call what it is for.
LEAVES: dict[str, tuple[Profile, Subject, list[str], str, str]] = {
    "server": (
        SERVER,
        parse_subject_text("CN=www.example.com,O=Example"),
        ["dns:www.example.com", "dns:*.b.example.com", "ip:192.0.2.1"],
        "sslserver",
        "server_auth",
    ),
    "client": (
        CLIENT,
        EMPTY,
        ["uri:kms://test/user/00000000-0000-4000-8000-000000000001", "email:jo@example.com"],
        "sslclient",
        "client_auth",
    ),
    "code-signing": (
        CODE_SIGNING,
        parse_subject_text("serialNumber=1-2,CN=Example Builds,O=Example,C=DE"),
        [],
        "any",
        "code_signing",
    ),
    "ocsp": (OCSP, parse_subject_text("CN=OCSP"), [], "ocsphelper", "ocsp_signing"),
}


@pytest.fixture(scope="module")
def authority() -> SoftAuthority:
    """An intermediate authority with constraints, under a root."""
    return root().intermediate(soft_key(PublicKeyType.P256, 6), name_constraints=CONSTRAINTS)


def leaf(authority: SoftAuthority, name: str) -> bytes:
    profile, subject, names, *_ = LEAVES[name]
    return authority.issue(authority.to_certify(profile, LEAF, subject=subject, names=parse_names(names)))


def test_each_profile_is_judged_here() -> None:
    assert BUILT_IN.keys() == {*LEAVES, "intermediate", "root"}


@pytest.mark.parametrize("name", LEAVES)
async def test_every_verifier_accepts_each_profile(authority: SoftAuthority, name: str, tmp_path: Path) -> None:
    chain = (leaf(authority, name), *authority.chain)
    profile, _, _, purpose, extended = LEAVES[name]
    assert not peers.openssl(tmp_path, chain, "-purpose", purpose)
    assert not peers.gnutls(tmp_path, chain, "--verify-purpose", profile.extended_key_usage[0])
    assert not await peers.certvalidator(chain, key_usage="digital_signature", extended=extended, at=NOW)
    if name in {"server", "client"}:  # pyca judges these two
        assert not peers.pyca(chain, host="www.example.com" if name == "server" else None, at=NOW)


@pytest.mark.parametrize("name", ["server", "client"])
async def test_every_verifier_refuses_another_purpose(authority: SoftAuthority, name: str, tmp_path: Path) -> None:
    chain = (leaf(authority, name), *authority.chain)
    other = "client" if name == "server" else "server"
    profile, _, _, purpose, extended = LEAVES[other]
    assert peers.openssl(tmp_path, chain, "-purpose", purpose)
    assert peers.gnutls(tmp_path, chain, "--verify-purpose", profile.extended_key_usage[0])
    assert await peers.certvalidator(chain, key_usage="digital_signature", extended=extended, at=NOW)
    assert peers.pyca(chain, host="www.example.com" if other == "server" else None, at=NOW)


@pytest.mark.parametrize("signer", SIGNERS)
async def test_verifiers_accept_each_key_that_signs(signer: PublicKeyType, tmp_path: Path) -> None:
    between = root(soft_key(signer)).intermediate(soft_key(signer, 1))
    chain = (leaf(between, "server"), *between.chain)
    assert not peers.openssl(tmp_path, chain, "-purpose", "sslserver", "-verify_hostname", "x.b.example.com")
    assert not [finding for der in chain for finding in peers.pkilint(der)]
    if signer is not PublicKeyType.SECP256K1:  # which GnuTLS and certvalidator do not know
        assert not peers.gnutls(tmp_path, chain, "--verify-hostname", "x.b.example.com")
        assert not await peers.certvalidator(chain, key_usage="digital_signature", extended="server_auth", at=NOW)


@pytest.mark.parametrize("key_type", PublicKeyType)
def test_each_type_of_key_is_certified(authority: SoftAuthority, key_type: PublicKeyType, tmp_path: Path) -> None:
    key = soft_key(key_type, 7)
    der = authority.issue(authority.to_certify(SERVER, key, names=parse_names(["dns:www.example.com"])))
    assert not peers.openssl(tmp_path, (der, *authority.chain), "-purpose", "sslserver")
    assert not peers.pkilint(der)
    assert (parse_certificate(der).public_key, parse_certificate(der).key_type) == (key.spki, key_type)


@pytest.mark.parametrize("name", LEAVES)
def test_pkilint_finds_nothing_in_an_end_entity(authority: SoftAuthority, name: str) -> None:
    assert not peers.pkilint(leaf(authority, name))


def test_pkilint_finds_nothing_in_an_authority_with_constraints(authority: SoftAuthority) -> None:
    assert [peers.pkilint(der) for der in authority.chain] == [[], []]


def test_pkilint_sees_what_is_wrong(authority: SoftAuthority) -> None:
    bad = replace(CLIENT, extended_key_usage=(), names_min=0)
    object.__setattr__(bad, "key_usage", frozenset())
    der = authority.issue(authority.to_certify(bad, LEAF, subject=parse_subject_text("CN=a")))
    assert peers.pkilint(der)


@pytest.mark.parametrize(
    ("profile", "inside", "outside"),
    [
        (SERVER, "dns:www.example.com", "dns:www.example.org"),
        (SERVER, "dns:a.a.example.com", "dns:x.b.example.com"),
        (SERVER, "ip:192.0.2.1", "ip:192.0.3.1"),
        (CLIENT, "email:jo@example.com", "email:jo@example.org"),
        (CLIENT, "uri:kms://a.example.com/x", "uri:kms://example.com/x"),
    ],
)
async def test_verifiers_hold_names_to_the_constraints_as_the_service_does(
    profile: Profile, inside: str, outside: str, tmp_path: Path
) -> None:
    permitted = ["dns:example.com", "ip:192.0.2.0/24", "email:example.com", "uri:.example.com"]
    kind = inside.partition(":")[0]
    constraints = parse_constraints([each for each in permitted if each.startswith(kind)], ["dns:b.example.com"])
    authority = root().intermediate(soft_key(PublicKeyType.P256, 6), name_constraints=constraints)
    forgetful = replace(authority, issuer=replace(authority.issuer, constraints=()))
    for name in (inside, outside):
        names = parse_names([name])
        chain = (forgetful.issue(forgetful.to_certify(profile, LEAF, names=names)), *authority.chain)
        purpose, extended = ("sslserver", "server_auth") if profile is SERVER else ("sslclient", "client_auth")
        answers = [peers.openssl(tmp_path, chain, "-purpose", purpose)]
        if kind != "uri":  # which GnuTLS does not know
            answers.append(peers.gnutls(tmp_path, chain, "--verify-purpose", profile.extended_key_usage[0]))
        if kind != "ip":  # which certvalidator does not know
            answers.append(await peers.certvalidator(chain, key_usage="digital_signature", extended=extended, at=NOW))
        if profile is SERVER and kind == "dns":
            answers.append(peers.pyca(chain, host=names[0].value, at=NOW))
        assert {bool(answer) for answer in answers} == {name == outside}
    with pytest.raises(KmsError, match="names"):
        authority.issue(authority.to_certify(profile, LEAF, names=parse_names([outside])))


def test_a_cross_signed_authority_is_accepted_under_both_roots(tmp_path: Path) -> None:
    """The next generation's key and subject are certified by the old root also, and by its own."""
    old, new = root(), root(soft_key(PublicKeyType.P256, 8), name="CN=Root 2,O=Example,C=DE")
    bridge = old.intermediate(new.key, name="CN=Root 2,O=Example,C=DE")
    der = leaf(new, "server")
    for chain in ((der, *new.chain), (der, *bridge.chain)):
        assert not peers.openssl(tmp_path, chain, "-purpose", "sslserver")
        assert not peers.gnutls(tmp_path, chain)
        assert not peers.pyca(chain, host="www.example.com", at=NOW)


def test_a_certificate_says_where_its_issuer_and_its_revocation_are(authority: SoftAuthority) -> None:
    parsed = parse_certificate(leaf(authority, "server"))
    assert parsed.crl_urls == ("http://ca.example.com/crl/a/1.crl",)
    assert parsed.ocsp_urls == ("http://ca.example.com/ocsp/a/1",)
    assert parsed.issuer_urls == ("http://ca.example.com/ca/a/1.crt",)
    # Nobody asks whether an OCSP signer is revoked: its certificate ends soon.
    signer = parse_certificate(leaf(authority, "ocsp"))
    assert (signer.crl_urls, signer.ocsp_urls, len(signer.issuer_urls)) == ((), (), 1)
    assert parse_certificate(authority.chain[-1]).crl_urls == ()
    assert parsed.authority_key_id == parse_certificate(authority.chain[0]).subject_key_id
    certificate = x509.load_der_x509_certificate(leaf(authority, "server"))
    assert certificate.extensions.get_extension_for_class(
        x509.SubjectKeyIdentifier
    ).value == x509.SubjectKeyIdentifier.from_public_key(LEAF.private.public_key())
