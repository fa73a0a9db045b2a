"""The port `Users`: who may call; and the making of users that are services."""

import re
from dataclasses import dataclass
from typing import Final

import structlog
from psycopg.rows import DictRow

from kms.app.ports import User
from kms.domain.errors import malformed
from kms.domain.ids import UserId
from kms.domain.permissions import Permission
from kms.store.pool import AS_ADMINISTRATOR, BEFORE_LOGIN, Pool

FIND_BY_URI: Final = "SELECT id, username, version, permissions FROM authentication.find_user_by_uri(%(id)s)"
FIND_BY_NAME: Final = "SELECT id FROM authentication.users WHERE username = %(name)s AND deleted_at IS NULL"
CREATE_SERVICE: Final = "SELECT authentication.create_service_user(%(name)s) AS id"
ROLES: Final = "SELECT name FROM authentication.roles ORDER BY name"
ASSIGN_ROLE: Final = "SELECT authentication.assign_role(%(user)s, %(role)s)"
_LOG = structlog.get_logger("kms.store.users")
_SERVICE_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{2,99}")


@dataclass(frozen=True, slots=True)
class StoredUsers:
    """`Users` in `authentication.users`. Nothing is remembered here: *recent* makes no difference."""

    pool: Pool

    async def find(self, user_id: UserId, *, recent: bool = False) -> User | None:
        """Return the user in good standing, or None for one that is unknown, locked or deleted."""
        rows = await self.pool.fetch(BEFORE_LOGIN, FIND_BY_URI, {"id": user_id})
        if rows and rows[0]["id"] != user_id:
            # Who calls is in the certificate. An answer about somebody else is no answer, and no accident.
            _LOG.error("the database answered for another user", asked=str(user_id), answered=str(rows[0]["id"]))
            return None
        return _user(rows[0], user_id) if rows else None

    async def create_service(self, name: str, role: str | None = None) -> UserId:
        """Make a user that is known by its client certificate alone, with *role* if one is named: both or neither.

        Raises MALFORMED, for a role that there is not, too, or NAME_TAKEN.
        """
        if not _SERVICE_NAME.fullmatch(name):
            raise malformed("name", "expected 3 to 100 of A-Z a-z 0-9 . _ -, beginning with a letter or digit")
        async with self.pool.transaction(AS_ADMINISTRATOR) as connection:
            row = await (await connection.execute(CREATE_SERVICE, {"name": name})).fetchone()
            assert row is not None  # noqa: S101  # a function that returns no set gives a row or raises
            if role is not None:
                known = [found["name"] for found in await (await connection.execute(ROLES)).fetchall()]
                if role not in known:
                    raise malformed("role", f"expected one of {', '.join(known)}")
                await (await connection.execute(ASSIGN_ROLE, {"user": row["id"], "role": role})).fetchone()
        return UserId(row["id"])

    async def find_service(self, name: str) -> UserId | None:
        """Return the user of that name, or None."""
        rows = await self.pool.fetch(AS_ADMINISTRATOR, FIND_BY_NAME, {"name": name})
        return UserId(rows[0]["id"]) if rows else None

    async def find_or_create_service(self, name: str) -> UserId:
        """Return the user of that name, made if there is none. Raises NAME_TAKEN where another made him at this moment."""
        return await self.find_service(name) or await self.create_service(name)


def _user(row: DictRow, user_id: UserId) -> User:
    # A permission that this program does not know opens nothing in it.
    permissions = frozenset(permission for permission in Permission if permission in row["permissions"])
    return User(user_id, row["username"], row["version"], permissions)
