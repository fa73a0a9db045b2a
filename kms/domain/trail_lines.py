"""The lines of an exported trail: rows in their order, notes between them, at the very beginning perhaps a frontier, an end.

A row is the JSON object that its leaf of the tree hashes, byte for byte. docs/formats.md has the columns.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from kms.domain.errors import malformed
from kms.domain.merkle import Frontier, leaf_hash

ORDER_MIN: Final = -(2**63)
_NO_ID: Final = "00000000-0000-0000-0000-000000000000"


class RowPlace(NamedTuple):
    """Where a row stands in the trail: transaction, table, id. Places compare as the rows are ordered."""

    order: int
    table: str
    row_id: str


@dataclass(frozen=True, slots=True)
class Leaf:
    """A row as the tree sees it."""

    place: RowPlace
    hash: bytes


@dataclass(frozen=True, slots=True)
class Unplaced:
    """A row without an order, which stands nowhere in the trail: somebody who may took away what keeps it out."""

    table: str
    row_id: str


@dataclass(frozen=True, slots=True)
class Note:
    """A signed checkpoint in the place where the trail has the rows that it counts."""

    text: str


@dataclass(frozen=True, slots=True)
class Beginning:
    """What a trail begins with whose earlier rows are left out: the tree over them, and the checkpoint that vouches for it."""

    frontier: Frontier
    note: str


@dataclass(frozen=True, slots=True)
class End:
    """The end of an exported trail. No transaction had reached `next_order`, so that no row can have it or a later one."""

    next_order: int


def place_before(order: int) -> RowPlace:
    """Return the place behind which every row stands whose order is at least *order*."""
    return RowPlace(order, "", _NO_ID)


def unplaced_line(unplaced: Unplaced) -> str:
    """Return the line of a row without an order."""
    found = {"commit_order": None, "id": unplaced.row_id, "table": unplaced.table}
    return json.dumps(found, ensure_ascii=False, separators=(",", ":"))


def note_line(note: str) -> str:
    """Return the line of a note."""
    return json.dumps({"note": note}, ensure_ascii=False, separators=(",", ":"))


def beginning_line(beginning: Beginning) -> str:
    """Return the line of a beginning."""
    hashes = [each.hex() for each in beginning.frontier.hashes]
    found = {"frontier": hashes, "note": beginning.note, "size": beginning.frontier.size}
    return json.dumps(found, ensure_ascii=False, separators=(",", ":"))


def end_line(end: End) -> str:
    """Return the line of an end."""
    return json.dumps({"next_order": str(end.next_order)}, separators=(",", ":"))


def parse_line(line: bytes) -> Leaf | Unplaced | Note | Beginning | End:
    """Return what a line (without its end) holds, or raise MALFORMED."""
    try:
        found = json.loads(line)
        if "frontier" in found:
            hashes = tuple(bytes.fromhex(each) for each in found["frontier"])
            return Beginning(Frontier(int(found["size"]), hashes), str(found["note"]))
        if "next_order" in found:
            return End(int(found["next_order"]))
        if found.get("commit_order", "") is None:
            return Unplaced(str(found["table"]), str(found["id"]))
        return Note(str(found["note"])) if "note" in found else Leaf(_place(found), leaf_hash(line))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise malformed("line", "expected a row, a note, a beginning or an end as `kms audit export` writes them") from None


def _place(row: Mapping[str, str]) -> RowPlace:
    return RowPlace(int(row["commit_order"]), str(row["table"]), str(row["id"]))
