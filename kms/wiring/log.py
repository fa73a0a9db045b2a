"""The log: one JSON object a line on standard error, with the request id on every line of a call, and no secret in it."""

import logging
import re
import sys
import threading
from collections.abc import MutableMapping
from typing import Any, Final

import structlog
from structlog.typing import EventDict

_REDACTED: Final = "<redacted>"
_SECRET_NAMES: Final = frozenset({"pin", "dsn", "password", "secret", "token", "plaintext", "private_key", "envelope", "aad"})
# `password=…` of a connection string, quoted or not, and the password in a URI.
_PASSWORD: Final = re.compile(r"(passw(?:or)?d\s*=\s*|://[^\s:/@]*:(?=[^\s@]*@))('(?:[^'\\]|\\.)*'|[^\s@]+)", re.IGNORECASE)
_LOG = structlog.get_logger("kms")


def configure_log(level: str, *, worker: int | None = None) -> None:
    """Write one JSON object a line to standard error, with the number of the *worker* if there are several."""

    def add_worker(_logger: object, _method: str, event: EventDict) -> EventDict:
        return event if worker is None else {**event, "worker": worker}

    structlog.configure(
        processors=[
            add_worker,
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            redacted,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        # Unlike print, it writes a line with its end at once: several processes have this standard error.
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(level=logging.WARNING, handlers=[_Forwarded()], force=True)
    sys.unraisablehook = _log_unraisable
    threading.excepthook = _log_end_of_thread


def redacted(logger: object, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Return *event* without what may be a secret: bytes, values under telling names, passwords in connection strings.

    The last line, not the first: nothing secret is meant to be logged, and types that hold secrets do not print them.
    """
    for name, value in event.items():
        event[name] = _REDACTED if name.lower() in _SECRET_NAMES and value is not None else _shown(value)
    return event


def _shown(value: object) -> object:
    if isinstance(value, str):
        return _PASSWORD.sub(rf"\1{_REDACTED}", value) if "pass" in value or "://" in value else value
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"<{len(value)} bytes>"
    if isinstance(value, dict):
        return dict(redacted(None, "", {str(name): each for name, each in value.items()}))
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_shown(each) for each in value]
    return value if value is None or isinstance(value, (bool, int, float)) else _shown(repr(value))


def _log_unraisable(found: "sys.UnraisableHookArgs") -> None:
    """Log what nobody can catch: an exception in a finalizer, or in a generator that is thrown away."""
    structlog.get_logger("kms").warning(
        "exception ignored", at=repr(found.object), message=found.err_msg, exc_info=found.exc_value or found.exc_type
    )


def _log_end_of_thread(found: threading.ExceptHookArgs) -> None:
    name, error = found.thread and found.thread.name, found.exc_value or found.exc_type
    structlog.get_logger("kms").error("a thread has ended", thread=name, exc_info=error)


class _Forwarded(logging.Handler):
    """Libraries log with the standard library; one line of theirs becomes one of ours."""

    def emit(self, record: logging.LogRecord) -> None:
        """Log *record*."""
        error = record.exc_info[1] if record.exc_info else None
        _LOG.warning("library", logger=record.name, message=record.getMessage(), error=type(error).__name__ if error else None)
