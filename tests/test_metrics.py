"""The metrics as a scrape shows them: names, labels, the accounting rule, bounds, and the endpoint."""

from __future__ import annotations

import gc
import gzip
import itertools
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from fastapi import APIRouter, BackgroundTasks, FastAPI, HTTPException
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Metric, generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.testclient import TestClient

from aftertask import AftertaskMiddleware, Policy, RegistryClash, Retry, Settings, TaskEvent, current_run, task
from aftertask.events import Abandoned, AbandonedEnded, Dropped, RequestInfo, Scheduled, TaskInfo, TaskRun
from aftertask.signals import Metrics, families
from aftertask.testing import VirtualClock
from kit import ClientFor, drive

OPENMETRICS = {"accept": "application/openmetrics-text"}
ROOT = Path(__file__).parent.parent


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    """The value of one sample; None if there is none."""
    return registry.get_sample_value(f"aftertask_{name}", labels)


def local(registry: CollectorRegistry, name: str, task: str, **labels: str) -> float | None:
    """The value of one sample of a task with the engine `local`."""
    return value(registry, name, task=task, engine="local", **labels)


@task(name="shop.ok", owner="shop")
async def ok() -> None: ...


@task(name="shop.broken")
def broken() -> None:
    raise LookupError("no such order")


@task(name="shop.declined", expected=LookupError)
async def declined() -> None:
    raise LookupError("declined")


# --- what each run adds


def test_a_successful_run_is_counted_and_timed(client_for: ClientFor, registry: CollectorRegistry) -> None:
    """It is counted as scheduled and finished, its wait and durations are observed, and nothing stays in flight."""
    with VirtualClock(1_800_000_000) as clock:

        @task(name="shop.slow")
        async def slow() -> None:
            clock.advance(3)

        client_for(slow, slow).get("/")

    assert local(registry, "tasks_scheduled_total", "shop.slow") == 2
    assert local(registry, "tasks_finished_total", "shop.slow", outcome="succeeded") == 2
    assert local(registry, "tasks_bad_total", "shop.slow") == 0
    assert local(registry, "queue_wait_seconds_count", "shop.slow") == 2
    # A sibling's run time is part of the wait.
    assert local(registry, "queue_wait_seconds_sum", "shop.slow") == 3
    assert local(registry, "queue_wait_seconds_bucket", "shop.slow", le="0.005") == 1
    assert local(registry, "attempt_duration_seconds_sum", "shop.slow", result="ok") == 6
    assert local(registry, "end_to_end_seconds_sum", "shop.slow") == 9
    assert local(registry, "last_success_timestamp_seconds", "shop.slow") == 1_800_000_006
    assert local(registry, "last_failure_timestamp_seconds", "shop.slow") is None
    for state in ("scheduled", "queued", "running", "backoff"):
        assert local(registry, "tasks_inflight", "shop.slow", state=state) == 0
    assert local(registry, "oldest_running_age_seconds", "shop.slow") is None


def test_a_scrape_shows_what_is_in_flight(client_for: ClientFor, registry: CollectorRegistry) -> None:
    """A scrape in the middle of a batch shows the running run, its age and its wait, and the queued sibling."""
    seen: dict[str, float | None] = {}
    with VirtualClock() as clock:

        @task(name="shop.first")
        async def first() -> None:
            clock.advance(7)
            for name, of, labels in (
                ("tasks_inflight", "shop.first", {"state": "running"}),
                ("tasks_inflight", "shop.ok", {"state": "queued"}),
                ("oldest_running_age_seconds", "shop.first", {}),
                ("oldest_queued_age_seconds", "shop.ok", {}),
                ("queue_wait_seconds_count", "shop.first", {}),
            ):
                seen[f"{name} {of}"] = local(registry, name, of, **labels)

        client_for(first, ok).get("/")

    assert seen == {
        "tasks_inflight shop.first": 1,
        "tasks_inflight shop.ok": 1,
        "oldest_running_age_seconds shop.first": 7,
        "oldest_queued_age_seconds shop.ok": 7,
        "queue_wait_seconds_count shop.first": 1,
    }


def test_an_age_disappears_with_its_run(client_for: ClientFor, registry: CollectorRegistry) -> None:
    """The age that a scrape showed during a run is absent from the next scrape."""
    ages: list[float | None] = []

    @task(name="shop.seen")
    async def seen() -> None:
        ages.append(local(registry, "oldest_running_age_seconds", "shop.seen"))

    client_for(seen).get("/")
    assert ages[0] is not None
    assert local(registry, "oldest_running_age_seconds", "shop.seen") is None


def test_the_wait_is_observed_when_the_first_attempt_starts(client_for: ClientFor, registry: CollectorRegistry) -> None:
    """It is there during the first attempt and is not observed again by a retry."""
    counts: list[float | None] = []

    @task(name="shop.second_try", retry=Retry(attempts=2, wait_initial=0))
    async def second_try() -> None:
        counts.append(local(registry, "queue_wait_seconds_count", "shop.second_try"))
        if len(counts) == 1:
            raise LookupError

    client_for(second_try).get("/")
    assert counts == [1, 1]
    assert local(registry, "queue_wait_seconds_count", "shop.second_try") == 1
    assert local(registry, "retries_total", "shop.second_try") == 1


def test_a_failure_is_counted_by_its_class_and_skips_its_siblings(
    client_for: ClientFor, registry: CollectorRegistry
) -> None:
    """The failed run is bad, and so is the sibling that was skipped because of it."""
    client_for(broken, ok).get("/")

    assert local(registry, "tasks_finished_total", "shop.broken", outcome="failed") == 1
    assert local(registry, "attempt_errors_total", "shop.broken", error_type="LookupError") == 1
    assert local(registry, "attempt_duration_seconds_count", "shop.broken", result="error") == 1
    assert local(registry, "last_failure_timestamp_seconds", "shop.broken") is not None
    assert local(registry, "tasks_bad_total", "shop.broken") == 1
    assert local(registry, "tasks_finished_total", "shop.ok", outcome="skipped") == 1
    assert value(registry, "tasks_not_run_total", task="shop.ok", outcome="skipped", reason="sibling_failed") == 1
    assert local(registry, "tasks_bad_total", "shop.ok") == 1
    assert local(registry, "queue_wait_seconds_count", "shop.ok") == 0


def test_an_expected_failure_is_not_bad(client_for: ClientFor, registry: CollectorRegistry) -> None:
    """It is counted as failed nevertheless."""
    client_for(declined).get("/")
    assert local(registry, "tasks_finished_total", "shop.declined", outcome="failed") == 1
    assert local(registry, "tasks_bad_total", "shop.declined") == 0


# --- which series exist


def test_a_registered_task_has_its_series_from_the_start(registry: CollectorRegistry) -> None:
    """All are at 0 before the first run, or the first failure would be invisible to increase()."""
    AftertaskMiddleware(
        PlainTextResponse("ok"), settings=Settings(registry=registry, policies={"by.operator": Policy()})
    )

    @task(name="shop.late", owner="shop")
    def late() -> None: ...

    for name in ("shop.ok", "shop.late", "by.operator"):
        assert local(registry, "tasks_scheduled_total", name) == 0
        assert local(registry, "tasks_finished_total", name, outcome="failed") == 0
        assert local(registry, "attempt_duration_seconds_bucket", name, result="error", le="+Inf") == 0
        assert value(registry, "event_loop_blocked_seconds_total", task=name) == 0
        for outcome, reason in families.NOT_RUN_REASONS:
            assert value(registry, "tasks_not_run_total", task=name, outcome=outcome, reason=reason) == 0
        assert local(registry, "last_success_timestamp_seconds", name) is None
        assert local(registry, "oldest_queued_age_seconds", name) is None
    assert value(registry, "task_info", task="shop.late", engine="local", owner="shop", executor="thread") == 1
    assert value(registry, "task_info", task="shop.ok", engine="local", owner="shop", executor="inline") == 1


def test_a_task_has_one_info_series(registry: CollectorRegistry, client_for: ClientFor) -> None:
    """An owner from `Settings.policies` replaces the one from `@task`."""
    client_for(ok, policies={"shop.ok": Policy(owner="mail", timeout=5)}).get("/")
    owners = [
        sample.labels["owner"]
        for metric in registry.collect()
        if metric.name == "aftertask_task_info"
        for sample in metric.samples
        if sample.labels["task"] == "shop.ok"
    ]
    assert owners == ["mail"]
    assert value(registry, "task_timeout_seconds", task="shop.ok") == 5


def test_the_first_error_inside_aftertask_increases_a_series(
    client_for: ClientFor, registry: CollectorRegistry
) -> None:
    """Its series exists at 0 before the error."""

    def no_id(scope: Any) -> str:
        raise LookupError

    def errors() -> dict[str, float]:
        return {
            sample.labels["component"]: sample.value
            for metric in registry.collect()
            if metric.name == "aftertask_self_errors"
            for sample in metric.samples
        }

    client = client_for(ok, request_id=no_id)
    client.get("/metrics")
    before = errors()
    client.get("/")
    after = errors()
    assert set(after) == set(before)
    assert sum(before.values()) == 0 < sum(after.values())


def test_tasks_beyond_the_bound_share_a_label(
    client_for: ClientFor, registry: CollectorRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    """100 unregistered tasks have a label of their own; the others share one, which is counted, and logged once."""

    def make(number: int) -> Callable[[], None]:
        def unregistered() -> None: ...

        unregistered.__qualname__ = f"task_{number}"
        return unregistered

    client_for(*[make(number) for number in range(120)], ok).get("/")

    names = {
        sample.labels["task"] for metric in registry.collect() for sample in metric.samples if "task" in sample.labels
    }
    assert len([name for name in names if name.startswith(f"{__name__}.task_")]) == 100
    assert local(registry, "tasks_finished_total", "__other__", outcome="succeeded") == 20
    assert local(registry, "tasks_finished_total", "shop.ok", outcome="succeeded") == 1
    assert value(registry, "label_overflow_total", label="task") == 20
    (warning,) = (record for record in caplog.records if getattr(record, "event", None) == "label.overflow")
    assert vars(warning)["folded_into"] == "__other__"


@pytest.mark.parametrize(("tasks", "classes", "labels"), [(1, 25, 20), (4, 15, 50)], ids=["per task", "per process"])
def test_error_types_beyond_the_bound_share_a_label(
    client_for: ClientFor, registry: CollectorRegistry, tasks: int, classes: int, labels: int
) -> None:
    """20 classes per task and 50 per process have a label of their own; the others are folded and counted."""

    def make(number: int) -> Callable[[], None]:
        raised = iter(range(classes))

        @task(name=f"shop.creative_{number}")
        def creative() -> None:
            raise type(f"Error{number}_{next(raised)}", (Exception,), {"__module__": "app"})("new every time")

        creative.__qualname__ += str(number)
        return creative

    for number in range(tasks):
        client = client_for(make(number))
        for _ in range(classes):
            client.get("/")

    counts: dict[str, float] = {}
    for metric in registry.collect():
        if metric.name == "aftertask_attempt_errors":
            for sample in metric.samples:
                kind = sample.labels["error_type"]
                counts[kind] = counts.get(kind, 0) + sample.value
    assert len(counts) == labels + 1
    assert counts["__other__"] == tasks * classes - labels
    assert value(registry, "label_overflow_total", label="error_type") == tasks * classes - labels


def documented() -> dict[str, tuple[str, tuple[float, ...], tuple[str, ...], str]]:
    """The table in docs/telemetry.md: type, buckets, labels and HELP of each metric."""
    text = (ROOT / "docs" / "telemetry.md").read_text()
    table = text.partition("\n## Metrics\n")[2].partition("\n## ")[0]
    rows = {}
    for name, kind, labels, help in re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \|$", table, re.MULTILINE):
        kind, _, buckets = kind.partition(": ")
        names = tuple(re.findall(r"`(\w+)`", labels))
        rows[f"aftertask_{name}"] = (kind, tuple(map(float, buckets.split())), names, help)
    return rows


def test_the_metrics_are_those_of_the_documentation() -> None:
    """Every metric has the type, buckets, labels and HELP text of docs/telemetry.md, and none is missing."""
    declared = {
        family.full_name + ("_total" if family.kind == "counter" else ""): (
            *(family.kind, family.buckets, family.labels),
            family.help,
        )
        for family in families.FAMILIES
    }
    assert declared == documented()


def test_a_scrape_has_the_documented_metrics(client_for: ClientFor, tmp_path: Path) -> None:
    """Each family is exposed with its type, its HELP text and its labels, and there is no other."""
    client = client_for(broken, journal=tmp_path / "tasks.db")
    client.get("/")
    exposed = list(text_string_to_metric_families(client.get("/metrics", headers=OPENMETRICS).text))
    assert {family.name: (family.type, family.documentation) for family in exposed} == {
        family.full_name: (family.kind, family.help) for family in families.FAMILIES
    }
    labels = {family.full_name: set(family.labels) for family in families.FAMILIES}
    for family in exposed:
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == labels[family.name]


def test_there_are_no_created_series(client_for: ClientFor, registry: CollectorRegistry) -> None:
    """They are left out of our families only: the client library's own switch is not touched."""
    theirs = Counter("theirs", "Another counter.", registry=registry)
    theirs.inc()
    client = client_for(broken)
    client.get("/")
    for headers in ({}, OPENMETRICS):
        names = re.findall(r"^(\w+_created)", client.get("/metrics", headers=headers).text, re.MULTILINE)
        assert names == ["theirs_created"]


# --- registries


def test_apps_may_share_a_registry(client_for: ClientFor, registry: CollectorRegistry) -> None:
    """They count together."""
    for client in (client_for(ok), client_for(ok)):
        client.get("/")
    assert local(registry, "tasks_finished_total", "shop.ok", outcome="succeeded") == 2


def test_a_foreign_metric_of_the_same_name_is_an_error(registry: CollectorRegistry) -> None:
    """The error names it."""
    Counter("aftertask_retries", "Another one.", registry=registry)
    with pytest.raises(RegistryClash, match=r"aftertask_retries.*another registry"):
        Metrics(registry)


@pytest.fixture
def emptied() -> Iterator[Callable[[], None]]:
    """Empties prometheus-client's own registry, as test suites do; restores it afterwards."""
    before = list(REGISTRY._collector_to_names)

    def empty() -> None:
        for collector in list(REGISTRY._collector_to_names):
            REGISTRY.unregister(collector)

    yield empty
    empty()
    for collector in before:
        REGISTRY.register(collector)


@pytest.mark.parametrize("is_new", [False, True], ids=["the same app", "a new app"])
@pytest.mark.parametrize("how", ["endpoint", "registry", "lifespan"])
def test_an_emptied_registry_gets_the_metrics_again(
    client_for: ClientFor, emptied: Callable[[], None], how: str, is_new: bool
) -> None:
    """The next request, start or scrape brings them back, in the app that exists and in a new one."""
    client = client_for(ok, registry=REGISTRY)
    client.get("/")
    emptied()
    if is_new:
        client = client_for(ok, registry=REGISTRY)
    if how == "lifespan":
        with client:
            assert local(REGISTRY, "tasks_scheduled_total", "shop.ok") is not None
        return
    if how == "registry":
        client.get("/")
    text = client.get("/metrics").text if how == "endpoint" else generate_latest(REGISTRY).decode()
    assert 'aftertask_tasks_finished_total{engine="local",outcome="succeeded",task="shop.ok"}' in text


# --- no counter falls


def counters(metrics: list[Metric]) -> dict[tuple[str, ...], float]:
    """Every sample that must never fall: counters, buckets, counts and sums."""
    return {
        (sample.name, *(f"{name}={text}" for name, text in sorted(sample.labels.items()))): sample.value
        for metric in metrics
        if metric.type != "gauge"
        for sample in metric.samples
    }


def unaccounted(metrics: list[Metric]) -> float:
    """Runs scheduled but neither finished nor in flight; 0 by the accounting rule."""
    signs = {"aftertask_tasks_scheduled": 1, "aftertask_tasks_finished": -1, "aftertask_tasks_inflight": -1}
    return sum(signs.get(metric.name, 0) * sample.value for metric in metrics for sample in metric.samples)


class Scrapes:
    """A signal that scrapes at every event and compares with the scrape before."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._before: dict[tuple[str, ...], float] = {}
        self.fallen: list[tuple[str, ...]] = []
        self.drift: list[float] = []
        self.abandoned = 0
        self.thread_ended = threading.Semaphore(0)
        self._lock = threading.Lock()

    def __call__(self, event: TaskEvent) -> None:
        """Scrape; an event of a thread waits, so that scrapes are compared in their order."""
        with self._lock:
            metrics = list(self._registry.collect())
            now = counters(metrics)
            self.fallen += [key for key, before in self._before.items() if now.get(key, -1) < before]
            self.drift.append(unaccounted(metrics))
            self._before = now
        self.abandoned += isinstance(event, Abandoned)
        if isinstance(event, AbandonedEnded):
            self.thread_ended.release()


class Behaviours:
    """Tasks that end in every way that a task can end."""

    def __init__(self) -> None:
        self.scope = anyio.CancelScope()
        self.release = threading.Event()

    async def succeed(self) -> None:
        """Succeeds."""
        await anyio.lowlevel.checkpoint()

    def succeed_in_thread(self) -> None:
        """Succeeds in a thread."""

    async def fail(self) -> None:
        """Fails."""
        raise LookupError

    async def recover(self) -> None:
        """Succeeds at the third attempt."""
        run = current_run()
        assert run is not None
        if run.attempt < 3:
            raise ConnectionError

    async def give_up(self) -> None:
        """Fails at every attempt."""
        raise ConnectionError

    async def time_out(self) -> None:
        """Never ends by itself."""
        await anyio.sleep_forever()

    def abandon(self) -> None:
        """Continues in its thread after its timeout."""
        self.release.wait(10)

    async def cancel(self) -> None:
        """Has the whole request cancelled."""
        self.scope.cancel()
        await anyio.lowlevel.checkpoint()


_RETRY = Retry(attempts=3, wait_initial=0)
POLICIES = {
    "*.recover": Policy(retry=_RETRY),
    "*.give_up": Policy(retry=_RETRY),
    "*.time_out": Policy(timeout=0.001, retry=Retry(attempts=2, wait_initial=0)),
    "*.abandon": Policy(timeout=0.001),
}
NAMES = [name for name in vars(Behaviours) if not name.startswith("_")]


async def play(names: list[str], raises: bool, on_failure: Any, scrapes: Scrapes, registry: CollectorRegistry) -> None:
    """Serve one request with these tasks, and wait for the threads that it abandons."""
    behaviours, app = Behaviours(), FastAPI()

    @app.get("/")
    async def endpoint(tasks: BackgroundTasks) -> None:
        for name in names:
            tasks.add_task(getattr(behaviours, name))
        if raises:
            raise HTTPException(503)

    chosen = Settings(registry=registry, policies=POLICIES, on_failure=on_failure)
    app.add_middleware(AftertaskMiddleware, settings=chosen, signals=[Metrics(registry), scrapes])
    with behaviours.scope:
        await drive(app)
    behaviours.release.set()
    for _ in range(scrapes.abandoned):
        await anyio.to_thread.run_sync(scrapes.thread_ended.acquire)
    scrapes.abandoned = 0


@pytest.mark.timeout(60)  # four seconds on a machine with nothing else to do
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(
            st.lists(st.sampled_from(NAMES), max_size=4),
            st.booleans(),
            st.sampled_from(["stop", "continue", "contain"]),
            st.sampled_from(["asyncio", "trio"]),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_no_counter_falls_and_every_run_is_accounted_for(requests: list[tuple[list[str], bool, Any, str]]) -> None:
    """Whatever becomes of the runs, a scrape at any event shows no smaller counter, bucket or sum than before."""
    registry = CollectorRegistry()
    scrapes = Scrapes(registry)
    for names, raises, on_failure, backend in requests:
        anyio.run(play, names, raises, on_failure, scrapes, registry, backend=backend)
    assert not scrapes.fallen
    assert not any(scrapes.drift)
    metrics = list(registry.collect())
    assert unaccounted(metrics) == 0
    inflight = [
        sample.value for metric in metrics if metric.name == "aftertask_tasks_inflight" for sample in metric.samples
    ]
    assert not any(inflight)


# --- runs that the garbage collector ends, at any line of any thread


@contextmanager
def busy_collector(end: Callable[[], object]) -> Iterator[None]:
    """The garbage collector runs at nearly every allocation, and `end` is called there in this thread."""
    thread, thresholds = threading.current_thread(), gc.get_threshold()

    def collected(phase: str, info: object) -> None:
        if phase == "stop" and threading.current_thread() is thread:
            end()

    gc.callbacks.append(collected)
    gc.set_threshold(1)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(collected)


def test_a_run_that_garbage_collection_ends_waits_for_no_lock(registry: CollectorRegistry) -> None:
    """Also while the series of another task are created, under a lock of prometheus-client's."""
    metrics, garbage = Metrics(registry), TaskRun(TaskInfo("garbage", "garbage"), RequestInfo())
    metrics.scheduled(Scheduled(garbage, 0.0))

    def create() -> None:
        with busy_collector(lambda: metrics.dropped(Dropped(garbage, 0.0, "other", None))):
            metrics.scheduled(Scheduled(TaskRun(TaskInfo("shop.new", "shop.new"), RequestInfo()), 0.0))

    thread = threading.Thread(target=create, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert value(registry, "tasks_not_run_total", task="garbage", outcome="dropped", reason="other")


def test_a_run_that_garbage_collection_ends_in_a_scrape_is_accounted_for(registry: CollectorRegistry) -> None:
    """Wherever in the scrape that is, it shows the run either in flight or finished."""
    metrics = Metrics(registry)
    runs = [TaskRun(TaskInfo("garbage", "garbage"), RequestInfo()) for _ in range(200)]
    for run in runs:
        metrics.scheduled(Scheduled(run, 0.0))
    collections = itertools.count()
    with busy_collector(lambda: next(collections)):
        list(registry.collect())
    step = next(collections) / len(runs)

    def ends(run: TaskRun, moment: int) -> Callable[[], None]:
        collections = itertools.count()

        def end() -> None:
            if next(collections) == moment:
                metrics.dropped(Dropped(run, 0.0, "other", None))

        return end

    for place, run in enumerate(runs):
        with busy_collector(ends(run, int(place * step))):
            families = list(registry.collect())
        sums = {each.name: sum(sample.value for sample in each.samples) for each in families}
        assert sums["aftertask_tasks_scheduled"] == len(runs)
        assert sums["aftertask_tasks_finished"] + sums["aftertask_tasks_inflight"] == len(runs)


# --- exemplars


def test_exemplars_name_the_span_of_the_attempt(client_for: ClientFor) -> None:
    """The three histograms and the errors carry the ids of sampled spans."""
    provider = TracerProvider()
    spans: dict[str, str] = {}

    @task(name="shop.traced")
    async def traced() -> None:
        run = current_run()
        assert run is not None
        assert run.span_context is not None
        spans["trace_id"] = f"{run.span_context.trace_id:032x}"
        spans["span_id"] = f"{run.span_context.span_id:016x}"
        raise LookupError

    client = client_for(traced, tracer_provider=provider)
    client.get("/")

    found = [
        (family.name, sample.exemplar.labels)
        for family in text_string_to_metric_families(client.get("/metrics", headers=OPENMETRICS).text)
        for sample in family.samples
        if sample.exemplar is not None
    ]
    assert sorted(name for name, _ in found) == [
        "aftertask_attempt_duration_seconds",
        "aftertask_attempt_errors",
        "aftertask_end_to_end_seconds",
        "aftertask_queue_wait_seconds",
    ]
    assert all(labels == spans for _, labels in found)


def test_a_span_that_is_not_sampled_leaves_no_exemplar(client_for: ClientFor) -> None:
    """An exemplar must lead to a trace that exists."""
    client = client_for(ok, tracer_provider=TracerProvider(sampler=ALWAYS_OFF))
    client.get("/")
    assert " # {" not in client.get("/metrics", headers=OPENMETRICS).text


# --- the endpoint


def test_the_format_is_negotiated(client_for: ClientFor) -> None:
    """Text by default, OpenMetrics and gzip on request, and no body for HEAD."""
    client = client_for(ok)
    text = client.get("/metrics")
    assert text.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "# EOF" not in text.text
    assert client.get("/metrics", headers=OPENMETRICS).text.endswith("# EOF\n")

    with client.stream("GET", "/metrics", headers={"accept-encoding": "gzip"}) as response:
        assert response.headers["content-encoding"] == "gzip"
        assert b"aftertask_build_info" in gzip.decompress(b"".join(response.iter_raw()))
    refused = client.get("/metrics", headers={"accept-encoding": "gzip;q=0, identity"})
    assert "content-encoding" not in refused.headers

    head = client.head("/metrics")
    assert (head.status_code, head.content) == (200, b"")
    assert int(head.headers["content-length"]) > 1000
    assert client.post("/metrics").status_code == 404


def test_a_query_selects_families(client_for: ClientFor) -> None:
    """`name[]` narrows a scrape, as it does at prometheus-client's own endpoint."""
    text = client_for(ok).get("/metrics", params={"name[]": "aftertask_build_info"}).text
    assert "aftertask_build_info" in text
    assert "aftertask_tasks_scheduled" not in text


@pytest.mark.parametrize(
    ("route", "ours"),
    [
        (Route("/metrics", lambda request: PlainTextResponse("theirs")), False),
        (Mount("/metrics", app=PlainTextResponse("theirs")), False),
        (Route("/{path:path}", lambda request: PlainTextResponse("theirs")), True),
        (Mount("/", app=PlainTextResponse("theirs")), True),
    ],
)
def test_an_app_keeps_its_own_metrics(registry: CollectorRegistry, route: Any, ours: bool) -> None:
    """A route or mount of exactly that path is the app's; a catch-all does not count."""
    middleware = [Middleware(AftertaskMiddleware, settings=Settings(registry=registry))]
    text = TestClient(Starlette(routes=[route], middleware=middleware)).get("/metrics").text
    assert ("aftertask_build_info" in text) is ours


def test_a_fastapi_app_keeps_its_own_metrics(registry: CollectorRegistry) -> None:
    """Also if the route gets its path from the prefixes of included routers."""
    app, outer, router = FastAPI(), APIRouter(), APIRouter()

    @router.get("/metrics")
    def theirs() -> str:
        return "theirs"

    outer.include_router(router, prefix="/internal")
    app.include_router(outer, prefix="/app")
    app.add_middleware(AftertaskMiddleware, settings=Settings(registry=registry, metrics_path="/app/internal/metrics"))
    assert TestClient(app).get("/app/internal/metrics").json() == "theirs"


def test_the_path_is_relative_to_the_root_path(registry: CollectorRegistry) -> None:
    """Behind a proxy that adds a prefix, and mounted under another app."""
    inner = Starlette(middleware=[Middleware(AftertaskMiddleware, settings=Settings(registry=registry))])
    assert "aftertask_build_info" in TestClient(inner, root_path="/api").get("/api/metrics").text
    outer = Starlette(routes=[Mount("/inside", app=inner)])
    assert "aftertask_build_info" in TestClient(outer).get("/inside/metrics").text
    assert TestClient(outer).get("/metrics").status_code == 404


def test_without_a_metrics_path_there_is_no_endpoint(client_for: ClientFor) -> None:
    """`metrics_path=None` leaves the path to the app."""
    assert client_for(ok, metrics_path=None).get("/metrics").status_code == 404


def test_excluded_routes_are_not_observed(registry: CollectorRegistry) -> None:
    """Paths, patterns and templates are excluded; everything else is observed."""
    seen: list[Any] = []

    async def endpoint(request: Any) -> PlainTextResponse:
        from starlette.background import BackgroundTask

        return PlainTextResponse("ok", background=BackgroundTask(ok))

    routes = [Route(path, endpoint) for path in ("/health", "/internal/a/b", "/items/{id}", "/items/{id}/x", "/seen")]
    settings = Settings(registry=registry, exclude=("/health", "/internal/*", "/items/{id}"))
    middleware = [Middleware(AftertaskMiddleware, settings=settings, signals=[seen.append])]
    client = TestClient(Starlette(routes=routes, middleware=middleware))
    for path in ("/health", "/internal/a/b", "/items/3", "/items/3/x", "/seen"):
        assert client.get(path).status_code == 200

    assert [event.run.request.http_route for event in seen][::3] == ["/items/{id}/x", "/seen"]


# --- multi-process mode in one process; several are in live/test_multiproc.py

TWO_REGISTRIES = """
from fastapi import BackgroundTasks, FastAPI
from prometheus_client import CollectorRegistry
from starlette.testclient import TestClient

from aftertask import AftertaskMiddleware, Settings

def mail():
    pass

def app():
    app = FastAPI()
    app.add_middleware(AftertaskMiddleware, settings=Settings(registry=CollectorRegistry()))

    @app.get("/")
    def endpoint(tasks: BackgroundTasks):
        tasks.add_task(mail)

    return TestClient(app)

one, other = app(), app()
for client in (one, other, one, other, other):
    client.get("/")
print(one.get("/metrics").text)
"""


def script(code: str, *arguments: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a process in multi-process mode."""
    env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(directory)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=20)


def test_apps_with_registries_of_their_own_count_together_in_one_directory(tmp_path: Path) -> None:
    """prometheus-client names the files of `PROMETHEUS_MULTIPROC_DIR` by process, so one set of metrics writes them."""
    done = script(TWO_REGISTRIES, directory=tmp_path)
    assert done.returncode == 0, done.stderr
    of = 'engine="local",outcome="succeeded",task="__main__.mail"'
    assert f"aftertask_tasks_finished_total{{{of}}} 5.0" in done.stdout


@pytest.mark.parametrize("kind", ["counter", "histogram", "gauge_livesum", "gauge_max"])
def test_a_file_that_a_worker_has_just_created_fails_no_scrape(tmp_path: Path, kind: str) -> None:
    """It is empty for a moment; if the worker is killed then, for ever."""
    (tmp_path / f"{kind}_1.db").touch()
    done = script(TWO_REGISTRIES, directory=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "aftertask_tasks_finished_total{" in done.stdout


def test_a_missing_directory_is_an_error_at_startup(tmp_path: Path) -> None:
    """It names the directory and the way out."""
    done = script(TWO_REGISTRIES, directory=tmp_path / "missing")
    assert "missing' is not a directory; create it before the workers start" in done.stderr
