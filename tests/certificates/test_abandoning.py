"""What was begun and has no outcome: it is given up and revoked, and no other certificate is."""

import asyncio
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest
from structlog.testing import capture_logs

from kms.certificates.certificate import Certificate, Issuance
from kms.certificates.jobs import Abandoning
from kms.certificates.postgres.certificates import StoredCertificates
from kms.domain.errors import KmsError
from kms.store.pool import Pool
from tests.certificates.stored_authority import StoredAuthority, stored_authority
from tests.fixtures.postgres import Database


@pytest.fixture
async def root(store: Pool, database: Database, tmp_path: Path) -> StoredAuthority:
    return await stored_authority(store, database, tmp_path)


async def intended(root: StoredAuthority, like: Certificate, serial_number: int) -> Certificate:
    """Store an intent like that of another certificate."""
    intent = replace(like, certificate_id=uuid4(), serial_number=serial_number, issuance=Issuance.INTENDED, der=b"", version=1)
    await root.certificates.add(None, intent, await root.read())
    return intent


async def test_an_intent_without_an_outcome_is_given_up_and_its_serial_number_is_revoked(root: StoredAuthority) -> None:
    [(issued, _)] = await root.issue()
    intent = await intended(root, issued, 7)
    await Abandoning(root.certificates).abandon()
    assert await root.certificates.find_any(intent.certificate_id) == intent, "it may be about to be signed"
    await Abandoning(root.certificates, seconds=0).abandon()
    found = await root.certificates.find_any(intent.certificate_id)
    assert found is not None
    assert (found.issuance, found.revocation is None, found.der) == (Issuance.ABANDONED, False, b"")
    assert await root.certificates.find_any(issued.certificate_id) == issued
    with pytest.raises(KmsError, match="given up"):
        await root.certificates.complete(None, intent.issued(issued.der))
    assert await root.certificates.find_any(intent.certificate_id) == found, "no outcome comes after it"


async def test_who_is_killed_while_he_gives_up_leaves_it_to_the_next_and_no_outcome_is_stored_meanwhile(
    root: StoredAuthority, monkeypatch: pytest.MonkeyPatch
) -> None:
    [(issued, _)] = await root.issue()
    intent = await intended(root, issued, 7)
    note = StoredCertificates.note_revoked

    async def killed(self: StoredCertificates, certificate: Certificate) -> None:
        """The line is written, and the change is not committed."""
        await note(self, certificate)
        raise asyncio.CancelledError

    with monkeypatch.context() as patched:
        patched.setattr(StoredCertificates, "note_revoked", killed)
        with pytest.raises(asyncio.CancelledError):
            await Abandoning(root.certificates, seconds=0).abandon()
    root.restart()
    with pytest.raises(KmsError, match="given up"):
        await root.certificates.complete(None, intent.issued(issued.der))
    await Abandoning(root.certificates, seconds=0).abandon()
    found = await root.certificates.find_any(intent.certificate_id)
    assert found is not None
    assert found.issuance is Issuance.ABANDONED


async def test_a_record_that_is_not_ours_is_left_and_keeps_no_other_from_it(root: StoredAuthority) -> None:
    [(issued, _)] = await root.issue()
    planted, intent = await intended(root, issued, 7), await intended(root, issued, 8)
    root.run("UPDATE cryptography.certificates SET serial_number = 'ff' WHERE id = %s", planted.certificate_id)
    with capture_logs() as lines:
        await Abandoning(root.certificates, seconds=0).abandon()
    found = await root.certificates.find_any(intent.certificate_id)
    assert found is not None
    assert found.issuance is Issuance.ABANDONED
    refused = [line for line in lines if line["log_level"] == "error"]
    assert [(line["certificate"], line["reason"]) for line in refused] == [(str(planted.certificate_id), "RECORD_INVALID")]
