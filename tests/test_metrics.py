"""The metrics as a scrape shows them: names, labels, the accounting rule, bounds."""

from __future__ import annotations

import gzip
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.testclient import TestClient

from aftertask import AftertaskMiddleware, Policy, Settings, _exchange, current_run, task
from aftertask.signals import families
from aftertask.testing import VirtualClock

ClientFor = Callable[..., TestClient]
OPENMETRICS = {"accept": "application/openmetrics-text"}


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    """One sample; `engine` is local unless said otherwise."""
    return registry.get_sample_value(f"aftertask_{name}", labels)


def local(registry: CollectorRegistry, name: str, task: str, **labels: str) -> float | None:
    """One sample of a task."""
    return value(registry, name, task=task, engine="local", **labels)


@task(name="shop.ok", owner="shop")
async def ok() -> None: ...


@task(name="shop.broken")
def broken() -> None:
    raise LookupError("no such order")


@task(name="shop.declined", expected=LookupError)
async def declined() -> None:
    raise LookupError("declined")


def test_every_number_of_a_run_that_succeeds(client_for: ClientFor, registry: CollectorRegistry) -> None:
    """Counted scheduled and finished, its wait, duration and whole life observed, nothing left in flight."""
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


def test_what_is_in_flight_is_told_while_it_is(client_for: ClientFor, registry: CollectorRegistry) -> None:
    """A scrape in the middle shows the running run, its age and its wait, and the queued sibling."""
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


def test_a_failure_is_counted_by_its_class_and_skips_its_siblings(
    client_for: ClientFor, registry: CollectorRegistry
) -> None:
    """The failed run is bad, and so is the one that was skipped for it."""
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
    """It is counted as failed all the same."""
    client_for(declined).get("/")
    assert local(registry, "tasks_finished_total", "shop.declined", outcome="failed") == 1
    assert local(registry, "tasks_bad_total", "shop.declined") == 0


def test_a_registered_task_has_its_series_from_the_start(registry: CollectorRegistry) -> None:
    """All at 0 before the first run, or the first failure is invisible to increase()."""
    AftertaskMiddleware(
        PlainTextResponse("ok"), settings=Settings(registry=registry, policies={"by.operator": Policy()})
    )

    @task(name="shop.late", owner="shop")
    def late() -> None: ...

    for name in ("shop.ok", "shop.late", "by.operator"):
        assert local(registry, "tasks_scheduled_total", name) == 0
        assert local(registry, "tasks_finished_total", name, outcome="failed") == 0
        assert local(registry, "attempt_duration_seconds_bucket", name, result="error", le="+Inf") == 0
        assert value(registry, "tasks_not_run_total", task=name, outcome="dropped", reason="handler_error") == 0
    assert value(registry, "task_info", task="shop.late", engine="local", owner="shop", executor="thread") == 1
    assert value(registry, "task_info", task="shop.ok", engine="local", owner="shop", executor="inline") == 1


def test_the_first_error_of_our_own_can_be_seen(client_for: ClientFor, registry: CollectorRegistry) -> None:
    """Its series is there at 0, under the very name it is counted under."""
    assert client_for(ok).get("/").status_code == 200
    assert value(registry, "self_errors_total", component=_exchange._PART) == 0


def test_labels_stay_few(client_for: ClientFor, registry: CollectorRegistry, caplog: pytest.LogCaptureFixture) -> None:
    """100 unregistered tasks have a label of their own; the others share one, which is counted, and warned of once."""

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
    assert (value(registry, "label_overflow_total", label="task") or 0) >= 20
    (warning,) = (record for record in caplog.records if record.message == "label.overflow")
    assert vars(warning)["folded_into"] == "__other__"


def test_error_types_stay_few(client_for: ClientFor, registry: CollectorRegistry) -> None:
    """Twenty classes a task have a label; the others are folded."""
    numbers = iter(range(25))

    @task(name="shop.creative")
    def creative() -> None:
        raise type(f"Error{next(numbers)}", (Exception,), {"__module__": "app"})("new every time")

    client = client_for(creative)
    for _ in range(25):
        client.get("/")

    counts = {
        sample.labels["error_type"]: sample.value
        for metric in registry.collect()
        if metric.name == "aftertask_attempt_errors"
        for sample in metric.samples
    }
    assert len(counts) == 21
    assert counts["__other__"] == 5
    assert value(registry, "label_overflow_total", label="error_type") == 5


def test_the_families_are_those_of_the_contract(client_for: ClientFor) -> None:
    """Types and labels as the telemetry documentation says them, and no family that it does not know."""
    told = {
        family.name: family.type
        for family in text_string_to_metric_families(client_for(ok).get("/metrics", headers=OPENMETRICS).text)
    }
    page = (Path(__file__).parent.parent / "docs" / "telemetry.md").read_text()
    for family in families.FAMILIES:
        assert told[family.full_name] == family.kind
        row = re.search(rf"\| `{family.name}(_total)?` \| {family.kind} \| (.*?) \|", page)
        assert row is not None, f"docs/telemetry.md does not tell of {family.name}"
        assert set(re.findall(r"`(\w+)`", row[2])) >= set(family.labels)
    assert set(told) == {family.full_name for family in families.FAMILIES}


def test_exemplars_name_the_span_of_the_attempt(client_for: ClientFor) -> None:
    """On the three histograms and the errors, for sampled spans."""
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


def test_no_exemplar_for_a_span_that_nobody_will_see(client_for: ClientFor) -> None:
    """A sampler that drops leaves none."""
    client = client_for(ok, tracer_provider=TracerProvider(sampler=ALWAYS_OFF))
    client.get("/")
    assert " # {" not in client.get("/metrics", headers=OPENMETRICS).text


def test_the_format_is_negotiated(client_for: ClientFor) -> None:
    """Text by default, OpenMetrics where asked, compressed where asked, without a body for HEAD."""
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


def test_only_named_families_where_asked(client_for: ClientFor) -> None:
    """`name[]` narrows a scrape, as it does for prometheus-client's own endpoint."""
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
    """A route or mount of that very path is the app's; a catch-all is none."""
    middleware = [Middleware(AftertaskMiddleware, settings=Settings(registry=registry))]
    text = TestClient(Starlette(routes=[route], middleware=middleware)).get("/metrics").text
    assert ("aftertask_build_info" in text) is ours


def test_a_fastapi_app_keeps_its_own_metrics_too(registry: CollectorRegistry) -> None:
    """Also when the route comes from an included router with a prefix."""
    app, router = FastAPI(), APIRouter(prefix="/metrics")

    @router.get("")
    def theirs() -> str:
        return "theirs"

    app.include_router(router)
    app.add_middleware(AftertaskMiddleware, settings=Settings(registry=registry))
    assert TestClient(app).get("/metrics").json() == "theirs"


def test_the_path_is_relative_to_the_root_path(registry: CollectorRegistry) -> None:
    """Behind a proxy that adds a prefix, and mounted under another app."""
    inner = Starlette(middleware=[Middleware(AftertaskMiddleware, settings=Settings(registry=registry))])
    assert "aftertask_build_info" in TestClient(inner, root_path="/api").get("/api/metrics").text
    outer = Starlette(routes=[Mount("/inside", app=inner)])
    assert "aftertask_build_info" in TestClient(outer).get("/inside/metrics").text
    assert TestClient(outer).get("/metrics").status_code == 404


def test_no_metrics_path_serves_none(client_for: ClientFor) -> None:
    """`metrics_path=None` leaves the path to the app."""
    assert client_for(ok, metrics_path=None).get("/metrics").status_code == 404


def test_excluded_routes_are_not_observed(registry: CollectorRegistry) -> None:
    """Paths, patterns and templates; everything else is."""
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

    assert [event.run.http_route for event in seen][::3] == ["/items/{id}/x", "/seen"]


TWO_REGISTRIES = """
from fastapi import BackgroundTasks, FastAPI
from prometheus_client import CollectorRegistry, generate_latest
from starlette.testclient import TestClient

from aftertask import AftertaskMiddleware, Settings
from aftertask.signals._multiprocess import all_processes

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
print(generate_latest(all_processes()).decode())
"""


def test_apps_with_registries_of_their_own_count_together_in_one_directory(tmp_path: Path) -> None:
    """The files of `PROMETHEUS_MULTIPROC_DIR` are kept by process and family: one book writes them."""
    env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", TWO_REGISTRIES], env=env, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    of = 'engine="local",outcome="succeeded",task="__main__.mail"'
    assert f"aftertask_tasks_finished_total{{{of}}} 5.0" in done.stdout
