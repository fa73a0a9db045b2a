"""pkilint over CRLs and OCSP answers."""

from collections.abc import Iterable

from pkilint import loader, pkix  # type: ignore[import-untyped]  # it has no annotations
from pkilint.pkix import crl, extension, name, ocsp  # type: ignore[import-untyped]
from pkilint.validation import ValidationFindingSeverity, ValidationResult  # type: ignore[import-untyped]


def crl_findings(der: bytes) -> list[str]:
    """Return what pkilint finds wrong in a CRL, from a notice on."""
    validator = crl.create_pkix_crl_validator_container(
        [
            pkix.create_attribute_decoder(name.ATTRIBUTE_TYPE_MAPPINGS),
            pkix.create_extension_decoder(extension.EXTENSION_MAPPINGS),
        ],
        [
            crl.create_issuer_validator_container([]),
            crl.create_validity_validator_container([]),
            crl.create_extensions_validator_container([]),
        ],
    )
    return _findings(validator.validate(loader.load_crl(der, "crl").root))


def ocsp_findings(der: bytes) -> list[str]:
    """Return what pkilint finds wrong in an OCSP answer, from a notice on."""
    validator = ocsp.create_pkix_ocsp_response_validator_container(
        [
            ocsp.create_response_decoder(),
            pkix.create_attribute_decoder(name.ATTRIBUTE_TYPE_MAPPINGS),
            pkix.create_extension_decoder(extension.EXTENSION_MAPPINGS),
        ],
        [],
    )
    return _findings(validator.validate(loader.load_ocsp_response(der, "answer").root))


def _findings(results: Iterable[ValidationResult]) -> list[str]:
    found = [each for result in results for each in result.finding_descriptions]
    return [str(each) for each in found if each.finding.severity <= ValidationFindingSeverity.NOTICE]
