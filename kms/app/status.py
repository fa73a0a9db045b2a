"""How the service is, for whoever may call it, and in detail for those who look after it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Protocol

from kms.app.ports import Call
from kms.domain.algorithms import Hash, KeyType, Purpose
from kms.domain.keys import Custody
from kms.domain.permissions import Permission


@dataclass(frozen=True, slots=True)
class Detail:
    """What an operator looks at; the fields are those of `StatusDetail` in `admin.proto`."""

    token_label: str
    token_model: str
    token_serial: str
    hsm_module: str
    hsm_sessions: int
    hsm_lanes: int
    hsm_lanes_abandoned: int
    hsm_waiting: int
    hsm_handles: int
    handle_hit_ratio: float
    resident_keys: int
    ledger_waiting: int
    ledger_batches: int
    ledger_entries: int
    ledger_charges: int
    refusals_unrecorded: int
    trail_default_rows: int
    keys_unconfirmed: int
    disk_free_ratio: float | None
    key_cache_hit_ratio: float
    warnings: Sequence[str]


@dataclass(frozen=True, slots=True)
class Status:
    """How the process is. `faults`: a sentence by what is at fault; none: it is ready."""

    version: str
    deployment_id: str
    mode: str
    worker: int
    server_time: datetime
    faults: Mapping[str, str]
    detail: Detail | None


@dataclass(frozen=True, slots=True)
class KeyCapability:
    """What the token does with keys of a type for a purpose: custodies from weakest to strongest, PKCS #11 names."""

    key_type: KeyType
    purpose: Purpose
    custodies: Sequence[Custody]
    mechanisms: Sequence[str]


@dataclass(frozen=True, slots=True)
class HsmCapabilities:
    """What the token was shown to do, and whether keys may be kept SEALED."""

    keys: Sequence[KeyCapability]
    oaep_hashes: frozenset[Hash]
    is_sealed_allowed: bool


class Reports(Protocol):
    """What the process knows of itself."""

    async def status(self) -> Status:
        """Return how it is, with the detail. Raises STORE_UNAVAILABLE."""
        ...

    def capabilities(self) -> HsmCapabilities:
        """Return what the token can do."""
        ...


@dataclass(frozen=True, slots=True)
class Administration:
    """GetStatus and GetHsmCapabilities."""

    reports: Reports

    async def status(self, call: Call) -> Status:
        """Return how the service is; the detail is for callers with the permission `audit:read`."""
        status = await self.reports.status()
        return status if Permission.AUDIT_READ in call.user.permissions else replace(status, detail=None)

    def capabilities(self) -> HsmCapabilities:
        """Return what the token can do."""
        return self.reports.capabilities()
