"""From an event to an alert: its group, its severity, and its text."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from typing import TypeAlias, assert_never, cast

from ..events import Cancelled, Dropped, Failed, Lost, Rejected, RequestInfo, Skipped, Slow, Stuck, TaskRun, TimedOut
from ..policies import Severity
from .alert import Alert, Kind, counts_text
from .queue import GroupKey

BadEnd: TypeAlias = Failed | TimedOut | Skipped | Dropped | Rejected | Lost
Problem: TypeAlias = BadEnd | Cancelled | Slow | Stuck

#: The page of `dashboards/runbooks/` for each kind.
RUNBOOKS: dict[Kind, str] = {
    "failed": "TaskFailing",
    "timed_out": "TaskFailing",
    "skipped": "TaskFailing",
    "rejected": "TaskFailing",
    "dropped": "TasksDropped",
    "lost": "TasksLost",
    "cut_off": "TasksCutOff",
    "slow": "TaskStuck",
    "stuck": "TaskStuck",
    "burst": "ErrorBudgetBurn",
}

#: Why a run never started, by reason (`docs/telemetry.md`).
_NOT_STARTED = {
    "handler_error": "the request's handler failed",
    "own_background": "the handler returned a response with its own background tasks",
    "client_gone": "the client disconnected",
    "request_cancelled": "its request was cancelled",
    "request_failed": "its request failed after the response was sent",
    "added_too_late": "it was added after its request had ended",
    "websocket": "a WebSocket endpoint has no response to carry background tasks",
    "queue_full": "the queue of its concurrency limit was full",
    "not_serializable": "an argument cannot be sent to another process",
    "duplicate_key": "another run with the same key had not finished",
    "no_journal": "the journal could not keep it",
}


def group_key(problem: Problem) -> GroupKey:
    """The group of a problem: its task, its kind, and the fingerprint of its error or reason."""
    task = problem.run.task
    match problem:
        case Failed() | TimedOut():
            return GroupKey(task, cast(Kind, problem.outcome), problem.failure.fingerprint)
        case Dropped():
            return GroupKey(task, "dropped", _fingerprint("dropped", problem.reason, problem.error_type or ""))
        case Skipped() | Rejected():
            return GroupKey(task, cast(Kind, problem.outcome), _fingerprint(problem.outcome, problem.reason))
        case Lost():
            return GroupKey(task, "lost", _fingerprint("lost", problem.dead or problem.reason))
        case Cancelled():
            return GroupKey(task, "cut_off", _fingerprint("cut_off"))
        case Slow() | Stuck():
            kind: Kind = "slow" if isinstance(problem, Slow) else "stuck"
            return GroupKey(task, kind, _fingerprint(kind))
        case _:
            assert_never(problem)


def severity(problem: Problem) -> Severity:
    """The severity that the task's owner chose, else that of the kind; a slow run is never critical."""
    chosen = cast(Severity | None, problem.run.info.severity)
    if isinstance(problem, Slow):
        return "info" if chosen == "info" else "warning"
    return chosen or ("critical" if isinstance(problem, (Lost, Stuck)) else "warning")


def common_cause(end: BadEnd) -> TaskRun | RequestInfo | None:
    """What several bad ends share, so that one alert covers them: a failed run, or a request; None for the others."""
    match end:
        case Failed() | TimedOut():
            return end.run
        case Skipped():
            return end.caused_by
        case Dropped():
            return end.run.request
        case Rejected() | Lost():
            return None
        case _:
            assert_never(end)


def describe(
    problem: Problem, count: int, since: float, *, trace_url: str | None = None, runbook_url: str | None = None
) -> Alert:
    """The alert about `count` runs with this problem; the first ended at `since`, in seconds since the Unix epoch."""
    run, key = problem.run, group_key(problem)
    trace_id = run.trace_ids["trace_id"]
    alert = Alert(
        kind=key.kind,
        severity=severity(problem),
        task=run.task,
        count=count,
        fingerprint=key.fingerprint,
        first_seen=datetime.fromtimestamp(since, UTC),
        last_seen=problem.at,
        owner=run.info.owner,
        http_method=run.request.http_method,
        http_route=run.request.http_route,
        request_id=run.request.request_id,
        run_id=run.id,
        trace_id=trace_id,
        notes=run.notes,
        trace_url=None if trace_url is None or trace_id is None else trace_url.replace("{trace_id}", trace_id),
        runbook_url=_runbook(runbook_url, key.kind),
    )
    return _with_text(alert, problem)


def _with_text(alert: Alert, problem: Problem) -> Alert:
    match problem:
        case Failed(failure=failure) | TimedOut(failure=failure):
            return replace(
                alert, error_type=failure.type, message=failure.message, hint=failure.hint, stack=failure.stack
            )
        case Skipped(reason=reason, caused_by=cause):
            text = f"Not started: {'an earlier task of the response' if cause is None else cause.task} failed first"
            return replace(alert, reason=reason, message=text)
        case Dropped(reason=reason, error_type=error_type):
            text = f"Not started: {_NOT_STARTED.get(reason, reason)}{f' ({error_type})' if error_type else ''}"
            return replace(alert, reason=reason, error_type=error_type, message=text)
        case Rejected(reason=reason, hint=hint):
            return replace(alert, reason=reason, message=f"Not accepted: {_NOT_STARTED.get(reason, reason)}", hint=hint)
        case Lost(reason=reason):
            what = "it will never run or finish" if problem.dead is None else f"it is a dead letter: {problem.dead}"
            text = f"Scheduled {problem.age_s:.3g} s ago; {what}"
            return replace(alert, reason=reason, message=text)
        case Cancelled(duration_s=duration_s):
            state = "waiting for its next attempt" if duration_s is None else f"running for {duration_s:.3g} s"
            return replace(alert, message=f"It had been {state} when the app was shut down, and did not finish")
        case Slow() | Stuck():
            text = f"Running for {problem.running_s:.3g} s; the limit is {problem.limit_s:.3g} s"
            return replace(alert, message=text, stack=problem.stack)
        case _:
            assert_never(problem)


def describe_burst(tasks: Counter[str], seconds: float, timestamp: float, *, runbook_url: str | None) -> Alert:
    """The alert about many bad runs, by task, in the `seconds` before `timestamp`."""
    return Alert(
        kind="burst",
        severity="critical",
        count=tasks.total(),
        message=f"{tasks.total()} bad runs in {seconds:.3g} s: {counts_text(dict(tasks.most_common(5)))}",
        first_seen=datetime.fromtimestamp(timestamp - seconds, UTC),
        last_seen=datetime.fromtimestamp(timestamp, UTC),
        runbook_url=_runbook(runbook_url, "burst"),
    )


def _runbook(base: str | None, kind: Kind) -> str | None:
    return None if base is None else f"{base.rstrip('/')}/{RUNBOOKS[kind]}.md"


def _fingerprint(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
