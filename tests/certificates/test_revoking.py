"""Revocation and CRLs on a real database: who may revoke, what the CRL lists, and what a hostile database changes of that."""

import asyncio
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import pytest
from cryptography import x509

from kms.certificates.certificate import Certificate, Revocation, RevocationReason
from kms.certificates.postgres.revocations import read_crl_status
from kms.certificates.publishing.documents import IssuerPath
from kms.certificates.x509.crls import parse_crl
from kms.domain.errors import KmsError, Reason
from kms.domain.permissions import Permission
from kms.store.pool import Pool
from tests.certificates.stored_authority import StoredAuthority, stored_authority
from tests.fixtures.postgres import Database

_ROOT = IssuerPath("root", 1)
_KEY_COMPROMISE = RevocationReason.KEY_COMPROMISE
_UNREVOKE = """
    UPDATE cryptography.certificates
    SET revocation_status = 'valid', revoked_at = NULL, revocation_reason = NULL, version = 2, record_mac = %s
    WHERE id = %s
"""
_SNAPSHOT = "SELECT record_mac FROM cryptography.certificates WHERE id = %s"


@pytest.fixture
async def root(store: Pool, database: Database, tmp_path: Path) -> StoredAuthority:
    return await stored_authority(store, database, tmp_path)


@pytest.fixture
async def sharded(store: Pool, database: Database, tmp_path: Path) -> StoredAuthority:
    return await stored_authority(store, database, tmp_path, shards=3)


async def _listed(root: StoredAuthority, shard: int = 0) -> set[int]:
    """Return the serial numbers on the CRL that is published."""
    root.seconds += 10  # what was looked at is looked at again
    document = await root.publications.crl(_ROOT, shard)
    return set(parse_crl(document.content, root.memory.der).entries)


async def _refused(root: StoredAuthority, shard: int = 0) -> Reason:
    with pytest.raises(KmsError) as caught:
        await _listed(root, shard)
    return caught.value.reason


async def _issued(root: StoredAuthority, count: int = 1) -> list[Certificate]:
    return [certificate for certificate, _ in await root.issue(count=count)]


async def test_a_certificate_is_on_the_list_once_it_is_revoked(root: StoredAuthority) -> None:
    one, other = await _issued(root, 2)
    assert await _listed(root) == set()
    revoked = await root.revoking.revoke(root.manager, one.certificate_id, _KEY_COMPROMISE)
    assert revoked.revocation is not None
    assert revoked.revocation.reason is _KEY_COMPROMISE
    assert await _listed(root) == {one.serial_number}
    again = await root.revoking.revoke(root.manager, one.certificate_id, RevocationReason.SUPERSEDED)
    assert again == revoked, "the first reason stays"
    await root.revoking.revoke(root.manager, other.certificate_id, RevocationReason.SUPERSEDED)
    assert await _listed(root) == {one.serial_number, other.serial_number}


async def test_the_owner_an_issuer_of_the_profile_and_the_manager_may_revoke(root: StoredAuthority) -> None:
    owner, stranger = root.user("owner"), root.user("stranger", Permission.CERTS_ISSUE, Permission.CERTS_MANAGE)
    issuer, other = (root.user(name, Permission.CERTS_ISSUE) for name in ("issuer", "other"))
    await root.let(issuer, "server")
    await root.let(other, "client")
    for caller, expected in (
        (owner, None),
        (issuer, None),
        (root.manager, None),
        (other, Reason.PERMISSION_DENIED),
        (stranger, Reason.CERTIFICATE_NOT_FOUND),
    ):
        [(certificate, _)] = await root.issue(owner=owner.user.user_id)
        try:
            await root.revoking.revoke(caller, certificate.certificate_id, _KEY_COMPROMISE)
        except KmsError as error:
            assert error.reason is expected, caller.user.name
        else:
            assert expected is None, caller.user.name


async def test_a_role_that_ended_ends_the_right_to_revoke(root: StoredAuthority) -> None:
    former = root.user("former")
    await root.let(former, "server")
    [certificate] = await _issued(root)
    with pytest.raises(KmsError) as caught:
        await root.revoking.revoke(former, certificate.certificate_id, _KEY_COMPROMISE)
    assert caught.value.reason is Reason.PERMISSION_DENIED


async def test_who_revokes_at_the_same_moment_agrees(root: StoredAuthority) -> None:
    [certificate] = await _issued(root)
    calls = [root.revoking.revoke(root.manager, certificate.certificate_id, reason) for reason in list(RevocationReason)[:4]]
    revoked = await asyncio.gather(*calls)
    assert len({each.revocation for each in revoked}) == 1


async def test_lists_that_are_made_at_the_same_moment_lack_nothing(root: StoredAuthority) -> None:
    certificates = await _issued(root, 8)
    await asyncio.gather(*(root.revoking.revoke(root.manager, each.certificate_id, _KEY_COMPROMISE) for each in certificates))
    assert await _listed(root) == {each.serial_number for each in certificates}
    made = root.run("SELECT count(*) FROM audit.security_events WHERE event_type = 'crl.published'")[0][0]
    assert made <= len(certificates), "who waits finds their certificate on the list of another"


async def test_workers_that_publish_at_the_same_moment_lose_nothing(
    root: StoredAuthority, store: Pool, database: Database
) -> None:
    one, other = await _issued(root, 2)
    beside = StoredAuthority(
        store, database, root.memory, root.token, root.allowance, root.journal, root.manager, root.service_user, root.authority_id
    )
    await asyncio.gather(
        root.revoking.revoke(root.manager, one.certificate_id, _KEY_COMPROMISE),
        beside.revoking.revoke(root.manager, other.certificate_id, _KEY_COMPROMISE),
    )
    for each in (root, beside):
        assert await _listed(each) == {one.serial_number, other.serial_number}


async def test_the_job_makes_lists_that_are_missing_or_old_and_no_others(root: StoredAuthority) -> None:
    await root.publishing.publish_due()
    assert root.token.signatures == 1
    await root.publishing.publish_due()
    assert root.token.signatures == 1
    root.run("UPDATE cryptography.crls SET this_update = this_update - interval '2 days'")
    await root.publishing.publish_due()
    assert root.token.signatures == 1, "the list itself says when it was made"


async def test_a_revocation_whose_list_failed_is_published_by_the_job(root: StoredAuthority) -> None:
    [certificate] = await _issued(root)
    await root.publishing.publish_due()
    root.token.signatures, sign = 0, root.token.sign_for

    async def away(*_: object) -> bytes:
        raise KmsError(Reason.HSM_UNAVAILABLE, "the token does not answer")

    root.token.sign_for = away  # type: ignore[assignment, method-assign]  # the token goes away after the MAC was made
    await root.revoking.revoke(root.manager, certificate.certificate_id, _KEY_COMPROMISE)
    root.token.sign_for = sign  # type: ignore[method-assign]
    await root.publishing.publish_due()
    assert root.token.signatures == 1
    assert await _listed(root) == {certificate.serial_number}


async def test_an_expired_certificate_is_on_one_more_list(root: StoredAuthority) -> None:
    [(short, _)] = await root.issue(ends_in=timedelta(seconds=1))
    [(long, _)] = await root.issue()
    for certificate in (short, long):
        await root.revoking.revoke(root.manager, certificate.certificate_id, _KEY_COMPROMISE)
    authority = await root.read()
    await asyncio.sleep((short.not_after + timedelta(seconds=1) - await root.authorities.now()).total_seconds())
    first = await root.publishing.publish(authority, 0, even_unchanged=True)
    assert set(first.crl.entries) == {short.serial_number, long.serial_number}, "one list that was made after its end"
    second = await root.publishing.publish(authority, 0, even_unchanged=True)
    assert set(second.crl.entries) == {long.serial_number}


async def test_each_shard_has_a_list_of_its_own(sharded: StoredAuthority) -> None:
    certificates = await _issued(sharded, 6)
    await asyncio.gather(
        *(sharded.revoking.revoke(sharded.manager, each.certificate_id, _KEY_COMPROMISE) for each in certificates)
    )
    for shard in (1, 2, 3):
        expected = {each.serial_number for each in certificates if each.crl_shard == shard}
        assert expected
        assert await _listed(sharded, shard) == expected
        crl = x509.load_der_x509_crl((await sharded.publications.crl(_ROOT, shard)).content)
        point = crl.extensions.get_extension_for_class(x509.IssuingDistributionPoint).value
        assert [name.value for name in point.full_name or ()] == [f"http://pki.example.com/crl/root/1/{shard}.crl"]
    assert await _listed(sharded, 0) == set()
    assert await _refused(sharded, 4) is Reason.AUTHORITY_NOT_FOUND


async def test_what_is_not_there_is_not_published(root: StoredAuthority) -> None:
    for path in (IssuerPath("other", 1), IssuerPath("root", 2)):
        with pytest.raises(KmsError) as caught:
            await root.publications.crl(path, 0)
        assert caught.value.reason is Reason.AUTHORITY_NOT_FOUND


async def test_a_list_that_is_not_made_anew_is_a_warning_long_before_it_ends(root: StoredAuthority, store: Pool) -> None:
    await root.publishing.publish_due()
    [status] = await read_crl_status(store)
    assert (status.authority, status.shards, status.entries, status.warning) == ("root/1", 1, 0, "")
    assert 0 <= status.age_seconds < 3600 < status.left_seconds
    for left, word in (("3 days", "ends in 7"), ("-1 second", "has ended")):
        root.run(f"UPDATE cryptography.crls SET this_update = now() - interval '7 days', next_update = now() + interval '{left}'")
        [status] = await read_crl_status(store)
        assert word in status.warning


async def test_a_line_of_the_journal_that_a_crash_left_out_is_written_with_the_next_list(root: StoredAuthority) -> None:
    [certificate] = await _issued(root)
    mac = root.run(_SNAPSHOT, certificate.certificate_id)[0][0]
    await _listed(root)
    killed = replace(root.certificates, journal=None)  # as if the process had ended before it wrote the line
    assert await killed.revoke(root.manager, certificate.revoked(Revocation(await killed.now(), _KEY_COMPROMISE)))
    await root.publishing.publish_due()
    root.run(_UNREVOKE, mac, certificate.certificate_id)
    root.run("DELETE FROM cryptography.crls")
    root.restart()
    assert await _listed(root) == {certificate.serial_number}


# A hostile database --------------------------------------------------------------------------------------------------------


async def test_a_row_that_is_no_longer_revoked_stays_on_the_list(root: StoredAuthority) -> None:
    [certificate] = await _issued(root)
    mac = root.run(_SNAPSHOT, certificate.certificate_id)[0][0]
    await root.revoking.revoke(root.manager, certificate.certificate_id, _KEY_COMPROMISE)
    root.run(_UNREVOKE, mac, certificate.certificate_id)
    await root.publishing.publish(await root.read(), 0, even_unchanged=True)
    assert await _listed(root) == {certificate.serial_number}
    with pytest.raises(KmsError) as caught:
        await root.certificates.find_any(certificate.certificate_id)
    assert caught.value.reason is Reason.RECORD_INVALID


async def test_a_row_and_the_list_that_are_put_back_together_bring_nothing_back(root: StoredAuthority) -> None:
    [certificate] = await _issued(root)
    mac = root.run(_SNAPSHOT, certificate.certificate_id)[0][0]
    await _listed(root)
    old = root.run("SELECT number, crl, entries, this_update, next_update FROM cryptography.crls")[0]
    await root.revoking.revoke(root.manager, certificate.certificate_id, _KEY_COMPROMISE)
    for is_restarted in (False, True):
        root.run(_UNREVOKE, mac, certificate.certificate_id)
        root.run("UPDATE cryptography.crls SET number = %s, crl = %s, entries = %s, this_update = %s, next_update = %s", *old)
        if is_restarted:
            root.restart()
        assert await _listed(root) == {certificate.serial_number}, f"restarted: {is_restarted}"


async def test_without_a_journal_no_list_is_older_than_one_that_was_seen(root: StoredAuthority) -> None:
    root.has_journal = False
    root.restart()
    [certificate] = await _issued(root)
    await _listed(root)
    old = root.run("SELECT number, crl FROM cryptography.crls")[0]
    await root.revoking.revoke(root.manager, certificate.certificate_id, _KEY_COMPROMISE)
    root.run("UPDATE cryptography.crls SET number = %s, crl = %s", *old)
    assert await _listed(root) == {certificate.serial_number}


_EDITS = {
    "valid again": _UNREVOKE,
    "ended": "UPDATE cryptography.certificates SET not_after = now() - interval '1 day', record_mac = %s WHERE id = %s",
    "of another shard": "UPDATE cryptography.certificates SET crl_shard = 1, record_mac = %s WHERE id = %s",
    "removed": "DELETE FROM cryptography.certificates WHERE record_mac <> %s AND id = %s",
}


@pytest.mark.parametrize("edit", _EDITS.values(), ids=_EDITS)
async def test_without_a_journal_a_row_that_is_edited_stays_on_the_list(root: StoredAuthority, edit: str) -> None:
    root.has_journal = False
    root.restart()
    [certificate] = await _issued(root)
    mac = root.run(_SNAPSHOT, certificate.certificate_id)[0][0]
    await root.revoking.revoke(root.manager, certificate.certificate_id, _KEY_COMPROMISE)
    root.run(edit, mac, certificate.certificate_id)
    for _ in range(2):
        await root.publishing.publish(await root.read(), 0, even_unchanged=True)
    root.restart()
    assert await _listed(root) == {certificate.serial_number}


async def test_a_row_that_is_removed_stays_on_the_list(root: StoredAuthority) -> None:
    [certificate] = await _issued(root)
    await root.revoking.revoke(root.manager, certificate.certificate_id, _KEY_COMPROMISE)
    root.run("DELETE FROM cryptography.certificates")
    root.run("DELETE FROM cryptography.crls")
    root.restart()
    assert await _listed(root) == {certificate.serial_number}


async def test_an_end_that_is_brought_forward_takes_nothing_off_the_list(root: StoredAuthority) -> None:
    [certificate] = await _issued(root)
    await root.revoking.revoke(root.manager, certificate.certificate_id, _KEY_COMPROMISE)
    root.run("UPDATE cryptography.certificates SET not_after = now() - interval '1 day'")
    for _ in range(2):
        await root.publishing.publish(await root.read(), 0, even_unchanged=True)
    assert await _listed(root) == {certificate.serial_number}


async def test_a_planted_revocation_is_on_no_list(root: StoredAuthority) -> None:
    one, other = await _issued(root, 2)
    revoked = other.revoked(Revocation(await root.certificates.now(), _KEY_COMPROMISE))
    assert await root.certificates.revoke(root.manager, revoked)
    planted = "UPDATE cryptography.certificates SET revocation_status = 'revoked', revoked_at = now(), revocation_reason = 1"
    root.run(f"{planted} WHERE id = %s", one.certificate_id)
    await root.publishing.publish(await root.read(), 0, even_unchanged=True)
    assert await _listed(root) == {other.serial_number}, "beside a planted row those that are ours are still listed"


async def test_a_planted_list_is_not_published(root: StoredAuthority) -> None:
    [certificate] = await _issued(root)
    await root.revoking.revoke(root.manager, certificate.certificate_id, _KEY_COMPROMISE)
    for planted in (b"nothing", root.memory.der, root.run("SELECT crl FROM cryptography.crls")[0][0][:-1] + b"\0"):
        for is_restarted in (False, True):
            root.run("UPDATE cryptography.crls SET crl = %s, number = 9223372036854775000", planted)
            if is_restarted:
                root.restart()
            assert await _listed(root) == {certificate.serial_number}


async def test_the_list_of_another_shard_is_not_published(sharded: StoredAuthority) -> None:
    await sharded.publishing.publish_due()
    lists = dict(sharded.run("SELECT shard, crl FROM cryptography.crls"))
    sharded.run("UPDATE cryptography.crls SET crl = %s WHERE shard = 1", lists[2])
    sharded.restart()
    document = await sharded.publications.crl(_ROOT, 1)
    assert parse_crl(document.content, sharded.memory.der).distribution_point.endswith("/1.crl")


async def test_an_authority_that_is_planted_is_not_published(root: StoredAuthority) -> None:
    root.run("UPDATE cryptography.certificate_authorities SET certificate = %s", (await root.issue())[0][1].der)
    assert await _refused(root) is Reason.RECORD_INVALID


# Parts that are away -------------------------------------------------------------------------------------------------------


async def test_lists_are_published_while_the_token_is_away(root: StoredAuthority) -> None:
    [certificate] = await _issued(root)
    await root.revoking.revoke(root.manager, certificate.certificate_id, _KEY_COMPROMISE)
    assert await _listed(root) == {certificate.serial_number}
    root.token.is_away = True
    assert await _listed(root) == {certificate.serial_number}
    root.restart()
    assert await _refused(root) is Reason.HSM_UNAVAILABLE, "a process that began meanwhile can prove nothing"


async def test_lists_are_published_while_the_database_is_away(root: StoredAuthority, monkeypatch: pytest.MonkeyPatch) -> None:
    [certificate] = await _issued(root)
    await root.revoking.revoke(root.manager, certificate.certificate_id, _KEY_COMPROMISE)
    assert await _listed(root) == {certificate.serial_number}

    async def fetch(*_: object) -> None:
        raise KmsError(Reason.STORE_UNAVAILABLE, "the database does not answer")

    monkeypatch.setattr(Pool, "fetch", fetch)
    assert await _listed(root) == {certificate.serial_number}
    with pytest.raises(KmsError) as caught:
        await root.publications.crl(IssuerPath("other", 1), 0)
    assert caught.value.reason is Reason.STORE_UNAVAILABLE


async def test_an_unknown_certificate_is_not_found(root: StoredAuthority) -> None:
    with pytest.raises(KmsError) as caught:
        await root.revoking.revoke(root.manager, uuid4(), _KEY_COMPROMISE)
    assert caught.value.reason is Reason.CERTIFICATE_NOT_FOUND
