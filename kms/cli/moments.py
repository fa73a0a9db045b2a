"""Options that are moments and limits."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Final

import typer

from kms.domain.fields import NUMBER_MAX

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp

MOMENTS: Final = ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%S%z"]
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
