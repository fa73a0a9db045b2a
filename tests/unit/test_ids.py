"""Identifiers from hostile text."""

from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kms.domain.errors import KmsError, Reason
from kms.domain.ids import KeyId, UserId, identity_uri, parse_deployment_id, parse_identity_uri, parse_key_name, parse_key_ref

_ID = "0f8fad5b-d9cb-469f-a165-70867728950e"


@pytest.mark.parametrize("text", ["a", "A.b_c/d-e", "9", "x" * 90])
def test_a_good_name_is_a_name_and_a_reference(text: str) -> None:
    assert parse_key_name(text) == text
    assert parse_key_ref(text) == text


@pytest.mark.parametrize(
    "text", ["", "x" * 91, "-a", ".a", "a b", "a@1", "é", "a\n", "a\x00", "١", _ID, _ID.upper(), "'; DROP TABLE"]
)
def test_a_bad_name_is_malformed(text: str) -> None:
    with pytest.raises(KmsError) as refusal:
        parse_key_name(text)
    assert refusal.value.reason is Reason.MALFORMED


def test_a_reference_is_an_id_a_name_or_a_predecessors_name() -> None:
    assert parse_key_ref(_ID) == KeyId(UUID(_ID))
    assert parse_key_ref("pay@12") == "pay@12"


@pytest.mark.parametrize(
    "text", ["", "pay@", "pay@0", "pay@01", "pay@1@2", "@1", "pay@1\n", _ID + "\n", "x" * 91 + "@1", "pay@9999999999"]
)
def test_a_bad_reference_is_malformed(text: str) -> None:
    with pytest.raises(KmsError):
        parse_key_ref(text)


def test_the_identity_uri_has_one_spelling() -> None:
    user = UserId(UUID(_ID))
    assert parse_identity_uri(identity_uri("neo", user), deployment="neo") == user
    good = f"kms://neo/user/{_ID}"
    for bad in (
        good.upper(),
        good + "/",
        good + "?x",
        "kms://neo2/user/" + _ID,
        f"kms://neo/user/{_ID.upper()}",
        " " + good,
        "",
        good[:-1],
    ):
        with pytest.raises(KmsError):
            parse_identity_uri(bad, deployment="neo")


@pytest.mark.parametrize("text", ["", "-a", "a-", "A", "a.b", "a" * 64, "a\n"])
def test_a_deployment_id_is_a_dns_label(text: str) -> None:
    with pytest.raises(KmsError):
        parse_deployment_id(text)


@given(st.text(max_size=120))
def test_any_text_is_a_reference_or_malformed(text: str) -> None:
    try:
        found = parse_key_ref(text)
    except KmsError as error:
        assert error.reason is Reason.MALFORMED
    else:
        assert str(found) == text
