"""Rotation on demand: the successor takes the name, and nothing that depended on the key is lost.

The promises of RotationService in docs/, over gRPC.
"""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import grpc
import pytest

from kms.v1 import audit_pb2 as apb
from kms.v1 import crypto_pb2 as cpb
from kms.v1 import keys_pb2 as kpb
from kms.v1 import rotation_pb2 as rpb
from tests.conformance.refusals import refusal, refusal_of
from tests.conformance.requests import create, made
from tests.fixtures.server import Caller, Deployment, RunningServer

SIGN = cpb.SignRequest(key="k", message=b"m")


def rotate(caller: Caller, **fields: object) -> rpb.Rotation:
    return caller.rotation.RotateKey(rotation_of(**fields), timeout=60).rotation


def rotation_of(**fields: object) -> rpb.RotateKeyRequest:
    return rpb.RotateKeyRequest(**{"key": "k", "reason": "yearly", **fields})  # type: ignore[arg-type]


def key_of(caller: Caller, ref: str = "k") -> kpb.Key:
    return caller.keys.GetKey(kpb.GetKeyRequest(key=ref)).key


@pytest.mark.parametrize("kind", ["secp256k1", "secp256r1", "ed25519", "rsa", "aes"])
def test_the_successor_takes_the_name_and_all_that_the_key_was(caller: Caller, kind: str) -> None:
    request = create(kind)
    request.max_usage_count = 7
    request.metadata["team"] = "payments"
    before = caller.keys.CreateKey(request, timeout=30).key
    rotation = rotate(caller)
    assert (rotation.status, rotation.error_message) == (rpb.ROTATION_STATUS_COMPLETED, "")
    assert (rotation.old_key_id, rotation.initiated_by, rotation.reason) == (before.id, str(caller.user_id), "yearly")
    after, predecessor = key_of(caller), key_of(caller, "k@1")
    assert (after.id, predecessor.id) == (rotation.new_key_id, before.id)
    assert after.id != before.id
    same = ("type", "purpose", "size_bits", "custody", "origin", "max_usage_count")
    assert [getattr(after, field) for field in same] == [getattr(before, field) for field in same]
    assert dict(after.metadata) == {"team": "payments"}
    assert (after.state, after.usage_count, after.version) == (kpb.KEY_STATE_ACTIVE, 0, 1)
    assert (predecessor.state, predecessor.version) == (kpb.KEY_STATE_INACTIVE, 2)
    if kind != "aes":
        assert after.public_key_pem != before.public_key_pem


def test_the_predecessor_still_decrypts_and_verifies_and_never_signs_or_encrypts_again(caller: Caller) -> None:
    made(caller, "aes")
    made(caller, "ed25519", name="s")
    old = caller.crypto.Encrypt(cpb.EncryptRequest(key="k", plaintext=b"secret")).ciphertext
    signature = caller.crypto.Sign(cpb.SignRequest(key="s", message=b"m"))
    rotate(caller)
    rotate(caller, key="s")
    assert caller.crypto.Decrypt(cpb.DecryptRequest(ciphertext=old)).plaintext == b"secret"
    verify = cpb.VerifyRequest(key="s@1", message=b"m", signature=signature.signature)
    assert caller.crypto.Verify(verify) == cpb.VerifyResponse(valid=True, key_id=signature.key_id)
    assert refusal(caller.crypto.Encrypt, cpb.EncryptRequest(key="k@1", plaintext=b"p")).reason == "KEY_INACTIVE"
    assert refusal(caller.crypto.Sign, cpb.SignRequest(key="s@1", message=b"m")).reason == "KEY_INACTIVE"
    assert refusal(caller.keys.ReactivateKey, kpb.ReactivateKeyRequest(key="s@1")).reason == "KEY_INACTIVE"
    assert caller.crypto.Sign(cpb.SignRequest(key="s", message=b"m")).key_id == key_of(caller, "s").id


def test_a_decryption_that_names_the_key_goes_on_after_rotations(caller: Caller) -> None:
    made(caller, "aes")
    made(caller, "aes", name="other")
    old = caller.crypto.Encrypt(cpb.EncryptRequest(key="k", plaintext=b"secret")).ciphertext
    foreign = caller.crypto.Encrypt(cpb.EncryptRequest(key="other", plaintext=b"secret")).ciphertext
    for _ in range(2):
        rotate(caller)
    assert caller.crypto.Decrypt(cpb.DecryptRequest(ciphertext=old, key="k")).plaintext == b"secret"
    assert caller.crypto.Decrypt(cpb.DecryptRequest(ciphertext=old, key="k@1")).plaintext == b"secret"
    for key in ("k@2", key_of(caller).id):
        assert refusal(caller.crypto.Decrypt, cpb.DecryptRequest(ciphertext=old, key=key)).reason == "INCORRECT_KEY"
    assert refusal(caller.crypto.Decrypt, cpb.DecryptRequest(ciphertext=foreign, key="k")).reason == "INCORRECT_KEY"


def test_the_lineage_is_shown_in_both_directions(caller: Caller) -> None:
    ids = [made(caller, "ed25519").id]
    ids += [rotate(caller).new_key_id for _ in range(10)]  # ten: the numbers are no texts
    names = [*(f"k@{number}" for number in range(1, 11)), "k"]
    shown = [key_of(caller, name) for name in names]
    assert [key.id for key in shown] == ids
    assert [key.predecessor_id for key in shown] == ["", *ids[:-1]]
    assert [key.successor_id for key in shown] == [*ids[1:], ""]
    assert [key.HasField("superseded_at") for key in shown] == [True] * 10 + [False]


def test_a_list_of_a_lineage_has_its_keys_alone(caller: Caller, server: RunningServer) -> None:
    ids = [made(caller, "ed25519").id]
    for name in ("k-2", "k2", "other"):
        made(caller, "ed25519", name=name)
    ids += [rotate(caller).new_key_id for _ in range(3)]
    rotate(caller, key="other")

    def listed(**fields: object) -> dict[str, str]:
        return {key.name: key.id for key in caller.keys.ListKeys(kpb.ListKeysRequest(**fields)).keys}  # type: ignore[arg-type]

    names = ["k@1", "k@2", "k@3", "k"]
    for ref in ("k", "k@1", ids[2]):
        assert listed(lineage=ref) == dict(zip(names, ids, strict=True))
    assert list(listed(lineage="k", state=kpb.KEY_STATE_ACTIVE)) == ["k"]
    assert list(listed(lineage="k", name_prefix="k2")) == []
    pages: list[list[str]] = []
    request = kpb.ListKeysRequest(lineage="k@2", page_size=1)
    while not pages or request.page_token:
        page = caller.keys.ListKeys(request)
        pages.append([key.name for key in page.keys])
        request.page_token = page.next_page_token
    assert pages == [["k"], ["k@1"], ["k@2"], ["k@3"]]
    token = caller.keys.ListKeys(kpb.ListKeysRequest(lineage="k", page_size=1)).next_page_token
    for lineage in ("", "other"):
        found = refusal(caller.keys.ListKeys, kpb.ListKeysRequest(page_token=token, lineage=lineage))
        assert (found.reason, found.metadata) == ("MALFORMED", {"field": "page_token"})
    assert listed(lineage=ids[0], page_size=1, page_token=token) == {"k@1": ids[0]}, "any key of the lineage names it"
    stranger = server.caller()
    for ref in ("none", "k@4", ids[0]):
        assert refusal(stranger.keys.ListKeys, kpb.ListKeysRequest(lineage=ref)).reason == "KEY_NOT_FOUND"


def test_a_key_that_lives_for_a_while_has_a_successor_that_lives_as_long(caller: Caller) -> None:
    request = create("ed25519")
    request.expires_at.FromDatetime(datetime.now(UTC) + timedelta(days=30))
    before = caller.keys.CreateKey(request).key
    rotate(caller)
    after = key_of(caller)
    lifetimes = [each.expires_at.ToDatetime() - each.created_at.ToDatetime() for each in (before, after)]
    assert abs(lifetimes[0] - lifetimes[1]) < timedelta(milliseconds=1)
    assert after.expires_at.ToDatetime() > before.expires_at.ToDatetime()


def test_a_resident_key_has_a_resident_successor(server: RunningServer) -> None:
    caller = server.caller()
    before = caller.keys.CreateKey(create("secp256k1", custody=kpb.CUSTODY_RESIDENT), timeout=30).key
    assert rotate(caller).status == rpb.ROTATION_STATUS_COMPLETED
    assert key_of(caller).custody == kpb.CUSTODY_RESIDENT
    assert caller.crypto.Sign(SIGN).key_id == key_of(caller).id
    assert key_of(caller, before.id).name == "k@1"


def bring_into(caller: Caller, state: str) -> None:
    """Make a key k in *state*."""
    request = create("ed25519")
    if state == "pre-active":
        request.activated_at.FromDatetime(datetime.now(UTC) + timedelta(days=1))
    if state == "spent":
        request.max_usage_count = 1
    caller.keys.CreateKey(request)
    if state == "spent":
        caller.crypto.Sign(SIGN)
    if state in ("inactive", "pending"):
        caller.keys.DeactivateKey(kpb.DeactivateKeyRequest(key="k"))
    if state == "pending":
        caller.keys.ScheduleKeyDestruction(kpb.ScheduleKeyDestructionRequest(key="k"))
    if state == "revoked":
        caller.keys.RevokeKey(kpb.RevokeKeyRequest(key="k", reason="lost"))
    if state == "compromised":
        caller.keys.MarkKeyCompromised(kpb.MarkKeyCompromisedRequest(key="k", reason="lost"))


@pytest.mark.parametrize("state", ["active", "inactive", "spent"])
def test_a_key_in_these_states_is_rotated_and_its_successor_is_active(caller: Caller, state: str) -> None:
    bring_into(caller, state)
    assert rotate(caller).status == rpb.ROTATION_STATUS_COMPLETED
    assert caller.crypto.Sign(SIGN).key_id == key_of(caller).id


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ("revoked", "KEY_REVOKED"),
        ("compromised", "KEY_COMPROMISED"),
        ("pending", "KEY_PENDING_DESTRUCTION"),
        ("pre-active", "KEY_PRE_ACTIVE"),
    ],
)
def test_a_key_in_these_states_is_not_rotated_and_nothing_is_logged(caller: Caller, state: str, reason: str) -> None:
    bring_into(caller, state)
    found = refusal(caller.rotation.RotateKey, rotation_of())
    assert (found.reason, found.code) == (reason, grpc.StatusCode.FAILED_PRECONDITION)
    assert caller.rotation.ListRotations(rpb.ListRotationsRequest()) == rpb.ListRotationsResponse()


def test_a_compromised_key_is_rotated_if_the_caller_says_so_and_stays_compromised(caller: Caller) -> None:
    bring_into(caller, "compromised")
    assert rotate(caller, allow_compromised=True).status == rpb.ROTATION_STATUS_COMPLETED
    assert key_of(caller, "k@1").state == kpb.KEY_STATE_COMPROMISED
    assert caller.crypto.Sign(SIGN).key_id == key_of(caller).id


def test_a_key_that_has_a_successor_is_not_rotated_again(caller: Caller) -> None:
    made(caller, "ed25519")
    rotate(caller)
    found = refusal(caller.rotation.RotateKey, rotation_of(key="k@1"))
    assert (found.reason, found.code) == ("KEY_INACTIVE", grpc.StatusCode.FAILED_PRECONDITION)


def test_a_key_of_another_user_is_not_there_and_neither_is_its_rotation(server: RunningServer) -> None:
    owner, other = server.caller(), server.caller()
    key = made(owner, "ed25519")
    rotation = rotate(owner)
    for ref in (key.id, "k", "k@1"):
        assert refusal(other.rotation.RotateKey, rotation_of(key=ref)).reason == "KEY_NOT_FOUND"
    found = refusal(other.rotation.GetRotation, rpb.GetRotationRequest(rotation_id=rotation.id))
    assert (found.reason, found.code) == ("ROTATION_NOT_FOUND", grpc.StatusCode.NOT_FOUND)
    assert other.rotation.ListRotations(rpb.ListRotationsRequest()) == rpb.ListRotationsResponse()
    assert owner.rotation.GetRotation(rpb.GetRotationRequest(rotation_id=rotation.id)).rotation == rotation


def test_of_two_rotations_that_start_at_once_one_wins_and_the_other_caller_gets_it(server: RunningServer) -> None:
    caller = server.caller()
    made(caller, "rsa")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: outcome(server.caller(caller.user_id), f"reason {number}"), range(8)))
    assert len({rotation.id for rotation in found}) == len({rotation.new_key_id for rotation in found})
    assert {rotation.status for rotation in found} == {rpb.ROTATION_STATUS_COMPLETED}
    listed = caller.rotation.ListRotations(rpb.ListRotationsRequest()).rotations
    # A caller who comes when the first rotation has ended begins another: each has one successor, in one lineage.
    assert {rotation.id for rotation in listed} == {rotation.id for rotation in found}
    newest = key_of(caller)
    for rotation in listed:
        assert (rotation.new_key_id, newest.predecessor_id) == (newest.id, rotation.old_key_id)
        newest = key_of(caller, rotation.old_key_id)


def outcome(caller: Caller, reason: str) -> rpb.Rotation:
    return rotate(caller, reason=reason)


def test_a_rotation_that_is_repeated_answers_with_the_same_rotation(caller: Caller) -> None:
    made(caller, "ed25519")
    first = rotate(caller, request_id="order-1")
    assert rotate(caller, request_id="order-1") == first
    assert len(caller.rotation.ListRotations(rpb.ListRotationsRequest()).rotations) == 1
    again = refusal(caller.rotation.RotateKey, rotation_of(request_id="order-1", reason="other"))
    assert again.reason == "REQUEST_ID_REUSED"


def test_rotations_are_listed_the_newest_first_by_key_and_by_status(caller: Caller) -> None:
    made(caller, "ed25519")
    made(caller, "aes", name="other")
    ids = [rotate(caller).id for _ in range(5)]
    other = rotate(caller, key="other")
    pages, token = [], ""
    while True:
        page = caller.rotation.ListRotations(rpb.ListRotationsRequest(page_size=2, page_token=token))
        pages.append([rotation.id for rotation in page.rotations])
        if not (token := page.next_page_token):
            break
    assert pages == [[other.id, ids[4]], [ids[3], ids[2]], [ids[1], ids[0]]]
    of_key = caller.rotation.ListRotations(rpb.ListRotationsRequest(key="other")).rotations
    assert [rotation.id for rotation in of_key] == [other.id]
    middle = caller.rotation.ListRotations(rpb.ListRotationsRequest(key="k@3")).rotations
    assert [rotation.id for rotation in middle] == [ids[2], ids[1]]
    failed = rpb.ListRotationsRequest(status=rpb.ROTATION_STATUS_FAILED)
    assert not caller.rotation.ListRotations(failed).rotations
    first = caller.rotation.ListRotations(rpb.ListRotationsRequest(page_size=1))
    moved = rpb.ListRotationsRequest(page_size=1, page_token=first.next_page_token, key="k")
    assert refusal(caller.rotation.ListRotations, moved).reason == "MALFORMED"


def test_a_rotation_is_an_event_of_both_keys_and_in_the_trail(server: RunningServer) -> None:
    caller, auditor = server.caller(), server.auditor()
    key = made(caller, "ed25519")
    rotation = rotate(caller, reason="the key is old")
    search = apb.SearchEventsRequest(user_id=str(caller.user_id))
    events = auditor.audit.SearchEvents(search).events
    kinds = [(event.event_type, event.resource_id) for event in reversed(events)]
    assert kinds == [
        ("key.created", key.id),
        ("key.rotation_requested", key.id),
        ("key.superseded", key.id),
        ("key.created", rotation.new_key_id),
    ]


def test_the_verifier_finds_nothing_after_rotations(deployment: Deployment) -> None:
    with deployment.serving() as server:
        caller, auditor = server.caller(), server.auditor()
        made(caller, "ed25519")
        for _ in range(3):
            caller.crypto.Sign(SIGN)
            rotate(caller)
        report = auditor.audit.VerifyTrail(apb.VerifyTrailRequest(), timeout=60)
    assert not report.HasField("finding")
    assert not report.keys.findings
    assert report.keys.compared >= 4


def test_callers_who_use_the_name_notice_nothing(server: RunningServer) -> None:
    """Ten rotations while four clients sign and encrypt by name: each result is good under the key that it names."""
    caller = server.caller()
    made(caller, "ed25519")
    made(caller, "aes", name="e")

    def use(number: int) -> list[tuple[bytes, cpb.SignResponse, cpb.EncryptResponse]]:
        client, made_here = server.caller(caller.user_id), []
        for n in range(25):
            message = b"%d-%d" % (number, n)
            signed = client.crypto.Sign(cpb.SignRequest(key="k", message=message), timeout=60)
            sealed = client.crypto.Encrypt(cpb.EncryptRequest(key="e", plaintext=message), timeout=60)
            made_here.append((message, signed, sealed))
        return made_here

    with ThreadPoolExecutor(5) as pool:
        working = [pool.submit(use, number) for number in range(4)]
        for _ in range(5):
            rotate(caller)
            rotate(caller, key="e")
        results = [each for work in working for each in work.result()]
    assert len(results) == 100
    for message, signed, sealed in results:
        verify = cpb.VerifyRequest(key=signed.key_id, message=message, signature=signed.signature)
        assert caller.crypto.Verify(verify).valid
        assert caller.crypto.Decrypt(cpb.DecryptRequest(ciphertext=sealed.ciphertext)).plaintext == message


def test_each_key_of_a_lineage_has_a_limit_of_its_own_and_keeps_it(server: RunningServer) -> None:
    caller = server.caller()
    request = create("ed25519")
    request.max_usage_count = 10
    caller.keys.CreateKey(request)

    def sign_on(client: Caller) -> list[str]:
        signed = []
        for _ in range(20):
            try:
                signed.append(client.crypto.Sign(SIGN, timeout=60).key_id)
            except grpc.RpcError as error:
                assert refusal_of(error).reason == "USAGE_LIMIT_REACHED"
        return signed

    with ThreadPoolExecutor(4) as pool:
        working = [pool.submit(sign_on, server.caller(caller.user_id)) for _ in range(3)]
        for _ in range(3):
            rotate(caller)
        signed = [key_id for work in working for key_id in work.result()]
    keys = [key_of(caller, name) for name in ("k@1", "k@2", "k@3", "k")]
    assert [signed.count(key.id) for key in keys] == [key.usage_count for key in keys]
    assert all(key.usage_count <= 10 for key in keys)
