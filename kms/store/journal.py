"""The journal: what a restored backup must not undo, kept in a file outside the database.

One JSON object a line, each with the SHA-256 of its own canonical text, which contains the hash of the line before. A line is
on disk before the change that it tells of is answered; what was not written then, `kms.store.journal_follower` appends.
`kms restore --journal` replays it. The chain shows an edited or removed line; that the end was cut off is shown by a backup,
which records the head of the journal at its time.
"""

import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import IO, Any, Final
from uuid import UUID, uuid4

from kms.store.errors import unavailable

_BEGINNING: Final = "0" * 64
_LINE_BYTES_MAX: Final = 16_384
_CHUNK_BYTES: Final = 65_536
_REASON_CHARACTERS_MAX: Final = 1_000
_FIELDS: Final = frozenset({"sequence", "event", "subject", "occurred_at", "reason", "previous", "hash"})


class Event(StrEnum):
    """What is written down. The subject is the id of the key, certificate or user; of the first line that of the journal.

    KEY_USED: a worker charged so many uses of the key since its last such line.
    KEY_CHANGED: the key may do less than before, or is to be destroyed; the reason begins with the version that it has then.
    AUTHORITY_CHANGED: the subject is a certificate authority, or an account of an ACME client; the reason has the version that it
    has since, and a digest of its record then: no other record of that version is ours.
    FOLLOWED: the journal has every move of the epoch that is its subject, up to the place in its reason.
    EPOCH_SEEN: a service began to serve the epoch that is its subject; versions in lines before it are those of another.
    """

    JOURNAL_BEGUN = "journal_begun"
    FOLLOWED = "followed"
    EPOCH_SEEN = "epoch_seen"
    KEY_REVOKED = "key_revoked"
    KEY_COMPROMISED = "key_compromised"
    KEY_DESTROYED = "key_destroyed"
    KEY_CHANGED = "key_changed"
    KEY_USED = "key_used"
    CERTIFICATE_REVOKED = "certificate_revoked"
    AUTHORITY_CHANGED = "authority_changed"
    USER_DISABLED = "user_disabled"


@dataclass(frozen=True, slots=True)
class Head:
    """The last line of a journal: its number, from 1, and its hash. Number 0 and 64 zeros stand for no line."""

    sequence: int = 0
    hash: str = _BEGINNING


@dataclass(frozen=True, slots=True)
class Line:
    """What is written into a journal. `occurred_at` is aware; `reason` is the operator's."""

    event: Event
    subject: UUID
    occurred_at: datetime
    reason: str


def changed_line(key_id: UUID, version: int, *, occurred_at: datetime, what: str) -> Line:
    """Return the line of a key that is at *version* since *what* happened to it. The same version is the same change."""
    return Line(Event.KEY_CHANGED, key_id, occurred_at, f"version {version}, {what}")


@dataclass(frozen=True, slots=True)
class JournaledAuthority:
    """A version of a certificate authority, or of an ACME account, and the SHA-256 of its record, in hex."""

    version: int
    digest: str


def authority_line(authority_id: UUID, authority: JournaledAuthority, *, occurred_at: datetime, what: str) -> Line:
    """Return the line of a certificate authority, or of an ACME account, since *what* happened to it."""
    reason = f"version {authority.version}, {what} digest={authority.digest}"
    return Line(Event.AUTHORITY_CHANGED, authority_id, occurred_at, reason)


def authority_in(line: Line) -> JournaledAuthority:
    """Return the version and the digest in a line that `authority_line` made."""
    return JournaledAuthority(version_in(line), word_in(line, "digest") or "")


@dataclass(frozen=True, slots=True)
class JournaledCertificate:
    """A certificate that is revoked, as a CRL needs to know. `reason` is its CRLReason, `shard` that of its CRL.

    `compromised` is the SHA-256 of its key in hex, where the key is compromised; else it is empty.
    """

    issuer_id: UUID
    serial_number: int
    shard: int
    reason: int
    expires_at: datetime
    revoked_at: datetime
    compromised: str = ""


def revoked_line(certificate_id: UUID, certificate: JournaledCertificate) -> Line:
    """Return the line of a certificate that is revoked."""
    words = {
        "issuer": certificate.issuer_id,
        "serial": f"{certificate.serial_number:x}",
        "shard": certificate.shard,
        "reason": certificate.reason,
        "expires_at": certificate.expires_at.isoformat(),
        **({"compromised": certificate.compromised} if certificate.compromised else {}),
    }
    what = " ".join(f"{name}={value}" for name, value in words.items())
    return Line(Event.CERTIFICATE_REVOKED, certificate_id, certificate.revoked_at, f"revoked, {what}")


def certificate_in(line: Line) -> JournaledCertificate | None:
    """Return the certificate in a line that `revoked_line` made, None for another."""
    words = dict(word.split("=", 1) for word in _words(line) if "=" in word)
    try:
        return JournaledCertificate(
            UUID(words["issuer"]),
            int(words["serial"], 16),
            int(words["shard"]),
            int(words["reason"]),
            datetime.fromisoformat(words["expires_at"]),
            line.occurred_at,
            words.get("compromised", ""),
        )
    except (KeyError, ValueError):
        return None


def used_line(key_id: UUID, uses: int, *, occurred_at: datetime) -> Line:
    """Return the line of a key that a worker charged *uses* times since its last such line."""
    return Line(Event.KEY_USED, key_id, occurred_at, f"uses {uses}")


def uses_in(line: Line) -> int:
    """Return the number of uses in a line that `used_line` made, 0 for another."""
    number = line.reason.removeprefix("uses ")
    return int(number) if number.isdecimal() else 0


def superseded_line(key_id: UUID, version: int, successor: UUID, *, occurred_at: datetime) -> Line:
    """Return the line of a key that is at *version* since *successor* took its name."""
    return changed_line(key_id, version, occurred_at=occurred_at, what=f"superseded successor={successor}")


def is_superseded(line: Line) -> bool:
    """Whether *line* says that its key got a successor, be it written by a rotation or from the trail."""
    return line.event is Event.KEY_CHANGED and _words(line)[0].removeprefix("key.") == "superseded"


def successor_in(line: Line) -> UUID | None:
    """Return the successor in a line that `superseded_line` made, None for another."""
    word = word_in(line, "successor")
    try:
        return None if word is None else UUID(word)
    except ValueError:
        return None


def word_in(line: Line, name: str) -> str | None:
    """Return what a line that `changed_line` made says of *name*."""
    return next((word.partition("=")[2] for word in _words(line) if word.startswith(f"{name}=")), None)


def _words(line: Line) -> list[str]:
    """Return the words of a changed key's line before the caller's reason, which may say anything."""
    return line.reason.partition(", ")[2].partition(": ")[0].split(" ")


def epoch_number(line: Line) -> int:
    """Return the number in a line of `see_epoch`."""
    number = line.reason.removeprefix("epoch ")
    return int(number) if number.isdecimal() else 0


def version_in(line: Line) -> int:
    """Return the version in a line that `changed_line` made, 0 for another."""
    number = line.reason.removeprefix("version ").partition(",")[0]
    return int(number) if number.isdecimal() else 0


@dataclass(frozen=True, slots=True)
class Entry(Line):
    """A line of a journal, where it stands."""

    head: Head


@dataclass(frozen=True, slots=True)
class Journal:
    """A journal to write to. Several processes of one machine may share the file; each machine has its own."""

    path: Path

    def begin(self, *, at: datetime) -> Head:
        """Make the journal, with a first line that no other journal has, unless it is there; return its head.

        Raises OSError, and STORE_UNAVAILABLE for a file that does not end as a journal does.
        """
        with self._opened(at) as (_, head):
            return head

    def see_epoch(self, number: int, epoch: UUID, *, at: datetime) -> None:
        """Write down that *epoch* with its *number* is served, unless it was the last that was.

        Raises as `begin` does, and STORE_UNAVAILABLE for one with a lower number: a row of it was removed, or an older database
        put back.
        """

        def decide(entries: Iterator[Entry]) -> Sequence[Line]:
            last = next((entry for entry in entries if entry.event is Event.EPOCH_SEEN), None)
            if last is not None and epoch_number(last) > number:
                raise unavailable(
                    f"{self.path} knows of epoch {epoch_number(last)}, and the database is in epoch {number}: it was put "
                    "back, or rows of it were removed. Find out who, then run `kms epoch begin`"
                )
            return () if last is not None and last.subject == epoch else [Line(Event.EPOCH_SEEN, epoch, at, f"epoch {number}")]

        self.extend(decide, at=at)

    def append(self, event: Event, subject: UUID, *, occurred_at: datetime, reason: str) -> Head:
        """Write a line, force it to disk and return the new head. Raises as `begin` does.

        A line that a crash left unfinished, and so was never answered for, is removed.
        """
        return self.write(Line(event, subject, occurred_at, reason))

    def write(self, line: Line) -> Head:
        """Write *line* as `append` does."""
        with self._opened(line.occurred_at) as (file, head):
            return _write(file, head, [line])

    def extend(self, decide: Callable[[Iterator[Entry]], Sequence[Line]], *, at: datetime) -> None:
        """Write the lines that *decide* returns, and force them to disk together. Raises as `begin` does.

        It is given the lines that are there, the last one first; nobody else writes meanwhile.
        """
        with self._opened(at) as (file, head):
            if lines := decide(_backwards(file, self.path)):
                _write(file, head, lines)

    @contextmanager
    def _opened(self, now: datetime) -> Iterator[tuple[IO[bytes], Head]]:
        with open(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # Whoever else may write could leave a revocation out, hashes and all.
            if os.fstat(file.fileno()).st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                os.fchmod(file.fileno(), 0o600)
            head = _find_head(file, self.path)
            if head == Head():
                head = _write(file, head, [Line(Event.JOURNAL_BEGUN, uuid4(), now, "")])
                sync_directory(self.path.absolute().parent)
            yield file, head


def read_journal(path: Path) -> tuple[Entry, ...]:
    """Return the lines of a journal in order. Raises OSError, and STORE_UNAVAILABLE naming the first line that does not fit.

    An unfinished last line is left out: it was never answered for.
    """
    head, found = Head(), list[Entry]()
    with path.open("rb") as file:
        for number, line in enumerate(_finished_lines(file), 1):
            entry = parse_line(line, f"{path}, line {number}")
            if line != _canonical(_fields_of(entry, head)) or entry.head.sequence != number:
                raise unavailable(f"{path}, line {number}: it does not follow the line before, or was edited")
            head = entry.head
            found.append(entry)
    return tuple(found)


def head_of(entries: tuple[Entry, ...]) -> Head:
    """Return the head of a journal that was read."""
    return entries[-1].head if entries else Head()


def check_continues(entries: tuple[Entry, ...], recorded: Head, name: str) -> None:
    """Raise STORE_UNAVAILABLE unless *recorded*, the head at the time of a backup, is in the journal called *name*."""
    if not any(entry.head == recorded for entry in entries):
        raise unavailable(
            f"{name} is not the journal of this backup, or its end is lost: expected line {recorded.sequence} with the hash "
            f"{recorded.hash}"
        )


def sync_directory(directory: Path) -> None:
    """Force the names in *directory* to disk."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _finished_lines(file: IO[bytes]) -> Iterator[bytes]:
    for line in file:
        if line.endswith(b"\n"):
            yield line.removesuffix(b"\n")


def _find_head(file: IO[bytes], path: Path) -> Head:
    """Return the head and leave *file* at the end of the last finished line, with nothing behind it."""
    size = file.seek(0, os.SEEK_END)
    start = file.seek(max(0, size - 2 * _LINE_BYTES_MAX))
    tail = file.read(size - start)
    finished = tail[: tail.rfind(b"\n") + 1]
    if start and not finished:
        raise unavailable(f"{path} ends in a line that is no line of a journal")
    file.truncate(file.seek(start + len(finished)))
    if not finished:
        return Head()
    return parse_line(finished.removesuffix(b"\n").rpartition(b"\n")[2], f"{path}, last line").head


def _backwards(file: IO[bytes], path: Path) -> Iterator[Entry]:
    """Yield the lines of *file*, which ends with a finished one, from the last to the first."""
    start, begun = file.seek(0, os.SEEK_END), b""
    while start > 0:
        size = min(_CHUNK_BYTES, start)
        start = file.seek(start - size)
        begun, *lines = (file.read(size) + begun).split(b"\n")
        if start == 0:
            lines.insert(0, begun)
        yield from (parse_line(line, str(path)) for line in reversed(lines) if line)


def parse_line(line: bytes, where: str) -> Entry:
    """Return the entry in *line* as it stands. Raises STORE_UNAVAILABLE saying *where* there is none."""
    try:
        fields: dict[str, Any] = json.loads(line)
        if fields.keys() != _FIELDS:
            raise ValueError
        occurred_at = datetime.fromisoformat(fields["occurred_at"])
        head = Head(int(fields["sequence"]), str(fields["hash"]))
        return Entry(Event(fields["event"]), UUID(fields["subject"]), occurred_at, str(fields["reason"]), head)
    except (ValueError, TypeError, AttributeError):
        raise unavailable(f"{where}: expected an entry of a journal") from None


def _fields_of(line: Line, before: Head) -> Mapping[str, object]:
    fields: dict[str, object] = {
        "sequence": before.sequence + 1,
        "event": line.event.value,
        "subject": str(line.subject),
        "occurred_at": line.occurred_at.isoformat(),
        "reason": line.reason[:_REASON_CHARACTERS_MAX],
        "previous": before.hash,
    }
    return {**fields, "hash": hashlib.sha256(_canonical(fields)).hexdigest()}


def _canonical(fields: Mapping[str, object]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def _write(file: IO[bytes], head: Head, lines: Sequence[Line]) -> Head:
    """Write *lines* behind *head* at the end of *file*, and return the new head."""
    texts = list[bytes]()
    for line in lines:
        fields = _fields_of(line, head)
        head = Head(head.sequence + 1, str(fields["hash"]))
        texts.append(_canonical(fields) + b"\n")
    file.seek(0, os.SEEK_END)
    content = b"".join(texts)
    # An unbuffered write may be cut short by a full disk; what is there then is an unfinished line.
    while content:
        content = content[file.write(content) :]
    os.fsync(file.fileno())
    return head
