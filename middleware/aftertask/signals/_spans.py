"""
Start and end live SDK spans by copying a template instead of running the SDK's code, where that is possible.

A span's constructor spends most of its time on cleaning attributes that we know to be clean, and its end on building a
second span by keyword. The template is a span that the SDK itself made and ended, so fields that a later SDK adds come
along, and the copies are instances of the SDK's own classes. This touches private names: what the SDK does with them is
checked when a tracer is first used, and where it does anything else, or counts its own spans, or the tracer is not the
SDK's, spans are started and ended as usual.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from opentelemetry.context import Context
from opentelemetry.sdk.trace import (
    ConcurrentMultiSpanProcessor,
    ReadableSpan,
    SpanProcessor,
    SynchronousMultiSpanProcessor,
    Tracer,
)
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, Decision, ParentBased
from opentelemetry.sdk.util import BoundedList
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, SpanKind, TraceFlags

# A span that was started, its context, and the attributes it was started with.
Live: TypeAlias = tuple[Span, SpanContext, dict[str, Any]]
# Name, context, the parent's span context, attributes that are clean already: the dict may become the span's own.
Starter: TypeAlias = Callable[[str, Context, SpanContext, dict[str, Any]], Live]
# Ends a span with this `aftertask.outcome`.
Ender: TypeAlias = Callable[[Live, str], None]

OUTCOME = "aftertask.outcome"

_SPAN_FIELDS = (
    "_attributes",
    "_context",
    "_end_time",
    "_events",
    "_links",
    "_lock",
    "_name",
    "_parent",
    "_resource",
    "_start_time",
)
# Of the span that exporters are told: what each has of its own, and what all spans of a tracer share.
_TOLD_FIELDS = {
    *("_name", "_context", "_parent", "_start_time", "_end_time", "_attributes", "_events", "_links", "_status")
}
_SAME_FIELDS = {"_kind", "_resource", "_instrumentation_info", "_instrumentation_scope"}
_HELD_FIELDS = ("_dict", "_immutable", "_lock", "dropped", "maxlen", "max_value_len")
_FLAGS = tuple(TraceFlags(bits) for bits in range(4))
_SAMPLED, _RANDOM = TraceFlags.SAMPLED, getattr(TraceFlags, "RANDOM_TRACE_ID", 0)

# All that the SDK's `Span.end` ever named: one that names more does more than what is done here in its place.
_NAMES_OF_END = frozenset(
    (
        *("_lock", "_start_time", "RuntimeError", "_end_time", "logger", "warning", "time_ns", "_attributes"),
        *("_immutable", "_record_end_metrics", "_span_processor", "_on_ending", "on_end", "_readable_span"),
    )
)


class Spans(NamedTuple):
    """How one tracer's spans are started and ended."""

    start: Starter
    end: Ender


def spans_of(tracer: Any) -> Spans:
    """The fastest way to start and end spans that have a parent: by copying a template, where that is possible."""
    try:
        found = _copier(tracer)
    except (AttributeError, KeyError, TypeError):
        found = None
    return found or Spans(lambda name, context, parent, attributes: _usual(tracer, name, context, attributes), end)


def _usual(tracer: Any, name: str, context: Context, attributes: dict[str, Any]) -> Live:
    span: Span = tracer.start_span(name, context, SpanKind.INTERNAL, attributes)
    return span, span.get_span_context(), attributes


def end(live: Live, outcome: str) -> None:
    """End a span as anybody would."""
    live[0].set_attribute(OUTCOME, outcome)
    live[0].end()


def drops_unsampled(tracer: Any) -> bool:
    """Whether a child of a parent that is not sampled is sure to be dropped, so that nobody need be asked."""
    return _follows(getattr(tracer, "sampler", None), "not_sampled", ALWAYS_OFF)


def _follows(sampler: Any, parent: str, verdict: Any) -> bool:
    return type(sampler) is ParentBased and all(
        getattr(sampler, f"_{where}_parent_{parent}", None) is verdict for where in ("local", "remote")
    )


class _Keeping(SpanProcessor):
    """Keeps the span that ended last."""

    ended: Any = None

    def on_end(self, span: ReadableSpan) -> None:
        self.ended = span


def _copier(tracer: Any) -> Spans | None:
    # A subclass of the SDK's tracer, or self-metrics that count each start, know things that a copy would skip.
    counting = getattr(tracer, "_tracer_metrics", None)
    if type(tracer) is not Tracer or (counting is not None and type(counting).__name__ != "NoOpTracerMetrics"):
        return None
    quiet: Any = copy.copy(tracer)
    quiet.sampler, quiet.span_processor = ALWAYS_ON, _Keeping()
    template: Any = quiet.start_span("template", Context(), SpanKind.INTERNAL, {})
    span, held = dict(template.__dict__), dict(template._attributes.__dict__)
    if any(field not in span for field in _SPAN_FIELDS) or any(field not in held for field in _HELD_FIELDS):
        return None
    if held["max_value_len"] is not None or (held["maxlen"] is not None and held["maxlen"] < 32):
        return None  # the user's limits cut attributes short: the SDK knows how
    if type(held["_dict"]) is not dict or not _nothing_in(span.get("_record_end_metrics") or _does_nothing):
        return None
    known = template.get_span_context()
    if tuple(known) != (known.trace_id, known.span_id, False, known.trace_flags, known.trace_state, True):
        return None  # a span context is another tuple than the one that is put together below
    start = _copying(tracer, span, held, template)
    return None if start is None else Spans(start, _ending(tracer, span, held, template) or end)


def _copying(tracer: Any, span_fields: dict[str, Any], held_fields: dict[str, Any], template: Any) -> Starter | None:
    """What starts a span by copying the fields of the template and of its attributes."""
    resource, sampler, processor = tracer.resource, tracer.sampler, tracer.span_processor
    config = getattr(tracer, "_tracer_config", None)
    if span_fields["_resource"] is not resource or not getattr(config, "is_enabled", True):
        return None
    span_lock, held_lock = _maker_of(span_fields["_lock"]), _maker_of(held_fields["_lock"])
    base = {**span_fields, "_sampler": sampler, "_span_processor": processor, "_attributes": None}
    held_base = {**held_fields, "_dict": None}
    sure = sampler is ALWAYS_ON or _follows(sampler, "sampled", ALWAYS_ON)
    span_class, held_class = type(template), type(template._attributes)
    new, new_tuple, time_ns, new_id = object.__new__, tuple.__new__, time.time_ns, tracer.id_generator.generate_span_id
    events, links = _when_used(base["_limits"].max_events), _when_used(base["_limits"].max_links)
    processor._span_processors  # noqa: B018  # where there is no such field, spans are started as usual
    # The processors that were found to do nothing when a span starts, which is most: nobody need call them.
    passive: list[object] = [None]

    def start(name: str, context: Context, parent: Any, attributes: dict[str, Any]) -> Live:
        if (
            tracer.resource is not resource  # the process has forked
            or tracer.sampler is not sampler
            or (config is not None and tracer._tracer_config is not config)
        ):
            return _usual(tracer, name, context, attributes)
        trace_id, parent_flags, state = parent[0], parent[3], parent[4]  # its properties take three times as long
        flags, given = _FLAGS[_SAMPLED | (parent_flags & _RANDOM)], attributes
        if not (sure and parent_flags & _SAMPLED):
            result = sampler.should_sample(context, trace_id, name, SpanKind.INTERNAL, attributes, ())
            state = result.trace_state
            if result.decision is not Decision.RECORD_AND_SAMPLE:
                flags = _FLAGS[parent_flags & _RANDOM]
            if result.decision is Decision.DROP:
                span_context = SpanContext(trace_id, new_id(), False, flags, state)
                return NonRecordingSpan(span_context), span_context, attributes
            if result.attributes != attributes:
                given = {}  # the sampler has others: they are not known to be clean
        held = new(held_class)
        held.__dict__ = fields = held_base.copy()
        fields["_dict"] = given
        fields["_lock"] = held_lock()
        if given is not attributes:
            held.update(result.attributes)
        span_context = new_tuple(SpanContext, (trace_id, new_id(), False, flags, state, True))
        span = new(span_class)
        span.__dict__ = fields = base.copy()
        fields["_name"] = name
        fields["_attributes"] = held
        fields["_context"] = span_context
        fields["_parent"] = parent
        fields["_events"] = new(events)
        fields["_links"] = new(links)
        fields["_lock"] = span_lock()
        fields["_start_time"] = time_ns()
        processors = processor._span_processors
        if processors is not passive[0]:
            processor.on_start(span, context)
            if _nobody_cares(processor, processors, "on_start"):
                passive[0] = processors
        return span, span_context, given

    return start


def _ending(tracer: Any, span_fields: dict[str, Any], held_fields: dict[str, Any], template: Any) -> Ender | None:
    """What ends a copied span just as the SDK's `end` does; None where that does anything that is not known here."""
    span_class, processor = type(template), tracer.span_processor
    as_usual, time_ns, new = span_class.end, time.time_ns, object.__new__
    names = set(as_usual.__code__.co_names)
    if not names <= _NAMES_OF_END or type(processor) is not SynchronousMultiSpanProcessor:
        return None
    template.end()
    readable = template._span_processor.ended
    after, held_after = template.__dict__, template._attributes.__dict__
    told_base = dict(readable.__dict__)
    if (
        type(readable) is not ReadableSpan
        or told_base.keys() != _TOLD_FIELDS | _SAME_FIELDS
        or _changed(told_base, {key: after[key] for key in told_base})
        or _changed(span_fields, after) != {"_end_time"}
        or not _changed(held_fields, held_after) <= {"_immutable"}
    ):
        return None
    immutable, most = held_after["_immutable"], held_fields["maxlen"] or float("inf")
    passive: list[object] = [None]
    calls_on_ending = "_on_ending" in names

    def fast_end(live: Any, outcome: str) -> None:
        span, _, attributes = live
        processors = processor._span_processors
        if processors is not passive[0] and (not calls_on_ending or _nobody_cares(processor, processors, "_on_ending")):
            passive[0] = processors
        if processors is not passive[0] or type(span) is not span_class or span_class.end is not as_usual:
            end(live, outcome)
            return
        fields = span.__dict__
        held = fields["_attributes"]
        lock = fields["_lock"]
        lock.acquire()  # half the cost of `with`
        try:
            ours = held._dict is attributes and fields["_end_time"] is None and len(attributes) < most
            if ours:
                attributes[OUTCOME] = outcome
                fields["_end_time"] = time_ns()
                held._immutable = immutable
        finally:
            lock.release()
        if not ours:  # started as usual, or ended by the task's own code, or full
            end(live, outcome)
            return
        told = new(ReadableSpan)
        told.__dict__ = copied = told_base.copy()
        copied["_name"] = fields["_name"]
        copied["_context"] = fields["_context"]
        copied["_parent"] = fields["_parent"]
        copied["_start_time"] = fields["_start_time"]
        copied["_end_time"] = fields["_end_time"]
        copied["_attributes"] = held
        copied["_events"] = fields["_events"]
        copied["_links"] = fields["_links"]
        copied["_status"] = fields["_status"]
        for each in processors:
            each.on_end(told)

    return fast_end


def _changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    return {key for key in before.keys() | after.keys() if before.get(key) is not after.get(key)}


def _maker_of(lock: Any) -> Callable[[], Any]:
    for maker in (threading.Lock, threading.RLock):
        if type(lock) is type(maker()):
            return maker
    raise TypeError(f"no lock that is known: {lock!r}")


def _nobody_cares(processor: Any, processors: tuple[Any, ...], on: str) -> bool:
    """Whether none of the processors does anything on this occasion, nor what they are held by."""
    return type(processor) in (SynchronousMultiSpanProcessor, ConcurrentMultiSpanProcessor) and all(
        _nothing_in(getattr(one, on, None)) for one in processors
    )


def _nothing_in(method: Any) -> bool:
    function = getattr(method, "__func__", method)
    if function is not None and function in (SpanProcessor.on_start, getattr(SpanProcessor, "_on_ending", None)):
        return True  # what everybody inherits
    code = getattr(function, "__code__", None)
    return code is not None and code.co_code == _NOTHING


def _does_nothing(span: Any, parent_context: Any = None) -> None:
    pass


_NOTHING = _does_nothing.__code__.co_code


def _when_used(limit: int | None) -> type[Any]:
    """A BoundedList that costs next to nothing while it is empty, as most spans' events and links are."""

    class WhenUsed(BoundedList[Any]):
        dropped = 0

        def __getattr__(self, name: str) -> Any:
            # What the constructor sets is missing: it runs now, once, whichever thread comes first.
            if name not in ("_dq", "_lock"):
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            with _using:
                if "_dq" not in self.__dict__:
                    super().__init__(limit)
            return self.__dict__[name]

        def __iter__(self) -> Any:
            return super().__iter__() if "_dq" in self.__dict__ else iter(())

        def __len__(self) -> int:
            return super().__len__() if "_dq" in self.__dict__ else 0

    return WhenUsed


_using = threading.Lock()
