"""The metrics behind one registry: created once, shared by every app that uses it, collected together."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from platform import python_version

import starlette
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.registry import Collector

from .. import _clock
from .._core.process import hold_for_fork, on_fork, start_thread
from .._core.request import COMPONENT
from .._log import log
from .._taskrun import LOCAL, TaskInfo, TaskRun
from .._version import __version__
from ..errors import RegistryClash
from ..events import Pool
from ..tasks import registered_tasks
from . import families as f
from ._instruments import Instruments, TaskSeries
from ._labels import Bounds
from ._multiprocess import Runs, Workers
from .families import Family

#: In multi-process mode, gauges that change without an event are written this often, in seconds.
SAMPLE_EVERY = 5.0

#: What an error of the sampler is counted under: the signal's name.
_SAMPLER = "aftertask.signals.metrics.Metrics"

_ACCOUNTS = (f.SCHEDULED, f.FINISHED, f.INFLIGHT)

Labels = tuple[str, ...]

#: A task's name and its engine.
Task = tuple[str, str]


class MetricSet(Collector):
    """
    Every metric of aftertask; one collector, so that it can leave out samples that prometheus-client would add.

    Args:
        workers: The processes that share `PROMETHEUS_MULTIPROC_DIR`; None if this process is alone.

    Attributes:
        lock: Held while a run is scheduled or ends, and while what the accounting rule adds up is collected.
        of: prometheus-client's objects.
        hidden: Families that are not exposed, because no app has a journal, and no worker dead letters.
    """

    def __init__(self, workers: Workers | None) -> None:
        self.workers = workers
        # Reentrant: collecting garbage may close a coroutine, which ends its run, at any line of any thread.
        self.lock = threading.RLock()
        self.of = Instruments()
        self.hidden = set(f.JOURNAL)
        self._by_task: dict[Task, TaskSeries] = {}
        self._engines: set[str] = set()
        self._bounds = Bounds(lambda label: self.of.counters[f.LABEL_OVERFLOW].labels(label).inc())
        self._infos: dict[Task, Labels] = {}
        self._pools: weakref.WeakKeyDictionary[Pool, tuple[Family, ...]] = weakref.WeakKeyDictionary()
        self._shown: dict[Family, set[Labels]] = {}
        self._is_sampling = self._sweeps = False
        for label in ("task", "error_type"):
            self.of.counters[f.LABEL_OVERFLOW].labels(label)
        self.of.counters[f.SELF_ERRORS].labels(COMPONENT)  # or its first error would be invisible to increase()
        self.of.counters[f.LOOP_BLOCKED].labels(f.NO_TASK)
        self.of.gauges[f.BUILD_INFO].labels(__version__, python_version(), starlette.__version__).set(1)
        if workers is not None:
            on_fork(self)
            hold_for_fork(self)
            workers.join(self._settle)

    # --- tasks

    def has(self, info: TaskInfo) -> bool:
        """Whether a task has its own series."""
        return (info.task, info.engine) in self._by_task

    def series(self, run: TaskRun) -> TaskSeries:
        """The series of a run's task; those of `__other__` if it can have none of its own."""
        found = self._by_task.get((run.task, run.info.engine))
        return self._create(run.info) if found is None else found

    def _create(self, info: TaskInfo) -> TaskSeries:
        with self.lock:
            label = info.task if info.registered else self._bounds.task(info.task)
            series = self.declare(label, info.engine)
            if label != f.OTHER:
                self.describe_task(info)
            return series

    def declare(self, task: str, engine: str) -> TaskSeries:
        """Create a task's series at 0, unless they exist."""
        with self.lock:
            if (task, engine) not in self._by_task:
                self._by_task[task, engine] = TaskSeries(task, engine, self.of)
            return self._by_task[task, engine]

    def declare_registered(self, engine: str | None = None) -> None:
        """
        Create the series of every task that `@task` has registered so far.

        Args:
            engine: Create them on this engine from now on; None means those on which they are created already.
        """
        if engine is not None:
            self._engines.add(engine)
        for entry in registered_tasks():
            for name in sorted(self._engines):
                if (entry.name, name) not in self._infos:
                    self.declare(entry.name, name)
                    self._set_info(entry.name, name, entry.policy.owner, entry.executor)

    def describe_task(self, info: TaskInfo) -> None:
        """Expose a task's owner, executor and timeout."""
        self._set_info(info.task, info.engine, info.owner, info.executor)
        if info.timeout is not None:
            self.of.gauges[f.TASK_TIMEOUT].labels(info.task).set(info.timeout)

    def _set_info(self, task: str, engine: str, owner: str | None, executor: str) -> None:
        labels = (task, engine, owner or "", executor)
        with self.lock:
            before = self._infos.get((task, engine))
            if before == labels:
                return
            self._infos[task, engine] = labels
            if before is not None:
                self._forget(f.TASK_INFO, before)
            self.of.gauges[f.TASK_INFO].labels(*labels).set(1)

    def schedule(self, run: TaskRun) -> None:
        """Count a run as scheduled and in flight."""
        series = self.series(run)
        with self.lock:
            series.scheduled.inc()
            series.arrive(run)
        if series.labels[0] == f.OTHER:
            self._bounds.count_folded_run()

    def arrive(self, run: TaskRun) -> None:
        """Count a run as in flight here."""
        series = self.series(run)
        with self.lock:
            series.arrive(run)

    def error_type(self, series: TaskSeries, name: str) -> str:
        """The `error_type` label of an exception class."""
        with self.lock:
            return self._bounds.error_type(series.labels[0], name)

    # --- what is read when metrics are collected

    def watch(self, pool: Pool, families: tuple[Family, ...]) -> None:
        """Expose a limit, its use and its queue for as long as the pool exists."""
        with self.lock:
            self._pools[pool] = families

    def refresh(self) -> None:
        """Write the gauges that change without an event: states, ages, pools."""
        self.declare_registered()
        with self.lock:
            values: dict[Family, dict[Labels, float]] = {f.OLDEST_QUEUED: {}, f.OLDEST_RUNNING: {}}
            now = _clock.monotonic()
            for series in list(self._by_task.values()):
                for family, since in zip((f.OLDEST_QUEUED, f.OLDEST_RUNNING), series.update_states(), strict=True):
                    if since is not None:
                        values[family][series.labels] = max(0.0, now - since)
            for family, by_label in {**values, **self._pool_values()}.items():
                self._write(family, by_label)

    def _pool_values(self) -> dict[Family, dict[Labels, float]]:
        """Each family's value by label; pools of one name, in several apps, add up."""
        values: dict[Family, dict[Labels, float]] = {family: {} for family in (*f.CONCURRENCY, *f.THREADPOOL)}
        for pool, families in list(self._pools.items()):
            for family, value in zip(families, (pool.size, pool.in_use, pool.waiting), strict=True):
                values[family][pool.name,] = values[family].get((pool.name,), 0) + value
        return values

    def _write(self, family: Family, values: Mapping[Labels, float]) -> None:
        """Set a gauge's series to these values, and remove those that have none any more."""
        shown = self._shown.setdefault(family, set())
        for labels in shown - values.keys():
            self._forget(family, labels)
        for labels, value in values.items():
            self.of.gauges[family].labels(*labels).set(value)
        shown.update(values)

    def _forget(self, family: Family, labels: Labels) -> None:
        if self.workers is not None:
            self.of.gauges[family].labels(*labels).set(0)  # prometheus-client removes no series from a file
            return
        self.of.gauges[family].remove(*labels)
        self._shown.get(family, set()).discard(labels)

    # --- the collector

    def describe(self) -> Iterable[Metric]:
        """The families without samples; the registry finds name clashes by them."""
        return [Metric(family.full_name, family.help, family.kind) for family in f.FAMILIES]

    def collect(self) -> Iterator[Metric]:
        """Every family of this process, as of now."""
        yield from self._accounts()
        for family in f.FAMILIES:
            if family not in _ACCOUNTS and family not in self.hidden:
                yield self.of.collected(family)

    def _accounts(self) -> list[Metric]:
        """The families that add up: scheduled = finished + in flight holds in every scrape."""
        with self.lock:
            while True:
                self.refresh()
                before = self._count_live()
                accounts = [self.of.collected(family) for family in _ACCOUNTS]
                if self._count_live() == before:  # else garbage collection ended a run in this thread
                    return accounts

    def _count_live(self) -> int:
        return sum(len(series.live) for series in list(self._by_task.values()))

    def stay_in(self, registry: CollectorRegistry) -> None:
        """Register the families again if the registry was emptied, as test fixtures do."""
        with suppress(ValueError):  # they are still registered
            registry.register(self)

    # --- several processes

    def hold(self) -> None:
        """Keep other threads from writing while this one forks: prometheus-client's lock would be copied as it is."""
        self.lock.acquire()

    def let_go(self) -> None:
        """The process has forked; this is the parent."""
        self.lock.release()

    def sweep(self) -> None:
        """From now on, fold the files of processes that have ended into one, so that the directory does not grow."""
        self._sweeps = True

    def start(self) -> None:
        """Start writing gauges that change without an event; does nothing if this process is alone, or has started."""
        if self.workers is None or self._is_sampling:
            return
        with self.lock:
            if not self._is_sampling:
                self._is_sampling = True
                self.workers.join(self._settle)
                start_thread("metrics", self._sample)

    def after_fork(self) -> None:
        """Count from 0 in a child process: the parent keeps its own counts."""
        self.lock = threading.RLock()
        self._is_sampling = self._sweeps = False
        for series in self._by_task.values():
            series.live.clear()
            series.kept.clear()
        if self.workers is not None:
            self.workers.after_fork()

    def _sample(self) -> None:
        while True:
            try:
                self.refresh()
                if self._sweeps and self.workers is not None:
                    self.workers.sweep()
            except Exception as error:
                self.of.counters[f.SELF_ERRORS].labels(_SAMPLER).inc()
                log("error", "signal.failed", signal=_SAMPLER, on="sample", error_type=type(error).__name__)
            time.sleep(SAMPLE_EVERY)

    def lose(self, run: TaskRun) -> None:
        """Count a run of a dead worker as scheduled, and lost, here."""
        series = self.series(run)
        with self.lock:
            series.scheduled.inc()
            self._end(series.labels[0], "lost", 1)

    def _end(self, task: str, outcome: str, count: float) -> None:
        self.of.counters[f.FINISHED].labels(task, LOCAL, outcome).inc(count)
        if outcome == "lost":
            self.of.counters[f.NOT_RUN].labels(task, outcome, "crash").inc(count)
            self.of.counters[f.BAD].labels(task, LOCAL).inc(count)

    def _settle(self, unfinished: Runs, past: Iterable[Metric]) -> None:
        """Count as finished what an earlier process with this pid left, and clear its gauges."""
        for (task, outcome), count in unfinished.items():
            self._end(task, outcome, count)
        gauges = {family.full_name: gauge for family, gauge in self.of.gauges.items()}
        for metric in past:
            for sample in metric.samples if metric.name in gauges else ():
                gauge = gauges[metric.name]
                (gauge.labels(**sample.labels) if sample.labels else gauge).set(0)


_sets: weakref.WeakKeyDictionary[CollectorRegistry, MetricSet] = weakref.WeakKeyDictionary()
# prometheus-client names the files by process and kind, so two sets would overwrite each other's values.
_shared: list[MetricSet] = []
_creating = threading.Lock()


def metric_set(registry: CollectorRegistry) -> MetricSet:
    """
    The metrics of a registry, however many apps use it; registered in it.

    Raises:
        RegistryClash: The registry holds a family of the same name that is not aftertask's.
        FileNotFoundError: `PROMETHEUS_MULTIPROC_DIR` is not a directory.
    """
    with _creating:
        found = _sets.get(registry)
        if found is not None:
            found.stay_in(registry)
            return found
        created = _shared_set() or MetricSet(None)
        try:
            registry.register(created)
        except ValueError as error:
            raise RegistryClash(
                f"the registry holds a metric of the same name that is not aftertask's: {error}; "
                f"pass Settings(registry=…) another registry, or rename that metric"
            ) from error
        _sets[registry] = created
        return created


def exposed(registry: CollectorRegistry, *, by_name: bool = False) -> CollectorRegistry:
    """
    What a scrape of this registry renders: the sum over all processes in multi-process mode, else the registry itself.

    Args:
        registry: The registry of the app.
        by_name: Whether the scrape selects families by name.
    """
    metrics = _sets.get(registry)
    workers = _workers() if metrics is None else metrics.workers  # an app may be without the signal `Metrics`
    if metrics is not None:
        metrics.stay_in(registry)
    if workers is None:
        return registry
    if metrics is not None:
        metrics.refresh()
    return workers.registry(by_name=by_name)


def _shared_set() -> MetricSet | None:
    """The one set of this process in multi-process mode; None in any other mode."""
    workers = None if _shared else _workers()
    if workers is not None:
        _shared.append(MetricSet(workers))
    return _shared[0] if _shared else None


def _workers() -> Workers | None:
    path = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    return Workers(Path(path)) if path else None
