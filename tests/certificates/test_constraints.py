"""Name constraints: what an authority may certify, as RFC 5280 section 4.2.1.10 says."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kms.certificates.constraints import NameConstraints, Subtree, parse_constraints
from kms.certificates.names import NameKind, parse_names
from kms.domain.errors import KmsError, Reason


def constraints(permitted: list[str], excluded: list[str]) -> NameConstraints:
    parsed = parse_constraints(permitted, excluded)
    assert parsed is not None
    return parsed


@pytest.mark.parametrize(
    ("subtree", "inside", "outside"),
    [
        (
            "dns:Example.com",
            ["dns:example.com", "dns:a.b.example.com", "dns:*.example.com"],
            ["dns:notexample.com", "dns:com.example"],
        ),
        ("dns:a.example.com", ["dns:a.example.com"], ["dns:*.example.com", "dns:b.example.com"]),
        ("ip:192.0.2.0/24", ["ip:192.0.2.255"], ["ip:192.0.3.0", "ip:::1", "ip:::ffff:192.0.2.1"]),
        ("ip:2001:db8::/32", ["ip:2001:db8:1::1"], ["ip:2001:db9::1", "ip:192.0.2.1"]),
        ("uri:example.com", ["uri:https://example.com/"], ["uri:https://a.example.com/", "uri:urn:a:b"]),
        ("uri:.example.com", ["uri:https://a.b.example.com/"], ["uri:https://example.com/", "uri:urn:a:b"]),
        ("email:example.com", ["email:a@example.com"], ["email:a@b.example.com"]),
        ("email:.example.com", ["email:a@b.example.com"], ["email:a@example.com"]),
        ("email:A@example.com", ["email:A@example.com"], ["email:a@example.com", "email:B@example.com"]),
    ],
)
def test_a_subtree_holds_what_lies_in_it(subtree: str, inside: list[str], outside: list[str]) -> None:
    permitting = constraints([subtree], [])
    permitting.check(parse_names(inside))
    for name in outside:
        with pytest.raises(KmsError, match="may certify") as refusal:
            permitting.check(parse_names([name]))
        assert refusal.value.reason is Reason.CERTIFICATE_INVALID
    for name in inside:
        with pytest.raises(KmsError, match="excluded"):
            constraints([], [subtree]).check(parse_names([name]))


def test_a_kind_without_a_permitted_subtree_is_not_limited() -> None:
    constraints(["dns:example.com"], ["ip:10.0.0.0/8"]).check(parse_names(["ip:192.0.2.1", "email:a@other.example"]))


def test_an_excluded_subtree_prevails_over_a_permitted_one() -> None:
    with pytest.raises(KmsError, match="excluded"):
        constraints(["dns:example.com"], ["dns:a.example.com"]).check(parse_names(["dns:x.a.example.com"]))


def test_a_wildcard_with_an_excluded_host_among_its_hosts_is_refused() -> None:
    excluding = constraints([], ["dns:secret.example.com"])
    excluding.check(parse_names(["dns:*.a.example.com", "dns:www.example.com"]))
    with pytest.raises(KmsError, match="excluded"):
        excluding.check(parse_names(["dns:*.example.com"]))


def test_a_uri_without_a_host_is_refused_where_uris_are_excluded() -> None:
    with pytest.raises(KmsError, match="excluded"):
        constraints([], ["uri:example.com"]).check(parse_names(["uri:urn:a:b"]))


def test_an_imported_authority_may_write_a_dot_first_or_all_hosts() -> None:
    """RFC 5280 has neither for DNS, and some authorities do."""
    (below,), (apex,), (wildcard,) = (parse_names([f"dns:{host}"]) for host in ("a.example.com", "example.com", "*.example.com"))
    dotted, everything = Subtree(NameKind.DNS, ".example.com"), Subtree(NameKind.DNS, "")
    assert [dotted.contains(name) for name in (below, apex, wildcard)] == [True, False, True]
    assert all(everything.contains(name) for name in (below, apex, wildcard))


def test_an_authority_without_subtrees_has_no_constraints() -> None:
    assert parse_constraints([], []) is None


@pytest.mark.parametrize(
    "text",
    [
        "example.com",
        "x:example.com",
        "dns:",
        "dns:*.example.com",
        "ip:192.0.2.1/24",
        "ip:x",
        "uri:https://example.com",
        "email:@",
    ],
)
def test_a_subtree_that_breaks_a_rule_is_refused(text: str) -> None:
    for permitted, excluded in (([text], []), ([], [text]), ([text, text], [])):
        with pytest.raises(KmsError) as refusal:
            parse_constraints(permitted, excluded)
        assert refusal.value.reason is Reason.CERTIFICATE_INVALID
        assert refusal.value.metadata["field"] == ("permitted" if permitted else "excluded")


def test_a_subtree_is_there_once() -> None:
    with pytest.raises(KmsError, match="once"):
        parse_constraints(["dns:a.example", "dns:A.example"], [])


LABELS = st.lists(st.sampled_from("ab"), min_size=1, max_size=4).map(".".join)


@settings(max_examples=50, deadline=None)
@given(LABELS, LABELS)
def test_dns_constraints_follow_the_labels(host: str, base: str) -> None:
    is_inside = host.split(".")[-len(base.split(".")) :] == base.split(".")
    try:
        constraints([f"dns:{base}"], []).check(parse_names([f"dns:{host}"]))
    except KmsError:
        assert not is_inside
    else:
        assert is_inside
