"""KeyService: what it makes, shows, lists and refuses."""

import uuid
from collections.abc import Callable

import grpc
import psycopg
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_der_public_key, load_pem_public_key

from kms.v1 import keys_pb2 as kpb
from tests.conformance.refusals import refusal
from tests.conformance.requests import KEY_TYPES, create, made
from tests.fixtures.server import Caller, RunningServer

COPIES = b"""
    INSERT INTO cryptography.keys (
        user_id, key_name, key_type, key_purpose, public_key, encrypted_private_key, key_strength, custody, origin
    )
        SELECT user_id, 'n' || lpad(n::text, 4, '0'), key_type, key_purpose, public_key, encrypted_private_key, key_strength,
            custody, origin
        FROM cryptography.keys CROSS JOIN generate_series(1, 2499) AS n
        WHERE user_id = %s
"""


@pytest.mark.parametrize(
    ("kind", "size_bits"),
    [
        ("secp256k1", 256),
        ("secp256r1", 256),
        ("ed25519", 256),
        ("rsa", 2048),
        ("rsa-encryption", 3072),
        ("aes", 128),
        ("aes", 192),
        ("aes", 256),
    ],
)
def test_each_key_type_is_made_and_shown(caller: Caller, kind: str, size_bits: int) -> None:
    key = made(caller, kind, size_bits=size_bits)
    assert (key.type, key.purpose, key.size_bits) == (*KEY_TYPES[kind], size_bits)
    assert (key.name, key.state, key.origin, key.usage_count, key.version) == ("k", kpb.KEY_STATE_ACTIVE, "GENERATED", 0, 1)
    assert key.created_at.seconds > 0
    assert caller.keys.GetKey(kpb.GetKeyRequest(key="k")).key == key
    assert caller.keys.GetKey(kpb.GetKeyRequest(key=key.id)).key == key


@pytest.mark.parametrize("kind", ["secp256k1", "secp256r1", "ed25519", "rsa"])
def test_the_public_key_is_spki_of_the_type_and_size(caller: Caller, kind: str) -> None:
    key = made(caller, kind)
    found = caller.keys.GetPublicKey(kpb.GetPublicKeyRequest(key="k"))
    assert (found.key_id, found.type, found.public_key_pem) == (key.id, key.type, key.public_key_pem)
    public = load_pem_public_key(found.public_key_pem.encode())
    assert load_der_public_key(found.public_key_der) == public
    if isinstance(public, ec.EllipticCurvePublicKey):
        assert public.curve.name == kind
    elif isinstance(public, rsa.RSAPublicKey):
        assert (public.key_size, public.public_numbers().e) == (2048, 65537)
    else:
        assert isinstance(public, ed25519.Ed25519PublicKey)


def test_an_aes_key_shows_a_check_value_and_has_no_public_half(caller: Caller) -> None:
    key = made(caller, "aes")
    assert (len(bytes.fromhex(key.check_value)), key.public_key_pem) == (3, "")
    assert refusal(caller.keys.GetPublicKey, kpb.GetPublicKeyRequest(key="k")).reason == "WRONG_PURPOSE"


def test_custody_is_stated_and_a_weaker_one_is_refused_not_substituted(caller: Caller) -> None:
    assert made(caller, "secp256k1", name="a").custody == kpb.CUSTODY_WRAPPED
    # SoftHSM 2.6 cannot wrap Ed25519 keys; a token that can passes as well.
    sealed = made(caller, "ed25519", name="b").custody
    assert sealed in (kpb.CUSTODY_SEALED, kpb.CUSTODY_WRAPPED)
    request = create("ed25519", name="c", custody=kpb.CUSTODY_WRAPPED)
    if sealed == kpb.CUSTODY_SEALED:
        assert refusal(caller.keys.CreateKey, request).reason == "CUSTODY_UNAVAILABLE"
        assert refusal(caller.keys.GetKey, kpb.GetKeyRequest(key="c")).reason == "KEY_NOT_FOUND"


@pytest.mark.parametrize(
    ("key_type", "purpose"),
    [
        (kpb.KEY_TYPE_SECP256K1, kpb.KEY_PURPOSE_ENCRYPTION),
        (kpb.KEY_TYPE_ED25519, kpb.KEY_PURPOSE_DERIVATION),
        (kpb.KEY_TYPE_AES, kpb.KEY_PURPOSE_SIGNING),
        (kpb.KEY_TYPE_RSA, kpb.KEY_PURPOSE_AUTHENTICATION),
    ],
)
def test_a_pair_that_is_not_in_the_table_is_refused(
    caller: Caller, key_type: "kpb.KeyType.ValueType", purpose: "kpb.KeyPurpose.ValueType"
) -> None:
    found = refusal(caller.keys.CreateKey, kpb.CreateKeyRequest(name="k", type=key_type, purpose=purpose))
    assert (found.code, found.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "WRONG_PURPOSE")


def test_a_name_is_taken_once_per_user(new_caller: Callable[[], Caller]) -> None:
    ada, bob = new_caller(), new_caller()
    made(ada, "aes")
    found = refusal(ada.keys.CreateKey, create("aes"))
    assert (found.code, found.reason) == (grpc.StatusCode.ALREADY_EXISTS, "NAME_TAKEN")
    made(bob, "aes")


def test_a_repeated_create_key_answers_with_the_key_that_was_made(caller: Caller) -> None:
    request = create("aes")
    request.request_id = "r"
    calls = [caller.keys.CreateKey.future(request, timeout=20) for _ in range(6)]
    assert len({call.result().key.id for call in calls}) == 1
    assert len(caller.keys.ListKeys(kpb.ListKeysRequest()).keys) == 1
    request.name = "another"
    assert refusal(caller.keys.CreateKey, request).reason == "REQUEST_ID_REUSED"


def test_a_repeated_create_key_tells_the_state_that_the_key_has_now(caller: Caller) -> None:
    request = create("aes")
    request.request_id = "r"
    made_first = caller.keys.CreateKey(request).key
    caller.keys.DeactivateKey(kpb.DeactivateKeyRequest(key=made_first.id))
    assert caller.keys.CreateKey(request).key.state == kpb.KEY_STATE_INACTIVE
    caller.keys.RevokeKey(kpb.RevokeKeyRequest(key=made_first.id, reason="lost"))
    assert refusal(caller.keys.CreateKey, request).reason == "KEY_REVOKED"


def test_a_request_id_of_a_create_key_is_free_again_after_a_day(caller: Caller, server: RunningServer) -> None:
    request = create("aes")
    request.request_id = "r"
    caller.keys.CreateKey(request)
    with psycopg.connect(server.deployment.database.admin_dsn) as connection:
        aged = "UPDATE cryptography.request_records SET created_at = created_at - INTERVAL '25 hours' WHERE user_id = %s"
        connection.execute(aged, (caller.user_id,))
    assert refusal(caller.keys.CreateKey, request).reason == "NAME_TAKEN"
    request.name = "another"
    assert caller.keys.CreateKey(request).key.name == "another"


def test_metadata_comes_back_and_is_bounded(caller: Caller) -> None:
    request = create("aes")
    request.metadata.update({"team": "zahlungen-ü", "empty": ""})
    assert dict(caller.keys.CreateKey(request).key.metadata) == {"team": "zahlungen-ü", "empty": ""}
    for bad in (
        {"": "x"},
        {"x" * 64: "y"},
        {"x": "y" * 256},
        {"x": "a\nb"},
        {"x": "a\x00b"},
        {"\u202e": ""},
        {"x": "\x9b"},
        {str(n): "" for n in range(33)},
    ):
        request = create("aes", name="other")
        request.metadata.update(bad)
        assert refusal(caller.keys.CreateKey, request).metadata == {"field": "metadata"}


def test_pages_give_every_key_once_in_the_order_of_names(caller: Caller) -> None:
    names = sorted(f"n{number:02}" for number in range(7))
    for name in reversed(names):
        made(caller, "aes", name=name)
    seen: list[str] = []
    token = ""
    while True:
        page = caller.keys.ListKeys(kpb.ListKeysRequest(page_size=3, page_token=token))
        assert len(page.keys) <= 3
        seen += [key.name for key in page.keys]
        token = page.next_page_token
        if not token:
            break
    assert seen == names


def test_a_filter_restricts_and_a_page_token_belongs_to_its_filter(caller: Caller) -> None:
    for kind, name in (("aes", "pay/a"), ("aes", "pay/b"), ("secp256r1", "pay/c"), ("aes", "other")):
        made(caller, kind, name=name)

    def names(**filters: object) -> list[str]:
        return [key.name for key in caller.keys.ListKeys(kpb.ListKeysRequest(**filters)).keys]  # type: ignore[arg-type]

    assert names(type=kpb.KEY_TYPE_SECP256R1) == ["pay/c"]
    assert names(purpose=kpb.KEY_PURPOSE_ENCRYPTION, name_prefix="pay/") == ["pay/a", "pay/b"]
    assert names(state=kpb.KEY_STATE_REVOKED) == []
    token = caller.keys.ListKeys(kpb.ListKeysRequest(page_size=1, name_prefix="pay/")).next_page_token
    assert refusal(caller.keys.ListKeys, kpb.ListKeysRequest(page_token=token)).metadata == {"field": "page_token"}


def test_a_filter_that_few_keys_fit_takes_pages_of_bounded_work_and_finds_them_all(caller: Caller, server: RunningServer) -> None:
    made(caller, "aes", name="n0000")
    with psycopg.connect(server.deployment.database.admin_dsn) as connection:
        connection.execute(b"SET session_replication_role = replica")  # no triggers: it is not about the trail
        connection.execute(COPIES, (caller.user_id,))
        ids = connection.execute("SELECT id FROM cryptography.keys WHERE user_id = %s", (caller.user_id,)).fetchall()
        server.deployment.macs.renew(connection, [row[0] for row in ids])
    request = kpb.ListKeysRequest(type=kpb.KEY_TYPE_SECP256R1)
    made(caller, "secp256r1", name="n2400/one")
    pages = [caller.keys.ListKeys(request)]
    while pages[-1].next_page_token:
        request.page_token = pages[-1].next_page_token
        pages.append(caller.keys.ListKeys(request))
    assert [[key.name for key in page.keys] for page in pages] == [[], [], ["n2400/one"]]
    assert len(caller.keys.ListKeys(kpb.ListKeysRequest(type=kpb.KEY_TYPE_AES, page_size=200)).keys) == 200


def test_anothers_key_is_not_seen_not_listed_and_answered_as_one_that_does_not_exist(new_caller: Callable[[], Caller]) -> None:
    ada, bob = new_caller(), new_caller()
    key = made(ada, "secp256k1", name="hers")
    assert not bob.keys.ListKeys(kpb.ListKeysRequest()).keys
    absent = refusal(bob.keys.GetKey, kpb.GetKeyRequest(key=str(uuid.uuid4())))
    assert (absent.code, absent.reason) == (grpc.StatusCode.NOT_FOUND, "KEY_NOT_FOUND")
    for reference in (key.id, "hers"):
        assert refusal(bob.keys.GetKey, kpb.GetKeyRequest(key=reference)) == absent
        assert refusal(bob.keys.GetPublicKey, kpb.GetPublicKeyRequest(key=reference)) == absent
