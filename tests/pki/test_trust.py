"""Trust material is read once for TLS and identity, followed when its files change, and never left worse than it was."""

from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from kms.domain.errors import KmsError
from kms.pki.authority import Authority, issue_client, issue_crl, issue_server, make_authority
from kms.pki.client_identity import ClientIdentity, host_clock
from kms.pki.trust import Trust, TrustFiles

NOW = host_clock()
URI = "kms://test/user/0a1b2c3d-0000-4000-8000-00000000000f"


class Stage:
    """Two authorities, and a service's files, which trust the first. The test moves the clock."""

    def __init__(self, directory: Path) -> None:
        self.now = NOW
        self.first, self.second = (make_authority(directory / name, now=NOW) for name in ("first", "second"))
        self.files = TrustFiles(*(directory / name for name in ("server.crt", "server.key", "clients.pem", "crl.pem")))
        self.serve(days=365)
        self.trust_in(self.first)
        self.revoke(self.first)

    def open(self) -> Trust:
        return Trust(self.files, clock=lambda: self.now)

    def serve(self, *, days: int) -> None:
        issue_server(self.first, ["localhost"], now=NOW, days=days).write(self.files.certificate, self.files.key)

    def trust_in(self, *authorities: Authority) -> None:
        replace(self.files.client_ca, b"".join(each.certificate.public_bytes(Encoding.PEM) for each in authorities))

    def revoke(self, *authorities: Authority, days: int = 30, numbers: tuple[int, ...] = ()) -> None:
        assert self.files.client_crl is not None
        replace(self.files.client_crl, b"".join(issue_crl(each, numbers, now=NOW, days=days) for each in authorities))

    def accepts(self, trust: Trust, authority: Authority) -> bool:
        """Whether a client whom *authority* has certified is one, asked over a connection that is open already."""
        issued = issue_client(authority, URI, now=NOW)
        identity = ClientIdentity(trust, deployment="test", clock=lambda: self.now)
        try:
            identity({"peer_uri": [URI.encode()], "x509_pem_cert": [issued.certificate]})
        except KmsError:
            return False
        return True


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def replace(file: Path, content: bytes) -> None:
    new = file.with_suffix(".new")
    new.write_bytes(content)
    new.replace(file)


def test_an_authority_is_replaced_without_a_day_on_which_nobody_is_let_in(stage: Stage) -> None:
    trust = stage.open()
    assert (stage.accepts(trust, stage.first), stage.accepts(trust, stage.second)) == (True, False)
    stage.trust_in(stage.first, stage.second)
    stage.revoke(stage.first, stage.second)
    trust.follow()
    assert (stage.accepts(trust, stage.first), stage.accepts(trust, stage.second)) == (True, True)
    stage.trust_in(stage.second)
    stage.revoke(stage.second)
    trust.follow()
    assert (stage.accepts(trust, stage.first), stage.accepts(trust, stage.second)) == (False, True)
    assert (trust.faults, trust.warnings) == ([], [])


def test_an_authority_that_was_taken_out_is_forgotten_by_an_identity_that_knew_its_client(stage: Stage) -> None:
    trust = stage.open()
    identity = ClientIdentity(trust, deployment="test", clock=lambda: stage.now)
    peer = {"peer_uri": [URI.encode()], "x509_pem_cert": [issue_client(stage.first, URI, now=NOW).certificate]}
    assert identity(peer)
    stage.trust_in(stage.second)
    stage.revoke(stage.second)
    trust.follow()
    with pytest.raises(KmsError):
        identity(peer)


def test_clients_of_an_authority_without_a_list_are_refused_and_others_are_not(stage: Stage) -> None:
    trust = stage.open()
    stage.trust_in(stage.first, stage.second)
    trust.follow()
    assert (stage.accepts(trust, stage.first), stage.accepts(trust, stage.second)) == (True, False)


def test_a_list_counts_for_its_own_authority_alone(stage: Stage) -> None:
    number = 4711
    stage.trust_in(stage.first, stage.second)
    assert stage.files.client_crl is not None
    lists = issue_crl(stage.first, [number], now=NOW) + issue_crl(stage.second, [], now=NOW)
    replace(stage.files.client_crl, lists)
    trust = stage.open()
    first, second = trust.authorities.certificates
    trust.check_not_revoked(second, number)
    with pytest.raises(KmsError, match="not revoked"):
        trust.check_not_revoked(first, number)


def test_of_two_lists_by_one_authority_the_newer_counts_wherever_it_stands(stage: Stage) -> None:
    number = 4711
    older = issue_crl(stage.first, [], now=NOW - timedelta(hours=1))
    newer = issue_crl(stage.first, [number], now=NOW)
    assert stage.files.client_crl is not None
    for content in (older + newer, newer + older):
        replace(stage.files.client_crl, content)
        trust = stage.open()
        with pytest.raises(KmsError, match="not revoked"):
            trust.check_not_revoked(next(iter(trust.authorities.certificates)), number)


def test_a_certificate_without_its_key_is_not_taken_and_is_a_warning_until_the_key_is_there(stage: Stage) -> None:
    trust = stage.open()
    before, other = trust.pair, issue_server(stage.first, ["localhost"], now=NOW, days=100)
    replace(stage.files.certificate, other.certificate)
    trust.follow()
    assert trust.pair == before
    assert ["tls_cert_file" in warning and "not used" in warning for warning in trust.warnings] == [True]
    replace(stage.files.key, other.key)
    trust.follow()
    assert (trust.pair.certificate, trust.warnings) == (other.certificate, [])


@pytest.mark.parametrize("content", [b"", b"nonsense"])
def test_a_broken_bundle_is_not_taken_and_is_a_warning(stage: Stage, content: bytes) -> None:
    trust = stage.open()
    replace(stage.files.client_ca, content)
    trust.follow()
    assert stage.accepts(trust, stage.first)
    assert ["client_ca_file" in warning for warning in trust.warnings] == [True]


def test_a_file_that_is_gone_is_a_warning_and_what_was_read_of_it_stays(stage: Stage) -> None:
    trust = stage.open()
    for file in (stage.files.certificate, stage.files.client_ca):
        file.unlink()
    trust.follow()
    assert stage.accepts(trust, stage.first)
    assert len(trust.warnings) == 2


def _broken(stage: Stage) -> None:
    assert stage.files.client_crl is not None
    replace(stage.files.client_crl, b"nonsense")


def _gone(stage: Stage) -> None:
    assert stage.files.client_crl is not None
    stage.files.client_crl.unlink()


def _ended(stage: Stage) -> None:
    stage.now = NOW + timedelta(days=31)


@pytest.mark.parametrize("spoil", [_broken, _gone, _ended])
def test_a_list_that_cannot_be_relied_on_lets_nobody_in_and_the_service_is_not_ready(
    stage: Stage, spoil: Callable[[Stage], None]
) -> None:
    trust = stage.open()
    spoil(stage)
    assert not stage.accepts(trust, stage.first)
    assert ["client_crl_file" in fault for fault in trust.faults] == [True]


def test_a_server_certificate_that_has_ended_is_a_fault_and_keeps_the_service_from_starting(stage: Stage) -> None:
    trust = stage.open()
    stage.now = NOW + timedelta(days=366)
    stage.revoke(stage.first, days=400)
    trust.follow()
    assert ["tls_cert_file" in fault for fault in trust.faults] == [True]
    with pytest.raises(KmsError, match=r"server\.tls_cert_file"):
        stage.open()


def test_authorities_that_have_all_ended_are_a_fault(stage: Stage) -> None:
    stage.serve(days=4000)
    stage.revoke(stage.first, days=4000)
    trust = stage.open()
    stage.now = NOW + timedelta(days=3651)
    assert ["client_ca_file" in fault for fault in trust.faults] == [True]


def test_what_ends_within_thirty_days_is_a_warning_and_is_logged_at_thirty_and_at_seven(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[str] = []

    class Log:
        def warning(self, _: str, **__: object) -> None:
            logged.append("warning")

        def error(self, _: str, **__: object) -> None:
            logged.append("error")

    monkeypatch.setattr("kms.pki.trust._LOG", Log())
    stage.revoke(stage.first, days=400)
    trust = stage.open()
    for days, warnings, logs in ((100, 0, []), (336, 1, ["warning"]), (340, 1, ["warning"]), (359, 1, ["warning", "error"])):
        stage.now = NOW + timedelta(days=days)
        trust.log_ends()
        assert (len(trust.warnings), logged) == (warnings, logs)


def test_a_list_without_a_newer_one_is_a_warning_before_its_next_update_is_past(stage: Stage) -> None:
    trust = stage.open()
    stage.now = NOW + timedelta(days=26)
    assert trust.warnings == []
    stage.now = NOW + timedelta(days=28)
    assert ["next update" in warning for warning in trust.warnings] == [True]
    assert stage.accepts(trust, stage.first)


def test_when_each_part_ends_is_told(stage: Stage) -> None:
    def ends(pem: bytes) -> datetime:
        return x509.load_pem_x509_certificate(pem).not_valid_after_utc

    trust = stage.open()
    told = {setting: ends_at for setting, _, ends_at in trust.ends()}
    assert told["server.tls_cert_file"] == ends(stage.files.certificate.read_bytes())
    assert told["server.client_ca_file"] == ends(stage.files.client_ca.read_bytes())
    assert abs(told["server.client_crl_file"] - (NOW + timedelta(days=30))) < timedelta(seconds=1)
