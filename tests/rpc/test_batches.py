"""Batches whose time is up end at once, whatever their items were doing, and say what is not known of them."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import NoReturn

import pytest

from kms.app.uses import Draft, Turn
from kms.domain.errors import KmsError, Reason, malformed
from kms.rpc.batches import answer_each


async def given_up(answer: Callable[[str, Turn], Awaitable[str]], items: str, *, is_charged: bool = True) -> BaseException | None:
    """Return what a batch that is cancelled after a moment ends with, within a second."""
    work = answer_each(items, answer, lambda **item: item, lambda reason: None, is_charged=is_charged)
    task = asyncio.create_task(work)
    await asyncio.sleep(0.05)
    task.cancel()
    await asyncio.wait({task}, timeout=1)
    assert task.done()
    return asyncio.CancelledError() if task.cancelled() else task.exception()


async def never() -> NoReturn:
    await asyncio.Event().wait()
    raise AssertionError


async def answer(item: str, turn: Turn) -> str:
    """Do what *item* says: slow in its draft, bad at once, done at once, or in doubt once it is given up."""
    if item == "s":
        await turn.draft(never)
    if item == "b":
        raise malformed("key", "expected one")
    if item == "?":
        try:
            await never()
        except asyncio.CancelledError:
            raise KmsError(Reason.OUTCOME_UNKNOWN, "who knows") from None
    await turn.draft(drafted)
    return item


async def drafted() -> Draft[None]:
    return Draft(None, None)


@pytest.mark.parametrize("items", ["sb", "sbs", "bsbs", "sb" * 20, "bbss"])
async def test_a_batch_that_is_given_up_ends_though_refused_items_wait_for_their_turn(items: str) -> None:
    assert isinstance(await given_up(answer, items), asyncio.CancelledError)


@pytest.mark.parametrize(
    ("items", "is_charged", "is_in_doubt"),
    [("ds", True, True), ("ds", False, False), ("?s", True, True), ("?s", False, False), ("bs", True, False)],
)
async def test_a_batch_that_is_given_up_is_in_doubt_where_items_may_be_charged(
    items: str, is_charged: bool, is_in_doubt: bool
) -> None:
    found = await given_up(answer, items, is_charged=is_charged)
    if is_in_doubt:
        assert isinstance(found, KmsError)
        assert found.reason is Reason.OUTCOME_UNKNOWN
    else:
        assert isinstance(found, asyncio.CancelledError)
