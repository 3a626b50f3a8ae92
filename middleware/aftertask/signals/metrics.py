"""Prometheus metrics of every task, run and event loop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

from anyio.lowlevel import RunVar
from prometheus_client import REGISTRY, CollectorRegistry

from .._taskrun import JOURNAL, LOCAL, TaskInfo, TaskRun
from ..events import (
    Abandoned,
    AbandonedEnded,
    Cancelled,
    Dropped,
    Ended,
    Expired,
    Failed,
    HazardFound,
    Lost,
    Offloaded,
    OffloadFailed,
    Pool,
    Rejected,
    Retrying,
    Scheduled,
    Signal,
    Skipped,
    Started,
    Succeeded,
    TimedOut,
)
from . import families as f
from ._instruments import TaskSeries
from ._metric_set import metric_set
from ._several_workers import warn_of_several_workers
from .journal_metrics import JournalMetrics

NotRun: TypeAlias = Skipped | Dropped | Rejected | Expired | Lost


class Metrics(Signal):
    """
    Counts, durations and ages of every task (`docs/telemetry.md`, Metrics), in a Prometheus registry.

    Any number of apps may share a registry: they then share the metrics. With `PROMETHEUS_MULTIPROC_DIR` set, one
    scrape shows the sum over all workers, without exemplars, which prometheus-client does not keep there.

    Args:
        registry: Where the families are registered; None means prometheus-client's own registry.
        tasks: Names of tasks whose series exist from the start, besides those that `@task` registered.
        engine: Where these tasks run.

    Raises:
        RegistryClash: The registry holds a family of the same name that is not aftertask's.
        FileNotFoundError: `PROMETHEUS_MULTIPROC_DIR` is not a directory.
    """

    def __init__(
        self, registry: CollectorRegistry | None = None, *, tasks: Iterable[str] = (), engine: str = LOCAL
    ) -> None:
        self._registry = REGISTRY if registry is None else registry
        self._set = metric_set(self._registry)
        self._of, self._series = self._set.of, self._set.series
        # By loop: without a lifespan, each request of a TestClient has a new one.
        self._has_seen_loop: RunVar[bool] = RunVar(f"aftertask_metrics_{id(self)}", False)
        self._is_alone = self._set.workers is None
        for name in tasks:
            self._set.declare(name, engine)
        self._set.declare_registered(engine)
        if self._is_alone:
            warn_of_several_workers()

    # --- the app

    def open(self) -> None:
        """The app starts."""
        self._set.stay_in(self._registry)
        self._set.start()
        if self._is_alone:
            warn_of_several_workers()  # only now, if the app was built before its server forked the workers

    def batch_started(self) -> None:
        """A batch starts: on a loop that has not been seen, the app may have started, or its registry been emptied."""
        if not self._has_seen_loop.get():
            self._has_seen_loop.set(True)
            self.open()

    def task_known(self, info: TaskInfo) -> None:
        """Create a registered task's series; others are created by their first run."""
        if info.registered:
            self._set.declare(info.task, info.engine)
        if self._set.has(info):
            self._set.describe_task(info)

    def engine_known(self, name: str) -> None:
        """Create an engine's series."""
        for status in ("ok", "error", "fallback"):
            self._of.counters[f.OFFLOAD].labels(name, status)
        self._of.histograms[f.OFFLOAD_SECONDS].labels(name)

    def pool_known(self, pool: Pool, *, threads: bool) -> None:
        """Expose a limiter or a thread pool."""
        self._set.watch(pool, f.THREADPOOL if threads else f.CONCURRENCY)

    # --- the life of a run

    def scheduled(self, event: Scheduled) -> None:
        """A run came into being."""
        self._set.start()
        self._set.schedule(event.run)

    def arrived(self, run: TaskRun) -> None:
        """A run goes on here; it was counted as scheduled elsewhere."""
        self._set.start()
        self._set.arrive(run)

    def departed(self, run: TaskRun) -> None:
        """A run goes on elsewhere."""
        with self._set.lock:
            self._series(run).remove(run)

    def started(self, event: Started) -> None:
        """An attempt begins; before the first one the run has waited."""
        if event.queue_wait_s is not None:
            self._series(event.run).wait.observe(event.queue_wait_s, self._exemplar(event.run))

    def retrying(self, event: Retrying) -> None:
        """An attempt raised, and another follows."""
        series = self._series(event.run)
        series.retries.inc()
        self._attempt_raised(series, event, self._exemplar(event.run))

    def succeeded(self, event: Succeeded) -> None:
        """The function returned."""
        series, exemplar = self._ended(event), self._exemplar(event.run)
        series.ok.observe(event.duration_s, exemplar)
        series.end_to_end.observe(_end_to_end_s(event), exemplar)
        series.last_success.set(event.timestamp)

    def _failed(self, event: Failed | TimedOut) -> None:
        """The last attempt raised, or passed its timeout."""
        series, exemplar = self._ended(event), self._exemplar(event.run)
        self._attempt_raised(series, event, exemplar)
        series.end_to_end.observe(_end_to_end_s(event), exemplar)
        series.last_failure.set(event.timestamp)

    failed = timed_out = _failed

    def cancelled(self, event: Cancelled) -> None:
        """A started run was cancelled from outside; how long its attempt took says nothing."""
        self._ended(event)

    def offloaded(self, event: Offloaded) -> None:
        """The run was handed to another engine."""
        self._ended(event)
        if event.engine != JOURNAL:
            self._handed_over(event.engine, "ok", event.duration_s)

    def offload_failed(self, event: OffloadFailed) -> None:
        """An engine did not take the run."""
        self._handed_over(event.engine, "fallback" if event.falls_back else "error", event.duration_s)

    def _not_run(self, event: NotRun) -> None:
        """The run never started, or will never finish."""
        series = self._ended(event)
        if event.run.attempt == 0:
            # Not by `labels`: this thread may hold its lock, where garbage collection ends the run.
            series.not_run[event.outcome, event.reason].inc()

    skipped = dropped = rejected = expired = _not_run

    def lost(self, event: Lost) -> None:
        """The run will never run or finish; one of a dead worker was scheduled in that worker's metrics."""
        if event.dead is not None:  # it was never counted there: the journal had it
            self._set.lose(event.run)
        elif event.reason != "crash" or event.run.engine != LOCAL:
            self._not_run(event)
        elif self._is_alone:  # else the sweep over the dead worker's files counts it
            self._set.lose(event.run)

    # --- threads, hazards, the event loop

    def abandoned(self, event: Abandoned) -> None:
        """A sync attempt passed its timeout; its thread continues."""
        self._series(event.run).abandoned.inc()

    def abandoned_ended(self, event: AbandonedEnded) -> None:
        """The thread of an abandoned attempt ended."""
        self._series(event.run).abandoned.dec()

    def hazard_found(self, event: HazardFound) -> None:
        """A hazard was found."""
        task, _ = self._series(event.run).labels
        self._of.counters[f.HAZARDS].labels(task, event.kind).inc()

    def loop_lag(self, seconds: float) -> None:
        """How late the event loop responded."""
        self._of.histograms[f.LOOP_LAG].observe(seconds)

    def loop_blocked_for(self, run: TaskRun | None, seconds: float) -> None:
        """The event loop was blocked for this many more seconds."""
        if run is None:
            self._of.counters[f.LOOP_BLOCKED].labels(f.NO_TASK).inc(seconds)
        else:
            self._series(run).loop_blocked.inc(seconds)

    # --- aftertask itself

    def self_error(self, component: str) -> None:
        """A part of aftertask raised, and the error was contained."""
        self._of.counters[f.SELF_ERRORS].labels(component).inc()

    def count_alerts(self, channel: str, status: str, count: int) -> None:
        """Count runs to be alerted by what became of them; a count of 0 creates the series."""
        self._of.counters[f.ALERTS].labels(channel, status).inc(count)
        self._of.histograms[f.ALERT_DELIVERY].labels(channel)

    def observe_alert_delivery(self, channel: str, seconds: float) -> None:
        """The attempt that delivered an alert took this many seconds."""
        self._of.histograms[f.ALERT_DELIVERY].labels(channel).observe(seconds)

    def set_alert_queue(self, channel: str, length: int) -> None:
        """This many alerts wait for a channel."""
        self._of.gauges[f.ALERT_QUEUE].labels(channel).set(length)

    def count_dead_letters(self, task: str, reason: str, count: int) -> None:
        """Count runs of a worker that became dead letters; a count of 0 creates the series."""
        self._set.hidden.discard(f.DEAD_LETTERED)
        self._of.counters[f.DEAD_LETTERED].labels(task, reason).inc(count)

    def for_journal(self) -> JournalMetrics:
        """What counts the work of the app's journal."""
        return JournalMetrics(self._set)

    # --- shared by several events

    def _handed_over(self, engine: str, status: str, seconds: float) -> None:
        self._of.counters[f.OFFLOAD].labels(engine, status).inc()
        self._of.histograms[f.OFFLOAD_SECONDS].labels(engine).observe(seconds)

    def _ended(self, event: Ended) -> TaskSeries:
        series = self._series(event.run)
        with self._set.lock:  # a scrape sees the run either in flight or finished
            series.finished[event.outcome].inc()
            series.remove(event.run)
        if event.bad:
            series.bad.inc()
        return series

    def _attempt_raised(
        self, series: TaskSeries, event: Retrying | Failed | TimedOut, exemplar: dict[str, str] | None
    ) -> None:
        series.error.observe(event.duration_s, exemplar)
        kind = self._set.error_type(series, event.failure.type)
        self._of.counters[f.ERRORS].labels(*series.labels, kind).inc(exemplar=exemplar)

    def _exemplar(self, run: TaskRun) -> dict[str, str] | None:
        """The ids of the attempt's span; None unless it is sampled: an exemplar must lead to a trace that exists."""
        span = run.span_context
        if span is None or not span.trace_flags & 1 or not self._is_alone:
            return None
        return {"trace_id": f"{span.trace_id:032x}", "span_id": f"{span.span_id:016x}"}


def _end_to_end_s(event: Succeeded | Failed | TimedOut) -> float:
    """Seconds from scheduling to the end of the last attempt."""
    run = event.run
    started = run.scheduled_s if run.started_s is None else run.started_s
    return started - run.scheduled_s + event.duration_s
