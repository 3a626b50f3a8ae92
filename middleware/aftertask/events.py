"""`TaskRun`, the events of a run's life, and `Signal`, the base class of everything that listens to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ._events import (
    EVENTS,
    Abandoned,
    AbandonedEnded,
    Cancelled,
    Dropped,
    Ended,
    Expired,
    Failed,
    Failure,
    HazardFound,
    LoopBlocked,
    Lost,
    Offloaded,
    OffloadFailed,
    Rejected,
    Retrying,
    Scheduled,
    Skipped,
    Slow,
    Started,
    Stuck,
    Succeeded,
    TaskEvent,
    TimedOut,
)
from ._stored import StoredRun, cancel_run, get_run
from ._taskrun import (
    OUTCOMES,
    Note,
    Outcome,
    Progress,
    RequestInfo,
    SpanContext,
    TaskInfo,
    TaskRun,
    current_run,
    progress,
)

__all__ = [
    "EVENTS",
    "OUTCOMES",
    "Abandoned",
    "AbandonedEnded",
    "Cancelled",
    "Dropped",
    "Ended",
    "Expired",
    "Failed",
    "Failure",
    "HazardFound",
    "LoopBlocked",
    "Lost",
    "Note",
    "OffloadFailed",
    "Offloaded",
    "Outcome",
    "Pool",
    "Progress",
    "Rejected",
    "RequestInfo",
    "Retrying",
    "Scheduled",
    "Signal",
    "Skipped",
    "Slow",
    "SpanContext",
    "Started",
    "StoredRun",
    "Stuck",
    "Succeeded",
    "TaskEvent",
    "TaskInfo",
    "TaskRun",
    "TimedOut",
    "cancel_run",
    "current_run",
    "get_run",
    "progress",
]


class Pool(Protocol):
    """Something with a limit whose use is measured: a concurrency limiter or a thread pool."""

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> float: ...
    @property
    def in_use(self) -> float: ...
    @property
    def waiting(self) -> float: ...


class Signal:
    """
    Base class of signals: override the methods for the events you want.

    Methods are called synchronously, must not do I/O on the event loop, and cannot break a run: an exception is logged
    as `signal.failed`, counted, and contained. `scheduled` and `rejected` may be called in a worker thread; `slow`,
    `stuck`, `hazard_found`, `abandoned_ended` and the `loop_…` methods are called from other threads; all others run on
    the event loop, in the context of the run. Events that no signal wants are not built.

    A plain function that takes every event is also a signal.
    """

    def scheduled(self, event: Scheduled) -> None:
        """A run was scheduled."""

    def started(self, event: Started) -> None:
        """An attempt begins."""

    def retrying(self, event: Retrying) -> None:
        """An attempt raised, and another follows."""

    def succeeded(self, event: Succeeded) -> None:
        """The function returned."""

    def failed(self, event: Failed) -> None:
        """The last attempt raised."""

    def timed_out(self, event: TimedOut) -> None:
        """The timeout ended the last attempt."""

    def cancelled(self, event: Cancelled) -> None:
        """A started run was cancelled from outside."""

    def skipped(self, event: Skipped) -> None:
        """An earlier run of the batch failed."""

    def dropped(self, event: Dropped) -> None:
        """The request ended without starting the run."""

    def rejected(self, event: Rejected) -> None:
        """The run was not accepted."""

    def expired(self, event: Expired) -> None:
        """The run's deadline passed before it started."""

    def lost(self, event: Lost) -> None:
        """The run will never run or finish."""

    def offloaded(self, event: Offloaded) -> None:
        """The run was handed to another engine."""

    def offload_failed(self, event: OffloadFailed) -> None:
        """An engine did not take the run."""

    def slow(self, event: Slow) -> None:
        """An attempt passed `slow_after`."""

    def stuck(self, event: Stuck) -> None:
        """An attempt passed `stuck_after`."""

    def abandoned(self, event: Abandoned) -> None:
        """A sync attempt passed its timeout; its thread continues."""

    def abandoned_ended(self, event: AbandonedEnded) -> None:
        """The thread of an abandoned attempt ended."""

    def hazard_found(self, event: HazardFound) -> None:
        """A hazard was found."""

    def arrived(self, run: TaskRun) -> None:
        """A run that was scheduled elsewhere continues in this process."""

    def departed(self, run: TaskRun) -> None:
        """A run leaves this process without having ended; it continues where its engine decides."""

    def open(self) -> None:
        """The app starts; called on its event loop, and only if the server runs the lifespan."""

    def close(self) -> None:
        """The app has stopped."""

    def batch_started(self) -> None:
        """A batch starts on this event loop; called only if the server does not run the lifespan."""

    def task_known(self, info: TaskInfo) -> None:
        """A task was resolved for the first time, or is known by name before its first run."""

    def engine_known(self, name: str) -> None:
        """An engine with this name exists."""

    def pool_known(self, pool: Pool, *, threads: bool) -> None:
        """A concurrency limiter exists, or, with `threads`, a thread pool; read it whenever metrics are collected."""

    def self_error(self, component: str) -> None:
        """A component of aftertask raised, and the error was contained."""

    def loop_lag(self, seconds: float) -> None:
        """How late the event loop responded, a few times per second."""

    def loop_blocked_for(self, run: TaskRun | None, seconds: float) -> None:
        """The event loop was blocked for this many more seconds; run is None if no background task is to blame."""

    def loop_blocked(self, report: LoopBlocked) -> None:
        """The event loop was blocked; at most once per task and minute."""

    def same_provider(self, tracer: object) -> bool:
        """Whether this OpenTelemetry tracer uses the same provider as this signal's own spans."""
        return False

    async def admit(self, runs: Sequence[TaskRun]) -> None:
        """Awaited when a response starts, with the runs it carries; an exception fails the request."""


#: The method that handles each kind of event.
METHODS: dict[type[TaskEvent], str] = {
    Scheduled: "scheduled",
    Started: "started",
    Retrying: "retrying",
    Succeeded: "succeeded",
    Failed: "failed",
    TimedOut: "timed_out",
    Cancelled: "cancelled",
    Skipped: "skipped",
    Dropped: "dropped",
    Rejected: "rejected",
    Expired: "expired",
    Lost: "lost",
    Offloaded: "offloaded",
    OffloadFailed: "offload_failed",
    Slow: "slow",
    Stuck: "stuck",
    Abandoned: "abandoned",
    AbandonedEnded: "abandoned_ended",
    HazardFound: "hazard_found",
}
