"""What the `kms user` commands do."""

import asyncio

from kms.config import Config
from kms.domain.ids import UserId
from kms.store.users import StoredUsers
from kms.wiring.parts import with_pool


def add_service(config: Config, name: str, role: str | None) -> UserId:
    """Make a user that is a program, known by its client certificate, with a role if one is named.

    Raises MALFORMED or NAME_TAKEN.
    """
    return asyncio.run(with_pool(config, lambda pool: StoredUsers(pool).create_service(name, role)))
