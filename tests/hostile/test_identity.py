"""A database that answers for another user: no answer decides who calls, or whose a key is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc
import pytest

from kms.v1 import crypto_pb2 as cpb
from kms.v1 import keys_pb2 as kpb
from tests.conformance.refusals import refusal, refusal_of
from tests.conformance.requests import made
from tests.fixtures.server import Caller, RunningServer
from tests.hostile.conftest import Superuser

_CURRENT_USER = """
    CREATE OR REPLACE FUNCTION authentication.current_user_id() RETURNS UUID LANGUAGE sql STABLE
    RETURN {}
"""
_COLUMNS = """
    SELECT attname AS name FROM pg_attribute
    WHERE attrelid = 'cryptography.keys'::regclass AND attnum > 0 AND NOT attisdropped
"""
_HONEST = "nullif(current_setting('app.user_id', true), '')::uuid"
_FIND = """
    CREATE OR REPLACE FUNCTION authentication.find_user_by_uri(uri_user_id UUID)
    RETURNS TABLE (id UUID, username VARCHAR, version INTEGER, permissions TEXT[])
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
    AS $$ SELECT u.id, u.username, u.version, ARRAY[]::TEXT[] FROM authentication.users AS u WHERE u.id = '{}' $$
"""


@pytest.fixture
def victim(attacked: RunningServer) -> Caller:
    caller = attacked.caller()
    made(caller, "secp256k1", name="signer")
    made(caller, "aes", name="box")
    return caller


@contextmanager
def function(superuser: Superuser, name: str, replacement: str) -> Iterator[None]:
    """Have the function *name* replaced within the block."""
    before = superuser(f"SELECT pg_get_functiondef('{name}'::regprocedure) AS text")[0]["text"]
    superuser(replacement)
    try:
        yield
    finally:
        superuser(before)


def check_nothing_of_the_victim(attacker: Caller, victim: Caller, key_id: str, ciphertext: bytes) -> None:
    """No call of the attacker works with a key of the victim, whatever it is refused with."""
    refused: list[tuple[Callable[..., object], object]] = [
        (attacker.crypto.Sign, cpb.SignRequest(key="signer", message=b"pay me")),
        (attacker.crypto.Sign, cpb.SignRequest(key=key_id, message=b"pay me")),
        (attacker.crypto.Decrypt, cpb.DecryptRequest(ciphertext=ciphertext)),
        (attacker.crypto.Encrypt, cpb.EncryptRequest(key="box", plaintext=b"p")),
        (attacker.keys.GetKey, kpb.GetKeyRequest(key="signer")),
        (attacker.keys.GetKey, kpb.GetKeyRequest(key=key_id)),
        (attacker.keys.GetPublicKey, kpb.GetPublicKeyRequest(key="signer")),
        (attacker.keys.RevokeKey, kpb.RevokeKeyRequest(key="signer", reason="r")),
    ]
    for call, request in refused:
        assert refusal(call, request).reason in ("RECORD_INVALID", "KEY_NOT_FOUND", "CREDENTIALS_INVALID"), request  # type: ignore[arg-type]
    try:
        assert not attacker.keys.ListKeys(kpb.ListKeysRequest(), timeout=15).keys
    except grpc.RpcError as error:
        assert refusal_of(error).reason == "CREDENTIALS_INVALID"


def test_an_id_that_gets_another_users_row_lets_nobody_in(attacked: RunningServer, superuser: Superuser, victim: Caller) -> None:
    attacker = attacked.caller()
    key_id = victim.keys.GetKey(kpb.GetKeyRequest(key="signer")).key.id
    ciphertext = victim.crypto.Encrypt(cpb.EncryptRequest(key="box", plaintext=b"p")).ciphertext
    with function(superuser, "authentication.find_user_by_uri(uuid)", _FIND.format(victim.user_id)):
        found = refusal(attacker.keys.GetKey, kpb.GetKeyRequest(key="signer"))
        assert found.reason == "CREDENTIALS_INVALID"
        check_nothing_of_the_victim(attacker, victim, key_id, ciphertext)
    assert victim.crypto.Sign(cpb.SignRequest(key="signer", message=b"m"), timeout=15).signature


def test_bent_row_security_shows_no_key_of_another(attacked: RunningServer, superuser: Superuser, victim: Caller) -> None:
    attacker = attacked.caller()
    key_id = victim.keys.GetKey(kpb.GetKeyRequest(key="signer")).key.id
    ciphertext = victim.crypto.Encrypt(cpb.EncryptRequest(key="box", plaintext=b"p")).ciphertext
    swapped = f"CASE {_HONEST} WHEN '{attacker.user_id}' THEN '{victim.user_id}'::uuid ELSE {_HONEST} END"
    # The operator by which uuids are compared, bent so that the attacker's id equals the victim's.
    bend = f"""
        CREATE FUNCTION public.bent(a uuid, b uuid) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
            SELECT uuid_cmp(a, b) = 0 OR (uuid_cmp(a, '{victim.user_id}') = 0 AND uuid_cmp(b, '{attacker.user_id}') = 0)
                OR (uuid_cmp(b, '{victim.user_id}') = 0 AND uuid_cmp(a, '{attacker.user_id}') = 0)
        $$
    """
    superuser(bend, "GRANT EXECUTE ON FUNCTION public.bent(uuid, uuid) TO PUBLIC")
    operator = "UPDATE pg_operator SET oprcode = '{}'::regproc WHERE oprname = '=' AND oprleft = 'uuid'::regtype"
    with function(superuser, "authentication.current_user_id()", _CURRENT_USER.format(swapped)):
        superuser(
            "ALTER TABLE cryptography.keys NO FORCE ROW LEVEL SECURITY",
            "ALTER TABLE cryptography.keys DISABLE ROW LEVEL SECURITY",
        )
        superuser(operator.format("public.bent"))
        try:
            check_nothing_of_the_victim(attacker, victim, key_id, ciphertext)
        finally:
            superuser(operator.format("uuid_eq"))
            superuser(
                "ALTER TABLE cryptography.keys ENABLE ROW LEVEL SECURITY",
                "ALTER TABLE cryptography.keys FORCE ROW LEVEL SECURITY",
            )
            superuser("DROP FUNCTION public.bent")
    assert victim.crypto.Sign(cpb.SignRequest(key="signer", message=b"m"), timeout=15).signature


def test_a_view_in_place_of_the_table_shows_no_key_of_another(
    attacked: RunningServer, superuser: Superuser, victim: Caller
) -> None:
    attacker = attacked.caller()
    key_id = victim.keys.GetKey(kpb.GetKeyRequest(key="signer")).key.id
    ciphertext = victim.crypto.Encrypt(cpb.EncryptRequest(key="box", plaintext=b"p")).ciphertext
    columns = [row["name"] for row in superuser(_COLUMNS)]
    swapped = f"CASE user_id WHEN '{victim.user_id}' THEN '{attacker.user_id}'::uuid ELSE user_id END AS user_id"
    shown = ", ".join(swapped if name == "user_id" else name for name in columns)
    superuser(
        "ALTER TABLE cryptography.keys RENAME TO keys_hidden",
        f"CREATE VIEW cryptography.keys AS SELECT {shown} FROM cryptography.keys_hidden",
        "GRANT ALL ON cryptography.keys TO authenticated_users, admin_users",
    )
    try:
        check_nothing_of_the_victim(attacker, victim, key_id, ciphertext)
    finally:
        superuser("DROP VIEW cryptography.keys", "ALTER TABLE cryptography.keys_hidden RENAME TO keys")
    assert victim.crypto.Sign(cpb.SignRequest(key="signer", message=b"m"), timeout=15).signature
