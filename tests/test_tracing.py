"""Spans: one an attempt, under the request's, as OpenTelemetry would make it itself."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import BackgroundTasks as Injected
from fastapi import FastAPI
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased, Sampler, SamplingResult
from opentelemetry.trace import SpanKind, StatusCode
from prometheus_client import CollectorRegistry
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.testclient import TestClient

from aftertask import AftertaskMiddleware, Settings, current_run, task
from aftertask.signals import Tracing, _spans

ClientFor = Callable[..., TestClient]


@task(name="trace.ok")
async def ok() -> None: ...


@task(name="trace.broken")
async def broken() -> None:
    raise LookupError("password=hunter2")


class Traced:
    """A provider whose spans are kept."""

    def __init__(self, **kwargs: Any) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(**kwargs)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))

    def spans(self, prefix: str = "background_task") -> list[ReadableSpan]:
        """The finished spans whose name begins so."""
        return [span for span in self.exporter.get_finished_spans() if span.name.startswith(prefix)]


@pytest.fixture
def traced() -> Traced:
    """A provider that keeps every span."""
    return Traced()


try:
    import fastapi.telemetry  # noqa: F401  # since 0.142

    NATIVE = True
except ImportError:
    NATIVE = False
native = pytest.mark.skipif(not NATIVE, reason="FastAPI traces its tasks since 0.142")


class RequestSpan:
    """In the place of a server's instrumentation: a span for each request."""

    def __init__(self, app: Any, traced: Traced) -> None:
        self.app, self.tracer = app, traced.provider.get_tracer("server")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        with self.tracer.start_as_current_span("GET", record_exception=False, set_status_on_exception=False):
            await self.app(scope, receive, send)


def fastapi_app(traced: Traced, *functions: Any, telemetry: Any = None, settings: Any = None) -> TestClient:
    """A FastAPI app with injected tasks at `/orders/{number}`, and a span for its requests, FastAPI's own if asked."""
    app = FastAPI(telemetry=telemetry) if telemetry else FastAPI()

    @app.get("/orders/{number}")
    async def endpoint(number: int, tasks: Injected) -> None:
        for function in functions:
            tasks.add_task(function)

    chosen = settings or Settings(registry=CollectorRegistry(), tracer_provider=traced.provider)
    app.add_middleware(AftertaskMiddleware, settings=chosen)
    if telemetry is None:
        app.add_middleware(RequestSpan, traced=traced)
    return TestClient(app, raise_server_exceptions=False)


def test_a_span_says_what_the_contract_says(traced: Traced) -> None:
    """Name, kind, parent, attributes at start and end."""
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
    attributes = dict(span.attributes or {})
    assert attributes.pop("aftertask.queue_wait") >= 0
    assert attributes == {
        "code.function.name": f"{__name__}.test_a_span_says_what_the_contract_says.<locals>.look",
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


def test_a_failure_marks_its_span_and_tells_no_secret(traced: Traced) -> None:
    """Status ERROR with the class as description; the exception event redacted."""
    fastapi_app(traced, broken).get("/orders/3")
    (span,) = traced.spans()
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "LookupError")
    attributes = span.attributes or {}
    assert (attributes["error.type"], attributes["aftertask.outcome"]) == ("LookupError", "failed")
    (event,) = span.events
    told = dict(event.attributes or {})
    assert event.name == "exception"
    assert (told["exception.type"], told["exception.message"]) == ("LookupError", "password=[redacted]")
    assert "in broken" in str(told["exception.stacktrace"])
    assert "hunter2" not in str(told["exception.stacktrace"]).replace('LookupError("password=hunter2")', "")


@pytest.mark.parametrize(
    ("opt_in", "events", "records"), [("", 1, 0), ("logs", 0, 1), ("logs/dup", 1, 1), ("http,logs", 0, 1)]
)
def test_exceptions_go_where_opentelemetry_is_told_to_put_them(
    traced: Traced, monkeypatch: pytest.MonkeyPatch, opt_in: str, events: int, records: int
) -> None:
    """OTEL_SEMCONV_EXCEPTION_SIGNAL_OPT_IN: a span event, a log record, or both."""
    from opentelemetry.sdk._logs import LoggerProvider
    from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter, SimpleLogRecordProcessor

    from aftertask.signals import tracing

    kept = InMemoryLogRecordExporter()
    provider = LoggerProvider()
    provider.add_log_record_processor(SimpleLogRecordProcessor(kept))
    monkeypatch.setattr(tracing, "get_logger", lambda name: provider.get_logger(name))
    monkeypatch.setenv("OTEL_SEMCONV_EXCEPTION_SIGNAL_OPT_IN", opt_in)

    fastapi_app(traced, broken).get("/orders/3")

    (span,) = traced.spans()
    assert len(span.events) == events
    logs = kept.get_finished_logs()
    assert len(logs) == records
    for each in logs:
        assert each.log_record.span_id == span.context.span_id
        assert dict(each.log_record.attributes or {})["exception.message"] == "password=[redacted]"
    provider.shutdown()


def test_the_tasks_own_spans_are_children(traced: Traced) -> None:
    """The span is current in the task, in a sync task's thread too, and no longer for the next one."""
    tracer = traced.provider.get_tracer("app")

    def sync() -> None:
        with tracer.start_as_current_span("own sync"):
            pass

    async def asynchronous() -> None:
        with tracer.start_as_current_span("own async"):
            pass

    fastapi_app(traced, sync, asynchronous).get("/orders/3")
    for own, of in zip(traced.spans("own"), traced.spans(), strict=True):
        assert own.parent is not None
        assert own.parent.span_id == of.context.span_id


@pytest.mark.parametrize("function", [ok, broken])
def test_the_requests_span_is_current_again_after_the_batch(traced: Traced, function: Any) -> None:
    """Also after a failure: nothing of a run is left in the context, which uvicorn may hand to the next request."""
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


def test_a_child_run_is_a_child_span(traced: Traced) -> None:
    """With its parent run's id."""

    async def parent() -> None:
        await BackgroundTask(ok)()

    fastapi_app(traced, parent).get("/orders/3")
    child, outer = traced.spans()
    assert child.parent is not None
    assert child.parent.span_id == outer.context.span_id
    assert (child.attributes or {})["aftertask.parent_run.id"] == (outer.attributes or {})["aftertask.run.id"]


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
    assert (linked.attributes or {})["aftertask.outcome"] == "succeeded"
    assert under.parent is not None
    assert under.parent.span_id == request.context.span_id


def test_without_a_provider_there_is_no_span(client_for: ClientFor) -> None:
    """And nothing that looks like one."""
    seen: list[Any] = []

    async def look() -> None:
        run = current_run()
        assert run is not None
        seen.extend([run.span_context, trace.get_current_span().get_span_context().is_valid])

    client_for(look).get("/")
    assert seen == [None, False]


@native
def test_fastapis_own_span_is_left_out_where_it_feeds_the_same_provider(traced: Traced) -> None:
    """One span an attempt, ours; FastAPI's request key is what it was in the task."""
    fastapi_app(traced, ok, broken, telemetry={"tracer_provider": traced.provider}).get("/orders/3")
    assert [span.name for span in traced.spans()] == ["background_task trace.ok", "background_task trace.broken"]
    assert traced.spans("fastapi.background_task") == []


@native
def test_fastapis_own_span_stays_where_it_feeds_another(traced: Traced) -> None:
    """Its names and its status are not ours to change."""
    other = Traced()
    fastapi_app(traced, ok, broken, telemetry={"tracer_provider": other.provider}).get("/orders/3")
    assert [span.status.status_code.name for span in other.spans("fastapi.background_task")] == ["UNSET", "ERROR"]
    assert len(traced.spans()) == 2


@native
def test_fastapis_own_span_stays_where_ours_is_switched_off(traced: Traced) -> None:
    """`trace="none"` for the app leaves tracing to FastAPI."""
    settings = Settings(registry=CollectorRegistry(), tracer_provider=traced.provider, trace="none")
    fastapi_app(traced, ok, settings=settings, telemetry={"tracer_provider": traced.provider}).get("/orders/3")
    assert traced.spans() == []
    assert len(traced.spans("fastapi.background_task")) == 1


def test_a_sampler_that_drops_leaves_no_span_and_the_ids_stay() -> None:
    """An unsampled parent: nothing is exported, the log keys are the request's."""
    traced = Traced(sampler=ParentBased(ALWAYS_OFF))
    seen: list[Any] = []

    async def look() -> None:
        run = current_run()
        assert run is not None
        seen.append(run.span_context)

    fastapi_app(traced, look).get("/orders/3")
    assert traced.exporter.get_finished_spans() == ()
    assert seen[0].trace_id > 0
    assert not seen[0].trace_flags & 1


class Asked(Sampler):
    """A sampler of the user's own: counts, and adds an attribute."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def should_sample(self, parent_context: Any, trace_id: int, name: str, *args: Any, **kwargs: Any) -> SamplingResult:
        self.names.append(name)
        given = args[1] if len(args) > 1 else kwargs.get("attributes")
        result = ALWAYS_ON.should_sample(parent_context, trace_id, name, attributes=given)
        return SamplingResult(result.decision, {**(given or {}), "sampled.by": "me"}, result.trace_state)

    def get_description(self) -> str:
        return "asked"


def test_a_sampler_of_the_users_own_is_asked_once_a_span() -> None:
    """And what it adds is on the span."""
    sampler = Asked()
    traced = Traced(sampler=sampler)
    fastapi_app(traced, ok).get("/orders/3")
    assert sampler.names.count("background_task trace.ok") == 1
    assert (traced.spans()[0].attributes or {})["sampled.by"] == "me"


def test_a_copied_span_is_the_one_that_the_sdk_makes(traced: Traced) -> None:
    """To the last field of its JSON, with attributes, events, links, status and a second end."""
    tracer: Any = traced.provider.get_tracer("aftertask", "1")
    start, shares = _spans.starter(tracer)
    assert shares, "the fast path does not understand this SDK any more: spans are started as usual, only slower"
    parent = trace.set_span_in_context(tracer.start_span("request"))
    parent_context = trace.get_current_span(parent).get_span_context()
    attributes = {"a": "x", "b": 1, "c": 0.5, "d": True}

    def finish(span: Any) -> dict[str, Any]:
        span.set_attribute("e", (1, 2))
        span.add_event("happened", {"k": "v"})
        span.add_link(parent_context)
        span.record_exception(ValueError("x"))
        span.set_status(StatusCode.ERROR, "no")
        span.update_name("renamed")
        span.end()
        readable = traced.exporter.get_finished_spans()[-1]
        import json

        told = json.loads(readable.to_json())
        for key in ("start_time", "end_time"):
            told.pop(key)
        told["context"].pop("span_id")
        for event in told["events"]:
            event.pop("timestamp")
        return dict(told)

    usual = finish(tracer.start_span("name", parent, SpanKind.INTERNAL, dict(attributes)))
    copied = finish(start("name", parent, parent_context, dict(attributes)))
    assert copied == usual
    assert type(start("n", parent, parent_context, {})) is type(tracer.start_span("n", parent))


@pytest.mark.parametrize("limits", [SpanLimits(max_span_attributes=3), SpanLimits(max_span_attribute_length=4)])
def test_the_users_span_limits_hold(limits: SpanLimits, caplog: pytest.LogCaptureFixture) -> None:
    """Spans are then started as usual."""
    traced = Traced(span_limits=limits)
    fastapi_app(traced, ok).get("/orders/3")
    attributes = dict(traced.spans()[0].attributes or {})
    assert len(attributes) <= 3 or all(len(str(value)) <= 4 for value in attributes.values() if isinstance(value, str))


def test_a_processor_that_is_added_later_sees_every_start(traced: Traced) -> None:
    """Also after spans have begun to be copied."""
    from opentelemetry.sdk.trace import SpanProcessor

    started: list[str] = []

    class Seeing(SpanProcessor):
        def on_start(self, span: Any, parent_context: Any = None) -> None:
            started.append(span.name)

    client = fastapi_app(traced, ok)
    client.get("/orders/3")
    traced.provider.add_span_processor(Seeing())
    client.get("/orders/3")
    client.get("/orders/3")
    assert started.count("background_task trace.ok") == 2


def test_contribs_span_is_left_out_where_it_feeds_the_same_provider(traced: Traced) -> None:
    """opentelemetry-instrumentation-fastapi wraps BackgroundTask.__call__ for the whole process; before or after us."""
    from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor

    async def both(tasks: Injected) -> JSONResponse:
        tasks.add_task(broken)
        return JSONResponse({}, background=BackgroundTask(ok))

    for other in (traced, Traced()):
        app = FastAPI()
        app.get("/")(both)
        settings = Settings(registry=CollectorRegistry(), tracer_provider=traced.provider)
        app.user_middleware.insert(0, Middleware(AftertaskMiddleware, settings=settings))
        wrapped = BackgroundTask.__call__
        FastAPIInstrumentor.instrument_app(app, tracer_provider=other.provider)
        try:
            TestClient(app, raise_server_exceptions=False).get("/")
        finally:
            FastAPIInstrumentor.uninstrument_app(app)
        assert BackgroundTask.__call__ is wrapped
        assert [span.name for span in traced.spans()] == ["background_task trace.ok"]
        assert [span.name for span in other.spans("BackgroundTask")] == (
            [] if other is traced else ["BackgroundTask ok"]
        )
        traced.exporter.clear()
    TestClient(app, raise_server_exceptions=False).get("/")
    assert [span.name for span in traced.spans()] == ["background_task trace.ok"]


def test_feeds_knows_only_the_same_provider(traced: Traced) -> None:
    """Another provider's tracer, a no-op one and nothing at all do not feed ours."""
    ours = Tracing(traced.provider)
    assert ours.feeds(traced.provider.get_tracer("x"))
    assert not ours.feeds(TracerProvider().get_tracer("x"))
    assert not ours.feeds(trace.NoOpTracer())
    assert not ours.feeds(None)
    assert not Tracing(traced.provider, trace="none").feeds(traced.provider.get_tracer("x"))


CONTRIB = """
import sys
from fastapi import BackgroundTasks, FastAPI
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.background import BackgroundTask
from starlette.responses import JSONResponse
from starlette.testclient import TestClient
from aftertask import AftertaskMiddleware, Settings

exporter, provider = InMemorySpanExporter(), TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
app = FastAPI()

async def first(): ...
def second(): ...

@app.get("/injected")
async def injected(tasks: BackgroundTasks):
    tasks.add_task(first)
    tasks.add_task(second)

@app.get("/direct")
async def direct():
    return JSONResponse({}, background=BackgroundTask(first))

def ours():
    app.add_middleware(AftertaskMiddleware, settings=Settings(tracer_provider=provider), signals=None)
    AftertaskMiddleware(app)  # sets the hooks now, not with the first request

def theirs():
    FastAPIInstrumentor.instrument_app(app, tracer_provider=provider)

for step in sys.argv[1].split(","):
    {"ours": ours, "theirs": theirs}[step]()

def spans():
    with_name = [span for span in exporter.get_finished_spans() if "ackground" in span.name]
    exporter.clear()
    return [span.name for span in with_name]

client = TestClient(app)
client.get("/injected")
assert spans() == ["background_task __main__.first", "background_task __main__.second"]
client.get("/direct")
assert spans() == ["background_task __main__.first"]
FastAPIInstrumentor.uninstrument_app(app)
client.get("/injected")
client.get("/direct")
assert spans() == [f"background_task __main__.{name}" for name in ("first", "second", "first")]
"""


@pytest.mark.parametrize("order", ["ours,theirs", "theirs,ours"])
def test_contrib_before_or_after_us_and_gone_again(order: str) -> None:
    """In a process of its own: it patches the class for all apps, and takes its patch away with ours on top."""
    done = subprocess.run([sys.executable, "-c", CONTRIB, order], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
