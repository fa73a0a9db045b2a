"""Rows that a superuser edits on a live service: each edit is refused, or changes nothing that matters."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import grpc
import psycopg
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from kms.v1 import crypto_pb2 as cpb
from kms.v1 import keys_pb2 as kpb
from tests.conformance.refusals import item_reason, refusal, refusal_of
from tests.conformance.requests import create, made
from tests.conformance.test_outages import soon
from tests.fixtures.server import Caller, RunningServer
from tests.hostile.conftest import Superuser

SIGN: Final = cpb.SignRequest(key="k", message=b"m")
SAYS_OK: Final = """
    CREATE OR REPLACE FUNCTION cryptography.settle(writer UUID, number BIGINT, entries JSON) RETURNS TEXT[]
    LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
    AS $$ BEGIN RETURN ARRAY(SELECT 'OK' FROM json_array_elements(entries)); END $$
"""
_KEEPS_ANSWERS: Final = """
    CREATE OR REPLACE FUNCTION cryptography.settle(writer UUID, number BIGINT, entries JSON) RETURNS TEXT[]
    LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
    AS $$ BEGIN
        INSERT INTO cryptography.request_records (user_id, rpc, request_id, body_mac, result, event_id, created_at)
        SELECT (e->>'user_id')::uuid, e->>'rpc', e->>'repeat_id', (e->>'body_mac')::bytea, (e->>'result')::bytea,
            gen_random_uuid(), now()
        FROM json_array_elements(entries) AS e WHERE e->>'repeat_id' IS NOT NULL
        ON CONFLICT (user_id, rpc, request_id) DO UPDATE SET body_mac = excluded.body_mac, result = excluded.result;
        RETURN ARRAY(SELECT '{}' FROM json_array_elements(entries));
    END $$
"""
_VERDICTS: Final = {
    "NULL": ("TEXT[]", "NULL"),
    "none": ("TEXT[]", "'{}'"),
    "one too many": ("TEXT[]", "array_append(ARRAY(SELECT 'OK' FROM json_array_elements(entries)), 'OK')"),
    "NULLs": ("TEXT[]", "ARRAY(SELECT NULL::text FROM json_array_elements(entries))"),
    "an unknown word": ("TEXT[]", "ARRAY(SELECT 'FINE' FROM json_array_elements(entries))"),
    "no word": ("TEXT[]", "ARRAY(SELECT '' FROM json_array_elements(entries))"),
    "a state that refuses nothing": ("TEXT[]", "ARRAY(SELECT 'KEY_ACTIVE' FROM json_array_elements(entries))"),
    "no state": ("TEXT[]", "ARRAY(SELECT 'KEY_' FROM json_array_elements(entries))"),
    "nested": ("TEXT[]", "ARRAY(SELECT ARRAY['OK', 'OK'] FROM json_array_elements(entries))"),
    "a text": ("TEXT", "'OK'"),
    "a number": ("BIGINT", "1"),
    "an object": ("JSON", """'{"OK": "OK"}'"""),
    "numbers": ("BIGINT[]", "ARRAY(SELECT 1 FROM json_array_elements(entries))"),
}
_SLOW_READS: Final = """
    CREATE POLICY slow ON cryptography.keys AS RESTRICTIVE FOR SELECT
    USING ((SELECT true FROM pg_sleep(0.15) WHERE id IS NOT NULL))
"""
_CHECKS: Final = """
    SELECT format('ALTER TABLE cryptography.keys DROP CONSTRAINT %I', conname) AS drop FROM pg_constraint
    WHERE conrelid = 'cryptography.keys'::regclass AND contype = 'c'
"""


@pytest.fixture
def owner(attacked: RunningServer) -> Caller:
    return attacked.caller()


@pytest.fixture(scope="module")
def unchecked(attacked: RunningServer) -> None:
    """The table without its CHECKs: its owner needs none."""
    with psycopg.connect(attacked.deployment.database.admin_dsn, autocommit=True) as connection:
        for (drop,) in connection.execute(_CHECKS.encode()).fetchall():
            connection.execute(drop)


def forget(seconds: float = 1.1) -> None:
    """Wait until nothing that was read before is used any more: a second, by the API's promise."""
    moment = datetime.now(UTC) + timedelta(seconds=seconds)
    soon(lambda: datetime.now(UTC) >= moment)


# Every column that the MAC covers, and one value that it does not have.
EDITS: Final[dict[str, str]] = {
    "id": "gen_random_uuid()",
    "user_id": "gen_random_uuid()",
    "key_name": "'other'",
    "key_type": "'ed25519'",
    "key_purpose": "'encryption'",
    "key_curve": "NULL",
    "public_key": "replace(public_key, 'M', 'N')",
    "key_derivation_path": "'m/44'",
    "parent_key_id": "gen_random_uuid()",
    "hsm_key_id": "'00ff'",
    "key_status": "'inactive'",
    "encryption_algorithm": "NULL",
    "key_strength": "257",
    "max_usage_count": "1000000",
    "created_at": "created_at - interval '1 microsecond'",
    "activated_at": "'2020-01-01'",
    "expires_at": "now() + interval '300 years'",
    "compromised_at": "now()",
    "revoked_at": "now()",
    "metadata": """'{"team": "other"}'""",
    "custody": "'SEALED'",
    "origin": "'IMPORTED'",
    "bound_to": "'audit'",
    "version": "version + 1",
    "deactivated_at": "now()",
    "superseded_at": "now()",
    "destruction_scheduled_at": "now() + interval '30 days'",
    "destroyed_at": "now()",
    "compromise_occurred_at": "now()",
    "record_mac": "decode(repeat('00', 32), 'hex')",
}


@pytest.mark.usefixtures("unchecked")
def test_each_column_that_is_edited_is_refused(superuser: Superuser, owner: Caller) -> None:
    keys = {column: made(owner, "secp256k1", name=column) for column in EDITS}
    for column in EDITS:
        owner.crypto.Sign(cpb.SignRequest(key=column, message=b"m"))
    superuser(*(f"UPDATE cryptography.keys SET {c} = {EDITS[c]} WHERE id = '{key.id}'" for c, key in keys.items()))
    forget()
    for column in EDITS:
        # A key whose name, id or owner is another is not where it is looked for.
        expected = {"RECORD_INVALID", "KEY_NOT_FOUND"} if column in ("id", "user_id", "key_name") else {"RECORD_INVALID"}
        for call, request in (
            (owner.crypto.Sign, cpb.SignRequest(key=column, message=b"m")),
            (owner.crypto.Verify, cpb.VerifyRequest(key=column, message=b"m", signature=bytes(70))),
            (owner.keys.GetKey, kpb.GetKeyRequest(key=column)),
            (owner.keys.GetPublicKey, kpb.GetPublicKeyRequest(key=column)),
            (owner.keys.DeactivateKey, kpb.DeactivateKeyRequest(key=column)),
        ):
            found = refusal(call, request)
            assert found.reason in expected, (column, request)
            assert found.reason != "RECORD_INVALID" or found.code is grpc.StatusCode.DATA_LOSS
    assert not owner.keys.ListKeys(kpb.ListKeysRequest(), timeout=15).keys


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("moment", ["'infinity'", "'-infinity'", "'4713-01-01 BC'", "'294276-01-01'"])
def test_a_moment_that_no_calendar_has_is_refused(superuser: Superuser, owner: Caller, moment: str) -> None:
    key, other = made(owner, "secp256k1"), made(owner, "aes", name="other")
    superuser(f"UPDATE cryptography.keys SET expires_at = {moment} WHERE id = '{key.id}'")
    assert refusal(owner.keys.GetKey, kpb.GetKeyRequest(key="k")).reason == "RECORD_INVALID"
    listed = owner.keys.ListKeys(kpb.ListKeysRequest(), timeout=15)
    assert ([each.id for each in listed.keys], list(listed.invalid_key_ids)) == ([other.id], [key.id])


def test_a_refused_record_is_a_critical_event(attacked: RunningServer, superuser: Superuser, owner: Caller) -> None:
    key = made(owner, "aes")
    superuser(f"UPDATE cryptography.keys SET max_usage_count = 9 WHERE id = '{key.id}'")
    assert refusal(owner.crypto.Encrypt, cpb.EncryptRequest(key="k", plaintext=b"p")).reason == "RECORD_INVALID"
    listed = owner.keys.ListKeys(kpb.ListKeysRequest(), timeout=15)
    assert (list(listed.keys), list(listed.invalid_key_ids)) == ([], [key.id])
    query = f"""
        SELECT action FROM audit.security_events
        WHERE user_id = '{owner.user_id}' AND severity = 'critical' AND event_details ->> 'reason' = 'RECORD_INVALID'
    """
    soon(lambda: {row["action"] for row in superuser(query)} == {"Encrypt", "ListKeys"})


def test_a_public_key_that_is_exchanged_encrypts_nothing_and_verifies_nothing(superuser: Superuser, owner: Caller) -> None:
    request = create("rsa-encryption", name="box", size_bits=2048)
    box = owner.keys.CreateKey(request, timeout=60).key
    signer = made(owner, "rsa", name="signer", size_bits=2048)
    attackers = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = attackers.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    planted = attackers.sign(b"m", padding.PKCS1v15(), hashes.SHA256())
    superuser(
        f"UPDATE cryptography.keys SET public_key = '{pem.decode()}' WHERE id IN ('{box.id}', '{signer.id}')",
    )
    forget()
    verify = cpb.VerifyRequest(
        key="signer", message=b"m", signature=planted, scheme=cpb.SIGNATURE_SCHEME_RSA_PKCS1, hash=cpb.HASH_ALGORITHM_SHA_256
    )
    for call, asked in (
        (owner.crypto.Encrypt, cpb.EncryptRequest(key="box", plaintext=b"p")),
        (owner.keys.GetPublicKey, kpb.GetPublicKeyRequest(key="box")),
        (owner.crypto.Verify, verify),
    ):
        assert refusal(call, asked).reason == "RECORD_INVALID"


def test_names_that_are_exchanged_between_two_keys_are_refused(superuser: Superuser, owner: Caller) -> None:
    one, other = made(owner, "secp256k1", name="one"), made(owner, "secp256k1", name="other")
    superuser(
        f"UPDATE cryptography.keys SET key_name = 'x' WHERE id = '{one.id}'",
        f"UPDATE cryptography.keys SET key_name = 'one' WHERE id = '{other.id}'",
        f"UPDATE cryptography.keys SET key_name = 'other' WHERE id = '{one.id}'",
    )
    forget()
    for ref in ("one", "other", one.id, other.id):
        assert refusal(owner.crypto.Sign, cpb.SignRequest(key=ref, message=b"m")).reason == "RECORD_INVALID"


def rows_of(superuser: Superuser, key_id: str) -> dict[str, Any]:
    row: dict[str, Any] = superuser(f"SELECT to_jsonb(k) AS row FROM cryptography.keys AS k WHERE id = '{key_id}'")[0]["row"]
    return row


def put_back(superuser: Superuser, row: dict[str, Any]) -> None:
    """Put the whole row back, MAC and all."""
    superuser(f"DELETE FROM cryptography.keys WHERE id = '{row['id']}'")
    insert = "INSERT INTO cryptography.keys SELECT (jsonb_populate_record(NULL::cryptography.keys, %s)).*"
    superuser(insert, parameters=(json.dumps(row),))


@pytest.mark.parametrize("narrowing", ["revoked", "compromised", "deactivated", "limited", "scheduled", "cancelled"])
def test_an_old_row_with_its_old_mac_is_refused_by_what_the_journal_knows(
    superuser: Superuser, owner: Caller, narrowing: str
) -> None:
    key = made(owner, "secp256k1")
    before = rows_of(superuser, key.id)
    owner.crypto.Sign(SIGN)
    match narrowing:
        case "revoked":
            owner.keys.RevokeKey(kpb.RevokeKeyRequest(key="k", reason="r"))
        case "compromised":
            owner.keys.MarkKeyCompromised(kpb.MarkKeyCompromisedRequest(key="k", reason="r"))
        case "limited":
            owner.keys.UpdateKey(kpb.UpdateKeyRequest(key="k", max_usage_count=1))
        case _:
            owner.keys.DeactivateKey(kpb.DeactivateKeyRequest(key="k"))
    if narrowing in ("scheduled", "cancelled"):
        owner.keys.ScheduleKeyDestruction(kpb.ScheduleKeyDestructionRequest(key="k"))
    if narrowing == "cancelled":  # what is put back is to be destroyed
        before = rows_of(superuser, key.id)
        owner.keys.CancelKeyDestruction(kpb.CancelKeyDestructionRequest(key="k"))
    put_back(superuser, before)
    assert refusal(owner.crypto.Sign, SIGN).reason == "RECORD_INVALID"
    assert refusal(owner.keys.GetKey, kpb.GetKeyRequest(key="k")).reason == "RECORD_INVALID"
    assert list(owner.keys.ListKeys(kpb.ListKeysRequest(), timeout=15).invalid_key_ids) == [key.id]


@pytest.mark.parametrize("column", ["user_id", "rpc", "request_id", "body_mac", "result"])
def test_a_stored_answer_that_is_planted_is_not_given(superuser: Superuser, owner: Caller, column: str) -> None:
    made(owner, "secp256k1")
    made(owner, "aes", name="box")
    requests: list[tuple[Any, Any]] = [
        (owner.crypto.Sign, cpb.SignRequest(key="k", message=b"m", request_id="r")),
        (owner.crypto.Encrypt, cpb.EncryptRequest(key="box", plaintext=b"p", request_id="r")),
        (owner.crypto.GenerateDataKey, cpb.GenerateDataKeyRequest(key="box", request_id="r")),
        (owner.keys.CreateKey, _with_id(create("aes", name="made"), "r")),
    ]
    answers = [call(request, timeout=30) for call, request in requests]
    mine = f"user_id = '{owner.user_id}' AND request_id = 'r'"
    match column:
        case "user_id":
            superuser(f"UPDATE cryptography.request_records SET user_id = gen_random_uuid() WHERE {mine}")
        case "rpc":
            superuser(f"UPDATE cryptography.request_records SET rpc = rpc || 'x' WHERE {mine}")
        case "request_id":
            superuser(f"UPDATE cryptography.request_records SET request_id = 'another' WHERE {mine}")
        case "body_mac":
            superuser(f"UPDATE cryptography.request_records SET body_mac = sha256(body_mac) WHERE {mine}")
        case "result":
            damage = "set_byte(result, 5, 255 - get_byte(result, 5))"
            superuser(f"UPDATE cryptography.request_records SET result = {damage} WHERE {mine}")
    for (call, request), answer in zip(requests, answers, strict=True):
        if column in ("body_mac", "result"):
            expected = "REQUEST_ID_REUSED" if column == "body_mac" else "RECORD_INVALID"
            assert refusal(call, request).reason == expected
        elif isinstance(request, kpb.CreateKeyRequest):
            assert refusal(call, request).reason == "NAME_TAKEN"
        else:
            # The record is not where it is looked for: the call is made, and charged, as if it were the first.
            assert call(request, timeout=30) != answer


@pytest.mark.parametrize("content", ["''", "'\\x01'::bytea", "sha256('x')", "decode(repeat('01', 200), 'hex')"])
def test_garbage_in_place_of_an_answer_is_no_internal_error(superuser: Superuser, owner: Caller, content: str) -> None:
    made(owner, "secp256k1")
    request = cpb.SignRequest(key="k", message=b"m", request_id="r")
    owner.crypto.Sign(request)
    superuser(f"UPDATE cryptography.request_records SET result = {content} WHERE user_id = '{owner.user_id}'")
    found = refusal(owner.crypto.Sign, request)
    assert (found.code, found.reason) == (grpc.StatusCode.DATA_LOSS, "RECORD_INVALID")


def test_an_answer_of_another_request_is_not_given(superuser: Superuser, owner: Caller) -> None:
    made(owner, "secp256k1")
    first, second = (cpb.SignRequest(key="k", message=text, request_id=text.decode()) for text in (b"one", b"two"))
    owner.crypto.Sign(first)
    owner.crypto.Sign(second)
    superuser(
        f"""UPDATE cryptography.request_records AS r SET result = o.result FROM cryptography.request_records AS o
        WHERE r.user_id = '{owner.user_id}' AND o.user_id = r.user_id AND r.request_id = 'two' AND o.request_id = 'one'"""
    )
    assert refusal(owner.crypto.Sign, second).reason == "RECORD_INVALID"


def _with_id(request: kpb.CreateKeyRequest, request_id: str) -> kpb.CreateKeyRequest:
    request.request_id = request_id
    return request


def test_a_destruction_that_is_planted_removes_no_object_of_the_token(attacked: RunningServer, superuser: Superuser) -> None:
    owner = attacked.caller()
    key = owner.keys.CreateKey(create("secp256k1", custody=kpb.CUSTODY_RESIDENT), timeout=30).key
    before = rows_of(superuser, key.id)
    superuser(
        f"UPDATE cryptography.keys SET destroyed_at = now(), encrypted_private_key = '', "
        f"destruction_scheduled_at = now() - interval '1 day' WHERE id = '{key.id}'"
    )
    with attacked.deployment.serving():  # a service that starts destroys at once what is due
        forget(3.0)
    put_back(superuser, before)
    assert owner.crypto.Sign(SIGN, timeout=15).signature


def test_an_epoch_that_is_planted_is_served_by_nobody(attacked: RunningServer, superuser: Superuser) -> None:
    superuser(
        """INSERT INTO cryptography.epochs (number, cause, system_identifier, timeline, database_oid, record_mac)
        SELECT number + 1, 'RECOVERED', system_identifier, timeline, database_oid, record_mac FROM cryptography.epochs
        ORDER BY number DESC LIMIT 1"""
    )
    try:
        with pytest.raises(AssertionError, match="begun without the token"), attacked.deployment.serving():
            pass
    finally:
        superuser("DELETE FROM cryptography.epochs WHERE cause = 'RECOVERED'")


def test_a_database_whose_epochs_were_removed_is_served_by_nobody(attacked: RunningServer, superuser: Superuser) -> None:
    superuser("CREATE TABLE public.kept_epochs AS SELECT * FROM cryptography.epochs", "DELETE FROM cryptography.epochs")
    try:
        with pytest.raises(AssertionError, match="has no epoch, and it was served before"), attacked.deployment.serving():
            pass
    finally:
        superuser("INSERT INTO cryptography.epochs SELECT * FROM public.kept_epochs", "DROP TABLE public.kept_epochs")


def test_a_limit_that_the_database_does_not_count_ends_all_the_same(
    attacked: RunningServer, superuser: Superuser, owner: Caller
) -> None:
    key = made(owner, "secp256k1")
    owner.keys.UpdateKey(kpb.UpdateKeyRequest(key="k", max_usage_count=3))
    reset = f"UPDATE cryptography.keys SET usage_counter = 0 WHERE id = '{key.id}'"
    outcomes = []
    for _ in range(6):
        try:
            owner.crypto.Sign(SIGN, timeout=15)
            outcomes.append("OK")
        except grpc.RpcError as error:
            outcomes.append(refusal_of(error).reason)
        superuser(reset)
        forget()
    assert outcomes.count("OK") <= 3
    assert outcomes[-1] == "RECORD_INVALID"


@pytest.mark.timeout(300)
def test_a_limit_ends_many_clients_at_once_where_the_database_says_that_it_charged(
    attacked: RunningServer, superuser: Superuser, owner: Caller
) -> None:
    """A replaced `settle` says OK and keeps nothing. Eight clients sign without a pause, and each slow read overlaps charges."""
    made(owner, "ed25519")
    owner.keys.UpdateKey(kpb.UpdateKeyRequest(key="k", max_usage_count=3))
    [kept] = superuser("SELECT pg_get_functiondef('cryptography.settle'::regproc) AS definition")
    ended, signatures = threading.Event(), []

    def sign_on(caller: Caller) -> str:
        """Sign until the key is refused, and return why; or until the others have gone on for long enough."""
        while not ended.is_set():
            try:
                signatures.append(caller.crypto.Sign(SIGN, timeout=15))
            except grpc.RpcError as error:
                return refusal_of(error).reason
        return "OK"

    superuser(SAYS_OK, _SLOW_READS)
    try:
        callers = [attacked.caller(owner.user_id) for _ in range(8)]
        with ThreadPoolExecutor(len(callers)) as pool:
            working = [pool.submit(sign_on, caller) for caller in callers]
            # Within a second on a fast machine. Who is never refused would sign on for good.
            wait(working, timeout=60)
            ended.set()
        assert {each.result() for each in working} == {"RECORD_INVALID"}
        assert len(signatures) <= 3
    finally:
        superuser(kept["definition"], "DROP POLICY slow ON cryptography.keys")


@pytest.mark.parametrize("verdicts", _VERDICTS)
def test_what_is_no_verdict_of_ours_gives_no_result(
    attacked: RunningServer, superuser: Superuser, owner: Caller, verdicts: str
) -> None:
    made(owner, "ed25519")
    owner.crypto.Sign(SIGN)
    kind, expression = _VERDICTS[verdicts]
    [kept] = superuser("SELECT pg_get_functiondef('cryptography.settle'::regproc) AS definition")
    drop = "DROP FUNCTION cryptography.settle"
    superuser(
        drop,
        f"CREATE FUNCTION cryptography.settle(writer UUID, number BIGINT, entries JSON) RETURNS {kind} "
        f"LANGUAGE plpgsql AS $$ BEGIN RETURN {expression}; END $$",
        "GRANT EXECUTE ON FUNCTION cryptography.settle TO kms_service",
    )
    try:
        assert refusal(owner.crypto.Sign, SIGN).reason == "RECORD_INVALID"
        batch = owner.crypto.BatchSign(cpb.BatchSignRequest(items=[SIGN, SIGN]))
        assert [reason_of(item) for item in batch.items] == ["RECORD_INVALID"] * 2
    finally:
        superuser(drop, kept["definition"], "GRANT EXECUTE ON FUNCTION cryptography.settle TO kms_service")
    owner.crypto.Sign(SIGN)
    assert "bug in the ledger" not in [line["event"] for line in attacked.log()]


def test_one_bad_verdict_is_of_its_item_alone(superuser: Superuser, owner: Caller) -> None:
    made(owner, "ed25519")
    [kept] = superuser("SELECT pg_get_functiondef('cryptography.settle'::regproc) AS definition")
    superuser(SAYS_OK.replace("'OK'", "CASE WHEN value->'details'->>'input_bytes' = '1' THEN 'FINE' ELSE 'OK' END"))
    try:
        batch = owner.crypto.BatchSign(cpb.BatchSignRequest(items=[SIGN, cpb.SignRequest(key="k", message=b"other")]))
        assert [reason_of(item) for item in batch.items] == ["RECORD_INVALID", "OK"]
    finally:
        superuser(kept["definition"])


@pytest.mark.parametrize("count", [3, 1000])
@pytest.mark.parametrize("verdict", ["REPEATED", "STALE", "USAGE_LIMIT_REACHED", "KEY_INACTIVE", "PERMISSION_DENIED", "FINE"])
def test_an_answer_that_was_kept_and_said_to_be_refused_lifts_no_limit(
    superuser: Superuser, unchecked: None, owner: Caller, verdict: str, count: int
) -> None:
    """A replaced `settle` keeps each answer, says that it charged nothing, and the same request is made again."""
    made(owner, "ed25519")
    owner.keys.UpdateKey(kpb.UpdateKeyRequest(key="k", max_usage_count=3))
    signed = owner.crypto.Sign(cpb.SignRequest(key="k", message=b"m", request_id="before"))
    [kept] = superuser("SELECT pg_get_functiondef('cryptography.settle'::regproc) AS definition")
    superuser(_KEEPS_ANSWERS.replace("{}", verdict))
    try:
        for number in range(4):
            request = cpb.SignRequest(key="k", message=b"m", request_id=f"order-{number}")
            reasons = {refusal(owner.crypto.Sign, request).reason for _ in range(3)}
            assert reasons <= {"RECORD_INVALID", verdict}
    finally:
        superuser(kept["definition"])
    # A count that was put back up covers them, and ends at the limit all the same.
    superuser("UPDATE cryptography.keys SET usage_counter = %s WHERE user_id = %s", parameters=(count, owner.user_id))
    outcomes = [outcome_of(owner, f"order-{number}") for number in range(4)]
    assert outcomes.count("OK") <= 2
    assert set(outcomes) <= {"OK", "RECORD_INVALID"}
    # The answer that was charged is still given.
    assert owner.crypto.Sign(cpb.SignRequest(key="k", message=b"m", request_id="before")) == signed


def outcome_of(owner: Caller, request_id: str) -> str:
    try:
        owner.crypto.Sign(cpb.SignRequest(key="k", message=b"m", request_id=request_id), timeout=15)
    except grpc.RpcError as error:
        return refusal_of(error).reason
    return "OK"


def reason_of(item: cpb.BatchSignResponse.Item) -> str:
    return item_reason(item.error) if item.WhichOneof("outcome") == "error" else "OK"
