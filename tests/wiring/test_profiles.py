"""Profiles of the operator's own: the configuration says them, and certificates keep to them."""

from datetime import timedelta
from pathlib import Path
from typing import get_args

import pytest

from kms import config
from kms.certificates.names import Attribute, NameKind, parse_names, parse_subject_text
from kms.certificates.profiles import BUILT_IN, EXTENDED_KEY_USAGES, KeyUsage, PublicKeyType, Unwanted
from kms.certificates.x509.certificates import parse_certificate
from kms.config import BUILT_IN_PROFILES, EXTENDED_KEY_USAGE_NAMES, ConfigError, KeyUsageName, SubjectAttribute
from kms.domain.errors import KmsError
from kms.wiring.profiles import profiles_of
from tests.certificates import peers
from tests.certificates.making import root
from tests.certificates.softkeys import soft_key

DEVICE = """
[certificates.profiles.device]
key_usage = ["digitalSignature", "keyAgreement"]
extended_key_usage = ["clientAuth", "1.3.6.1.5.5.7.3.2", "1.3.6.1.4.1.99999.1"]
key_types = ["p-256"]
name_kinds = ["dns", "uri"]
names_min = 1
names_max = 2
subject_allowed = ["CN", "serialNumber"]
subject_required = ["serialNumber"]
validity_hours = 12
validity_hours_max = 48
unknown_extensions = "drop"
"""


def load(directory: Path, text: str) -> config.Config:
    file = directory / "kms.toml"
    file.write_text(text)
    return config.load(file)


def test_without_the_section_there_are_the_built_in_profiles(tmp_path: Path) -> None:
    assert profiles_of(load(tmp_path, "").certificates) == BUILT_IN
    assert profiles_of(load(tmp_path, "[certificates]").certificates) == BUILT_IN


def test_a_certificate_keeps_to_a_profile_of_the_configuration(tmp_path: Path) -> None:
    profile = profiles_of(load(tmp_path, DEVICE).certificates)["device"]
    assert profile.unknown_extensions is Unwanted.DROP
    authority, key = root(), soft_key(PublicKeyType.P256, 1)
    names = parse_names(["uri:urn:device:7"])
    der = authority.issue(authority.to_certify(profile, key, subject=parse_subject_text("serialNumber=7"), names=names))
    parsed = parse_certificate(der)
    assert parsed.key_usage == {KeyUsage.DIGITAL_SIGNATURE, KeyUsage.KEY_AGREEMENT}
    assert parsed.extended_key_usage == (EXTENDED_KEY_USAGES["clientAuth"], "1.3.6.1.4.1.99999.1")
    assert parsed.validity.not_after - parsed.validity.not_before == timedelta(hours=12, minutes=5, seconds=-1)
    assert not peers.openssl(tmp_path, (der, *authority.chain), "-purpose", "sslclient")
    with pytest.raises(KmsError, match="serialNumber"):
        authority.issue(authority.to_certify(profile, key, names=names))
    with pytest.raises(KmsError, match="1 minute to 2 days"):
        authority.to_certify(profile, key, validity=timedelta(hours=49))


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("profiles.device", "profiles.server", "server"),
        ("profiles.device", "profiles.Device", "profiles.Device"),
        ('"clientAuth"', '"OCSPSigning"', "extended_key_usage"),
        ('"clientAuth"', '"1.3.6.1.5.5.7.3.9"', "OCSPSigning"),
        ('"clientAuth"', '"2.5.29.37.0"', "any usage"),
        ('"clientAuth"', '"1.99.1"', "extended_key_usage"),
        ('"clientAuth"', '"clientAuth", "clientAuth"', "once"),
        ('"keyAgreement"', '"keyCertSign"', "key_usage"),
        ('"keyAgreement"', '"encipherOnly"', "keyAgreement"),
        ('"p-256"', '"p-521"', "key_types"),
        ('"dns"', '"dirName"', "name_kinds"),
        ('["dns", "uri"]', "[]", "name_kinds"),
        ("names_max = 2", "names_max = 0", "names_min"),
        ('subject_allowed = ["CN", "serialNumber"]', 'subject_allowed = ["CN"]', "subject_required"),
        ("names_min = 1\n", "subject_required = []\n", "subject_required"),
        ("validity_hours = 12", "validity_hours = 49", "validity_hours"),
        ("validity_hours = 12", "validity_hours = 0", "validity_hours"),
        ("validity_hours = 12", "path_length = 1", "path_length"),
    ],
)
def test_a_profile_that_makes_no_sense_is_a_fault_that_names_it(tmp_path: Path, old: str, new: str, fault: str) -> None:
    text = DEVICE.replace(old, new, 1)
    if old.startswith("names_min"):
        text = text.replace('subject_required = ["serialNumber"]\n', "")
    with pytest.raises(ConfigError) as refusal:
        load(tmp_path, text)
    assert "certificates" in str(refusal.value)
    assert fault in str(refusal.value)


def test_the_configuration_has_the_names_of_the_certificates() -> None:
    assert BUILT_IN.keys() == BUILT_IN_PROFILES
    assert set(get_args(KeyUsageName)) == set(KeyUsage) - {KeyUsage.KEY_CERT_SIGN, KeyUsage.CRL_SIGN}
    assert set(EXTENDED_KEY_USAGE_NAMES) == EXTENDED_KEY_USAGES.keys() - {"OCSPSigning"}
    assert set(get_args(SubjectAttribute)) == set(Attribute)
    fields = config.ProfileConfig.model_fields
    kinds = get_args(get_args(fields["name_kinds"].annotation)[0])
    assert set(kinds) == set(NameKind)
    assert set(get_args(get_args(fields["key_types"].annotation)[0])) == set(PublicKeyType)
