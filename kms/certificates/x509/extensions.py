"""Usages and the other extensions as pyca/cryptography has them, and back."""

from collections.abc import Iterable
from typing import Final, TypeVar

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm

from kms.certificates.profiles import KeyUsage

E = TypeVar("E", bound=x509.ExtensionType)

UNREADABLE: Final = (
    ValueError,
    TypeError,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
    UnsupportedAlgorithm,
)
"""What pyca raises for what it cannot read."""

_FLAG_OF: Final = {
    KeyUsage.DIGITAL_SIGNATURE: "digital_signature",
    KeyUsage.CONTENT_COMMITMENT: "content_commitment",
    KeyUsage.KEY_ENCIPHERMENT: "key_encipherment",
    KeyUsage.DATA_ENCIPHERMENT: "data_encipherment",
    KeyUsage.KEY_AGREEMENT: "key_agreement",
    KeyUsage.KEY_CERT_SIGN: "key_cert_sign",
    KeyUsage.CRL_SIGN: "crl_sign",
    KeyUsage.ENCIPHER_ONLY: "encipher_only",
    KeyUsage.DECIPHER_ONLY: "decipher_only",
}
_OF_AGREEMENT: Final = frozenset({KeyUsage.ENCIPHER_ONLY, KeyUsage.DECIPHER_ONLY})


def x509_key_usage(usages: Iterable[KeyUsage]) -> x509.KeyUsage:
    """Return *usages* as an extension."""
    given = frozenset(usages)
    return x509.KeyUsage(**{flag: usage in given for usage, flag in _FLAG_OF.items()})


def usages_of(extension: x509.KeyUsage | None) -> frozenset[KeyUsage]:
    """Return the usages of an extension; none without it."""
    if extension is None:
        return frozenset()
    # pyca has encipherOnly and decipherOnly only where keyAgreement is.
    known = [usage for usage in KeyUsage if extension.key_agreement or usage not in _OF_AGREEMENT]
    return frozenset(usage for usage in known if getattr(extension, _FLAG_OF[usage]))


def extension_of(extensions: x509.Extensions, kind: type[E]) -> E | None:
    """Return the extension of *kind*, None where there is none."""
    try:
        return extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None
