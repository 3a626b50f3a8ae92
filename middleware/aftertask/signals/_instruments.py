"""prometheus-client's own object for every family, and all children of one task."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from prometheus_client import Counter, Gauge, Histogram, Metric

from .._taskrun import OUTCOMES, TaskRun
from . import families as f
from .families import Family


class Instruments:
    """
    Every family as a `Counter`, `Gauge` or `Histogram`, none of them in a registry.

    Attributes:
        counters, gauges, histograms: The objects by family.
    """

    def __init__(self) -> None:
        self.counters = {
            family: Counter(family.full_name, family.help, family.labels, registry=None)
            for family in _of_kind("counter")
        }
        self.gauges = {
            family: Gauge(family.full_name, family.help, family.labels, registry=None, multiprocess_mode=family.mode)
            for family in _of_kind("gauge")
        }
        self.histograms = {
            family: Histogram(family.full_name, family.help, family.labels, registry=None, buckets=family.buckets)
            for family in _of_kind("histogram")
        }
        self._all: Mapping[Family, Counter | Gauge | Histogram] = {**self.counters, **self.gauges, **self.histograms}

    def collected(self, family: Family) -> Metric:
        """A family with its samples, without the `_created` ones that prometheus-client adds."""
        (metric,) = self._all[family].collect()
        metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
        return metric


class TaskSeries:
    """
    The children of one task, each looked up once.

    Attributes:
        labels: Its `task` and `engine`.
        live: The runs in flight, and the state under which `tasks_inflight` counts each.
        kept: Those of them that the journal has.
    """

    def __init__(self, task: str, engine: str, of: Instruments) -> None:
        self.labels = labels = (task, engine)
        self.live: dict[TaskRun, str] = {}
        self.kept: set[TaskRun] = set()
        self._gauges = of.gauges
        self.scheduled = of.counters[f.SCHEDULED].labels(*labels)
        self.finished = {outcome: of.counters[f.FINISHED].labels(*labels, outcome) for outcome in OUTCOMES}
        self.bad = of.counters[f.BAD].labels(*labels)
        self.retries = of.counters[f.RETRIES].labels(*labels)
        self.inflight = {state: of.gauges[f.INFLIGHT].labels(*labels, state) for state in f.STATES}
        self.abandoned = of.gauges[f.ABANDONED].labels(task)
        self.wait = of.histograms[f.WAIT].labels(*labels)
        self.ok = of.histograms[f.ATTEMPT].labels(*labels, "ok")
        self.error = of.histograms[f.ATTEMPT].labels(*labels, "error")
        self.end_to_end = of.histograms[f.END_TO_END].labels(*labels)
        self.loop_blocked = of.counters[f.LOOP_BLOCKED].labels(task)
        self.not_run = {ending: of.counters[f.NOT_RUN].labels(task, *ending) for ending in f.NOT_RUN_REASONS}

    @cached_property
    def last_success(self) -> Gauge:
        """Time of the last success; there is no series before the first one."""
        return self._gauges[f.LAST_SUCCESS].labels(*self.labels)

    @cached_property
    def last_failure(self) -> Gauge:
        """Time of the last failure; there is no series before the first one."""
        return self._gauges[f.LAST_FAILURE].labels(*self.labels)

    def arrive(self, run: TaskRun) -> None:
        """Count a run as in flight."""
        self.inflight["scheduled"].inc()
        self.live[run] = "scheduled"

    def keep(self, run: TaskRun) -> None:
        """Count a run in flight as one that the journal has."""
        if run in self.live and run not in self.kept:
            self.kept.add(run)
            self._gauges[f.KEPT].labels(*self.labels).inc()

    def remove(self, run: TaskRun) -> None:
        """Count a run as no longer in flight."""
        state = self.live.pop(run, None)
        if state is not None:
            self.inflight[state].dec()
        if run in self.kept:
            self.kept.remove(run)
            self._gauges[f.KEPT].labels(*self.labels).dec()

    def update_states(self) -> tuple[float | None, float | None]:
        """
        Count each run in flight under its present state.

        Returns:
            When the oldest queued run was queued, and when the oldest running one started, in monotonic seconds; None
            if there is none.
        """
        queued: list[float] = []
        started: list[float] = []
        for run in list(self.live):  # not its items: garbage collection may end a run while these are made
            before, state = self.live.get(run), run.state
            # A run that is just ending keeps its last state; one that ended meanwhile is not counted again.
            if before is not None and state != before and state in self.inflight:
                self.live[run] = state
                self.inflight[before].dec()
                self.inflight[state].inc()
            if state == "queued" and run.queued_s is not None:
                queued.append(run.queued_s)
            elif state == "running" and run.started_s is not None:
                started.append(run.started_s)
        return min(queued, default=None), min(started, default=None)


def _of_kind(kind: str) -> list[Family]:
    return [family for family in (*f.FAMILIES, f.KEPT) if family.kind == kind]
