"""Which generation of KEK and sealing key makes new envelopes.

The token says which generations there are, and which are retired. The database says which of them are registered, and of which a
tested copy is confirmed. So whoever owns the database chooses, at worst, among generations that the token holds and that are not
retired.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import structlog

from kms.hsm.token_hsm import TokenHsm, WrappingKeys
from kms.jobs.job import Job
from kms.store.wrapping import StoredWrappingKeys, WrappingKey

MASTER_KEYS: Final = "master_keys"
# How long workers may disagree. Each opens what another makes: it looks at the token when an envelope names a key that is new.
_INTERVAL_SECONDS: Final = 5.0
_WARNS_AFTER_SECONDS: Final = 300.0
_LOG = structlog.get_logger("kms")


def choose_maker(token: WrappingKeys, known: Sequence[WrappingKey], *, needs_copy: bool) -> int | None:
    """Return the newest generation that makes new envelopes, or None if there is none.

    It is held by the token, not retired, and known to the database; with *needs_copy* a copy of it is confirmed, since losing the
    token would lose every key under it.
    """
    fit = {key.key_id for key in known if key.backup_confirmed_at is not None or not needs_copy}
    fitting = [
        generation for generation in token.makers if all(key.key_id in fit for key in token.keys if key.generation == generation)
    ]
    return max(fitting, default=None)


@dataclass(frozen=True, slots=True)
class MasterKeys:
    """Follows what the token and the database say, while the service runs."""

    hsm: TokenHsm
    known: StoredWrappingKeys
    needs_copy: bool

    async def follow(self) -> None:
        """Look at both, and make new envelopes under the newest generation. Raises HSM_UNAVAILABLE and STORE_UNAVAILABLE."""
        token = await self.hsm.look_at_keys()
        generation = choose_maker(token, await self.known.read(), needs_copy=self.needs_copy)
        # None: the database forgot them all. What made envelopes until now goes on.
        if generation is not None and generation != token.current:
            await self.hsm.make_under(generation)
            _LOG.info("new envelopes", generation=generation, before=token.current)

    @property
    def warnings(self) -> list[str]:
        """What an operator should do, in sentences: without a confirmed copy a new generation is not used."""
        token = self.hsm.wrapping_keys()
        waiting = [generation for generation in token.makers if self.needs_copy and generation > token.current]
        return [
            f"generation {generation} of the master keys waits for a copy of the token: make one, and run "
            "`kms hsm backup-confirmed` with the copy in the configuration"
            for generation in waiting
        ]

    def job(self) -> Job:
        """Return the job of each worker."""
        return Job(MASTER_KEYS, _INTERVAL_SECONDS, self.follow, warns_after_seconds=_WARNS_AFTER_SECONDS)
