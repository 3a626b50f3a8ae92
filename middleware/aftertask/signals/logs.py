"""One structured log line for each event, under names that never change; and the same keys on the task's own lines."""

from __future__ import annotations

import contextvars
import json
import logging
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import structlog

from .._log import emit, iso, to_stderr, write
from ..events import (
    Abandoned,
    AbandonedEnded,
    Cancelled,
    Dropped,
    Expired,
    Failed,
    HazardFound,
    Lost,
    Offloaded,
    Plan,
    Rejected,
    Request,
    Retrying,
    Scheduled,
    Skipped,
    Slow,
    SpanContext,
    Started,
    Stuck,
    Succeeded,
    TaskEvent,
    TaskRun,
    TimedOut,
    current_run,
)

# What every line of ours carries, and what a task's own lines are given.
KEYS = ("task", "run_id", "attempt", "engine", "http_route", "http_method", "request_id", "trace_id", "span_id")

# structlog keeps each bound key in a context variable; these are its own, so that its merge_contextvars finds them.
_tokens: Mapping[str, contextvars.Token[Any]] = contextvars.Context().run(
    structlog.contextvars.bind_contextvars, **dict.fromkeys(KEYS)
)
_VARS: tuple[ContextVar[Any], ...] = tuple(_tokens[key].var for key in KEYS)
_GET = tuple(var.get for var in _VARS)
_SET = tuple(var.set for var in _VARS)

_quote = json.encoder.encode_basestring_ascii


def run_keys(run: TaskRun) -> dict[str, Any]:
    """The keys that say which run a line is about; those that are not known are left out."""
    return {key: value for key, value in zip(KEYS, _values(run), strict=True) if value is not None}


def _values(run: TaskRun, known: _Bound | None = None) -> tuple[Any, ...]:
    request = run.request
    span = run.span_context or request.span_context
    if span is None:
        trace_id = span_id = None
    else:
        same = known is not None and known.span is not None and known.span.trace_id == span.trace_id
        trace_id = known.values[7] if same else f"{span.trace_id:032x}"  # type: ignore[union-attr]  # same: it is there
        span_id = f"{span.span_id:016x}"
    return (
        run.task,
        run.id,
        run.attempt,
        run.engine,
        request.http_route,
        request.http_method,
        request.request_id,
        trace_id,
        span_id,
    )


_NONE = (None,) * len(KEYS)


class _Bound:
    """What is bound for the runs of a batch, or for one run, and what was bound before."""

    __slots__ = ("before", "plan", "same", "span", "values")

    def __init__(self) -> None:
        self.before = [get(...) for get in _GET]
        self.values: tuple[Any, ...] = _NONE
        self.span: SpanContext | None = None
        self.plan: Plan | None = None
        self.same = ""

    def bind(self, run: TaskRun) -> None:
        """Bind what is another than for the run before: setting a context variable costs a quarter of a microsecond."""
        values = _values(run, self)
        for put, new, old in zip(_SET, values, self.values):  # noqa: B905  # of one length, on the path of every task
            if new is not old:
                put(... if new is None else new)
        self.values, self.span = values, run.span_context or run.request.span_context

    def restore(self) -> None:
        """As it was before."""
        for put, value in zip(_SET, self.before):  # noqa: B905  # as above
            put(value)

    def same_text(self, run: TaskRun) -> str:
        """The part of a line that is the same for all runs of a task in a batch."""
        if self.plan is not run.plan:
            _, _, _, engine, route, method, request_id, _, _ = self.values
            self.plan = run.plan
            self.same = (
                f'"task": {_quote(run.task)}, "engine": {_quote(engine)}'
                + (f', "http_route": {_quote(route)}' if route is not None else "")
                + (f', "http_method": {_quote(method)}' if method is not None else "")
                + (f', "request_id": {_quote(request_id)}' if request_id is not None else "")
            )
        return self.same


class Logs:
    """
    One structured log line for each event (`TELEMETRY.md`).

    Goes through structlog where the app has configured it, else through stdlib logging where it has handlers (the
    keys are the record's `extra`), else as one JSON line to stderr at `info` and above.

    While a task runs, the same keys are bound for structlog, in a sync task's thread too; for stdlib logging
    `RunFilter` puts them on a record.

    Args:
        success_log_rate: At most so many `task.succeeded` lines a second; the next one tells in `suppressed_count`
            how many were left out. None: no limit.
    """

    def __init__(self, *, success_log_rate: float | None = None) -> None:
        self._rate = success_log_rate
        self._window = self._said = self._suppressed = 0
        self._hazards: set[tuple[str, str]] = set()
        self._bound: dict[TaskRun | tuple[Request, int], _Bound] = {}
        self.handlers: dict[type[TaskEvent], Callable[[Any], None]] = {
            Scheduled: self._on_scheduled,
            Started: self._on_started,
            Retrying: self._on_retrying,
            Succeeded: self._on_succeeded,
            Failed: self._on_failed,
            TimedOut: self._on_failed,
            Cancelled: self._on_never_or_cut_off,
            Skipped: self._on_never_or_cut_off,
            Dropped: self._on_never_or_cut_off,
            Rejected: self._on_never_or_cut_off,
            Expired: self._on_never_or_cut_off,
            Lost: self._on_lost,
            Slow: self._on_running_long,
            Stuck: self._on_running_long,
            Abandoned: self._on_running_long,
            AbandonedEnded: self._on_running_long,
            HazardFound: self._on_hazard,
        }

    def __call__(self, event: TaskEvent) -> None:
        """Log an event; those that have no line of their own (`Offloaded`) are passed over."""
        if not isinstance(event, Offloaded):
            self.handlers[type(event)](event)

    def _on_scheduled(self, event: Scheduled) -> None:
        if not to_stderr():
            self._say("debug", "task.scheduled", event, priority=event.run.priority)

    def _on_started(self, event: Started) -> None:
        run = event.run
        key = (run.request, run.batch) if run.batch else run
        bound = self._bound.get(key)
        if bound is None:
            bound = self._bound[key] = _Bound()
        bound.bind(run)
        if not to_stderr():
            self._say("debug", "task.started", event, queue_wait_s=event.queue_wait_s)

    def _on_succeeded(self, event: Succeeded) -> None:
        suppressed = self._allowed(event.timestamp) if self._rate is not None else 0
        if suppressed is not None:
            if to_stderr():
                self._write_succeeded(event, suppressed)
            else:
                self._say(
                    "info",
                    "task.succeeded",
                    event,
                    duration_s=event.duration_s,
                    queue_wait_s=_queue_wait(event.run),
                    suppressed_count=suppressed or None,
                )
        self._unbind(event.run)

    def _write_succeeded(self, event: Succeeded, suppressed: int) -> None:
        """The line that most tasks end with, put together by hand: a tenth of what a general encoder takes."""
        run = event.run
        bound = self._bound.get((run.request, run.batch) if run.batch else run) or _Bound()
        if bound.values[1] != run.id:
            bound.values = _values(run)
        trace_id, span_id, wait = bound.values[7], bound.values[8], _queue_wait(run)
        span_text = "" if trace_id is None else f', "trace_id": "{trace_id}", "span_id": "{span_id}"'
        write(
            f'{{"event": "task.succeeded", "level": "info", "timestamp": "{iso(event.timestamp)}", '
            f'{bound.same_text(run)}, "run_id": "{run.id}", "attempt": {event.attempt}'
            f'{span_text}, "duration_s": {event.duration_s:.6f}'
            + (f', "queue_wait_s": {wait:.6f}' if wait is not None else "")
            + (f', "suppressed_count": {suppressed}' if suppressed else "")
            + "}\n"
        )

    def _on_retrying(self, event: Retrying) -> None:
        self._say(
            "warning",
            "task.retrying",
            event,
            error_type=event.failure.type,
            error_message=event.failure.message,
            error_fingerprint=event.failure.fingerprint,
            retry_in_s=event.delay_s,
        )
        self._unbind(event.run)

    def _on_failed(self, event: Failed | TimedOut) -> None:
        self._say(
            "error",
            f"task.{event.outcome}",
            event,
            error_type=event.failure.type,
            error_message=event.failure.message,
            error_fingerprint=event.failure.fingerprint,
            duration_s=event.duration_s,
            exception=event.failure.stack,
        )
        self._unbind(event.run)

    def _on_never_or_cut_off(self, event: Cancelled | Skipped | Dropped | Rejected | Expired) -> None:
        cause = getattr(event, "caused_by", None)
        self._say(
            "warning", f"task.{event.outcome}", event, reason=event.reason, caused_by=None if cause is None else cause.id
        )
        self._unbind(event.run)

    def _on_lost(self, event: Lost) -> None:
        self._say("error", "task.lost", event, reason=event.reason, age_s=event.age_s)
        self._unbind(event.run)

    def _on_running_long(self, event: Slow | Stuck | Abandoned | AbandonedEnded) -> None:
        name = "abandoned_ended" if isinstance(event, AbandonedEnded) else type(event).__name__.lower()
        self._say(
            "info" if isinstance(event, AbandonedEnded) else "warning",
            f"task.{name}",
            event,
            running_s=event.running_s,
            limit_s=event.limit_s,
            stack=getattr(event, "stack", None),
        )

    def _on_hazard(self, event: HazardFound) -> None:
        key = (event.run.task, event.kind)
        if key not in self._hazards and len(self._hazards) < 1000:
            self._hazards.add(key)
            self._say("warning", "task.hazard", event, kind=event.kind, argument=event.argument, advice=event.advice)

    def _say(self, level: str, name: str, event: TaskEvent, **keys: Any) -> None:
        emit(level, name, timestamp=event.timestamp, **run_keys(event.run), **keys)

    def _allowed(self, timestamp: float) -> int | None:
        """How many lines were left out since the last one; None where this one is left out too."""
        second = int(timestamp)
        if second != self._window:
            self._window, self._said = second, 0
        if self._said >= (self._rate or 0):
            self._suppressed += 1
            return None
        self._said += 1
        suppressed, self._suppressed = self._suppressed, 0
        return suppressed

    def _unbind(self, run: TaskRun) -> None:
        if not run.batch:
            bound = self._bound.pop(run, None)
            if bound is not None:  # None: it was never started
                bound.restore()

    def batch_ended(self, request: Request, batch: int) -> None:
        """Put back what was bound before the batch."""
        bound = self._bound.pop((request, batch), None)
        if bound is not None:
            bound.restore()


def _queue_wait(run: TaskRun) -> float | None:
    if run.parent is not None or run.started_s is None:
        return None
    return 0.0 if run.queued_s is None else max(0.0, run.started_s - run.queued_s)


class RunFilter(logging.Filter):
    """
    Puts the keys of the run that is under way (`task`, `run_id`, `trace_id`, …) on every stdlib log record.

    Add it to a handler: `handler.addFilter(RunFilter())`. Outside of a run the keys are None, so that a format may
    name them.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the keys; no record is held back."""
        run = current_run()
        for key, value in zip(KEYS, _values(run) if run is not None else (None,) * len(KEYS), strict=True):
            if not hasattr(record, key):
                setattr(record, key, value)
        return True
