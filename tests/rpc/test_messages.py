"""Which call is refused when too many wait for their messages."""

import asyncio
from typing import Any, cast

import pytest

from kms.domain.errors import KmsError, Reason
from kms.rpc.messages import MessageReader


class Call:
    """As much of a servicer's context as a reader uses."""

    def __init__(self) -> None:
        self.message = asyncio.get_running_loop().create_future()

    async def read(self) -> Any:  # noqa: ANN401 - bytes, or what grpc says at the end
        return await self.message


async def test_the_call_that_has_waited_longest_makes_room_for_a_new_one() -> None:
    reader = MessageReader(60, waiting_max=2)
    calls = [Call() for _ in range(4)]
    async with asyncio.timeout(30):
        waiting = [asyncio.create_task(reader.read(cast(Any, call))) for call in calls]
        for refused in waiting[:2]:
            with pytest.raises(KmsError) as caught:
                await refused
            assert caught.value.reason is Reason.RATE_LIMITED
        for call in calls[2:]:
            call.message.set_result(b"message")
        assert [await read for read in waiting[2:]] == [b"message", b"message"]


async def test_calls_whose_messages_came_make_no_other_wait_for_room() -> None:
    reader = MessageReader(60, waiting_max=1)
    async with asyncio.timeout(30):
        for number in range(5):
            call = Call()
            call.message.set_result(b"%d" % number)
            assert await reader.read(cast(Any, call)) == b"%d" % number
