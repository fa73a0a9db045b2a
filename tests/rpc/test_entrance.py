"""Who loses a connection for wasting calls."""

from uuid import UUID

from kms.domain.ids import UserId
from kms.rpc.entrance import WASTED_MAX, WASTED_PER_SECOND, Waste
from kms.rpc.peers import Peer

ALICE, BOB = UserId(UUID(int=1)), UserId(UUID(int=2))
HERE, THERE = Peer("192.0.2.1", 1), Peer("192.0.2.1", 2)


def test_a_user_who_wastes_too_many_calls_loses_the_connection_and_another_does_not() -> None:
    closed: list[Peer] = []
    waste = Waste(closed.append, clock=lambda: 0.0)
    for _ in range(WASTED_MAX):
        waste.note(HERE, ALICE)
        waste.note(THERE, BOB)
    assert closed == []
    waste.note(HERE, ALICE)
    assert closed == [HERE]


def test_wasted_calls_are_forgotten_with_time() -> None:
    closed: list[Peer] = []
    now = 0.0
    waste = Waste(closed.append, clock=lambda: now)
    for _ in range(WASTED_MAX):
        waste.note(HERE, ALICE)
    now = 2.0
    for _ in range(round(2 * WASTED_PER_SECOND)):
        waste.note(HERE, ALICE)
    assert closed == []
    waste.note(HERE, ALICE)
    assert closed == [HERE]


def test_callers_without_a_good_name_are_counted_by_address() -> None:
    closed: list[Peer] = []
    waste = Waste(closed.append, clock=lambda: 0.0)
    for peer in [HERE, THERE] * (WASTED_MAX // 2) + [THERE]:
        waste.note(peer, None)
    waste.note(Peer("192.0.2.2", 1), None)
    assert closed == [THERE]
