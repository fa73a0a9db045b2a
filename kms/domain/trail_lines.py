"""The lines of an exported trail: rows in their order, notes between them, at the very beginning perhaps a frontier, an end.

Then the keys, each with what the trail says of it beyond the rows before.

A row is the JSON object that its leaf of the tree hashes, byte for byte. docs/formats.md has the columns.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple
from uuid import UUID

from kms.domain.errors import malformed
from kms.domain.key_check import BIGINT_MAX, KeyChange, KeyUse, integer, load
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
    """A row as the tree sees it. `entry` is what the row says about a key; None also where only the hash was asked for."""

    place: RowPlace
    hash: bytes
    entry: KeyChange | KeyUse | None = None


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


@dataclass(frozen=True, slots=True)
class KeyRow:
    """A row of `cryptography.keys` without its envelope, and entries about it that the rows before may lack.

    These belong to transactions that may have been under way when the rows were read. Some of them may be among the rows, too.
    """

    key_id: UUID
    row: Mapping[str, Any]
    later: tuple[KeyChange | KeyUse, ...]


@dataclass(frozen=True, slots=True)
class KeysEnd:
    """The end of the keys: so many there were."""

    count: int


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


def key_line(row: str, changes: str, used: int | None) -> str:
    """Return the line of a key: its row, its later changes as pairs of version and text, the highest number of a later use.

    *row* and *changes* are JSON already.
    """
    return f'{{"key":{row},"later":{{"changes":{changes},"used":{json.dumps(used)}}}}}'


def keys_end_line(end: KeysEnd) -> str:
    """Return the line of the end of the keys."""
    return json.dumps({"keys": end.count}, separators=(",", ":"))


Line = Leaf | Unplaced | Note | Beginning | End | KeyRow | KeysEnd


def parse_line(line: bytes) -> Line:
    """Return what a line (without its end) holds, or raise MALFORMED."""
    try:
        if line.startswith((b'{"key":', b'{"keys":')):
            return _key(load(line))
        found = json.loads(line)
        if "frontier" in found:
            hashes = tuple(bytes.fromhex(each) for each in found["frontier"])
            return Beginning(Frontier(int(found["size"]), hashes), str(found["note"]))
        if "next_order" in found:
            return End(int(found["next_order"]))
        if found.get("commit_order", "") is None:
            return Unplaced(str(found["table"]), str(found["id"]))
        return Note(str(found["note"])) if "note" in found else Leaf(_place(found), leaf_hash(line), _entry(found))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise malformed(
            "line", "expected a row, a note, a key, a beginning or an end as `kms audit export` writes them"
        ) from None


def _key(found: Mapping[str, Any]) -> KeyRow | KeysEnd:
    if "keys" in found:
        return KeysEnd(integer(found["keys"]))
    key_id, later = UUID(found["key"]["id"]), found["later"]
    entries = [KeyChange(key_id, integer(version), str(data)) for version, data in later["changes"]]
    uses = [] if later["used"] is None else [KeyUse(key_id, integer(later["used"]))]
    return KeyRow(key_id, found["key"], (*entries, *uses))


def _entry(row: Mapping[str, Any]) -> KeyChange | KeyUse | None:
    """Return what a row says about a key. Raises ValueError, KeyError and TypeError where the service cannot have written it."""
    if row["table"] == "audit.domain_events" and row["aggregate_type"] == "key":
        return KeyChange(UUID(row["aggregate_id"]), _bigint(row["aggregate_version"]), row["event_data"])
    if row["table"] == "audit.security_events" and row["event_type"] == "key.used":
        number = load(row["event_details"]).get("use_number")
        return None if number is None else KeyUse(UUID(row["resource_id"]), integer(number))
    return None


def _bigint(text: str) -> int:
    found = int(text)
    if not 0 < found <= BIGINT_MAX:
        raise ValueError("expected a BIGINT above 0")
    return found


def _place(row: Mapping[str, str]) -> RowPlace:
    return RowPlace(int(row["commit_order"]), str(row["table"]), str(row["id"]))
