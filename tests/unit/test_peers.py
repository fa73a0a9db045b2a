"""The addresses of peers, from what grpc says of them."""

from ipaddress import ip_address

import pytest

from kms.rpc.peers import peer_of_call


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:192.0.2.1:5000", "192.0.2.1"),
        ("ipv6:%5B2001:db8::1%5D:5000", "2001:db8::1"),
        ("ipv6:[::1]:5000", "::1"),
        ("ipv6:%5Bfe80::77%251%5D:42144", "fe80::77"),
        ("ipv6:[fe80::77%eth0]:42144", "fe80::77"),
    ],
)
def test_the_address_of_a_peer_is_one_that_can_be_recorded(peer: str, address: str) -> None:
    assert peer_of_call(peer).address == address
    assert getattr(ip_address(address), "scope_id", None) is None


@pytest.mark.parametrize("peer", ["", "unix:", "unix:/run/kms.sock", "unix-abstract:kms", "inproc"])
def test_who_has_no_address_is_recorded_without_one(peer: str) -> None:
    assert peer_of_call(peer).address == ""
