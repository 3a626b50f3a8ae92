"""Spans: one an attempt, under the request's, as OpenTelemetry would make it itself."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, cast

import pytest
from fastapi import BackgroundTasks as Injected
from fastapi import FastAPI
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import (
    ConcurrentMultiSpanProcessor,
    ReadableSpan,
    SpanLimits,
    SpanProcessor,
    SynchronousMultiSpanProcessor,
    TracerProvider,
)
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import (
    ALWAYS_OFF,
    ALWAYS_ON,
    Decision,
    ParentBased,
    Sampler,
    SamplingResult,
    TraceIdRatioBased,
)
from opentelemetry.sdk.util import BoundedList
from opentelemetry.trace import SpanContext, SpanKind, StatusCode, TraceFlags
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
    """A sampler of the user's own: counts, and answers as it was told to."""

    def __init__(self, attributes: Any = None, decision: Decision = Decision.RECORD_AND_SAMPLE) -> None:
        self.names: list[str] = []
        self.attributes = attributes or (lambda given: {**given, "sampled.by": "me"})
        self.decision = decision

    def should_sample(self, parent_context: Any, trace_id: int, name: str, *args: Any, **kwargs: Any) -> SamplingResult:
        self.names.append(name)
        given = args[1] if len(args) > 1 else kwargs.get("attributes")
        result = ALWAYS_ON.should_sample(parent_context, trace_id, name, attributes=given)
        if name == "request":
            return result
        return SamplingResult(self.decision, self.attributes(given or {}), result.trace_state)

    def get_description(self) -> str:
        return "asked"


def test_a_sampler_of_the_users_own_is_asked_once_a_span() -> None:
    """And what it adds is on the span."""
    sampler = Asked()
    traced = Traced(sampler=sampler)
    fastapi_app(traced, ok).get("/orders/3")
    assert sampler.names.count("background_task trace.ok") == 1
    assert (traced.spans()[0].attributes or {})["sampled.by"] == "me"


class Both:
    """The same span twice: made by the SDK alone, and copied, where `spans` is not None."""

    attributes: ClassVar[dict[str, Any]] = {"a": "x", "b": 1, "c": 0.5, "d": True}

    def __init__(self, traced: Traced) -> None:
        self.traced = traced
        self.tracer: Any = traced.provider.get_tracer("aftertask", "1")
        self.start, self.end = _spans.spans_of(self.tracer)
        assert self.start.__name__ == "start", "spans are not copied with this SDK any more, only started as usual"
        self.context = trace.set_span_in_context(self.tracer.start_span("request"))
        self.parent = trace.get_current_span(self.context).get_span_context()

    def usual(self, use: Callable[[Any], object]) -> Any:
        """The SDK's own."""
        span = self.tracer.start_span("name", self.context, SpanKind.INTERNAL, dict(self.attributes))
        use(span)
        span.set_attribute("aftertask.outcome", "succeeded")
        span.end()
        return span

    def copied(self, use: Callable[[Any], object]) -> Any:
        """Ours."""
        live = self.start("name", self.context, self.parent, dict(self.attributes))
        use(live[0])
        self.end(live, "succeeded")
        return live[0]

    def check(self, use: Callable[[Any], object]) -> dict[str, Any]:
        """Both tell the same; returns what."""
        spans = [self.usual(use), self.copied(use)]
        told = [each for each in self.traced.exporter.get_finished_spans() if each.name != "request"]
        assert [each.context.span_id for each in told] == [span.get_span_context().span_id for span in spans]
        usual, copied = told
        assert type(copied) is type(usual)
        assert copied.__dict__.keys() == usual.__dict__.keys()
        assert type(spans[0]) is type(spans[1])
        assert spans[0].__dict__.keys() == spans[1].__dict__.keys()
        assert self.fields(copied) == self.fields(usual)
        assert self.fields(spans[1]) == self.fields(spans[0])
        return self.fields(usual)

    @staticmethod
    def fields(span: Any) -> dict[str, Any]:
        """All that can be asked of a span but what differs each time."""
        told = json.loads(span.to_json())
        assert span.start_time <= span.end_time <= time.time_ns()
        for key in ("start_time", "end_time"):
            told.pop(key)
        assert int(told["context"].pop("span_id"), 16) > 0
        for event in told["events"]:
            event.pop("timestamp")
        dropped = span.dropped_attributes, span.dropped_events, span.dropped_links
        counted = [len(span.events), len(span.links), len(span._events)]
        if hasattr(BoundedList, "__deepcopy__"):  # older ones cannot be copied
            counted.append(len(copy.deepcopy(span._events)))
        return {**told, "dropped": dropped, "counted": counted, "flags": span.context.trace_flags, "kind": span.kind}


def touched(span: Any) -> None:
    """Everything that a task's own code can do with its span."""
    span.set_attribute("e", (1, 2))
    span.set_attributes({"f": "x", "a": "changed"})
    span.add_event("happened", {"k": "v"})
    span.add_link(SpanContext(1, 2, False, TraceFlags(1)))
    span.record_exception(ValueError("x"))
    span.set_status(StatusCode.ERROR, "no")
    span.update_name("renamed")


def many(span: Any) -> None:
    """More of everything than the SDK keeps."""
    for number in range(200):
        span.set_attribute(f"n{number}", number)
        span.add_event(f"n{number}")
        span.add_link(SpanContext(1, 2, False, TraceFlags(1)))


def nearly_full(span: Any) -> None:
    """One attribute more, and it is full."""
    for number in range(124):
        span.set_attribute(f"n{number}", number)


def with_outcome(span: Any) -> None:
    """What we write is there already."""
    span.set_attribute("aftertask.outcome", "mine")


@pytest.mark.parametrize("use", [lambda span: None, touched, many, nearly_full, with_outcome])
def test_a_copied_span_is_the_one_that_the_sdk_makes(traced: Traced, use: Callable[[Any], object]) -> None:
    """To the last field: attributes, events, links, status, and what was dropped."""
    told = Both(traced).check(use)
    assert told["attributes"]["aftertask.outcome"] == "succeeded"
    assert told["dropped"] != (0, 0, 0) or use is not many


def test_a_span_that_the_task_ended_stays_ended(traced: Traced, caplog: pytest.LogCaptureFixture) -> None:
    """It is told once, as it was then; the SDK says so in its own words."""
    told = Both(traced).check(lambda span: span.end())
    assert "aftertask.outcome" not in told["attributes"]
    assert caplog.messages == ["Setting attribute on ended span.", "Calling end() on an ended span."] * 2


@pytest.mark.parametrize(
    "sampler",
    [
        ALWAYS_ON,
        ParentBased(ALWAYS_ON),
        ParentBased(TraceIdRatioBased(1.0)),
        Asked(),
        Asked(lambda given: None),
        Asked(lambda given: {**given, "a": ["other"]}),
        Asked(lambda given: dict(given)),
    ],
)
def test_a_copied_span_is_the_one_that_the_sampler_wants(sampler: Sampler) -> None:
    """Its attributes are the sampler's, cleaned by the SDK where they are not ours."""
    Both(Traced(sampler=sampler)).check(touched)


@pytest.mark.parametrize("decision", [Decision.DROP, Decision.RECORD_ONLY])
def test_a_span_that_is_not_exported(decision: Decision) -> None:
    """Dropped, or recorded for processors alone; the sampler is asked once."""
    ended: list[Any] = []

    class Seeing(SpanProcessor):
        def on_end(self, span: ReadableSpan) -> None:
            ended.append(Both.fields(span))

    sampler = Asked(decision=decision)
    traced = Traced(sampler=sampler)
    traced.provider.add_span_processor(Seeing())
    both = Both(traced)
    spans = [both.usual(touched if decision is Decision.RECORD_ONLY else str)]
    spans += [both.copied(touched if decision is Decision.RECORD_ONLY else str)]
    assert traced.exporter.get_finished_spans() == ()
    assert sampler.names.count("name") == 2
    assert len(ended) == (2 if decision is Decision.RECORD_ONLY else 0)
    assert ended[:1] == ended[1:]
    first, second = (span.get_span_context() for span in spans)
    assert type(spans[0]) is type(spans[1])
    assert tuple(first)[2:] == tuple(second)[2:]
    assert first.trace_id == second.trace_id


class Recorder(SpanProcessor):
    """What a processor is told, and in which order."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str, bool]] = []

    def on_start(self, span: Any, parent_context: Any = None) -> None:
        self.told.append(("start", type(span).__name__, span.is_recording()))

    def on_end(self, span: ReadableSpan) -> None:
        self.told.append(("end", type(span).__name__, "aftertask.outcome" in (span.attributes or {})))


class Ending(Recorder):
    """And before a span ends."""

    def _on_ending(self, span: Any) -> None:
        self.told.append(("ending", type(span).__name__, span.is_recording()))


@pytest.mark.parametrize("held_by", [SynchronousMultiSpanProcessor, ConcurrentMultiSpanProcessor])
@pytest.mark.parametrize("kind", [Recorder, Ending])
def test_processors_are_told_what_the_sdk_tells_them(kind: type[Recorder], held_by: Any) -> None:
    """Start, ending and end, of each span; also by one that is added later, and when a span is already live."""
    traced = Traced(active_span_processor=held_by())
    both, first, second = Both(traced), kind(), kind()

    def add_second(span: Any) -> None:
        traced.provider.add_span_processor(second)

    both.copied(str)
    traced.provider.add_span_processor(first)
    told = []
    for make in (both.usual, both.copied):
        make(str)
        told.append(first.told[:])
        first.told.clear()
    assert told[0] == told[1] != []
    both.copied(add_second)
    assert second.told == [each for each in told[0] if each[0] != "start"]
    traced.provider.shutdown()


def test_a_processor_that_raises_raises(traced: Traced) -> None:
    """As it does out of the SDK's own `end`."""

    class Broken(SpanProcessor):
        def on_end(self, span: ReadableSpan) -> None:
            raise RuntimeError("no more room")

    both = Both(traced)
    traced.provider.add_span_processor(Broken())
    for make in (both.usual, both.copied):
        with pytest.raises(RuntimeError, match="no more room"):
            make(str)


def test_spans_reach_a_batch_and_not_after_a_shutdown() -> None:
    """`force_flush` sends what has ended; a processor that was shut down takes nothing."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=60_000))
    traced = Traced()
    traced.exporter, traced.provider = exporter, provider
    both = Both(traced)
    for _ in range(3):
        both.copied(touched)
    assert provider.force_flush()
    assert [span.name for span in exporter.get_finished_spans()] == ["renamed"] * 3
    both.copied(touched)
    provider.shutdown()
    assert len(exporter.get_finished_spans()) == 4
    both.copied(touched)
    assert len(exporter.get_finished_spans()) == 4


def test_spans_of_many_threads(traced: Traced) -> None:
    """Each is told once, with all that was set before it ended; nothing that comes too late gets in."""
    both = Both(traced)

    def work(number: int) -> None:
        live = both.start("name", both.context, both.parent, {"number": number})
        with ThreadPoolExecutor(2) as others:
            for index in range(20):
                others.submit(live[0].set_attribute, f"n{index}", index)
                others.submit(live[0].add_event, f"n{index}")
        live[0].set_attribute("last", number)
        late = threading.Thread(target=both.end, args=(live, "succeeded"))
        late.start()
        both.end(live, "succeeded")
        late.join()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(100)))
    told = traced.exporter.get_finished_spans()
    assert sorted(cast(int, (span.attributes or {})["number"]) for span in told) == list(range(100))
    assert {len(span.events) for span in told} == {20}
    assert {len(span.attributes or {}) for span in told} == {23}
    assert {(span.attributes or {})["last"] == (span.attributes or {})["number"] for span in told} == {True}


def usual_instead(monkeypatch: pytest.MonkeyPatch, kind: str) -> Traced:
    """A tracer that is another than the one that we know how to shorten."""
    if kind == "self-metrics":
        monkeypatch.setenv("OTEL_PYTHON_SDK_INTERNAL_METRICS_ENABLED", "true")
    traced = Traced()
    tracer: Any = traced.provider.get_tracer("aftertask", "1")
    if kind == "a subclass":
        tracer.__class__ = type("Mine", (type(tracer),), {})
    elif kind == "disabled":
        tracer._tracer_config = type(tracer._tracer_config)(is_enabled=False)
    elif kind == "another end":
        sdk, end = type(tracer.start_span("x")), type(tracer.start_span("x")).end

        def other_end(self: Any, end_time: int | None = None) -> None:
            self.set_attribute("patched", True)
            end(self, end_time)

        monkeypatch.setattr(sdk, "end", other_end)
    return traced


@pytest.mark.parametrize("kind", ["self-metrics", "a subclass", "disabled", "another end"])
def test_where_the_sdk_does_more_it_does_it_itself(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A tracer that counts, a subclass, one that is switched off, an `end` that somebody has wrapped."""
    traced = usual_instead(monkeypatch, kind)
    tracer: Any = traced.provider.get_tracer("aftertask", "1")
    start, end = _spans.spans_of(tracer)
    assert (start.__name__ == "start") is (kind == "another end")
    assert end.__name__ == "end"
    context = trace.set_span_in_context(trace.NonRecordingSpan(SpanContext(1, 2, False, TraceFlags(1))))
    end(start("name", context, trace.get_current_span(context).get_span_context(), {"a": 1}), "succeeded")
    told = [dict(span.attributes or {}) for span in traced.exporter.get_finished_spans()]
    patched = {"patched": True} if kind == "another end" else {}
    assert told == ([] if kind == "disabled" else [{"a": 1, "aftertask.outcome": "succeeded", **patched}])


def test_what_changes_later_is_noticed(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tracer switched off, a resource made anew (the process forked), an `end` wrapped after our first span."""
    both = Both(traced)
    both.copied(str)
    traced.exporter.clear()
    both.tracer._set_resource(Resource({"process": "new"}))
    both.copied(str)
    (span,) = traced.exporter.get_finished_spans()
    assert span.resource.attributes == {"process": "new"}

    both.tracer._set_tracer_config(type(both.tracer._tracer_config)(is_enabled=False))
    assert not both.copied(str).is_recording()

    fresh = Both(Traced())
    ends: list[Any] = []
    monkeypatch.setattr(type(fresh.tracer.start_span("x")), "end", lambda self: ends.append(self))
    assert ends == [fresh.copied(str)]


@pytest.mark.parametrize("limits", [SpanLimits(max_span_attributes=3), SpanLimits(max_span_attribute_length=4)])
def test_the_users_span_limits_hold(limits: SpanLimits, caplog: pytest.LogCaptureFixture) -> None:
    """Spans are then started as usual."""
    traced = Traced(span_limits=limits)
    fastapi_app(traced, ok).get("/orders/3")
    attributes = dict(traced.spans()[0].attributes or {})
    assert len(attributes) <= 3 or all(len(str(value)) <= 4 for value in attributes.values() if isinstance(value, str))


def test_a_processor_that_is_added_later_sees_every_start(traced: Traced) -> None:
    """Also after spans have begun to be copied."""
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
