"""Who is calling."""

from dataclasses import dataclass

from kms.app.ports import User, Users
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import UserId


@dataclass(frozen=True, slots=True)
class Access:
    """Admits users in good standing."""

    users: Users

    async def admit(self, user_id: UserId, *, recent: bool = False) -> User:
        """Return the user, or raise CREDENTIALS_INVALID for one that is unknown, locked or deleted: all alike.

        *recent*, as he was at most a second ago, will do where the charge looks at him again, and where nothing is recorded.
        """
        user = await self.users.find(user_id, recent=recent)
        if recent and user is not None and user.permissions:
            # Permissions open some calls and close others: nobody is refused for those that he had a moment ago.
            user = await self.users.find(user_id)
        if user is None:
            raise credentials_invalid()
        return user


def credentials_invalid() -> KmsError:
    """Return the one answer for every caller that is not admitted."""
    return KmsError(Reason.CREDENTIALS_INVALID, "the client certificate does not name a user who may call")
