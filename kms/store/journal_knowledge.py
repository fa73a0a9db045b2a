"""What the journal knows of keys, asked at every use of one: a row that the database's owner puts back is older than its line.

The file is read once and then followed. Each question looks at its size, and reads new lines where it has grown, be they of this
worker or of another on the machine.
"""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from uuid import UUID

from kms.app.ports import Call, KeyPage, Keys, NewKey, Repeat
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyId, KeyName, KeyRef, UserId
from kms.domain.key_row import record_invalid
from kms.domain.keys import KeyFilter, KeyRecord, UsableKey
from kms.domain.lifecycle import State
from kms.store.errors import unavailable
from kms.store.journal import (
    Entry,
    Event,
    JournaledAuthority,
    JournaledCertificate,
    authority_in,
    certificate_in,
    epoch_number,
    parse_line,
    uses_in,
    version_in,
    word_in,
)

_ENDS = (Event.KEY_COMPROMISED, Event.KEY_REVOKED, Event.KEY_DESTROYED)


@dataclass(frozen=True, slots=True)
class Narrowed:
    """What the journal knows of a key that was changed: the version since then, and its limits then, None without one."""

    version: int
    max_usage_count: int | None
    expires_at: datetime | None

    def fits(self, key: KeyRecord) -> bool:
        """Whether *key* is no older than this, and its limits are no wider."""
        count, ends_at = self.max_usage_count, self.expires_at
        is_limited = count is None or (key.max_usage_count is not None and key.max_usage_count <= count)
        return key.version >= self.version and is_limited and (ends_at is None or _ends_by(key, ends_at))


@dataclass(slots=True, eq=False)
class JournalKnowledge:
    """The journal in *path*, as far as it was read: it follows the file, so it changes."""

    path: Path
    _file_id: int = 0
    _offset: int = 0
    _sequence: int = 0
    _epoch: int = 0
    _ended: dict[UUID, set[Event]] = field(default_factory=dict, repr=False)
    _narrowed: dict[UUID, Narrowed] = field(default_factory=dict, repr=False)
    _used: Counter[UUID] = field(default_factory=Counter, repr=False)
    _authorities: dict[UUID, dict[int, JournaledAuthority]] = field(default_factory=dict, repr=False)
    _revoked_certificates: set[UUID] = field(default_factory=set, repr=False)
    _compromised: set[str] = field(default_factory=set, repr=False)
    _revoked_by_serial: dict[tuple[UUID, int], JournaledCertificate] = field(default_factory=dict, repr=False)
    _revoked_by_shard: dict[tuple[UUID, int], list[JournaledCertificate]] = field(default_factory=dict, repr=False)

    def check(self, key: KeyRecord, *, uses: int = 0) -> None:
        """Raise RECORD_INVALID for a key that the journal knows to be revoked, compromised, destroyed or changed since.

        Raises it also for a key whose count lacks some of *uses*: what `uses` returned before the key was read. Raises
        STORE_UNAVAILABLE where the journal cannot be read.
        """
        self.follow()
        key_id = key.identity.key_id
        narrowed = self._narrowed.get(key_id)
        shows = all(_shows(key, event) for event in self._ended.get(key_id, ()))
        if not shows or (narrowed is not None and not narrowed.fits(key)) or key.usage_counter < uses:
            raise record_invalid(key_id)

    def uses(self, key_id: UUID) -> int:
        """Return how often the workers of this machine have charged the key in this epoch, as far as the journal has it.

        Raises STORE_UNAVAILABLE.
        """
        self.follow()
        return self._used[key_id]

    def knows(self, key_id: UUID, version: int) -> bool:
        """Whether the journal has a change of the key that left it at *version* or a later one. Raises STORE_UNAVAILABLE."""
        self.follow()
        narrowed = self._narrowed.get(key_id)
        return narrowed is not None and narrowed.version >= version

    def authority(self, authority_id: UUID) -> JournaledAuthority | None:
        """Return the latest version of a certificate authority that the journal has, None without one.

        Raises STORE_UNAVAILABLE.
        """
        self.follow()
        versions = self._authorities.get(authority_id)
        return None if versions is None else versions[max(versions)]

    def knows_authority(self, authority_id: UUID, authority: JournaledAuthority) -> bool:
        """Whether the journal has this record of a certificate authority, be it the latest or not. Raises STORE_UNAVAILABLE."""
        self.follow()
        return self._authorities.get(authority_id, {}).get(authority.version) == authority

    def sequence(self) -> int:
        """Return the number of the last line of the journal. Raises STORE_UNAVAILABLE."""
        self.follow()
        return self._sequence

    def knows_revoked(self, certificate_id: UUID) -> bool:
        """Whether the journal knows that a certificate is revoked. Raises STORE_UNAVAILABLE."""
        self.follow()
        return certificate_id in self._revoked_certificates

    def knows_compromised(self, spki_sha256: str) -> bool:
        """Whether the journal knows that the key with a hash, in hex, is compromised. Raises STORE_UNAVAILABLE."""
        self.follow()
        return spki_sha256 in self._compromised

    def revoked_certificate(self, issuer_id: UUID, serial_number: int) -> JournaledCertificate | None:
        """Return a certificate of an authority, if the journal knows that it is revoked. Raises STORE_UNAVAILABLE."""
        self.follow()
        return self._revoked_by_serial.get((issuer_id, serial_number))

    def revoked_of_shard(self, issuer_id: UUID, shard: int, *, after: int) -> Sequence[JournaledCertificate]:
        """Return the certificates of a shard that the journal knows to be revoked, without the first *after* of them.

        Their order never changes. Raises STORE_UNAVAILABLE.
        """
        self.follow()
        return self._revoked_by_shard.get((issuer_id, shard), [])[after:]

    def follow(self) -> None:
        """Learn what was written since the last look. Raises STORE_UNAVAILABLE."""
        try:
            found = os.stat(self.path)
            if (found.st_ino, found.st_size) == (self._file_id, self._offset):
                return
            if found.st_ino != self._file_id or found.st_size < self._offset:
                self._file_id, self._offset = found.st_ino, 0  # another file: what was known of the one before stays known
            with self.path.open("rb") as file:
                file.seek(self._offset)
                content = file.read(found.st_size - self._offset)
        except OSError as error:
            raise unavailable(f"the journal {self.path} cannot be read: {error.strerror}") from None
        # A line that is being written is read the next time.
        for line in content[: content.rfind(b"\n") + 1].splitlines(keepends=True):
            self._learn(parse_line(line.removesuffix(b"\n"), str(self.path)))
            self._offset += len(line)

    def _learn(self, line: Entry) -> None:
        self._sequence = line.head.sequence
        if line.event is Event.EPOCH_SEEN and epoch_number(line) >= self._epoch:
            # Versions of another epoch are those of other changes, and its uses may be lost; what was ended stays so. Those of
            # authorities stay too: none begins an epoch at a version that the journal has already (see `hold_authorities`).
            self._epoch = epoch_number(line)
            self._narrowed.clear()
            self._used.clear()
        elif line.event is Event.KEY_USED:
            self._used[line.subject] += uses_in(line)
        elif line.event in _ENDS:
            self._ended.setdefault(line.subject, set()).add(line.event)
        elif line.event is Event.AUTHORITY_CHANGED:
            authority = authority_in(line)
            self._authorities.setdefault(line.subject, {}).setdefault(authority.version, authority)
        elif line.event is Event.CERTIFICATE_REVOKED:
            self._revoked_certificates.add(line.subject)
            if (certificate := certificate_in(line)) is not None:
                self._learn_revoked(certificate)
                self._compromised |= {certificate.compromised} - {""}
        elif line.event is Event.KEY_CHANGED:
            known = self._narrowed.get(line.subject)
            told = Narrowed(version_in(line), _number_in(line, "max_usage_count"), _moment_in(line, "expires_at"))
            self._narrowed[line.subject] = told if known is None else _narrower(known, told)

    def _learn_revoked(self, certificate: JournaledCertificate) -> None:
        issuer_id = certificate.issuer_id
        if self._revoked_by_serial.setdefault((issuer_id, certificate.serial_number), certificate) is certificate:
            self._revoked_by_shard.setdefault((issuer_id, certificate.shard), []).append(certificate)


@dataclass(frozen=True, slots=True)
class KnownKeys:
    """`Keys` that refuses a key of which the journal knows better."""

    keys: Keys
    knowledge: JournalKnowledge

    async def insert(self, caller: UserId, key: NewKey, *, call: Call | None = None, repeat: Repeat | None = None) -> KeyRecord:
        """Store a key: see `Keys.insert`."""
        return await self.keys.insert(caller, key, call=call, repeat=repeat)

    async def find(self, caller: UserId, ref: KeyRef, *, recent: bool = False) -> KeyRecord | None:
        """Return the key, or None: see `Keys.find`. Raises RECORD_INVALID."""
        record = await self.keys.find(caller, ref, recent=recent)
        if record is not None and self._is_known_better(record):
            # What the journal knows by now shows in a read that begins now: each line is written after what it tells of.
            uses = self._uses_of(record)
            record = await self.keys.find(caller, ref)
            if record is not None:
                self.knowledge.check(record, uses=uses(record))
        return record

    async def find_usable(self, caller: UserId, ref: KeyRef, *, recent: bool = False) -> UsableKey | None:
        """Return the key with its envelope, or None: see `Keys.find_usable`. Raises RECORD_INVALID."""
        key = await self.keys.find_usable(caller, ref, recent=recent)
        if key is not None and self._is_known_better(key.record):
            uses = self._uses_of(key.record)
            key = await self.keys.find_usable(caller, ref)
            if key is not None:
                self.knowledge.check(key.record, uses=uses(key.record))
        return key

    async def predecessors(self, caller: UserId, name: KeyName) -> int:
        """See `Keys.predecessors`."""
        return await self.keys.predecessors(caller, name)

    async def page(self, caller: UserId, which: KeyFilter, *, after: str, limit: int) -> KeyPage:
        """Return keys in the order of their names: see `Keys.page`."""
        page = await self.keys.page(caller, which, after=after, limit=limit)
        doubtful = [key.identity.key_id for key in page.keys if self._is_known_better(key)]
        invalid = [key_id for key_id in doubtful if await self._is_invalid(caller, key_id)]
        return _without(page, invalid) if invalid else page

    async def _is_invalid(self, caller: UserId, key_id: KeyId) -> bool:
        uses = self.knowledge.uses(key_id)
        record = await self.keys.find(caller, key_id)
        return record is not None and self._is_known_better(record, uses)

    def _uses_of(self, key: KeyRecord) -> Callable[[KeyRecord], int]:
        """Return what gives the uses of *key* that the journal knows of now, and 0 for another key that has its name since."""
        key_id = key.identity.key_id
        uses = self.knowledge.uses(key_id)
        return lambda read: uses if read.identity.key_id == key_id else 0

    def _is_known_better(self, key: KeyRecord, uses: int | None = None) -> bool:
        """Whether the journal knows better than *key* says. *uses* None: of all uses that it knows of now."""
        try:
            self.knowledge.check(key, uses=self.knowledge.uses(key.identity.key_id) if uses is None else uses)
        except KmsError as error:
            if error.reason is not Reason.RECORD_INVALID:
                raise
            return True
        return False


def _without(page: KeyPage, invalid: Sequence[KeyId]) -> KeyPage:
    kept = [key for key in page.keys if key.identity.key_id not in invalid]
    return KeyPage(kept, page.goes_on_after, [*page.invalid, *invalid])


def _shows(key: KeyRecord, event: Event) -> bool:
    """Whether the key's record says what *event* says, in whatever state it is since."""
    match event:
        case Event.KEY_COMPROMISED:
            return key.compromised_at is not None or key.revoked_at is not None
        case Event.KEY_REVOKED:
            return key.revoked_at is not None
        case _:
            return key.state is State.DESTROYED


def _ends_by(key: KeyRecord, moment: datetime) -> bool:
    return key.expires_at is not None and key.expires_at <= moment


def _narrower(known: Narrowed, told: Narrowed) -> Narrowed:
    """Return what both say of a key: limits are never raised."""
    counts = [count for count in (known.max_usage_count, told.max_usage_count) if count is not None]
    ends = [moment for moment in (known.expires_at, told.expires_at) if moment is not None]
    return Narrowed(max(known.version, told.version), min(counts, default=None), min(ends, default=None))


def _number_in(line: Entry, name: str) -> int | None:
    word = word_in(line, name)
    return int(word) if word is not None and word.isdecimal() else None


def _moment_in(line: Entry, name: str) -> datetime | None:
    word = word_in(line, name)
    try:
        return None if word is None else datetime.fromisoformat(word)
    except ValueError:
        return None
