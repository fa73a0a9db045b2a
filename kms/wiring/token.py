"""What the `kms hsm` commands do, and the look at the token before it serves."""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import Final, TypeVar

import structlog

from kms.app.records import Records
from kms.app.residents import Reconciliation
from kms.config import Config
from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyId
from kms.domain.residents import Finding
from kms.hsm import probe, provision
from kms.hsm.one_session import one_session
from kms.hsm.token_hsm import TokenHsm
from kms.hsm.wrapping_keys import Kind, WrappingKey
from kms.pki.client_identity import host_clock
from kms.rotation.master_keys import MasterKeys, choose_maker
from kms.store.keys import StoredKeys
from kms.store.pool import Pool
from kms.store.resident_rows import StoredResidentRows
from kms.store.wrapping import Kind as StoredKind
from kms.store.wrapping import StoredWrappingKeys, TokenKey
from kms.store.wrapping import WrappingKey as KnownKey
from kms.wiring.parts import database_dsn, hsm_settings, ready_pool, with_pool

T = TypeVar("T")
_STORED_KINDS: Final[dict[Kind, StoredKind]] = {Kind.KEK: "kek", Kind.SEALING: "sealing"}
_LOG = structlog.get_logger("kms")


def hsm_init(config: Config) -> provision.TokenDescription:
    """Make the KEK, the sealing key and their canary in the token. Raises NAME_TAKEN where it has them already."""
    return provision.init(hsm_settings(config))


def hsm_probe(config: Config) -> probe.Report:
    """Return what the token can do, tried on throw-away keys."""
    return probe.examine(hsm_settings(config))


def check_residents(config: Config) -> dict[KeyId, Finding]:
    """Reconcile the RESIDENT keys of the token with the database, and return what was found before that."""
    return _reconciled(config, lambda reconciliation: reconciliation.run())


def remove_resident(config: Config, key_id: KeyId, ask: Callable[[Finding], None]) -> None:
    """Remove a RESIDENT key from the token for ever, unless *ask* raises; raises as `Reconciliation.check_removable` does."""

    async def remove(reconciliation: Reconciliation) -> None:
        ask(await reconciliation.check_removable(key_id))
        await reconciliation.remove(key_id)

    _reconciled(config, remove)


def _reconciled(config: Config, work: Callable[[Reconciliation], Awaitable[T]]) -> T:
    with one_session(hsm_settings(config)) as token:

        async def reconciled(pool: Pool) -> T:
            rows = StoredResidentRows(pool, StoredKeys(pool, Records(token.mac, host_clock)))
            return await work(Reconciliation(token, rows, token.opens, host_clock))

        return asyncio.run(with_pool(config, reconciled))


def confirm_backup(config: Config) -> None:
    """Open the canaries of the token that is configured, a copy, and record that a tested copy exists."""
    found = provision.check_copy(hsm_settings(config))
    asyncio.run(_confirm_backup(config, found))


async def check_token(config: Config, hsm: TokenHsm, known: StoredWrappingKeys) -> MasterKeys:
    """Record the token's keys, and choose the generation that makes new envelopes. Return what follows it from now on.

    Raises HSM_KEK_MISSING for another token, and HSM_UNAVAILABLE in production for one without a tested copy.
    """
    if not hsm.says_records_have_macs:
        raise KmsError(
            Reason.HSM_UNAVAILABLE,
            "the token does not say that the records of the database have their MACs: run `kms records adopt` once, with a "
            "database that you trust",
        )
    token = hsm.wrapping_keys()
    serials = {key.token_serial for key in await known.read()}
    if serials - {token.token_serial}:
        _LOG.warning("another token serial", seen=token.token_serial, before=sorted(serials - {token.token_serial}))
    await known.register(token_keys(token.keys), token.token_serial)
    registered = await known.read()
    lacks = lacking(registered, token.keys, token.retired)
    if lacks:
        _LOG.warning("the token lacks generations of master keys: bring the copy that has them", generations=lacks)
    generation = choose_maker(token, registered, needs_copy=needs_copy(config))
    if generation is None:
        raise KmsError(
            Reason.HSM_UNAVAILABLE,
            "no tested copy of the token is on record, and losing the token loses every key: copy it, then run "
            "`kms hsm backup-confirmed` with the copy in the configuration",
        )
    await hsm.make_under(generation)
    return MasterKeys(hsm, known, needs_copy(config))


def needs_copy(config: Config) -> bool:
    """Whether a generation makes new envelopes only after a copy of it was confirmed."""
    return config.mode == "production"


async def _confirm_backup(config: Config, found: provision.TokenDescription) -> None:
    async with ready_pool(config, database_dsn(config)) as pool:
        known = StoredWrappingKeys(pool)
        before = await known.read()
        # A copy may have a serial of its own; only where the database knows nothing yet is it written down.
        if not before:
            await known.register(token_keys(found.wrapping_keys), found.serial)
        elif lacking(before, found.wrapping_keys, found.retired):
            raise KmsError(
                Reason.HSM_KEK_MISSING,
                "this is no copy of the token: keys that the database knows are not in it. Copy the token that serves, configure "
                "the copy (hsm.module, hsm.token_label), and run `kms hsm backup-confirmed` again",
            )
        await known.confirm_backup()


def lacking(known: Iterable[KnownKey], held: Iterable[WrappingKey], retired: Collection[int]) -> list[int]:
    """Return the generations that the database knows, and that a token which holds *held* and *retired* should hold and does not.

    What was destroyed, or is retired as the token itself says, may be gone from it.
    """
    ids = {key.key_id for key in held}
    expected = (key for key in known if key.destroyed_at is None and key.generation not in retired)
    return sorted({key.generation for key in expected if key.key_id not in ids})


def token_keys(keys: tuple[WrappingKey, ...]) -> list[TokenKey]:
    """Return keys of the token as the database knows them."""
    return [TokenKey(key.key_id, _STORED_KINDS[key.kind], key.generation) for key in keys]
