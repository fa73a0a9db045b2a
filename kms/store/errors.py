"""Translation of psycopg's exceptions. None of them leaves the store."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import psycopg
import psycopg_pool
import structlog
from psycopg import errors as pg

from kms.app.access import credentials_invalid
from kms.domain.errors import KmsError, Reason, malformed
from kms.domain.key_row import record_invalid

# A server that turned into a standby refuses to write: the pool's other connections lead to it as well, until it is replaced.
# FeatureNotSupported: a column or function changed its type after its statement was prepared. The connection is closed.
_UNAVAILABLE: Final = (psycopg.OperationalError, psycopg_pool.PoolClosed, pg.ReadOnlySqlTransaction, pg.FeatureNotSupported)
_UNCONFIRMED: Final = "restored_key_unconfirmed"
_RETIRED: Final = "retired_wrapping_key"
_NAME_TAKEN: Final = {
    "keys_user_id_key_name_key": "you have a key of that name",
    "users_username_key": "there is a user of that name",
}
_LOG = structlog.get_logger("kms.store")


def unavailable(detail: str) -> KmsError:
    """Return STORE_UNAVAILABLE saying *detail*, a sentence for the operator."""
    return KmsError(Reason.STORE_UNAVAILABLE, detail)


Refusals = Mapping[type[psycopg.Error], Callable[[], KmsError]]
"""What the exceptions of a statement mean to its caller."""
NO_REFUSALS: Final[Refusals] = {}


@contextmanager
def translated(refusals: Refusals = NO_REFUSALS) -> Iterator[None]:
    """Raise the driver's exceptions of the block as `KmsError`. *refusals* says what some of them mean there.

    STORE_UNAVAILABLE, NAME_TAKEN, MALFORMED, KEY_INACTIVE, RECORD_INVALID, CREDENTIALS_INVALID.

    STORE_UNAVAILABLE of a write leaves open whether it was stored. Who expects another error catches it in the block.
    """
    try:
        yield
    except tuple(refusals) as error:
        raise refusals[type(error)]() from None
    except _UNAVAILABLE as error:
        # To the driver it is an operational error, as if the server were in trouble.
        if isinstance(error, pg.ObjectNotInPrerequisiteState) and error.diag.constraint_name == _UNCONFIRMED:
            message = "the key was restored from a backup, and waits until an administrator confirms how often it was used"
            raise KmsError(Reason.KEY_INACTIVE, message) from None
        if isinstance(error, pg.ObjectNotInPrerequisiteState) and error.diag.constraint_name == _RETIRED:
            raise unavailable(
                "the key's envelope names a retired generation of master keys: try again, it is made anew"
            ) from None
        if isinstance(error, pg.InvalidAuthorizationSpecification) and error.diag.context:
            # A function of ours looked at the caller's standing. A login that the server refuses has no context.
            raise credentials_invalid() from None
        raise unavailable("the database does not answer") from error
    except psycopg.Error as error:
        raise _refusal(error) from error


def unexpected(error: psycopg.Error) -> KmsError:
    """Return STORE_UNAVAILABLE for what no statement of ours raises, and log *error*.

    It is a bug, or somebody has changed the database: a function, a constraint, a right.
    """
    _LOG.error("the database refuses a statement of the service", sqlstate=error.sqlstate, exc_info=error)
    return unavailable("the database does not do what it is asked to: the log of the service says more")


def _refusal(error: psycopg.Error) -> KmsError:
    if isinstance(error, pg.UniqueViolation) and (taken := _NAME_TAKEN.get(error.diag.constraint_name or "")) is not None:
        return KmsError(Reason.NAME_TAKEN, taken, field="name")
    if isinstance(error, psycopg.DataError) and error.sqlstate is None:
        # The driver cannot send the value, or read it. A moment at infinity is one that it cannot read: no record of ours has it.
        return malformed("text", "expected no NUL character") if "NUL" in str(error) else record_invalid()
    return unexpected(error)
