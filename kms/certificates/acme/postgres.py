"""Accounts, orders and spent nonces in PostgreSQL. A row is believed only with the MAC that the service made of it."""
# ruff: noqa: S608  # queries are put together from literals alone: LiteralString, which basedpyright checks

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from typing import Final, LiteralString, TypeVar
from uuid import UUID

from psycopg.rows import DictRow
from psycopg.types.json import Jsonb

from kms.app.ports import Call
from kms.app.records import Records
from kms.certificates.acme.account import Account, AccountStatus
from kms.certificates.acme.order import Order, contents
from kms.certificates.acme.ports import AccountPlace
from kms.certificates.acme.problems import AcmeError
from kms.certificates.postgres.rows import OF_NOBODY, json_bytes, json_moment, moment, of_call, texts
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import UserId
from kms.domain.key_row import record_invalid
from kms.store.journal import Journal, JournaledAuthority, authority_line
from kms.store.journal_knowledge import JournalKnowledge
from kms.store.journaled import write_line
from kms.store.pool import AS_JOB, Acting, Pool, as_user

T = TypeVar("T")

_ACCOUNT: Final = "id, authority, user_id, status, jwk, contacts, created_at, bind_before, version, record_mac"
_ORDER: Final = "id, account_id, content, certificate_id, created_at, expires_at, version, record_mac"
FIND_ACCOUNT: Final = f"SELECT {_ACCOUNT} FROM cryptography.acme_accounts WHERE id = %(id)s"
FIND_ACCOUNT_BY_KEY: Final = f"""
    SELECT {_ACCOUNT} FROM cryptography.acme_accounts WHERE authority = %(authority)s AND thumbprint = %(thumbprint)s
"""
PAGE_OF_ACCOUNTS: Final = f"""
    SELECT {_ACCOUNT} FROM cryptography.acme_accounts
    WHERE user_id = %(user)s AND (created_at, id) < (%(created_at)s::timestamptz, %(id)s::uuid)
    ORDER BY created_at DESC, id DESC
    LIMIT %(limit)s
"""
CREATE_ACCOUNT: Final = "SELECT cryptography.create_acme_account(%(account)s, %(user_version)s, %(request_id)s, %(peer)s)"
CHANGE_ACCOUNT: Final = """
    SELECT cryptography.change_acme_account(
        %(id)s, %(version)s, %(account)s, %(event)s, %(user_version)s, %(request_id)s, %(peer)s
    ) AS verdict
"""
FIND_ORDER: Final = f"SELECT {_ORDER} FROM cryptography.acme_orders WHERE id = %(id)s"
FIND_ORDER_OF_CERTIFICATE: Final = f"""
    SELECT {_ORDER} FROM cryptography.acme_orders WHERE certificate_id = %(id)s ORDER BY created_at LIMIT 1
"""
PAGE_OF_ORDERS: Final = f"""
    SELECT {_ORDER} FROM cryptography.acme_orders WHERE account_id = %(id)s ORDER BY created_at DESC, id DESC LIMIT %(limit)s
"""
ADD_ORDER: Final = """
    SELECT cryptography.add_acme_order(%(order)s, %(orders_max)s, %(seconds)s, %(peer)s, %(details)s) AS verdict
"""
CHANGE_ORDER: Final = """
    SELECT cryptography.change_acme_order(%(id)s, %(version)s, %(order)s, %(event)s, %(details)s, %(peer)s) AS verdict
"""
SPEND: Final = "SELECT cryptography.spend_acme_nonce(%(nonce)s, %(good_until)s) AS is_first"
FORGET: Final = "SELECT cryptography.forget_acme(%(seconds)s, %(rows_max)s) AS rows"
_LAST_PLACE: Final = AccountPlace(datetime.max.replace(tzinfo=UTC), UUID(int=2**128 - 1))
_HOUR_SECONDS: Final = 3600.0
# Changes of one account that come between a read and the look at the journal, one after another.
_READS_MAX: Final = 3


@dataclass(frozen=True, slots=True)
class StoredAccounts:
    """`Accounts` in PostgreSQL."""

    pool: Pool
    records: Records
    knowledge: JournalKnowledge | None = None
    journal: Journal | None = None

    async def find(self, account_id: UUID) -> Account | None:
        """See `Accounts.find`."""
        found = await self._read(AS_JOB, FIND_ACCOUNT, {"id": account_id})
        return _the_one(found, lambda account: account.account_id == account_id)

    async def find_by_key(self, authority: str, thumbprint: str) -> Account | None:
        """See `Accounts.find_by_key`."""
        found = await self._read(AS_JOB, FIND_ACCOUNT_BY_KEY, {"authority": authority, "thumbprint": thumbprint})
        return _the_one(found, lambda account: (account.authority, account.thumbprint) == (authority, thumbprint))

    async def page(self, user_id: UserId, *, after: AccountPlace | None, limit: int) -> Sequence[Account]:
        """See `Accounts.page`."""
        place = after or _LAST_PLACE
        parameters = {"user": user_id, "created_at": place.created_at, "id": place.account_id, "limit": limit}
        found = await self._read(as_user(user_id), PAGE_OF_ACCOUNTS, parameters)
        if any(account.user_id != user_id for account in found):
            raise record_invalid()
        return found

    async def add(self, call: Call, account: Account) -> None:
        """See `Accounts.add`."""
        await self.pool.fetch(
            as_user(call.user.user_id), CREATE_ACCOUNT, {"account": Jsonb(await self._json(account)), **of_call(call)}
        )

    async def change(self, call: Call | None, account: Account, event: str, peer: str) -> None:
        """See `Accounts.change`."""
        parameters = {
            "id": account.account_id,
            "version": account.version - 1,
            "account": Jsonb(await self._json(account)),
            "event": event,
            **(OF_NOBODY | {"peer": peer} if call is None else of_call(call)),
        }
        acting = AS_JOB if call is None else as_user(call.user.user_id)
        verdict = (await self.pool.fetch(acting, CHANGE_ACCOUNT, parameters))[0]["verdict"]
        if verdict == "TAKEN":
            raise KmsError(Reason.NAME_TAKEN, "another account of the authority has this key")
        if verdict != "OK":
            raise KmsError(Reason.STALE, "the account changed meanwhile: look at it again")
        if self.journal is not None:
            line = authority_line(account.account_id, _journaled(account), occurred_at=self.records.clock(), what=event)
            await write_line(self.journal, line)

    async def _json(self, account: Account) -> dict[str, object]:
        """Return a row with its MAC as JSON has it."""
        return {
            "id": str(account.account_id),
            "authority": account.authority,
            "user_id": str(account.user_id),
            "status": account.status.value,
            "jwk": account.jwk,
            "thumbprint": account.thumbprint or None,
            "contacts": list(account.contacts),
            "created_at": json_moment(account.created_at),
            "bind_before": json_moment(account.bind_before),
            "version": account.version,
            "record_mac": json_bytes(await self.records.mac(account.authenticated_bytes())),
        }

    async def _read(self, acting: Acting, query: LiteralString, parameters: Mapping[str, object]) -> list[Account]:
        for _ in range(_READS_MAX):
            found = [await self._proven(row) for row in await self.pool.fetch(acting, query, parameters)]
            # The journal may know of a change that came after the read: a read that begins now shows it.
            if not any(self._is_outdated(account) for account in found):
                return found
        raise record_invalid()

    def _is_outdated(self, account: Account) -> bool:
        """Whether the journal has a later record of the account, or another of its version."""
        known = None if self.knowledge is None else self.knowledge.authority(account.account_id)
        return known is not None and known.version >= account.version and known != _journaled(account)

    async def _proven(self, row: DictRow) -> Account:
        account = _account(row)
        await self.records.prove(account.authenticated_bytes(), row["record_mac"], None)
        return account


@dataclass(frozen=True, slots=True)
class StoredOrders:
    """`Orders` in PostgreSQL. An account makes at most *orders_max* an hour."""

    pool: Pool
    records: Records
    orders_max: int

    async def find(self, order_id: UUID) -> Order | None:
        """See `Orders.find`."""
        found = await self._read(FIND_ORDER, {"id": order_id})
        return _the_one(found, lambda order: order.order_id == order_id)

    async def of_certificate(self, certificate_id: UUID) -> Sequence[Order]:
        """See `Orders.of_certificate`."""
        found = await self._read(FIND_ORDER_OF_CERTIFICATE, {"id": certificate_id})
        if any(order.certificate_id != certificate_id for order in found):
            raise record_invalid()
        return found

    async def page(self, account_id: UUID, *, limit: int) -> Sequence[Order]:
        """See `Orders.page`."""
        found = await self._read(PAGE_OF_ORDERS, {"id": account_id, "limit": limit})
        if any(order.account_id != account_id for order in found):
            raise record_invalid()
        return found

    async def add(self, order: Order, details: Mapping[str, object], peer: str) -> None:
        """See `Orders.add`."""
        parameters = {
            "order": Jsonb(await self._json(order)),
            "orders_max": self.orders_max,
            "seconds": _HOUR_SECONDS,
            "peer": peer,
            "details": Jsonb(dict(details)),
        }
        if (await self.pool.fetch(AS_JOB, ADD_ORDER, parameters))[0]["verdict"] != "OK":
            raise KmsError(Reason.RATE_LIMITED, f"the account made {self.orders_max} orders within an hour: wait")

    async def change(self, order: Order, event: str | None, details: Mapping[str, object], peer: str) -> bool:
        """See `Orders.change`."""
        parameters = {
            "id": order.order_id,
            "version": order.version - 1,
            "order": Jsonb(await self._json(order)),
            "event": event,
            "details": Jsonb(dict(details)),
            "peer": peer,
        }
        return bool((await self.pool.fetch(AS_JOB, CHANGE_ORDER, parameters))[0]["verdict"] == "OK")

    async def _json(self, order: Order) -> dict[str, object]:
        """Return a row with its MAC as JSON has it."""
        return {
            "id": str(order.order_id),
            "account_id": str(order.account_id),
            "content": order.content(),
            "certificate_id": None if order.certificate_id is None else str(order.certificate_id),
            "created_at": json_moment(order.created_at),
            "expires_at": json_moment(order.expires_at),
            "version": order.version,
            "record_mac": json_bytes(await self.records.mac(order.authenticated_bytes())),
        }

    async def _read(self, query: LiteralString, parameters: Mapping[str, object]) -> list[Order]:
        return [await self._proven(row) for row in await self.pool.fetch(AS_JOB, query, parameters)]

    async def _proven(self, row: DictRow) -> Order:
        order = _order(row)
        await self.records.prove(order.authenticated_bytes(), row["record_mac"], None)
        return order


@dataclass(frozen=True, slots=True)
class StoredNonces:
    """`SpentNonces` in PostgreSQL, and the removal of what is over."""

    pool: Pool

    async def spend(self, nonce: bytes, good_until: datetime) -> bool:
        """See `SpentNonces.spend`."""
        rows = await self.pool.fetch(AS_JOB, SPEND, {"nonce": nonce, "good_until": good_until})
        return bool(rows[0]["is_first"])

    async def forget(self, seconds: float, rows_max: int) -> int:
        """Remove nonces that are good no longer, and orders that ended *seconds* ago. Return how many rows went."""
        rows = await self.pool.fetch(AS_JOB, FORGET, {"seconds": seconds, "rows_max": rows_max})
        return int(rows[0]["rows"])


def _journaled(account: Account) -> JournaledAuthority:
    return JournaledAuthority(account.version, sha256(account.authenticated_bytes()).hexdigest())


def _the_one(found: Sequence[T], is_asked: Callable[[T], bool]) -> T | None:
    """Return the one row that was found, or None. Raises RECORD_INVALID for another row than was asked for."""
    if not all(map(is_asked, found)):
        raise record_invalid()
    return found[0] if found else None


def _account(row: DictRow) -> Account:
    """Return the account in a row. Raises RECORD_INVALID for what no row of ours has."""
    try:
        return Account(
            account_id=row["id"],
            authority=str(row["authority"]),
            user_id=UserId(row["user_id"]),
            created_at=moment(row["created_at"]),
            bind_before=moment(row["bind_before"]),
            status=AccountStatus(row["status"]),
            jwk=str(row["jwk"]),
            contacts=texts(row["contacts"]),
            version=int(row["version"]),
        )
    except (ValueError, TypeError):
        raise record_invalid() from None


def _order(row: DictRow) -> Order:
    """Return the order in a row. Raises RECORD_INVALID for what no row of ours has."""
    try:
        return Order(
            order_id=row["id"],
            account_id=row["account_id"],
            created_at=moment(row["created_at"]),
            expires_at=moment(row["expires_at"]),
            certificate_id=row["certificate_id"],
            version=int(row["version"]),
            **contents(row["content"]),
        )
    except (ValueError, TypeError, KeyError, RecursionError, AcmeError):
        raise record_invalid() from None
