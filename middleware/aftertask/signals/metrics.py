"""The numbers of every task for Prometheus."""

from __future__ import annotations

import multiprocessing
import os
import platform
import re
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import starlette
from prometheus_client import REGISTRY, CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from .._log import emit
from ..errors import RegistryClash
from ..events import (
    Abandoned,
    AbandonedEnded,
    Cancelled,
    Dropped,
    Ended,
    Expired,
    Failed,
    HazardFound,
    LoopBlocked,
    LoopListener,
    Lost,
    Offloaded,
    Rejected,
    Retrying,
    Scheduled,
    Skipped,
    Succeeded,
    TaskEvent,
    TaskRun,
    TimedOut,
)
from ..policies import registered_tasks
from . import families as f
from ._series import Counts, Series, tell

#: How many tasks that nobody registered have a label of their own; the others are `__other__`.
UNREGISTERED_TASKS = 100
ERROR_TYPES_OF_A_TASK = 20
ERROR_TYPES = 50
OTHER = "__other__"

N = TypeVar("N", int, float)


class SeriesLike(Protocol):
    """What a task's numbers are told, in one process's plain counts or in files shared by several."""

    def schedule(self, run: TaskRun) -> None: ...
    def succeed(self, event: Succeeded) -> None: ...
    def retry(self, event: Retrying) -> None: ...
    def end(self, event: Ended) -> None: ...
    def hazard(self, kind: str) -> None: ...
    def abandon(self, change: int) -> None: ...


class Bounds:
    """Keeps labels few: which tasks and error types have one of their own, and how many were folded."""

    def __init__(self, on_overflow: Callable[[str], None]) -> None:
        self._on_overflow = on_overflow
        self._unregistered = 0
        self._error_types: dict[str, set[str]] = {}
        self._all_error_types: set[str] = set()
        self._warned: set[str] = set()

    def task(self, run: TaskRun) -> str:
        """The task label of a run that has no series yet."""
        if run.plan.registered:
            return run.task
        if self._unregistered < UNREGISTERED_TASKS:
            self._unregistered += 1
            return run.task
        self._fold("task", f"{UNREGISTERED_TASKS} unregistered tasks have a label each; @task registers one for sure")
        return OTHER

    def error_type(self, task: str, kind: str) -> str:
        """The `error_type` label of an exception class."""
        known = self._error_types.setdefault(task, set())
        if kind in known:
            return kind
        new = kind not in self._all_error_types
        if len(known) >= ERROR_TYPES_OF_A_TASK or (new and len(self._all_error_types) >= ERROR_TYPES):
            self._fold("error_type", f"{ERROR_TYPES_OF_A_TASK} a task and {ERROR_TYPES} in all have a label each")
            return OTHER
        known.add(kind)
        self._all_error_types.add(kind)
        return kind

    def _fold(self, label: str, advice: str) -> None:
        self._on_overflow(label)
        if label not in self._warned:
            self._warned.add(label)
            emit("warning", "label.overflow", label=label, folded_into=OTHER, advice=advice)


class Pool(Protocol):
    """What has a limit, uses some of it, and lets others wait: a concurrency limit, a pool of threads."""

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> float: ...
    @property
    def in_use(self) -> float: ...
    @property
    def waiting(self) -> float: ...


class Watched:
    """What is read when Prometheus asks. Whoever is no more is forgotten; of one name there may be several."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pools: weakref.WeakKeyDictionary[Pool, tuple[f.Family, ...]] = weakref.WeakKeyDictionary()
        self.timeouts: dict[str, float] = {}

    def add(self, pool: Pool, families: tuple[f.Family, ...]) -> None:
        """Read this one from now on."""
        with self._lock:
            self._pools[pool] = families

    def read(self) -> dict[f.Family, dict[str, float]]:
        """Each family's value by label."""
        told: dict[f.Family, dict[str, float]] = {family: {} for family in (*f.CONCURRENCY, *f.THREADPOOL)}
        with self._lock:
            pools = list(self._pools.items())
        for pool, families in pools:
            for family, value in zip(families, (pool.size, pool.in_use, pool.waiting), strict=True):
                told[family][pool.name] = told[family].get(pool.name, 0) + value
        return told


class PlainBook(Collector):
    """One process's numbers, kept as plain counts and told when the registry is collected."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._lock = threading.Lock()
        self.by_task: dict[str, Series] = {}
        self._infos: dict[str, tuple[str, str, str, str]] = {}
        self.watched = Watched()
        self._self_errors: dict[str, int] = {f.INTERCEPTION: 0}
        self._overflows: dict[str, int] = {}
        self._alerts: dict[tuple[str, ...], int] = {}
        self._deliveries: dict[str, Counts] = {}
        self._alert_queues: dict[str, int] = {}
        self._lag = Counts(f.LOOP_LAG)
        self._blocked: dict[str, float] = {f.NO_TASK: 0.0}
        self._bounds = Bounds(self._overflow)
        try:
            registry.register(self)
        except ValueError as error:
            raise RegistryClash(
                f"the registry already has one of aftertask's metrics, put there by somebody else: {error}; "
                f"give Settings(registry=…) a registry without it, or rename that metric"
            ) from error

    def of(self, run: TaskRun) -> Series:
        """The numbers of a run's task."""
        series = self.by_task.get(run.task)
        return self._new(run) if series is None else series

    def _new(self, run: TaskRun) -> Series:
        with self._lock:
            if run.task in self.by_task:
                return self.by_task[run.task]
            label = self._bounds.task(run)
            series = self.by_task.get(label) or self._make(label)
            if label != OTHER:
                self._infos[label] = (label, "local", run.plan.owner or "", run.plan.executor)
            return series

    def _make(self, label: str) -> Series:
        series = self.by_task[label] = Series((label, "local"), self._bounds.error_type)
        return series

    def register(self, name: str, owner: str, executor: str) -> None:
        """Give a task its series before its first run, all at 0."""
        with self._lock:
            if name not in self.by_task:
                self._make(name)
                self._infos[name] = (name, "local", owner, executor)

    def count_self_error(self, component: str) -> None:
        """Something of ours raised."""
        with self._lock:
            self._self_errors[component] = self._self_errors.get(component, 0) + 1

    def count_alerts(self, channel: str, status: str, count: int) -> None:
        """So many bad runs have been told to a channel, or not."""
        with self._lock:
            self._alerts[channel, status] = self._alerts.get((channel, status), 0) + count
            self._deliveries.setdefault(channel, Counts(f.ALERT_DELIVERY))

    def observe_alert_delivery(self, channel: str, seconds: float) -> None:
        """A delivery took so long."""
        with self._lock:
            self._deliveries[channel].observe(seconds, None, 0.0)

    def set_alert_queue(self, channel: str, length: int) -> None:
        """So many kinds of failure wait for a channel."""
        self._alert_queues[channel] = length

    def lag(self, seconds: float) -> None:
        """How late the event loop was."""
        with self._lock:
            self._lag.observe(seconds, None, 0.0)

    def blocked_for(self, run: TaskRun | None, seconds: float) -> None:
        """So many more seconds in which it did not answer, because of this run."""
        task = f.NO_TASK if run is None else self.of(run).labels[0]
        with self._lock:
            self._blocked[task] = self._blocked.get(task, 0.0) + seconds

    def blocked(self, report: LoopBlocked) -> None:
        """It was counted as it happened."""

    def _overflow(self, label: str) -> None:
        self._overflows[label] = self._overflows.get(label, 0) + 1

    def describe(self) -> Iterable[Metric]:
        """The families without samples: the registry finds clashes by them."""
        return [Metric(family.full_name, family.help, family.kind) for family in f.FAMILIES]

    def collect(self) -> Iterator[Metric]:
        """Everything, as of now."""
        for entry in registered_tasks():
            self.register(entry.policy.name or entry.name, entry.policy.owner or "", entry.executor)
        with self._lock:
            all_series, infos = list(self.by_task.values()), list(self._infos.values())
            self_errors, overflows = dict(self._self_errors), dict(self._overflows)
            queues = dict(self._alert_queues)
            alerts = dict(self._alerts)
            deliveries = HistogramMetricFamily(
                f.ALERT_DELIVERY.full_name, f.ALERT_DELIVERY.help, labels=f.ALERT_DELIVERY.labels
            )
            for channel, counts in self._deliveries.items():
                counts.tell(deliveries, (channel,))
            lag = HistogramMetricFamily(f.LOOP_LAG.full_name, f.LOOP_LAG.help, labels=())
            self._lag.tell(lag, ())
            blocked = {**{series.labels[0]: 0.0 for series in all_series}, **self._blocked}
        yield from tell(all_series)
        yield _gauge(f.TASK_INFO, dict.fromkeys(infos, 1))
        yield _gauge(f.BUILD_INFO, {build_info(): 1})
        known = {series.labels[0] for series in all_series}
        timeouts = {task: limit for task, limit in self.watched.timeouts.items() if task in known}
        yield _gauge(f.TASK_TIMEOUT, _single(timeouts))
        for family, values in self.watched.read().items():
            yield _gauge(family, _single(values))
        yield lag
        yield _counter(f.LOOP_BLOCKED, _single(blocked))
        yield _counter(f.ALERTS, alerts)
        yield deliveries
        yield _gauge(f.ALERT_QUEUE, _single(queues))
        yield _counter(f.SELF_ERRORS, _single(self_errors))
        yield _counter(f.LABEL_OVERFLOW, _single({"task": 0, "error_type": 0, **overflows}))


def _gauge(family: f.Family, values: Mapping[tuple[str, ...], float]) -> Metric:
    metric = GaugeMetricFamily(family.full_name, family.help, labels=family.labels)
    for labels, value in values.items():
        metric.add_metric(labels, value)
    return metric


def _single(values: Mapping[str, N]) -> dict[tuple[str, ...], N]:
    """Values by one label, as those by several."""
    return {(label,): value for label, value in values.items()}


def _counter(family: f.Family, counts: Mapping[tuple[str, ...], float]) -> Metric:
    metric = CounterMetricFamily(family.full_name, family.help, labels=family.labels)
    for labels, count in counts.items():
        metric.add_metric(labels, count)
    return metric


def build_info() -> tuple[str, str, str]:
    """The versions in use: ours, Python's, Starlette's."""
    from .. import __version__

    return __version__, platform.python_version(), starlette.__version__


_books: weakref.WeakKeyDictionary[CollectorRegistry, Any] = weakref.WeakKeyDictionary()
# By directory, whatever the registry: prometheus-client keeps the files by process and family, and two books would
# write over each other's values.
_shared_books: dict[str, Any] = {}
_books_lock = threading.Lock()


def _book(registry: CollectorRegistry) -> Any:
    """The one book of a registry, however many apps share it."""
    with _books_lock:
        book = _books.get(registry)
        if book is None:
            directory = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
            if directory:
                from ._multiprocess import SharedBook

                book = _shared_books.get(directory)
                if book is None:
                    book = _shared_books[directory] = SharedBook(registry)
            else:
                book = PlainBook(registry)
                _warn_if_one_of_several()
            _books[registry] = book
        return book


def _warn_if_one_of_several() -> None:
    """Say once at start that one worker's numbers are not all."""
    first = multiprocessing.parent_process() is None or multiprocessing.current_process().name.endswith("-1")
    if workers() > 1 and first:
        emit(
            "warning",
            "metrics.several_workers",
            workers=workers(),
            advice="a scrape sees one worker at a time: set PROMETHEUS_MULTIPROC_DIR to an empty directory",
        )


def workers() -> int:
    """How many worker processes the server was told to start, as far as its command line or environment say."""
    said = re.search(r"(?:^|\0)(?:--workers|-w)[=\0]?(\d+)(?:\0|$)", "\0".join(sys.argv))
    text = said[1] if said else os.environ.get("WEB_CONCURRENCY", "")
    return int(text) if text.isdigit() else 1


class Metrics:
    """
    Counts, durations and ages of every task (`TELEMETRY.md`), in a Prometheus registry.

    Any number of apps may share a registry: the families are registered once. With `PROMETHEUS_MULTIPROC_DIR` set the
    numbers are kept in that directory's files, so that one scrape tells all workers; without exemplars then, since
    prometheus-client keeps none there.

    Args:
        registry: Where the families are registered; None: prometheus-client's own.
        tasks: Names of tasks that have their series from the start, beside those that `@task` registered.

    Raises:
        RegistryClash: The registry has a family of the same name that is not aftertask's.
    """

    def __init__(self, registry: CollectorRegistry | None = None, *, tasks: Iterable[str] = ()) -> None:
        self._book = _book(REGISTRY if registry is None else registry)
        self.loop: LoopListener = self._book
        self._of: Callable[[TaskRun], SeriesLike] = self._book.of
        self._known: dict[str, SeriesLike] = self._book.by_task
        for name in tasks:
            self._book.register(name, "", "")
        for entry in registered_tasks():
            self._book.register(entry.name, entry.policy.owner or "", entry.executor)
        self.handlers: dict[type[TaskEvent], Callable[[Any], None]] = {
            Scheduled: self._on_scheduled,
            Succeeded: self._on_succeeded,
            Retrying: self._on_retrying,
            HazardFound: self._on_hazard,
            Abandoned: self._on_abandoned,
            AbandonedEnded: self._on_abandoned_ended,
            **dict.fromkeys((Failed, TimedOut, Cancelled, Skipped, Dropped), self._on_ended),
            **dict.fromkeys((Rejected, Expired, Lost, Offloaded), self._on_ended),
        }

    def __call__(self, event: TaskEvent) -> None:
        """Count an event; those that are no change of a number are passed over."""
        handler = self.handlers.get(type(event))
        if handler is not None:
            handler(event)

    def count_self_error(self, component: str) -> None:
        """Something of aftertask's raised, and was contained."""
        self._book.count_self_error(component)

    def watch(self, pool: Pool, *, threads: bool) -> None:
        """Tell a concurrency limit, or a pool of threads, as it is at each scrape."""
        self._book.watched.add(pool, f.THREADPOOL if threads else f.CONCURRENCY)

    def know_timeout(self, task: str, seconds: float) -> None:
        """A task has this time limit."""
        self._book.watched.timeouts[task] = seconds

    def count_alerts(self, channel: str, status: str, count: int) -> None:
        """So many bad runs have been told to a channel, or not; 0 makes the series."""
        self._book.count_alerts(channel, status, count)

    def observe_alert_delivery(self, channel: str, seconds: float) -> None:
        """The attempt that delivered an alert took so long."""
        self._book.observe_alert_delivery(channel, seconds)

    def set_alert_queue(self, channel: str, length: int) -> None:
        """So many kinds of failure wait for a channel."""
        self._book.set_alert_queue(channel, length)

    def _on_scheduled(self, event: Scheduled) -> None:
        run = event.run
        (self._known.get(run.task) or self._of(run)).schedule(run)

    def _on_succeeded(self, event: Succeeded) -> None:
        run = event.run
        (self._known.get(run.task) or self._of(run)).succeed(event)

    def _on_retrying(self, event: Retrying) -> None:
        self._of(event.run).retry(event)

    def _on_ended(self, event: Ended) -> None:
        self._of(event.run).end(event)

    def _on_abandoned(self, event: Abandoned) -> None:
        self._of(event.run).abandon(1)

    def _on_abandoned_ended(self, event: AbandonedEnded) -> None:
        self._of(event.run).abandon(-1)

    def _on_hazard(self, event: HazardFound) -> None:
        self._of(event.run).hazard(event.kind)
