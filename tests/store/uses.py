"""Users, keys and uses of them for the tests of the ledger and the lifecycle."""

from dataclasses import replace
from typing import Any
from uuid import uuid4

import psycopg
from psycopg.rows import dict_row

from kms.app.ports import Call, Entry, NewKey, Repeat, User
from kms.domain.algorithms import KeyType, Purpose, key_spec
from kms.domain.errors import KmsError
from kms.domain.ids import KeyId, KeyName, UserId
from kms.domain.keys import Custody, KeyIdentity, KeyMaterial, KeyRecord
from kms.domain.lifecycle import Use
from kms.store.keys import StoredKeys
from kms.store.pool import Pool
from kms.store.users import StoredUsers
from tests.fixtures.postgres import Database
from tests.store.records import RECORDS, renew_macs

PEM = "-----BEGIN PUBLIC KEY-----\nMFkw\n-----END PUBLIC KEY-----\n"


async def make_user(pool: Pool, name: str) -> User:
    users = StoredUsers(pool)
    user = await users.find(await users.create_service(name))
    assert user is not None
    return user


def a_call(user: User) -> Call:
    return Call(user, str(uuid4()), "192.0.2.7")


def new_key(owner: UserId, key_type: KeyType = KeyType.SECP256R1, custody: Custody = Custody.WRAPPED) -> NewKey:
    purpose = Purpose.ENCRYPTION if key_type is KeyType.AES else Purpose.SIGNING
    public_key = "kcv:0a1b2c" if key_type is KeyType.AES else PEM
    material = KeyMaterial(custody, public_key, "ZW52ZWxvcGU=", uuid4().hex if custody is Custody.RESIDENT else None)
    key_id = KeyId(uuid4())
    identity = KeyIdentity(key_id, owner, key_spec(key_type, purpose, None))
    return NewKey(identity, KeyName(f"key-{key_id.hex[:8]}"), material, {})


async def make_key(pool: Pool, user: User, key_type: KeyType = KeyType.SECP256R1, **fields: Any) -> KeyRecord:  # noqa: ANN401
    return await StoredKeys(pool, RECORDS).insert(
        user.user_id, replace(new_key(user.user_id, key_type), **fields), call=a_call(user)
    )


def sign(user: User, key: KeyRecord, *, repeat: Repeat | None = None) -> Entry:
    details: dict[str, str | int] = {"algorithm": "ECDSA_SHA256", "message_bytes": 3}
    return Entry(a_call(user), "sign", key.identity.key_id, key.version, Use.PROTECT, True, details, repeat)


def decrypt(user: User, key: KeyRecord) -> Entry:
    return Entry(a_call(user), "decrypt", key.identity.key_id, key.version, Use.PROCESS, False, {"ciphertext_bytes": 45})


def a_repeat(request_id: str, result: bytes = b"signature", body_mac: bytes = b"m" * 32) -> Repeat:
    return Repeat("Sign", request_id, body_mac, result)


def reason(outcome: object) -> str:
    """What `asyncio.gather(..., return_exceptions=True)` gave, as a word."""
    if outcome is None:
        return "OK"
    assert isinstance(outcome, KmsError), repr(outcome)
    return outcome.reason


def rows(database: Database, query: str, *parameters: object) -> list[dict[str, Any]]:
    """Run a statement as the superuser. What it changes of keys gets a MAC, as if the service had changed it."""
    with psycopg.connect(database.admin_dsn, autocommit=True, row_factory=dict_row) as connection:
        cursor = connection.execute(query.encode(), parameters)
        found = cursor.fetchall() if cursor.description else []
        if "cryptography.keys" in query and query.lstrip()[:6] != "SELECT":
            renew_macs(connection)
        return found


def counter(database: Database, key: KeyRecord) -> int:
    return int(
        rows(database, "SELECT usage_counter FROM cryptography.keys WHERE id = %s", key.identity.key_id)[0]["usage_counter"]
    )


def charges(database: Database, key: KeyRecord) -> int:
    """How many records of charges there are."""
    query = """
        SELECT count(*) AS number FROM audit.security_events
        WHERE resource_id = %s AND event_type = 'key.used' AND event_details @> '{"charged": true}'
    """
    return int(rows(database, query, key.identity.key_id)[0]["number"])
