"""What is known of how the service is: whether it is ready, why not, and what an operator should look at."""

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kms import __version__
from kms.app.records import Records
from kms.certificates.postgres.revocations import CrlStatus, read_crl_status
from kms.domain.errors import KmsError
from kms.hsm.token_hsm import TokenHsm
from kms.jobs.job import JobStatus
from kms.pki.trust import Trust
from kms.rotation.backlog import NO_BACKLOG, Backlog, read_backlog
from kms.rotation.master_keys import MasterKeys
from kms.store import epoch as epochs
from kms.store import migrate, partitions
from kms.store.cache import CacheStatus
from kms.store.disk import Disk
from kms.store.ledger import StoredLedger
from kms.store.pool import Pool
from kms.store.sealed_trail import SealStatus, StoredSealedTrail
from kms.store.sealer import HistoryWatch
from kms.store.watch import database_time

_SEAL_LATE_SECONDS = 30.0


@dataclass(slots=True, eq=False)
class SealWatch:
    """Whether rows of the trail wait too long for their checkpoint. It keeps what it saw, so it changes.

    `interval_seconds` is how often the trail is sealed.
    """

    interval_seconds: float
    status: SealStatus | None = None
    waiting_since: float | None = None
    is_late: bool = False

    def see(self, status: SealStatus, now: float) -> None:
        """Take how far the trail is sealed *now*, in seconds of a clock that only goes on."""
        is_moving = self.status is None or status.tree_size != self.status.tree_size
        if not status.waiting:
            self.waiting_since = None
        elif is_moving or self.waiting_since is None:
            self.waiting_since = now
        self.status = status
        self.is_late = self.waiting_since is not None and now - self.waiting_since > _SEAL_LATE_SECONDS + self.interval_seconds


@dataclass(slots=True, eq=False)
class Condition:
    """The parts that are asked, and what the database said when it was last asked: it is looked at anew, so it changes.

    `faults` are sentences by what is at fault: token, database, epoch, certificates, service. No fault: ready. A schema that was
    changed under the service is a warning: it goes on, and would not start again. So is the *advice* about its configuration.
    """

    hsm: TokenHsm
    ledger: StoredLedger
    pool: Pool
    records: Records
    disk: Disk
    store_answers: Callable[[], bool]
    caches: Mapping[str, Callable[[], CacheStatus]]
    seal_watch: SealWatch
    history: HistoryWatch
    trust: Trust
    master_keys: MasterKeys
    advice: Sequence[str] = ()
    jobs: Callable[[], Sequence[JobStatus]] = lambda: ()
    epoch_fault: str = ""
    schema_fault: str = ""
    is_stopping: bool = False
    default_rows: int = 0
    keys_unconfirmed: int = 0
    rotations: Backlog = NO_BACKLOG
    crls: Sequence[CrlStatus] = ()

    @property
    def faults(self) -> dict[str, str]:
        """Why the service is not ready; empty when it is."""
        told = {
            "service": "it is stopping" if self.is_stopping else "",
            "token": "" if self.hsm.is_available() else "the HSM does not answer",
            "database": "" if self.store_answers() else "the database does not answer",
            "epoch": self.epoch_fault,
            "certificates": "; ".join(self.trust.faults),
        }
        return {part: sentence for part, sentence in told.items() if sentence}

    @property
    def warnings(self) -> list[str]:
        """What does not keep the service from serving, and should be seen to."""
        told = [self.schema_fault, *self.advice] if self.schema_fault else [*self.advice]
        if self.disk.is_low and self.disk.free_share is not None:
            told.append(f"the database's disk is {self.disk.free_share:.0%} free")
        if not self.disk.has_room_for_strangers():
            told.append("refusals of callers who are not admitted are no longer recorded")
        if self.default_rows:
            told.append("rows of the trail are in a DEFAULT partition: run `kms partitions drain`")
        if self.history.refusal:
            told.append(self.history.refusal)
        if self.seal_watch.is_late:
            told.append("rows of the trail are not sealed: the log of the worker that seals says why")
        if self.keys_unconfirmed:
            told.append(f"{self.keys_unconfirmed} restored keys wait for a confirmation: see `kms epoch show`")
        told += self.trust.warnings
        told += self.master_keys.warnings
        told += self.rotations.warnings
        told += [status.warning for status in self.crls if status.warning]
        told += [status.warning for status in self.jobs() if status.warning]
        return told

    def is_ready(self) -> bool:
        """Whether calls can be served."""
        return not self.faults

    def stop(self) -> None:
        """Say that the service is about to stop."""
        self.is_stopping = True

    def look(self) -> tuple[bool, str]:
        """Return the same with a text for GET /readyz."""
        faults = self.faults
        lines = [f"{part}: {sentence}" for part, sentence in faults.items()] or ["ready"]
        return not faults, "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])

    async def check(self) -> None:
        """Ask the database for what it alone knows."""
        if not self.store_answers():
            return
        self.epoch_fault = await self._fault(lambda pool: epochs.check_epoch(pool, self.records, was_served=True))
        self.schema_fault = await self._fault(migrate.check_schema)
        self.default_rows = sum(rows.row_count for rows in await partitions.default_rows(self.pool))
        self.seal_watch.see(await StoredSealedTrail(self.pool).status(), monotonic())
        self.keys_unconfirmed = len(await epochs.unconfirmed_keys(self.pool))
        self.rotations = await read_backlog(self.pool)
        self.crls = await read_crl_status(self.pool)

    async def _fault(self, check: Callable[[Pool], Awaitable[object]]) -> str:
        try:
            await check(self.pool)
        except KmsError as error:
            await database_time(self.pool)  # raises where the question was not answered, which is the database's fault
            return error.message
        return ""


@dataclass(frozen=True, slots=True)
class ConditionCollector(Collector):
    """The condition as Prometheus reads it, computed when it is read."""

    condition: Condition

    def collect(self) -> Iterator[Metric]:
        """Return the families."""
        condition = self.condition
        yield from _hsm(condition)
        yield from _ledger(condition)
        yield gauge("ready", "Whether calls can be served.", condition.is_ready())
        yield gauge("warnings", "What does not keep the service from serving, and should be seen to.", len(condition.warnings))
        yield gauge("trail_default_rows", "Rows of the trail in a DEFAULT partition.", condition.default_rows)
        yield gauge("keys_unconfirmed", "Restored keys that wait for a confirmation.", condition.keys_unconfirmed)
        yield from _trust(condition.trust)
        yield from _rotations(condition.rotations)
        yield from _crls(condition.crls)
        yield from _sealing(condition.seal_watch.status)
        refused = bool(condition.history.refusal)
        yield gauge("trail_history_refused", "Whether the trail is not signed because it is another history.", refused)
        yield from _jobs(condition.jobs())
        if condition.disk.free_share is not None:
            yield gauge("disk_free_ratio", "What is free of the database's disk, 0 to 1.", condition.disk.free_share)
        build = GaugeMetricFamily("kms_build_info", "The version that runs.", labels=("version",))
        build.add_metric((__version__,), 1)
        yield build


def gauge(name: str, text: str, value: float) -> Metric:
    """Return a gauge without labels."""
    return GaugeMetricFamily(f"kms_{name}", text, value=float(value))


def _trust(trust: Trust) -> Iterator[Metric]:
    ends = GaugeMetricFamily(
        "kms_trust_ends_timestamp_seconds",
        "When a certificate ends, and when a CRL has its next update.",
        labels=("setting", "of"),
    )
    for setting, part, ends_at in trust.ends():
        ends.add_metric((setting, part), ends_at.timestamp())
    yield ends


def _rotations(backlog: Backlog) -> Iterator[Metric]:
    yield gauge("rotations_due", "Rotations that a worker may claim, to 1,000.", backlog.due)
    yield gauge("rotations_running", "Rotations that a worker does, to 1,000.", backlog.running)
    yield gauge("rotations_failed", "Rotations in the log that failed, to 1,000.", backlog.failed)
    oldest = "How long ago the oldest rotation that has not ended was asked for; 0: none."
    yield gauge("rotation_oldest_age_seconds", oldest, backlog.oldest_seconds)
    overdue = "Keys that were due by policy, and were not rotated although that was tried, to 1,000."
    yield gauge("rotation_policies_overdue", overdue, backlog.policies_overdue)


def _crls(statuses: Sequence[CrlStatus]) -> Iterator[Metric]:
    of_all = "of the CRLs of an authority, one for each of its shards"
    ages = GaugeMetricFamily("kms_crl_age_seconds", f"How long ago the oldest {of_all}, was made.", labels=("authority",))
    ends = GaugeMetricFamily("kms_crl_left_seconds", f"In how long the first {of_all}, ends.", labels=("authority",))
    entries = GaugeMetricFamily("kms_crl_entries", f"How many certificates are on all {of_all}.", labels=("authority",))
    for status in statuses:
        ages.add_metric((status.authority,), status.age_seconds)
        ends.add_metric((status.authority,), status.left_seconds)
        entries.add_metric((status.authority,), status.entries)
    yield from (ages, ends, entries)


def _sealing(status: SealStatus | None) -> Iterator[Metric]:
    if status is not None:
        yield gauge("trail_rows_waiting", "Rows of the trail without a checkpoint, to 10,000 a table.", status.waiting)
        if status.seconds_since is not None:
            yield gauge("trail_checkpoint_age_seconds", "How long ago the last checkpoint was made.", status.seconds_since)


def _jobs(statuses: Sequence[JobStatus]) -> Iterator[Metric]:
    # Not `job`: Prometheus gives that label to each target.
    ages = GaugeMetricFamily(
        "kms_job_success_age_seconds", "How long ago a job last succeeded, or began without a success.", labels=("name",)
    )
    failures = CounterMetricFamily("kms_job_failures", "Rounds of a job that failed.", labels=("name",))
    for status in statuses:
        ages.add_metric((status.job.name,), status.success_age)
        failures.add_metric((status.job.name,), status.failures)
    yield ages
    yield failures


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"kms_{name}", text, value=float(value))


def _hsm(condition: Condition) -> Iterator[Metric]:
    status = condition.hsm.status()
    yield gauge("hsm_available", "Whether the token answered when last looked at.", status.is_available)
    yield gauge("hsm_sessions", "Sessions of this process in the token.", status.sessions)
    yield gauge("hsm_handles", "Keys that are loaded in the token.", status.handles)
    yield gauge("hsm_waiting", "Operations that wait for a lane or are in one.", status.waiting)
    yield gauge("hsm_lanes_abandoned", "Lanes given up because a call in the token did not return.", status.lanes_abandoned)
    lookups = CounterMetricFamily("kms_cache_lookups", "Lookups in caches.", labels=("cache", "outcome"))
    lookups.add_metric(("handles", "hit"), status.handle_hits)
    lookups.add_metric(("handles", "miss"), status.handle_misses)
    for name, cache_status in condition.caches.items():
        cache = cache_status()
        lookups.add_metric((name, "hit"), cache.hits)
        lookups.add_metric((name, "miss"), cache.misses)
    yield lookups


def _ledger(condition: Condition) -> Iterator[Metric]:
    status = condition.ledger.status()
    yield gauge("ledger_waiting", "Uses that wait to be settled.", status.waiting)
    yield _counter("ledger_entries", "Uses that were settled.", status.entries)
    yield _counter("ledger_charges", "Uses that were charged.", status.charges)
    yield _counter("ledger_losses", "Connections lost with a batch under way.", status.losses)
    yield gauge("refusals_waiting", "Rows about refusals that wait to be written.", status.refusals_waiting)
    yield _counter(
        "refusals_unrecorded", "Refusals of strangers left out of the trail, the disk being full.", status.refusals_unrecorded
    )
