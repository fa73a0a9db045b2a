"""Envelopes that move to another generation, in a real token and a real database, without a service around them."""

import asyncio
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from kms.domain.algorithms import KeySpec, KeyType, Purpose
from kms.domain.envelope import parse_envelope
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyId, UserId
from kms.domain.keys import Custody, HeldKey, KeyIdentity
from kms.hsm import provision
from kms.hsm.settings import HsmSettings
from kms.hsm.token_hsm import TokenHsm
from kms.jobs.leases import LeaseLostError
from kms.jobs.leasing import Lease, LeasedWorker
from kms.rotation.envelopes import StoredEnvelopes, rewrapping_leases
from kms.rotation.jobs import REWRAPPING_POLICY, rewrapping_job
from kms.rotation.master_keys import MasterKeys, choose_maker
from kms.rotation.rewrapping import Moved, Rewrapping
from kms.store.errors import translated
from kms.store.pool import Pool
from kms.store.wrapping import StoredWrappingKeys
from kms.wiring.token import token_keys
from tests.fixtures.postgres import Database
from tests.fixtures.softhsm import OpenHsm
from tests.store.acting import add_user

AES = KeySpec(KeyType.AES, Purpose.ENCRYPTION, 256)
ALICE = UserId(UUID("00000000-0000-4000-8000-0000000000a1"))
INSERT = """
    INSERT INTO cryptography.keys (
        id, user_id, key_name, key_type, key_purpose, public_key, encrypted_private_key, key_strength, custody, origin
    ) VALUES (%s, %s, %s, 'aes', 'encryption', %s, %s, 256, 'WRAPPED', 'GENERATED')
"""
LEASES_RUN_OUT = "UPDATE cryptography.rewrapping SET next_attempt_at = next_attempt_at - interval '1 hour'"


@dataclass(frozen=True)
class Bench:
    """A token of two generations, and a database that knows both."""

    hsm: TokenHsm
    pool: Pool
    dsn: str

    def run(self, query: str, *parameters: object) -> list[Any]:
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            cursor = connection.execute(query.encode(), parameters)
            return cursor.fetchall() if cursor.description else []

    async def add(self, digit: str) -> HeldKey:
        """Store a key under the generation that makes envelopes, in the slice of *digit*."""
        identity = KeyIdentity(KeyId(UUID(digit + uuid4().hex[1:])), ALICE, AES)
        held = HeldKey(identity, await self.hsm.generate(identity, Custody.WRAPPED), version=1)
        material = held.material
        self.run(INSERT, identity.key_id, ALICE, identity.key_id.hex[:20], material.public_key, material.envelope)
        return held

    def envelope(self, held: HeldKey) -> str:
        return str(self.run("SELECT encrypted_private_key FROM cryptography.keys WHERE id = %s", held.identity.key_id)[0][0])

    def generation(self, held: HeldKey) -> int:
        sealing_key_id = parse_envelope(self.envelope(held)).sealing_key_id
        return next(key.generation for key in self.hsm.wrapping_keys().keys if key.key_id == sealing_key_id)

    async def stored(self, held: HeldKey) -> HeldKey:
        return replace(held, material=replace(held.material, envelope=self.envelope(held)))

    async def move(self) -> None:
        await rewrapping_job(self.pool, self.hsm).work()

    async def plan(self) -> None:
        await StoredEnvelopes(self.pool).plan(2)

    async def lease(self) -> Lease:
        worker, leases = uuid4(), rewrapping_leases(self.pool, Rewrapping(self.hsm, StoredEnvelopes(self.pool)).leavable)
        (claim,) = await leases.claim(worker, 1, REWRAPPING_POLICY)
        return Lease(leases, worker, REWRAPPING_POLICY, claim)


@pytest.fixture
async def bench(opened: OpenHsm, hsm_settings: HsmSettings, store: Pool, database: Database) -> Bench:
    provision.rotate(hsm_settings)
    hsm = await opened()
    add_user(database.admin_dsn, ALICE, "alice")
    await StoredWrappingKeys(store).register(token_keys(hsm.wrapping_keys().keys), "serial")
    return Bench(hsm, store, database.admin_dsn)


async def test_a_slice_that_a_dead_worker_holds_is_moved_when_its_lease_has_run_out(bench: Bench) -> None:
    held, others = await bench.add("0"), [await bench.add(digit) for digit in "79f"]
    await bench.hsm.make_under(2)
    await bench.plan()
    dead = await bench.lease()
    while dead.claim.item["slice"] != 0:
        await dead.items.release(dead.worker, dead.claim)
        bench.run("UPDATE cryptography.rewrapping SET next_attempt_at = now() + interval '1 hour' WHERE slice <> 0")
        dead = await bench.lease()
    bench.run("UPDATE cryptography.rewrapping SET next_attempt_at = now() WHERE slice <> 0")
    await bench.move()
    assert [bench.generation(key) for key in (held, *others)] == [1, 2, 2, 2]
    bench.run(LEASES_RUN_OUT)
    await bench.move()
    assert bench.generation(held) == 2
    with pytest.raises(LeaseLostError):
        await StoredEnvelopes(bench.pool).store(dead, [])
    for key in (held, *others):
        await bench.hsm.encrypt(await bench.stored(key), b"p", b"aad")
    assert bench.run("SELECT sum(moved), sum(moved_sealed), sum(not_opened) FROM cryptography.rewrapping") == [(4, 0, 0)]


async def test_a_slice_is_gone_through_in_batches_and_goes_on_behind_the_last(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kms.rotation.rewrapping._BATCH", 2)
    keys = sorted([await bench.add("3") for _ in range(5)], key=lambda key: key.identity.key_id)
    bench.run(
        "UPDATE cryptography.keys SET encrypted_private_key = %s WHERE id = %s", bench.envelope(keys[1]), keys[0].identity.key_id
    )
    await bench.hsm.make_under(2)
    await bench.move()
    assert [bench.generation(key) for key in keys] == [1, 2, 2, 2, 2]
    assert bench.run("SELECT moved, not_opened, lease_owner, step FROM cryptography.rewrapping WHERE slice = 3") == [
        (4, 1, None, "")
    ]


async def test_an_envelope_that_changed_meanwhile_stays_as_it_is(bench: Bench) -> None:
    changed, destroyed, kept = [await bench.add("3") for _ in range(3)]
    await bench.hsm.make_under(2)
    await bench.plan()
    lease = await bench.lease()
    moved = [Moved(key, await bench.hsm.rewrap(key)) for key in (changed, destroyed, kept)]
    other = await bench.hsm.rewrap(changed)
    bench.run("UPDATE cryptography.keys SET encrypted_private_key = %s WHERE id = %s", other, changed.identity.key_id)
    destroy = "UPDATE cryptography.keys SET encrypted_private_key = '', destroyed_at = now() WHERE id = %s"
    bench.run(destroy, destroyed.identity.key_id)
    assert await StoredEnvelopes(bench.pool).store(lease, moved) == 1
    assert [bench.envelope(key) for key in (changed, destroyed, kept)] == [other, "", moved[2].envelope]


async def test_an_envelope_that_a_client_holds_is_left_for_later_and_nobody_waits(bench: Bench) -> None:
    held, other = await bench.add("3"), await bench.add("3")
    await bench.hsm.make_under(2)
    with psycopg.connect(bench.dsn) as client:
        client.execute("SELECT FROM cryptography.keys WHERE id = %s FOR UPDATE", (held.identity.key_id,))
        await asyncio.wait_for(bench.move(), 10)
        assert [bench.generation(key) for key in (held, other)] == [1, 2]
    bench.run(LEASES_RUN_OUT)
    await bench.move()
    assert bench.generation(held) == 2


async def test_what_is_no_later_generation_or_another_custody_is_not_stored(bench: Bench) -> None:
    key, other = await bench.add("3"), await bench.add("3")
    await bench.hsm.make_under(2)
    await bench.plan()
    lease, envelopes = await bench.lease(), StoredEnvelopes(bench.pool)
    later = parse_envelope(await bench.hsm.rewrap(key))
    sealed = replace(later, custody=Custody.SEALED).encode()
    unknown = replace(later, sealing_key_id=uuid4()).encode()
    for wrong in (other.material.envelope, sealed, unknown, "", "x" * 100):
        assert await envelopes.store(lease, [Moved(key, wrong)]) == 0
    assert bench.envelope(key) == key.material.envelope
    bench.run("UPDATE cryptography.wrapping_keys SET retired_at = now() WHERE generation = 2")
    assert await envelopes.store(lease, [Moved(key, later.encode())]) == 0
    bench.run("UPDATE cryptography.wrapping_keys SET retired_at = NULL WHERE generation = 2")
    assert await envelopes.store(lease, [Moved(key, later.encode())]) == 1


async def test_nothing_moves_back_to_an_earlier_generation(bench: Bench) -> None:
    await bench.hsm.make_under(2)
    key = await bench.add("3")
    await bench.hsm.make_under(1)
    await StoredEnvelopes(bench.pool).plan(3)  # as a worker that knows of a third generation does
    bench.run("UPDATE cryptography.rewrapping SET step = 'moved', not_opened = 7")
    await bench.move()
    assert bench.envelope(key) == key.material.envelope
    leases = rewrapping_leases(bench.pool, Rewrapping(bench.hsm, StoredEnvelopes(bench.pool)).leavable)
    assert await leases.claim(uuid4(), 1, REWRAPPING_POLICY) == []
    # A worker that lags leaves these slices, and what is known of them, to others.
    assert bench.run("SELECT DISTINCT step, not_opened, claim_number FROM cryptography.rewrapping") == [("moved", 7, 0)]


async def test_in_production_a_generation_makes_envelopes_once_its_copy_is_confirmed(bench: Bench) -> None:
    known = StoredWrappingKeys(bench.pool)
    production, development = (MasterKeys(bench.hsm, known, needs_copy=needs) for needs in (True, False))
    assert choose_maker(bench.hsm.wrapping_keys(), await known.read(), needs_copy=True) is None
    bench.run("UPDATE cryptography.wrapping_keys SET backup_confirmed_at = now() WHERE generation = 1 OR kind = 'kek'")
    await production.follow()
    old = await bench.add("3")
    assert (bench.hsm.wrapping_keys().current, bench.generation(old)) == (1, 1)
    assert ["generation 2" in warning and "kms hsm backup-confirmed" in warning for warning in production.warnings] == [True]
    assert development.warnings == []
    await bench.move()
    assert bench.generation(old) == 1
    await known.confirm_backup()
    await production.follow()
    assert production.warnings == []
    await bench.move()
    assert (bench.generation(await bench.add("3")), bench.generation(old)) == (2, 2)
    bench.run("UPDATE cryptography.wrapping_keys SET backup_confirmed_at = NULL")
    await production.follow()
    assert bench.hsm.wrapping_keys().current == 2
    await development.follow()
    assert bench.hsm.wrapping_keys().current == 2


async def test_who_stores_an_envelope_while_its_generation_retires_is_refused_or_keeps_it_from_retiring(bench: Bench) -> None:
    known, key = StoredWrappingKeys(bench.pool), await bench.add("3")
    late = await bench.hsm.generate(replace(key.identity, key_id=KeyId(uuid4())), Custody.WRAPPED)
    values = (uuid4(), ALICE, "late", late.public_key, late.envelope)
    await bench.hsm.make_under(2)
    await bench.move()
    with psycopg.connect(bench.dsn) as stores:
        stores.execute(INSERT.encode(), values)
        retiring = asyncio.create_task(known.retire(1, []))
        while not bench.run("SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query ~ 'retire_wrapping_keys'"):
            assert not retiring.done()
            await asyncio.sleep(0.01)
        stores.commit()
    assert await retiring == 1
    bench.run("DELETE FROM cryptography.keys WHERE key_name = 'late'")
    current = [one.key_id for one in bench.hsm.wrapping_keys().keys if one.generation == 2]
    assert await known.retire(1, current) == 1  # as if the database did not know that the token's key is of that generation
    assert await known.retire(1, []) == 0
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
        bench.run(INSERT, *values)
    with pytest.raises(KmsError, match="names a retired generation of master keys"), translated():
        bench.run(INSERT, *values)
    trail = "SELECT event_type, count(*)::int FROM audit.security_events WHERE event_type ~ 'wrapping_key' GROUP BY 1 ORDER BY 1"
    assert bench.run(trail) == [("wrapping_key.registered", 2), ("wrapping_key.retired", 2)]


async def test_a_token_that_is_away_fails_the_attempt_and_not_the_slice(bench: Bench) -> None:
    key = await bench.add("3")
    await bench.hsm.make_under(2)

    class Away:
        wrapping_keys = bench.hsm.wrapping_keys

        async def rewrap(self, _: HeldKey) -> str:
            raise KmsError(Reason.HSM_UNAVAILABLE, "the HSM does not answer")

    away = Rewrapping(Away(), StoredEnvelopes(bench.pool))
    assert await away.plan()
    await LeasedWorker(rewrapping_leases(bench.pool, away.leavable), away.rewrap, REWRAPPING_POLICY).do_due()
    slices = "SELECT error_message, lease_owner, next_attempt_at > now() FROM cryptography.rewrapping WHERE slice = 3"
    assert bench.run(slices) == [("HSM_UNAVAILABLE: the HSM does not answer", None, True)]
    bench.run(LEASES_RUN_OUT)
    await bench.move()
    assert bench.generation(key) == 2
    assert bench.run("SELECT error_message FROM cryptography.rewrapping WHERE slice = 3") == [(None,)]
