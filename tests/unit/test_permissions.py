"""What roles permit."""

import re
from pathlib import Path

import pytest

from kms.domain.errors import KmsError, Reason
from kms.domain.lifecycle import Use
from kms.domain.permissions import DUTIES, Permission, check_permitted, check_use_permitted, needed_for
from kms.v1 import audit_pb2

SCHEMA = Path(__file__).parents[2] / "schema"
NOBODY: frozenset[Permission] = frozenset()
AUDITOR = frozenset({Permission.AUDIT_READ})


def test_every_rpc_of_the_audit_service_needs_the_permission_to_read_the_trail() -> None:
    rpcs = {f"AuditService/{method.name}" for method in audit_pb2.DESCRIPTOR.services_by_name["AuditService"].methods}
    assert rpcs <= DUTIES[Permission.AUDIT_READ].rpcs
    for rpc in rpcs:
        check_permitted(AUDITOR, rpc)
        with pytest.raises(KmsError) as caught:
            check_permitted(NOBODY, rpc)
        assert (caught.value.reason, caught.value.metadata) == (Reason.PERMISSION_DENIED, {"permission": "audit:read"})


def test_who_reads_the_trail_may_do_nothing_that_others_may() -> None:
    for rpc in ("KeyService/CreateKey", "CryptoService/Sign", "KeyService/ListKeys", "AnyService/ThatComesLater"):
        check_permitted(NOBODY, rpc)
        with pytest.raises(KmsError, match="nothing else"):
            check_permitted(AUDITOR, rpc)


def test_no_use_of_ones_own_keys_takes_a_permission_but_that_of_compromised_and_revoked_ones() -> None:
    needed = {Use.PROCESS_COMPROMISED: "keys:use-compromised", Use.PROCESS_REVOKED: "keys:use-revoked"}
    for use in Use:
        assert needed_for(use) == needed.get(use)
        others = frozenset(Permission) - {needed_for(use)}
        if needed_for(use) is None:
            check_use_permitted(NOBODY, use)
            continue
        check_use_permitted(frozenset(Permission) - others, use)
        with pytest.raises(KmsError) as caught:
            check_use_permitted(others, use)
        assert (caught.value.reason, caught.value.metadata) == (Reason.PERMISSION_DENIED, {"permission": needed[use]})


def test_who_may_use_compromised_keys_may_all_that_others_may_and_not_read_the_trail() -> None:
    recovery = frozenset({Permission.KEYS_USE_COMPROMISED, Permission.KEYS_USE_REVOKED})
    for rpc in ("KeyService/CreateKey", "CryptoService/Sign", "AdminService/GetStatus"):
        check_permitted(recovery, rpc)
    for held, rpc in ((recovery, "AuditService/SearchEvents"), (recovery | AUDITOR, "CryptoService/Decrypt")):
        with pytest.raises(KmsError, match=r"audit:read"):
            check_permitted(held, rpc)


def test_who_rotates_the_keys_of_others_does_nothing_else() -> None:
    rotator = frozenset({Permission.KEYS_ROTATE})
    for rpc in ("RotationService/RotateKey", "RotationService/RetryRotation", "AdminService/GetStatus"):
        check_permitted(rotator, rpc)
        check_permitted(NOBODY, rpc)
    for rpc in ("KeyService/CreateKey", "CryptoService/Sign", "KeyService/GetKey", "AnyService/ThatComesLater"):
        with pytest.raises(KmsError, match="rotates keys and does nothing else"):
            check_permitted(rotator, rpc)
    for rpc in ("RotationService/RotateKey", "AuditService/SearchEvents"):
        with pytest.raises(KmsError, match="nothing else"):
            check_permitted(rotator | AUDITOR, rpc)


def test_the_permissions_that_migrations_give_to_roles_are_those_of_the_table() -> None:
    given = {found for file in SCHEMA.glob("V*.sql") for found in re.findall(r'"([a-z]+:[a-z-]+)"', file.read_text())}
    assert given == set(Permission)
