"""
The numbers of several processes, in files that prometheus-client shares among them (`PROMETHEUS_MULTIPROC_DIR`).

Collectors of our own are not seen there, so these are prometheus-client's counters, gauges and histograms, each gauge
with the way in which processes are put together. It keeps no exemplars there.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from ..errors import RegistryClash
from ..events import OUTCOMES, Ended, Failed, LoopBlocked, Retrying, Succeeded, TaskRun, TimedOut
from ..policies import registered_tasks
from . import families as f
from ._series import STATES, Series, ages, whole_life
from .families import Family
from .metrics import OTHER, Bounds, Watched, build_info

#: How often gauges that grow by themselves are written, in seconds.
SAMPLE_EVERY = 5.0


def all_processes() -> CollectorRegistry:
    """A registry that tells the sums over all processes; those that are dead no longer count as running anything."""
    directory = Path(os.environ["PROMETHEUS_MULTIPROC_DIR"])
    for pid in {int(found[1]) for file in directory.glob("gauge_live*.db") if (found := _PID.search(file.name))}:
        if not _alive(pid):
            mark_process_dead(pid)  # type: ignore[no-untyped-call]  # not typed there
    registry = CollectorRegistry(support_collectors_without_names=True)  # or `name[]` finds nothing
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]  # same
    return registry


_PID = re.compile(r"_(\d+)\.db$")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class SharedBook:
    """One process's part of the numbers, in the shared files."""

    def __init__(self, registry: CollectorRegistry) -> None:
        directory = Path(os.environ["PROMETHEUS_MULTIPROC_DIR"])
        if not directory.is_dir():
            raise FileNotFoundError(
                f"PROMETHEUS_MULTIPROC_DIR={str(directory)!r} is no directory; create it before the workers start"
            )
        self._lock = threading.Lock()
        self.by_task: dict[str, SharedSeries] = {}
        try:
            self.families: dict[Family, Any] = {family: _make(family, registry) for family in f.FAMILIES}
        except ValueError as error:
            raise RegistryClash(
                f"the registry already has one of aftertask's metrics, put there by somebody else: {error}; "
                f"give Settings(registry=…) a registry without it, or rename that metric"
            ) from error
        for label in ("task", "error_type"):
            self.families[f.LABEL_OVERFLOW].labels(label)
        self.families[f.SELF_ERRORS].labels(f.INTERCEPTION)
        self.bounds = Bounds(self._overflow)
        self.families[f.BUILD_INFO].labels(*build_info()).set(1)
        self.families[f.LOOP_BLOCKED].labels(f.NO_TASK)
        self.watched = Watched()
        self._sampler: threading.Thread | None = None
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._start_over)

    def of(self, run: TaskRun) -> SharedSeries:
        """The numbers of a run's task."""
        series = self.by_task.get(run.task)
        return self._new(run) if series is None else series

    def _new(self, run: TaskRun) -> SharedSeries:
        self._sample_from_now_on()
        with self._lock:
            if run.task in self.by_task:
                return self.by_task[run.task]
            label = self.bounds.task(run)
            series = self.by_task.get(label) or self._make(label)
            if label != OTHER:
                self.families[f.TASK_INFO].labels(label, "local", run.plan.owner or "", run.plan.executor).set(1)
            return series

    def _make(self, label: str) -> SharedSeries:
        series = self.by_task[label] = SharedSeries((label, "local"), self)
        return series

    def register(self, name: str, owner: str, executor: str) -> None:
        """Give a task its series before its first run, all at 0."""
        self._sample_from_now_on()
        with self._lock:
            if name not in self.by_task:
                self._make(name)
                self.families[f.TASK_INFO].labels(name, "local", owner, executor).set(1)

    def count_self_error(self, component: str) -> None:
        """Something of ours raised."""
        self.families[f.SELF_ERRORS].labels(component).inc()

    def count_alerts(self, channel: str, status: str, count: int) -> None:
        """So many bad runs have been told to a channel, or not."""
        self.families[f.ALERTS].labels(channel, status).inc(count)
        self.families[f.ALERT_DELIVERY].labels(channel)

    def observe_alert_delivery(self, channel: str, seconds: float) -> None:
        """A delivery took so long."""
        self.families[f.ALERT_DELIVERY].labels(channel).observe(seconds)

    def set_alert_queue(self, channel: str, length: int) -> None:
        """So many kinds of failure wait for a channel."""
        self.families[f.ALERT_QUEUE].labels(channel).set(length)

    def lag(self, seconds: float) -> None:
        """How late the event loop was."""
        self.families[f.LOOP_LAG].observe(seconds)

    def blocked_for(self, run: TaskRun | None, seconds: float) -> None:
        """So many more seconds in which it did not answer, because of this run."""
        task = f.NO_TASK if run is None else self.of(run).labels[0]
        self.families[f.LOOP_BLOCKED].labels(task).inc(seconds)

    def blocked(self, report: LoopBlocked) -> None:
        """It was counted as it happened."""

    def _overflow(self, label: str) -> None:
        self.families[f.LABEL_OVERFLOW].labels(label).inc()

    def _start_over(self) -> None:
        # A fork leaves the sampler's thread behind, and what the parent counted is the parent's.
        self._lock, self._sampler = threading.Lock(), None
        self.by_task.clear()
        self.bounds = Bounds(self._overflow)

    def _sample_from_now_on(self) -> None:
        with self._lock:
            if self._sampler is None:
                self._sampler = threading.Thread(target=self._sample, name="aftertask-ages", daemon=True)
                self._sampler.start()

    def _sample(self) -> None:
        pause = threading.Event()
        while not pause.wait(SAMPLE_EVERY):
            self.sample()

    def sample(self) -> None:
        """Write what grows without an event: ages, and which runs are queued by now."""
        for entry in registered_tasks():
            self.register(entry.name, entry.policy.owner or "", entry.executor)
        for series in list(self.by_task.values()):
            series.sample()
        for task, seconds in list(self.watched.timeouts.items()):
            if task in self.by_task:
                self.families[f.TASK_TIMEOUT].labels(task).set(seconds)
        for family, values in self.watched.read().items():
            for label, value in values.items():
                self.families[family].labels(label).set(value)


def _make(family: Family, registry: CollectorRegistry) -> Any:
    if family.kind == "counter":
        return Counter(family.full_name, family.help, family.labels, registry=registry)
    if family.kind == "gauge":
        return Gauge(family.full_name, family.help, family.labels, registry=registry, multiprocess_mode=family.mode)  # type: ignore[arg-type]  # "" is no gauge's
    return Histogram(family.full_name, family.help, family.labels, registry=registry, buckets=family.buckets)


class SharedSeries:
    """All the numbers of one task, each child looked up once."""

    def __init__(self, labels: tuple[str, str], book: SharedBook) -> None:
        self.labels = labels
        self._error_type: Callable[[str, str], str] = book.bounds.error_type
        # What is in flight is counted as in one process, and written as gauges.
        self._here = Series(labels, lambda task, kind: kind)
        self._queued = self._running = self._backoff = 0
        of = book.families
        self._scheduled, self._bad, self._retries = (
            of[family].labels(*labels) for family in (f.SCHEDULED, f.BAD, f.RETRIES)
        )
        self._finished = {outcome: of[f.FINISHED].labels(*labels, outcome) for outcome in OUTCOMES}
        self._not_run, self._hazards, self._errors = of[f.NOT_RUN], of[f.HAZARDS], of[f.ERRORS]
        for outcome, reason in f.NOT_RUN_REASONS:
            self._not_run.labels(labels[0], outcome, reason)
        self._wait, self._end_to_end = of[f.WAIT].labels(*labels), of[f.END_TO_END].labels(*labels)
        self._ok, self._error = (of[f.ATTEMPT].labels(*labels, result) for result in ("ok", "error"))
        self._inflight = {state: of[f.INFLIGHT].labels(*labels, state) for state in STATES}
        of[f.LOOP_BLOCKED].labels(labels[0])
        self._abandoned = of[f.ABANDONED].labels(labels[0])
        self._ages = of[f.OLDEST_QUEUED].labels, of[f.OLDEST_RUNNING].labels
        self._last_success, self._last_failure = of[f.LAST_SUCCESS].labels, of[f.LAST_FAILURE].labels

    def schedule(self, run: TaskRun) -> None:
        """A run came into being."""
        self._here.schedule(run)
        self._scheduled.inc()
        self._write_inflight()

    def succeed(self, event: Succeeded) -> None:
        """The most frequent end."""
        self._here.succeed(event)
        self._waited(event.run)
        self._ok.observe(event.duration_s)
        self._end_to_end.observe(whole_life(event))
        self._finished["succeeded"].inc()
        self._last_success(*self.labels).set(event.timestamp)
        self._write_inflight()

    def retry(self, event: Retrying) -> None:
        """An attempt raised, and another will follow."""
        self._here.retry(event)
        self._retries.inc()
        self._attempt_failed(event)
        self._write_inflight()

    def end(self, event: Ended) -> None:
        """A run ended, in any other way than by success."""
        self._here.end(event)
        self._waited(event.run)
        self._finished[event.outcome].inc()
        if event.bad:
            self._bad.inc()
        if isinstance(event, (Failed, TimedOut)):
            self._attempt_failed(event)
            self._end_to_end.observe(whole_life(event))
            self._last_failure(*self.labels).set(event.timestamp)
        elif event.run.attempt == 0 and event.outcome != "cancelled":
            self._not_run.labels(self.labels[0], event.outcome, getattr(event, "reason", "other")).inc()
        self._write_inflight()

    def hazard(self, kind: str) -> None:
        """Something was found."""
        self._hazards.labels(self.labels[0], kind).inc()

    def abandon(self, change: int) -> None:
        """So many threads more go on that nobody waits for."""
        self._abandoned.inc(change)

    def sample(self) -> None:
        """Write the gauges that change by themselves."""
        states = self._here.states()
        self._queued, self._running, self._backoff = (len(states[at]) for at in ("queued", "running", "backoff"))
        self._write_inflight()
        for labels, age in zip(self._ages, ages(states), strict=True):
            labels(*self.labels).set(age or 0.0)

    def _waited(self, run: TaskRun) -> None:
        wait = run.queue_wait_s
        if wait is not None:
            self._wait.observe(wait)

    def _attempt_failed(self, event: Failed | TimedOut | Retrying) -> None:
        self._error.observe(event.duration_s)
        self._errors.labels(*self.labels, self._error_type(self.labels[0], event.failure.type)).inc()

    def _write_inflight(self) -> None:
        # In which state each run is, is looked up by the sampler only: there may be thousands. Their sum is exact.
        live = len(self._here.live)
        running = min(self._running, live)
        queued = min(self._queued, live - running)
        backoff = min(self._backoff, live - running - queued)
        self._inflight["running"].set(running)
        self._inflight["queued"].set(queued)
        self._inflight["backoff"].set(backoff)
        self._inflight["scheduled"].set(live - running - queued - backoff)
