"""CRLs, built by the service and read by others. The keys are in memory."""

import subprocess
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509

from kms.certificates.certificate import Revocation, RevocationReason
from kms.certificates.crl import Crl, next_crl, parse_reason
from kms.certificates.x509.crls import build_crl, parse_crl
from kms.domain.errors import KmsError, Reason
from tests.certificates.linting import crl_findings
from tests.certificates.memory_authority import NOW, MemoryAuthority, authority

_KINDS = ("p256", "secp256k1", "rsa", "ed25519")
_URL = "http://pki.example.com/crl/test/1/3.crl"


def _revoked(*serial_numbers: int, reason: RevocationReason = RevocationReason.UNSPECIFIED) -> dict[int, Revocation]:
    return {serial_number: Revocation(NOW, reason) for serial_number in serial_numbers}


def _for_each_reason() -> dict[int, Revocation]:
    return {100 + reason: Revocation(NOW, reason) for reason in RevocationReason}


def _crl(revoked: dict[int, Revocation] | None = None, *, previous: Crl | None = None, point: str = "") -> Crl:
    return next_crl(previous, revoked or {}, (), NOW, point)


def _verified(directory: Path, issuer: MemoryAuthority, crl: bytes, leaf: MemoryAuthority) -> str:
    """Return what `openssl verify -crl_check` says of *leaf*."""
    (directory / "ca.pem").write_bytes(issuer.pem)
    (directory / "leaf.pem").write_bytes(leaf.pem)
    pem = subprocess.run(["openssl", "crl", "-inform", "DER"], input=crl, capture_output=True, check=True).stdout
    (directory / "crl.pem").write_bytes(pem)
    command = ["openssl", "verify", "-x509_strict", "-crl_check", "-attime", str(int(NOW.timestamp()) + 60)]
    command += ["-CAfile", "ca.pem", "-CRLfile", "crl.pem", "leaf.pem"]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@pytest.mark.parametrize("kind", _KINDS)
def test_openssl_refuses_a_certificate_on_the_list_and_takes_another(kind: str, tmp_path: Path) -> None:
    issuer = authority(kind)
    revoked, good = issuer.issue(1001), issuer.issue(1002)
    crl = issuer.sign(build_crl(_crl(_revoked(1001, reason=RevocationReason.KEY_COMPROMISE)), issuer.der))
    assert "certificate revoked" in _verified(tmp_path, issuer, crl, revoked)
    assert "OK" in _verified(tmp_path, issuer, crl, good)


@pytest.mark.parametrize("kind", _KINDS)
def test_a_linter_finds_nothing_in_a_list(kind: str) -> None:
    issuer = authority(kind)
    assert crl_findings(issuer.sign(build_crl(_crl(), issuer.der))) == []
    assert crl_findings(issuer.sign(build_crl(_crl(_for_each_reason()), issuer.der))) == []
    assert crl_findings(issuer.sign(build_crl(_crl(_for_each_reason(), point=_URL), issuer.der))) == []


def test_a_list_is_read_as_it_was_written() -> None:
    issuer = authority()
    crl = _crl(_for_each_reason(), point=_URL)
    assert parse_crl(issuer.sign(build_crl(crl, issuer.der)), issuer.der) == crl


def test_a_list_for_one_shard_says_so_critically() -> None:
    issuer = authority()
    crl = x509.load_der_x509_crl(issuer.sign(build_crl(_crl(point=_URL), issuer.der)))
    found = crl.extensions.get_extension_for_class(x509.IssuingDistributionPoint)
    assert found.critical
    assert [name.value for name in found.value.full_name or ()] == [_URL]


def test_a_list_that_another_key_signed_is_refused() -> None:
    ours, other = authority("p256"), authority("secp256k1")
    planted = other.sign(build_crl(_crl(), other.der))
    with pytest.raises(KmsError) as caught:
        parse_crl(planted, ours.der)
    assert caught.value.reason is Reason.CERTIFICATE_INVALID


@pytest.mark.parametrize("damage", [b"", b"\x30\x00", b"no CRL"])
def test_what_is_no_list_is_refused(damage: bytes) -> None:
    with pytest.raises(KmsError) as caught:
        parse_crl(damage, authority().der)
    assert caught.value.reason is Reason.CERTIFICATE_INVALID


def test_a_changed_byte_is_noticed_wherever_it_is() -> None:
    issuer = authority()
    der = issuer.sign(build_crl(_crl(_revoked(7)), issuer.der))
    for place in range(4, len(der), 7):
        changed = bytes(byte ^ (place == index) for index, byte in enumerate(der))
        with pytest.raises(KmsError):
            parse_crl(changed, issuer.der)


def test_nothing_but_expiry_takes_a_certificate_off_the_list() -> None:
    first = _crl(_revoked(1, 2))
    later = next_crl(first, _revoked(3), [2], NOW + timedelta(days=1), "")
    assert sorted(later.entries) == [1, 3]
    assert later.entries[1] == Revocation(NOW, RevocationReason.UNSPECIFIED)


def test_the_first_reason_stays() -> None:
    first = _crl(_revoked(1, reason=RevocationReason.KEY_COMPROMISE))
    second = _crl(_revoked(1, reason=RevocationReason.SUPERSEDED), previous=first)
    assert second.entries[1].reason is RevocationReason.KEY_COMPROMISE


@pytest.mark.parametrize("shift", [timedelta(days=-400), timedelta(0), timedelta(milliseconds=1)])
def test_numbers_grow_also_when_the_clock_is_set_back(shift: timedelta) -> None:
    first = _crl()
    assert next_crl(first, {}, (), NOW + shift, "").number > first.number


def test_a_database_that_was_put_back_gives_no_number_twice() -> None:
    old = _crl()
    published = next_crl(old, {}, (), NOW + timedelta(hours=1), "")
    assert next_crl(old, {}, (), NOW + timedelta(hours=2), "").number > published.number


@pytest.mark.parametrize("number", [6, 7, 8, 11, -1])
def test_hold_and_what_is_no_reason_are_refused(number: int) -> None:
    with pytest.raises(KmsError) as caught:
        parse_reason(number)
    assert caught.value.metadata["field"] == "reason"
