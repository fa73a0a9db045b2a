"""Other implementations that judge our certificates. Each function returns what its peer objects to; empty: nothing."""

import re
import subprocess
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from asn1crypto import x509 as asn1  # type: ignore[import-untyped]  # it has no types
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError
from pkilint import loader  # type: ignore[import-untyped]  # it has no types
from pkilint.pkix import certificate, extension, name  # type: ignore[import-untyped]
from pkilint.validation import ValidationFindingSeverity  # type: ignore[import-untyped]
from pyhanko_certvalidator import CertificateValidator, ValidationContext
from pyhanko_certvalidator.errors import InvalidCertificateError, PathBuildingError, PathValidationError

# pkilint takes the schemes of browsers for all there are, and a wildcard (RFC 9525) for no name.
_UNKNOWN_TO_PKILINT = re.compile(r'URI syntax: "(kms|spiffe)://[a-z0-9.-]+/[a-z0-9/-]+"|domain name syntax: "\*\.[a-z0-9.-]+"')


def pem(*ders: bytes) -> bytes:
    return b"".join(x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM) for der in ders)


def _files(directory: Path, chain: Sequence[bytes]) -> dict[str, Path]:
    parts = {"leaf": chain[:1], "between": chain[1:-1], "root": chain[-1:], "chain": chain}
    paths = {}
    for part, ders in parts.items():
        paths[part] = directory / f"{part}.pem"
        paths[part].write_bytes(pem(*ders))
    return paths


def openssl(directory: Path, chain: Sequence[bytes], *options: str) -> str:
    """Verify *chain*, from the leaf to the root, strictly."""
    files = _files(directory, chain)
    between = ("-untrusted", files["between"]) if len(chain) > 2 else ()
    command: list[str | Path] = ["openssl", "verify", "-x509_strict", *options, "-CAfile", files["root"], *between, files["leaf"]]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if result.returncode == 0 else result.stdout + result.stderr


def gnutls(directory: Path, chain: Sequence[bytes], *options: str) -> str:
    """Verify *chain* by certtool."""
    files = _files(directory, chain)
    command: list[str | Path] = [
        "certtool",
        "--verify",
        *options,
        "--load-ca-certificate",
        files["root"],
        "--infile",
        files["chain"],
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if result.returncode == 0 else result.stdout + result.stderr


def pyca(chain: Sequence[bytes], *, host: str | None, at: datetime) -> str:
    """Verify *chain* as a server's (*host*) or a client's."""
    leaf, *between, root = [x509.load_der_x509_certificate(der) for der in chain]
    builder = PolicyBuilder().store(Store([root])).time(at)
    try:
        if host is None:
            builder.build_client_verifier().verify(leaf, between)
        else:
            builder.build_server_verifier(x509.DNSName(host)).verify(leaf, between)
    except VerificationError as error:
        return str(error)
    return ""


async def certvalidator(chain: Sequence[bytes], *, key_usage: str, extended: str, at: datetime) -> str:
    """Verify *chain* by pyhanko-certvalidator."""
    leaf, *between, root = [asn1.Certificate.load(der) for der in chain]
    context = ValidationContext(trust_roots=[root], moment=at, allow_fetching=False, other_certs=between)
    validator = CertificateValidator(leaf, intermediate_certs=between, validation_context=context)
    try:
        await validator.async_validate_usage({key_usage}, {extended})  # type: ignore[no-untyped-call]
    except (InvalidCertificateError, PathBuildingError, PathValidationError) as error:
        return str(error)
    return ""


@cache
def _linter() -> Any:  # noqa: ANN401
    return certificate.create_pkix_certificate_validator_container(
        certificate.create_decoding_validators(name.ATTRIBUTE_TYPE_MAPPINGS, extension.EXTENSION_MAPPINGS),
        [
            certificate.create_issuer_validator_container([]),
            certificate.create_validity_validator_container(),
            certificate.create_subject_validator_container([]),
            certificate.create_extensions_validator_container([]),
            certificate.create_spki_validator_container([]),
        ],
    )


def pkilint(der: bytes) -> list[str]:
    """Return what pkilint warns of in a certificate, by RFC 5280."""
    results = _linter().validate(loader.load_der_certificate(der, "certificate").root)
    findings = [(result.node.path, each) for result in results for each in result.finding_descriptions]
    return [
        f"{each.finding.code} {path}: {each.message}"
        for path, each in findings
        if each.finding.severity <= ValidationFindingSeverity.WARNING and not _UNKNOWN_TO_PKILINT.search(each.message or "")
    ]
