"""What a machine remembers outside the database: the journal, and whether the database was ever served."""

from uuid import UUID

from kms.config import Config
from kms.domain.errors import KmsError, Reason
from kms.pki.client_identity import host_clock
from kms.store.journal import Journal


def was_served(config: Config) -> bool:
    """Whether a file outside the database knows that it was served before."""
    files = (config.server.journal if config.server else None, config.audit.checkpoints if config.audit else None)
    return any(file is not None and file.is_file() and file.stat().st_size > 0 for file in files)


def open_journal(config: Config, number: int, epoch: UUID) -> Journal | None:
    """Return the journal of `server.journal`, which knows then of the epoch; None: there is none. Raises STORE_UNAVAILABLE."""
    file = config.server.journal if config.server else None
    if file is None:
        return None
    journal = Journal(file)
    try:
        journal.see_epoch(number, epoch, at=host_clock())
    except OSError as error:
        raise KmsError(Reason.STORE_UNAVAILABLE, f"the journal {file} cannot be written: {error.strerror}") from None
    return journal
