"""What roles permit: the one table from a permission to the RPCs that it opens and the database role that serves them.

An RPC that is not in the table is open to every user in good standing, who sees and uses what is his own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, LiteralString

from kms.domain.errors import KmsError, Reason


class Permission(StrEnum):
    """What a role can hold, as `authentication.roles` stores it. A value is never reused."""

    AUDIT_READ = "audit:read"


@dataclass(frozen=True, slots=True)
class Duty:
    """The RPCs (`Service/Method`) that a permission opens, and the role of the database in which they act."""

    rpcs: frozenset[str]
    database_role: LiteralString


DUTIES: Final[Mapping[Permission, Duty]] = {
    Permission.AUDIT_READ: Duty(
        frozenset({"AuditService/SearchEvents", "AuditService/TailEvents", "AuditService/VerifyTrail"}), "auditor_users"
    ),
}

# How the service is: nothing of it is recorded, so auditors may ask too.
_OPEN_TO_ALL: Final = frozenset({"AdminService/GetStatus", "AdminService/GetHsmCapabilities"})


def check_permitted(held: frozenset[Permission], rpc: str) -> None:
    """Raise PERMISSION_DENIED unless a user with the permissions *held* may call *rpc* (`Service/Method`).

    Separation of duties: who reads the trail does nothing that is recorded in it.
    """
    if rpc in _OPEN_TO_ALL:
        return
    needed = next((permission for permission, duty in DUTIES.items() if rpc in duty.rpcs), None)
    if needed is not None and needed not in held:
        raise permission_denied(needed)
    if needed is not Permission.AUDIT_READ and Permission.AUDIT_READ in held:
        reads_only = f"a user with the permission {Permission.AUDIT_READ} reads the trail and does nothing else"
        raise KmsError(Reason.PERMISSION_DENIED, reads_only, permission=Permission.AUDIT_READ)


def permission_denied(needed: Permission) -> KmsError:
    """Return the answer to a caller whose roles lack *needed*."""
    return KmsError(Reason.PERMISSION_DENIED, f"the call needs the permission {needed}", permission=needed)
