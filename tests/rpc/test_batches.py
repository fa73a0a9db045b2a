"""Batches whose time is up end at once, whatever their items were doing, and say what is not known of them."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import NoReturn

import pytest

from kms.domain.errors import KmsError, Reason, malformed
from kms.keys.crypto.charged import Item
from kms.keys.ledger.settling import PendingResult, Slot
from kms.rpc.batches import run_batch


async def given_up(
    use: Callable[[Item[str], Slot], Awaitable[str]], items: str, *, is_charged: bool = True
) -> BaseException | None:
    """Return what a batch that is cancelled after a moment ends with, within a second."""
    work = run_batch([Item(item) for item in items], use, lambda refusal: None, is_charged=is_charged)
    task = asyncio.create_task(work)
    await asyncio.sleep(0.05)
    task.cancel()
    await asyncio.wait({task}, timeout=1)
    assert task.done()
    return asyncio.CancelledError() if task.cancelled() else task.exception()


async def never() -> NoReturn:
    await asyncio.Event().wait()
    raise AssertionError


async def use(batch_item: Item[str], slot: Slot) -> str:
    """Do what the item says: slow in its computation, bad at once, done at once, or in doubt once it is given up."""
    item = batch_item.request
    if item == "s":
        await slot.compute(never)
    if item == "b":
        raise malformed("key", "expected one")
    if item == "?":
        try:
            await never()
        except asyncio.CancelledError:
            raise KmsError(Reason.OUTCOME_UNKNOWN, "who knows") from None
    await slot.compute(computed)
    return item


async def computed() -> PendingResult[None]:
    return PendingResult(None, None)


@pytest.mark.parametrize("items", ["sb", "sbs", "bsbs", "sb" * 20, "bbss"])
async def test_a_batch_that_is_given_up_ends_though_refused_items_wait_for_their_turn(items: str) -> None:
    assert isinstance(await given_up(use, items), asyncio.CancelledError)


@pytest.mark.parametrize(
    ("items", "is_charged", "is_in_doubt"),
    [("ds", True, True), ("ds", False, False), ("?s", True, True), ("?s", False, False), ("bs", True, False)],
)
async def test_a_batch_that_is_given_up_is_in_doubt_where_items_may_be_charged(
    items: str, is_charged: bool, is_in_doubt: bool
) -> None:
    found = await given_up(use, items, is_charged=is_charged)
    if is_in_doubt:
        assert isinstance(found, KmsError)
        assert found.reason is Reason.OUTCOME_UNKNOWN
    else:
        assert isinstance(found, asyncio.CancelledError)
