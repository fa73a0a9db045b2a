"""Options that are moments and limits."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Final

import typer

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp

MOMENTS: Final = ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%S%z"]
LimitOption = Annotated[
    int | None, typer.Option("--limit", min=1, max=2**63 - 1, help="Exactly so many uses can be had. Default: no limit.")
]
ExpiresOption = Annotated[datetime | None, typer.Option("--expires", formats=MOMENTS, help="Default: never.")]


def stamp(moment: datetime | None) -> "Timestamp | None":
    """Return *moment* for a request; one without a zone is UTC."""
    from google.protobuf.timestamp_pb2 import Timestamp

    if moment is None:
        return None
    found = Timestamp()
    found.FromDatetime(moment if moment.tzinfo else moment.replace(tzinfo=UTC))
    return found
