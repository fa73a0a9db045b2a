"""ECDSA forms, against pyca's own encoder."""

import pytest
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from hypothesis import given
from hypothesis import strategies as st

from kms.domain import ecdsa
from kms.domain.algorithms import KeyType
from kms.domain.errors import KmsError, Reason

_N = {
    KeyType.SECP256K1: 2**256 - 432420386565659656852420866394968145599,
    KeyType.SECP256R1: 2**256 - 2**224 + 2**192 - 89188191075325690597107910205041859247,
}
_SCALARS = st.integers(1, min(_N.values()) - 1)
_CURVES = st.sampled_from(sorted(_N))


@given(_CURVES, _SCALARS, _SCALARS)
def test_der_is_what_another_encoder_writes(curve: KeyType, r: int, s: int) -> None:
    signature = ecdsa.EcdsaSignature(curve, r, s)
    assert signature.der() == encode_dss_signature(r, s)
    assert decode_dss_signature(signature.der()) == (r, s)
    assert ecdsa.from_der(curve, signature.der()) == signature
    assert ecdsa.from_raw(curve, signature.raw()) == signature


@given(_CURVES, _SCALARS, _SCALARS)
def test_low_s_is_the_smaller_of_the_two(curve: KeyType, r: int, s: int) -> None:
    low = ecdsa.EcdsaSignature(curve, r, s).low_s()
    assert low.s == min(s, _N[curve] - s)
    assert low.is_low_s


@pytest.mark.parametrize("curve", sorted(_N))
def test_scalars_outside_the_order_are_malformed(curve: KeyType) -> None:
    for r, s in ((0, 1), (1, 0), (_N[curve], 1), (1, _N[curve]), (2**256 - 1, 1)):
        with pytest.raises(KmsError):
            ecdsa.from_raw(curve, r.to_bytes(32, "big") + s.to_bytes(32, "big"))
        with pytest.raises(KmsError):
            ecdsa.from_der(curve, encode_dss_signature(r, s))


@pytest.mark.parametrize(
    "data",
    [
        "", "30", "3000", "300602010102010100", "3007020101020101", "30060201010201", "3081060201010201 01",
        "30070202000102 0101", "3006020181020101", "300602010102018f", "3106020101020101", "3006030101020101",
    ],
)  # fmt: skip
def test_der_that_is_not_canonical_is_malformed(data: str) -> None:
    with pytest.raises(KmsError) as refusal:
        ecdsa.from_der(KeyType.SECP256K1, bytes.fromhex(data.replace(" ", "")))
    assert refusal.value.reason is Reason.MALFORMED


@given(st.binary(max_size=80))
def test_any_bytes_are_a_signature_or_malformed(data: bytes) -> None:
    try:
        assert ecdsa.from_der(KeyType.SECP256R1, data).der() == data
    except KmsError as error:
        assert error.reason is Reason.MALFORMED
