"""The port `Reports`: what a process knows of itself, gathered from its parts."""

from dataclasses import dataclass

from kms import __version__
from kms.app.status import Detail, HsmCapabilities, KeyCapability, Status
from kms.domain.keys import Custody
from kms.store.watch import database_time
from kms.wiring.condition import Condition


@dataclass(frozen=True, slots=True)
class ProcessReports:
    """`Reports` of this process, the worker of that number, from 1; 0: there is one only."""

    condition: Condition
    deployment_id: str
    mode: str
    worker: int

    async def status(self) -> Status:
        """Return how it is, with the detail. Raises STORE_UNAVAILABLE."""
        return Status(
            version=__version__,
            deployment_id=self.deployment_id,
            mode=self.mode,
            worker=self.worker,
            server_time=await database_time(self.condition.pool),
            faults=self.condition.faults,
            detail=self._detail(),
        )

    def capabilities(self) -> HsmCapabilities:
        """Return what the token can do."""
        hsm = self.condition.hsm
        order = tuple(Custody)
        keys = [
            KeyCapability(
                key_type, purpose, sorted(custodies, key=order.index), hsm.capabilities.mechanisms_of(key_type, purpose)
            )
            for (key_type, purpose), custodies in hsm.capabilities.custodies.items()
        ]
        return HsmCapabilities(keys, hsm.oaep_hashes(), hsm.is_sealed_allowed)

    def _detail(self) -> Detail:
        condition = self.condition
        hsm, ledger = condition.hsm.status(), condition.ledger.status()
        keys = condition.caches["keys"]()
        return Detail(
            token_label=hsm.token_label,
            token_model=hsm.model,
            token_serial=hsm.serial,
            hsm_module=hsm.module,
            hsm_sessions=hsm.sessions,
            hsm_lanes=hsm.lanes,
            hsm_lanes_abandoned=hsm.lanes_abandoned,
            hsm_waiting=hsm.waiting,
            hsm_handles=hsm.handles,
            handle_hit_ratio=_ratio(hsm.handle_hits, hsm.handle_misses),
            resident_keys=hsm.resident_keys,
            ledger_waiting=ledger.waiting,
            ledger_batches=ledger.batches,
            ledger_entries=ledger.entries,
            ledger_charges=ledger.charges,
            refusals_unrecorded=ledger.refusals_unrecorded,
            trail_default_rows=condition.default_rows,
            keys_unconfirmed=condition.keys_unconfirmed,
            disk_free_ratio=condition.disk.free_share,
            key_cache_hit_ratio=_ratio(keys.hits, keys.misses),
            warnings=condition.warnings,
        )


def _ratio(hits: int, misses: int) -> float:
    return hits / max(1, hits + misses)
