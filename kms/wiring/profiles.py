"""The profiles of certificates: those that are built in, and the operator's own."""

from collections.abc import Mapping
from datetime import timedelta

from kms.certificates.names import Attribute, NameKind
from kms.certificates.profiles import BUILT_IN, EXTENDED_KEY_USAGES, KeyUsage, Profile, PublicKeyType, Unwanted
from kms.config import CertificatesConfig, ProfileConfig


def profiles_of(section: CertificatesConfig | None) -> Mapping[str, Profile]:
    """Return all profiles by name."""
    own = {} if section is None else {name: _profile(name, profile) for name, profile in section.profiles.items()}
    return {**BUILT_IN, **own}


def _profile(name: str, config: ProfileConfig) -> Profile:
    usages = dict.fromkeys(EXTENDED_KEY_USAGES.get(usage, usage) for usage in config.extended_key_usage)
    return Profile(
        name=name,
        key_usage=frozenset(map(KeyUsage, config.key_usage)),
        extended_key_usage=tuple(usages),
        key_types=frozenset(map(PublicKeyType, config.key_types)),
        name_kinds=frozenset(map(NameKind, config.name_kinds)),
        names_min=config.names_min,
        names_max=config.names_max,
        subject_allowed=frozenset(map(Attribute, config.subject_allowed)),
        subject_required=frozenset(map(Attribute, config.subject_required)),
        validity_default=timedelta(hours=config.validity_hours),
        validity_max=timedelta(hours=config.validity_hours_max),
        rsa_bits_min=config.rsa_bits_min,
        allow_wildcards=config.wildcards,
        common_name_is_a_name=config.common_name_is_a_name,
        unknown_extensions=Unwanted(config.unknown_extensions),
    )
