"""The log: one JSON object a line on standard error."""

import logging
import sys

import structlog
from structlog.typing import EventDict

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
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        # Unlike print, it writes a line with its end at once: several processes have this standard error.
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(level=logging.WARNING, handlers=[_Forwarded()], force=True)


class _Forwarded(logging.Handler):
    """Libraries log with the standard library; one line of theirs becomes one of ours."""

    def emit(self, record: logging.LogRecord) -> None:
        """Log *record*."""
        error = record.exc_info[1] if record.exc_info else None
        _LOG.warning("library", logger=record.name, message=record.getMessage(), error=type(error).__name__ if error else None)
