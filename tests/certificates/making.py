"""Certificates for tests: an authority, and what it issues, with keys in software."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

from kms.certificates.names import EMPTY, GeneralName, Subject, parse_subject_text
from kms.certificates.profiles import INTERMEDIATE, ROOT, Profile, PublicKeyType
from kms.certificates.x509.certificates import IssuerCertificate, ToCertify, build_certificate, issuer_of
from kms.certificates.x509.lint import lint
from tests.certificates.softkeys import SoftKey, soft_key

NOW = datetime.now(UTC)  # GnuTLS knows no other moment
URLS = {
    "crl_url": "http://ca.example.com/crl/a/1.crl",
    "ocsp_url": "http://ca.example.com/ocsp/a/1",
    "issuer_url": "http://ca.example.com/ca/a/1.crt",
}
_serial_numbers = count(1 << 158)


@dataclass(frozen=True)
class SoftAuthority:
    """An authority: its key, and its certificate with those above it."""

    key: SoftKey
    issuer: IssuerCertificate

    @property
    def chain(self) -> tuple[bytes, ...]:
        return self.issuer.chain

    def to_certify(
        self,
        profile: Profile,
        key: SoftKey,
        *,
        subject: Subject = EMPTY,
        names: Sequence[GeneralName] = (),
        validity: timedelta | None = None,
        now: datetime = NOW,
        **others: Any,  # noqa: ANN401
    ) -> ToCertify:
        return ToCertify(
            next(_serial_numbers),
            subject,
            tuple(names),
            key.spki,
            profile,
            profile.validity(now, validity, issuer=self.issuer.validity),
            self.issuer,
            **{**URLS, **others},
        )

    def issue(self, to_certify: ToCertify) -> bytes:
        """Return the certificate, looked at before and after it is signed."""
        unsigned = build_certificate(to_certify, self.key.spki)
        lint(unsigned.draft, to_certify)
        der = self.key.sign(unsigned)
        lint(der, to_certify)
        return der

    def intermediate(self, key: SoftKey, name: str = "CN=Intermediate,O=Example", **others: Any) -> "SoftAuthority":  # noqa: ANN401
        der = self.issue(self.to_certify(INTERMEDIATE, key, subject=parse_subject_text(name), **others))
        return SoftAuthority(key, issuer_of((der, *self.chain)))


def root(key: SoftKey | None = None, name: str = "CN=Root,O=Example,C=DE", **others: Any) -> SoftAuthority:  # noqa: ANN401
    """Return a new root authority; with a key of P-256 unless another is given."""
    key = key or soft_key(PublicKeyType.P256)
    validity = ROOT.validity(NOW, None, issuer=None)
    to_certify = ToCertify(next(_serial_numbers), parse_subject_text(name), (), key.spki, ROOT, validity, **others)
    unsigned = build_certificate(to_certify, key.spki)
    lint(unsigned.draft, to_certify)
    return SoftAuthority(key, issuer_of((key.sign(unsigned),)))
