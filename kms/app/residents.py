"""Reconciliation: RESIDENT keys in the token are compared with the rows of the database, and what was not finished is removed.

The rules, and why a missing row is no evidence, are in `domain/residents.py`.
"""

from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyId
from kms.domain.keys import HeldKey
from kms.domain.residents import REMOVABLE_BY_OPERATOR, Finding, Holdings, Row, findings

Proof = Callable[[HeldKey], Awaitable[bool]]
"""Whether a row is the service's own. A row that is not is left alone and reported."""

_REFUSALS: Mapping[Finding, str] = {
    Finding.STORED: "its row is in the database: schedule its destruction",
    Finding.STORED_WITH_MARK: "its row is in the database: schedule its destruction",
    Finding.PENDING: "it may be being made now: what is left of a failed creation is removed after an hour",
    Finding.ROW_UNPROVEN: "the database has a row for it, which is not proven to be ours",
}


class TokenObjects(Protocol):
    """What reconciliation needs of the token: a part of `Hsm`, and what a command has of a token."""

    async def holdings(self) -> Holdings:
        """See `Hsm.holdings`."""
        ...

    async def confirm(self, key_id: KeyId) -> None:
        """See `Hsm.confirm`."""
        ...

    async def abandon(self, key_id: KeyId) -> None:
        """See `Hsm.abandon`."""
        ...

    async def discard(self, key_id: KeyId, bound_to: str) -> None:
        """See `Hsm.discard`."""
        ...


class ResidentRows(Protocol):
    """What reconciliation needs of the database."""

    async def find(self, key_ids: Collection[KeyId]) -> Mapping[KeyId, HeldKey | None]:
        """Return the keys among *key_ids* that have a row, whoever owns them. None: the row has no envelope (any more)."""
        ...


@dataclass(frozen=True, slots=True)
class Reconciliation:
    """Compares the token with the database, and removes from the token what the rules allow."""

    token: TokenObjects
    rows: ResidentRows
    proof: Proof
    clock: Callable[[], datetime]

    async def look(self) -> dict[KeyId, Finding]:
        """Return what each object and mark in the token is. Changes nothing."""
        found = await self._look()
        if Finding.ROW_MISSING not in found.values():
            return found
        # A creation that failed between the two looks seems to be a key without a row.
        again = await self._look()
        return {
            key_id: finding
            for key_id, finding in again.items()
            if finding is not Finding.ROW_MISSING or found.get(key_id) is Finding.ROW_MISSING
        }

    async def run(self) -> dict[KeyId, Finding]:
        """Remove what was not finished, and marks that stayed; return what was found before that."""
        found = await self.look()
        for key_id, finding in found.items():
            match finding:
                case Finding.STORED_WITH_MARK:
                    await self.token.confirm(key_id)
                case Finding.ORPHAN | Finding.MARK_ALONE:
                    # Looks at the mark again: where it is gone meanwhile, the key is stored.
                    await self.token.abandon(key_id)
                case _:
                    pass
        return found

    async def check_removable(self, key_id: KeyId) -> Finding:
        """Return what *key_id* is where an operator may remove it from the token, or raise KEY_NOT_FOUND or WRONG_PURPOSE."""
        found = await self.look()
        if key_id not in found:
            raise KmsError(Reason.KEY_NOT_FOUND, "the token holds no RESIDENT key of that id, and no mark of one")
        finding = found[key_id]
        if refusal := _REFUSALS.get(finding):
            raise KmsError(Reason.WRONG_PURPOSE, f"the key is not removed from the token: {refusal}")
        if bound_to := (await self.token.holdings()).objects.get(key_id):
            raise _bound(bound_to)
        return finding

    async def remove(self, key_id: KeyId) -> None:
        """Remove from the token what an operator has named, or raise as `check_removable` does."""
        if await self.check_removable(key_id) in REMOVABLE_BY_OPERATOR:
            await self.token.discard(key_id, "")
        else:
            await self.token.abandon(key_id)

    async def _look(self) -> dict[KeyId, Finding]:
        # The token is read first: a key whose row is stored meanwhile is then found with its row.
        held = await self.token.holdings()
        rows = await self.rows.find(held.objects.keys() | held.marks.keys())
        proven = {key_id: await self._row(row) for key_id, row in rows.items()}
        return findings(held, proven, now=self.clock())

    async def _row(self, row: HeldKey | None) -> Row:
        return Row.PROVEN if row is not None and await self.proof(row) else Row.UNPROVEN


def _bound(bound_to: str) -> KmsError:
    return KmsError(Reason.WRONG_PURPOSE, f"the service itself needs this key ({bound_to}): it is never removed from the token")
