"""Failures as a script sees them: an exit code, and one line or one JSON object on standard error."""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final

from kms.domain.errors import KmsError
from kms.domain.text import escaped, json_text


class ExitCode(IntEnum):
    """What the process ends with. A number is never given another meaning."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    NOT_PERMITTED = 4
    UNAVAILABLE = 5
    NOT_VALID = 6
    INTERRUPTED = 130


EXIT_CODES_HELP: Final = """\b
Exit codes:
  0  done (verify: the signature or the trail is valid)
  1  refused by the service, or failed
  2  the command line or the configuration cannot be used
  3  no such key
  4  not permitted, or not authenticated
  5  server, HSM or database not available, or too slow: try again later
  6  verify: the signature or the trail is not valid"""

_BY_CODE: Final = {
    "NOT_FOUND": ExitCode.NOT_FOUND,
    "PERMISSION_DENIED": ExitCode.NOT_PERMITTED,
    "UNAUTHENTICATED": ExitCode.NOT_PERMITTED,
    "UNAVAILABLE": ExitCode.UNAVAILABLE,
    "DEADLINE_EXCEEDED": ExitCode.UNAVAILABLE,
    "RESOURCE_EXHAUSTED": ExitCode.UNAVAILABLE,
}


class CallError(Exception):
    """A call that the service refused or that did not reach it. `code` is the gRPC status code's name.

    `reason` is that of `google.rpc.ErrorInfo`, or the code where the answer carries none.
    """

    def __init__(self, code: str, reason: str, message: str, metadata: Mapping[str, str]) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.metadata = dict(metadata)


@dataclass(frozen=True, slots=True)
class Failure:
    """A failure to report. `lines` has more than one sentence only where several faults are told together."""

    code: str
    reason: str
    lines: tuple[str, ...]
    exit_code: ExitCode
    metadata: Mapping[str, str] = field(default_factory=dict)


def usage_failure(message: str) -> Failure:
    """Return the failure of a command line that cannot be used."""
    return Failure("INVALID_ARGUMENT", "USAGE", (message,), ExitCode.USAGE)


def interrupted() -> Failure:
    """Return the failure of a command that the user stopped."""
    return Failure("CANCELLED", "INTERRUPTED", ("stopped",), ExitCode.INTERRUPTED)


def failure_of(error: Exception) -> Failure | None:
    """Return what to report of an expected *error*; None for a bug."""
    if isinstance(error, CallError):
        return _of_status(error.code, error.reason, error.message, error.metadata)
    if isinstance(error, KmsError):
        return _of_status(_code_name(error), error.reason, error.message, error.metadata)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return Failure("UNKNOWN", "FILE", (f"{where}{error.strerror or error}",), ExitCode.FAILED)
    if isinstance(error, UnicodeEncodeError):  # Python keeps bytes of an argument that are no UTF-8 as surrogates
        return usage_failure("a text on the command line is not UTF-8")
    return _of_configuration(error)


def report(failure: Failure, *, as_json: bool) -> None:
    """Write *failure* to standard error: a line `kms: REASON: message` for each sentence, or one JSON object."""
    if as_json:
        found: dict[str, Any] = {"code": failure.code, "reason": failure.reason, "message": "; ".join(failure.lines)}
        print(json_text({**found, "metadata": dict(failure.metadata)}), file=sys.stderr)
        return
    for line in failure.lines:
        print(_one_line(f"kms: {failure.reason}: {line}"), file=sys.stderr)


def _of_status(code: str, reason: str, message: str, metadata: Mapping[str, str]) -> Failure:
    return Failure(code, reason, (message,), _BY_CODE.get(code, ExitCode.FAILED), metadata)


def _code_name(error: KmsError) -> str:
    from google.rpc import code_pb2

    from kms.rpc.status import code_of

    return code_pb2.Code.Name(code_of(error.reason))


def _of_configuration(error: Exception) -> Failure | None:
    from kms.config import ConfigError

    if not isinstance(error, ConfigError):
        return None
    return Failure("INVALID_ARGUMENT", "CONFIGURATION", tuple(error.faults), ExitCode.USAGE)


def _one_line(text: str) -> str:
    """Return *text* without line ends and other hidden characters: it may come from a server or from a file's name."""
    return escaped(re.sub(r"[\n\t]", " ", text))
