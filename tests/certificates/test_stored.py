"""What of authorities and certificates can be stored, and why something is refused."""

from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import asn1crypto.x509  # type: ignore[import-untyped]
import pytest

from kms.certificates.authority import AuthorityStatus
from kms.certificates.x509.stored import check_storable
from kms.domain.errors import KmsError, Reason
from kms.store.pool import Pool
from tests.certificates.memory_authority import authority
from tests.certificates.stored_authority import stored_authority
from tests.fixtures.postgres import Database


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


async def test_of_two_who_make_a_generation_at_once_the_second_is_told_that_the_name_is_taken(
    store: Pool, database: Database, tmp_path: Path
) -> None:
    root = await stored_authority(store, database, tmp_path)
    twin = replace(
        await root.read(), authority_id=uuid4(), version=1, status=AuthorityStatus.PENDING, certificate=None, not_after=None
    )
    with pytest.raises(KmsError) as caught:
        await root.authorities.add(root.manager, twin)
    assert caught.value.reason is Reason.NAME_TAKEN


async def test_who_has_no_standing_any_more_is_refused_the_credentials(store: Pool, database: Database, tmp_path: Path) -> None:
    root = await stored_authority(store, database, tmp_path)
    left = replace(root.manager, user=replace(root.manager.user, version=root.manager.user.version + 1))
    changed = (await root.read()).changed(base_url="http://other.example.com")
    with pytest.raises(KmsError) as caught:
        await root.authorities.change(left, changed, "authority.changed", {})
    assert caught.value.reason is Reason.CREDENTIALS_INVALID
