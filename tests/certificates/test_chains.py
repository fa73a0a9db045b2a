"""Chains of others: PKITS (NIST's path validation suite), and what the service adds to it."""

import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path

import cryptography_vectors
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from kms.certificates.constraints import parse_constraints
from kms.certificates.names import parse_names, parse_subject_text
from kms.certificates.profiles import CLIENT, INTERMEDIATE, SERVER, PublicKeyType
from kms.certificates.x509.certificates import certificates_in, issuer_of
from kms.certificates.x509.chains import verify_chain
from kms.domain.errors import KmsError, Reason
from tests.certificates.making import NOW, SoftAuthority, root
from tests.certificates.peers import openssl
from tests.certificates.softkeys import SoftKey, soft_key

VECTORS = Path(cryptography_vectors.__file__).parent / "x509"
PKITS = VECTORS / "PKITS_data" / "certs"
TRUST_ANCHOR = (PKITS / "TrustAnchorRootCertificate.crt").read_bytes()
# Refused for what a CRL says, or for one that is not there. `verify_chain` looks at none.
NEEDS_CRL = re.compile(
    r"Invalid(.*CRL|.*cRL|Revoked|Separate|LongSerialNumber|delta|distributionPoint|only(Contains|SomeReasons)|"
    r"BasicSelfIssued(NewWithOldTest5|OldWithNewTest2))"
)
# Where the service is stricter than RFC 5280: it compares names byte by byte, obeys no constraints of policies and of directory
# names, has no DSA, and imports no authority that could issue nothing.
STRICTER = re.compile(r"Valid(.*DSA|DN|NameChaining|RolloverfromPrintable|UTF8String|.*[pP]olicy|pathLenConstraintTest(8|14)EE)")
PKITS_MOMENT = datetime(2012, 1, 1, tzinfo=UTC)


def _alike(name: x509.Name) -> str:
    """Return *name* without what RFC 5280 section 7.1 does not compare: case and spaces."""
    return re.sub(r"[\\ ]+", " ", name.rfc4514_string().lower())


@cache
def _by_subject() -> dict[str, list[tuple[bytes, str]]]:
    """Return the authorities of PKITS by their subjects, each with the name of its issuer."""
    found = defaultdict(list)
    for file in sorted(PKITS.glob("*.crt")):
        if not file.stem.endswith("EE") and not file.stem.startswith("DSA"):  # pyca reads none that inherits parameters of DSA
            der = file.read_bytes()
            certificate = x509.load_der_x509_certificate(der)
            found[_alike(certificate.subject)].append((der, _alike(certificate.issuer)))
    return found


def _paths(chain: tuple[bytes, ...], issuer: str) -> Iterator[tuple[bytes, ...]]:
    """Yield each chain of PKITS that goes on from the last of *chain*, which names *issuer*, to the trust anchor."""
    for der, above in _by_subject()[issuer]:
        if der == TRUST_ANCHOR:
            yield (*chain, der)
        elif der not in chain and len(chain) < 8:
            yield from _paths((*chain, der), above)


def _verdict(stem: str) -> str | None:
    """Return why the service refuses a certificate of PKITS; None: it accepts it by one of its paths."""
    rule, leaf = "no path", (PKITS / f"{stem}.crt").read_bytes()
    try:
        issuer = _alike(x509.load_der_x509_certificate(leaf).issuer)
    except ValueError as error:
        return str(error)
    for chain in _paths((leaf,), issuer):
        try:
            verify_chain(chain, at=PKITS_MOMENT)
        except KmsError as refusal:
            assert refusal.reason is Reason.CERTIFICATE_INVALID
            rule = refusal.message
        else:
            return None
    return rule


def _stems(kind: str) -> list[str]:
    return sorted(file.stem for file in PKITS.glob(f"{kind}*EE.crt"))


def test_no_invalid_path_of_pkits_is_accepted() -> None:
    judged = [stem for stem in _stems("Invalid") if not NEEDS_CRL.match(stem)]
    assert len(judged) > 60
    assert [stem for stem in judged if _verdict(stem) is None] == []


def test_a_valid_path_of_pkits_is_accepted_unless_the_service_is_stricter() -> None:
    refused = [stem for stem in _stems("Valid") if _verdict(stem) is not None]
    assert [stem for stem in refused if not STRICTER.match(stem)] == []
    assert len(_stems("Valid")) - len(refused) > 40


def test_a_serial_number_that_is_not_positive_is_refused() -> None:
    assert "positive serial number" in (_verdict("InvalidNegativeSerialNumberTest15EE") or "")


def test_each_certificate_of_pycas_vectors_is_read_or_refused() -> None:
    """They are odd ones: damaged, of versions that are not there, with extensions that cannot be read."""
    outcomes = []
    for file in sorted(VECTORS.glob("custom/**/*.pem")):
        try:
            outcomes.append(issuer_of(certificates_in(file.read_bytes())) is not None)
        except KmsError as refusal:
            assert refusal.reason is Reason.CERTIFICATE_INVALID
            outcomes.append(False)
    assert len(outcomes) > 100


@pytest.fixture(scope="module")
def chain() -> tuple[bytes, ...]:
    """Return a leaf, an intermediate and a root."""
    between = root().intermediate(soft_key(PublicKeyType.P256, 1))
    leaf = between.to_certify(SERVER, soft_key(PublicKeyType.P256, 2), names=parse_names(["dns:a.example"]))
    return (between.issue(leaf), *between.chain)


def refused(chain: Sequence[bytes], *, at: datetime = NOW) -> str:
    with pytest.raises(KmsError) as refusal:
        verify_chain(chain, at=at)
    assert refusal.value.reason is Reason.CERTIFICATE_INVALID
    return refusal.value.message


def forged(issuer: bytes, key: SoftKey, *extensions: x509.ExtensionType) -> bytes:
    """Return a certificate that *key* signs in the name of *issuer*, whatever the service would think of it."""
    above = x509.load_der_x509_certificate(issuer)
    builder = (
        x509.CertificateBuilder(above.subject, x509.Name([]), key.private.public_key(), 7)
        .not_valid_before(above.not_valid_before_utc)
        .not_valid_after(above.not_valid_after_utc)
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(key.private, hashes.SHA256()).public_bytes(Encoding.DER)


def test_a_chain_of_ours_is_accepted_from_each_of_its_certificates(chain: tuple[bytes, ...]) -> None:
    for begins_at in range(len(chain)):
        verify_chain(chain[begins_at:], at=NOW)


@pytest.mark.parametrize("key_type", [PublicKeyType.SECP256K1, PublicKeyType.ED25519, PublicKeyType.RSA])
def test_chains_of_each_key_are_accepted(key_type: PublicKeyType) -> None:
    verify_chain(root(soft_key(key_type)).intermediate(soft_key(key_type, 1)).chain, at=NOW)


def test_a_chain_with_a_link_that_does_not_fit_is_refused(chain: tuple[bytes, ...]) -> None:
    leaf, between, anchor = chain
    namesake = root(soft_key(PublicKeyType.P256, 3)).chain[0]
    for broken in (
        (leaf, anchor),
        (between, leaf, anchor),
        (leaf, between),
        (leaf, between, namesake),
        (leaf, leaf, between, anchor),
    ):
        assert "issued by the next" in refused(broken)
    assert "1 to 8" in refused(())
    assert "1 to 8" in refused((leaf, *[between] * 7, anchor))
    assert "certificate of RFC 5280" in refused((leaf, b"x", anchor))


def test_a_chain_is_judged_at_a_moment(chain: tuple[bytes, ...]) -> None:
    for at in (NOW - timedelta(minutes=6), NOW + timedelta(days=91)):
        assert "valid now" in refused(chain, at=at)
    verify_chain(chain[1:], at=NOW + timedelta(days=91))


def test_a_certificate_below_a_leaf_is_refused(chain: tuple[bytes, ...]) -> None:
    """The key of a leaf signs another certificate, as if it were an authority's."""
    assert "CA:TRUE" in refused((forged(chain[0], soft_key(PublicKeyType.P256, 2)), *chain))


def test_a_certificate_that_names_another_key_of_its_issuer_is_refused(chain: tuple[bytes, ...]) -> None:
    """A verifier that looks for the issuer by this identifier would not find it."""
    key = soft_key(PublicKeyType.P256, 1)
    assert "key identifier" in refused((forged(chain[1], key, x509.AuthorityKeyIdentifier(b"x" * 20, None, None)), *chain[1:]))
    verify_chain((forged(chain[1], key), *chain[1:]), at=NOW)


def test_an_authority_that_could_issue_nothing_is_refused(chain: tuple[bytes, ...]) -> None:
    """The intermediate has the path length 0, and here forgets it."""
    issuer = replace(issuer_of(chain[1:]), path_length=None)
    forgetful = SoftAuthority(soft_key(PublicKeyType.P256, 1), issuer)
    lower = forgetful.issue(
        forgetful.to_certify(INTERMEDIATE, soft_key(PublicKeyType.P256, 7), subject=parse_subject_text("CN=a"))
    )
    assert "path length is 0" in refused((lower, *chain[1:]))


def test_a_weak_root_is_refused(tmp_path: Path) -> None:
    command: list[str | Path] = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:1024",
        "-nodes",
        "-keyout",
        tmp_path / "k",
        "-subj",
        "/CN=a",
        "-outform",
        "DER",
    ]
    made = subprocess.run(command, capture_output=True, check=True).stdout
    assert "2048 to 4096" in refused((made,), at=datetime.now(UTC))
    command[4] = "rsa:2048"
    made = subprocess.run([*command, "-sha1"], capture_output=True, check=True).stdout
    assert "SHA-256" in refused((made,), at=datetime.now(UTC))


def test_an_imported_authority_hands_its_constraints_down(chain: tuple[bytes, ...]) -> None:
    limited = root().intermediate(
        soft_key(PublicKeyType.P256, 4), "CN=Limited", path_length=None, name_constraints=parse_constraints(["dns:a.example"], [])
    )
    issuer = issuer_of(limited.chain)
    assert issuer.path_length == 0
    issuer.check_names(parse_names(["dns:x.a.example"]))
    with pytest.raises(KmsError, match="may certify"):
        issuer.check_names(parse_names(["dns:b.example"]))


def _imported(tmp_path: Path, *options: str) -> SoftAuthority:
    """Return an authority whose certificate OpenSSL made."""
    key = soft_key(PublicKeyType.P256, 5)
    (tmp_path / "key.pem").write_bytes(key.pem)
    command: list[str | Path] = [
        "openssl",
        "req",
        "-x509",
        "-key",
        tmp_path / "key.pem",
        "-outform",
        "DER",
        "-days",
        "900",
        "-utf8",
        *options,
    ]
    der = subprocess.run(command, capture_output=True, check=True).stdout
    verify_chain((der,), at=datetime.now(UTC))
    return SoftAuthority(key, issuer_of((der,)))


@pytest.mark.parametrize("mask", ["pkix", "utf8only"])
def test_an_authority_with_another_encoding_of_its_name_is_named_byte_by_byte(mask: str, tmp_path: Path) -> None:
    (tmp_path / "config").write_text(
        f"[req]\ndistinguished_name=dn\nx509_extensions=ca\nstring_mask={mask}\n[dn]\n"
        "[ca]\nbasicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign\nsubjectKeyIdentifier=hash\n"
    )
    subject = "/DC=example/O=Bücher/CN=Root+UID=x/emailAddress=a@example.com"
    authority = _imported(tmp_path, "-config", str(tmp_path / "config"), "-multivalue-rdn", "-subj", subject)
    key, names = soft_key(PublicKeyType.P256, 2), parse_names(["dns:a.example"])
    to_certify = authority.to_certify(SERVER, key, names=names, now=datetime.now(UTC))
    assert not openssl(tmp_path, (authority.issue(to_certify), *authority.chain), "-purpose", "sslserver")


def test_an_authority_for_servers_certifies_no_client(tmp_path: Path) -> None:
    extensions = ("extendedKeyUsage=serverAuth", "basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign")
    authority = _imported(
        tmp_path, "-config", "/dev/null", "-subj", "/CN=a", *(each for text in extensions for each in ("-addext", text))
    )
    key, names = soft_key(PublicKeyType.P256, 2), parse_names(["dns:a.example"])
    authority.issue(authority.to_certify(SERVER, key, names=names, now=datetime.now(UTC)))
    with pytest.raises(KmsError, match="extended key usages that the issuer may certify"):
        authority.issue(authority.to_certify(CLIENT, key, names=names, now=datetime.now(UTC)))
