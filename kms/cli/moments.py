"""Options that are moments and limits."""

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Final

import typer

from kms.domain.fields import NUMBER_MAX

if TYPE_CHECKING:
    from google.protobuf.duration_pb2 import Duration
    from google.protobuf.timestamp_pb2 import Timestamp

MOMENTS: Final = ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%S%z"]
_SPAN: Final = re.compile(r"([1-9][0-9]{0,9})([smhd])")
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
LimitOption = Annotated[
    int | None, typer.Option("--limit", min=1, max=NUMBER_MAX, help="Exactly so many uses can be had. Default: no limit.")
]
ExpiresOption = Annotated[datetime | None, typer.Option("--expires", formats=MOMENTS, help="Default: never.")]


def stamp(moment: datetime | None) -> "Timestamp | None":
    """Return *moment* for a request; one without a zone is UTC. Raises BadParameter for one that no calendar of UTC has."""
    from google.protobuf.timestamp_pb2 import Timestamp

    if moment is None:
        return None
    found = Timestamp()
    try:
        found.FromDatetime(moment if moment.tzinfo else moment.replace(tzinfo=UTC))
    except OverflowError:
        raise typer.BadParameter("expected a moment that in UTC lies in the years 1 to 9999") from None
    return found


def parse_span(text: str) -> str:
    """Return *text* if it is a span such as 90d. Raises BadParameter."""
    if not _SPAN.fullmatch(text):
        raise typer.BadParameter("expected a number and s, m, h or d, such as 90d")
    return text


def span_seconds(span: str) -> int:
    """Return the seconds of a span that `parse_span` took."""
    return int(span[:-1]) * _UNITS[span[-1]]


ValidityOption = Annotated[
    str | None,
    typer.Option("--validity", metavar="SPAN", parser=parse_span, help="Default: the profile's: 90d.", show_default=False),
]


def duration(span: str | None) -> "Duration | None":
    """Return a span that `parse_span` took for a request."""
    from google.protobuf.duration_pb2 import Duration

    return None if span is None else Duration(seconds=span_seconds(span))
