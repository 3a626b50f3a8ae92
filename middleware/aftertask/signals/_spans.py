"""
Start live SDK spans by copying a template instead of running the SDK's constructor, where that is possible.

A span's constructor spends most of its time on cleaning attributes that we know to be clean. The template is a span
that the SDK itself made, so fields that a later SDK adds come along, and the copy is an instance of the SDK's own
class. This touches private names: they are checked when a tracer is first used, and where one is missing, or the SDK
counts its own spans, or the tracer is not the SDK's, spans are started as usual.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from typing import Any, cast

from opentelemetry.context import Context
from opentelemetry.sdk.trace import SpanProcessor, Tracer
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, Decision, ParentBased, SamplingResult
from opentelemetry.sdk.util import BoundedList
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, SpanKind, TraceFlags, TraceState

# Name, context, the parent's span context, attributes that are clean already.
Starter = Callable[[str, Context, SpanContext, dict[str, Any]], Span]

_SPAN_FIELDS = (
    "_attributes",
    "_context",
    "_events",
    "_links",
    "_lock",
    "_name",
    "_parent",
    "_span_processor",
    "_start_time",
)
_HELD_FIELDS = ("_dict", "_immutable", "_lock", "dropped", "maxlen", "max_value_len")
_FLAGS = tuple(TraceFlags(bits) for bits in range(4))
_SAMPLED, _RANDOM = 1, 2


def starter(tracer: Any) -> tuple[Starter, bool]:
    """What starts a span that has a parent, and whether the span then holds the very dict of attributes it is given."""
    try:
        copied = _copier(tracer)
    except (AttributeError, KeyError, TypeError):
        copied = None

    def usual(name: str, context: Context, parent: SpanContext, attributes: dict[str, Any]) -> Span:
        span: Span = tracer.start_span(name, context, SpanKind.INTERNAL, attributes)
        return span

    return (usual, False) if copied is None else (copied, True)


def drops_unsampled(tracer: Any) -> bool:
    """Whether a child of a parent that is not sampled is sure to be dropped, so that nobody need be asked."""
    return _follows(getattr(tracer, "sampler", None), "not_sampled", ALWAYS_OFF)


def _follows(sampler: Any, parent: str, verdict: Any) -> bool:
    return type(sampler) is ParentBased and all(
        getattr(sampler, f"_{where}_parent_{parent}", None) is verdict for where in ("local", "remote")
    )


def _copier(tracer: Any) -> Starter | None:
    # A subclass of the SDK's tracer, or self-metrics that count each start, know things that a copy would skip.
    counting = getattr(tracer, "_tracer_metrics", None)
    if type(tracer) is not Tracer or (counting is not None and type(counting).__name__ != "NoOpTracerMetrics"):
        return None
    quiet: Any = copy.copy(tracer)
    quiet.sampler, quiet.span_processor = ALWAYS_ON, SpanProcessor()
    template: Any = quiet.start_span("template", Context(), SpanKind.INTERNAL, {})
    base, held_base = dict(template.__dict__), dict(template._attributes.__dict__)
    if any(field not in base for field in _SPAN_FIELDS) or any(field not in held_base for field in _HELD_FIELDS):
        return None
    if held_base["max_value_len"] is not None or (held_base["maxlen"] is not None and held_base["maxlen"] < 32):
        return None  # the user's limits cut attributes short: the SDK knows how
    known = template.get_span_context()
    if tuple(known) != (known.trace_id, known.span_id, False, known.trace_flags, known.trace_state, True):
        return None  # a span context is another tuple than the one that is put together below
    base["_sampler"], base["_span_processor"] = tracer.sampler, tracer.span_processor
    held_base["_dict"] = base["_attributes"] = None  # each span's own

    sampler = tracer.sampler
    sure = sampler is ALWAYS_ON or _follows(sampler, "sampled", ALWAYS_ON)
    span_class, held_class = type(template), type(template._attributes)
    new, new_tuple, lock, time_ns = object.__new__, tuple.__new__, threading.Lock, time.time_ns
    new_id, processor = tracer.id_generator.generate_span_id, tracer.span_processor
    # The processors that were found to do nothing when a span starts, which is most: nobody need call them.
    passive: list[object] = [None]
    processor._span_processors  # noqa: B018  # where there is no such field, spans are started as usual
    events = _when_used(base["_limits"].max_events)
    links = _when_used(base["_limits"].max_links)

    def start(name: str, context: Context, parent: SpanContext, attributes: dict[str, Any]) -> Span:
        if sure and parent.trace_flags & _SAMPLED:
            state: TraceState | None = parent.trace_state
            added: Any = None
        else:
            result = sampler.should_sample(context, parent.trace_id, name, SpanKind.INTERNAL, attributes, ())
            state, added = result.trace_state, result.attributes
            if result.decision is not Decision.RECORD_AND_SAMPLE:
                return _other(tracer, name, context, parent, result)
        flags = _FLAGS[_SAMPLED | (parent.trace_flags & _RANDOM)]
        span_context = new_tuple(SpanContext, (parent.trace_id, new_id(), False, flags, state, True))
        held = new(held_class)
        fields = held.__dict__
        fields.update(held_base)
        fields["_dict"] = attributes
        fields["_lock"] = lock()
        if added is not None and len(added) != len(attributes):
            held.update(added)  # the sampler has some of its own
        span: Any = new(span_class)
        fields = span.__dict__
        fields.update(base)
        fields["_name"] = name
        fields["_attributes"] = held
        fields["_context"] = span_context
        fields["_parent"] = parent
        fields["_events"] = new(events)
        fields["_links"] = new(links)
        fields["_lock"] = lock()
        fields["_start_time"] = time_ns()
        if processor._span_processors is not passive[0] and _tell_start(processor, span, context):
            passive[0] = processor._span_processors
        return cast(Span, span)

    return start


def _tell_start(processor: Any, span: Span, context: Context) -> bool:
    """Tell the processors that a span starts; returns whether none of them cares."""
    processor.on_start(span, context)
    return all(_nothing_in(type(one).on_start) for one in processor._span_processors)


def _nothing_in(function: Any) -> bool:
    return getattr(function, "__code__", None) is not None and function.__code__.co_code == _NOTHING


def _does_nothing(span: Any, parent_context: Any = None) -> None:
    pass


_NOTHING = _does_nothing.__code__.co_code


def _other(tracer: Any, name: str, context: Context, parent: SpanContext, result: SamplingResult) -> Span:
    """What a sampler asked for that is no ordinary span: nothing to record, or to record and not to export."""
    if result.decision is Decision.DROP:
        flags = _FLAGS[parent.trace_flags & _RANDOM]
        span_id = tracer.id_generator.generate_span_id()
        return NonRecordingSpan(SpanContext(parent.trace_id, span_id, False, flags, result.trace_state))
    span: Span = tracer.start_span(name, context, SpanKind.INTERNAL, result.attributes)
    return span


def _when_used(limit: int | None) -> type[Any]:
    """A BoundedList that costs next to nothing while it is empty, as most spans' events and links are."""

    class WhenUsed(BoundedList[Any]):
        _dq: Any = ()
        dropped = 0

        def __iter__(self) -> Any:
            return super().__iter__() if self._dq != () else iter(())

        def append(self, item: Any) -> None:
            if "_dq" not in self.__dict__:
                super().__init__(limit)
            super().append(item)

        def extend(self, items: Any) -> None:
            if "_dq" not in self.__dict__:
                super().__init__(limit)
            super().extend(items)

    return WhenUsed
