"""What the `kms kek` commands do: master keys are made, retired and destroyed where the token's PIN is, and nowhere else."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, TypeVar

from kms.config import Config
from kms.domain.errors import KmsError, Reason
from kms.hsm import provision
from kms.hsm.provision import TokenDescription
from kms.store.wrapping import StoredWrappingKeys, WrappingKey
from kms.wiring.parts import hsm_settings, with_pool
from kms.wiring.token import lacking, needs_copy, token_keys

T = TypeVar("T")
_EXAMPLES: Final = 5


@dataclass(frozen=True, slots=True)
class Generation:
    """A generation of KEK and sealing key. `state` is in_use, waiting (for a confirmed copy), old, retired or destroyed.

    `envelopes` name a key of it; `moved` have left it, `moved_sealed` of them through the host. `not_opened` were left where they
    are.
    """

    number: int
    state: str
    created_at: datetime | None
    backup_confirmed_at: datetime | None
    envelopes: int
    moved: int
    moved_sealed: int
    not_opened: int
    last_moved_at: datetime | None
    error_message: str

    @property
    def left(self) -> int:
        """How many envelopes have to leave it."""
        return self.envelopes if self.state in ("old", "retired") else 0


@dataclass(frozen=True, slots=True)
class Ending:
    """What the end of a generation means. Backups from before `last_left_at` need its keys; none from after `retired_at` does."""

    generation: int
    last_left_at: datetime | None
    retired_at: datetime


def rotate(config: Config) -> int:
    """Make the next generation in the token and register it; return its number.

    One that an interrupted run made is registered instead. Raises HSM_KEK_MISSING for a token that is not this database's, and
    for one that lacks a generation: it would get another key by the number of one that there is.
    """
    settings = hsm_settings(config)
    held = provision.describe(settings)
    known = _with_keys(config, lambda known: _registered(known, held))
    lacks = lacking(known, held.wrapping_keys, held.retired)
    if lacks:
        raise KmsError(
            Reason.HSM_KEK_MISSING,
            f"the token lacks generation {', '.join(map(str, lacks))}: bring the copy of the token that has it here first",
        )
    before = {key.generation for key in known}
    if before and max(held.generations, default=0) not in before:
        return max(held.generations)
    made = provision.rotate(settings)
    _with_keys(config, lambda known: _registered(known, made))
    return max(made.generations)


def generations(config: Config) -> list[Generation]:
    """Return every generation that the token holds or the database knows, the oldest first."""
    held = provision.describe(hsm_settings(config))
    return _with_keys(config, lambda known: _generations(known, held, is_copied=not needs_copy(config)))


def watch(config: Config, show: Callable[[Sequence[Generation]], None], *, pause_seconds: float) -> None:
    """Show every generation again and again, until none waits for its copy and no envelope is left to be moved that opens."""
    held = provision.describe(hsm_settings(config))

    async def watched(known: StoredWrappingKeys) -> None:
        while True:
            found = await _generations(known, held, is_copied=not needs_copy(config))
            show(found)
            if all(one.left <= one.not_opened and one.state != "waiting" for one in found):
                return
            await asyncio.sleep(pause_seconds)

    _with_keys(config, watched)


def retire(config: Config, number: int) -> None:
    """Have nothing be made under a generation any more.

    Raises KEK_IN_USE while an envelope names it, and unless a later generation makes new envelopes.
    """
    settings = hsm_settings(config)
    held = provision.describe(settings)
    if number not in (*held.generations, *held.retired):
        raise KmsError(Reason.KEK_IN_USE, f"the token holds no generation {number}")
    _with_keys(config, lambda known: _retire(known, held, number, is_copied=not needs_copy(config)))
    provision.retire(settings, number)


def destroy(config: Config, number: int, ask: Callable[[Ending], None]) -> None:
    """Remove the keys of a retired generation from the token, for ever, unless *ask* raises.

    Raises KEK_IN_USE unless it is retired, while an envelope names it, and while one names no known key.
    """
    settings = hsm_settings(config)
    held = provision.describe(settings)
    if number not in held.retired:
        raise KmsError(Reason.KEK_IN_USE, f"generation {number} is not retired: run `kms kek retire {number}` first")
    ask(_with_keys(config, lambda known: _ending(known, held, number)))
    # Somebody may have thought about it for long.
    _with_keys(config, lambda known: _ending(known, held, number))
    provision.destroy(settings, number)
    _with_keys(config, lambda known: known.note_destroyed(number))


def _with_keys(config: Config, work: Callable[[StoredWrappingKeys], Awaitable[T]]) -> T:
    return asyncio.run(with_pool(config, lambda pool: work(StoredWrappingKeys(pool))))


async def _registered(known: StoredWrappingKeys, held: TokenDescription) -> list[WrappingKey]:
    """Register what the token holds; return what was registered before."""
    before = list(await known.read())
    await known.register(token_keys(held.wrapping_keys), held.serial)
    return before


async def _retire(known: StoredWrappingKeys, held: TokenDescription, number: int, *, is_copied: bool) -> None:
    later = [one for one in await _generations(known, held, is_copied=is_copied) if one.number > number]
    if not any(one.state == "in_use" for one in later):
        raise KmsError(
            Reason.KEK_IN_USE,
            f"generation {number} makes new envelopes: run `kms kek rotate`, and in production confirm a copy of the token",
        )
    await _refuse_if_used(known, held, number)


async def _refuse_if_used(known: StoredWrappingKeys, held: TokenDescription, number: int) -> None:
    used = await known.retire(number, [key.key_id for key in held.wrapping_keys if key.generation == number])
    if used:
        raise KmsError(
            Reason.KEK_IN_USE, f"{used} keys are kept under generation {number}: wait until `kms kek list` says that none is left"
        )


async def _ending(known: StoredWrappingKeys, held: TokenDescription, number: int) -> Ending:
    # After a restore there are rows again.
    await _refuse_if_used(known, held, number)
    registered = await known.read()
    ids = {key.key_id for key in registered} | {key.key_id for key in held.wrapping_keys}
    damaged = [one for one in await known.envelopes() if one.is_damaged(ids)]
    if damaged:
        raise KmsError(
            Reason.KEK_IN_USE,
            f"the envelopes of {sum(one.envelopes for one in damaged)} keys name no known master key, and what repairs them may "
            f"need generation {number}. Restore or destroy them: {', '.join(str(one.example) for one in damaged[:_EXAMPLES])}",
        )
    keys = [key for key in registered if key.generation == number]
    progress = await known.progress()
    left = [progress[key.key_id].last_moved_at for key in keys if key.key_id in progress]
    retired = [key.retired_at for key in keys if key.retired_at is not None]
    if not retired:
        raise KmsError(Reason.KEK_IN_USE, f"the database knows no generation {number} that is retired")
    return Ending(number, max((moment for moment in left if moment is not None), default=None), max(retired))


async def _generations(known: StoredWrappingKeys, held: TokenDescription, *, is_copied: bool) -> list[Generation]:
    keys, envelopes, progress = await known.read(), await known.envelopes(), await known.progress()
    copied = {
        number
        for number in {key.generation for key in keys}
        if is_copied or all(key.backup_confirmed_at is not None for key in keys if key.generation == number)
    }
    makers = [number for number in held.generations if number not in held.retired]
    current = max((number for number in makers if number in copied), default=0)
    found = []
    for number in sorted({*held.generations, *held.retired, *(key.generation for key in keys)}):
        own = [key for key in keys if key.generation == number]
        sealing = next((key for key in own if key.kind == "sealing"), None)
        moved = progress.get(sealing.key_id) if sealing is not None else None
        found.append(
            Generation(
                number=number,
                state=_state(number, held, current),
                created_at=min((key.created_at for key in own), default=None),
                backup_confirmed_at=min((key.backup_confirmed_at for key in own if key.backup_confirmed_at), default=None),
                envelopes=sum(one.envelopes for one in envelopes if one.is_of({key.key_id for key in own})),
                moved=moved.moved if moved else 0,
                moved_sealed=moved.moved_sealed if moved else 0,
                not_opened=moved.not_opened if moved else 0,
                last_moved_at=moved.last_moved_at if moved else None,
                error_message=moved.error_message if moved else "",
            )
        )
    return found


def _state(number: int, held: TokenDescription, current: int) -> str:
    if number not in held.generations:
        return "destroyed" if number in held.retired else "missing"
    if number in held.retired:
        return "retired"
    if number == current:
        return "in_use"
    return "waiting" if number > current else "old"
