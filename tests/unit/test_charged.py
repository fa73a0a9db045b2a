"""Every case of retry and repeat of a use, with a ledger that answers as the test says."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any
from uuid import uuid4

import pytest

from kms.app.access import Access
from kms.app.ports import Call, Entry, User
from kms.domain.algorithms import Hash, KeySpec, KeyType, Purpose, Scheme, SignatureAlgorithm, key_spec
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyId, KeyName, UserId
from kms.domain.keys import Custody, HeldKey, KeyIdentity, KeyRecord, UsableKey
from kms.domain.lifecycle import State, Use
from kms.domain.permissions import Permission
from kms.keys.crypto import answers
from kms.keys.crypto.charged import ChargedUses, Item
from kms.keys.crypto.encryption import DataKey, Encrypted, Encryption, ToDecrypt, ToEncrypt, ToGenerate
from kms.keys.crypto.reencryption import ReEncrypted, ToReEncrypt
from kms.keys.crypto.signing import Signature, Signing, ToSign, ToVerify
from kms.keys.ledger.counts import Counts
from kms.keys.ledger.repeats import RepeatableRequest, Repeats
from kms.keys.ledger.settling import RETRYABLE_REFUSALS, Settling
from kms.pki.public_keys import PublicKeyOperations
from kms.rpc.batches import run_batch
from tests.fakes.hsm import FakeHsm
from tests.fakes.ledger import FakeKeys, FakeLedger, FakeUsers

ORDER = RepeatableRequest("Sign", "order-1", b"the request")
MOMENT = datetime(2026, 1, 1, tzinfo=UTC)
ED25519, AES = key_spec(KeyType.ED25519, Purpose.SIGNING, None), key_spec(KeyType.AES, Purpose.ENCRYPTION, None)


def refused(reason: Reason) -> KmsError:
    return KmsError(reason, "as the test says")


@dataclass
class Bench:
    """A user with a key that signs and one that encrypts, and everything that a use passes."""

    user: User
    uses: ChargedUses
    ledger: FakeLedger
    keys: FakeKeys
    users: FakeUsers
    hsm: FakeHsm

    @property
    def call(self) -> Call:
        """A call by the user as they were when the call was admitted."""
        return Call(self.user, "call-1", "192.0.2.1", "CryptoService/Sign")

    def id_of(self, name: str) -> KeyId:
        return self.keys.keys[KeyName(name)].record.identity.key_id

    async def sign(self, repeatable: RepeatableRequest | None = None) -> Signature:
        return await self.uses.sign(self.call, to_sign(), repeatable)


def to_sign(name: str = "signs") -> ToSign:
    return ToSign(KeyName(name), b"message", is_digest=False, scheme=None, hash=None, form=None)


async def a_key(hsm: FakeHsm, owner: UserId, name: str, spec: KeySpec) -> UsableKey:
    identity = KeyIdentity(KeyId(uuid4()), owner, spec)
    material = await hsm.generate(identity, Custody.WRAPPED)
    record = KeyRecord(identity, KeyName(name), State.ACTIVE, Custody.WRAPPED, material.public_key, 1, 0, MOMENT, {})
    return UsableKey(record, HeldKey(identity, material, 1))


@pytest.fixture
async def bench() -> Bench:
    user = User(UserId(uuid4()), "alice", 1)
    ledger, keys, users, hsm, counts = FakeLedger(), FakeKeys(), FakeUsers({user.user_id: user}), FakeHsm(), Counts()
    for name, spec in {"signs": ED25519, "encrypts": AES}.items():
        keys.put(await a_key(hsm, user.user_id, name, spec))
    settling = Settling(ledger, Access(users))
    public_keys = PublicKeyOperations()
    uses = ChargedUses(
        Signing(keys, hsm, public_keys),
        Encryption(keys, hsm, public_keys),
        settling,
        Repeats(keys, hsm, settling, counts),
        run_batch,
    )

    def charge(entry: Entry) -> None:
        if entry.is_charged:
            key = keys.keys[entry.key_id].record
            keys.change(key.name, usage_counter=key.usage_counter + 1)

    ledger.charge = charge
    return Bench(user, uses, ledger, keys, users, hsm)


async def reason_of(work: Any) -> Reason:  # noqa: ANN401
    with pytest.raises(KmsError) as caught:
        await work
    return caught.value.reason


async def test_a_use_is_charged_once_and_recorded_for_its_caller(bench: Bench) -> None:
    signature = await bench.sign()
    assert signature.key_id == bench.id_of("signs")
    [entry] = bench.ledger.settled
    assert (entry.call, entry.action, entry.is_charged) == (bench.call, "sign", True)
    assert bench.keys.reads == [True]
    assert bench.users.finds == 0, "the call was admitted before"


@pytest.mark.parametrize("reason", sorted(RETRYABLE_REFUSALS))
async def test_a_refusal_that_may_be_of_what_was_is_tried_again(bench: Bench, reason: Reason) -> None:
    bench.ledger.answers = [refused(reason)]
    await bench.sign()
    assert len(bench.ledger.attempts) == 2
    assert len(bench.ledger.settled) == 1


@pytest.mark.parametrize("reason", sorted({*Reason} - RETRYABLE_REFUSALS))
async def test_any_other_refusal_is_given_at_once(bench: Bench, reason: Reason) -> None:
    bench.ledger.answers = [refused(reason)]
    assert await reason_of(bench.sign()) is reason
    assert len(bench.ledger.attempts) == 1


async def test_a_refusal_that_stays_is_given_after_four_attempts(bench: Bench) -> None:
    bench.ledger.answers = [refused(Reason.STALE)] * 5
    assert await reason_of(bench.sign()) is Reason.STALE
    assert len(bench.ledger.attempts) == 4


async def test_after_another_change_of_the_caller_the_caller_is_read_again(bench: Bench) -> None:
    call, bench.users.users[bench.user.user_id] = bench.call, replace(bench.user, version=2)
    bench.ledger.answers = [refused(Reason.CREDENTIALS_INVALID)]
    await bench.uses.sign(call, to_sign())
    assert [entry.call.user.version for entry in bench.ledger.attempts] == [1, 2]


@pytest.mark.parametrize(
    ("permissions", "reason"),
    [(None, Reason.CREDENTIALS_INVALID), (frozenset({Permission.AUDIT_READ}), Reason.PERMISSION_DENIED)],
)
async def test_a_caller_who_is_read_again_and_may_not_call_any_more_is_refused(
    bench: Bench, permissions: frozenset[Permission] | None, reason: Reason
) -> None:
    call, user_id = bench.call, bench.user.user_id
    if permissions is None:
        del bench.users.users[user_id]
    else:
        bench.users.users[user_id] = replace(bench.user, version=2, permissions=permissions)
    bench.ledger.answers = [refused(Reason.CREDENTIALS_INVALID)]
    assert await reason_of(bench.uses.sign(call, to_sign())) is reason
    assert not bench.ledger.settled


async def test_an_envelope_that_was_replaced_is_read_from_the_database(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench.keys.keys[KeyName("signs")]
    wrong = replace(right, held=replace(right.held, material=replace(right.held.material, envelope="AAAA")))
    bench.keys.put(wrong)
    reads = bench.keys.find_usable

    async def renewed(*arguments: Any, recent: bool = False) -> UsableKey | None:  # noqa: ANN401
        found = await reads(*arguments, recent=recent)
        bench.keys.put(right)
        return found

    monkeypatch.setattr(bench.keys, "find_usable", renewed)
    await bench.sign()
    assert bench.keys.reads == [True, False]


async def test_an_envelope_that_stays_wrong_is_refused_with_its_key(bench: Bench) -> None:
    right = bench.keys.keys[KeyName("signs")]
    bench.keys.put(replace(right, held=replace(right.held, material=replace(right.held.material, envelope="AAAA"))))
    with pytest.raises(KmsError) as caught:
        await bench.sign()
    assert (caught.value.reason, caught.value.key_id) == (Reason.ENVELOPE_INVALID, right.record.identity.key_id)
    assert bench.keys.reads == [True, False]


async def test_a_refusal_names_the_key_that_was_found_and_no_other(bench: Bench) -> None:
    bench.keys.change(KeyName("signs"), state=State.REVOKED)
    for name, key_id in {"signs": bench.id_of("signs"), "encrypts": bench.id_of("encrypts"), "none": None}.items():
        with pytest.raises(KmsError) as caught:
            await bench.uses.sign(bench.call, to_sign(name))
        assert caught.value.key_id == key_id, caught.value


@pytest.mark.parametrize("reason", [Reason.PERMISSION_DENIED, Reason.OUTCOME_UNKNOWN, Reason.STORE_UNAVAILABLE, Reason.STALE])
async def test_a_refusal_by_the_ledger_names_the_key(bench: Bench, reason: Reason) -> None:
    bench.ledger.answers = [refused(reason) for _ in range(4)]
    with pytest.raises(KmsError) as caught:
        await bench.sign()
    assert (caught.value.reason, caught.value.key_id) == (reason, bench.id_of("signs"))


async def test_a_decryption_is_recorded_and_a_verification_is_not(bench: Bench) -> None:
    encrypted = await bench.uses.encrypt(bench.call, ToEncrypt(KeyName("encrypts"), b"secret"))
    decrypted = await bench.uses.decrypt(bench.call, to_decrypt(encrypted.ciphertext))
    assert decrypted.plaintext == b"secret"
    signature = await bench.sign()
    verify = ToVerify(KeyName("signs"), b"message", False, None, None, None, signature.signature)
    assert (await bench.uses.verify(bench.call, verify)).is_valid
    assert [(entry.action, entry.is_charged) for entry in bench.ledger.settled] == [
        ("encrypt", True),
        ("decrypt", False),
        ("sign", True),
    ]


def to_decrypt(ciphertext: bytes) -> ToDecrypt:
    return ToDecrypt(ciphertext, b"", key=None, raw_oaep=False, oaep_hash=None)


# Repeats.


async def test_a_repeated_request_gets_its_answer_without_a_charge(bench: Bench) -> None:
    first = await bench.sign(ORDER)
    assert [await bench.sign(ORDER) for _ in range(3)] == [first] * 3
    assert len(bench.ledger.attempts) == 1


async def test_an_encryption_is_repeated_to_the_same_ciphertext(bench: Bench) -> None:
    request = ToEncrypt(KeyName("encrypts"), b"secret")
    first = await bench.uses.encrypt(bench.call, request, ORDER)
    assert await bench.uses.encrypt(bench.call, request, ORDER) == first


async def test_another_request_under_the_same_id_is_refused(bench: Bench) -> None:
    await bench.sign(ORDER)
    assert await reason_of(bench.sign(replace(ORDER, body=b"another"))) is Reason.REQUEST_ID_REUSED


@pytest.mark.parametrize("reason", sorted({*Reason} - RETRYABLE_REFUSALS))
async def test_an_answer_that_was_refused_is_not_stored(bench: Bench, reason: Reason) -> None:
    bench.ledger.answers = [refused(reason)]
    assert await reason_of(bench.sign(ORDER)) is reason
    await bench.sign(ORDER)
    assert len(bench.ledger.settled) == 1


async def test_of_two_twins_the_slower_gets_the_answer_of_the_faster(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    twin: list[Signature] = []

    async def settle_twin() -> None:
        twin.append(await bench.sign(ORDER))

    settle, calls = bench.ledger.settle, []

    async def settle_after_twin(entry: Entry) -> None:
        calls.append(entry)
        if len(calls) == 1:
            await settle_twin()
            raise KmsError(Reason.STALE, "the same request was answered meanwhile", repeated="true")
        await settle(entry)

    monkeypatch.setattr(bench.ledger, "settle", settle_after_twin)
    assert [await bench.sign(ORDER)] == twin
    assert len(bench.ledger.settled) == 1


async def test_a_twin_that_made_the_last_use_gives_its_answer(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    first = await bench.sign(ORDER)
    stored = dict(bench.ledger.stored)
    bench.ledger.stored.clear()
    bench.keys.change(KeyName("signs"), state=State.INACTIVE)
    find = bench.keys.find_usable

    async def found_late(*arguments: Any, recent: bool = False) -> UsableKey | None:  # noqa: ANN401
        bench.ledger.stored.update(stored)
        return await find(*arguments, recent=recent)

    monkeypatch.setattr(bench.keys, "find_usable", found_late)
    assert await bench.sign(ORDER) == first
    assert len(bench.ledger.settled) == 1


async def lose_the_user(bench: Bench) -> None:
    del bench.users.users[bench.user.user_id]


async def make_an_auditor(bench: Bench) -> None:
    bench.users.users[bench.user.user_id] = replace(bench.user, permissions=frozenset({Permission.AUDIT_READ}))


async def revoke(bench: Bench) -> None:
    bench.keys.change(KeyName("signs"), state=State.REVOKED)


async def compromise(bench: Bench) -> None:
    bench.keys.change(KeyName("signs"), state=State.COMPROMISED)


async def take_the_key(bench: Bench) -> None:
    bench.keys.keys.clear()


async def put_the_count_back(bench: Bench) -> None:
    bench.keys.change(KeyName("signs"), usage_counter=0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lose_the_user, Reason.CREDENTIALS_INVALID),
        (make_an_auditor, Reason.PERMISSION_DENIED),
        (revoke, Reason.KEY_REVOKED),
        (compromise, Reason.KEY_COMPROMISED),
        (take_the_key, Reason.KEY_NOT_FOUND),
    ],
)
async def test_a_repeat_is_authorised_again(bench: Bench, change: Callable[[Bench], Any], reason: Reason) -> None:
    call = bench.call
    await bench.uses.sign(call, to_sign(), ORDER)
    await change(bench)
    assert await reason_of(bench.uses.sign(call, to_sign(), ORDER)) is reason


async def test_a_stored_answer_that_no_charge_covers_is_not_given(bench: Bench) -> None:
    """Another process answered. The database keeps its answers, and counts none of them."""
    await bench.sign(ORDER)
    await put_the_count_back(bench)
    other = replace(bench.uses, repeats=replace(bench.uses.repeats, counts=Counts()))
    with pytest.raises(KmsError) as caught:
        await other.sign(bench.call, to_sign(), ORDER)
    assert (caught.value.reason, caught.value.key_id) == (Reason.RECORD_INVALID, bench.id_of("signs"))


async def test_a_data_key_that_is_repeated_is_opened_again_and_not_charged_again(bench: Bench) -> None:
    request = ToGenerate(KeyName("encrypts"))
    first = await bench.uses.data_key(bench.call, request, ORDER)
    assert await bench.uses.data_key(bench.call, request, ORDER) == first
    actions = [(entry.action, entry.is_charged) for entry in bench.ledger.settled]
    assert actions == [("generate_data_key", True), ("generate_data_key.repeat", False)]
    [stored] = bench.ledger.stored.values()
    assert first.plaintext not in stored.result


async def test_a_data_key_without_its_plaintext_is_repeated_without_the_token(bench: Bench) -> None:
    request = ToGenerate(KeyName("encrypts"), without_plaintext=True)
    first = await bench.uses.data_key(bench.call, request, ORDER)
    assert first.plaintext == b""
    assert await bench.uses.data_key(bench.call, request, ORDER) == first
    assert len(bench.ledger.settled) == 1


async def test_only_a_request_with_an_id_costs_a_call_of_the_token_more(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The secret of a request costs a call of the token, so only a request with an id pays for it."""
    asked = []
    mac = FakeHsm.mac

    async def counted(hsm: FakeHsm, data: bytes) -> bytes:
        asked.append(data)
        return await mac(hsm, data)

    monkeypatch.setattr(FakeHsm, "mac", counted)
    await bench.sign()
    assert not asked
    await bench.sign(ORDER)
    assert len(asked) == 1


# Re-encryption: two uses, one of them charged.


async def rotated(bench: Bench) -> tuple[bytes, KeyId]:
    """Return a ciphertext of a key that has got a successor since, and the id of that key."""
    ciphertext = (await bench.uses.encrypt(bench.call, ToEncrypt(KeyName("encrypts"), b"secret", b"aad"))).ciphertext
    old = bench.id_of("encrypts")
    bench.keys.change(old, name=KeyName("encrypts@1"), state=State.INACTIVE)
    bench.keys.put(await a_key(bench.hsm, bench.user.user_id, "encrypts", AES))
    bench.ledger.settled.clear()
    bench.ledger.attempts.clear()
    return ciphertext, old


def uses_of(bench: Bench) -> list[tuple[str, KeyId, bool]]:
    return [(entry.action, entry.key_id, entry.is_charged) for entry in bench.ledger.settled]


async def test_a_reencryption_is_recorded_as_a_decryption_and_then_charged_as_one_encryption(bench: Bench) -> None:
    ciphertext, old = await rotated(bench)
    moved = await bench.uses.reencrypt(bench.call, ToReEncrypt(ciphertext, b"aad"))
    new = bench.id_of("encrypts")
    assert (moved.key_id, moved.source_key_id) == (new, old)
    assert uses_of(bench) == [("decrypt.reencrypt", old, False), ("encrypt.reencrypt", new, True)]
    opened = await bench.uses.decrypt(bench.call, replace(to_decrypt(moved.ciphertext), aad=b"aad"))
    assert (opened.plaintext, opened.key_id) == (b"secret", new)


@pytest.mark.parametrize("reason", sorted(RETRYABLE_REFUSALS))
async def test_a_charge_that_is_tried_again_decrypts_nothing_again(bench: Bench, reason: Reason) -> None:
    ciphertext, old = await rotated(bench)
    bench.ledger.answers = [None, refused(reason)]
    await bench.uses.reencrypt(bench.call, ToReEncrypt(ciphertext, b"aad"))
    assert uses_of(bench) == [("decrypt.reencrypt", old, False), ("encrypt.reencrypt", bench.id_of("encrypts"), True)]
    assert len(bench.ledger.attempts) == 3


@pytest.mark.parametrize("reason", [Reason.OUTCOME_UNKNOWN, Reason.STORE_UNAVAILABLE, Reason.RECORD_INVALID])
async def test_a_decryption_that_is_not_recorded_charges_nothing(bench: Bench, reason: Reason) -> None:
    ciphertext, old = await rotated(bench)
    bench.ledger.answers = [refused(reason)]
    with pytest.raises(KmsError) as caught:
        await bench.uses.reencrypt(bench.call, ToReEncrypt(ciphertext, b"aad"))
    assert (caught.value.reason, caught.value.key_id, uses_of(bench)) == (reason, old, [])
    assert [entry.action for entry in bench.ledger.attempts] == ["decrypt.reencrypt"]


@pytest.mark.parametrize("state", [State.PRE_ACTIVE, State.INACTIVE, State.COMPROMISED, State.REVOKED])
async def test_where_the_new_key_cannot_encrypt_nothing_is_opened(bench: Bench, state: State) -> None:
    ciphertext, _ = await rotated(bench)
    bench.keys.change(KeyName("encrypts"), state=state)
    with pytest.raises(KmsError) as caught:
        await bench.uses.reencrypt(bench.call, ToReEncrypt(ciphertext, b"aad"))
    assert (caught.value.reason, caught.value.key_id) == (Reason[f"KEY_{state.name}"], bench.id_of("encrypts"))
    assert not bench.ledger.attempts


async def test_a_key_that_gets_a_successor_meanwhile_is_not_the_one_that_encrypts(bench: Bench) -> None:
    ciphertext = (await bench.uses.encrypt(bench.call, ToEncrypt(KeyName("encrypts"), b"secret"))).ciphertext
    old, new = bench.id_of("encrypts"), await a_key(bench.hsm, bench.user.user_id, "encrypts", AES)

    def rotate() -> None:
        bench.keys.change(old, name=KeyName("encrypts@1"), state=State.INACTIVE)
        bench.keys.put(new)

    def rotate_and_refuse() -> None:
        rotate()
        raise refused(Reason.KEY_INACTIVE)

    bench.ledger.settled.clear()
    bench.ledger.answers = [None, rotate_and_refuse]
    moved = await bench.uses.reencrypt(bench.call, ToReEncrypt(ciphertext))
    assert (moved.key_id, moved.source_key_id) == (new.record.identity.key_id, old)
    assert [each[0] for each in uses_of(bench)] == ["decrypt.reencrypt", "encrypt.reencrypt"]


async def test_a_reencryption_is_repeated_to_the_same_ciphertext_and_opens_nothing(bench: Bench) -> None:
    ciphertext, old = await rotated(bench)
    request = ToReEncrypt(ciphertext, b"aad")
    first = await bench.uses.reencrypt(bench.call, request, ORDER)
    bench.keys.change(old, state=State.REVOKED)
    assert [await bench.uses.reencrypt(bench.call, request, ORDER) for _ in range(2)] == [first] * 2
    assert len(bench.ledger.attempts) == 2
    bench.keys.change(KeyName("encrypts"), state=State.REVOKED)
    assert await reason_of(bench.uses.reencrypt(bench.call, request, ORDER)) is Reason.KEY_REVOKED


async def test_a_repeat_after_a_lost_charge_is_charged_once(bench: Bench) -> None:
    ciphertext, _ = await rotated(bench)
    bench.ledger.answers = [None, refused(Reason.STORE_UNAVAILABLE)]
    request = ToReEncrypt(ciphertext, b"aad")
    assert await reason_of(bench.uses.reencrypt(bench.call, request, ORDER)) is Reason.STORE_UNAVAILABLE
    await bench.uses.reencrypt(bench.call, request, ORDER)
    assert [each[0] for each in uses_of(bench)] == ["decrypt.reencrypt", "decrypt.reencrypt", "encrypt.reencrypt"]


async def test_a_revoked_key_gives_up_its_ciphertexts_by_flag_and_permission_alone(bench: Bench) -> None:
    ciphertext, old = await rotated(bench)
    bench.keys.change(old, state=State.REVOKED)
    plain = ToReEncrypt(ciphertext, b"aad")
    flagged = replace(plain, uses=(Use.PROCESS, Use.PROCESS_REVOKED))
    assert await reason_of(bench.uses.reencrypt(bench.call, plain)) is Reason.KEY_REVOKED
    assert await reason_of(bench.uses.reencrypt(bench.call, flagged)) is Reason.PERMISSION_DENIED
    assert not bench.ledger.attempts
    permitted = replace(bench.user, permissions=frozenset({Permission.KEYS_USE_REVOKED}))
    moved = await bench.uses.reencrypt(replace(bench.call, user=permitted), flagged)
    assert moved.source_key_id == old
    assert [entry.use for entry in bench.ledger.settled] == [Use.PROCESS_REVOKED, Use.PROTECT]


async def test_reencryptions_of_a_batch_are_charged_in_their_order(bench: Bench) -> None:
    ciphertext, _ = await rotated(bench)
    items = [Item(ToReEncrypt(ciphertext, b"aad", new_aad=bytes(n))) for n in range(20)]
    wrong = Item(ToReEncrypt(ciphertext, b"another"))
    outcomes = await bench.uses.reencrypt_each(bench.call, [*items, wrong])
    moved = [each for each in outcomes if isinstance(each, ReEncrypted)]
    assert [each.reason for each in outcomes if isinstance(each, KmsError)] == [Reason.CIPHERTEXT_INVALID]
    digests = [entry.details["ciphertext_sha256"] for entry in bench.ledger.settled if entry.is_charged]
    assert digests == [sha256(each.ciphertext).hexdigest() for each in moved]
    assert bench.ledger.refusals == [("BatchReEncrypt", bench.id_of("encrypts@1"), Reason.CIPHERTEXT_INVALID)]


# Batches.

WISHES = [("signs", None), ("none", None), ("signs", ORDER), ("encrypts", None), ("signs", None)]


async def test_items_are_charged_in_their_order_however_long_each_takes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    find, reads = bench.keys.find_usable, []

    async def first_is_slow(*arguments: Any, recent: bool = False) -> UsableKey | None:  # noqa: ANN401
        reads.append(arguments)
        await asyncio.sleep(0.05 if len(reads) == 1 else 0)
        return await find(*arguments, recent=recent)

    monkeypatch.setattr(bench.keys, "find_usable", first_is_slow)
    requests = [replace(to_sign(), data=bytes(n)) for n in range(1, 6)]
    await bench.uses.sign_each(bench.call, [Item(each) for each in requests])
    assert [entry.details["input_bytes"] for entry in bench.ledger.settled] == [1, 2, 3, 4, 5]


async def test_each_item_of_a_batch_has_its_own_outcome_and_is_charged_in_its_order(bench: Bench) -> None:
    malformed = refused(Reason.MALFORMED)
    wishes = [Item(to_sign(name), repeatable) for name, repeatable in WISHES]
    outcomes = await bench.uses.sign_each(bench.call, [wishes[0], malformed, *wishes[1:]])
    kinds = [outcome.reason if isinstance(outcome, KmsError) else "OK" for outcome in outcomes]
    assert kinds == ["OK", Reason.MALFORMED, Reason.KEY_NOT_FOUND, "OK", Reason.WRONG_PURPOSE, "OK"]
    assert outcomes[1] is malformed
    assert [entry.repeat is not None for entry in bench.ledger.settled] == [False, True, False]
    assert sorted(bench.ledger.refusals, key=str) == sorted(
        [
            ("BatchSign", None, Reason.MALFORMED),
            ("BatchSign", None, Reason.KEY_NOT_FOUND),
            ("BatchSign", bench.id_of("encrypts"), Reason.WRONG_PURPOSE),
        ],
        key=str,
    )


async def test_the_other_batches_give_what_their_uses_give(bench: Bench) -> None:
    encrypted = await bench.uses.encrypt_each(bench.call, [Item(ToEncrypt(KeyName("encrypts"), bytes([n]))) for n in range(9)])
    ciphertexts = [each.ciphertext for each in encrypted if isinstance(each, Encrypted)]
    opened = await bench.uses.decrypt_each(bench.call, [Item(to_decrypt(each)) for each in ciphertexts])
    assert [each.plaintext for each in opened if not isinstance(each, KmsError)] == [bytes([n]) for n in range(9)]
    signature = (await bench.sign()).signature
    verify = [ToVerify(KeyName("signs"), text, False, None, None, None, signature) for text in (b"message", b"another")]
    verified = await bench.uses.verify_each(bench.call, [Item(each) for each in verify])
    assert [each.is_valid for each in verified if not isinstance(each, KmsError)] == [True, False]


# What is stored.

KEY_ID = KeyId(uuid4())
PLAIN_RSA = SignatureAlgorithm(Scheme.RSA_PKCS1, Hash.SHA_384)


@pytest.mark.parametrize(
    ("encode", "decode", "result"),
    [
        (answers.encode_signature, answers.decode_signature, Signature(b"s", KEY_ID, PLAIN_RSA)),
        (answers.encode_signature, answers.decode_signature, Signature(b"", KEY_ID, SignatureAlgorithm(Scheme.ED25519, None))),
        (answers.encode_encrypted, answers.decode_encrypted, Encrypted(b"c" * 70_000, KEY_ID)),
        (answers.encode_reencrypted, answers.decode_reencrypted, ReEncrypted(b"c" * 70_000, KEY_ID, KeyId(uuid4()))),
        (answers.encode_data_key, answers.decode_data_key, DataKey(b"", b"c", KEY_ID)),
    ],
)
def test_a_stored_result_is_the_result(encode: Callable[[Any], bytes], decode: Callable[[bytes], Any], result: object) -> None:
    content = encode(result)
    assert decode(content) == result
    all_kinds = {answers.decode_signature, answers.decode_encrypted, answers.decode_reencrypted, answers.decode_data_key}
    kinds = all_kinds - {decode}
    for other in kinds:
        with pytest.raises(ValueError, match="the content of a stored answer is no"):
            other(content)
    with pytest.raises(ValueError, match="the content of a stored answer is no"):
        decode(content + bytes(4))
