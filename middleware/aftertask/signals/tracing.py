"""One OpenTelemetry span for each attempt, current while the task runs."""

from __future__ import annotations

import os
from contextvars import Token

from opentelemetry import context as otel
from opentelemetry import trace as api
from opentelemetry._logs import LogRecord, SeverityNumber, get_logger
from opentelemetry.context import Context
from opentelemetry.sdk.trace import Tracer as SdkTracer
from opentelemetry.trace import (
    Link,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    Tracer,
    TracerProvider,
)
from opentelemetry.util.types import AttributeValue

from .. import _clock
from ..events import (
    Cancelled,
    Dropped,
    Expired,
    Failed,
    Failure,
    HazardFound,
    Lost,
    Offloaded,
    Rejected,
    Retrying,
    Scheduled,
    Signal,
    Skipped,
    Started,
    Succeeded,
    TaskRun,
    TimedOut,
)

_SCOPE = "aftertask"

#: Origins of runs whose request was another process's, or long ago: always a root of its own with a link.
_FROM_JOURNAL = ("journal", "dead_letter")


class Tracing(Signal):
    """
    One span for each attempt, `background_task {task}`; `docs/telemetry.md` lists its attributes.

    Args:
        tracer_provider: Where the spans go. None means the global one, looked up again until there is one; without any,
            no span is made.
        trace: `"child"` of the request's span, `"link"` (a root of its own, linked to the request's span), or `"none"`;
            a task's policy wins.
    """

    def __init__(self, tracer_provider: TracerProvider | None = None, *, trace: str = "child") -> None:
        self._provider = tracer_provider
        self._trace = trace
        self._tracer: Tracer | None = None
        #: The span of each attempt that runs, and what makes the span before it current again.
        self._open: dict[TaskRun, tuple[Span, Token[Context]]] = {}
        #: The first attempt's span of each run that is tried again.
        self._first: dict[TaskRun, SpanContext] = {}
        # https://opentelemetry.io/docs/specs/semconv/exceptions/exceptions-spans/
        opted_in = os.environ.get("OTEL_SEMCONV_EXCEPTION_SIGNAL_OPT_IN", "").split(",")
        self._exception_event = "logs" not in opted_in
        self._exception_log = "logs" in opted_in or "logs/dup" in opted_in

    def same_provider(self, tracer: object) -> bool:
        """Whether this tracer's spans go where ours go, so that one span for an attempt is enough."""
        ours = self._find_tracer()
        if ours is None or self._trace == "none":
            return False
        if isinstance(tracer, api.ProxyTracer):  # made before there was a global provider
            return self._provider is None or self._provider is api.get_tracer_provider()
        if isinstance(tracer, SdkTracer) and isinstance(ours, SdkTracer):
            return tracer.span_processor is ours.span_processor
        return False

    def _find_tracer(self) -> Tracer | None:
        if self._tracer is None:
            provider = api.get_tracer_provider() if self._provider is None else self._provider
            if not isinstance(provider, (api.ProxyTracerProvider, api.NoOpTracerProvider)):
                self._tracer = provider.get_tracer(_SCOPE)
        return self._tracer

    # --- an attempt

    def scheduled(self, event: Scheduled) -> None:
        """Note the request's span for the journal, which has to know it before the run starts."""
        if event.run.info.durable:
            _parent(event.run)

    def started(self, event: Started) -> None:
        """Start the attempt's span and make it current."""
        run = event.run
        mode = run.info.trace or self._trace
        parent = _parent(run)
        tracer = self._find_tracer()
        if tracer is None or mode == "none":
            return
        span = self.start_span(tracer, event, parent, mode)
        run.span_context = _valid(span)
        self._open[run] = span, otel.attach(api.set_span_in_context(span))

    def start_span(self, tracer: Tracer, event: Started, parent: Context, mode: str) -> Span:
        """The span of an attempt; the worker of an engine has one of another kind."""
        run = event.run
        links = [Link(self._first[run])] if run in self._first else []
        if (mode == "link" or run.origin in _FROM_JOURNAL) and run.parent is None:
            request_span = api.get_current_span(parent).get_span_context()
            links += [Link(request_span)] if request_span.is_valid else []
            parent = Context()
        return tracer.start_span(f"background_task {run.task}", parent, SpanKind.INTERNAL, attributes(event), links)

    def retrying(self, event: Retrying) -> None:
        """End the attempt's span with its error; the next attempt's links to it."""
        span = self._leave(event.run)
        if span is not None:
            self._first.setdefault(event.run, span.get_span_context())
            self._end_failed(span, event.failure)

    def _ended(self, event: Succeeded | Failed | TimedOut | Cancelled | Offloaded) -> None:
        """End the attempt's span, with its error if it has one."""
        span = self._leave(event.run)
        self._first.pop(event.run, None)
        if span is None:
            return
        span.set_attribute("aftertask.outcome", event.outcome)
        if isinstance(event, (Failed, TimedOut)):
            self._end_failed(span, event.failure)
        else:
            span.end()

    succeeded = failed = timed_out = cancelled = offloaded = _ended

    def _end_failed(self, span: Span, failure: Failure) -> None:
        try:
            span.set_attribute("error.type", failure.type)
            span.set_status(Status(StatusCode.ERROR, failure.type))
            if self._exception_event and span.is_recording():
                span.add_event("exception", _exception(failure))
            if self._exception_log:
                _log_exception(span, failure)
        finally:
            span.end()

    def _leave(self, run: TaskRun) -> Span | None:
        """Make current again what was so before the attempt; its span, which has not ended, or None without one."""
        span, token = self._open.pop(run, (None, None))
        # A coroutine may be closed from another context, where the span never was current.
        if token is not None and run.is_current:
            otel.detach(token)
        if span is not None and run.thread_wait_s is not None:
            span.set_attribute("aftertask.thread_wait", round(run.thread_wait_s, 6))
        return span

    def departed(self, run: TaskRun) -> None:
        """Forget a run that goes on elsewhere."""
        self._leave(run)
        self._first.pop(run, None)

    # --- runs that never started: they have no span, but their log lines have the request's trace

    def _not_run(self, event: Skipped | Dropped | Rejected | Expired | Lost) -> None:
        """Note the request's span."""
        _parent(event.run)

    skipped = dropped = rejected = expired = lost = _not_run

    # --- hazards

    def hazard_found(self, event: HazardFound) -> None:
        """An event on the span of the attempt that runs."""
        span, _ = self._open.get(event.run, (None, None))
        if span is not None and span.is_recording():
            found = {"kind": event.kind, "argument": event.argument, "advice": event.advice, "stack": event.stack}
            span.add_event("aftertask.hazard", {key: value for key, value in found.items() if value is not None})

    def loop_blocked_for(self, run: TaskRun | None, seconds: float) -> None:
        """The span of the run to blame has the seconds in all, also while the block lasts."""
        if run is None:
            return
        span, _ = self._open.get(run, (None, None))
        if span is not None and span.is_recording():
            span.set_attribute("aftertask.loop_blocked", round(run.blocked_s, 6))


def _parent(run: TaskRun) -> Context:
    """
    Where the run's span belongs: for a child under what is current, else under the span of the request.

    The request's span is noted for the other signals.
    """
    if run.parent is not None:
        return otel.get_current()
    request = run.request
    if request.context is None:  # the request is over
        known = request.span_context
        if known is None:
            return Context()
        if not isinstance(known, SpanContext):  # of another process
            known = SpanContext(known.trace_id, known.span_id, True, TraceFlags(known.trace_flags))
        return api.set_span_in_context(api.NonRecordingSpan(known))
    # A copy, because a context can be entered only once at a time, and a run may be rejected in a worker thread.
    parent = request.context.copy().run(otel.get_current)
    if request.span_context is None:
        request.span_context = _valid(api.get_current_span(parent))
    return parent


def _valid(span: Span) -> SpanContext | None:
    context = span.get_span_context()
    return context if context.is_valid else None


def attributes(event: Started) -> dict[str, AttributeValue]:
    """What an attempt's span has from its start."""
    run = event.run
    attributes: dict[str, AttributeValue | None] = {
        "code.function.name": run.info.code,
        "http.route": run.request.http_route,
        "http.request.method": run.request.http_method,
        "aftertask.task.name": run.task,
        "aftertask.run.id": run.id,
        "aftertask.attempt": event.attempt,
        "aftertask.max_attempts": run.info.max_attempts,
        "aftertask.engine": run.engine,
        "aftertask.executor": run.info.executor,
        "aftertask.priority": run.info.priority,
        "aftertask.queue_wait": event.queue_wait_s,
        "aftertask.origin": run.origin,
        "aftertask.parent_run.id": None if run.parent is None else run.parent.id,
    }
    return {key: value for key, value in attributes.items() if value is not None}


def _exception(failure: Failure) -> dict[str, AttributeValue]:
    return {
        "exception.type": failure.type,
        "exception.message": failure.message,
        "exception.stacktrace": failure.stack,
    }


def _log_exception(span: Span, failure: Failure) -> None:
    get_logger(_SCOPE).emit(
        LogRecord(
            timestamp=int(_clock.timestamp() * 1e9),
            context=api.set_span_in_context(span),
            severity_number=SeverityNumber.ERROR,
            severity_text="ERROR",
            body="A background task raised",
            event_name="exception",
            attributes=_exception(failure),
        )
    )


def service_name(provider: TracerProvider | None) -> str | None:
    """`service.name` of a provider's resource, by default of the global one; None if it has none of its own."""
    resource = getattr(api.get_tracer_provider() if provider is None else provider, "resource", None)
    name = getattr(resource, "attributes", {}).get("service.name")
    # OpenTelemetry's SDK names a service without a name `unknown_service:python`.
    return name if isinstance(name, str) and not name.startswith("unknown_service") else None
