"""Names: one spelling each, and nothing that a verifier could read as another name."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kms.certificates.names import (
    Attribute,
    GeneralName,
    NameKind,
    Subject,
    parse_name,
    parse_names,
    parse_subject,
    parse_subject_text,
)
from kms.domain.errors import KmsError, Reason

DNS, IP, URI, EMAIL = NameKind


@pytest.mark.parametrize(
    ("text", "spelt"),
    [
        ("dns:WWW.Example.COM", "dns:www.example.com"),
        ("dns:localhost", "dns:localhost"),
        ("dns:bücher.example", "dns:xn--bcher-kva.example"),
        ("dns:xn--bcher-kva.example", "dns:xn--bcher-kva.example"),
        ("dns:*.Example.com", "dns:*.example.com"),
        ("dns:3com.example", "dns:3com.example"),
        (f"dns:{'a' * 63}.example", f"dns:{'a' * 63}.example"),
        ("ip:192.0.2.1", "ip:192.0.2.1"),
        ("ip:2001:DB8:0:0::1", "ip:2001:db8::1"),
        ("uri:kms://test/user/00000000-0000-4000-8000-000000000001", "uri:kms://test/user/00000000-0000-4000-8000-000000000001"),
        ("uri:spiffe://example.com/a/b", "uri:spiffe://example.com/a/b"),
        ("uri:urn:uuid:f81d4fae-7dec-11d0-a765-00a0c91e6bf6", "uri:urn:uuid:f81d4fae-7dec-11d0-a765-00a0c91e6bf6"),
        ("uri:https://[2001:db8::1]:8443/x?y=%20#z", "uri:https://[2001:db8::1]:8443/x?y=%20#z"),
        ("uri:https://192.0.2.1/", "uri:https://192.0.2.1/"),
        ("email:Jo.Doe+x@Example.com", "email:Jo.Doe+x@example.com"),
        ("email:jo@bücher.example", "email:jo@xn--bcher-kva.example"),
    ],
)
def test_a_name_has_one_spelling(text: str, spelt: str) -> None:
    (name,) = parse_names([text])
    assert str(name) == spelt
    assert parse_names([str(name)]) == (name,)


@pytest.mark.parametrize(
    "text",
    [
        "www.example.com",
        "dirName:x",
        "dns:",
        "dns:example.com\0.evil.example",
        "dns:exa\u200bmple.com",
        "dns:example.com.",
        "dns:.example.com",
        "dns:a..b",
        "dns:-a.example",
        "dns:a-.example",
        "dns:a_b.example",
        "dns:ab--cd.example",
        "dns:xn--a.example",
        "dns:192.0.2.1",
        "dns:example.1",
        "dns:exa mple.com",
        "dns:www.example.com/",
        "dns:*",
        "dns:*.com",
        "dns:a.*.example.com",
        "dns:w*.example.com",
        "dns:*.*.example.com",
        f"dns:{'a' * 64}.example",
        f"dns:{'.'.join(['abcdefgh'] * 30)}",
        "ip:192.0.2.256",
        "ip:192.0.2.01",
        "ip:192.0.2.0/24",
        "ip:fe80::1%eth0",
        "uri:/relative",
        "uri:example.com",
        "uri:https:",
        "uri:HTTPS://example.com/",
        "uri:https://Example.com/",
        "uri:https://user@example.com/",
        "uri:https://exa mple.com/",
        "uri:https://[::1/",
        "uri:https://[2001:DB8::1]/",
        "uri:https://example.com:99999/",
        "uri:https://a_b/",
        "uri:https:///x\0",
        "uri:https://example.com/%zz",
        f"uri:https://example.com/{'a' * 1024}",
        "email:example.com",
        "email:@example.com",
        "email:a@b@example.com",
        "email:a..b@example.com",
        "email:jö@example.com",
        "email:jo@192.0.2.1",
        f"email:{'a' * 65}@example.com",
        'email:"a b"@example.com',
    ],
)
def test_a_name_that_breaks_a_rule_is_refused(text: str) -> None:
    with pytest.raises(KmsError) as refusal:
        parse_names([text])
    assert refusal.value.reason is Reason.CERTIFICATE_INVALID
    assert refusal.value.metadata == {"field": "names"}


def test_a_name_is_there_once_however_it_is_spelt() -> None:
    for twice in (["dns:a.example", "dns:A.Example"], ["ip:::1", "ip:0::1"], ["dns:bücher.example", "dns:xn--bcher-kva.example"]):
        with pytest.raises(KmsError, match="once"):
            parse_names(twice)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(NameKind), st.text(max_size=30) | st.from_regex(r"[a-z.:/@*-]{1,20}", fullmatch=True))
def test_a_name_that_is_accepted_is_visible_ascii_and_keeps_its_spelling(kind: NameKind, text: str) -> None:
    try:
        name = parse_name(kind, text)
    except KmsError as refusal:
        assert refusal.reason is Reason.CERTIFICATE_INVALID
        return
    assert all(" " < character <= "~" for character in name.value)
    assert parse_name(kind, name.value) == name


def test_a_subject_is_written_as_rfc_4514_does() -> None:
    subject = parse_subject_text(r"CN=Jo \"the\" Doe,OU=a\,b,OU=c,O=Ex\+ample,C=DE")
    assert subject.attributes[0] == (Attribute.COUNTRY, "DE")
    assert subject.values(Attribute.ORGANIZATIONAL_UNIT) == ("c", "a,b")
    assert subject.common_name == 'Jo "the" Doe'
    assert parse_subject_text(str(subject)) == subject
    assert parse_subject_text("") == Subject()


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["CN", "O", "OU", "ST", "L"]), st.text(max_size=20)), max_size=4, unique_by=lambda pair: pair[0]
    )
)
def test_a_subject_that_is_accepted_reads_back_from_its_text(pairs: list[tuple[str, str]]) -> None:
    try:
        subject = parse_subject(pairs)
    except KmsError as refusal:
        assert refusal.reason is Reason.CERTIFICATE_INVALID
        return
    assert parse_subject_text(str(subject)) == subject


@pytest.mark.parametrize(
    "pairs",
    [
        [("emailAddress", "a@example.com")],
        [("CN", "")],
        [("CN", "a" * 65)],
        [("O", "a" * 65)],
        [("L", "a" * 129)],
        [("C", "de")],
        [("C", "DEU")],
        [("C", "D1")],
        [("serialNumber", "a_b")],
        [("CN", "a\0b")],
        [("CN", "a\nb")],
        [("CN", "a\u202eb")],
        [("CN", " a")],
        [("CN", "\u3164")],
        [("CN", "e\u0301")],
        [("CN", "a"), ("CN", "b")],
        [("OU", "a"), ("OU", "a")],
    ],
)
def test_a_subject_that_breaks_a_rule_is_refused(pairs: list[tuple[str, str]]) -> None:
    with pytest.raises(KmsError) as refusal:
        parse_subject(pairs)
    assert refusal.value.reason is Reason.CERTIFICATE_INVALID


@pytest.mark.parametrize("text", ["CN", "CN=a,", "=a", "CN=a,,O=b", "CN=a+O=b", 'CN="a"', r"CN=a\zz", "CN=a;O=b"])
def test_a_subject_that_is_no_text_of_rfc_4514_is_refused(text: str) -> None:
    with pytest.raises(KmsError, match="subject"):
        parse_subject_text(text)


def test_there_are_at_most_a_hundred_names() -> None:
    with pytest.raises(KmsError, match="at most 100 names"):
        parse_names([f"dns:a{number}.example" for number in range(101)])


def test_a_name_tells_its_host() -> None:
    hosts = {str(name): name.host for name in parse_names(["dns:*.a.example", "ip:::1", "email:x@b.example", "uri:urn:a:b"])}
    assert hosts == {"dns:*.a.example": "a.example", "ip:::1": "::1", "email:x@b.example": "b.example", "uri:urn:a:b": None}
    assert GeneralName(URI, "https://c.example:8443/").host == "c.example"
