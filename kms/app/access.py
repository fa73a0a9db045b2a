"""Who is calling."""

from dataclasses import dataclass

from kms.app.ports import User, Users
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import UserId


@dataclass(frozen=True, slots=True)
class Access:
    """Admits users in good standing."""

    users: Users

    async def admit(self, user_id: UserId) -> User:
        """Return the user, or raise CREDENTIALS_INVALID for one that is unknown, locked or deleted: all alike."""
        user = await self.users.find(user_id)
        if user is None:
            raise credentials_invalid()
        return user


def credentials_invalid() -> KmsError:
    """Return the one answer for every caller that is not admitted."""
    return KmsError(Reason.CREDENTIALS_INVALID, "the client certificate does not name a user who may call")
