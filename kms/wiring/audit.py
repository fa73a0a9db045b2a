"""What seals the trail in `kms serve`, and what the `kms audit` commands do."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import IO

import structlog

from kms.app.history import SeenCheckpoint
from kms.app.keyring import Keyring
from kms.app.ports import Hsm
from kms.app.records import Records
from kms.app.sealing import ALGORITHM, Sealing
from kms.app.sealing_key import AUDIT, KEY_NAME, USER_NAME, SealingKeys, origin_of, reader_of
from kms.app.verifying import VerifyTrail, exported, verify_lines
from kms.config import AuditConfig, Config
from kms.domain.checkpoint import VerifierKey, parse_verifier_key
from kms.domain.errors import KmsError, Reason
from kms.domain.trail_check import NoteReader, TrailReport
from kms.hsm.uninterrupted import uninterrupted
from kms.pki.client_identity import host_clock
from kms.pki.public_keys import PublicKeyOperations
from kms.store.backup_file import new_private_file
from kms.store.checkpoint_file import CheckpointFile, finished_lines, has_lines
from kms.store.history_events import StoredHistoryEvents
from kms.store.key_histories import key_histories
from kms.store.key_table import StoredKeyTable
from kms.store.keys import StoredKeys
from kms.store.pool import Pool, connection_settings
from kms.store.sealed_trail import StoredSealedTrail
from kms.store.sealer import HistoryWatch, Sealer
from kms.store.users import StoredUsers
from kms.wiring.parts import token_records, with_pool

_LOG = structlog.get_logger("kms")


def audit_key(config: Config) -> VerifierKey:
    """Return the key with which checkpoints are verified. Raises KEY_NOT_FOUND where none was ever made."""
    with token_records(config) as records:
        return asyncio.run(with_pool(config, lambda pool: trail_reader(config, pool, records))).key


def export_trail(config: Config, file: Path, after_size: int) -> int:
    """Write the trail behind the newest checkpoint with at most *after_size* rows, and the keys; return how many lines.

    Raises OSError.
    """
    with new_private_file(file) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as content:

        async def write(pool: Pool) -> int:
            return await _write(exported(StoredSealedTrail(pool), after_size, StoredKeyTable(pool)), content)

        return asyncio.run(with_pool(config, write))


def verify_file(file: Path, key: str, checkpoints: Path | None) -> TrailReport:
    """Verify an exported trail with a verifier key alone. Raises OSError, MALFORMED for what is no verifier key."""
    reader = NoteReader(parse_verifier_key(key), _is_valid)
    with file.open("rb"), (checkpoints or file).open("rb"):
        pass  # what is missing is told before anything is read
    outside = tuple if checkpoints is None else partial(finished_lines, checkpoints)
    with key_histories() as histories:
        return verify_lines(reader, partial(finished_lines, file), outside, histories)


def trail_sealer(
    config: Config, dsn: str, pool: Pool, records: Records, hsm: Hsm, watch: HistoryWatch, progressed: Callable[[], None]
) -> Sealer | None:
    """Return what signs the trail, or follows who does. None: without a file of checkpoints nobody signs.

    Raises STORE_UNAVAILABLE for a file that cannot be written.
    """
    settings = config.audit or AuditConfig()
    if settings.checkpoints is None:
        return None
    file = CheckpointFile(settings.checkpoints)
    file.check()
    keys, seen = StoredKeys(pool, records), SeenCheckpoint()
    keyring, owner = Keyring(keys, hsm, uninterrupted), StoredUsers(pool).find_or_create_service
    found = SealingKeys(keys, keyring, owner, _is_valid, origin_of(config.deployment_id))

    async def make() -> Sealing:
        # A file that was removed while we run is an empty memory: what this process has seen is held against the database.
        if has_lines(file.path) and not await found.is_made():
            # Another key would sign another trail, and each that is made stays in the token.
            raise KmsError(
                Reason.KEY_NOT_FOUND, f"the key that has signed the checkpoints in {file.path} is gone: restore its row"
            )
        key = await found.find_or_make()
        return Sealing(StoredSealedTrail(pool, records), hsm, key, file, StoredHistoryEvents(pool), host_clock, seen)

    async def make_and_tell() -> Sealing:
        made = await make()
        _LOG.info("checkpoints are signed", key=str(made.key.reader.key))
        return made

    async def make_if_there_is_a_key() -> Sealing | None:
        return await make() if await found.is_made() else None

    connection = connection_settings(dsn)
    return Sealer(connection, make_and_tell, make_if_there_is_a_key, settings.seal_seconds, watch, progressed)


def seal_seconds(config: Config) -> float:
    """Return how often the trail is signed; infinity where nobody signs it, which is a warning of its own."""
    settings = config.audit or AuditConfig()
    return float("inf") if settings.checkpoints is None else settings.seal_seconds


def verifying(config: Config, pool: Pool, records: Records) -> Callable[[], Awaitable[VerifyTrail]]:
    """Return what makes a `VerifyTrail`. Raises KEY_NOT_FOUND where no checkpoint was ever made."""

    async def make() -> VerifyTrail:
        return VerifyTrail(StoredSealedTrail(pool), await trail_reader(config, pool, records), StoredKeyTable(pool))

    return make


async def trail_reader(config: Config, pool: Pool, records: Records) -> NoteReader:
    """Return what reads this deployment's checkpoints. Raises KEY_NOT_FOUND where none was ever made."""
    owner = await StoredUsers(pool).find_service(USER_NAME)
    key = None if owner is None else await StoredKeys(pool, records).find(owner, KEY_NAME)
    # By its record alone: the name of its user is the database's to say, and anybody may call a key of theirs so.
    if key is None or key.identity.bound_to != AUDIT:
        raise KmsError(Reason.KEY_NOT_FOUND, "there is no key for checkpoints yet: `kms serve` makes it at its first start")
    return reader_of(key, _is_valid, origin_of(config.deployment_id))


async def _write(lines: AsyncIterator[str], file: IO[str]) -> int:
    written = 0
    async for line in lines:
        file.write(line + "\n")
        written += 1
    return written


def _is_valid(pem: str, signed: bytes, signature: bytes) -> bool:
    return PublicKeyOperations().is_valid(pem, ALGORITHM, signed, signature)
