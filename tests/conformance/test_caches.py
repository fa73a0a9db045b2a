"""Promise 3, with two services on one database: what one has changed, the other does not overlook, whatever it remembers."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from kms.dev.postgres import EmbeddedPostgres
from kms.v1 import crypto_pb2 as cpb
from kms.v1 import keys_pb2 as kpb
from tests.conformance.refusals import refusal
from tests.conformance.requests import made
from tests.fixtures.postgres import cloned
from tests.fixtures.server import Caller, RunningServer, deployed

TRIALS = 100
SIGN = cpb.SignRequest(key="k", message=b"m")


@pytest.fixture(scope="module")
def services(
    postgres: EmbeddedPostgres, token_template: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[RunningServer, RunningServer]]:
    """Two processes of one deployment."""
    with (
        cloned(postgres) as database,
        deployed(tmp_path_factory.mktemp("two"), database, token_template) as deployment,
        deployment.serving() as one,
        deployment.serving() as other,
    ):
        yield one, other


@pytest.fixture
def callers(services: tuple[RunningServer, RunningServer]) -> tuple[Caller, Caller]:
    """One user of both."""
    here = services[0].caller()
    return here, services[1].caller(here.user_id)


def as_superuser(services: tuple[RunningServer, RunningServer], query: str, *values: object) -> None:
    with psycopg.connect(services[0].deployment.database.admin_dsn, autocommit=True) as connection:
        connection.execute(query.encode(), values)


@contextmanager
def unheard(services: tuple[RunningServer, RunningServer]) -> Iterator[None]:
    """Neither service hears of a change: that what it remembers is not so any more, it has to find out."""
    triggers = (("authentication.users", "tr_users_tell_change"), ("cryptography.keys", "tr_keys_tell_change"))
    for table, trigger in triggers:
        as_superuser(services, f"ALTER TABLE {table} DISABLE TRIGGER {trigger}")
    try:
        yield
    finally:
        for table, trigger in triggers:
            as_superuser(services, f"ALTER TABLE {table} ENABLE TRIGGER {trigger}")


def test_no_use_that_begins_after_a_revocation_has_returned_elsewhere_succeeds(callers: tuple[Caller, Caller]) -> None:
    here, there = callers
    for number in range(TRIALS):
        name = f"k{number}"
        made(here, "secp256k1", name=name)
        request = cpb.SignRequest(key=name, message=b"m")
        there.crypto.Sign(request)
        here.keys.RevokeKey(kpb.RevokeKeyRequest(key=name, reason="r"))
        assert refusal(there.crypto.Sign, request).reason == "KEY_REVOKED"


def test_nobody_is_refused_for_what_has_ended_elsewhere(callers: tuple[Caller, Caller]) -> None:
    here, there = callers
    made(here, "aes")
    ciphertext = there.crypto.Encrypt(cpb.EncryptRequest(key="k", plaintext=b"p")).ciphertext
    for _ in range(50):
        here.keys.DeactivateKey(kpb.DeactivateKeyRequest(key="k"))
        assert refusal(there.crypto.Encrypt, cpb.EncryptRequest(key="k", plaintext=b"p")).reason == "KEY_INACTIVE"
        assert there.crypto.Decrypt(cpb.DecryptRequest(ciphertext=ciphertext, key="k")).plaintext == b"p"
        here.keys.ReactivateKey(kpb.ReactivateKeyRequest(key="k"))
        assert there.crypto.Encrypt(cpb.EncryptRequest(key="k", plaintext=b"p")).ciphertext
    assert there.keys.GetKey(kpb.GetKeyRequest(key="k")).key.usage_count == 51


def test_a_change_of_the_callers_version_elsewhere_neither_refuses_nor_is_overlooked(
    callers: tuple[Caller, Caller], services: tuple[RunningServer, RunningServer]
) -> None:
    here, _ = callers
    made(here, "secp256k1")
    batch = cpb.BatchSignRequest(items=[SIGN] * 20)
    for _ in range(20):
        here.crypto.Sign(SIGN)
        as_superuser(services, "UPDATE authentication.users SET version = version + 1 WHERE id = %s", here.user_id)
        assert here.crypto.Sign(SIGN).signature
        as_superuser(services, "UPDATE authentication.users SET version = version + 1 WHERE id = %s", here.user_id)
        assert all(item.result.signature for item in here.crypto.BatchSign(batch).items)
    as_superuser(services, "UPDATE authentication.users SET locked_until = now() + interval '1 hour' WHERE id = %s", here.user_id)
    assert refusal(here.crypto.Sign, SIGN).reason == "CREDENTIALS_INVALID"


def test_a_repeat_is_authorised_anew_by_what_is_and_not_by_what_is_remembered(
    callers: tuple[Caller, Caller], services: tuple[RunningServer, RunningServer]
) -> None:
    here, there = callers
    made(here, "aes")
    request = cpb.GenerateDataKeyRequest(key="k", size_bytes=32, request_id="once")
    first = there.crypto.GenerateDataKey(request)
    assert there.crypto.GenerateDataKey(request).plaintext == first.plaintext
    here.keys.MarkKeyCompromised(kpb.MarkKeyCompromisedRequest(key="k", reason="r"))
    assert refusal(there.crypto.GenerateDataKey, request).reason == "KEY_COMPROMISED"
    made(here, "aes", name="other")
    request = cpb.GenerateDataKeyRequest(key="other", size_bytes=32, request_id="twice")
    there.crypto.GenerateDataKey(request)
    as_superuser(services, "UPDATE authentication.users SET locked_until = now() + interval '1 hour' WHERE id = %s", here.user_id)
    assert refusal(there.crypto.GenerateDataKey, request).reason == "CREDENTIALS_INVALID"


@pytest.mark.parametrize("hears", [True, False])
def test_what_is_not_recorded_trusts_what_is_a_second_old_and_no_longer(
    callers: tuple[Caller, Caller], services: tuple[RunningServer, RunningServer], hears: bool
) -> None:
    here, there = callers
    made(here, "secp256k1")
    signature = here.crypto.Sign(SIGN).signature
    verify = cpb.VerifyRequest(key="k", message=b"m", signature=signature)
    here.keys.RevokeKey(kpb.RevokeKeyRequest(key="k", reason="r"))
    assert there.crypto.Verify(verify).valid
    if not hears:
        cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query = 'LISTEN kms_changed'"
        as_superuser(services, cut)
    rename = "UPDATE cryptography.keys SET key_name = 'gone' WHERE user_id = %s"
    services[0].deployment.edit_keys(rename, here.user_id)
    time.sleep(1.0)
    assert refusal(there.crypto.Verify, verify).reason == "KEY_NOT_FOUND"
    assert refusal(there.keys.GetPublicKey, kpb.GetPublicKeyRequest(key="k")).reason == "KEY_NOT_FOUND"
    as_superuser(services, "UPDATE authentication.users SET deleted_at = now() WHERE id = %s", here.user_id)
    time.sleep(1.0)
    assert refusal(there.crypto.Verify, verify).reason == "CREDENTIALS_INVALID"


def test_a_permission_to_use_a_compromised_key_given_or_taken_elsewhere_holds_for_the_next_use(
    callers: tuple[Caller, Caller], services: tuple[RunningServer, RunningServer]
) -> None:
    here, there = callers
    made(here, "aes")
    ciphertext = here.crypto.Encrypt(cpb.EncryptRequest(key="k", plaintext=b"p")).ciphertext
    here.keys.MarkKeyCompromised(kpb.MarkKeyCompromisedRequest(key="k", reason="r"))
    request = cpb.DecryptRequest(ciphertext=ciphertext, allow_compromised=True)
    with unheard(services):
        for _ in range(10):
            for caller in callers:
                assert refusal(caller.crypto.Decrypt, request).reason == "PERMISSION_DENIED"
            as_superuser(services, "SELECT authentication.assign_role(%s, 'recovery')", here.user_id)
            for caller in callers:
                assert caller.crypto.Decrypt(request).plaintext == b"p"
            as_superuser(services, "DELETE FROM authentication.user_roles WHERE user_id = %s", here.user_id)
            as_superuser(services, "UPDATE authentication.users SET version = version + 1 WHERE id = %s", here.user_id)
        assert refusal(there.crypto.Decrypt, request).reason == "PERMISSION_DENIED"


def test_nobody_misses_the_permission_of_a_state_in_which_the_key_was_a_moment_ago(
    callers: tuple[Caller, Caller], services: tuple[RunningServer, RunningServer]
) -> None:
    here, there = callers
    role = "INSERT INTO authentication.roles (name, permissions) VALUES ('revoked-only', '[\"keys:use-revoked\"]')"
    as_superuser(services, role)
    as_superuser(services, "SELECT authentication.assign_role(%s, 'revoked-only')", here.user_id)
    with unheard(services):
        for number in range(10):
            name = f"k{number}"
            made(here, "aes", name=name)
            ciphertext = here.crypto.Encrypt(cpb.EncryptRequest(key=name, plaintext=b"p")).ciphertext
            request = cpb.DecryptRequest(ciphertext=ciphertext, allow_compromised=True, allow_revoked=True)
            here.keys.MarkKeyCompromised(kpb.MarkKeyCompromisedRequest(key=name, reason="r"))
            assert refusal(there.crypto.Decrypt, request).metadata == {"permission": "keys:use-compromised"}
            here.keys.RevokeKey(kpb.RevokeKeyRequest(key=name, reason="r"))
            assert there.crypto.Decrypt(request).plaintext == b"p"


def test_a_role_given_or_taken_elsewhere_holds_for_the_next_use(
    callers: tuple[Caller, Caller], services: tuple[RunningServer, RunningServer]
) -> None:
    here, _ = callers
    made(here, "secp256k1")
    give = (
        "INSERT INTO authentication.user_roles (user_id, role_id) SELECT %s, id FROM authentication.roles WHERE name = 'auditor'"
    )
    take = "DELETE FROM authentication.user_roles WHERE user_id = %s"
    advance = "UPDATE authentication.users SET version = version + 1 WHERE id = %s"
    for number in range(10):
        repeated = cpb.SignRequest(key="k", message=b"m", request_id=f"r{number}")
        here.crypto.Sign(repeated)
        for query in (give, advance):
            as_superuser(services, query, here.user_id)
        assert refusal(here.crypto.Sign, SIGN if number % 2 else repeated).reason == "PERMISSION_DENIED"
        for query in (take, advance):
            as_superuser(services, query, here.user_id)
        assert here.crypto.Sign(SIGN).signature
