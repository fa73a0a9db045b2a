"""Checkpoints in a file outside the database: a line for each, in the form in which an exported trail has them."""

import asyncio
import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from kms.domain.checkpoint import parse_unsigned
from kms.domain.errors import KmsError
from kms.domain.trail_lines import Note, note_line, parse_line
from kms.store.errors import unavailable
from kms.store.journal import sync_directory

_LINE_BYTES_MAX: Final = 16_384


@dataclass(frozen=True, slots=True)
class CheckpointFile:
    """`OutsideCheckpoints` in a file that is only appended to. Processes of one machine may share it."""

    path: Path

    async def last(self) -> str | None:
        """Return the last note, or None. A line that a crash left unfinished is removed."""
        return await asyncio.to_thread(self._last)

    async def append(self, notes: Sequence[str]) -> None:
        """Append the notes that are behind the last one, and return when they are on disk.

        What is not behind it another process has written, which sealed before or after.
        """
        await asyncio.to_thread(self._append, notes)

    def _last(self) -> str | None:
        with self._opened() as (_, last):
            return last

    def _append(self, notes: Sequence[str]) -> None:
        with self._opened() as (file, last):
            reached = (0, 0) if last is None else _place(last)
            content = "".join(f"{note_line(note)}\n" for note in notes if _place(note) > reached).encode()
            file.seek(0, os.SEEK_END)
            while content:  # an unbuffered write may be cut short by a full disk
                content = content[file.write(content) :]
            os.fsync(file.fileno())

    @contextmanager
    def _opened(self) -> Iterator[tuple[IO[bytes], str | None]]:
        """Open the file for this process alone, with its last note."""
        try:
            is_new = not self.path.exists()
            with open(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+b", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if is_new:
                    sync_directory(self.path.absolute().parent)
                yield file, self._note(_repaired(file))
        except OSError as error:
            raise unavailable(f"the file of checkpoints {self.path} cannot be written: {error.strerror}") from None

    def _note(self, line: bytes | None) -> str | None:
        if line is None:
            return None
        with suppress(KmsError):
            if isinstance(found := parse_line(line), Note):
                parse_unsigned(found.text)
                return found.text
        raise unavailable(f"{self.path} does not end in a checkpoint: it is another file, or was edited")


def _place(note: str) -> tuple[int, int]:
    """Return where a note stands among the others: they are written by epoch, then by size."""
    found = parse_unsigned(note)
    return found.epoch, found.tree_size


def finished_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file without their ends; the last only if it has one. Raises OSError."""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line[:-1]


def _repaired(file: IO[bytes]) -> bytes | None:
    """Return the last finished line, with nothing behind it; None for a file without one."""
    size = file.seek(0, os.SEEK_END)
    start = file.seek(max(0, size - 2 * _LINE_BYTES_MAX))
    tail = file.read(size - start)
    finished = tail[: tail.rfind(b"\n") + 1]
    if size > 2 * _LINE_BYTES_MAX and not finished:
        return tail
    file.truncate(start + len(finished))
    return finished.removesuffix(b"\n").rpartition(b"\n")[2] if finished else None
