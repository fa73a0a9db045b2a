"""Checkpoints in a file outside the database: a line for each, in the form in which an exported trail has them.

A line has the horizon of its checkpoint too, which its note does not say. Beside the file is another, `….refused`, while a
refusal lasts: it keeps the processes of a machine from reporting one refusal more than once.
"""

import asyncio
import fcntl
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, TypeVar

from kms.app.trail_ports import KeptNote
from kms.domain.checkpoint import parse_unsigned
from kms.domain.errors import KmsError
from kms.domain.history import HistoryError
from kms.domain.trail_lines import Note, parse_line
from kms.store.errors import unavailable
from kms.store.journal import sync_directory

_LINE_BEGINS: Final = b'{"note":'
_LINE_BYTES_MAX: Final = 16_384
_LOCK_SECONDS: Final = 0.05
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class CheckpointFile:
    """`CheckpointMemory` in a file that is only appended to. Processes of one machine share it; each machine has its own."""

    path: Path

    @asynccontextmanager
    async def opened(self) -> "AsyncIterator[OpenCheckpointFile]":
        """Hold the file within the block. A line that a crash left unfinished is removed."""
        with self._errors():
            file = _opened(self.path)
        with file:
            # Asked for again and again: a thread that waits for a process that stands still could not be stopped.
            while not _is_locked(file):  # noqa: ASYNC110  # what is awaited is another process
                await asyncio.sleep(_LOCK_SECONDS)
            yield OpenCheckpointFile(self, file, await self.do(lambda: _repaired(file)))

    def check(self) -> None:
        """Raise STORE_UNAVAILABLE for a file that cannot be written."""
        with self._errors():
            _opened(self.path).close()

    @property
    def refusal_path(self) -> Path:
        """Where the refusal stands that was reported."""
        return self.path.with_name(f"{self.path.name}.refused")

    async def do(self, work: Callable[[], T]) -> T:
        """Return what *work* on files returns. Raises STORE_UNAVAILABLE; whoever is cancelled waits until it has ended."""
        task = asyncio.ensure_future(asyncio.to_thread(work))
        with self._errors():
            try:
                return await asyncio.shield(task)
            except asyncio.CancelledError:
                await asyncio.wait({task})
                raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise unavailable(f"the file of checkpoints {self.path} cannot be written: {error.strerror}") from None


@dataclass(slots=True)
class OpenCheckpointFile:
    """`OpenMemory` of a file that is held. `line` is its last one, which changes as notes are appended."""

    outside: CheckpointFile
    file: IO[bytes]
    line: bytes | None

    def last(self) -> KeptNote | None:
        """Return the last note, or None for an empty file."""
        if self.line is None:
            return None
        try:
            found = parse_line(self.line)
            if isinstance(found, Note):
                parse_unsigned(found.text)
                return KeptNote(found.text, _horizon(self.line))
        except (KmsError, ValueError):
            pass
        raise HistoryError(f"{self.outside.path} to end in a checkpoint", "another line: it is another file, or was edited")

    async def append(self, notes: Sequence[KeptNote]) -> None:
        """Append the notes that are behind the last one, and return when they are on disk."""
        last = self.last()
        reached = (0, 0) if last is None else _place(last)
        lines = [_line(note) for note in notes if _place(note) > reached]
        if lines:
            await self.outside.do(lambda: _write(self.file, b"".join(lines)))
            self.line = lines[-1].removesuffix(b"\n")

    async def reported(self) -> str:
        """Return the refusal that was reported last, or nothing."""
        return await self.outside.do(lambda: _read_text(self.outside.refusal_path))

    async def report(self, refusal: str) -> None:
        """Remember that *refusal* was reported; empty: it is over."""
        path = self.outside.refusal_path
        if refusal:
            await self.outside.do(lambda: path.write_text(refusal, encoding="utf-8"))
        else:
            await self.outside.do(lambda: path.unlink(missing_ok=True))


def has_lines(path: Path) -> bool:
    """Whether there is a file with a line. Raises OSError for one that cannot be read."""
    try:
        return any(finished_lines(path))
    except FileNotFoundError:
        return False


def finished_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file without their ends; the last only if it has one. Raises OSError."""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line[:-1]


def _opened(path: Path) -> IO[bytes]:
    is_new = not path.exists()
    file = open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+b", buffering=0)  # noqa: SIM115  # the caller closes it
    if is_new:
        sync_directory(path.absolute().parent)
    return file


def _is_locked(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write(file: IO[bytes], content: bytes) -> None:
    file.seek(0, os.SEEK_END)
    while content:  # an unbuffered write may be cut short by a full disk
        content = content[file.write(content) :]
    os.fsync(file.fileno())


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _place(note: KeptNote) -> tuple[int, int]:
    """Return where a note stands among the others: they are written by epoch, then by size."""
    found = parse_unsigned(note.text)
    return found.epoch, found.tree_size


def _line(note: KeptNote) -> bytes:
    fields = {"note": note.text} | ({} if note.horizon is None else {"horizon": str(note.horizon)})
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _horizon(line: bytes) -> int | None:
    found = json.loads(line).get("horizon")
    return None if found is None else int(found)


def _repaired(file: IO[bytes]) -> bytes | None:
    """Return the last finished line, with nothing behind it; None for a file without one."""
    size = file.seek(0, os.SEEK_END)
    start = file.seek(max(0, size - 2 * _LINE_BYTES_MAX))
    tail = file.read(size - start)
    finished = tail[: tail.rfind(b"\n") + 1]
    rest = tail[len(finished) :]
    if (size > 2 * _LINE_BYTES_MAX and not finished) or not (rest.startswith(_LINE_BEGINS[: len(rest)])):
        return rest or tail  # no line of ours: another file, which is left as it is
    file.truncate(start + len(finished))
    return finished.removesuffix(b"\n").rpartition(b"\n")[2] if finished else None
