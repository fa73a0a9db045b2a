"""What a verification of the trail could not check, in words: whoever reads the report must not take silence for a proof."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from kms.domain.key_check import COLUMNS_NOT_COMPARED
from kms.domain.trail_check import TrailReport

TABLES_NOT_COMPARED: Final = (
    "authentication.*", "blockchain.*", "configuration.*", "cryptography.certificates", "cryptography.epochs",
    "cryptography.key_grants", "cryptography.key_rotations", "cryptography.ledger_writers", "cryptography.request_records",
    "cryptography.restored_keys", "cryptography.wrapping_keys", "audit.aggregate_heads", "audit.aggregate_snapshots",
    "audit.archived_partitions", "audit.data_access_log",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class NotChecked:
    """Something that was not checked: a stable word, how much of it where that can be counted, a sentence."""

    what: str
    count: int | None
    message: str


def not_checked(report: TrailReport, *, has_outside: bool) -> tuple[NotChecked, ...]:
    """Return what *report* says nothing about. *has_outside*: the trail was compared with checkpoints from outside."""
    return tuple(NotChecked(*each) for each in (*_rows(report, has_outside=has_outside), *_keys(report), *_never()))


def _rows(report: TrailReport, *, has_outside: bool) -> Iterator[tuple[str, int | None, str]]:
    if report.begun_at:
        yield "ROWS_BEFORE_THE_BEGINNING", report.begun_at, f"the first {report.begun_at} rows, which are not here"
    if report.finding is not None:
        yield "ROWS_AFTER_THE_DIFFERENCE", None, "the rows after the difference"
    elif not report.checkpoints:
        yield "ROWS_WITHOUT_A_CHECKPOINT", report.unsealed, f"any of the {report.unsealed} rows: no checkpoint covers one"
    elif report.unsealed:
        told = f"{report.unsealed} rows that are not signed yet: whoever writes to the database can still change them"
        yield "ROWS_NOT_SIGNED", report.unsealed, told
    if not has_outside:
        told = "whether the end was cut off: only checkpoints that were kept outside the database show it"
        yield "END_OF_THE_TRAIL", None, told


def _keys(report: TrailReport) -> Iterator[tuple[str, int | None, str]]:
    keys = report.keys
    if keys is None:
        yield "KEYS", None, "the keys: they are not here"
        return
    if keys.not_comparable:
        told = f"{keys.not_comparable} keys, about which these entries say nothing"
        yield "KEYS_NOT_COMPARABLE", keys.not_comparable, told
    if keys.partly:
        told = f"some columns of {keys.partly} keys, whose first entries are not here"
        yield "KEYS_PARTLY_COMPARED", keys.partly, told
    if keys.unsigned:
        told = f"whether the last entries about {keys.unsigned} keys are true: they are not signed yet"
        yield "KEYS_BY_UNSIGNED_ROWS", keys.unsigned, told


def _never() -> Iterator[tuple[str, int | None, str]]:
    columns = ", ".join(COLUMNS_NOT_COMPARED)
    yield "COLUMNS", len(COLUMNS_NOT_COMPARED), f"the columns {columns} of keys: the service checks the envelope and the MAC"
    yield "TABLES", len(TABLES_NOT_COMPARED), f"tables of which the trail does not say each row: {', '.join(TABLES_NOT_COMPARED)}"
