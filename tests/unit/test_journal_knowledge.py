"""What the journal knows of a key, against its record."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast
from uuid import uuid4

import pytest

from kms.app.ports import Keys
from kms.domain.algorithms import KeyType, Purpose, key_spec
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyId, KeyName, KeyRef, UserId
from kms.domain.keys import Custody, HeldKey, KeyIdentity, KeyRecord, UsableKey
from kms.domain.lifecycle import State
from kms.keys.ledger.counts import Counts, Meanwhile
from kms.store.journal import Event, Journal, changed_line, used_line
from kms.store.journal_knowledge import JournalKnowledge, KnownKeys
from kms.store.journaled_uses import JournaledUses

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def key() -> KeyRecord:
    identity = KeyIdentity(KeyId(uuid4()), UserId(uuid4()), key_spec(KeyType.SECP256K1, Purpose.SIGNING, None))
    return KeyRecord(identity, KeyName("k"), State.ACTIVE, Custody.WRAPPED, "", 6, 0, NOW, {}, max_usage_count=10)


def is_known_better(knowledge: JournalKnowledge, key: KeyRecord) -> bool:
    try:
        knowledge.check(key)
    except KmsError as error:
        assert error.reason is Reason.RECORD_INVALID
        return True
    return False


def test_a_fork_at_the_same_version_is_known_by_its_limits(tmp_path: Path, key: KeyRecord) -> None:
    journal = Journal(tmp_path / "journal")
    what = f"update max_usage_count=10 expires_at={(NOW + timedelta(days=1)).isoformat()}: max_usage_count=1"
    journal.write(changed_line(key.identity.key_id, 6, occurred_at=NOW, what=what))
    knowledge = JournalKnowledge(journal.path)
    narrowed = replace(key, expires_at=NOW + timedelta(days=1))
    assert not is_known_better(knowledge, narrowed)
    assert not is_known_better(knowledge, replace(narrowed, max_usage_count=9, version=7))
    assert is_known_better(knowledge, replace(narrowed, version=5))
    assert is_known_better(knowledge, replace(narrowed, max_usage_count=1000))
    assert is_known_better(knowledge, replace(narrowed, max_usage_count=None))
    assert is_known_better(knowledge, replace(narrowed, expires_at=None))
    assert is_known_better(knowledge, replace(narrowed, expires_at=NOW + timedelta(days=2)))


def test_what_another_writes_is_known_at_once_and_stays_so_in_another_epoch(tmp_path: Path, key: KeyRecord) -> None:
    journal = Journal(tmp_path / "journal")
    journal.begin(at=NOW)
    knowledge = JournalKnowledge(journal.path)
    assert not is_known_better(knowledge, key)
    journal.append(Event.KEY_REVOKED, key.identity.key_id, occurred_at=NOW, reason="r")
    assert is_known_better(knowledge, key)
    assert not is_known_better(knowledge, replace(key, state=State.REVOKED, revoked_at=NOW))
    journal.see_epoch(2, uuid4(), at=NOW)
    assert is_known_better(knowledge, key)


def test_versions_are_those_of_their_epoch_and_no_older_epoch_excuses_them(tmp_path: Path, key: KeyRecord) -> None:
    journal = Journal(tmp_path / "journal")
    journal.see_epoch(2, uuid4(), at=NOW)
    journal.write(changed_line(key.identity.key_id, 7, occurred_at=NOW, what="deactivate : r"))
    knowledge = JournalKnowledge(journal.path)
    assert is_known_better(knowledge, key)
    with pytest.raises(KmsError, match="knows of epoch 2, and the database is in epoch 1"):
        journal.see_epoch(1, uuid4(), at=NOW)
    journal.see_epoch(3, uuid4(), at=NOW)
    assert not is_known_better(knowledge, key)


def test_a_journal_that_cannot_be_read_lets_no_key_be_used(tmp_path: Path, key: KeyRecord) -> None:
    with pytest.raises(KmsError) as caught:
        JournalKnowledge(tmp_path / "none").check(key)
    assert caught.value.reason is Reason.STORE_UNAVAILABLE


def test_the_uses_of_all_workers_of_an_epoch_are_added_up(tmp_path: Path, key: KeyRecord) -> None:
    journal, key_id = Journal(tmp_path / "journal"), key.identity.key_id
    knowledge, other = JournalKnowledge(journal.path), used_line(uuid4(), 100, occurred_at=NOW)
    for line in (used_line(key_id, 3, occurred_at=NOW), other, used_line(key_id, 1, occurred_at=NOW)):
        journal.write(line)
    assert knowledge.uses(key_id) == 4
    knowledge.check(replace(key, usage_counter=4), uses=4)
    with pytest.raises(KmsError) as caught:
        knowledge.check(replace(key, usage_counter=3), uses=4)
    assert caught.value.reason is Reason.RECORD_INVALID
    # The database may have been restored.
    journal.see_epoch(2, uuid4(), at=NOW)
    assert knowledge.uses(key_id) == 0


class ReadKeys:
    """Keys of which each read has the next count. `before_answer` runs within each read."""

    def __init__(self, key: KeyRecord, counts: list[int], before_answer: Callable[[], object]) -> None:
        self.key = key
        self.counts = counts
        self.before_answer = before_answer

    async def find(self, caller: UserId, ref: KeyRef, *, recent: bool = False) -> KeyRecord:
        found = replace(self.key, usage_counter=self.counts.pop(0))
        self.before_answer()
        return found

    async def find_usable(self, caller: UserId, ref: KeyRef, *, recent: bool = False) -> UsableKey:
        return UsableKey(await self.find(caller, ref), cast(HeldKey, None))


@pytest.mark.parametrize("finds", ["find", "find_usable"])
@pytest.mark.parametrize(("counts", "is_refused"), [([2, 3], False), ([2, 2], True)])
async def test_a_count_that_was_read_before_a_line_is_read_again(
    tmp_path: Path, key: KeyRecord, finds: str, counts: list[int], is_refused: bool
) -> None:
    journal, key_id, left = Journal(tmp_path / "journal"), key.identity.key_id, list(counts)
    journal.write(used_line(key_id, 2, occurred_at=NOW))

    def use_once_more() -> None:
        """Another worker charges a use and tells of it, while the key is read."""
        journal.write(used_line(key_id, 1, occurred_at=NOW))

    known = KnownKeys(cast(Keys, ReadKeys(key, left, use_once_more)), JournalKnowledge(journal.path))
    asked = getattr(known, finds)(key.identity.owner_id, key_id, recent=True)
    if is_refused:
        with pytest.raises(KmsError) as caught:
            await asked
        assert caught.value.reason is Reason.RECORD_INVALID
    else:
        await asked
    assert left == []


async def test_a_journal_that_cannot_be_written_is_told_and_no_use_is_counted_twice(tmp_path: Path, key: KeyRecord) -> None:
    counts, record, journal = Counts(), replace(key, max_usage_count=10), Journal(tmp_path / "missing" / "journal")
    counts.check(record, Meanwhile())
    bounds = counts.of(record.identity.key_id)
    assert bounds is not None
    counts.settled(bounds, 10, None)
    with pytest.raises(KmsError) as caught:
        await JournaledUses(journal, counts, lambda: NOW).write()
    assert caught.value.reason is Reason.STORE_UNAVAILABLE
    journal.path.parent.mkdir()
    counts.settled(bounds, 10, None)
    await JournaledUses(journal, counts, lambda: NOW).write()
    assert JournalKnowledge(journal.path).uses(record.identity.key_id) == 1
