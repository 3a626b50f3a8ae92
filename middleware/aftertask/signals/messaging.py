"""Spans over a broker: PRODUCER where a message is sent, CONSUMER where a worker processes it; linked."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar

from opentelemetry import trace as api
from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider as SdkTracerProvider
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode, Tracer, TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from ..events import RequestInfo, Started
from .tracing import Tracing, attributes

# Not the global propagator: baggage would leave the process with every message.
_PROPAGATOR = TraceContextTextMapPropagator()

#: The span of the message that is being sent here.
_sending: ContextVar[Span | None] = ContextVar("aftertask_sending", default=None)


class MessageInfo(RequestInfo):
    """
    The message that a run of a worker came with, in the place of a request.

    Attributes:
        queue: The queue it was sent to; `""` if that is unknown.
        system: The broker's name, as `messaging.system`.
        carrier, first: As in `Header`.
    """

    queue: str = ""
    system: str = ""
    carrier: Mapping[str, str] = {}
    first: Mapping[str, str] = {}


class WorkerTracing(Tracing):
    """
    The spans of a worker: `process {queue}`, kind CONSUMER, linked to the PRODUCER span of the message.

    Args:
        tracer_provider, trace: As in `Tracing`; a `"child"` is one trace from the request to the worker.
    """

    def start_span(self, tracer: Tracer, event: Started, parent: Context, mode: str) -> Span:
        """The span of an attempt on the worker."""
        run = event.run
        message = run.request
        assert isinstance(message, MessageInfo)
        links = [Link(found) for found in map(_span_context, (message.carrier, message.first)) if found is not None]
        if mode == "link":
            parent = Context()
        names = _names("process", message.queue, message.system, run.id)
        return tracer.start_span(
            f"process {message.queue}", parent, SpanKind.CONSUMER, {**attributes(event), **names}, links
        )


def received(message: MessageInfo) -> None:
    """Note the span that sent a message: it is the parent of the run's spans, and its trace is in the log lines."""
    message.span_context = _span_context(message.carrier)


def current_carrier() -> dict[str, str]:
    """The trace context of the span that is current here."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier)
    return carrier


class Sending:
    """
    A PRODUCER span, `send {queue}`, for each message that is sent; none without a provider.

    Args:
        provider: Where the spans go; None means the global provider.
    """

    def __init__(self, provider: TracerProvider | None) -> None:
        self._provider = provider

    def begin(self, queue: str, system: str, task: str, id: str) -> dict[str, str]:
        """A message is about to be sent; returns its trace context."""
        self.end(failed=True)  # what was begun here before has never been sent
        provider = api.get_tracer_provider() if self._provider is None else self._provider
        if isinstance(provider, (api.ProxyTracerProvider, api.NoOpTracerProvider)):
            return {}
        names = {**_names("send", queue, system, id), "aftertask.task.name": task, "aftertask.run.id": id}
        span = provider.get_tracer("aftertask").start_span(f"send {queue}", kind=SpanKind.PRODUCER, attributes=names)
        _sending.set(span)
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, api.set_span_in_context(span))
        return carrier

    def end(self, *, failed: bool = False, error_type: str | None = None) -> None:
        """The message has been sent, or could not be."""
        span = _sending.get()
        if span is None:
            return
        _sending.set(None)
        if failed:
            span.set_status(Status(StatusCode.ERROR, error_type))
        if error_type is not None:
            span.set_attribute("error.type", error_type)
        span.end()


def flush(provider: TracerProvider | None, timeout_s: float) -> None:
    """Export what a process still holds before it ends; waits for at most this many seconds."""
    provider = api.get_tracer_provider() if provider is None else provider
    if isinstance(provider, SdkTracerProvider):
        provider.force_flush(int(timeout_s * 1000))


def _names(operation: str, queue: str, system: str, id: str) -> dict[str, AttributeValue]:
    return {
        "messaging.system": system,
        "messaging.destination.name": queue,
        "messaging.message.id": id,
        "messaging.operation.type": operation,
        "messaging.operation.name": operation,
    }


def _span_context(carrier: Mapping[str, str]) -> SpanContext | None:
    span = api.get_current_span(_PROPAGATOR.extract(carrier, Context()))
    found = span.get_span_context()
    return found if found.is_valid else None
