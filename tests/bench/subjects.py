"""The apps that `overhead.py` compares: FastAPI alone, the same signals by hand, and aftertask in its set-ups."""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import structlog
from fastapi import BackgroundTasks, FastAPI
from opentelemetry import trace
from opentelemetry.context import attach, detach
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, DEFAULT_ON, Sampler
from opentelemetry.trace import StatusCode
from prometheus_client import Counter, Gauge, Histogram

from aftertask import AftertaskMiddleware, Policy, Retry, Settings
from aftertask.signals import usual


@dataclass
class Subject:
    """An app that adds no task at `/0`, one at `/1`, ten at `/10`; whether its requests are sampled, traced by it."""

    app: FastAPI
    flush: Callable[[], object] = lambda: None
    sampled: bool = True
    traces_requests: bool = False


class NullExporter(SpanExporter):
    """Drops the spans: sending them costs each variant the same."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Do nothing."""
        return SpanExportResult.SUCCESS


def provider(sampler: Sampler = ALWAYS_ON) -> TracerProvider:
    """A tracer provider as in production, but for the exporter."""
    made = TracerProvider(sampler=sampler)
    made.add_span_processor(BatchSpanProcessor(NullExporter(), max_queue_size=1 << 16))
    return made


async def nothing(number: int) -> None:
    """The task of every variant."""


def add_nothing(tasks: BackgroundTasks, number: int) -> None:
    """Add the task, as an app does."""
    tasks.add_task(nothing, number)


def app_with(add: Callable[[BackgroundTasks, int], None] = add_nothing, **kwargs: Any) -> FastAPI:
    """The app of all variants."""
    app = FastAPI(**kwargs)

    @app.get("/0")
    async def none() -> dict[str, str]:
        return {}

    @app.get("/1")
    async def one(tasks: BackgroundTasks) -> dict[str, str]:
        add(tasks, 1)
        return {}

    @app.get("/10")
    async def ten(tasks: BackgroundTasks) -> dict[str, str]:
        for number in range(10):
            add(tasks, number)
        return {}

    @app.get("/cpu")
    async def cpu() -> int:
        return time.process_time_ns()

    return app


def configure_structlog(level: int = logging.INFO) -> None:
    """As the chapter on performance in structlog's documentation shows, but to the null device."""
    structlog.configure(
        cache_logger_on_first_use=True,
        wrapper_class=structlog.make_filtering_bound_logger(level),
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.format_exc_info,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(serializer=orjson.dumps),
        ],
        logger_factory=structlog.BytesLoggerFactory(open(os.devnull, "wb")),  # noqa: SIM115  # for the process's life
    )


def bare() -> Subject:
    """FastAPI alone."""
    return Subject(app_with())


def floor() -> Subject:
    """The same signals by hand; what can be looked up once is."""
    configure_structlog()
    labels, task = ("task", "engine"), ("app.report", "local")
    scheduled = Counter("floor_scheduled", "d", labels).labels(*task)
    finished = Counter("floor_finished", "d", (*labels, "outcome"))
    succeeded, failed = (finished.labels(*task, outcome) for outcome in ("succeeded", "failed"))
    inflight = Gauge("floor_inflight", "d", labels).labels(*task)
    wait, duration, end_to_end = (
        Histogram(f"floor_{name}_seconds", "d", labels).labels(*task) for name in ("wait", "duration", "end_to_end")
    )
    last = Gauge("floor_last_success", "d", labels).labels(*task)
    made, log, now = provider(), structlog.get_logger(), time.perf_counter
    tracer = made.get_tracer("floor")

    async def observed(number: int, added: float) -> None:
        start, run_id = now(), str(uuid.uuid4())
        attributes: dict[str, Any] = {
            "code.function.name": "app.report",
            "http.route": "/n",
            "http.request.method": "GET",
            "aftertask.task.name": "app.report",
            "aftertask.run.id": run_id,
            "aftertask.attempt": 1,
            "aftertask.max_attempts": 1,
            "aftertask.engine": "local",
            "aftertask.executor": "async",
            "aftertask.priority": 0,
            "aftertask.queue_wait": start - added,
            "aftertask.origin": "request",
        }
        span = tracer.start_span("background_task app.report", attributes=attributes)
        token = attach(trace.set_span_in_context(span))
        context = span.get_span_context()
        ids = {
            "trace_id": trace.format_trace_id(context.trace_id),
            "span_id": trace.format_span_id(context.span_id),
        }
        bound = structlog.contextvars.bind_contextvars(
            task="app.report", run_id=run_id, attempt=1, engine="local", http_route="/n", http_method="GET", **ids
        )
        wait.observe(start - added, ids)
        try:
            await nothing(number)
        except Exception as error:
            failed.inc()
            span.record_exception(error)
            span.set_status(StatusCode.ERROR, type(error).__name__)
            raise
        else:
            lasted = now() - start
            succeeded.inc()
            duration.observe(lasted, ids)
            end_to_end.observe(lasted + start - added, ids)
            last.set_to_current_time()
            span.set_attribute("aftertask.outcome", "succeeded")
            log.info("task.succeeded", duration_s=lasted, queue_wait_s=start - added)
        finally:
            inflight.dec()
            structlog.contextvars.reset_contextvars(**bound)
            detach(token)
            span.end()

    def add(tasks: BackgroundTasks, number: int) -> None:
        scheduled.inc()
        inflight.inc()
        tasks.add_task(observed, number, now())

    return Subject(app_with(add), made.force_flush)


def native() -> Subject:
    """FastAPI's own telemetry, spans only: no metric, no log line; it traces the request, too."""
    made = provider()
    telemetry = {"tracer_provider": made, "metrics": False, "logs": False}
    return Subject(app_with(telemetry=telemetry), made.force_flush, traces_requests=True)


def ours(
    signals: Sequence[str] | None = None,
    *,
    log_level: int | None = logging.INFO,
    sampler: Sampler = ALWAYS_ON,
    sampled: bool = True,
    **more_settings: Any,
) -> Subject:
    """
    The middleware with these signals; None: all.

    Args:
        signals: Names of classes of signals.
        log_level: structlog is configured with this level; None: the app configures no logging, so lines go to stderr.
        sampler: Of the tracer provider.
        sampled: Whether the request is sampled.
        more_settings: What else differs from the default `Settings`.
    """
    if log_level is not None:
        configure_structlog(log_level)
    made = provider(sampler)
    settings = Settings(tracer_provider=made, success_log_rate=None, **more_settings)
    chosen = None if signals is None else [each for each in usual(settings) if type(each).__name__ in signals]
    app = app_with()
    app.add_middleware(AftertaskMiddleware, settings=settings, signals=chosen)
    return Subject(app, made.force_flush, sampled)


def ours_policies() -> Subject:
    """All signals, and a task with every policy that an async function can have, none of which has to act."""
    every = Policy(
        timeout=60,
        retry=Retry(),
        limit=100,
        priority=5,
        on_failure="contain",
        expires=60,
        run_on_error=True,
        idempotent=True,
        on_error=lambda run, error: None,
        expected=LookupError,
        slow_after=30,
        stuck_after=60,
    )
    return ours(policies={"*": every}, max_waiting=1000)


VARIANTS: dict[str, Callable[[], Subject]] = {
    "bare": bare,
    "floor": floor,
    "native": native,
    "ours": ours,
    "ours_stderr": lambda: ours(log_level=None),
    "ours_warnings": lambda: ours(log_level=logging.WARNING),
    "ours_metrics": lambda: ours(["Metrics"]),
    "ours_unsampled": lambda: ours(sampler=DEFAULT_ON, sampled=False),
    "ours_none": lambda: ours([]),
    "ours_policies": ours_policies,
}
