"""A list of files on which a command works: what is left to do, in batches, at a rate.

A file is done when its result is there. A result is written whole or not at all, so a command that was interrupted goes on where
it stopped when it is run again with the same list.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import typer

from kms.cli.inputs import STDIN, from_hex
from kms.cli.output import STDOUT

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ListedFile:
    """A file, where its result goes, and its associated data. None: what the command line says holds for it."""

    source: Path
    result: Path
    aad: bytes | None

    @property
    def is_done(self) -> bool:
        """Whether its result is there."""
        return self.result.is_file()


def read_list(file: Path, out_dir: Path) -> list[ListedFile]:
    """Return the files in a list, each once, in its order. The result of `a/b` is `out_dir/a/b`.

    A line is a path below the current directory, and after a tab the file's associated data in hexadecimal, if it has its own.
    Raises a usage error that names the line, OSError.
    """
    if out_dir == STDOUT:
        raise typer.BadParameter("--out-dir: expected a directory")
    found = {}
    for number, line in enumerate(_lines(file), start=1):
        path, tab, aad = line.decode(errors="surrogateescape").rstrip("\r\n").partition("\t")
        if not path and not tab:
            continue
        source, where = Path(path), f"--in-list, line {number}"
        if not path or "\0" in path or source.is_absolute() or ".." in source.parts:
            raise typer.BadParameter(f"{where}: expected a path below the current directory")
        result = out_dir / source
        if result.absolute() == source.absolute() or (result.exists() and source.exists() and result.samefile(source)):
            raise typer.BadParameter(f"{where}: --out-dir would replace the file itself")
        found[source] = ListedFile(source, result, from_hex(aad, where) if tab else None)
    return list(found.values())


def _lines(file: Path) -> list[bytes]:
    if file == STDIN:
        return sys.stdin.buffer.readlines()
    with file.open("rb") as stream:
        return stream.readlines()


def batches(items: Iterable[tuple[T, int]], *, items_max: int, bytes_max: int) -> Iterator[list[T]]:
    """Yield the items of pairs of an item and its size, in their order, in batches that are as large as they may be.

    An item that is larger than *bytes_max* has a batch of its own.
    """
    batch: list[T] = []
    total = 0
    for item, size_bytes in items:
        if batch and (len(batch) == items_max or total + size_bytes > bytes_max):
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += size_bytes
    if batch:
        yield batch


@dataclass(slots=True)
class Pace:
    """Lets at most *rate* items a second pass; None: as many as come. It remembers from when on the next may pass."""

    rate: float | None
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    _next_at: float = field(default=0.0, init=False)

    def wait(self, items: int) -> None:
        """Return when *items* may pass."""
        if self.rate is None:
            return
        now = self.clock()
        if self._next_at > now:
            self.sleep(self._next_at - now)
        self._next_at = max(self._next_at, now) + items / self.rate
