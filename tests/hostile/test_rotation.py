"""Rotations that a superuser plants, bends or undoes."""

from contextlib import suppress
from uuid import uuid4

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from kms.v1 import crypto_pb2 as cpb
from kms.v1 import keys_pb2 as kpb
from kms.v1 import rotation_pb2 as rpb
from tests.conformance.refusals import refusal, refusal_of
from tests.conformance.requests import made
from tests.conformance.test_outages import soon
from tests.conformance.test_rotation import key_of, rotate
from tests.fixtures.server import Caller, RunningServer
from tests.hostile.conftest import Superuser
from tests.hostile.test_records import forget

SIGN = cpb.SignRequest(key="k", message=b"m")
TRAIL = ("tr_keys_record_creation", "tr_keys_record_change")
PLANT = """
    INSERT INTO cryptography.key_rotations (id, user_id, old_key_id, new_key_id, rotation_reason, initiated_by, request_mac)
    VALUES (%s, %s, %s, %s, 'planted', %s, decode(repeat('00', 32), 'hex'))
"""
CHECKS = ("key_rotations_migration_status_check", "attempts_not_negative", "leased_iff_in_progress", "completed_at_iff_completed")
LIES = """
    CREATE OR REPLACE FUNCTION cryptography.switch_key(
        rotation UUID, worker UUID, claim BIGINT, expected_version BIGINT, predecessor_name TEXT, predecessor_mac BYTEA,
        successor JSONB, moment TIMESTAMPTZ, policy_version BIGINT
    ) RETURNS TEXT LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
    AS $$ BEGIN RETURN '{}'; END $$
"""


@pytest.fixture
def owner(attacked: RunningServer) -> Caller:
    return attacked.caller()


def failed(caller: Caller, rotation: str) -> str:
    """Wait until a rotation has failed, and return why."""
    request = rpb.GetRotationRequest(rotation_id=rotation)
    soon(lambda: caller.rotation.GetRotation(request).rotation.status == rpb.ROTATION_STATUS_FAILED)
    return caller.rotation.GetRotation(request).rotation.error_message


@pytest.mark.parametrize("has_successor", [False, True])
def test_a_rotation_that_is_planted_changes_no_key(superuser: Superuser, owner: Caller, has_successor: bool) -> None:
    key, other, planted = made(owner, "ed25519"), made(owner, "ed25519", name="other"), str(uuid4())
    successor = other.id if has_successor else None
    superuser(PLANT, parameters=(planted, owner.user_id, key.id, successor, owner.user_id))
    assert failed(owner, planted).startswith("RECORD_INVALID")
    assert owner.crypto.Sign(SIGN, timeout=15).key_id == key.id
    assert rotate(owner).status == rpb.ROTATION_STATUS_COMPLETED


def test_a_rotation_of_one_key_serves_for_no_other(superuser: Superuser, owner: Caller) -> None:
    """The request of a rotation that was made is copied, with its MAC, to another key."""
    made(owner, "ed25519")
    other, planted = made(owner, "ed25519", name="other"), str(uuid4())
    rotation = rotate(owner)
    superuser(
        """INSERT INTO cryptography.key_rotations
            (id, user_id, old_key_id, rotation_reason, initiated_by, request_mac, created_at)
        SELECT %s, user_id, %s, rotation_reason, initiated_by, request_mac, created_at
        FROM cryptography.key_rotations WHERE id = %s""",
        parameters=(planted, other.id, rotation.id),
    )
    assert failed(owner, planted).startswith("RECORD_INVALID")
    assert key_of(owner, "other").id == other.id


@pytest.mark.parametrize("verdict", ["OK", "FINE", ""])
def test_a_switch_that_was_only_said_to_be_made_is_no_rotation(superuser: Superuser, owner: Caller, verdict: str) -> None:
    key = made(owner, "ed25519")
    [kept] = superuser("SELECT pg_get_functiondef('cryptography.switch_key'::regproc) AS definition")
    superuser(LIES.replace("{}", verdict))
    try:
        rotation = rotate(owner)
        assert rotation.status == rpb.ROTATION_STATUS_FAILED
        assert rotation.error_message.startswith("RECORD_INVALID")
        assert owner.crypto.Sign(SIGN, timeout=15).key_id == key.id
    finally:
        superuser(kept["definition"])
    assert rotate(owner).status == rpb.ROTATION_STATUS_COMPLETED


def test_a_switch_that_is_undone_makes_nobody_sign_with_the_predecessor(superuser: Superuser, owner: Caller) -> None:
    """The trigger that writes the trail is off, so that the journal alone knows of the switch when the old row is put back."""
    key = made(owner, "ed25519")
    superuser("CREATE TABLE public.kept_key AS SELECT * FROM cryptography.keys WHERE id = %s".replace("%s", f"'{key.id}'"))
    superuser(*(f"ALTER TABLE cryptography.keys DISABLE TRIGGER {trigger}" for trigger in TRAIL))
    try:
        rotation = rotate(owner)
    finally:
        superuser(*(f"ALTER TABLE cryptography.keys ENABLE TRIGGER {trigger}" for trigger in TRAIL))
    columns = "key_name, superseded_at, version, record_mac"
    superuser(
        f"DELETE FROM cryptography.keys WHERE key_name = 'k' AND user_id = '{owner.user_id}'",
        f"UPDATE cryptography.keys AS k SET ({columns}) = (SELECT {columns} FROM public.kept_key) WHERE id = '{key.id}'",
        "DROP TABLE public.kept_key",
    )
    assert rotation.status == rpb.ROTATION_STATUS_COMPLETED
    assert refusal(owner.crypto.Sign, SIGN).reason == "RECORD_INVALID"
    assert refusal(owner.keys.GetKey, kpb.GetKeyRequest(key="k")).reason == "RECORD_INVALID"


def test_a_request_that_is_said_to_be_completed_is_no_rotation(superuser: Superuser, owner: Caller) -> None:
    """A replaced `request_rotation` writes a row that is completed already, with another key of the user as successor."""
    key, other = made(owner, "ed25519"), made(owner, "ed25519", name="other")
    [kept] = superuser("SELECT pg_get_functiondef('cryptography.request_rotation'::regproc) AS definition")
    before = "RETURN rotation;"
    lie = (
        "UPDATE cryptography.key_rotations SET migration_status = 'completed', completed_at = now(), "
        f"new_key_id = '{other.id}' WHERE id = rotation; {before}"
    )
    superuser(kept["definition"].replace(before, lie))
    try:
        assert refusal(owner.rotation.RotateKey, rpb.RotateKeyRequest(key="k", reason="yearly")).reason == "RECORD_INVALID"
    finally:
        superuser(kept["definition"])
    assert owner.crypto.Sign(SIGN, timeout=15).key_id == key.id


@pytest.mark.parametrize(
    "edit", ["migration_status = 'begun'", "affected_records_count = -1", "attempts = -1", "created_at = NULL"]
)
def test_a_row_of_the_log_that_no_service_writes_is_record_invalid(superuser: Superuser, owner: Caller, edit: str) -> None:
    made(owner, "ed25519")
    rotation = rotate(owner)
    superuser(
        *(f"ALTER TABLE cryptography.key_rotations DROP CONSTRAINT IF EXISTS {name}" for name in CHECKS),
        "ALTER TABLE cryptography.key_rotations ALTER COLUMN created_at DROP NOT NULL",
        f"UPDATE cryptography.key_rotations SET {edit} WHERE id = '{rotation.id}'",
    )
    assert refusal(owner.rotation.GetRotation, rpb.GetRotationRequest(rotation_id=rotation.id)).reason == "RECORD_INVALID"
    if edit == "created_at = NULL":
        # The list is in the order of the moments: a row without one is in no place of it, as if it had been removed.
        assert not owner.rotation.ListRotations(rpb.ListRotationsRequest()).rotations
    else:
        assert refusal(owner.rotation.ListRotations, rpb.ListRotationsRequest()).reason == "RECORD_INVALID"
    superuser(f"DELETE FROM cryptography.key_rotations WHERE id = '{rotation.id}'")


def test_a_short_deadline_leaves_no_rotation_to_nobody(owner: Caller) -> None:
    """Calls that are given up at any moment: the rotations that they began go on, and a later call does not wait for a lease."""
    made(owner, "ed25519")
    for number in range(12):
        request = rpb.RotateKeyRequest(key="k", reason=f"try {number}")
        with suppress(grpc.RpcError):
            owner.rotation.RotateKey(request, timeout=0.01 + number * 0.008)
    assert rotate(owner).status == rpb.ROTATION_STATUS_COMPLETED
    soon(lambda: all(each == rpb.ROTATION_STATUS_COMPLETED for each in statuses(owner)))


def statuses(caller: Caller) -> list[int]:
    return [rotation.status for rotation in caller.rotation.ListRotations(rpb.ListRotationsRequest()).rotations]


# Re-encryption.


def moves(caller: Caller, ciphertext: bytes) -> str:
    """Return what becomes of moving a ciphertext: OK, or the reason of the refusal."""
    try:
        caller.crypto.ReEncrypt(cpb.ReEncryptRequest(ciphertext=ciphertext), timeout=15)
    except grpc.RpcError as error:
        return refusal_of(error).reason
    return "OK"


@pytest.mark.parametrize("renamed", ["the old key", "the new key"])
def test_a_key_of_another_lineage_is_never_taken_for_the_current_one(superuser: Superuser, owner: Caller, renamed: str) -> None:
    first, other = made(owner, "aes"), made(owner, "aes", name="other")
    ciphertext = owner.crypto.Encrypt(cpb.EncryptRequest(key="k", plaintext=b"p")).ciphertext
    new = rotate(owner).new_key_id
    if renamed == "the old key":
        superuser(f"UPDATE cryptography.keys SET key_name = 'other@1' WHERE id = '{first.id}'")
    else:
        superuser(
            f"UPDATE cryptography.keys SET key_name = 'x' WHERE id = '{new}'",
            f"UPDATE cryptography.keys SET key_name = 'k' WHERE id = '{other.id}'",
        )
    forget()
    assert moves(owner, ciphertext) == "RECORD_INVALID"
    assert superuser(f"SELECT usage_counter FROM cryptography.keys WHERE id = '{other.id}'") == [{"usage_counter": 0}]


def test_a_row_of_another_key_is_never_taken_for_the_old_key(superuser: Superuser, owner: Caller) -> None:
    first, other = made(owner, "aes"), made(owner, "aes", name="other")
    ciphertext = owner.crypto.Encrypt(cpb.EncryptRequest(key="k", plaintext=b"p")).ciphertext
    foreign = owner.crypto.Encrypt(cpb.EncryptRequest(key="other", plaintext=b"p")).ciphertext
    rotate(owner)
    superuser(
        f"DELETE FROM cryptography.keys WHERE id = '{first.id}'",
        f"UPDATE cryptography.keys SET id = '{first.id}' WHERE id = '{other.id}'",
    )
    forget()
    for each in (ciphertext, ciphertext[:17] + foreign[17:]):
        assert moves(owner, each) == "RECORD_INVALID"


def test_a_limit_holds_for_moved_ciphertexts_whatever_the_database_counts(superuser: Superuser, owner: Caller) -> None:
    made(owner, "aes")
    ciphertext = owner.crypto.Encrypt(cpb.EncryptRequest(key="k", plaintext=b"p")).ciphertext
    new = rotate(owner).new_key_id
    owner.keys.UpdateKey(kpb.UpdateKeyRequest(key="k", max_usage_count=2))
    outcomes = []
    for _ in range(4):
        outcomes.append(moves(owner, ciphertext))
        superuser(f"UPDATE cryptography.keys SET usage_counter = 0 WHERE id = '{new}'")
    assert outcomes[0] == "OK"
    assert outcomes.count("OK") <= 2
    assert outcomes[-1] != "OK"


POLICY = """
    INSERT INTO cryptography.rotation_policies
        (user_id, key_name, every_seconds, on_compromise, is_paused, version, policy_mac, look_at)
    VALUES (%s, 'k', 1, FALSE, FALSE, 1, decode(repeat('00', 32), 'hex'), now())
"""
OF_ANOTHER_KEY = """
    INSERT INTO cryptography.rotation_policies
        (user_id, key_name, every_seconds, on_compromise, is_paused, version, policy_mac, look_at)
    SELECT user_id, 'k', every_seconds, on_compromise, is_paused, version, policy_mac, now()
    FROM cryptography.rotation_policies WHERE user_id = %s AND key_name = 'other'
"""
EDIT = "UPDATE cryptography.rotation_policies SET look_at = now(), every_seconds = 1 WHERE user_id = %s"


def set_policy(owner: Caller, key: str) -> None:
    policy = kpb.RotationPolicy(every=Duration(seconds=90 * 86_400))
    owner.rotation.SetRotationPolicy(rpb.SetRotationPolicyRequest(key=key, policy=policy))


def is_not_followed(attacked: RunningServer, owner: Caller) -> bool:
    lines = [line for line in attacked.log() if line["event"] == "policy not followed"]
    return (str(owner.user_id), "RECORD_INVALID") in {(line["owner"], line["reason"]) for line in lines}


@pytest.mark.parametrize("what", ["planted", "of another key", "edited"])
def test_a_policy_that_the_service_did_not_make_rotates_nothing(
    superuser: Superuser, attacked: RunningServer, owner: Caller, what: str
) -> None:
    key = made(owner, "ed25519")
    if what == "planted":
        superuser(POLICY, parameters=(owner.user_id,))
    elif what == "of another key":
        made(owner, "ed25519", name="other")
        set_policy(owner, "other")
        superuser(OF_ANOTHER_KEY, parameters=(owner.user_id,))
    else:
        set_policy(owner, "k")
        superuser(EDIT, parameters=(owner.user_id,))
    soon(lambda: is_not_followed(attacked, owner))
    assert refusal(owner.keys.GetKey, kpb.GetKeyRequest(key="k")).reason == "RECORD_INVALID"
    assert owner.crypto.Sign(SIGN, timeout=15).key_id == key.id
    assert not owner.rotation.ListRotations(rpb.ListRotationsRequest()).rotations
    set_policy(owner, "k")
    assert key_of(owner).rotation_policy.every.seconds == 90 * 86_400, "its owner sets it again"


def test_a_rotation_that_a_policy_is_said_to_have_asked_for_changes_no_key(superuser: Superuser, owner: Caller) -> None:
    key, planted = made(owner, "ed25519"), str(uuid4())
    set_policy(owner, "k")
    superuser(PLANT, parameters=(planted, owner.user_id, key.id, None, None))
    assert failed(owner, planted).startswith("RECORD_INVALID")
    assert key_of(owner).id == key.id
