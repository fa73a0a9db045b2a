"""What roles permit: the one table from a permission to the RPCs and uses that it opens and the database role that serves them.

What is not in the table is open to every user in good standing, who sees and uses what is his own. The SQL function
`cryptography.use_permission` mirrors what the table says of uses: the charge looks at the permission again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, LiteralString

from kms.domain.errors import KmsError, Reason
from kms.domain.lifecycle import Use


class Permission(StrEnum):
    """What a role can hold, as `authentication.roles` stores it. A value is never reused."""

    AUDIT_READ = "audit:read"
    CERTS_ISSUE = "certs:issue"
    CERTS_MANAGE = "certs:manage"
    KEYS_ROTATE = "keys:rotate"
    KEYS_USE_COMPROMISED = "keys:use-compromised"
    KEYS_USE_REVOKED = "keys:use-revoked"


@dataclass(frozen=True, slots=True)
class Duty:
    """The RPCs (`Service/Method`) and uses of keys that a permission opens, and the role of the database in which they act.

    `only` are the RPCs that a holder may call, and no others; None: the permission closes nothing. `does` says it in words.
    """

    rpcs: frozenset[str]
    database_role: LiteralString
    uses: frozenset[Use] = frozenset()
    only: frozenset[str] | None = None
    does: str = ""


_READS_TRAIL: Final = frozenset({"AuditService/SearchEvents", "AuditService/TailEvents", "AuditService/VerifyTrail"})
_ROTATES: Final = frozenset(
    f"RotationService/{method}" for method in ("RotateKey", "RetryRotation", "GetRotation", "WatchRotation", "ListRotations")
)
_MANAGES_AUTHORITIES: Final = frozenset(
    f"CertificateService/{method}"
    for method in (
        "CreateCertificateAuthority",
        "ImportAuthorityCertificate",
        "UpdateCertificateAuthority",
        "RotateCertificateAuthority",
        "PublishCrl",
    )
)


DUTIES: Final[Mapping[Permission, Duty]] = {
    Permission.AUDIT_READ: Duty(_READS_TRAIL, "auditor_users", only=_READS_TRAIL, does="reads the trail"),
    # A user without it gets what an authority gives each user: a client certificate of their own. So the RPCs are open to all.
    Permission.CERTS_ISSUE: Duty(frozenset(), "authenticated_users", does="issues certificates"),
    # Of the authorities that there are, the record of each names the one user who manages it.
    Permission.CERTS_MANAGE: Duty(_MANAGES_AUTHORITIES, "authenticated_users", does="manages certificate authorities"),
    # The RPCs are open to all, for keys of their own. For a holder they open the keys of all users.
    Permission.KEYS_ROTATE: Duty(frozenset(), "authenticated_users", only=_ROTATES, does="rotates keys"),
    # Of one's own keys, as any use: the RPCs are open to all.
    Permission.KEYS_USE_COMPROMISED: Duty(frozenset(), "authenticated_users", frozenset({Use.PROCESS_COMPROMISED})),
    Permission.KEYS_USE_REVOKED: Duty(frozenset(), "authenticated_users", frozenset({Use.PROCESS_REVOKED})),
}

# How the service is: nothing of it is recorded, so auditors may ask too.
_OPEN_TO_ALL: Final = frozenset({"AdminService/GetStatus", "AdminService/GetHsmCapabilities"})


def check_permitted(held: frozenset[Permission], rpc: str) -> None:
    """Raise PERMISSION_DENIED unless a user with the permissions *held* may call *rpc* (`Service/Method`).

    Separation of duties: who reads the trail does nothing that is recorded in it, and who rotates the keys of others uses none.
    """
    if rpc in _OPEN_TO_ALL:
        return
    needed = next((permission for permission, duty in DUTIES.items() if rpc in duty.rpcs), None)
    if needed is not None and needed not in held:
        raise permission_denied(needed)
    for permission, duty in DUTIES.items():
        if permission in held and duty.only is not None and rpc not in duty.only:
            message = f"a user with the permission {permission} {duty.does} and does nothing else"
            raise KmsError(Reason.PERMISSION_DENIED, message, permission=permission)


def needed_for(use: Use) -> Permission | None:
    """Return the permission that *use* takes, None where it takes none."""
    return next((permission for permission, duty in DUTIES.items() if use in duty.uses), None)


def check_use_permitted(held: frozenset[Permission], use: Use) -> None:
    """Raise PERMISSION_DENIED unless a user with the permissions *held* may put a key of his to *use*."""
    needed = needed_for(use)
    if needed is not None and needed not in held:
        raise permission_denied(needed)


def permission_denied(needed: Permission) -> KmsError:
    """Return the answer to a caller whose roles lack *needed*."""
    return KmsError(Reason.PERMISSION_DENIED, f"the call needs the permission {needed}", permission=needed)
