"""What the journal knows of a key, against its record."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest

from kms.domain.algorithms import KeyType, Purpose, key_spec
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyId, KeyName, UserId
from kms.domain.keys import Custody, KeyIdentity, KeyRecord
from kms.domain.lifecycle import State
from kms.store.journal import Event, Journal, changed_line
from kms.store.journal_knowledge import JournalKnowledge

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
