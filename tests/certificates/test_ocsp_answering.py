"""OCSP on a real database: what is signed before and what on demand, and what a hostile database changes of that."""

import asyncio
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp

from kms.certificates.authority import AuthorityStatus
from kms.certificates.certificate import Certificate, RevocationReason
from kms.certificates.publishing.documents import Document, IssuerPath
from kms.certificates.x509.ocsp import issuer_hashes
from kms.domain.errors import KmsError, Reason
from kms.store.pool import Pool
from tests.certificates.memory_authority import authority
from tests.certificates.stored_authority import StoredAuthority, stored_authority
from tests.fixtures.postgres import Database

_ROOT = IssuerPath("root", 1)
_GOOD, _REVOKED = ocsp.OCSPCertStatus.GOOD, ocsp.OCSPCertStatus.REVOKED
_MAC = "SELECT record_mac FROM cryptography.certificates WHERE id = %s"
_UNREVOKE = """
    UPDATE cryptography.certificates
    SET revocation_status = 'valid', revoked_at = NULL, revocation_reason = NULL, version = 2, record_mac = %s
    WHERE id = %s
"""


@pytest.fixture
async def root(store: Pool, database: Database, tmp_path: Path) -> StoredAuthority:
    return await stored_authority(store, database, tmp_path)


def _request(root: StoredAuthority, serial_number: int, *, nonce: bytes = b"", by: str = "sha1") -> bytes:
    algorithm = {"sha1": hashes.SHA1(), "sha256": hashes.SHA256()}[by]  # noqa: S303 - it names an issuer
    builder = ocsp.OCSPRequestBuilder().add_certificate_by_hash(*issuer_hashes(root.memory.der, by), serial_number, algorithm)
    if nonce:
        builder = builder.add_extension(x509.OCSPNonce(nonce), critical=False)
    return builder.build().public_bytes(Encoding.DER)


async def _document(root: StoredAuthority, serial_number: int, *, nonce: bytes = b"", by: str = "sha1") -> Document:
    root.seconds += 10  # what was looked at is looked at again
    return await root.publications.ocsp(_ROOT, _request(root, serial_number, nonce=nonce, by=by))


async def _answer(root: StoredAuthority, certificate: Certificate, *, nonce: bytes = b"") -> ocsp.OCSPResponse:
    return ocsp.load_der_ocsp_response((await _document(root, certificate.serial_number, nonce=nonce)).content)


async def _status(root: StoredAuthority, certificate: Certificate, *, nonce: bytes = b"") -> ocsp.OCSPCertStatus:
    answer = await _answer(root, certificate, nonce=nonce)
    assert answer.response_status is ocsp.OCSPResponseStatus.SUCCESSFUL
    assert answer.serial_number == certificate.serial_number
    return answer.certificate_status


async def _issued(root: StoredAuthority) -> Certificate:
    [(certificate, _)] = await root.issue()
    return certificate


async def _revoke(root: StoredAuthority, certificate: Certificate) -> None:
    await root.revoking.revoke(root.manager, certificate.certificate_id, RevocationReason.KEY_COMPROMISE)


async def test_an_answer_is_signed_once_and_sent_again(root: StoredAuthority) -> None:
    certificate = await _issued(root)
    first = await _document(root, certificate.serial_number)
    signatures = root.token.signatures
    assert await _document(root, certificate.serial_number) == first
    assert root.token.signatures == signatures
    assert (await _document(root, certificate.serial_number, by="sha256")).content != first.content
    assert root.token.signatures == signatures + 1


async def test_a_nonce_is_signed_on_demand_and_kept_by_nobody(root: StoredAuthority) -> None:
    certificate = await _issued(root)
    await _document(root, certificate.serial_number)
    signatures = root.token.signatures
    for nonce in (b"n" * 32, b"m" * 32):
        document = await _document(root, certificate.serial_number, nonce=nonce)
        found = ocsp.load_der_ocsp_response(document.content).extensions.get_extension_for_class(x509.OCSPNonce)
        assert (found.value.nonce, document.next_update) == (nonce, None)
    assert root.token.signatures == signatures + 2
    assert root.run("SELECT count(*) FROM cryptography.ocsp_answers") == [(1,)]


async def test_an_answer_changes_as_soon_as_the_certificate_is_revoked(root: StoredAuthority) -> None:
    certificate = await _issued(root)
    assert await _status(root, certificate) is _GOOD
    await _revoke(root, certificate)
    answer = await _answer(root, certificate)
    assert answer.certificate_status is _REVOKED
    assert answer.revocation_reason is x509.ReasonFlags.key_compromise
    assert await _status(root, certificate, nonce=b"n" * 16) is _REVOKED


async def test_what_is_signed_on_demand_is_bound(root: StoredAuthority) -> None:
    certificate = await _issued(root)
    root.allowance.left = 1
    assert await _status(root, certificate, nonce=b"n" * 16) is _GOOD
    answer = await _answer(root, certificate, nonce=b"n" * 16)
    assert answer.response_status is ocsp.OCSPResponseStatus.TRY_LATER


async def test_what_the_authority_did_not_issue_costs_no_signature(root: StoredAuthority) -> None:
    certificate = await _issued(root)
    await _document(root, certificate.serial_number)
    signatures = root.token.signatures
    other = ocsp.OCSPRequestBuilder().add_certificate_by_hash(
        *issuer_hashes(authority("rsa").der, "sha256"), certificate.serial_number, hashes.SHA256()
    )
    for request, status in (
        (_request(root, 7), ocsp.OCSPResponseStatus.UNAUTHORIZED),
        (other.build().public_bytes(Encoding.DER), ocsp.OCSPResponseStatus.UNAUTHORIZED),
        (b"no request", ocsp.OCSPResponseStatus.MALFORMED_REQUEST),
    ):
        document = await root.publications.ocsp(_ROOT, request)
        assert ocsp.load_der_ocsp_response(document.content).response_status is status
        assert document.next_update is None
    assert root.token.signatures == signatures


async def test_the_job_signs_an_answer_for_each_certificate_and_none_twice(root: StoredAuthority) -> None:
    one, other = await _issued(root), await _issued(root)
    await _revoke(root, other)
    await root.rounds.run()
    signatures = root.token.signatures
    await root.rounds.run()
    assert root.token.signatures == signatures
    root.token.is_away = True
    assert await _status(root, one) is _GOOD, "its record was proven before the token went away"
    assert await _status(root, other) is _REVOKED


async def test_answers_that_end_soon_are_signed_again(root: StoredAuthority) -> None:
    await _issued(root)
    await root.rounds.run()
    signatures = root.token.signatures
    root.run("UPDATE cryptography.ocsp_answers SET next_update = now() + interval '1 hour'")
    await root.rounds.run()
    assert root.token.signatures == signatures + 1


async def test_answers_that_ended_are_forgotten(root: StoredAuthority) -> None:
    await _issued(root)
    await root.rounds.run()
    root.run("UPDATE cryptography.certificates SET not_after = now() - interval '1 minute'")
    root.run("UPDATE cryptography.ocsp_answers SET this_update = now() - interval '2 days', next_update = now() - interval '1 s'")
    await root.rounds.run()
    assert root.run("SELECT count(*) FROM cryptography.ocsp_answers") == [(0,)]


async def test_who_asks_at_the_same_moment_makes_one_signer(root: StoredAuthority) -> None:
    certificate = await _issued(root)
    await asyncio.gather(*(_document(root, certificate.serial_number, nonce=bytes((each,) * 16)) for each in range(1, 5)))
    await root.rounds.run()
    assert root.run("SELECT count(*) FROM cryptography.certificates WHERE profile = 'ocsp'") == [(1,)]


async def test_a_signer_is_renewed_in_the_last_third_of_its_life(root: StoredAuthority) -> None:
    certificate = await _issued(root)
    root.signer_lives = timedelta(hours=1)
    before = await _document(root, certificate.serial_number)
    assert before.next_update is not None
    assert before.next_update - before.this_update < timedelta(hours=2), "an answer ends with its signer"
    root.signer_lives = timedelta(days=30)
    for _ in range(2):
        await root.rounds.run()
        assert root.run("SELECT count(*) FROM cryptography.certificates WHERE profile = 'ocsp'") == [(2,)]
    after = await _document(root, certificate.serial_number)
    assert after.next_update is not None
    assert after.next_update > before.next_update, "and is signed again by the next one"


@pytest.mark.parametrize("status", [AuthorityStatus.SUPERSEDED, AuthorityStatus.DISABLED])
async def test_an_authority_that_issues_no_more_goes_on_answering(root: StoredAuthority, status: AuthorityStatus) -> None:
    certificate = await _issued(root)
    before = await root.read()
    after = before.changed(status=status, superseded_at=await root.authorities.now())
    await root.authorities.change(root.manager, after, "authority.changed", {})
    await root.rounds.run()
    assert await _status(root, certificate) is _GOOD
    await _revoke(root, certificate)
    assert await _status(root, certificate) is _REVOKED
    assert len((await root.publishing.publish(after, 0)).crl.entries) == 1


# A hostile database --------------------------------------------------------------------------------------------------------


async def test_a_row_that_is_no_longer_revoked_stays_revoked(root: StoredAuthority) -> None:
    certificate = await _issued(root)
    mac = root.run(_MAC, certificate.certificate_id)[0][0]
    await _document(root, certificate.serial_number)
    good = root.run("SELECT answer, this_update, next_update FROM cryptography.ocsp_answers")[0]
    await _revoke(root, certificate)
    assert await _status(root, certificate) is _REVOKED
    root.run(_UNREVOKE, mac, certificate.certificate_id)
    root.run("UPDATE cryptography.ocsp_answers SET answer = %s, is_revoked = FALSE, this_update = %s, next_update = %s", *good)
    for is_restarted in (False, True):
        if is_restarted:
            root.restart()
        assert await _status(root, certificate) is _REVOKED
        assert await _status(root, certificate, nonce=b"n" * 32) is _REVOKED
        root.run("UPDATE cryptography.ocsp_answers SET answer = %s, is_revoked = FALSE", good[0])


async def test_what_the_journal_knows_is_known_without_the_token(root: StoredAuthority) -> None:
    certificate, other = await _issued(root), await _issued(root)
    mac = root.run(_MAC, certificate.certificate_id)[0][0]
    await _document(root, certificate.serial_number)
    good = root.run("SELECT answer FROM cryptography.ocsp_answers")[0][0]
    await _revoke(root, certificate)
    root.run(_UNREVOKE, mac, certificate.certificate_id)
    root.run("UPDATE cryptography.ocsp_answers SET answer = %s, is_revoked = FALSE", good)
    root.restart()
    assert await _status(root, other) is _GOOD, "the process knows the authority, and not the record"
    root.token.is_away = True
    answer = await _answer(root, certificate)
    assert answer.response_status is ocsp.OCSPResponseStatus.TRY_LATER


async def test_an_answer_that_is_put_back_is_not_sent(root: StoredAuthority) -> None:
    certificate = await _issued(root)
    await _document(root, certificate.serial_number)
    good = root.run("SELECT answer FROM cryptography.ocsp_answers")[0][0]
    await _revoke(root, certificate)
    root.run("UPDATE cryptography.ocsp_answers SET answer = %s, is_revoked = FALSE", good)
    assert await _status(root, certificate) is _REVOKED


async def test_planted_answers_are_not_sent(root: StoredAuthority) -> None:
    one, other = await _issued(root), await _issued(root)
    await _document(root, other.serial_number)
    of_other = root.run("SELECT answer FROM cryptography.ocsp_answers")[0][0]
    await _document(root, one.serial_number)
    for planted in (b"nothing", of_other, of_other[:-1] + b"\0"):
        root.run("UPDATE cryptography.ocsp_answers SET answer = %s", planted)
        assert await _status(root, one) is _GOOD


async def test_a_planted_signer_signs_nothing(root: StoredAuthority) -> None:
    certificate = await _issued(root)
    await _document(root, certificate.serial_number)
    root.run("UPDATE cryptography.certificates SET record_mac = decode(repeat('00', 32), 'hex') WHERE profile = 'ocsp'")
    root.restart()
    assert await _status(root, certificate, nonce=b"n" * 32) is _GOOD
    assert root.run("SELECT count(*) FROM cryptography.certificates WHERE profile = 'ocsp'") == [(2,)], "a new one was made"


async def test_a_certificate_whose_record_was_edited_has_no_answer(root: StoredAuthority) -> None:
    certificate = await _issued(root)
    await _document(root, certificate.serial_number)
    root.run("UPDATE cryptography.certificates SET profile = 'client' WHERE id = %s", certificate.certificate_id)
    answer = await _answer(root, certificate, nonce=b"n" * 32)
    assert answer.response_status is ocsp.OCSPResponseStatus.TRY_LATER


# Parts that are away -------------------------------------------------------------------------------------------------------


async def test_without_the_token_a_nonce_has_no_answer_and_a_stored_answer_is_sent(root: StoredAuthority) -> None:
    certificate = await _issued(root)
    await _document(root, certificate.serial_number)
    root.token.is_away = True
    assert await _status(root, certificate) is _GOOD
    answer = await _answer(root, certificate, nonce=b"n" * 32)
    assert answer.response_status is ocsp.OCSPResponseStatus.TRY_LATER


async def test_without_the_database_nothing_is_answered(root: StoredAuthority, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = await _issued(root)
    await _document(root, certificate.serial_number)

    async def fetch(*_: object) -> None:
        raise KmsError(Reason.STORE_UNAVAILABLE, "the database does not answer")

    monkeypatch.setattr(Pool, "fetch", fetch)
    with pytest.raises(KmsError) as caught:
        await _document(root, certificate.serial_number)
    assert caught.value.reason is Reason.STORE_UNAVAILABLE
