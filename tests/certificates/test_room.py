"""How many certificates there may be: of a user who needs nobody's leave, and on a CRL that is signed as it is."""

import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast
from uuid import uuid4

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from kms.app.limits import MESSAGE_BYTES_MAX
from kms.app.ports import Call
from kms.certificates import issuer
from kms.certificates.certificate import Issuance, Revocation, RevocationReason
from kms.certificates.crl import Crl
from kms.certificates.issuer import Draft, Issuer
from kms.certificates.names import EMPTY, GeneralName, NameKind
from kms.certificates.profiles import BUILT_IN
from kms.certificates.service_keys import ServiceKeys
from kms.certificates.x509.crls import build_crl
from kms.domain.errors import KmsError, Reason
from kms.domain.permissions import Permission
from kms.store.pool import Pool
from tests.certificates.memory_authority import authority
from tests.certificates.stored_authority import StoredAuthority, stored_authority
from tests.fixtures.postgres import Database

_KEY = ec.generate_private_key(ec.SECP256R1()).public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


async def _random(size: int) -> bytes:
    return os.urandom(size)


async def _certified(root: StoredAuthority) -> StoredAuthority:
    """Return the authority with the record of its own certificate, beside that of another certificate."""
    [(like, _)] = await root.issue()
    serial_number = x509.load_der_x509_certificate(root.memory.der).serial_number
    intent = replace(like, certificate_id=uuid4(), serial_number=serial_number, issuance=Issuance.INTENDED, der=b"", version=1)
    await root.certificates.add(None, intent, await root.read())
    await root.certificates.complete(None, intent.issued(root.memory.der))
    return root


async def _issue(root: StoredAuthority, call: Call) -> None:
    names = (GeneralName(NameKind.URI, f"kms://test/user/{call.user.user_id}"),)
    draft = Draft(call.user.user_id, None, BUILT_IN["client"], EMPTY, names, _KEY)
    # What the token signs is signed in memory.
    issuing = Issuer(root.certificates, cast(ServiceKeys, root.token), _random)
    await issuing.issue(call, await root.read(), draft)


async def _is_refused(root: StoredAuthority, call: Call) -> bool:
    try:
        await _issue(root, call)
    except KmsError as error:
        assert error.reason is Reason.USAGE_LIMIT_REACHED
        return True
    return False


async def test_a_user_gets_so_many_certificates_by_themselves(
    store: Pool, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = await _certified(await stored_authority(store, database, tmp_path, memory=authority("p256", datetime.now(UTC))))
    monkeypatch.setattr(issuer, "OWN_MAX", 2)
    one, other, granted = root.user("one"), root.user("other"), root.user("granted", Permission.CERTS_ISSUE)
    await root.let(granted, "client")
    assert [await _is_refused(root, one) for _ in range(3)] == [False, False, True]
    assert not await _is_refused(root, other)
    assert [await _is_refused(root, granted) for _ in range(3)] == [False] * 3
    root.run("UPDATE cryptography.certificates SET not_after = now() - interval '3 days' WHERE user_id = %s", one.user.user_id)
    assert not await _is_refused(root, one)


async def test_no_more_is_issued_than_a_crl_that_is_signed_as_it_is_can_list(
    store: Pool, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = await _certified(await stored_authority(store, database, tmp_path, memory=authority("ed25519", datetime.now(UTC))))
    monkeypatch.setattr(issuer, "LISTED_MAX", 4)
    granted = root.user("granted", Permission.CERTS_ISSUE)
    await root.let(granted, "client")
    assert [await _is_refused(root, granted) for _ in range(3)] == [False, False, True]


def test_a_crl_of_so_many_certificates_can_be_signed() -> None:
    memory, now = authority("ed25519"), datetime(2026, 1, 1, tzinfo=UTC)
    revocation = Revocation(now, RevocationReason.KEY_COMPROMISE)
    entries = {2**158 + number: revocation for number in range(issuer.LISTED_MAX)}
    crl = Crl(int(now.timestamp() * 1000), now, now + timedelta(days=7), "http://pki.example.com/crl/root/1/1.crl", entries)
    assert len(build_crl(crl, memory.der).to_sign) < MESSAGE_BYTES_MAX - 2048, "the name of the issuer may be longer"
