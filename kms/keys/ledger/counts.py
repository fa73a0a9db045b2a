"""What this process has handed out of each key. The database's count of a key must cover it.

Two bounds hold for the count that a read shows:

- `least`: the count of the first read, and every use by this process that began after that read.
- `handed_out`: every result that this process has handed out, by its own charge or as the answer of a repeated request.

A read need not show the uses that were charged while it was under way. It must show all that were charged before.

Each answer that is stored for a repeat has an id, which names the process that made it. An answer of this process that the
ledger did not settle is remembered here. If such an answer is found stored later, it counts as a use: either the database
charged it after all, or its owner lies. An answer of another process counts once as handed out.

This process forgets all of it at its end. So `take_due` gives what should be remembered outside: the uses that this process
charged of keys with a limit. It gives them in parts of a hundredth of the limit, so that a key has few of them in its life.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Final
from uuid import uuid4

from kms.domain.answers import ANSWER_ID_BYTES
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyId
from kms.domain.key_row import record_invalid
from kms.domain.keys import KeyRecord

_KEYS_MAX: Final = 10_000
_ANSWERS_MAX: Final = 100_000
_PROCESS_BYTES: Final = 8
_PARTS_OF_A_LIMIT: Final = 100

Meanwhile = Counter[KeyId]
"""How often each key was charged while a read was under way."""


@dataclass(slots=True, eq=False)
class KeyCount:
    """The two bounds of one key, and the lowest limit that was read. None: no limit.

    `forgotten`: of unsettled answers with this number or a lower one, some may be forgotten. `untold`: uses that this process
    charged and `take_due` has not given yet.
    """

    key_id: KeyId
    limit: int | None
    least: int
    handed_out: int = 0
    forgotten: int = 0
    untold: int = 0

    @property
    def is_due(self) -> bool:
        """Whether so many uses are untold that they should be remembered outside."""
        return self.limit is not None and self.untold * _PARTS_OF_A_LIMIT >= self.limit


@dataclass(slots=True, eq=False)
class Counts:
    """Counts of the keys that were used last. Only the event loop uses it."""

    keys_max: int = _KEYS_MAX
    answers_max: int = _ANSWERS_MAX
    _process: bytes = field(default_factory=lambda: uuid4().bytes[:_PROCESS_BYTES])
    _numbers: Iterator[int] = field(default_factory=lambda: count(1))
    _of_keys: OrderedDict[KeyId, KeyCount] = field(default_factory=OrderedDict)
    _reads: dict[int, Meanwhile] = field(default_factory=dict)  # by identity: two equal counters are two reads
    _unsettled: OrderedDict[bytes, KeyCount] = field(default_factory=OrderedDict)
    _of_others: OrderedDict[bytes, KeyCount] = field(default_factory=OrderedDict)
    _due: set[KeyCount] = field(default_factory=set)

    @contextmanager
    def reading(self) -> Iterator[Meanwhile]:
        """Note what is charged while a key is read within the block."""
        meanwhile = Meanwhile()
        self._reads[id(meanwhile)] = meanwhile
        try:
            yield meanwhile
        finally:
            del self._reads[id(meanwhile)]

    def check(self, key: KeyRecord, meanwhile: Meanwhile) -> None:
        """Accept the count of *key* as a read shows it.

        Raises RECORD_INVALID for a count that lacks a use which was charged before the read.
        """
        self._check(key, meanwhile)

    def of(self, key_id: KeyId) -> KeyCount | None:
        """Return the counts that a use which begins now belongs to. None: no count of the key was read yet."""
        return self._of_keys.get(key_id)

    def offered(self, bounds: KeyCount, answer_id: bytes) -> None:
        """Remember an answer that is about to be sent to the ledger, until the ledger has settled it."""
        self._unsettled[answer_id] = bounds
        if len(self._unsettled) > self.answers_max:
            oldest, of_key = self._unsettled.popitem(last=False)
            of_key.forgotten = max(of_key.forgotten, _number(oldest))

    def settled(self, bounds: KeyCount, limit: int | None, answer_id: bytes | None) -> None:
        """Count a use that was charged, unless its answer was handed out, and counted, while the ledger was settling it.

        *limit* is that of the key when the use began. It is never raised, so no honest database charges more uses than that.
        Raises RECORD_INVALID for a use too many.
        """
        if answer_id is None or self._unsettled.pop(answer_id, None) is not None:
            self._count(bounds)
        if limit is not None and bounds.least > limit:
            raise record_invalid(bounds.key_id)

    def _count(self, bounds: KeyCount) -> None:
        bounds.least += 1
        bounds.handed_out += 1
        bounds.untold += 1
        if bounds.is_due:
            self._due.add(bounds)
        if bounds.key_id in self._of_keys:
            self._of_keys.move_to_end(bounds.key_id)
        for meanwhile in self._reads.values():
            meanwhile[bounds.key_id] += 1

    def take_due(self) -> list[tuple[KeyId, int]]:
        """Return keys whose uses should be remembered outside, with the number of uses since the last time."""
        due, self._due = self._due, set()
        taken = [(bounds.key_id, bounds.untold) for bounds in due]
        for bounds in due:
            bounds.untold = 0
        return taken

    def new_answer_id(self) -> bytes:
        """Return the id of an answer that is about to be stored: 16 bytes that name this process."""
        return self._process + next(self._numbers).to_bytes(ANSWER_ID_BYTES - _PROCESS_BYTES, "big")

    def repeated(self, key: KeyRecord, answer_id: bytes, meanwhile: Meanwhile) -> None:
        """Count a stored answer that is about to be handed out again. *key* was read after the answer was found.

        Raises RECORD_INVALID if the key's count does not cover it. Raises OUTCOME_UNKNOWN for an answer so old that this process
        no longer knows whether the ledger settled it.
        """
        bounds = self._bounds(key)
        if not answer_id.startswith(self._process):
            self._repeated_of_another(key, answer_id, meanwhile)
        elif answer_id in self._unsettled and self._unsettled[answer_id] is bounds:
            self._check(key, meanwhile, handed_out=1, least=1)
            del self._unsettled[answer_id]
            self._count(bounds)
        elif answer_id in self._unsettled:
            # The key was forgotten since then, so the count of its first read may include this use.
            self._repeated_of_another(key, answer_id, meanwhile)
        elif _number(answer_id) <= bounds.forgotten:
            raise KmsError(
                Reason.OUTCOME_UNKNOWN, "the service no longer knows whether this answer was charged: use another request_id"
            )
        else:
            self._check(key, meanwhile)

    def _repeated_of_another(self, key: KeyRecord, answer_id: bytes, meanwhile: Meanwhile) -> None:
        is_new = answer_id not in self._of_others
        self._check(key, meanwhile, handed_out=int(is_new))
        if is_new:
            bounds = self._of_others[answer_id] = self._bounds(key)
            bounds.handed_out += 1
        self._of_others.move_to_end(answer_id)
        if len(self._of_others) > self.answers_max:
            # Its next repeat would count again.
            _, of_key = self._of_others.popitem(last=False)
            of_key.handed_out -= 1

    def _check(self, key: KeyRecord, meanwhile: Meanwhile, *, handed_out: int = 0, least: int = 0) -> None:
        """Raise RECORD_INVALID unless count and limit of *key* cover its bounds, raised by *handed_out* and *least*."""
        bounds = self._bounds(key)
        if key.usage_limit is not None:
            # A limit is never raised: a read that shows a higher one, or none, is of an older row.
            bounds.limit = key.usage_limit if bounds.limit is None else min(bounds.limit, key.usage_limit)
        covered = key.usage_counter + meanwhile[bounds.key_id]
        most = max(bounds.handed_out + handed_out, bounds.least + least)
        if covered < most or (bounds.limit is not None and bounds.limit < most):
            raise record_invalid(bounds.key_id)

    def _bounds(self, key: KeyRecord) -> KeyCount:
        key_id = key.identity.key_id
        bounds = self._of_keys.setdefault(key_id, KeyCount(key_id, key.usage_limit, key.usage_counter))
        if len(self._of_keys) > self.keys_max:
            self._of_keys.popitem(last=False)
        return bounds


def _number(answer_id: bytes) -> int:
    return int.from_bytes(answer_id[_PROCESS_BYTES:], "big")
