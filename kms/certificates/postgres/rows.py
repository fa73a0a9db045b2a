"""Values of rows, checked; and values for a function of SQL, as JSON has them."""

from datetime import datetime
from typing import Any

from kms.app.ports import Call
from kms.domain.key_row import record_invalid


def of_call(call: Call) -> dict[str, object]:
    """Return what functions of SQL take of a call."""
    return {"user_version": call.user.version, "request_id": call.request_id, "peer": call.peer}


OF_NOBODY = {"user_version": None, "request_id": "", "peer": ""}
"""The same, where the service acts by itself."""


def json_bytes(value: bytes) -> str:
    """Return bytes as `jsonb_populate_record` reads them."""
    return "\\x" + value.hex()


def json_moment(value: datetime | None) -> str | None:
    """Return a moment as `jsonb_populate_record` reads it, to the microsecond."""
    return None if value is None else value.isoformat()


def moment(value: Any) -> datetime:  # noqa: ANN401 - what a row has
    """Return a moment of a row, or raise RECORD_INVALID."""
    if not isinstance(value, datetime):
        raise record_invalid()
    return value


def optional_moment(value: Any) -> datetime | None:  # noqa: ANN401
    """Return a moment of a row, or None."""
    return None if value is None else moment(value)


def texts(value: Any) -> tuple[str, ...]:  # noqa: ANN401
    """Return the texts in an array of a row, or raise RECORD_INVALID."""
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise record_invalid()
    return tuple(value)
