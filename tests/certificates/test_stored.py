"""Which certificates of authorities elsewhere can be kept."""

import asn1crypto.x509  # type: ignore[import-untyped]
import pytest

from kms.certificates.x509.stored import check_storable
from kms.domain.errors import KmsError, Reason
from tests.certificates.memory_authority import authority


@pytest.mark.parametrize(("serial_number", "is_kept"), [(2**159 - 1, True), (2**160 - 1, True), (2**160, False), (2**400, False)])
def test_a_serial_number_is_kept_up_to_20_bytes(serial_number: int, is_kept: bool) -> None:
    certificate = asn1crypto.x509.Certificate.load(authority().der)
    certificate["tbs_certificate"]["serial_number"] = serial_number
    der = certificate.dump(force=True)
    if is_kept:
        check_storable(der)
        return
    with pytest.raises(KmsError, match="serial number of at most 20 bytes") as caught:
        check_storable(der)
    assert caught.value.reason is Reason.CERTIFICATE_INVALID
