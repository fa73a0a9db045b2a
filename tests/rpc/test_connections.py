"""Which connections are closed: decided from what was called on them, without any socket."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from uuid import UUID

import pytest

from kms.domain.errors import KmsError, Reason
from kms.domain.ids import UserId
from kms.rpc.connections import ConnectionLimits, Connections
from kms.rpc.peers import Peer, peer_of_call, peer_of_socket

ALICE, BOB = UserId(UUID(int=1)), UserId(UUID(int=2))


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def of(port: int, address: str = "192.0.2.1") -> Peer:
    return Peer(address, port)


def connections(*, total: int = 100, user: int = 100, address: int = 100, calls: int = 100) -> Connections:
    return Connections(ConnectionLimits(total, user, address, calls), Clock())


def opened(known: Connections, *peers: Peer) -> list[Peer]:
    """Let *peers* connect one after the other, and return what is to be closed when all are there."""
    for number in range(1, len(peers)):
        known.to_close(peers[:number])
    return known.to_close(peers)


@contextmanager
def call(known: Connections, peer: Peer, user: UserId = ALICE) -> Iterator[None]:
    with known.calling(peer, user):
        yield


def called(known: Connections, peer: Peer, user: UserId = ALICE) -> None:
    with call(known, peer, user):
        pass


def test_nothing_is_closed_below_the_limits() -> None:
    assert opened(connections(total=3, user=3, address=3), of(1), of(2), of(3)) == []


def test_over_the_limit_of_all_who_never_called_goes_first_and_the_oldest_of_them() -> None:
    known = connections(total=2)
    opened(known, of(1))
    called(known, of(1))
    opened(known, of(1), of(2))
    assert opened(known, of(1), of(2), of(3), of(4)) == [of(2), of(3)]


def test_of_those_who_called_the_one_that_is_idle_longest_goes_first() -> None:
    known = connections(total=2)
    opened(known, of(1), of(2))
    called(known, of(2))
    called(known, of(1))
    called(known, of(3))
    assert known.to_close([of(1), of(2), of(3)]) == [of(2)]


def test_a_connection_with_a_call_in_flight_stays_even_over_the_limits() -> None:
    known = connections(total=1, address=1)
    with call(known, of(1)), call(known, of(2)):
        assert known.to_close([of(1), of(2), of(3)]) == [of(3)]
    assert known.to_close([of(1), of(2)]) == [of(2)]  # its call ended first


def test_an_address_over_its_limit_loses_its_own_connections_only() -> None:
    known = connections(address=2)
    assert opened(known, of(1), of(1, "192.0.2.2"), of(2), of(3), of(4)) == [of(1), of(2)]


def test_a_user_over_the_limit_loses_the_connection_that_is_idle_longest() -> None:
    known = connections(user=2)
    for port in (1, 2):
        called(known, of(port))
    called(known, of(1))
    called(known, of(3), BOB)
    called(known, of(4))
    assert known.to_close([of(1), of(2), of(3), of(4)]) == [of(2)]


def test_a_user_whose_connections_are_all_busy_is_refused_on_another() -> None:
    known = connections(user=2)
    with ExitStack() as stack:
        for port in (1, 2):
            stack.enter_context(call(known, of(port)))
        with pytest.raises(KmsError) as caught, call(known, of(3)):
            pass
        assert caught.value.reason is Reason.RATE_LIMITED
        stack.enter_context(call(known, of(3), BOB))
    called(known, of(3))


def test_a_connection_has_so_many_calls_in_flight() -> None:
    known = connections(calls=1)
    with call(known, of(1)):
        with pytest.raises(KmsError) as caught, call(known, of(1)):
            pass
        assert caught.value.reason is Reason.RATE_LIMITED
        called(known, of(2))
    called(known, of(1))


def test_a_superseded_connection_that_calls_before_it_is_closed_takes_the_place_of_another() -> None:
    known = connections(user=1)
    called(known, of(1))
    called(known, of(2))
    called(known, of(1))
    assert known.to_close([of(1), of(2)]) == [of(2)]


def test_connections_that_ended_count_no_longer() -> None:
    known = connections(total=2, user=2, address=2)
    for port in (1, 2):
        called(known, of(port))
    assert known.to_close([of(2)]) == []
    called(known, of(3))
    assert known.to_close([of(2), of(3)]) == []


@pytest.mark.parametrize(
    ("said_by_grpc", "said_by_the_socket"),
    [
        ("ipv4:192.0.2.1:5000", ("192.0.2.1", 5000)),
        ("ipv4:192.0.2.1:5000", ("::ffff:192.0.2.1", 5000, 0, 0)),
        ("ipv6:%5B2001:db8::1%5D:5000", ("2001:db8::1", 5000, 0, 0)),
        ("ipv6:%5Bfe80::77%251%5D:42144", ("fe80::77%eth0", 42144, 0, 2)),
    ],
)
def test_a_call_and_a_socket_name_the_same_peer(
    said_by_grpc: str, said_by_the_socket: tuple[str, int] | tuple[str, int, int, int]
) -> None:
    assert peer_of_call(said_by_grpc) == peer_of_socket(said_by_the_socket)
