"""One structured log line for each event, under names that never change; and the same keys on the task's own lines."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextvars import Token
from typing import Any, TypeAlias

from structlog.contextvars import bind_contextvars, get_contextvars, reset_contextvars

from .._log import Level, enabled, log
from .._text import own_frames
from ..events import (
    Abandoned,
    AbandonedEnded,
    Cancelled,
    Dropped,
    Expired,
    Failed,
    Failure,
    HazardFound,
    LoopBlocked,
    Lost,
    Offloaded,
    OffloadFailed,
    Rejected,
    Retrying,
    Scheduled,
    Signal,
    Skipped,
    Slow,
    Started,
    Stuck,
    Succeeded,
    TaskEvent,
    TaskRun,
    TimedOut,
)
from ._repetitions import Repetitions, sentence
from .families import NO_TASK

#: Ends with a reason.
Unfinished: TypeAlias = Cancelled | Skipped | Dropped | Rejected | Expired | Lost

#: The keys of every line about a run, which the task's own lines get, too.
KEYS = (
    "task",
    "run_id",
    "attempt",
    "engine",
    "http_route",
    "http_method",
    "request_id",
    "trace_id",
    "span_id",
    "notes",
)

_UNBLOCK = (
    "make the task a plain `def`, which runs in a thread, or await something that does not block; "
    "executor='process' is for what computes"
)

#: Each hazard is logged once per task and kind; no more than this many are remembered, and logged.
_MOST_HAZARDS = 1000


def run_keys(run: TaskRun) -> dict[str, Any]:
    """The keys that identify a run in a log line, by `KEYS`; None for what is unknown."""
    request = run.request
    return {
        "task": run.task,
        "run_id": run.id,
        "attempt": run.attempt,
        "engine": run.info.engine,
        "http_route": request.http_route,
        "http_method": request.http_method,
        "request_id": request.request_id,
        **run.trace_ids,
        "notes": run.notes or None,
    }


class Logs(Signal):
    """
    One structured log line for each event; `docs/telemetry.md` lists events, levels and keys.

    Lines go through structlog as the app configured it; else, if the app set up stdlib logging, to the logger
    `aftertask` with the keys as attributes of the record; else to stderr as JSON, at info and above.

    While a task runs, the keys that identify the run are bound for structlog, in a sync task's thread, too. For stdlib
    logging, `RunFilter` adds them to a record.

    Args:
        success_log_rate: Maximum number of `task.succeeded` lines per second; the next line has the number of lines
            left out as `suppressed_count`. None means no limit.
    """

    def __init__(self, *, success_log_rate: float | None = None) -> None:
        self._successes = _Rate(success_log_rate)
        self._repetitions = Repetitions()
        self._hazards: set[tuple[str, str]] = set()
        self._has_explained = False
        #: The keys of each run with an attempt under way, and what restores those that were bound before.
        self._bound: dict[TaskRun, tuple[dict[str, Any], Mapping[str, Token[Any]]]] = {}
        #: structlog's keys that a sync endpoint bound in its worker thread, for the tasks it added there.
        self._from_endpoint: dict[TaskRun, dict[str, Any]] = {}

    # --- before and at the start of an attempt

    def scheduled(self, event: Scheduled) -> None:
        """`task.scheduled`; a sync endpoint's bound keys are kept for its task."""
        run = event.run
        if threading.get_ident() != run.request.thread and (bound := get_contextvars()):
            self._from_endpoint[run] = bound
        if enabled("debug"):
            self._line("debug", "task.scheduled", event, "", priority=run.info.priority)

    def started(self, event: Started) -> None:
        """`task.started`; the run's keys are bound until the attempt ends."""
        run = event.run
        keys = {key: value for key, value in run_keys(run).items() if value is not None}
        self._bound[run] = keys, bind_contextvars(**{**self._from_endpoint.get(run, {}), **keys})
        if enabled("debug"):
            self._line("debug", "task.started", event, "", queue_wait_s=event.queue_wait_s)

    # --- the end of an attempt

    def retrying(self, event: Retrying) -> None:
        """`task.retrying`."""
        try:
            if enabled("warning"):
                keys = _failure_keys(event.failure)
                what = f"{_error_text(event.failure)}; next attempt in {event.delay_s:.3g} s"
                self._line("warning", "task.retrying", event, what, **keys, retry_in_s=event.delay_s)
        finally:
            self._unbind(event.run)

    def succeeded(self, event: Succeeded) -> None:
        """`task.succeeded`, within the rate."""
        run = event.run
        try:
            if enabled("info") and (suppressed := self._successes.admit(event.timestamp)) is not None:
                self._line(
                    "info",
                    "task.succeeded",
                    event,
                    f"took {event.duration_s:.3g} s",
                    duration_s=event.duration_s,
                    queue_wait_s=run.queue_wait_s,
                    thread_wait_s=run.thread_wait_s,
                    suppressed_count=suppressed or None,
                )
        finally:
            self._forget(run)

    def offloaded(self, event: Offloaded) -> None:
        """`offload.sent`."""
        if enabled("debug"):
            self._line("debug", "offload.sent", event, event.queue, queue=event.queue, message_id=event.run.id)
        self._forget(event.run)

    def offload_failed(self, event: OffloadFailed) -> None:
        """`offload.fallback` if the run executes here, else `offload.failed`."""
        keys = _failure_keys(event.failure) | {"message_id": event.run.id, "duration_s": event.duration_s}
        if event.falls_back:
            self._line("warning", "offload.fallback", event, _error_text(event.failure), **keys)
        else:
            self._line("error", "offload.failed", event, _error_text(event.failure), **keys)

    def _failed(self, event: Failed | TimedOut) -> None:
        """`task.failed` or `task.timed_out`."""
        failure, run = event.failure, event.run
        try:
            if enabled("error"):
                explain, self._has_explained = not self._has_explained, True
                repeated = self._repetitions.number((run.task, event.outcome, failure.fingerprint), event.timestamp)
                self._line(
                    "error",
                    f"task.{event.outcome}",
                    event,
                    _error_text(failure),
                    exc_info=failure.error,
                    repeated=bool(repeated),
                    explain=explain,
                    contained=run.info.on_failure == "contain" and run.parent is None,
                    **_failure_keys(failure),
                    duration_s=event.duration_s,
                    exception=None if repeated else failure.stack,
                    hint=failure.hint,
                    thread_wait_s=run.thread_wait_s,
                    suppressed_count=repeated or None,
                )
        finally:
            self._forget(run)

    failed = timed_out = _failed

    # --- runs that did not finish, most of which never started

    def _stopped(self, event: Cancelled | Expired) -> None:
        """`task.cancelled` or `task.expired`."""
        self._ended("warning", event)

    cancelled = expired = _stopped

    def skipped(self, event: Skipped) -> None:
        """`task.skipped`, with the run that failed and its task."""
        cause = event.caused_by
        keys = {} if cause is None else {"caused_by": cause.id, "caused_by_task": cause.task}
        self._ended("warning", event, "" if cause is None else f" of {cause.task}", **keys)

    def dropped(self, event: Dropped) -> None:
        """`task.dropped`; at info if a client caused it."""
        self._ended("warning" if event.bad else "info", event, error_type=event.error_type)

    def rejected(self, event: Rejected) -> None:
        """`task.rejected`, with what to do."""
        self._ended("warning", event, f": {event.hint}" if event.hint else "", hint=event.hint)

    def lost(self, event: Lost) -> None:
        """`task.lost`; the line of a dead letter is the journal's, `task.dead_lettered`."""
        if event.dead is None:
            self._ended("error", event, age_s=event.age_s)

    def _ended(self, level: Level, event: Unfinished, because: str = "", **keys: Any) -> None:
        try:
            if enabled(level):
                what = event.reason + because
                self._line(level, f"task.{event.outcome}", event, what, reason=event.reason, **keys)
        finally:
            self._forget(event.run)

    # --- what a watching thread finds

    def slow(self, event: Slow) -> None:
        """`task.slow`."""
        self._running_long("warning", "task.slow", event, event.stack)

    def stuck(self, event: Stuck) -> None:
        """`task.stuck`."""
        self._running_long("warning", "task.stuck", event, event.stack)

    def abandoned(self, event: Abandoned) -> None:
        """`task.abandoned`."""
        self._running_long("error", "task.abandoned", event, event.stack)

    def abandoned_ended(self, event: AbandonedEnded) -> None:
        """`task.abandoned_ended`."""
        self._running_long("info", "task.abandoned_ended", event, None)

    def _running_long(
        self, level: Level, name: str, event: Slow | Stuck | Abandoned | AbandonedEnded, stack: str | None
    ) -> None:
        if enabled(level):
            what = f"running for {event.running_s:.3g} s, limit {event.limit_s:.3g} s"
            self._line(level, name, event, what, running_s=event.running_s, limit_s=event.limit_s, stack=stack)

    def hazard_found(self, event: HazardFound) -> None:
        """`task.hazard`, once per task and kind; `loop.blocked` is the line about a blocked loop."""
        if event.kind == "blocked_loop":
            return
        key = (event.run.task, event.kind)
        if key in self._hazards or len(self._hazards) >= _MOST_HAZARDS:
            return
        self._hazards.add(key)
        what = f"{event.kind}: {event.advice}"
        self._line("warning", "task.hazard", event, what, kind=event.kind, argument=event.argument, advice=event.advice)

    def loop_blocked(self, report: LoopBlocked) -> None:
        """`loop.blocked`."""
        run = report.run
        blocks = "has blocked" if not report.over else "blocked"
        what = f"{blocks} the event loop for {report.blocked_s:.3g} s at {report.where}"
        what = what if run is None else f"{what}; {_UNBLOCK}"
        failed = log(
            "warning",
            "loop.blocked",
            message=lambda: f"loop.blocked {NO_TASK}: {what}" if run is None else sentence("loop.blocked", run, what),
            timestamp=report.timestamp,
            **({"task": NO_TASK} if run is None else run_keys(run)),
            blocked_s=report.blocked_s,
            where=report.where,
            stack=own_frames(report.stack),
            advice=None if run is None else _UNBLOCK,
            still_blocked=None if report.over else True,
            suppressed_count=report.suppressed or None,
        )
        if failed is not None:
            raise failed

    # --- one line, and what was bound

    def _line(self, level: Level, name: str, event: TaskEvent, what: str, **keys: Any) -> None:
        """
        Log one line about a run; raise what the app's logging raised, so that it is counted as a failed signal.

        Args:
            what: What the sentence for people says after the name and the task.
            keys: What `log` takes.
        """
        run = event.run
        bound, _ = self._bound.get(run, (None, None))
        failed = log(
            level,
            name,
            message=lambda: sentence(name, run, what),
            timestamp=event.timestamp,
            **(bound or run_keys(run)) | {"notes": run.notes or None},
            **keys,
            progress=None if run.progress is None else run.progress.text,
        )
        if failed is not None:
            raise failed

    def _unbind(self, run: TaskRun) -> None:
        _, tokens = self._bound.pop(run, (None, None))
        # A coroutine may be closed from another context, which never had the keys.
        if tokens is not None and run.is_current:
            reset_contextvars(**tokens)

    def _forget(self, run: TaskRun) -> None:
        """The run has ended, or goes on elsewhere."""
        self._unbind(run)
        self._from_endpoint.pop(run, None)

    departed = _forget


def _failure_keys(failure: Failure) -> dict[str, Any]:
    return {
        "error_type": failure.type,
        "error_message": failure.message,
        "error_fingerprint": failure.fingerprint,
    }


def _error_text(failure: Failure) -> str:
    """The class and the first line of the message."""
    message = failure.message.partition("\n")[0]
    return f"{failure.type}: {message}" if message else failure.type


class _Rate:
    """
    Admits at most a number of lines per second and counts the others.

    Args:
        rate: Lines per second of the clock; None means no limit.
    """

    def __init__(self, rate: float | None) -> None:
        self._rate = rate
        self._second = self._admitted = self._left_out = 0

    def admit(self, timestamp: float) -> int | None:
        """How many lines were left out since the last one; None if this one is left out."""
        if self._rate is None:
            return 0
        if int(timestamp) != self._second:
            self._second, self._admitted = int(timestamp), 0
        if self._admitted >= self._rate:
            self._left_out += 1
            return None
        self._admitted += 1
        left_out, self._left_out = self._left_out, 0
        return left_out
