"""Identifiers: types of their own, parsed once at the door."""

import re
from typing import Final, NewType
from uuid import UUID

from kms.domain.errors import malformed

KeyId = NewType("KeyId", UUID)
UserId = NewType("UserId", UUID)
KeyName = NewType("KeyName", str)
KeyRef = KeyId | KeyName

_UUID: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,89}")
_VERSION: Final = re.compile(r"@[1-9][0-9]{0,8}")
_DEPLOYMENT: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


def parse_key_name(text: str, *, field: str = "name") -> KeyName:
    """Return *text* as the name of a new key, or raise MALFORMED.

    A name is 1 to 90 ASCII characters; `@` is left to the predecessors of a rotated key, and a name in the
    shape of a UUID is refused because a key is addressed by either.
    """
    if not _NAME.fullmatch(text) or _UUID.fullmatch(text.lower()):
        raise malformed(field, "expected 1 to 90 of A-Z a-z 0-9 . _ / -, beginning with a letter or digit, and not a UUID")
    return KeyName(text)


def parse_key_ref(text: str, *, field: str = "key") -> KeyRef:
    """Return *text* as a key's id or as the name of one of the caller's keys, or raise MALFORMED."""
    if _UUID.fullmatch(text):
        return KeyId(UUID(text))
    name, at, number = text.partition("@")
    if not text or (at and not _VERSION.fullmatch(at + number)) or not _NAME.fullmatch(name):
        raise malformed(field, "expected a key id (a lower-case UUID) or the name of a key of yours")
    return KeyName(text)


def parse_uuid(text: str, *, field: str) -> UUID:
    """Return *text* as a UUID in lower case, or raise MALFORMED."""
    if not _UUID.fullmatch(text):
        raise malformed(field, "expected a lower-case UUID")
    return UUID(text)


def parse_deployment_id(text: str) -> str:
    """Return *text* as a deployment id: a DNS label in lower case. Raises MALFORMED."""
    if not _DEPLOYMENT.fullmatch(text):
        raise malformed("deployment_id", "expected 1 to 63 of a-z 0-9 -, neither beginning nor ending with -")
    return text


def identity_uri(deployment: str, user: UserId) -> str:
    """Return the URI that names *user* in a client certificate: `kms://<deployment id>/user/<uuid>`."""
    return f"kms://{deployment}/user/{user}"


def parse_identity_uri(uri: str, *, deployment: str) -> UserId:
    """Return the user that *uri* names in *deployment*, or raise MALFORMED.

    Only the canonical form is accepted, so that one user has one spelling.
    """
    prefix = identity_uri(deployment, UserId(UUID(int=0)))[:-36]
    if not uri.startswith(prefix) or not _UUID.fullmatch(uri[len(prefix) :]):
        raise malformed("client certificate", f"expected the URI {prefix}<uuid> as its one URI name")
    return UserId(UUID(uri[len(prefix) :]))


LINEAGE_SEPARATOR: Final = "@"


def base_name(name: KeyName) -> KeyName:
    """Return the name that a key had before it was rotated: `k` for `k@2`, and for `k` itself."""
    return KeyName(str(name).partition(LINEAGE_SEPARATOR)[0])
