"""How many RESIDENT keys the token holds and how many more it may: counted by id, so that none is counted twice."""

import threading
import time
from collections.abc import Iterable

from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyId
from kms.domain.keys import Custody


class Places:
    """The places for RESIDENT keys. A key takes one before it is made. May be used from any thread."""

    def __init__(self, places_max: int) -> None:
        self._places_max = places_max
        self._present: frozenset[KeyId] = frozenset()
        self._making: frozenset[KeyId] = frozenset()
        self._changes = 0
        self._counted_at = 0.0
        self._changing = threading.Lock()

    @property
    def count(self) -> int:
        """How many places are taken."""
        return len(self._present | self._making)

    def is_older(self, seconds: float) -> bool:
        """Whether the token was last counted longer ago than that: another process may have removed a key since."""
        return time.monotonic() - self._counted_at > seconds

    def take(self, key_id: KeyId) -> None:
        """Take a place for a key that is about to be made. Raises CUSTODY_UNAVAILABLE where none is free."""
        with self._changing:
            self._check_room(self._present | self._making | {key_id})
            self._making |= {key_id}

    def check(self, found: Iterable[KeyId]) -> None:
        """Raise CUSTODY_UNAVAILABLE where the keys *found* in the token, with those being made, are too many."""
        with self._changing:
            self._check_room(self._making.union(found))

    def made(self, key_id: KeyId) -> None:
        """Note that a key was made and keeps its place."""
        with self._changing:
            self._making -= {key_id}
            self._present |= {key_id}
            self._changes += 1

    def free(self, key_id: KeyId) -> None:
        """Note that a key is not, or no longer, in the token."""
        with self._changing:
            self._making -= {key_id}
            self._present -= {key_id}
            self._changes += 1

    def begin_count(self) -> int:
        """Return what `counted` must be given after the token was searched."""
        return self._changes

    def counted(self, found: Iterable[KeyId], begun: int) -> None:
        """Note what a search found, unless a key was made or removed here meanwhile: then it may be out of date."""
        with self._changing:
            if begun == self._changes:
                self._present = frozenset(found)
                self._counted_at = time.monotonic()

    def _check_room(self, taken: frozenset[KeyId]) -> None:
        if len(taken) > self._places_max:
            raise KmsError(
                Reason.CUSTODY_UNAVAILABLE,
                f"the token holds {len(taken) - 1} RESIDENT keys, and no more than {self._places_max} are allowed",
                custody=Custody.RESIDENT,
            )
