"""The tree: as RFC 6962 section 2.1 defines it, written down here once more as the definition is."""

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kms.domain.merkle import Frontier, leaf_hash


def defined(leaves: list[bytes]) -> bytes:
    """MTH of RFC 6962: split at the largest power of two that is smaller than the number of leaves."""
    if not leaves:
        return sha256(b"").digest()
    if len(leaves) == 1:
        return sha256(b"\x00" + leaves[0]).digest()
    half = 1 << (len(leaves) - 1).bit_length() - 1
    return sha256(b"\x01" + defined(leaves[:half]) + defined(leaves[half:])).digest()


@pytest.mark.parametrize("size", [*range(18), 31, 32, 33, 255, 257])
def test_the_root_is_that_of_the_definition(size: int) -> None:
    leaves = [str(number).encode() for number in range(size)]
    assert Frontier().extended(map(leaf_hash, leaves)).root() == defined(leaves)


def test_the_roots_of_the_formats_page() -> None:
    tree = Frontier()
    assert tree.root().hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    tree = tree.extended([leaf_hash(b"")])
    assert tree.root().hex() == "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d"
    tree = tree.extended([leaf_hash(b"\x00")])
    assert tree.root().hex() == "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"


@given(st.lists(st.binary(max_size=8), max_size=70), st.integers(0, 70))
def test_a_tree_goes_on_from_its_frontier_as_if_it_had_never_stopped(leaves: list[bytes], cut: int) -> None:
    first = Frontier().extended(map(leaf_hash, leaves[:cut]))
    again = Frontier(first.size, first.hashes)
    assert again.extended(map(leaf_hash, leaves[cut:])).root() == defined(leaves)


@pytest.mark.parametrize(("size", "hashes"), [(1, ()), (2, (b"a" * 32, b"b" * 32)), (1, (b"short",)), (-1, ())])
def test_a_frontier_that_is_none_is_refused(size: int, hashes: tuple[bytes, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Frontier(size, hashes)
