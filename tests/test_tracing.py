"""Spans: one for each attempt, under the request's, with the attributes of the contract."""

from __future__ import annotations

import gc
import json
import logging
import re
import subprocess
import sys
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from fastapi import BackgroundTasks as Injected
from fastapi import FastAPI
from opentelemetry import baggage, trace
from opentelemetry.context import attach, detach
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased, Sampler, SamplingResult
from opentelemetry.trace import SpanKind, StatusCode
from prometheus_client import CollectorRegistry
from starlette.background import BackgroundTask
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from aftertask import AftertaskMiddleware, Retry, Settings, current_run, task
from aftertask.events import HazardFound, TaskRun
from aftertask.signals import Tracing
from kit import ClientFor, Traced

ROOT = Path(__file__).parent.parent


@task(name="trace.ok")
async def ok() -> None: ...


@task(name="trace.broken")
async def broken() -> None:
    raise LookupError("password=hunter2")


@pytest.fixture(params=["response", "request"])
def traced(request: pytest.FixtureRequest) -> Traced:
    """A provider that keeps every span; for apps with both values of `Settings.run_after`."""
    traced = Traced()
    traced.run_after = request.param
    return traced


class RequestSpan:
    """A span for each request, as a server's instrumentation makes one."""

    def __init__(self, app: Any, traced: Traced) -> None:
        self.app, self.tracer = app, traced.provider.get_tracer("server")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        with self.tracer.start_as_current_span("GET", record_exception=False, set_status_on_exception=False):
            await self.app(scope, receive, send)


def fastapi_app(traced: Traced, *functions: Any, settings: Settings | None = None, signals: Any = None) -> TestClient:
    """A FastAPI app that adds these functions as tasks at `/orders/{number}`, with a span for each request."""
    app = FastAPI()

    @app.get("/orders/{number}")
    async def endpoint(number: int, tasks: Injected) -> None:
        for function in functions:
            tasks.add_task(function)

    chosen = settings or Settings(
        registry=CollectorRegistry(), tracer_provider=traced.provider, run_after=traced.run_after
    )
    app.add_middleware(AftertaskMiddleware, settings=chosen, signals=signals)
    app.add_middleware(RequestSpan, traced=traced)
    return TestClient(app, raise_server_exceptions=False)


def attributes(span: ReadableSpan) -> Mapping[str, Any]:
    """A span's attributes."""
    return span.attributes or {}


# --- what a span has


def test_a_span_has_what_the_contract_lists(traced: Traced) -> None:
    """Name, kind, parent, scope, and the attributes of a run that succeeded."""
    runs = []

    @task(name="shop.look")
    async def look() -> None:
        runs.append(current_run())

    fastapi_app(traced, look).get("/orders/3")

    (span,), (request,) = traced.spans(), traced.spans("GET")
    assert (span.name, span.kind) == ("background_task shop.look", SpanKind.INTERNAL)
    assert span.parent is not None
    assert span.parent.span_id == request.context.span_id
    assert span.instrumentation_scope is not None
    assert span.instrumentation_scope.name == "aftertask"
    found = dict(attributes(span))
    assert found.pop("aftertask.queue_wait") >= 0
    assert found == {
        "code.function.name": f"{__name__}.test_a_span_has_what_the_contract_lists.<locals>.look",
        "http.route": "/orders/{number}",
        "http.request.method": "GET",
        "aftertask.task.name": "shop.look",
        "aftertask.run.id": runs[0].id,
        "aftertask.attempt": 1,
        "aftertask.max_attempts": 1,
        "aftertask.engine": "local",
        "aftertask.executor": "inline",
        "aftertask.priority": 0,
        "aftertask.origin": "request",
        "aftertask.outcome": "succeeded",
    }
    assert span.status.status_code is StatusCode.UNSET


def test_a_failure_marks_its_span_without_the_secret(traced: Traced) -> None:
    """Status ERROR has the class as description; the exception event is redacted."""
    fastapi_app(traced, broken).get("/orders/3")
    (span,) = traced.spans()
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "LookupError")
    assert (attributes(span)["error.type"], attributes(span)["aftertask.outcome"]) == ("LookupError", "failed")
    (event,) = span.events
    exception = dict(event.attributes or {})
    assert event.name == "exception"
    assert (exception["exception.type"], exception["exception.message"]) == ("LookupError", "password=[redacted]")
    assert "in broken" in str(exception["exception.stacktrace"])
    assert "hunter2" not in str(exception["exception.stacktrace"]).replace('LookupError("password=hunter2")', "")


def test_the_attributes_are_those_of_the_docs(traced: Traced) -> None:
    """The table in `docs/telemetry.md` lists every attribute that any span of ours has, and no other."""

    class Finds(Tracing):
        """A hazard for each attempt, as a watching thread finds them."""

        def started(self, event: Any) -> None:
            super().started(event)
            self.hazard_found(HazardFound(event.run, 0.0, "closed_upload", "file", "read it first", "stack"))
            event.run.blocked_s = 0.7
            self.loop_blocked_for(event.run, 0.7)

    async def parent() -> None:
        await BackgroundTask(ok)()

    fastapi_app(traced, parent, broken, signals=[Finds(traced.provider)]).get("/orders/3")

    text = (ROOT / "docs" / "telemetry.md").read_text().partition("## Spans")[2].partition("**Beside other")[0]
    rows = dict(re.findall(r"^\| (At start|At end|Hazards) \| (.*) \|$", text, re.MULTILINE))
    events = {"aftertask.hazard"}
    listed = {name for row in rows.values() for name in re.findall(r"`([a-z_]+\.[a-z_.]+)`", row)} - events
    by_threads = {"aftertask.thread_wait"}  # only if a sync task had to wait for one
    assert {key for span in traced.spans() for key in attributes(span)} == listed - by_threads
    found = [event for span in traced.spans() for event in span.events if event.name in events]
    assert found
    for event in found:
        assert set(event.attributes or {}) == {"kind", "argument", "advice", "stack"}


EXCEPTIONS = """
import json, os
from fastapi import BackgroundTasks, FastAPI
from opentelemetry import _logs
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import SimpleLogRecordProcessor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry
from starlette.testclient import TestClient
from aftertask import AftertaskMiddleware, Settings
from aftertask.signals import Tracing
try:
    from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter as Records
except ImportError:  # its name until 1.39
    from opentelemetry.sdk._logs.export import InMemoryLogExporter as Records

def broken():
    raise LookupError("password=hunter2")

records = Records()
logs = LoggerProvider(shutdown_on_exit=False)
logs.add_log_record_processor(SimpleLogRecordProcessor(records))
_logs.set_logger_provider(logs)
for opt_in in ("", "logs", "logs/dup", "http,logs"):
    os.environ["OTEL_SEMCONV_EXCEPTION_SIGNAL_OPT_IN"] = opt_in
    records.clear()
    spans, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    app = FastAPI()

    @app.get("/")
    async def endpoint(tasks: BackgroundTasks):
        tasks.add_task(broken)

    app.add_middleware(
        AftertaskMiddleware, settings=Settings(registry=CollectorRegistry()), signals=[Tracing(provider)]
    )
    TestClient(app, raise_server_exceptions=False).get("/")
    (span,) = spans.get_finished_spans()
    # FastAPI's own telemetry logs the exception, too.
    ours = [record for record in records.get_finished_logs() if record.instrumentation_scope.name == "aftertask"]
    logged = [record.log_record for record in ours]
    for record in logged:
        assert record.span_id == span.context.span_id and record.trace_id == span.context.trace_id
        assert record.event_name == "exception" and record.severity_text == "ERROR"
        assert record.attributes["exception.message"] == "password=[redacted]"
        assert "hunter2" not in record.attributes["exception.stacktrace"].replace('"password=hunter2"', "")
    print(json.dumps([opt_in, [event.name for event in span.events], len(logged), span.attributes["error.type"]]))
"""


def test_exceptions_go_where_opentelemetrys_variable_sends_them() -> None:
    """`OTEL_SEMCONV_EXCEPTION_SIGNAL_OPT_IN`: a span event (unset), a log record (`logs`), or both (`logs/dup`)."""
    done = subprocess.run([sys.executable, "-c", EXCEPTIONS], capture_output=True, text=True, timeout=18)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        ["", ["exception"], 0, "LookupError"],
        ["logs", [], 1, "LookupError"],
        ["logs/dup", ["exception"], 1, "LookupError"],
        ["http,logs", [], 1, "LookupError"],
    ]


# --- what is current, and whose child a span is


def test_the_tasks_own_spans_are_children(traced: Traced) -> None:
    """The attempt's span is current in the task, in a sync task's thread, too, and not in the next task."""
    tracer = traced.provider.get_tracer("app")

    def sync() -> None:
        with tracer.start_as_current_span("own sync"):
            pass

    async def asynchronous() -> None:
        with tracer.start_as_current_span("own async"):
            pass

    fastapi_app(traced, sync, asynchronous).get("/orders/3")
    for own, attempt in zip(traced.spans("own"), traced.spans(), strict=True):
        assert own.parent is not None
        assert own.parent.span_id == attempt.context.span_id


@pytest.mark.parametrize("function", [ok, broken])
def test_the_requests_span_is_current_again_after_the_batch(traced: Traced, function: Any) -> None:
    """Nothing of a run is left in the context, which a server may use for the next request; also after a failure."""
    current: list[str] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        try:
            await PlainTextResponse("ok", background=BackgroundTask(function))(scope, receive, send)
        finally:
            current.append(trace.get_current_span().name)  # type: ignore[attr-defined]  # the SDK's span has one

    settings = Settings(registry=CollectorRegistry(), tracer_provider=traced.provider)
    app = RequestSpan(AftertaskMiddleware(inner, settings=settings), traced)
    TestClient(app, raise_server_exceptions=False).get("/")
    assert current == ["GET"]
    assert len(traced.spans()) == 1


def test_the_requests_baggage_is_the_tasks(traced: Traced) -> None:
    """What OpenTelemetry's context holds besides the span stays there."""
    seen: list[object] = []

    async def look() -> None:
        seen.append(baggage.get_baggage("tenant"))

    client = fastapi_app(traced, look)
    inner = client.app

    async def with_baggage(scope: Any, receive: Any, send: Any) -> None:
        token = attach(baggage.set_baggage("tenant", "acme"))
        try:
            await inner(scope, receive, send)
        finally:
            detach(token)

    TestClient(with_baggage).get("/orders/3")
    assert seen == ["acme"]


def test_the_parent_is_the_span_around_the_middleware(traced: Traced) -> None:
    """A span that an endpoint left open is not the parent: the task belongs to its request."""
    tracer = traced.provider.get_tracer("app")
    app = FastAPI()

    @app.get("/")
    async def endpoint(tasks: Injected) -> None:
        attach(trace.set_span_in_context(tracer.start_span("left open")))
        tasks.add_task(ok)

    app.add_middleware(
        AftertaskMiddleware, settings=Settings(registry=CollectorRegistry(), tracer_provider=traced.provider)
    )
    app.add_middleware(RequestSpan, traced=traced)
    TestClient(app).get("/")
    (span,), (request,) = traced.spans(), traced.spans("GET")
    assert span.parent is not None
    assert span.parent.span_id == request.context.span_id


def test_a_child_run_is_a_child_span(traced: Traced) -> None:
    """A task that a task awaits has a span under its own, and its run's id."""

    async def parent() -> None:
        await BackgroundTask(ok)()

    fastapi_app(traced, parent).get("/orders/3")
    child, outer = traced.spans()
    assert child.parent is not None
    assert child.parent.span_id == outer.context.span_id
    assert attributes(child)["aftertask.parent_run.id"] == attributes(outer)["aftertask.run.id"]


def test_a_second_attempt_has_a_span_of_its_own_that_links_to_the_first(traced: Traced) -> None:
    """One span for each attempt; only the last has an outcome."""

    @task(name="shop.twice", retry=Retry(attempts=3, wait_initial=0))
    async def twice() -> None:
        run = current_run()
        assert run is not None
        if run.attempt < 3:
            raise ConnectionError("refused")

    fastapi_app(traced, twice).get("/orders/3")
    first, second, third = traced.spans()
    assert [attributes(span)["aftertask.attempt"] for span in (first, second, third)] == [1, 2, 3]
    assert [attributes(span).get("aftertask.outcome") for span in (first, second, third)] == [None, None, "succeeded"]
    assert [span.status.status_code.name for span in (first, second, third)] == ["ERROR", "ERROR", "UNSET"]
    assert [link.context.span_id for span in (second, third) for link in span.links] == [first.context.span_id] * 2
    assert first.links == ()
    assert "aftertask.queue_wait" in attributes(first) and "aftertask.queue_wait" not in attributes(second)
    (request,) = traced.spans("GET")
    assert {span.parent and span.parent.span_id for span in (first, second, third)} == {request.context.span_id}


def test_link_makes_a_trace_of_its_own(traced: Traced) -> None:
    """A root linked to the request's span; `@task(trace=…)` wins over the app's setting."""

    @task(name="shop.none", trace="none")
    async def none() -> None: ...

    @task(name="shop.child", trace="child")
    async def child() -> None: ...

    settings = Settings(registry=CollectorRegistry(), tracer_provider=traced.provider, trace="link")
    fastapi_app(traced, ok, none, child, settings=settings).get("/orders/3")
    (request,) = traced.spans("GET")
    linked, under = traced.spans()
    assert linked.parent is None
    assert linked.context.trace_id != request.context.trace_id
    assert [link.context.span_id for link in linked.links] == [request.context.span_id]
    assert attributes(linked)["aftertask.outcome"] == "succeeded"
    assert under.parent is not None
    assert under.parent.span_id == request.context.span_id


# --- with which provider


def test_without_a_provider_there_is_no_span(client_for: ClientFor) -> None:
    """Neither a span nor a context that looks like one."""
    seen: list[Any] = []

    async def look() -> None:
        run = current_run()
        assert run is not None
        seen.extend([run.span_context, trace.get_current_span().get_span_context().is_valid])

    client_for(look).get("/")
    assert seen == [None, False]


def test_a_sampler_that_drops_leaves_no_span_and_the_trace_id_stays() -> None:
    """Under a request that is not sampled nothing is exported; log keys have the request's trace id."""
    traced = Traced(sampler=ParentBased(ALWAYS_OFF))
    seen: list[Any] = []

    async def look() -> None:
        run = current_run()
        assert run is not None
        seen.extend([run.span_context, trace.get_current_span().get_span_context()])

    fastapi_app(traced, look).get("/orders/3")
    assert traced.exporter.get_finished_spans() == ()
    assert seen[0].trace_id == seen[1].trace_id > 0
    assert not seen[0].trace_flags & 1


class Counting(Sampler):
    """A sampler of the user's own: counts what it is asked, and adds an attribute."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def should_sample(self, parent_context: Any, trace_id: int, name: str, *args: Any, **kwargs: Any) -> SamplingResult:
        self.names.append(name)
        given = args[1] if len(args) > 1 else kwargs.get("attributes")
        result = ALWAYS_ON.should_sample(parent_context, trace_id, name)
        return SamplingResult(result.decision, {**(given or {}), "sampled.by": "me"}, result.trace_state)

    def get_description(self) -> str:
        return "counting"


def test_a_sampler_of_the_users_own_is_asked_once_a_span() -> None:
    """What it adds is on the span."""
    sampler = Counting()
    traced = Traced(sampler=sampler)
    fastapi_app(traced, ok).get("/orders/3")
    assert sampler.names.count("background_task trace.ok") == 1
    assert attributes(traced.spans()[0])["sampled.by"] == "me"


@pytest.mark.parametrize("limits", [SpanLimits(max_span_attributes=3), SpanLimits(max_span_attribute_length=4)])
def test_the_users_span_limits_hold(limits: SpanLimits) -> None:
    """The number and the length of attributes are those that the user allows."""
    traced = Traced(span_limits=limits)
    fastapi_app(traced, ok).get("/orders/3")
    found = attributes(traced.spans()[0])
    assert len(found) <= 3 or all(len(value) <= 4 for value in found.values() if isinstance(value, str))


def test_a_processor_that_is_added_later_sees_every_start(traced: Traced) -> None:
    """Also if spans have been made before."""
    started: list[str] = []

    class Seeing(SpanProcessor):
        def on_start(self, span: Any, parent_context: Any = None) -> None:
            started.append(span.name)

    client = fastapi_app(traced, ok)
    client.get("/orders/3")
    traced.provider.add_span_processor(Seeing())
    client.get("/orders/3")
    assert started.count("background_task trace.ok") == 1


def test_a_processor_that_raises_breaks_no_task(traced: Traced, registry: CollectorRegistry) -> None:
    """The error is counted, the task succeeds, and the next span is made."""

    class Broken(SpanProcessor):
        def on_end(self, span: ReadableSpan) -> None:
            if span.name.startswith("background_task"):
                raise RuntimeError("exporter down")

    traced.provider.add_span_processor(Broken())
    settings = Settings(registry=registry, tracer_provider=traced.provider)
    fastapi_app(traced, ok, ok, settings=settings).get("/orders/3")
    component = {"component": "aftertask.signals.tracing.Tracing"}
    assert registry.get_sample_value("aftertask_self_errors_total", component) == 2
    succeeded = {"task": "trace.ok", "engine": "local", "outcome": "succeeded"}
    assert registry.get_sample_value("aftertask_tasks_finished_total", succeeded) == 2
    assert len(traced.spans()) == 2


def test_spans_reach_a_batch_processor() -> None:
    """`force_flush` exports what has ended."""
    exporter, traced = InMemorySpanExporter(), Traced()
    traced.provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=60_000))
    fastapi_app(traced, ok, ok).get("/orders/3")
    assert traced.provider.force_flush()
    names = [span.name for span in exporter.get_finished_spans()]
    assert names.count("background_task trace.ok") == 2
    traced.provider.shutdown()


def test_a_task_may_use_its_span(traced: Traced) -> None:
    """Attributes and events that the task adds are kept; a span that it ends early stays as it was then."""

    async def adds() -> None:
        span = trace.get_current_span()
        span.set_attribute("mine", 1)
        span.add_event("happened")

    async def ends() -> None:
        trace.get_current_span().end()

    fastapi_app(traced, adds, ends).get("/orders/3")
    added, ended = traced.spans()
    assert (attributes(added)["mine"], [event.name for event in added.events]) == (1, ["happened"])
    assert attributes(added)["aftertask.outcome"] == "succeeded"
    assert "aftertask.outcome" not in attributes(ended)


def test_only_a_tracer_of_the_same_provider_is_one(traced: Traced) -> None:
    """Tracers of another provider, a no-op tracer and no tracer at all do not feed ours; with `none` ours is no use."""
    ours = Tracing(traced.provider)
    assert ours.same_provider(traced.provider.get_tracer("x"))
    assert not ours.same_provider(TracerProvider().get_tracer("x"))
    assert not ours.same_provider(trace.NoOpTracer())
    assert not ours.same_provider(trace.ProxyTracer("x"))  # feeds the global provider, which is another
    assert not ours.same_provider(None)
    assert not Tracing(traced.provider, trace="none").same_provider(traced.provider.get_tracer("x"))
    assert not Tracing().same_provider(trace.ProxyTracer("x"))  # there is no global provider: nothing makes a span


@pytest.fixture
def no_records() -> Iterator[None]:
    """pytest keeps log records, and with them exceptions and their frames."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("no_records")
def test_a_run_that_ends_leaves_nothing_behind(traced: Traced, client_for: ClientFor) -> None:
    """After its outcome no signal refers to a run."""
    runs: list[weakref.ref[TaskRun]] = []

    @task(name="shop.seen", retry=Retry(attempts=2, wait_initial=0))
    async def seen() -> None:
        run = current_run()
        assert run is not None
        runs.append(weakref.ref(run))
        raise ConnectionError("refused")

    client_for(seen, ok, tracer_provider=traced.provider).get("/")
    gc.collect()
    assert [run() for run in runs] == [None, None]
