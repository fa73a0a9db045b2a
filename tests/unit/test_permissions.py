"""What roles permit."""

import re
from pathlib import Path

import pytest

from kms.domain.errors import KmsError, Reason
from kms.domain.permissions import DUTIES, Permission, check_permitted
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


def test_the_permissions_that_migrations_give_to_roles_are_those_of_the_table() -> None:
    given = {found for file in SCHEMA.glob("V*.sql") for found in re.findall(r'"([a-z]+:[a-z-]+)"', file.read_text())}
    assert given == set(Permission)
