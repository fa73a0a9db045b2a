"""Who is shut out for wasting calls, and for how long."""

from uuid import UUID

from kms.domain.ids import UserId
from kms.rpc.entrance import SHUT_OUT_SECONDS, WASTED_MAX, WASTED_PER_SECOND, Waste

ALICE, BOB = UserId(UUID(int=1)), UserId(UUID(int=2))


def test_who_wastes_too_many_calls_is_shut_out_and_another_is_not() -> None:
    waste = Waste(clock=lambda: 0.0)
    for _ in range(WASTED_MAX):
        for who in (ALICE, BOB, "192.0.2.1"):
            assert not waste.note(who)
    assert not waste.is_shut_out(ALICE)
    assert waste.note(ALICE)
    assert waste.is_shut_out(ALICE)
    assert waste.note("192.0.2.1")
    assert waste.is_shut_out("192.0.2.1")
    assert not waste.is_shut_out(BOB)
    assert not waste.is_shut_out("192.0.2.2")


def test_wasted_calls_are_forgotten_with_time() -> None:
    now = 0.0
    waste = Waste(clock=lambda: now)
    for _ in range(WASTED_MAX):
        waste.note(ALICE)
    now = 2.0
    for _ in range(round(2 * WASTED_PER_SECOND)):
        assert not waste.note(ALICE)
    assert waste.note(ALICE)


def test_who_was_shut_out_comes_in_again_after_a_while_however_often_they_tried() -> None:
    now = 0.0
    waste = Waste(clock=lambda: now)
    for _ in range(WASTED_MAX + 1):
        waste.note(ALICE)
    for _ in range(10 * WASTED_MAX):
        assert not waste.note(ALICE), "once is enough"
    now = SHUT_OUT_SECONDS - 0.5
    assert waste.is_shut_out(ALICE)
    now = SHUT_OUT_SECONDS
    assert not waste.is_shut_out(ALICE)
    for _ in range(WASTED_MAX):
        assert not waste.note(ALICE)
    assert waste.note(ALICE)
    assert waste.is_shut_out(ALICE)
