"""ReEncrypt: a ciphertext moves to the current key of its lineage, or to another key, and its plaintext never leaves."""

import json
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from kms.v1 import crypto_pb2 as cpb
from kms.v1 import keys_pb2 as kpb
from tests.conformance.refusals import item_reason, refusal, refusal_of
from tests.conformance.requests import create, made
from tests.conformance.test_recovery import PERMISSIONS, recoverer
from tests.conformance.test_repeats import rows
from tests.conformance.test_rotation import key_of, rotate
from tests.fixtures.server import Caller, RunningServer

SECRET = b"\x00 a secret \xff"


def encrypted(caller: Caller, key: str = "k", **fields: Any) -> bytes:  # noqa: ANN401
    return bytes(caller.crypto.Encrypt(cpb.EncryptRequest(key=key, plaintext=SECRET, **fields)).ciphertext)


def opened(caller: Caller, ciphertext: bytes, aad: bytes = b"") -> cpb.DecryptResponse:
    return caller.crypto.Decrypt(cpb.DecryptRequest(ciphertext=ciphertext, aad=aad))


def moved(caller: Caller, ciphertext: bytes, **fields: Any) -> cpb.ReEncryptResponse:  # noqa: ANN401
    return caller.crypto.ReEncrypt(cpb.ReEncryptRequest(ciphertext=ciphertext, **fields))


def refused(caller: Caller, ciphertext: bytes, **fields: Any) -> tuple[str, dict[str, str]]:  # noqa: ANN401
    found = refusal(caller.crypto.ReEncrypt, cpb.ReEncryptRequest(ciphertext=ciphertext, **fields))
    return found.reason, found.metadata


def trail(server: RunningServer, caller: Caller) -> Sequence[Any]:
    query = """
        SELECT action, resource_id::text, severity, event_details FROM audit.security_events
        WHERE user_id = %s AND event_type = 'key.used' AND outcome = 'success' AND action LIKE '%%.reencrypt'
        ORDER BY created_at
    """
    return rows(server.deployment, query, caller.user_id)


def counts(caller: Caller) -> dict[str, int]:
    return {key.name: key.usage_count for key in caller.keys.ListKeys(kpb.ListKeysRequest()).keys}


@pytest.mark.parametrize("kind", ["aes", "rsa-encryption"])
def test_a_ciphertext_moves_to_the_current_key_of_its_lineage_after_any_number_of_rotations(caller: Caller, kind: str) -> None:
    first = made(caller, kind)
    old = encrypted(caller)
    for _ in range(2):
        rotate(caller)
    answer = moved(caller, old)
    assert (answer.key_id, answer.source_key_id) == (key_of(caller).id, first.id)
    assert answer.ciphertext[1:17] == uuid.UUID(answer.key_id).bytes
    new = opened(caller, answer.ciphertext)
    assert (new.plaintext, new.key_id) == (SECRET, answer.key_id)
    assert opened(caller, old).plaintext == SECRET, "the old ciphertext stays as it is"


def test_a_ciphertext_of_the_current_key_is_encrypted_again_under_a_fresh_nonce(caller: Caller) -> None:
    made(caller, "aes")
    old = encrypted(caller)
    answers = [moved(caller, old) for _ in range(3)]
    assert {answer.source_key_id for answer in answers} == {answer.key_id for answer in answers} == {key_of(caller).id}
    assert len({old[17:29], *(answer.ciphertext[17:29] for answer in answers)}) == 4
    assert counts(caller) == {"k": 4}


def test_associated_data_stays_unless_the_caller_gives_another(caller: Caller) -> None:
    made(caller, "aes")
    old = encrypted(caller, aad=b"row 1")
    rotate(caller)
    for fields, aad in (({}, b"row 1"), ({"new_aad": b"row 2"}, b"row 2"), ({"new_aad": b""}, b"")):
        new = moved(caller, old, aad=b"row 1", **fields).ciphertext
        assert opened(caller, new, aad).plaintext == SECRET
        if aad != b"row 1":
            assert refusal(caller.crypto.Decrypt, cpb.DecryptRequest(ciphertext=new, aad=b"row 1")).reason == "CIPHERTEXT_INVALID"
    assert refused(caller, old)[0] == "CIPHERTEXT_INVALID"
    assert refused(caller, old, aad=b"row 2", new_aad=b"row 1")[0] == "CIPHERTEXT_INVALID"


def test_a_ciphertext_moves_to_another_key_of_the_caller_and_of_another_type(caller: Caller) -> None:
    made(caller, "aes")
    made(caller, "aes", name="other")
    made(caller, "rsa-encryption", name="rsa")
    old = encrypted(caller, aad=b"a")
    for name in ("other", key_of(caller, "other").id):
        answer = moved(caller, old, aad=b"a", key=name)
        assert answer.key_id == key_of(caller, "other").id
        assert opened(caller, answer.ciphertext, b"a").plaintext == SECRET
    to_rsa = moved(caller, old, aad=b"a", key="rsa", new_aad=b"")
    assert opened(caller, to_rsa.ciphertext).plaintext == SECRET
    back = moved(caller, to_rsa.ciphertext, key="k")
    assert (back.source_key_id, opened(caller, back.ciphertext).plaintext) == (key_of(caller, "rsa").id, SECRET)


def test_what_does_not_fit_the_new_key_is_named(caller: Caller) -> None:
    made(caller, "aes")
    made(caller, "rsa-encryption", name="rsa")
    made(caller, "ed25519", name="ec")
    old = encrypted(caller, aad=b"a")
    long = caller.crypto.Encrypt(cpb.EncryptRequest(key="k", plaintext=bytes(300))).ciphertext
    assert refused(caller, old, aad=b"a", key="rsa") == ("MALFORMED", {"field": "new_aad"})
    assert refused(caller, long, key="rsa") == ("MALFORMED", {"field": "ciphertext"})
    hashed = {"oaep_hash": cpb.HASH_ALGORITHM_SHA_256}
    assert refused(caller, old, aad=b"a", **hashed) == ("MALFORMED", {"field": "oaep_hash"})
    assert refused(caller, old, aad=b"a", key="ec")[0] == "WRONG_PURPOSE"
    assert refused(caller, old, aad=b"a", key="none")[0] == "KEY_NOT_FOUND"
    assert counts(caller) == {"ec": 0, "k": 2, "rsa": 0}


def test_the_trail_has_both_operations_and_the_charge_is_one_encryption(caller: Caller, server: RunningServer) -> None:
    first = made(caller, "aes")
    old = encrypted(caller)
    rotate(caller)
    answer = moved(caller, old)
    (opening, old_id, low, opening_details), (closing, new_id, low_too, details) = trail(server, caller)
    assert (opening, old_id, closing, new_id) == ("decrypt.reencrypt", first.id, "encrypt.reencrypt", answer.key_id)
    assert (low, low_too) == ("low", "low")
    assert (opening_details["charged"], details["charged"], details["use_number"]) == (False, True, 1)
    assert opening_details["request_id"] == details["request_id"]
    assert counts(caller) == {"k": 1, "k@1": 1}
    assert SECRET.hex() not in json.dumps([opening_details, details])


def test_a_limit_is_exact_over_two_callers_at_once(server: RunningServer) -> None:
    caller = server.caller()
    made(caller, "aes", name="from")
    request = create("aes")
    request.max_usage_count = 5
    caller.keys.CreateKey(request, timeout=30)
    old = encrypted(caller, "from")
    callers = [caller, server.again(caller)]

    def once(number: int) -> str:
        try:
            moved(callers[number % 2], old, key="k")
        except grpc.RpcError as error:
            return refusal_of(error).reason
        return "OK"

    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(once, range(12)))
    assert sorted(outcomes) == ["OK"] * 5 + ["USAGE_LIMIT_REACHED"] * 7
    assert counts(caller) == {"from": 1, "k": 5}
    assert sum(action == "encrypt.reencrypt" for action, *_ in trail(server, caller)) == 5
    before = len(trail(server, caller))
    assert refused(caller, old, key="k")[0] == "USAGE_LIMIT_REACHED"
    assert len(trail(server, caller)) == before, "where nothing can be encrypted nothing is decrypted"


def test_a_repeat_is_free_and_gives_the_same_ciphertext(caller: Caller, server: RunningServer) -> None:
    made(caller, "aes")
    old = encrypted(caller)
    rotate(caller)
    first = moved(caller, old, request_id="move-1")
    assert [moved(caller, old, request_id="move-1") for _ in range(3)] == [first] * 3
    assert moved(caller, old).ciphertext != first.ciphertext
    assert counts(caller) == {"k": 2, "k@1": 1}
    assert len(trail(server, caller)) == 4
    assert refused(caller, old, request_id="move-1", new_aad=b"x")[0] == "REQUEST_ID_REUSED"
    [(stored,)] = rows(server.deployment, "SELECT result FROM cryptography.request_records WHERE rpc = 'ReEncrypt'")[-1:]
    assert SECRET not in bytes(stored)


@pytest.mark.parametrize("state", sorted(PERMISSIONS))
def test_a_compromised_or_revoked_key_gives_up_its_ciphertexts_by_flag_and_permission_alone(
    server: RunningServer, state: str
) -> None:
    for caller, permitted in ((recoverer(server), True), (server.caller(), False)):
        made(caller, "aes")
        old = encrypted(caller)
        rotate(caller)
        if state == "compromised":
            caller.keys.MarkKeyCompromised(kpb.MarkKeyCompromisedRequest(key="k@1", reason="r"))
        else:
            caller.keys.RevokeKey(kpb.RevokeKeyRequest(key="k@1", reason="r"))
        assert refused(caller, old)[0] == f"KEY_{state.upper()}"
        other = next(each for each in PERMISSIONS if each != state)
        assert refused(caller, old, **{f"allow_{other}": True})[0] == f"KEY_{state.upper()}"
        flag = {f"allow_{state}": True}
        if not permitted:
            assert refused(caller, old, **flag) == ("PERMISSION_DENIED", {"permission": PERMISSIONS[state]})
            assert trail(server, caller) == []
            continue
        assert opened(caller, moved(caller, old, **flag).ciphertext).plaintext == SECRET
        assert [(action, severity) for action, _, severity, _ in trail(server, caller)] == [
            ("decrypt.reencrypt", "high"),
            ("encrypt.reencrypt", "low"),
        ]


def test_a_current_key_that_cannot_encrypt_is_refused_with_its_state(caller: Caller) -> None:
    made(caller, "aes")
    old = encrypted(caller)
    rotate(caller)
    assert refused(caller, old, key="k@1")[0] == "KEY_INACTIVE"
    caller.keys.DeactivateKey(kpb.DeactivateKeyRequest(key="k"))
    assert refused(caller, old)[0] == "KEY_INACTIVE"


def test_anothers_ciphertext_does_not_move_and_does_not_tell(new_caller: Callable[[], Caller]) -> None:
    ada, bob = new_caller(), new_caller()
    made(ada, "aes")
    made(bob, "aes")
    ciphertext = encrypted(ada)
    unknown = ciphertext[:1] + uuid.uuid4().bytes + ciphertext[17:]
    for fields in ({}, {"key": "k"}):
        requests = [cpb.ReEncryptRequest(ciphertext=each, **fields) for each in (ciphertext, unknown)]  # type: ignore[arg-type]
        theirs, nobodys = (refusal(bob.crypto.ReEncrypt, request) for request in requests)
        assert theirs.reason == "KEY_NOT_FOUND"
        assert theirs == nobodys
    assert refused(ada, ciphertext, key=key_of(bob).id)[0] == "KEY_NOT_FOUND"


def test_a_ciphertext_of_another_key_is_incorrect_for_the_source_key_named(caller: Caller) -> None:
    made(caller, "aes")
    made(caller, "aes", name="other")
    old = encrypted(caller)
    rotate(caller)
    for name in ("k", "k@1"):
        moved(caller, old, source_key=name)
    for name in ("other", key_of(caller).id):
        assert refused(caller, old, source_key=name)[0] == "INCORRECT_KEY"
    renamed = old[:1] + uuid.UUID(key_of(caller, "other").id).bytes + old[17:]
    assert refused(caller, renamed)[0] == "CIPHERTEXT_INVALID"
    assert refused(caller, b"\x01" * 20)[0] == "CIPHERTEXT_INVALID"


def test_each_item_of_a_batch_has_its_own_outcome(caller: Caller, server: RunningServer) -> None:
    made(caller, "aes")
    old = [encrypted(caller, aad=bytes([number])) for number in range(3)]
    rotate(caller)
    items = [cpb.ReEncryptRequest(ciphertext=each, aad=bytes([number])) for number, each in enumerate(old)]
    items.insert(1, cpb.ReEncryptRequest(ciphertext=old[0], aad=b"wrong"))
    items.insert(2, cpb.ReEncryptRequest(ciphertext=old[0], key="@"))
    answers = caller.crypto.BatchReEncrypt(cpb.BatchReEncryptRequest(items=items)).items
    assert [item_reason(each.error) if each.HasField("error") else "OK" for each in answers] == [
        *("OK", "CIPHERTEXT_INVALID", "MALFORMED", "OK", "OK")
    ]
    results = [each.result for each in answers if each.HasField("result")]
    plaintexts = [opened(caller, each.ciphertext, bytes([number])).plaintext for number, each in enumerate(results)]
    assert plaintexts == [SECRET] * 3
    assert counts(caller) == {"k": 3, "k@1": 3}
    charged = [details["use_number"] for action, *_, details in trail(server, caller) if action == "encrypt.reencrypt"]
    assert charged == [1, 2, 3]
