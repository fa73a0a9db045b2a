"""How much room the disk of the database has left, where the service can see that disk.

PostgreSQL itself does not say, not even to a superuser, without running a program on its host. So it is watched where the
operator names a directory on that disk, and nowhere else.
"""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

import structlog

STRANGERS_SHARE: Final = 0.10  # below it, refusals of callers who are not admitted are no longer written
WARNING_SHARE: Final = 0.20
_LOG = structlog.get_logger("kms.store.disk")


class Disk:
    """What was last seen of a disk. Before the first look, and without a path, nothing is known and nothing is refused."""

    def __init__(self, path: Path | None, *, look: Callable[[Path], os.statvfs_result] = os.statvfs) -> None:
        self._path = path
        self._look = look
        self.free_share: float | None = None

    @property
    def is_low(self) -> bool:
        """Whether less than a fifth is free."""
        return self.free_share is not None and self.free_share < WARNING_SHARE

    def has_room_for_strangers(self) -> bool:
        """Whether a tenth or more is free, or nothing is known."""
        return self.free_share is None or self.free_share >= STRANGERS_SHARE

    async def watch(self) -> None:
        """Look once. A disk that cannot be looked at is as it was last seen, and the log says so."""
        if self._path is None:
            return
        try:
            seen = await asyncio.to_thread(self._look, self._path)  # a network disk may take its time
        except OSError as error:
            _LOG.warning("disk not seen", path=str(self._path), error=error.strerror)
            return
        before = (self.is_low, self.has_room_for_strangers())
        # What the database's user may fill; the rest of the free blocks is root's.
        self.free_share = seen.f_bavail / seen.f_blocks if seen.f_blocks else 1.0
        if before != (self.is_low, self.has_room_for_strangers()):
            say = _LOG.warning if self.is_low else _LOG.info
            recorded = self.has_room_for_strangers()
            say("disk of the database", free_percent=round(self.free_share * 100, 1), strangers_are_recorded=recorded)
