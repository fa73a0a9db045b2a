"""The journal: on disk when it returns, in order, and found out when it is edited."""

import json
import multiprocessing
import stat
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from kms.domain.errors import KmsError, Reason
from kms.store.journal import Event, Journal, check_continues, head_of, read_journal

MOMENT = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal")


def subjects_of(journal: Journal) -> list[UUID]:
    return [entry.subject for entry in read_journal(journal.path)[1:]]


def append(journal: Journal, count: int = 1, event: Event = Event.KEY_REVOKED) -> list[UUID]:
    subjects = [uuid4() for _ in range(count)]
    for subject in subjects:
        journal.append(event, subject, occurred_at=MOMENT, reason="lost \n laptop ‖")
    return subjects


def refused(work: Callable[[], object]) -> str:
    with pytest.raises(KmsError) as caught:
        work()
    assert caught.value.reason is Reason.STORE_UNAVAILABLE
    return caught.value.message


def test_what_is_written_is_read_in_order(journal: Journal) -> None:
    subjects = append(journal, 3)
    assert subjects_of(journal) == subjects
    begun, *entries = read_journal(journal.path)
    assert (begun.event, [entry.head.sequence for entry in entries]) == (Event.JOURNAL_BEGUN, [2, 3, 4])
    assert {(entry.event, entry.occurred_at, entry.reason) for entry in entries} == {
        (Event.KEY_REVOKED, MOMENT, "lost \n laptop ‖")
    }


def test_two_journals_never_have_a_line_in_common(journal: Journal) -> None:
    other = Journal(journal.path.with_name("other"))
    assert journal.begin(at=MOMENT) != other.begin(at=MOMENT)
    head = journal.begin(at=MOMENT)
    assert head == head_of(read_journal(journal.path))
    assert "is not the journal of this backup" in refused(lambda: check_continues(read_journal(other.path), head, "other"))


@pytest.mark.parametrize("before", [None, 0o666, 0o640])
def test_the_file_is_for_its_owner_alone_whatever_it_was_before(journal: Journal, before: int | None) -> None:
    if before is not None:
        append(journal)
        journal.path.chmod(before)
    append(journal)
    assert stat.S_IMODE(journal.path.stat().st_mode) == 0o600


def test_an_edited_line_is_found_out_also_with_a_new_hash(journal: Journal) -> None:
    append(journal, 3)
    text = journal.path.read_text()
    journal.path.write_text(text.replace("key_revoked", "user_disabled", 1))
    assert "line 2" in refused(lambda: read_journal(journal.path))
    other = Journal(journal.path.with_name("other"))
    append(other)
    journal.path.write_text(other.path.read_text() + "".join(line + "\n" for line in text.splitlines()[1:]))
    assert "line 3" in refused(lambda: read_journal(journal.path))


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_removed_line_is_found_out(journal: Journal, lost: int) -> None:
    append(journal, 3)
    lines = journal.path.read_text().splitlines(keepends=True)
    journal.path.write_text("".join(lines[:lost] + lines[lost + 1 :]))
    assert f"line {lost + 1}" in refused(lambda: read_journal(journal.path))


@pytest.mark.parametrize("line", [b"{}", b"[]", b"nonsense", b"\xff", b"null"])
def test_a_line_that_is_no_entry_is_refused(journal: Journal, line: bytes) -> None:
    append(journal)
    with journal.path.open("ab") as file:
        file.write(line + b"\n")
    assert "line 3: expected an entry" in refused(lambda: read_journal(journal.path))
    assert "expected an entry" in refused(lambda: append(journal))


def test_an_unfinished_line_was_never_answered_for_and_is_removed(journal: Journal) -> None:
    first = append(journal)
    with journal.path.open("ab") as file:
        file.write(b'{"sequence":2,"event":"key_re')
    assert subjects_of(journal) == first
    second = append(journal)
    assert subjects_of(journal) == first + second


def test_a_lost_end_is_seen_by_the_head_in_a_backup(journal: Journal) -> None:
    append(journal, 3)
    entries = read_journal(journal.path)
    check_continues(entries, head_of(entries), "it")
    check_continues(entries, entries[0].head, "it")
    assert "its end is lost: expected line 4" in refused(lambda: check_continues(entries[:3], head_of(entries), "it"))


def append_many(path: Path) -> None:
    append(Journal(path), 50)


def test_processes_share_a_journal(journal: Journal) -> None:
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=append_many, args=(journal.path,)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(30)
    assert [entry.head.sequence for entry in read_journal(journal.path)] == list(range(1, 152))


def test_a_long_reason_is_cut_and_still_read(journal: Journal) -> None:
    journal.append(Event.KEY_DESTROYED, uuid4(), occurred_at=MOMENT, reason="\U0001f511" * 5000)
    append(journal)
    assert len(read_journal(journal.path)[1].reason) == 1000


def test_each_line_is_json(journal: Journal) -> None:
    append(journal, 2)
    _, one, two = (json.loads(line) for line in journal.path.read_text().splitlines())
    assert two["previous"] == one["hash"]
