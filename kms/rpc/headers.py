"""What the headers of a call say of it: its id, and how long it may take."""

import re
from typing import Any, Final
from uuid import uuid4

import grpc

Context = grpc.aio.ServicerContext[Any, Any]

REQUEST_ID: Final = "x-request-id"
_REQUEST_ID_FORM: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")


def seconds_left(context: Context, seconds_max: float) -> float:
    """Return how long a call may take: until its deadline, be it past, and no longer than *seconds_max*."""
    remaining = context.time_remaining()
    return seconds_max if remaining is None else min(remaining, seconds_max)


def request_id_of(context: Context) -> str:
    """Return the id that the caller gave the call, or a new one if there is none that we take."""
    for name, value in context.invocation_metadata() or ():
        if name == REQUEST_ID and isinstance(value, str) and _REQUEST_ID_FORM.fullmatch(value):
            return value
    return str(uuid4())
