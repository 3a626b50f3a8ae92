"""The signal: which events become alerts, for whom, and what is told of them."""

from __future__ import annotations

import atexit
import functools
import hashlib
import math
import os
import socket
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any

from .. import _clock
from .._redact import default_redact
from ..events import (
    Dropped,
    Failed,
    Failure,
    Lost,
    Rejected,
    Request,
    Skipped,
    Slow,
    Stuck,
    Succeeded,
    TaskEvent,
    TaskRun,
    TimedOut,
)
from ..policies import Severity
from ._alert import Alert, Kind, counts
from ._channel import Deliver, Route, routes
from ._delivery import Numbers, Outbox
from ._groups import Key, Pace, message_id

Bad = Failed | TimedOut | Skipped | Dropped | Rejected | Lost

#: How long `close()` gives the channels, in seconds.
CLOSE = 5.0

#: Which page of `dashboards/runbooks/` says what to do.
RUNBOOKS: dict[Kind, str] = {
    "failed": "TaskFailing",
    "timed_out": "TaskFailing",
    "skipped": "TaskFailing",
    "rejected": "TaskFailing",
    "dropped": "TasksDropped",
    "lost": "TasksLost",
    "slow": "TaskStuck",
    "stuck": "TaskStuck",
    "burst": "ErrorBudgetBurn",
}


class Alerts:
    """
    Tells people what went wrong: a signal, in the usual list where `Settings.alerts` names a channel.

    A run that ends badly (`docs/telemetry.md`, Words) is told at once if it is the first of its kind: of its task,
    outcome and fingerprint (error class, and function of the app that raised it). Further ones are counted and told
    together, after 5 minutes, then 10, 20, and so on up to an hour. A task that has had no bad run for 5 minutes, and
    a success since, works again, which is told too. Runs that were skipped because of a failure are told
    with it, and runs that one request dropped are told together.

    A task's path pays for a lock and a count; text is made once for each message. Delivery has threads of its own.

    Args:
        channels: Who is told: `Webhook`, `Apprise`, a function, a URL, or a `Route` around one of these.
        trace_url: A template such as `https://tempo.example.org/trace/{trace_id}`; None: no link.
        runbook_url: Below which the pages of `dashboards/runbooks/` are; None: no link.
        burst, burst_window: So many bad runs of the whole app within so many seconds are a burst, told once.
        repeat_after, repeat_max: Seconds after which further runs of a kind are told; doubled each time, to at most.
        resolve_after: Seconds without a bad run after which a task works again, if it has succeeded since.
        redact: As `Settings.redact`: gets what a channel raised, before it is logged.
        numbers: The `Metrics` signal, so that deliveries are counted; None: they are only logged.

    Raises:
        TypeError, ValueError: A channel is none, or a value is not allowed; the message names it and shows no secret.
        ImportError: A channel needs Apprise, and it is not installed.
    """

    def __init__(
        self,
        channels: Iterable[Deliver | Route | str],
        *,
        trace_url: str | None = None,
        runbook_url: str | None = None,
        burst: int = 25,
        burst_window: float = 60.0,
        repeat_after: float = 300.0,
        repeat_max: float = 3600.0,
        resolve_after: float = 300.0,
        redact: Callable[[str], str] = default_redact,
        numbers: Numbers | None = None,
    ) -> None:
        check_trace_url("trace_url", trace_url)
        check_base_url("runbook_url", runbook_url)
        if isinstance(burst, bool) or not isinstance(burst, int) or burst < 2:
            raise ValueError(f"Alerts.burst must be a whole number, at least 2, got {burst!r}")
        seconds = {
            "burst_window": burst_window,
            "repeat_after": repeat_after,
            "repeat_max": repeat_max,
            "resolve_after": resolve_after,
        }
        for field, value in seconds.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"Alerts.{field} must be more than 0 seconds, got {value!r}")
        self._trace_url, self._runbook_url = trace_url, runbook_url
        self._burst_window, self._burst = burst_window, burst
        pace = Pace(repeat_after=repeat_after, repeat_max=max(repeat_after, repeat_max), quiet=resolve_after)
        self.outboxes = [Outbox(route, pace, redact, numbers) for route in routes(channels)]
        self._where = {"service": os.environ.get("OTEL_SERVICE_NAME"), "host": socket.gethostname()}
        self._start_over()
        self.handlers: dict[type[TaskEvent], Callable[[Any], None]] = {
            **dict.fromkeys((Failed, TimedOut, Skipped, Dropped, Rejected, Lost), self._on_bad),
            Slow: self._on_running_long,
            Stuck: self._on_running_long,
            Succeeded: self._on_succeeded,
        }
        _install()
        _everyone.add(self)
        _clock.watchers.add(self)

    def _start_over(self) -> None:
        self._lock = threading.Lock()
        self._failing: dict[str, tuple[int, float]] = {}
        self._told: weakref.WeakKeyDictionary[TaskRun | Request, Key] = weakref.WeakKeyDictionary()
        self._recent: deque[tuple[float, str]] = deque(maxlen=self._burst)
        self._burst_until = -math.inf

    def __call__(self, event: TaskEvent) -> None:
        """Note an event; those that are nobody's business are passed over."""
        handler = self.handlers.get(type(event))
        if handler is not None:
            handler(event)

    def close(self) -> None:
        """Deliver what waits, all channels at once; what is not delivered in five seconds is dropped and counted."""
        for outbox in self.outboxes:
            outbox.begin_to_close(CLOSE)
        for outbox in self.outboxes:
            outbox.finish_closing()

    def after_fork(self) -> None:
        """In the child: what waits is the parent's to tell."""
        self._start_over()
        for outbox in self.outboxes:
            outbox.start_over()

    def turned(self) -> None:
        """The clock was turned."""
        for outbox in self.outboxes:
            outbox.turned()

    def _on_bad(self, event: Bad) -> None:
        run = event.run
        if not event.bad or not run.plan.alert:
            return
        key, outboxes = _key(event), self._wanting(event)
        cause = _cause(event)
        if cause is not None:
            first = self._told.get(cause)
            if first is None:
                self._told[cause] = key
            else:
                outboxes = [outbox for outbox in outboxes if not outbox.add_not_run(first, run.task)]
        count, since = self._streak(event)
        if count:
            self._add(outboxes, key, lambda: self._describe(event, count, since), event.timestamp)
        self._note_for_burst(run.task, event.timestamp)

    def _on_running_long(self, event: Slow | Stuck) -> None:
        run = event.run
        if run.plan.alert:
            with self._lock:
                self._failing.setdefault(run.task, (0, event.timestamp))
            at = event.timestamp
            self._add(self._wanting(event), _key(event), lambda: self._describe(event, 1, at), at)

    def _on_succeeded(self, event: Succeeded) -> None:
        task = event.run.task
        if task not in self._failing:
            return
        with self._lock:
            self._failing.pop(task, None)
        for outbox in self.outboxes:
            outbox.succeeded(task)

    def _streak(self, event: Bad) -> tuple[int, float]:
        """How many bad runs this one stands for, and since when; 0 where its task has had too few to be told."""
        run, at = event.run, event.timestamp
        wanted = run.plan.alert_after
        with self._lock:
            before, since = self._failing.get(run.task, (0, at))
            streak = before + 1
            self._failing[run.task] = streak, since if before else at
        if wanted == 1 or streak > wanted or any(outbox.knows(run.task) for outbox in self.outboxes):
            return 1, at
        return (streak, since) if streak == wanted else (0, at)

    def _wanting(self, event: Bad | Slow | Stuck) -> list[Outbox]:
        run, severity = event.run, _severity(event)
        return [outbox for outbox in self.outboxes if outbox.route.wants(severity, run.plan.owner, run.task)]

    @staticmethod
    def _add(outboxes: list[Outbox], key: Key, describe: Callable[[], Alert], timestamp: float) -> None:
        once = describe if len(outboxes) < 2 else functools.cache(describe)
        for outbox in outboxes:
            outbox.add(key, once, timestamp)

    def _note_for_burst(self, task: str, timestamp: float) -> None:
        now = _clock.monotonic()
        with self._lock:
            recent = self._recent
            recent.append((now, task))
            if len(recent) < self._burst or now - recent[0][0] > self._burst_window:
                return
            begun = now >= self._burst_until
            self._burst_until = now + self._burst_window  # it lasts until it is calm for as long
            if not begun:
                return
            seconds, tasks = now - recent[0][0], Counter(name for _, name in recent)
        outboxes = [outbox for outbox in self.outboxes if outbox.route.wants("critical", None, None)]
        self._add(outboxes, ("", "burst", ""), lambda: self._burst_alert(seconds, tasks, timestamp), timestamp)

    def _burst_alert(self, seconds: float, tasks: Counter[str], timestamp: float) -> Alert:
        return Alert(
            id=message_id(),
            kind="burst",
            severity="critical",
            count=tasks.total(),
            message=f"{tasks.total()} bad runs within {seconds:.3g} s: {counts(dict(tasks.most_common(5)))}",
            first_seen=datetime.fromtimestamp(timestamp - seconds, UTC),
            last_seen=datetime.fromtimestamp(timestamp, UTC),
            **self._known("burst"),
        )

    def _describe(self, event: Bad | Slow | Stuck, count: int, since: float) -> Alert:
        run, kind = event.run, _kind(event)
        failure: Failure | None = getattr(event, "failure", None)
        span = run.span_context or run.request.span_context
        trace_id = None if span is None else f"{span.trace_id:032x}"
        return Alert(
            id=message_id(),
            kind=kind,
            severity=_severity(event),
            task=run.task,
            count=count,
            fingerprint=_key(event)[2],
            error_type=None if failure is None else failure.type,
            message=_message(event),
            hint=None if failure is None else failure.hint,
            reason=getattr(event, "reason", None),
            first_seen=datetime.fromtimestamp(since, UTC),
            last_seen=datetime.fromtimestamp(event.timestamp, UTC),
            owner=run.plan.owner,
            http_method=run.http_method,
            http_route=run.http_route,
            request_id=run.request_id,
            run_id=run.id,
            trace_id=trace_id,
            trace_url=trace_url(self._trace_url, trace_id),
            stack=getattr(event, "stack", None) if failure is None else failure.stack,
            **self._known(kind),
        )

    def _known(self, kind: Kind) -> dict[str, Any]:
        base = self._runbook_url
        page = None if base is None else f"{base.rstrip('/')}/{RUNBOOKS[kind]}.md"
        return {"runbook_url": page, "pid": os.getpid(), **self._where}


def _cause(event: Bad) -> TaskRun | Request | None:
    """What bad runs have in common, so that they are told together: a failure, or a request that ended."""
    match event:
        case Failed() | TimedOut():
            return event.run
        case Skipped(caused_by=caused_by):
            return caused_by
        case Dropped():
            return event.run.request
        case _:
            return None


def _kind(event: Bad | Slow | Stuck) -> Kind:
    return "slow" if isinstance(event, Slow) else "stuck" if isinstance(event, Stuck) else event.outcome


def _severity(event: Bad | Slow | Stuck) -> Severity:
    """As the task's owner says, but slow is never critical; else critical is what is lost or stuck."""
    said = event.run.plan.severity
    if isinstance(event, Slow):
        return "info" if said == "info" else "warning"
    return said or ("critical" if isinstance(event, (Lost, Stuck)) else "warning")  # type: ignore[return-value]  # checked


def _key(event: Bad | Slow | Stuck) -> Key:
    kind = _kind(event)
    failure: Failure | None = getattr(event, "failure", None)
    if failure is not None:
        return event.run.task, kind, failure.fingerprint
    text = f"{kind}\n{getattr(event, 'reason', '')}"
    return event.run.task, kind, hashlib.sha256(text.encode()).hexdigest()[:16]


def _message(event: Bad | Slow | Stuck) -> str:
    match event:
        case Failed(failure=failure) | TimedOut(failure=failure):
            return failure.message
        case Skipped(caused_by=cause):
            return "an earlier task of its response failed" if cause is None else f"{cause.task} failed before its turn"
        case Lost(age_s=age):
            return f"accepted {age:.3g} s before, and it will never run or finish"
        case Slow(running_s=running, limit_s=limit) | Stuck(running_s=running, limit_s=limit):
            return f"running for {running:.3g} s, more than {limit:.3g} s"
        case _:
            return f"it was not run: {event.reason}"


def trace_url(template: str | None, trace_id: str | None) -> str | None:
    """The link to a trace."""
    return None if template is None or trace_id is None else template.replace("{trace_id}", trace_id)


def check_trace_url(name: str, value: object) -> None:
    """
    A template of a link to a trace, or None.

    Raises:
        TypeError, ValueError: It is neither.
    """
    check_base_url(name, value)
    if value is not None and "{trace_id}" not in str(value):
        raise ValueError(
            f"{name} must hold {{trace_id}}, such as https://tempo.example.org/trace/{{trace_id}}, got {value!r}"
        )


def check_base_url(name: str, value: object) -> None:
    """
    A link, or None.

    Raises:
        TypeError, ValueError: It is neither.
    """
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} must be a URL or None, got {value!r}")
    if isinstance(value, str) and not value.startswith(("https://", "http://")):
        raise ValueError(f"{name} must begin with https:// or http://, got {value!r}")


_everyone: weakref.WeakSet[Alerts] = weakref.WeakSet()


def _after_fork() -> None:
    for each in list(_everyone):
        each.after_fork()


def _at_exit() -> None:
    """An app without a lifespan is never told that it ends."""
    for each in list(_everyone):
        each.close()


@functools.cache
def _install() -> None:
    """Once, and not when the module is imported: importing the package does nothing."""
    atexit.register(_at_exit)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_after_fork)
