"""A worker's side of leased work: claim what is due, do it while the lease is extended, record how it ended.

work returns a result    ──►  completed
work raises KmsError     ──►  failed attempt: due again after the back-off
work raises a bug        ──►  the same, with the traceback in the log
the lease is lost        ──►  the work is cancelled, nothing is recorded
the worker is cancelled  ──►  released: another worker goes on at once
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Final, TypeAlias
from uuid import UUID, uuid4

import structlog

from kms.domain.errors import INTERNAL, KmsError, Reason
from kms.jobs.leases import Claim, LeasedItems, LeaseLostError, LeasePolicy

_MESSAGE_CHARACTERS_MAX: Final = 500
_LOG = structlog.get_logger("kms")


@dataclass(slots=True, eq=False)
class Lease:
    """What the work of an item uses to read and record its steps. `claim` changes with each finished step."""

    items: LeasedItems
    worker: UUID
    policy: LeasePolicy
    claim: Claim

    async def finish_step(self, step: str, state: Mapping[str, object]) -> None:
        """Record that *step* has been finished. Raises LeaseLostError and STORE_UNAVAILABLE."""
        await self.items.finish_step(self.worker, self.claim, step, state, self.policy)
        self.claim = replace(self.claim, step=step, step_state=dict(state), attempts=1)


LeasedWork: TypeAlias = Callable[[Lease], Awaitable[Mapping[str, object]]]
"""Work of one item: goes on behind `lease.claim.step` and returns the result. Its steps must bear being done twice."""


@dataclass(frozen=True, slots=True)
class LeasedWorker:
    """Does leased work of one kind, one item at a time. Each worker has an id of its own; `now` and `sleep` are its clock.

    An item whose work is refused for one of `final_reasons` has failed: no later attempt would change that.
    """

    items: LeasedItems
    work: LeasedWork
    policy: LeasePolicy
    worker: UUID = field(default_factory=uuid4)
    final_reasons: frozenset[Reason] = frozenset()
    now: Callable[[], float] = monotonic
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep
    _running: set["asyncio.Task[None]"] = field(default_factory=set, repr=False)

    async def do_due(self) -> int:
        """Do items until none is due, and return how many. The work of a `Job`. Raises STORE_UNAVAILABLE."""
        done = 0
        while claims := await self.items.claim(self.worker, 1, self.policy):
            for claim in claims:
                await self._do(Lease(self.items, self.worker, self.policy, claim))
                done += 1
        return done

    async def do_item(self, item_id: UUID) -> None:
        """Do one item if it is due. Raises STORE_UNAVAILABLE.

        If the caller is cancelled the work goes on: a claim that nobody works on would hold the item up until its lease runs out.
        """
        task = asyncio.create_task(self._do_item(item_id))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        await asyncio.shield(task)

    async def close(self) -> None:
        """Give back what `do_item` still works on."""
        running = list(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def _do_item(self, item_id: UUID) -> None:
        for claim in await self.items.claim(self.worker, 1, self.policy, item_id=item_id):
            await self._do(Lease(self.items, self.worker, self.policy, claim))

    async def _do(self, lease: Lease) -> None:
        item = str(lease.claim.item_id)
        try:
            await self._do_while_held(lease)
        except LeaseLostError:
            _LOG.warning("lease lost", item=item, claim=lease.claim.number)
        except asyncio.CancelledError:
            await self._release(lease)
            raise

    async def _do_while_held(self, lease: Lease) -> None:
        """Do the work and record its end. Raises LeaseLostError."""
        working = asyncio.ensure_future(self.work(lease))
        extending = asyncio.create_task(self._keep_extending(lease))
        try:
            await asyncio.wait({working, extending}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                extending.result()  # raises: it ends by an error alone
            await self._record(lease, working)
        finally:
            working.cancel()
            extending.cancel()
            await asyncio.gather(working, extending, return_exceptions=True)

    async def _record(self, lease: Lease, working: "asyncio.Future[Mapping[str, object]]") -> None:
        claim, item, attempts_max = lease.claim, str(lease.claim.item_id), self.policy.attempts_max
        try:
            result = working.result()
        except LeaseLostError:
            raise
        except KmsError as error:
            message = f"{error.reason}: {error.message}"
            attempts_max = 0 if error.reason in self.final_reasons else attempts_max
            _LOG.warning("attempt failed", item=item, attempts=claim.attempts, reason=error.reason, message=error.message)
        except (Exception, asyncio.CancelledError):  # noqa: BLE001  # a bug in one item must not end the others
            message = INTERNAL
            _LOG.exception("bug", item=item, attempts=claim.attempts)
        else:
            await self.items.complete(self.worker, claim, result)
            return
        retry_seconds = self.policy.backoff_seconds(claim.attempts)
        await self.items.fail(self.worker, claim, message[:_MESSAGE_CHARACTERS_MAX], retry_seconds, attempts_max)

    async def _keep_extending(self, lease: Lease) -> None:
        """Extend the lease until it is lost: another worker has it, or it has run out while the database did not answer."""
        held_until = self.now() + self.policy.lease_seconds
        while True:
            await self.sleep(self.policy.extension_seconds)
            asked_at = self.now()
            try:
                await self.items.extend(self.worker, lease.claim, self.policy)
                held_until = asked_at + self.policy.lease_seconds
            except LeaseLostError:
                raise
            except KmsError as error:
                _LOG.warning("lease not extended", item=str(lease.claim.item_id), reason=error.reason)
                if self.now() >= held_until:
                    raise LeaseLostError from error

    async def _release(self, lease: Lease) -> None:
        try:
            await self.items.release(self.worker, lease.claim)
        except KmsError as error:  # its lease runs out by itself
            _LOG.warning("lease not released", item=str(lease.claim.item_id), reason=error.reason)
