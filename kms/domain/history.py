"""Which history of the trail may be signed: one that goes on from the last checkpoint that is remembered outside the database."""

from kms.domain.checkpoint import Checkpoint
from kms.domain.errors import KmsError, Reason


class HistoryError(KmsError):
    """The trail in the database does not go on from the checkpoint that is remembered, so nothing of it is signed.

    `expected` stays the same while the refusal lasts; `found` may change.
    """

    def __init__(self, expected: str, found: str) -> None:
        super().__init__(
            Reason.STORE_UNAVAILABLE,
            f"another history of the trail is not signed: expected {expected}, found {found}. Somebody has changed the "
            "database or the file of checkpoints, or the database was restored without a new epoch",
        )
        self.expected = expected
        self.found = found

    def __reduce__(self) -> tuple[object, ...]:
        return HistoryError, (self.expected, self.found)


def is_same_history(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two checkpoints speak of the same rows in the same epoch. Two machines may have signed them at two moments."""
    return (one.origin, one.tree_size, one.root_hash, one.epoch) == (other.origin, other.tree_size, other.root_hash, other.epoch)


def described(checkpoint: Checkpoint | None) -> str:
    """Return the checkpoint in words."""
    if checkpoint is None:
        return "no checkpoint"
    return f"the checkpoint of {checkpoint.tree_size} rows in epoch {checkpoint.epoch} with the root {checkpoint.root_hash.hex()}"
