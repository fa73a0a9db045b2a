"""The keys of a restored database, for a drill: all that have an envelope, whoever's they are."""

from collections.abc import Iterator
from typing import Final

from psycopg.rows import DictRow, dict_row

from kms.domain.algorithms import KeySpec, KeyType, Purpose
from kms.domain.ids import KeyId, UserId
from kms.domain.keys import Custody, HeldKey, KeyIdentity, KeyMaterial, Origin
from kms.store.backup import check_login_sees_all, connected
from kms.store.pool import connection_settings

ENVELOPES: Final = """
    SELECT id, user_id, key_type, key_purpose, key_strength, bound_to, origin, custody, public_key, encrypted_private_key,
        hsm_key_id, version
    FROM cryptography.keys
    WHERE destroyed_at IS NULL
    ORDER BY id
"""
_ROWS_AT_ONCE: Final = 1000


def held_keys(dsn: str) -> Iterator[HeldKey]:
    """Yield each key of the database of *dsn* that is not destroyed. Raises STORE_UNAVAILABLE."""
    with connected(connection_settings(dsn)) as connection:
        check_login_sees_all(connection)
        with connection.transaction(), connection.cursor("envelopes", row_factory=dict_row) as cursor:
            cursor.itersize = _ROWS_AT_ONCE
            for row in cursor.execute(ENVELOPES):
                yield _held(row)


def _held(row: DictRow) -> HeldKey:
    spec = KeySpec(KeyType(row["key_type"]), Purpose(row["key_purpose"]), row["key_strength"])
    identity = KeyIdentity(KeyId(row["id"]), UserId(row["user_id"]), spec, row["bound_to"], Origin(row["origin"]))
    material = KeyMaterial(Custody(row["custody"]), row["public_key"], row["encrypted_private_key"], row["hsm_key_id"])
    return HeldKey(identity, material, row["version"])
