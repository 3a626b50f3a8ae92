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
    LoopBlocked,
    LoopListener,
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
from .families import NO_TASK

# What every line of ours carries, and what a task's own lines are given.
KEYS = ("task", "run_id", "attempt", "engine", "http_route", "http_method", "request_id", "trace_id", "span_id")

# structlog keeps each bound key in a context variable; these are its own, so that its merge_contextvars finds them.
_tokens: Mapping[str, contextvars.Token[Any]] = contextvars.Context().run(
    structlog.contextvars.bind_contextvars, **dict.fromkeys(KEYS)
)
_VARS: tuple[ContextVar[Any], ...] = tuple(_tokens[key].var for key in KEYS)
_GET = tuple(var.get for var in _VARS)
_SET = tuple(var.set for var in _VARS)

_bind_run_id, _bind_span_id = _SET[KEYS.index("run_id")], _SET[KEYS.index("span_id")]


def run_keys(run: TaskRun) -> dict[str, Any]:
    """The keys that say which run a line is about; those that are not known are left out."""
    return {key: value for key, value in zip(KEYS, _values(run), strict=True) if value is not None}


def _values(run: TaskRun) -> tuple[Any, ...]:
    request = run.request
    span = run.span_context or request.span_context
    return (
        run.task,
        run.id,
        run.attempt,
        run.engine,
        request.http_route,
        request.http_method,
        request.request_id,
        None if span is None else span.trace_id.to_bytes(16).hex(),  # half the cost of a format
        None if span is None else span.span_id.to_bytes(8).hex(),
    )


class _Same(dict[tuple[Plan, str | None, str | None], str]):
    """What is the same in the lines of all runs of a task that come from one route, as JSON; so many are kept."""

    most = 2000

    def of(self, run: TaskRun) -> str:
        """The text for this run."""
        request = run.request
        key = run.plan, request.http_route, request.http_method
        text = self.get(key)
        if text is None:
            names = ("task", "engine", "http_route", "http_method")
            known = zip(names, (run.task, run.engine, request.http_route, request.http_method), strict=True)
            if len(self) >= self.most:
                self.clear()
            text = self[key] = json.dumps({name: value for name, value in known if value is not None})[1:-1]
        return text


class _Bound:
    """
    What is bound for the runs of a batch, or for one run, and what was bound before.

    Setting a context variable costs a quarter of a microsecond, so for the next run of the same task only what
    differs is set.
    """

    __slots__ = (
        "attempt",
        "batch",
        "before",
        "head",
        "plan",
        "request",
        "run",
        "run_id",
        "span",
        "tail",
        "texts",
        "to_stderr",
        "trace_id",
        "trace_text",
    )

    def __init__(self, run: TaskRun, texts: _Same, to_stderr: bool) -> None:
        self.run, self.request, self.batch = run, run.request, run.batch
        self.texts, self.to_stderr = texts, to_stderr
        self.run_id = ""
        self.before = [get(...) for get in _GET]
        self.plan: Plan | None = None
        self.attempt = 0
        self.span: SpanContext | None = None
        self.trace_id: int | None = None
        self.head = self.tail = self.trace_text = ""  # of a line that is put together by hand

    def bind(self, run: TaskRun) -> None:
        """Bind the keys of this run."""
        span = run.span_context or run.request.span_context
        self.run = run
        run_id = self.run_id = run.id
        if run.plan is not self.plan or run.attempt != self.attempt:
            self._bind_all(run, span)
        elif span is self.span:
            _bind_run_id(run_id)
        elif span is not None and span[0] == self.trace_id:
            _bind_run_id(run_id)
            span_id = span[1].to_bytes(8).hex()
            _bind_span_id(span_id)
            self.tail = f'{self.trace_text}{span_id}", "duration_s": '
            self.span = span
        else:
            self._bind_all(run, span)

    def _bind_all(self, run: TaskRun, span: SpanContext | None) -> None:
        values = _values(run)
        for put, value, before in zip(_SET, values, self.before, strict=True):
            if value is not None:
                put(value)
            elif self.plan is not None:
                put(before)  # an earlier run of the batch may have had it
        request_id, trace_id, span_id = values[6:]
        id_text = "" if request_id is None else f', "request_id": {json.dumps(request_id)}'
        self.head = f'", {self.texts.of(run)}{id_text}, "run_id": "'
        attempt = f'", "attempt": {run.attempt}'
        self.trace_text = f'{attempt}, "trace_id": "{trace_id}", "span_id": "'
        self.tail = (attempt if span is None else f'{self.trace_text}{span_id}"') + ', "duration_s": '
        self.plan, self.attempt, self.span = run.plan, run.attempt, span
        self.trace_id = None if span is None else span.trace_id

    def restore(self) -> None:
        """As it was before."""
        for put, value in zip(_SET, self.before, strict=True):
            put(value)


class _LoopLog:
    """The line that tells of a blocked event loop; one for all apps of the process, whose loop it is."""

    def lag(self, seconds: float) -> None:
        """For the metrics."""

    def blocked_for(self, run: TaskRun | None, seconds: float) -> None:
        """For the metrics."""

    def blocked(self, report: LoopBlocked) -> None:
        """Say who is to blame, and where it was."""
        run = report.run
        emit(
            "warning",
            "loop.blocked",
            timestamp=report.timestamp,
            **({"task": NO_TASK} if run is None else run_keys(run)),
            blocked_s=round(report.blocked_s, 6),
            where=report.where,
            stack=report.stack,
            still_blocked=None if report.over else True,
            suppressed_count=report.suppressed or None,
        )


_loop_log = _LoopLog()


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
        self.loop: LoopListener = _loop_log
        self._rate = success_log_rate
        self._to_stderr = to_stderr()  # asked again with each batch
        self._window = self._said = self._suppressed = 0
        self._hazards: set[tuple[str, str]] = set()
        self._bound: dict[TaskRun | tuple[Request, int], _Bound] = {}
        self._same = _Same()
        self._last: _Bound | None = None  # of those, the one that was looked up last
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
        if not self._to_stderr:
            self._say("debug", "task.scheduled", event, priority=event.run.priority)

    def _on_started(self, event: Started) -> None:
        run = event.run
        bound = self._last
        if bound is None or bound.request is not run.request or bound.batch != run.batch or not run.batch:
            bound = self._find(run)
        bound.bind(run)
        if not bound.to_stderr:
            self._say("debug", "task.started", event, queue_wait_s=event.queue_wait_s)

    def _find(self, run: TaskRun) -> _Bound:
        key = (run.request, run.batch) if run.batch else run
        bound = self._last = self._bound.get(key)
        if bound is None:
            self._to_stderr = to_stderr()
            bound = self._last = self._bound[key] = _Bound(run, self._same, self._to_stderr)
        return bound

    def _on_succeeded(self, event: Succeeded) -> None:
        run = event.run
        suppressed = self._allowed(event.timestamp) if self._rate is not None else 0
        if suppressed is not None:
            bound = self._last
            if bound is None or bound.run is not run:
                bound = self._bound.get((run.request, run.batch) if run.batch else run)
            wait = run.queue_wait_s
            if bound is not None and bound.run is run and bound.to_stderr and run.progress is None:
                # The line that most tasks end with, put together by hand: a fifth of what a general encoder takes.
                waited = "" if wait is None else f', "queue_wait_s": {wait:.6f}'
                more = f', "suppressed_count": {suppressed}' if suppressed else ""
                if run.thread_s is not None and run.thread_wait_s is not None:
                    waited += f', "thread_wait_s": {run.thread_wait_s:.6f}'
                write(
                    f'{{"event": "task.succeeded", "level": "info", "timestamp": "{iso(event.timestamp)}'
                    f"{bound.head}{bound.run_id}{bound.tail}{event.duration_s:.6f}{waited}{more}}}\n"
                )
            else:
                self._say_last(
                    "info",
                    "task.succeeded",
                    event,
                    duration_s=event.duration_s,
                    queue_wait_s=wait,
                    thread_wait_s=run.thread_wait_s,
                    suppressed_count=suppressed or None,
                )
        if not run.batch:
            self._unbind(run)

    def _on_retrying(self, event: Retrying) -> None:
        self._say_last(
            "warning",
            "task.retrying",
            event,
            error_type=event.failure.type,
            error_message=event.failure.message,
            error_fingerprint=event.failure.fingerprint,
            retry_in_s=event.delay_s,
        )

    def _on_failed(self, event: Failed | TimedOut) -> None:
        self._say_last(
            "error",
            f"task.{event.outcome}",
            event,
            error_type=event.failure.type,
            error_message=event.failure.message,
            error_fingerprint=event.failure.fingerprint,
            duration_s=event.duration_s,
            exception=event.failure.stack,
            hint=event.failure.hint,
            thread_wait_s=event.run.thread_wait_s,
        )

    def _on_never_or_cut_off(self, event: Cancelled | Skipped | Dropped | Rejected | Expired) -> None:
        cause = getattr(event, "caused_by", None)
        self._say_last(
            "warning",
            f"task.{event.outcome}",
            event,
            reason=event.reason,
            caused_by=None if cause is None else cause.id,
        )

    def _on_lost(self, event: Lost) -> None:
        self._say_last("error", "task.lost", event, reason=event.reason, age_s=event.age_s)

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
        told = {key: round(value, 6) if isinstance(value, float) else value for key, value in keys.items()}
        if event.run.progress is not None:
            told["progress"] = event.run.progress.text
        failed = emit(level, name, timestamp=event.timestamp, **run_keys(event.run), **told)
        if failed is not None:
            raise failed  # so that it is told and counted as a signal that failed

    def _say_last(self, level: str, name: str, event: TaskEvent, **keys: Any) -> None:
        """The line that an attempt ends with."""
        try:
            self._say(level, name, event, **keys)
        finally:
            self._unbind(event.run)

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
            self._restore(run)  # nothing, where it was never started

    def batch_ended(self, request: Request, batch: int) -> None:
        """Put back what was bound before the batch."""
        self._restore((request, batch))

    def _restore(self, key: TaskRun | tuple[Request, int]) -> None:
        bound = self._bound.pop(key, None)
        if bound is not None:
            bound.restore()
            if bound is self._last:
                self._last = None  # or it would keep the request


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
