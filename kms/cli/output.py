"""What a command answers: tables for people, JSON for programs, bytes alone for pipes and files.

What is printed may come from a caller, a server or an old row of the trail, and must not steer the terminal. `guard_streams`
makes standard output and standard error write hidden characters as JSON does, whoever prints. Only bytes pass as they are.
"""

import base64
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO, cast

from kms.domain.text import escaped, has_hidden, json_text

if TYPE_CHECKING:
    from rich.console import Console

STDOUT: Final = Path("-")


class Encoding(StrEnum):
    """How bytes are written: as they are, in base64 (RFC 4648 section 4), or in lower-case hexadecimal."""

    RAW = "raw"
    BASE64 = "base64"
    HEX = "hex"


class _Guarded:
    """A text stream that writes hidden characters as JSON does. Lines and tabs stay."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(escaped(text, keep="\n\t"))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the stream has
        return getattr(self.stream, name)


def guard_streams() -> None:
    """Let standard output and standard error show no hidden character from now on, also those of a traceback."""
    sys.stdout, sys.stderr = (cast(TextIO, _Guarded(stream)) for stream in (sys.stdout, sys.stderr))


def print_json(value: Mapping[str, Any]) -> None:
    """Print *value* as one JSON object."""
    print(json_text(value, indent=2))


def print_fields(fields: Mapping[str, object]) -> None:
    """Print a name and a value a line, aligned. A value stays on its line."""
    width = max(map(len, fields), default=0)
    for name, value in fields.items():
        print(f"{name:<{width}}  {escaped(str(value))}")


@contextmanager
def changing_line() -> Iterator[Callable[[str], None]]:
    """Yield what shows how far something is: on a terminal in one line that changes, else in a line for each text."""
    if not sys.stdout.isatty():
        yield lambda text: print(escaped(text, keep="\t"), flush=True)
        return
    from rich.text import Text

    with _console().status("") as status:
        yield lambda text: status.update(Text(escaped(text.replace("\t", "  "))))


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: ruled on a terminal, else a line of tab-separated columns for each row, without headings."""
    if not sys.stdout.isatty():
        for row in rows:
            print("\t".join(map(escaped, row)))
        return
    from rich import box
    from rich.table import Table

    table = Table(*headings, box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*map(escaped, row))
    _console().print(table)


@contextmanager
def progress(total: int, done: int, *, quiet: bool) -> Iterator[Callable[[int, str], None]]:
    """Show how many of *total* are done: *done* at first, and then what the function that is yielded is called with.

    A terminal gets a bar. A pipe gets a line for each call. *quiet* shows nothing.
    """
    if quiet:
        yield lambda done, remark: None
        return
    if not sys.stdout.isatty():
        yield lambda done, remark: print(f"{done} of {total} done, {remark}", flush=True)
        return
    from rich import progress as bars

    columns = (bars.BarColumn(), bars.MofNCompleteColumn(), bars.TextColumn("{task.description}"), bars.TimeRemainingColumn())
    with bars.Progress(*columns, console=_console(), redirect_stdout=False, redirect_stderr=False) as bar:
        task = bar.add_task("", total=total, completed=done)
        yield lambda done, remark: bar.update(task, completed=done, description=remark)


def _console() -> "Console":
    from rich.console import Console

    # rich steers the terminal, so it writes to the stream itself. It would make pictures of texts like :key:.
    stream = sys.stdout.stream if isinstance(sys.stdout, _Guarded) else sys.stdout
    return Console(file=stream, markup=False, emoji=False, highlight=False)


def text_of(data: bytes, encoding: Encoding | None) -> str:
    """Return *data* as text: hexadecimal if that is asked for, else base64."""
    return data.hex() if encoding is Encoding.HEX else base64.b64encode(data).decode("ascii")


def json_bytes(name: str, data: bytes, encoding: Encoding | None, out: Path | None) -> dict[str, str]:
    """Return *data* for a JSON answer, or write it to *out* and return where it is."""
    if out is not None and out != STDOUT:
        write_bytes(data, out, encoding)
        return {f"{name}_file": str(out)}
    used = Encoding.HEX if encoding is Encoding.HEX else Encoding.BASE64
    return {name: text_of(data, used), "encoding": used}


def write_bytes(data: bytes, out: Path | None, encoding: Encoding | None, *, private: bool = False) -> None:
    """Write *data*, and nothing else, to *out* or standard output.

    Without *encoding* a file or a pipe gets the bytes as they are, and a terminal gets base64.
    """
    to_stdout = out is None or out == STDOUT
    if encoding is None:
        encoding = Encoding.BASE64 if to_stdout and sys.stdout.isatty() else Encoding.RAW
    content = data if encoding is Encoding.RAW else (text_of(data, encoding) + "\n").encode("ascii")
    if out is None or out == STDOUT:
        _write_stdout(content)
    else:
        write_file(out, content, private=private)


def write_plaintext(data: bytes, out: Path | None, encoding: Encoding | None) -> None:
    """Write a secret: a file gets mode 0600; a terminal gets it as text if it is plain text, else in base64."""
    if encoding is None and (out is None or out == STDOUT) and sys.stdout.isatty() and _is_plain_text(data):
        _write_stdout(data if data.endswith(b"\n") else data + b"\n")
    else:
        write_bytes(data, out, encoding, private=True)


def write_file(path: Path, content: bytes, *, private: bool = False) -> None:
    """Write *content* to *path*, whole or not at all, replacing what is there; *private* gives it mode 0600.

    What is not a regular file (a pipe, /dev/stdout) is written to as it is. Raises OSError.
    """
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp: mode 0600 from the start
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # before the name: a power failure must not leave an empty file under it
        if not private:
            os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _write_stdout(content: bytes) -> None:
    sys.stdout.flush()
    sys.stdout.buffer.write(content)
    sys.stdout.buffer.flush()


def _is_plain_text(data: bytes) -> bool:
    """Whether a terminal shows *data* as it is: text without control characters, which could steer it."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return False
    return not has_hidden(text.replace("\n", "").replace("\t", ""))


def _umask() -> int:
    value = os.umask(0o077)
    os.umask(value)
    return value
