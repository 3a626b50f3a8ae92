"""One OpenTelemetry span for each attempt, current while the task runs."""

from __future__ import annotations

import contextvars
import os
from collections.abc import Callable
from typing import Any, cast

from opentelemetry import context as otel
from opentelemetry import trace
from opentelemetry._logs import LogRecord, SeverityNumber, get_logger
from opentelemetry.context import Context
from opentelemetry.trace import (
    INVALID_SPAN,
    Link,
    ProxyTracerProvider,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    Tracer,
    TracerProvider,
)

from .. import _clock
from ..events import (
    Cancelled,
    Dropped,
    Expired,
    Failed,
    Failure,
    HazardFound,
    LoopBlocked,
    LoopListener,
    Lost,
    Plan,
    Rejected,
    Request,
    Retrying,
    Skipped,
    Started,
    Succeeded,
    TaskEvent,
    TaskRun,
    TimedOut,
)
from ._spans import Live, drops_unsampled, spans_of

_SCOPE = "aftertask"

#: Attribute sets are kept for so many tasks and routes.
_SAME = 2000

# The key under which OpenTelemetry's context holds the span, found by what the public function does: putting it into a
# copy of the context ourselves takes a fifth of the time.
_SPAN_KEY = next(iter(trace.set_span_in_context(INVALID_SPAN, Context())))


class _Origin:
    """Where the spans of a request's runs belong, and what is known of its tasks."""

    __slots__ = ("batch", "context", "known", "outer", "sampled", "span_context")

    def __init__(self, context: Context) -> None:
        span_context = trace.get_current_span(context).get_span_context()
        self.context = context
        self.span_context = span_context if span_context.is_valid else None
        self.sampled = bool(span_context.trace_flags & 1)
        self.known: dict[Plan, tuple[str, dict[str, Any]]] = {}
        self.batch = 0  # of the batch that runs
        self.outer: Context | None = None  # what was current before it


class Tracing:
    """
    One span for each attempt, `background_task {task}`, as `TELEMETRY.md` describes it.

    Args:
        tracer_provider: Where the spans go. None: the global one, looked up again until there is one; without any,
            no span is made.
        trace: `"child"` of the request's span, `"link"` (a root of its own, linked to it), or `"none"`; a task's
            policy wins.
    """

    def __init__(self, tracer_provider: TracerProvider | None = None, *, trace: str = "child") -> None:
        self.loop: LoopListener = self
        self._given = tracer_provider
        self._trace = trace
        self._tracer: Tracer | None = None
        self._start, self._end = spans_of(None)
        self._attach: Callable[[Context], object] = otel.attach
        self._drops_unsampled = False
        self._open: dict[TaskRun, Live] = {}
        self._first: dict[TaskRun, SpanContext] = {}
        self._outer: dict[TaskRun | tuple[Request, int], Context] = {}
        self._same: dict[tuple[Plan, str | None, str | None], tuple[str, dict[str, Any]]] = {}
        wanted = os.environ.get("OTEL_SEMCONV_EXCEPTION_SIGNAL_OPT_IN", "").split(",")
        self._exception_event = "logs" not in wanted
        self._exception_log = "logs" in wanted or "logs/dup" in wanted
        self.handlers: dict[type[TaskEvent], Callable[[Any], None]] = {
            Started: self._on_started,
            Retrying: self._on_failed_attempt,
            Succeeded: self._on_succeeded,
            Failed: self._on_failed_attempt,
            TimedOut: self._on_failed_attempt,
            Cancelled: self._on_cancelled,
            Skipped: self._on_never_ran,
            Rejected: self._on_never_ran,
            Expired: self._on_never_ran,
            Dropped: self._on_never_ran,
            Lost: self._on_never_ran,
            HazardFound: self._on_hazard,
        }

    def __call__(self, event: TaskEvent) -> None:
        """Start or end a span; events that are no part of an attempt are passed over."""
        handler = self.handlers.get(type(event))
        if handler is not None:
            handler(event)

    def feeds(self, tracer: object) -> bool:
        """Whether a tracer's spans go where ours go: then one span for an attempt is enough."""
        ours = self._tracer or self._find_tracer()
        processor = getattr(getattr(ours, "_real_tracer", ours), "span_processor", None)
        theirs = getattr(getattr(tracer, "_real_tracer", tracer), "span_processor", None)
        return self._trace != "none" and processor is not None and processor is theirs

    def _find_tracer(self) -> Tracer | None:
        provider = self._given or trace.get_tracer_provider()
        if isinstance(provider, (ProxyTracerProvider, trace.NoOpTracerProvider)):
            return None
        self._tracer = provider.get_tracer(_SCOPE)
        self._start, self._end = spans_of(self._tracer)
        self._attach = _attacher()
        self._drops_unsampled = drops_unsampled(self._tracer)
        return self._tracer

    def _on_started(self, event: Started) -> None:
        run = event.run
        tracer = self._tracer or self._find_tracer()
        if tracer is None:
            return
        mode = run.plan.trace or self._trace
        if mode == "none":
            return
        request = run.request
        origin: Any = request.span_parent if run.parent is None else None
        if origin is None:
            origin = self._origin(run)
        parent = origin.span_context
        if parent is not None and not origin.sampled and self._drops_unsampled and mode == "child":
            run.span_context = parent  # nobody will see a span: the request's ids are what there is
            return
        name, same = origin.known.get(run.plan) or self._known(run, origin)
        attributes = same.copy()
        attributes["aftertask.run.id"] = run.id
        attributes["aftertask.attempt"] = event.attempt
        if event.queue_wait_s is not None:
            attributes["aftertask.queue_wait"] = event.queue_wait_s
        else:
            del attributes["aftertask.queue_wait"]
        if run.parent is not None:
            attributes["aftertask.parent_run.id"] = run.parent.id
        if run.origin != "request":
            attributes["aftertask.origin"] = run.origin
        if parent is not None and event.attempt == 1 and (mode == "child" or run.parent is not None):
            live = self._start(name, origin.context, parent, attributes)
        else:
            live = self._start_otherwise(tracer, run, mode, name, origin, attributes)
        run.span_context = live[1]
        batch = run.batch
        if batch and origin.batch == batch:
            outer = origin.outer
        elif batch and not origin.batch:
            outer = origin.outer = otel.get_current()
            origin.batch = batch
        else:
            key = (request, batch) if batch else run
            outer = self._outer.get(key)
            if outer is None:
                outer = self._outer[key] = otel.get_current()
        self._open[run] = live
        current = Context(outer)
        dict.__setitem__(current, _SPAN_KEY, live[0])  # nobody has seen it yet: nobody sees it change
        self._attach(current)

    def _start_otherwise(
        self, tracer: Tracer, run: TaskRun, mode: str, name: str, origin: _Origin, attributes: dict[str, Any]
    ) -> Live:
        """A span that has no parent, or a link: to the request's, or to the first attempt's."""
        root = mode == "link" and run.parent is None
        links = [Link(origin.span_context)] if root and origin.span_context is not None else []
        first = self._first.get(run)
        if first is not None:
            links.append(Link(first))
        around = Context() if root else origin.context
        span = tracer.start_span(name, around, SpanKind.INTERNAL, attributes, links)
        return span, span.get_span_context(), attributes

    def _origin(self, run: TaskRun) -> _Origin:
        """Where the run's span belongs: for a child under what is current, else under the request's span."""
        if run.parent is not None:
            return _Origin(otel.get_current())
        request = run.request
        origin = request.span_parent
        if origin is None:
            variables = request.context
            origin = _Origin(otel.get_current() if variables is None else variables.run(otel.get_current))
            request.span_parent, request.span_context = origin, origin.span_context
        return cast(_Origin, origin)

    def _known(self, run: TaskRun, origin: _Origin) -> tuple[str, dict[str, Any]]:
        """What is the same for every run of a task that comes from one route: the span's name and most attributes."""
        key = (run.plan, run.http_route, run.http_method)
        known = self._same.get(key)
        if known is None:
            if len(self._same) >= _SAME:
                self._same.clear()
            known = self._same[key] = f"background_task {run.task}", _same_attributes(run)
        origin.known[run.plan] = known
        return known

    def _on_succeeded(self, event: Succeeded) -> None:
        run = event.run
        if run.batch and run not in self._open and event.attempt == 1:
            return  # it has no span
        live = self._leave(run)
        if event.attempt > 1:
            self._first.pop(run, None)
        if live is not None:
            self._end(live, "succeeded")

    def _on_failed_attempt(self, event: Failed | TimedOut | Retrying) -> None:
        held = self._leave(event.run)
        if not isinstance(event, Retrying):
            self._first.pop(event.run, None)
        if held is None:
            return
        span, failure = held[0], event.failure
        if isinstance(event, Retrying):
            self._first.setdefault(event.run, span.get_span_context())
        span.set_attribute("error.type", failure.type)
        if not isinstance(event, Retrying):
            span.set_attribute("aftertask.outcome", event.outcome)
        span.set_status(Status(StatusCode.ERROR, failure.type))
        if span.is_recording() and self._exception_event:
            span.add_event("exception", _exception(failure))
        if self._exception_log:
            self._log_exception(span, failure)
        span.end()

    def _on_cancelled(self, event: Cancelled) -> None:
        held = self._leave(event.run)
        self._first.pop(event.run, None)
        if held is None:
            self._origin(event.run)
        else:
            held[0].set_attribute("aftertask.outcome", "cancelled")
            held[0].end()

    def _on_never_ran(self, event: Skipped | Dropped | Rejected | Expired | Lost) -> None:
        self._origin(event.run)  # no span, but the log line shall tell the request's

    def _on_hazard(self, event: HazardFound) -> None:
        held = self._open.get(event.run)
        if held is not None and held[0].is_recording():
            said = {"kind": event.kind, "argument": event.argument, "advice": event.advice, "stack": event.stack}
            told = {key: value for key, value in said.items() if value is not None}
            held[0].add_event("aftertask.hazard", told)

    def lag(self, seconds: float) -> None:
        """For the metrics."""

    def blocked_for(self, run: TaskRun | None, seconds: float) -> None:
        """A run keeps the event loop from answering: its span says for how long, as far as is known while it lasts."""
        held = None if run is None else self._open.get(run)
        if run is not None and held is not None and held[0].is_recording():
            held[0].set_attribute("aftertask.loop_blocked", round(run.blocked_s, 6))

    def blocked(self, report: LoopBlocked) -> None:
        """The span has been told as it happened."""

    def _leave(self, run: TaskRun) -> Live | None:
        if not run.batch:
            self._put_back(run)
        live = self._open.pop(run, None)
        if run.thread_s is not None and live is not None and run.thread_wait_s is not None:
            live[0].set_attribute("aftertask.thread_wait", round(run.thread_wait_s, 6))
        return live

    def batch_ended(self, request: Request, batch: int) -> None:
        """Make current again what was before the batch."""
        origin: Any = request.span_parent
        if origin is not None and origin.batch == batch:
            self._attach(origin.outer)
            origin.batch = 0
        else:
            self._put_back((request, batch))

    def _put_back(self, key: TaskRun | tuple[Request, int]) -> None:
        outer = self._outer.pop(key, None)
        if outer is not None:
            self._attach(outer)  # by value, not by token: a coroutine may be closed from another context

    def _log_exception(self, span: Span, failure: Failure) -> None:
        get_logger(_SCOPE).emit(
            LogRecord(
                timestamp=int(_clock.timestamp() * 1e9),
                context=trace.set_span_in_context(span),
                severity_number=SeverityNumber.ERROR,
                severity_text="ERROR",
                body="A background task raised",
                event_name="exception",
                attributes=_exception(failure),
            )
        )


def _attacher() -> Callable[[Context], object]:
    """What `attach` does, without its two calls: the variable that it sets is found by letting it, in a new context."""
    probe, elsewhere = Context(), contextvars.Context()
    elsewhere.run(otel.attach, probe)
    found = [var for var, value in elsewhere.items() if value is probe]
    return found[0].set if len(found) == 1 else otel.attach


def _same_attributes(run: TaskRun) -> dict[str, Any]:
    """The attributes that are the same for every run of a task that comes from one route."""
    attributes: dict[str, Any] = {
        "code.function.name": run.plan.code,
        "aftertask.task.name": run.task,
        "aftertask.max_attempts": run.max_attempts,
        "aftertask.engine": run.engine,
        "aftertask.executor": run.plan.executor,
        "aftertask.priority": run.priority,
        "aftertask.origin": run.origin,
        # Each run's own. They have their places here, so that a copy need not grow.
        "aftertask.run.id": "",
        "aftertask.attempt": 0,
        "aftertask.queue_wait": 0.0,
    }
    if run.http_route is not None:
        attributes["http.route"] = run.http_route
    if run.http_method is not None:
        attributes["http.request.method"] = run.http_method
    return attributes


def _exception(failure: Failure) -> dict[str, str]:
    return {
        "exception.type": failure.type,
        "exception.message": failure.message,
        "exception.stacktrace": failure.stack,
    }
