"""The numbers of one task in one process, as plain counts under a lock, and how they are told when Prometheus asks."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from threading import Lock
from typing import TypeAlias

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, Exemplar, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.utils import floatToGoString

from .. import _clock
from ..events import OUTCOMES, Ended, Failed, Retrying, SpanContext, Succeeded, TaskRun, TimedOut
from . import families as f
from .families import Family

ExemplarOf: TypeAlias = tuple[SpanContext, float, float]  # a span, its value, seconds since the epoch

STATES = ("scheduled", "queued", "running", "backoff")


def sampled(run: TaskRun) -> SpanContext | None:
    """The span of the run's attempt, if it is one that will be seen; exemplars name no other."""
    span = run.span_context
    return span if span is not None and span.trace_flags & 1 else None


def whole_life(event: Succeeded | Failed | TimedOut) -> float:
    """Seconds from being scheduled to the end of the last attempt."""
    run = event.run
    return (run.started_s or run.scheduled_s) - run.scheduled_s + event.duration_s


class Counts:
    """A histogram's counts by bucket, its sum, and the last exemplar of each bucket; its owner holds the lock."""

    __slots__ = ("bounds", "counts", "exemplars", "sum")

    def __init__(self, family: Family) -> None:
        self.bounds = family.buckets
        self.counts = [0] * (len(self.bounds) + 1)
        self.exemplars: list[ExemplarOf | None] = [None] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, span: SpanContext | None, timestamp: float) -> None:
        """Count a value, and remember its span."""
        at = bisect_left(self.bounds, value)
        self.counts[at] += 1
        self.sum += value
        if span is not None:
            self.exemplars[at] = (span, value, timestamp)

    def copy(self) -> Counts:
        """The same counts, to add to."""
        twin = Counts.__new__(Counts)
        twin.bounds, twin.counts, twin.exemplars, twin.sum = self.bounds, self.counts[:], self.exemplars[:], self.sum
        return twin

    def tell(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        """Add this to a family, its counts cumulated as the exposition wants them."""
        total = 0
        buckets: list[tuple[str, float] | tuple[str, float, Exemplar]] = []
        for bound, count, held in zip((*self.bounds, float("inf")), self.counts, self.exemplars, strict=True):
            total += count
            edge: str = floatToGoString(bound)  # type: ignore[no-untyped-call]  # not typed there
            buckets.append((edge, total) if held is None else (edge, total, exemplar(held)))
        family.add_metric(labels, buckets, self.sum)


def exemplar(held: ExemplarOf) -> Exemplar:
    """An exemplar as prometheus-client wants it."""
    span, value, timestamp = held
    return Exemplar({"trace_id": f"{span.trace_id:032x}", "span_id": f"{span.span_id:016x}"}, value, timestamp)


class Series:
    """
    All the numbers of one task on one engine.

    Args:
        labels: Its `task` and `engine`.
        error_type: Folds an exception class's name into `__other__` where there are too many.
    """

    __slots__ = (
        "_error_type",
        "abandoned",
        "bad",
        "end_to_end",
        "error",
        "errors",
        "finished",
        "hazards",
        "labels",
        "last_failure",
        "last_success",
        "live",
        "lock",
        "not_run",
        "ok",
        "retries",
        "scheduled",
        "wait",
    )

    def __init__(self, labels: tuple[str, str], error_type: Callable[[str, str], str]) -> None:
        self.labels = labels
        self._error_type = error_type
        self.lock = Lock()  # several loops, worker threads, free-threaded builds
        self.scheduled = self.bad = self.retries = self.abandoned = 0
        self.finished: dict[str, int] = dict.fromkeys(OUTCOMES, 0)
        self.not_run: dict[tuple[str, str], int] = dict.fromkeys(f.NOT_RUN_REASONS, 0)
        self.hazards: dict[str, int] = {}
        self.errors: dict[str, tuple[int, ExemplarOf | None]] = {}
        self.live: dict[TaskRun, None] = {}
        self.wait, self.end_to_end = Counts(f.WAIT), Counts(f.END_TO_END)
        self.ok, self.error = Counts(f.ATTEMPT), Counts(f.ATTEMPT)
        self.last_success: float | None = None
        self.last_failure: float | None = None

    def schedule(self, run: TaskRun) -> None:
        """A run came into being."""
        self.lock.acquire()  # half the cost of `with`
        try:
            self.scheduled += 1
            self.live[run] = None
        finally:
            self.lock.release()

    def succeed(self, event: Succeeded) -> None:
        """The most frequent end."""
        run, timestamp, lasted = event.run, event.timestamp, event.duration_s
        span = run.span_context
        if span is not None and not span[3] & 1:
            span = None
        wait, whole = run.queue_wait_s, (run.started_s or 0.0) - run.scheduled_s + lasted
        self.lock.acquire()
        try:
            self.live.pop(run, None)
            self.finished["succeeded"] += 1
            self.last_success = timestamp
            # Counts.observe three times, written out: the calls would be a tenth of what is done here.
            if wait is not None:
                counts = self.wait
                at = bisect_left(counts.bounds, wait)
                counts.counts[at] += 1
                counts.sum += wait
                if span is not None:
                    counts.exemplars[at] = (span, wait, timestamp)
            counts = self.ok
            at = bisect_left(counts.bounds, lasted)
            counts.counts[at] += 1
            counts.sum += lasted
            if span is not None:
                counts.exemplars[at] = (span, lasted, timestamp)
            counts = self.end_to_end
            at = bisect_left(counts.bounds, whole)
            counts.counts[at] += 1
            counts.sum += whole
            if span is not None:
                counts.exemplars[at] = (span, whole, timestamp)
        finally:
            self.lock.release()

    def retry(self, event: Retrying) -> None:
        """An attempt raised, and another will follow."""
        with self.lock:
            self.retries += 1
            self._attempt_failed(event)

    def end(self, event: Ended) -> None:
        """A run ended, in any other way than by success."""
        run = event.run
        with self.lock:
            self.live.pop(run, None)
            self.finished[event.outcome] += 1
            self.bad += event.bad
            wait = run.queue_wait_s
            if wait is not None:
                self.wait.observe(wait, sampled(run), event.timestamp)
            if isinstance(event, (Failed, TimedOut)):
                self._attempt_failed(event)
                self.end_to_end.observe(whole_life(event), sampled(run), event.timestamp)
                self.last_failure = event.timestamp
            elif run.attempt == 0 and event.outcome != "cancelled":
                key = (event.outcome, getattr(event, "reason", "other"))
                self.not_run[key] = self.not_run.get(key, 0) + 1

    def _attempt_failed(self, event: Failed | TimedOut | Retrying) -> None:
        span = sampled(event.run)
        self.error.observe(event.duration_s, span, event.timestamp)
        kind = self._error_type(self.labels[0], event.failure.type)
        held = None if span is None else (span, 1.0, event.timestamp)
        count, before = self.errors.get(kind, (0, None))
        self.errors[kind] = (count + 1, held or before)

    def hazard(self, kind: str) -> None:
        """Something was found."""
        with self.lock:
            self.hazards[kind] = self.hazards.get(kind, 0) + 1

    def abandon(self, change: int) -> None:
        """So many threads more go on that nobody waits for."""
        with self.lock:
            self.abandoned += change

    def states(self) -> dict[str, list[TaskRun]]:
        """The runs that have not ended, by their state."""
        with self.lock:
            live = list(self.live)
        states: dict[str, list[TaskRun]] = {state: [] for state in STATES}
        for run in live:
            states.get(run.state, states["running"]).append(run)  # one that is just ending has not been counted yet
        return states

    def waits(self, running: Sequence[TaskRun]) -> Counts:
        """The waits of all runs that have started: those that are still running are counted when they end."""
        told, now = self.wait.copy(), _clock.timestamp()
        for run in running:
            wait = run.queue_wait_s
            if wait is not None:
                told.observe(wait, sampled(run), now)
        return told


def ages(states: dict[str, list[TaskRun]]) -> tuple[float | None, float | None]:
    """Seconds that the oldest queued run has waited and the oldest running one has run; None where none does."""
    now = _clock.monotonic()
    queued = [run.queued_s for run in states["queued"] if run.queued_s is not None]
    started = [run.started_s for run in states["running"] if run.started_s is not None]
    return max(0.0, now - min(queued)) if queued else None, max(0.0, now - min(started)) if started else None


def tell(all_series: Sequence[Series]) -> Iterator[Metric]:
    """The metric families of these series."""
    counters = {
        family: CounterMetricFamily(family.full_name, family.help, labels=family.labels) for family in _COUNTERS
    }
    gauges = {family: GaugeMetricFamily(family.full_name, family.help, labels=family.labels) for family in _GAUGES}
    histograms = {
        family: HistogramMetricFamily(family.full_name, family.help, labels=family.labels) for family in _HISTOGRAMS
    }
    for series in all_series:
        states = series.states()
        _tell_gauges(series, states, gauges)
        with series.lock:
            _tell_counters(series, counters)
            series.waits(states["running"]).tell(histograms[f.WAIT], series.labels)
            series.ok.tell(histograms[f.ATTEMPT], (*series.labels, "ok"))
            series.error.tell(histograms[f.ATTEMPT], (*series.labels, "error"))
            series.end_to_end.tell(histograms[f.END_TO_END], series.labels)
    yield from counters.values()
    yield from gauges.values()
    yield from histograms.values()


_COUNTERS = (f.SCHEDULED, f.FINISHED, f.NOT_RUN, f.BAD, f.RETRIES, f.ERRORS, f.HAZARDS)
_GAUGES = (f.INFLIGHT, f.ABANDONED, f.OLDEST_QUEUED, f.OLDEST_RUNNING, f.LAST_SUCCESS, f.LAST_FAILURE)
_HISTOGRAMS = (f.WAIT, f.ATTEMPT, f.END_TO_END)


def _tell_counters(series: Series, counters: dict[Family, CounterMetricFamily]) -> None:
    labels = series.labels
    counters[f.SCHEDULED].add_metric(labels, series.scheduled)
    counters[f.BAD].add_metric(labels, series.bad)
    counters[f.RETRIES].add_metric(labels, series.retries)
    for outcome, count in series.finished.items():
        counters[f.FINISHED].add_metric((*labels, outcome), count)
    for (outcome, reason), count in series.not_run.items():
        counters[f.NOT_RUN].add_metric((labels[0], outcome, reason), count)
    for kind, (count, held) in series.errors.items():
        counters[f.ERRORS].add_metric((*labels, kind), count, exemplar=None if held is None else exemplar(held))
    for kind, count in series.hazards.items():
        counters[f.HAZARDS].add_metric((labels[0], kind), count)


def _tell_gauges(series: Series, states: dict[str, list[TaskRun]], gauges: dict[Family, GaugeMetricFamily]) -> None:
    labels = series.labels
    for state, runs in states.items():
        gauges[f.INFLIGHT].add_metric((*labels, state), len(runs))
    gauges[f.ABANDONED].add_metric(labels[:1], series.abandoned)
    queued, running = ages(states)
    known = (
        (f.OLDEST_QUEUED, queued),
        (f.OLDEST_RUNNING, running),
        (f.LAST_SUCCESS, series.last_success),
        (f.LAST_FAILURE, series.last_failure),
    )
    for family, value in known:
        if value is not None:
            gauges[family].add_metric(labels, value)
