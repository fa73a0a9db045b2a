"""Translation of psycopg's exceptions. What is not translated is a bug, and is raised as it is."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import psycopg
import psycopg_pool
from psycopg import errors as pg

from kms.domain.errors import KmsError, Reason, malformed
from kms.domain.key_row import record_invalid

# A server that turned into a standby refuses to write: the pool's other connections lead to it as well, until it is replaced.
# FeatureNotSupported: a column or function changed its type after its statement was prepared. The connection is closed.
_UNAVAILABLE: Final = (psycopg.OperationalError, psycopg_pool.PoolClosed, pg.ReadOnlySqlTransaction, pg.FeatureNotSupported)
_UNCONFIRMED: Final = "restored_key_unconfirmed"
_NAME_TAKEN: Final = {
    "keys_user_id_key_name_key": "you have a key of that name",
    "users_username_key": "there is a user of that name",
}


def unavailable(detail: str) -> KmsError:
    """Return STORE_UNAVAILABLE saying *detail*, a sentence for the operator."""
    return KmsError(Reason.STORE_UNAVAILABLE, detail)


@contextmanager
def translated() -> Iterator[None]:
    """Raise the driver's exceptions of the block as `KmsError`.

    STORE_UNAVAILABLE, NAME_TAKEN, MALFORMED, KEY_INACTIVE, RECORD_INVALID.

    STORE_UNAVAILABLE of a write leaves open whether it was stored.
    """
    try:
        yield
    except pg.UniqueViolation as error:
        message = _NAME_TAKEN.get(error.diag.constraint_name or "")
        if message is None:
            raise
        raise KmsError(Reason.NAME_TAKEN, message, field="name") from None
    except psycopg.DataError as error:
        if error.sqlstate is not None:
            raise
        if "NUL" not in str(error):
            # A value that the driver cannot read, such as a moment at infinity: no record of ours has it.
            raise record_invalid() from None
        raise malformed("text", "expected no NUL character") from None
    except _UNAVAILABLE as error:
        # To the driver it is an operational error, as if the server were in trouble.
        if isinstance(error, pg.ObjectNotInPrerequisiteState) and error.diag.constraint_name == _UNCONFIRMED:
            message = "the key was restored from a backup, and waits until an administrator confirms how often it was used"
            raise KmsError(Reason.KEY_INACTIVE, message) from None
        raise unavailable("the database does not answer") from error
