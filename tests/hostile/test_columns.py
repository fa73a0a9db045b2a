"""The table of `docs/threats.md`: each column that somebody may edit, tried on a live service.

The edits of `cryptography.keys` that are refused are tried one by one in `test_records.py`.
"""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest
from google.protobuf.duration_pb2 import Duration

from kms.v1 import audit_pb2 as apb
from kms.v1 import crypto_pb2 as cpb
from kms.v1 import keys_pb2 as kpb
from kms.v1 import rotation_pb2 as rpb
from tests.conformance.refusals import refusal
from tests.conformance.requests import made
from tests.fixtures.server import Caller, RunningServer
from tests.hostile.conftest import Superuser
from tests.hostile.test_records import EDITS, forget

_THREATS: Final = Path(__file__).parents[2] / "docs" / "threats.md"
_ROW: Final = re.compile(r"\| `([a-z_.]+)`: ([a-z_, ]+) \| (refused|verifier|harmless) \| (.+) \|")
TABLES: Final = (
    "cryptography.keys",
    "cryptography.request_records",
    "authentication.users",
    "cryptography.key_grants",
    "cryptography.rotation_policies",
    "audit.checkpoints",
)
SIGN: Final = cpb.SignRequest(key="k", message=b"m")
AGAIN: Final = cpb.SignRequest(key="k", message=b"m", request_id="r")
USER_EDITS: Final = {
    "id": "gen_random_uuid()",
    "username": "'another-' || id",
    "email": "'other@example.org'",
    "email_verified": "true",
    "password_hash": "'x'",
    "salt": "'x'",
    "mfa_enabled": "true",
    "mfa_secret": "'x'",
    "failed_login_attempts": "99",
    "locked_until": "now() + interval '1 day'",
    "last_login_at": "now()",
    "password_changed_at": "'2020-01-01'",
    "created_at": "'2020-01-01'",
    "updated_at": "'2020-01-01'",
    "deleted_at": "now()",
    "version": "version + 7",
}
GRANT_EDITS: Final = {
    "id": "gen_random_uuid()",
    "owner_id": "grantee_id",
    "key_id": "gen_random_uuid()",
    "grantee_id": "owner_id",
    "operations": "'{sign,verify,encrypt,decrypt,generate_data_key}'",
    "granted_by": "grantee_id",
    "created_at": "'2020-01-01'",
    "expires_at": "'2999-01-01'",
    "revoked_at": "NULL",
}
POLICY_EDITS: Final = {
    "user_id": "gen_random_uuid()",
    "key_name": "'other'",
    "every_seconds": "86400",
    "before_expiry_seconds": "3600",
    "at_usage_percent": "1",
    "on_compromise": "NOT on_compromise",
    "is_paused": "NOT is_paused",
    "version": "version + 1",
    "policy_mac": "sha256(policy_mac)",
    "look_at": "now()",
    "retry_at": "'2020-01-01'",
    "requests": "999",
}
CHECKPOINT_EDITS: Final = {
    "tree_size": "tree_size + 1000000",
    "root_hash": "sha256(root_hash)",
    "horizon": "horizon - 1",
    "frontier": "ARRAY(SELECT sha256(f) FROM unnest(frontier) AS f)",
    "epoch": "epoch + 1",
    "note": "replace(note, 'epoch 1', 'epoch 2')",
    "created_at": "'2020-01-01'",
}


def told() -> dict[tuple[str, str], str]:
    """Return what the document says of each column."""
    text = _THREATS.read_text().partition("<!-- columns")[2].partition("<!-- end of columns -->")[0]
    return {
        (found[1], column): found[3]
        for found in map(_ROW.fullmatch, text.splitlines())
        if found
        for column in found[2].split(", ")
    }


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until *condition* holds: a worker that refused looks again every few seconds."""
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)


def columns_told(table: str) -> list[str]:
    return [column for name, column in told() if name == table]


@pytest.fixture
def owner(attacked: RunningServer) -> Caller:
    caller = attacked.caller()
    made(caller, "secp256k1")
    return caller


def test_the_document_tells_of_every_column(attacked: RunningServer) -> None:
    query = """
        SELECT attrelid::regclass::text, attname FROM pg_attribute
        WHERE attrelid = ANY (%s::regclass[]) AND attnum > 0 AND NOT attisdropped
    """
    with psycopg.connect(attacked.deployment.database.admin_dsn) as connection:
        assert set(connection.execute(query, (list(TABLES),)).fetchall()) == told().keys()


def test_each_refused_column_of_a_key_is_tried() -> None:
    refused = {column for (table, column), outcome in told().items() if table == "cryptography.keys" and outcome == "refused"}
    assert refused == EDITS.keys() | {"encrypted_private_key"}


def test_an_envelope_that_is_edited_does_not_open(superuser: Superuser, owner: Caller) -> None:
    superuser(
        f"UPDATE cryptography.keys SET encrypted_private_key = overlay(encrypted_private_key placing 'AAAA' from 100) "
        f"WHERE user_id = '{owner.user_id}'"
    )
    assert refusal(owner.crypto.Sign, SIGN).reason == "ENVELOPE_INVALID"


def test_a_counter_that_is_edited_is_found_by_the_verifier(
    attacked: RunningServer, superuser: Superuser, auditor_here: Caller, owner: Caller
) -> None:
    key = owner.keys.GetKey(kpb.GetKeyRequest(key="k")).key
    owner.crypto.Sign(SIGN)
    owner.crypto.Sign(SIGN)
    superuser(f"UPDATE cryptography.keys SET usage_counter = 1 WHERE id = '{key.id}'")
    findings = keys_that_differ(auditor_here)
    superuser(f"UPDATE cryptography.keys SET usage_counter = 2 WHERE id = '{key.id}'")
    assert (key.id, "usage_counter") in findings
    assert (key.id, "usage_counter") not in keys_that_differ(auditor_here)


def test_the_time_of_the_last_use_decides_nothing(superuser: Superuser, owner: Caller) -> None:
    superuser(f"UPDATE cryptography.keys SET last_used_at = '2020-01-01' WHERE user_id = '{owner.user_id}'")
    forget()
    assert owner.crypto.Sign(SIGN, timeout=15).signature


@pytest.mark.parametrize("column", columns_told("cryptography.request_records"))
def test_a_stored_answer_is_refused_or_made_again(superuser: Superuser, owner: Caller, column: str) -> None:
    edit = {
        "result": "set_byte(result, 5, 255 - get_byte(result, 5))",
        "body_mac": "sha256(body_mac)",
        "rpc": "rpc || 'x'",
        "request_id": "'another'",
        "user_id": "gen_random_uuid()",
        "event_id": "gen_random_uuid()",
        "created_at": "created_at - interval '23 hours'",
    }[column]
    first = owner.crypto.Sign(AGAIN, timeout=15)
    superuser(f"UPDATE cryptography.request_records SET {column} = {edit} WHERE user_id = '{owner.user_id}'")
    if told()["cryptography.request_records", column] == "refused":
        expected = "REQUEST_ID_REUSED" if column == "body_mac" else "RECORD_INVALID"
        assert refusal(owner.crypto.Sign, AGAIN).reason == expected
        return
    again = owner.crypto.Sign(AGAIN, timeout=15)
    is_found = column in ("event_id", "created_at")
    assert (again == first) == is_found
    assert owner.keys.GetKey(kpb.GetKeyRequest(key="k")).key.usage_count == (1 if is_found else 2)


def test_users_reach_their_own_keys_and_no_others_whatever_is_edited(attacked: RunningServer, superuser: Superuser) -> None:
    victim = attacked.caller()
    request = cpb.SignRequest(key=made(victim, "secp256k1", name="theirs").id, message=b"m")
    columns = columns_told("authentication.users")
    owners = {column: attacked.caller() for column in columns}
    for owner in owners.values():
        made(owner, "secp256k1")
    superuser(
        *(f"UPDATE authentication.users SET {c} = {USER_EDITS[c]} WHERE id = '{each.user_id}'" for c, each in owners.items())
    )
    forget()
    for column, owner in owners.items():
        if column in ("id", "locked_until", "deleted_at"):
            assert refusal(owner.crypto.Sign, SIGN).reason == "CREDENTIALS_INVALID", column
            assert refusal(owner.crypto.Sign, request).reason == "CREDENTIALS_INVALID", column
        else:
            assert owner.crypto.Sign(SIGN, timeout=15).signature, column
            assert refusal(owner.crypto.Sign, request).reason == "KEY_NOT_FOUND", column
    let_in = [owners["locked_until"], owners["deleted_at"]]
    superuser(
        *(f"UPDATE authentication.users SET locked_until = NULL, deleted_at = NULL WHERE id = '{e.user_id}'" for e in let_in)
    )
    forget()
    for owner in let_in:
        assert owner.crypto.Sign(SIGN, timeout=15).signature
        assert refusal(owner.crypto.Sign, request).reason == "KEY_NOT_FOUND"
    assert victim.crypto.Sign(cpb.SignRequest(key="theirs", message=b"m"), timeout=15).signature


@pytest.mark.parametrize("column", columns_told("cryptography.key_grants"))
def test_a_grant_opens_no_key(attacked: RunningServer, superuser: Superuser, owner: Caller, column: str) -> None:
    other = attacked.caller()
    key = owner.keys.GetKey(kpb.GetKeyRequest(key="k")).key
    plant = f"""
        INSERT INTO cryptography.key_grants (owner_id, key_id, grantee_id, operations, granted_by, revoked_at)
        VALUES ('{owner.user_id}', '{key.id}', '{other.user_id}', '{{sign}}', '{owner.user_id}', now())
    """
    drops = superuser(
        "SELECT format('ALTER TABLE cryptography.key_grants DROP CONSTRAINT %I', conname) AS drop FROM pg_constraint "
        "WHERE conrelid = 'cryptography.key_grants'::regclass AND contype = 'c'"
    )
    superuser(*(row["drop"] for row in drops), plant)
    edit = f"UPDATE cryptography.key_grants SET {column} = {GRANT_EDITS[column]} WHERE key_id = '{key.id}'"
    superuser(edit)
    assert refusal(other.crypto.Sign, cpb.SignRequest(key=key.id, message=b"m")).reason == "KEY_NOT_FOUND"
    assert owner.crypto.Sign(SIGN, timeout=15).signature


@pytest.mark.parametrize("column", columns_told("cryptography.rotation_policies"))
def test_a_policy_that_is_edited_is_refused_or_rotates_as_before(superuser: Superuser, owner: Caller, column: str) -> None:
    policy = kpb.RotationPolicy(every=Duration(seconds=90 * 86_400))
    owner.rotation.SetRotationPolicy(rpb.SetRotationPolicyRequest(key="k", policy=policy))
    key = owner.keys.GetKey(kpb.GetKeyRequest(key="k")).key
    edit = f"UPDATE cryptography.rotation_policies SET {column} = {POLICY_EDITS[column]}"
    superuser(f"{edit} WHERE user_id = '{owner.user_id}'")
    if told()["cryptography.rotation_policies", column] == "refused":
        assert refusal(owner.keys.GetKey, kpb.GetKeyRequest(key="k")).reason == "RECORD_INVALID"
    elif column in ("user_id", "key_name"):
        assert not owner.keys.GetKey(kpb.GetKeyRequest(key="k")).key.HasField("rotation_policy")
    else:
        assert owner.keys.GetKey(kpb.GetKeyRequest(key="k")).key == key
    assert owner.crypto.Sign(SIGN, timeout=15).key_id == key.id


_QUICK: Final = ("root_hash", "created_at")


def edit_last_checkpoint(superuser: Superuser, column: str) -> None:
    """Edit the last checkpoint. Keep its row in `public.kept`, and the number of checkpoints in `public.counted`."""
    last = "tree_size = (SELECT max(tree_size) FROM audit.checkpoints)"
    superuser(
        "LOCK TABLE audit.checkpoints IN EXCLUSIVE MODE",  # none is signed between the two
        f"CREATE TABLE public.kept AS SELECT * FROM audit.checkpoints WHERE {last}",
        "CREATE TABLE IF NOT EXISTS public.counted (n BIGINT)",
        "TRUNCATE public.counted",
        "INSERT INTO public.counted SELECT count(*) FROM audit.checkpoints",
        f"UPDATE audit.checkpoints SET {column} = {CHECKPOINT_EDITS[column]} WHERE {last}",
    )


def is_refused(attacked: RunningServer, superuser: Superuser) -> bool:
    """Wait until the edited checkpoint is refused (True), or the next one was signed without a look at it (False)."""
    grown = "SELECT (SELECT count(*) FROM audit.checkpoints) > (SELECT n FROM public.counted) AS is_grown"
    eventually(lambda: refused(attacked) == 1 or superuser(grown)[0]["is_grown"])
    return refused(attacked) == 1


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "column", [c if c in _QUICK else pytest.param(c, marks=pytest.mark.slow) for c in columns_told("audit.checkpoints")]
)
def test_no_checkpoint_follows_one_that_was_edited(
    attacked: RunningServer, superuser: Superuser, owner: Caller, column: str
) -> None:
    eventually(lambda: refused(attacked) == 0 and superuser("SELECT count(*) AS n FROM audit.checkpoints")[0]["n"] > 0)
    drops = superuser(
        "SELECT format('ALTER TABLE audit.checkpoints DROP CONSTRAINT %I', conname) AS drop FROM pg_constraint "
        "WHERE conrelid = 'audit.checkpoints'::regclass AND contype = 'c'"
    )
    superuser(*(row["drop"] for row in drops))
    edit_last_checkpoint(superuser, column)
    owner.crypto.Sign(SIGN, timeout=15)  # something to sign
    if told()["audit.checkpoints", column] == "harmless":
        size = superuser("SELECT tree_size FROM public.kept")[0]["tree_size"]
        eventually(lambda: superuser("SELECT max(tree_size) AS n FROM audit.checkpoints")[0]["n"] > size)
        superuser("DROP TABLE public.kept")
        return
    try:
        while not is_refused(attacked, superuser):
            # The worker had looked at the checkpoint before the edit, and signed the next one after it.
            superuser(
                f"UPDATE audit.checkpoints AS c SET {column} = k.{column} FROM public.kept AS k WHERE c.tree_size = k.tree_size",
                "DROP TABLE public.kept",
            )
            edit_last_checkpoint(superuser, column)
            owner.crypto.Sign(SIGN, timeout=15)
    finally:
        superuser(
            "DELETE FROM audit.checkpoints WHERE tree_size >= (SELECT tree_size FROM public.kept)",
            "INSERT INTO audit.checkpoints SELECT * FROM public.kept",
            "DROP TABLE public.kept",
        )
    eventually(lambda: refused(attacked) == 0)


@pytest.fixture
def auditor_here(attacked: RunningServer) -> Caller:
    return attacked.auditor()


def keys_that_differ(auditor: Caller) -> set[tuple[str, str]]:
    """Return key and column of each difference that the service finds between keys and trail."""
    found, after = set[tuple[str, str]](), ""
    while True:
        answer: Any = auditor.audit.VerifyTrail(apb.VerifyTrailRequest(keys_after=after), timeout=60)
        found |= {(finding.key_id, finding.column) for finding in answer.keys.findings}
        after = answer.keys.next_after
        if not after:
            return found


def refused(server: RunningServer) -> float:
    return server.metrics()["kms_trail_history_refused", frozenset()]
