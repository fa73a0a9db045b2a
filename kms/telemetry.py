"""What the service tells of its work: numbers for Prometheus, and spans where traces are wanted.

Nothing in it decides anything, waits for anything or can fail a call. It sees names of methods and operations, reasons and
times; never a key's name, a message or associated data.
"""

from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter
from typing import Any, Final, ParamSpec, Protocol, TypeVar, cast

from prometheus_client import CollectorRegistry, Counter, Histogram

Metadata = Iterable[tuple[str, str | bytes]]
P = ParamSpec("P")
T = TypeVar("T")

_NOTHING: Final = nullcontext()
_CALL_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_STEP_SECONDS: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
_BATCH_ENTRIES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Spans(Protocol):
    """Traces. A span is open within its block, and the steps of a call are children of it."""

    def call(self, method: str, metadata: Metadata) -> AbstractContextManager[None]:
        """Open the span of a call, below the one that the caller's `traceparent` names (W3C Trace Context)."""
        ...

    def step(self, name: str) -> AbstractContextManager[None]:
        """Open the span of a step of a call."""
        ...

    def end(self, outcome: str, code: str, request_id: str) -> None:
        """Say of the call whose span is open how it ended: OK or a reason, and the gRPC code's name."""
        ...


class _NoSpans:
    """No traces are wanted."""

    def call(self, method: str, metadata: Metadata) -> AbstractContextManager[None]:
        return _NOTHING

    def step(self, name: str) -> AbstractContextManager[None]:
        return _NOTHING

    def end(self, outcome: str, code: str, request_id: str) -> None:
        return


class Telemetry:
    """The numbers of one process, in `registry`, and its spans."""

    def __init__(self, spans: Spans | None = None) -> None:
        self.registry = CollectorRegistry()
        self._spans = spans
        self.spans: Spans = spans or _NoSpans()
        new = {"namespace": "kms", "registry": self.registry}
        self._calls = Counter("calls", "Calls that have ended.", ("method", "code"), **cast(Any, new))
        self._call_seconds = Histogram(
            "call_seconds", "How long calls took.", ("method",), buckets=_CALL_SECONDS, **cast(Any, new)
        )
        self._steps = {
            "hsm": Histogram(
                "hsm_seconds",
                "How long operations of the token took, waiting for a lane included.",
                ("operation",),
                buckets=_STEP_SECONDS,
                **cast(Any, new),
            ),
            "store": Histogram(
                "store_seconds",
                "How long the database took, waiting for a connection or a batch included.",
                ("operation",),
                buckets=_STEP_SECONDS,
                **cast(Any, new),
            ),
        }
        self._batch_entries = Histogram(
            "ledger_batch_entries", "How many uses were settled by one commit.", buckets=_BATCH_ENTRIES, **cast(Any, new)
        )
        self._commit_seconds = Histogram(
            "ledger_commit_seconds", "How long the ledger's commits took.", buckets=_STEP_SECONDS, **cast(Any, new)
        )
        # Looking a child up by its labels costs as much as counting.
        self._calls_of: dict[tuple[str, str], Counter] = {}
        self._seconds_of: dict[str, Histogram] = {}

    def ended(self, method: str, outcome: str, code: str, request_id: str, seconds: float) -> None:
        """Count a call: *outcome* is OK or a reason, *code* the name of the gRPC code."""
        counted = self._calls_of.get((method, code))
        if counted is None:
            counted = self._calls_of[method, code] = self._calls.labels(method, code)
        timed = self._seconds_of.get(method)
        if timed is None:
            timed = self._seconds_of[method] = self._call_seconds.labels(method)
        counted.inc()
        timed.observe(seconds)
        self.spans.end(outcome, code, request_id)

    def settled(self, entries: int, seconds: float) -> None:
        """Count a batch of the ledger."""
        self._batch_entries.observe(entries)
        self._commit_seconds.observe(seconds)

    def timed(self, kind: str, operation: str, method: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
        """Return *method* timed as an *operation* of a *kind*, `hsm` or `store`, and with a span of its own in traces."""
        observe = self._steps[kind].labels(operation).observe

        async def timed(*args: P.args, **kwargs: P.kwargs) -> T:
            began = perf_counter()
            try:
                return await method(*args, **kwargs)
            finally:
                observe(perf_counter() - began)

        if self._spans is None:
            return timed
        name, step = f"{kind} {operation}", self._spans.step

        async def traced(*args: P.args, **kwargs: P.kwargs) -> T:
            with step(name):
                return await timed(*args, **kwargs)

        return traced

    def observed(self, part: T, kind: str, *methods: str, of: str = "") -> T:
        """Return *part* with its *methods* `timed`, each as the operation *of* + its name; all else of it is as it was."""
        return cast(T, _Observed(part, {name: self.timed(kind, of + name, getattr(part, name)) for name in methods}))


class _Observed:
    """Stands for a part: what is timed is an attribute of it, and all else the part's own."""

    def __init__(self, part: object, methods: dict[str, Callable[..., Any]]) -> None:
        self._part = part
        self.__dict__.update(methods)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the part has
        return getattr(self._part, name)
