"""Profiles: what each lets a certificate say."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from kms.certificates.names import EMPTY, parse_names, parse_subject_text
from kms.certificates.profiles import (
    BACKDATED,
    BUILT_IN,
    CLIENT,
    CODE_SIGNING,
    INTERMEDIATE,
    SERVER,
    KeyUsage,
    Profile,
    PublicKeyType,
    Validity,
)
from kms.domain.errors import KmsError, Reason

NOW = datetime(2026, 1, 2, 3, 4, 5, 678_000, tzinfo=UTC)
SECOND, DAY = timedelta(seconds=1), timedelta(days=1)


def test_only_authorities_sign_certificates() -> None:
    signing = {KeyUsage.KEY_CERT_SIGN, KeyUsage.CRL_SIGN}
    for profile in BUILT_IN.values():
        assert signing <= profile.key_usage if profile.is_ca else signing.isdisjoint(profile.key_usage)
        assert bool(profile.extended_key_usage) is not profile.is_ca


@pytest.mark.parametrize(
    ("profile", "key_type", "bits"),
    [
        (replace(SERVER, key_types=frozenset({PublicKeyType.RSA})), PublicKeyType.P256, 256),
        (INTERMEDIATE, PublicKeyType.P384, 384),
        (CODE_SIGNING, PublicKeyType.RSA, 2048),
        (SERVER, PublicKeyType.RSA, 8192),
    ],
)
def test_a_key_outside_the_profile_is_refused(profile: Profile, key_type: PublicKeyType, bits: int) -> None:
    with pytest.raises(KmsError, match="key: expected") as refusal:
        profile.check_key(key_type, bits)
    assert refusal.value.reason is Reason.CERTIFICATE_INVALID
    SERVER.check_key(PublicKeyType.RSA, 2048)
    CODE_SIGNING.check_key(PublicKeyType.P256, 256)


@pytest.mark.parametrize(
    ("profile", "subject", "names"),
    [
        (CLIENT, "", ["dns:*.a.example"]),
        (CLIENT, "", ["ip:::1"]),
        (SERVER, "", []),
        (CLIENT, "", [f"dns:a{number}.example" for number in range(11)]),
        (SERVER, "CN=b.example", ["dns:a.example"]),
        (SERVER, "serialNumber=1", ["dns:a.example"]),
        (CODE_SIGNING, "O=Example", []),
        (INTERMEDIATE, "CN=a.example", ["dns:a.example"]),
        (replace(CODE_SIGNING, subject_required=frozenset()), "", []),
    ],
)
def test_a_subject_or_a_name_outside_the_profile_is_refused(profile: Profile, subject: str, names: list[str]) -> None:
    with pytest.raises(KmsError) as refusal:
        profile.check_subject(parse_subject_text(subject), parse_names(names))
    assert refusal.value.reason is Reason.CERTIFICATE_INVALID


def test_a_subject_and_names_within_the_profile_are_accepted() -> None:
    SERVER.check_subject(EMPTY, parse_names(["dns:*.a.example", "ip:::1"]))
    SERVER.check_subject(parse_subject_text("CN=::1"), parse_names(["dns:a.example", "ip:::1"]))
    CLIENT.check_subject(parse_subject_text("CN=Jo"), parse_names(["uri:kms://test/user/1"]))
    CODE_SIGNING.check_subject(parse_subject_text("CN=Builds"), ())


def test_a_certificate_begins_before_now_and_its_last_second_counts() -> None:
    validity = SERVER.validity(NOW, 2 * DAY, issuer=None)
    begins = NOW.replace(microsecond=0)
    assert validity == Validity(begins - BACKDATED, begins + 2 * DAY - SECOND)
    assert SERVER.validity(NOW, None, issuer=None).not_after == begins + 90 * DAY - SECOND


def test_no_certificate_is_valid_beyond_its_issuer() -> None:
    begins = NOW.replace(microsecond=0)
    issuer = Validity(begins - SECOND, begins + 30 * DAY)
    assert SERVER.validity(NOW, 90 * DAY, issuer=issuer) == issuer
    assert SERVER.validity(NOW, DAY, issuer=issuer).not_after < issuer.not_after
    for outside in (NOW - 2 * SECOND, NOW + 30 * DAY):
        with pytest.raises(KmsError, match="issuer that is valid now"):
            SERVER.validity(outside, DAY, issuer=issuer)


@pytest.mark.parametrize("span", [timedelta(), timedelta(seconds=59), -DAY, 398 * DAY + SECOND, timedelta.max])
def test_a_span_outside_the_profile_is_refused(span: timedelta) -> None:
    with pytest.raises(KmsError, match="1 minute to 398 days"):
        SERVER.validity(NOW, span, issuer=None)


def test_a_validity_that_somebody_made_is_held_to_the_profile() -> None:
    longest = SERVER.validity(NOW, 398 * DAY, issuer=None)
    SERVER.check_validity(longest)
    for not_after in (longest.not_after + SECOND, longest.not_before, longest.not_before - DAY):
        with pytest.raises(KmsError, match="validity"):
            SERVER.check_validity(replace(longest, not_after=not_after))
