"""What signals and users see of a task, a request and a run; public through `aftertask.events`."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Mapping
from contextvars import Context, ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Literal, Protocol, TypeAlias, get_args

from . import _clock
from ._text import Redact, default_redact

Outcome: TypeAlias = Literal[
    "succeeded",
    "failed",
    "timed_out",
    "cancelled",
    "skipped",
    "dropped",
    "rejected",
    "expired",
    "lost",
    "offloaded",
]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)

#: The engine of runs that execute in the process of their app.
LOCAL = "local"

#: Used in place of an engine's name: the journal, which a durable run goes back to.
JOURNAL = "journal"

#: A wait for a thread shorter than this many seconds is the ordinary cost of handing a call over.
_NOTABLE_THREAD_WAIT = 0.005

#: The longest text that `progress()` and `note()` keep, in characters.
LONGEST_NOTE = 200

#: A value that `note()` keeps.
Note: TypeAlias = str | int | float | bool


class SpanContext(Protocol):
    """The part of OpenTelemetry's `SpanContext` that signals share with each other."""

    @property
    def trace_id(self) -> int: ...
    @property
    def span_id(self) -> int: ...
    @property
    def trace_flags(self) -> int: ...


@dataclass(frozen=True, slots=True, eq=False)
class TaskInfo:
    """
    What signals can see of a task: its name and the observable part of the policy in force.

    Attributes:
        task: The task's name, the `task` label of every metric.
        code: The function as `module.qualname`, for `code.function.name`.
        registered: Whether `@task` or `Settings.policies` names the task; its metrics then exist from the start.
        engine: Where its runs execute: `local`, or in an engine's worker the engine's name.
        executor: Where the function runs: `inline` (on the event loop), `thread` or `process`; if its runs are handed
            over, the name of the engine.
        shares_threads: Whether it runs in the thread pool that sync endpoints use.
        owner: The team or person responsible; None if not set.
        expected: Exception classes that make a run failed but not bad.
        trace: `child`, `link` or `none`; None means `Settings.trace`.
        timeout: Seconds per attempt; None means no timeout.
        max_attempts: Maximum number of attempts, at least 1.
        on_failure: What a failure does to the batch: `stop`, `continue` or `contain`.
        priority: Smaller numbers run first.
        alert: Whether failures of the task are alerted.
        severity: Severity of its alerts; None means the default of the alert's kind.
        alert_after: Number of bad runs before the first alert, at least 1.
        slow_after: Seconds after which a running attempt is reported as slow; None means never.
        stuck_after: Seconds after which a running attempt is reported as stuck.
        durable: Whether the journal keeps the run beyond the process.
        idempotent: Whether a second execution does no harm.
        keep_result: Whether the journal keeps the function's return value.
    """

    task: str
    code: str
    registered: bool = False
    engine: str = LOCAL
    executor: str = "inline"
    shares_threads: bool = False
    owner: str | None = None
    expected: tuple[type[Exception], ...] = ()
    trace: str | None = None
    timeout: float | None = None
    max_attempts: int = 1
    on_failure: str = "stop"
    priority: int = 0
    alert: bool = True
    severity: str | None = None
    alert_after: int = 1
    slow_after: float | None = None
    stuck_after: float = 1800.0
    durable: bool = False
    idempotent: bool = False
    keep_result: bool = False


@dataclass(frozen=True, slots=True)
class Progress:
    """
    Progress that a task reported with `progress()`.

    Attributes:
        done: Amount done, in the task's own unit.
        total: Total amount; None if unknown.
        note: Short free text; None if not given.
        timestamp: When it was reported, in seconds since the Unix epoch.
    """

    done: float
    total: float | None
    note: str | None
    timestamp: float

    @property
    def text(self) -> str:
        """The progress for people, such as `3/10 thumbnails`."""
        given: tuple[object, ...] = (self.done, self.total)  # a report fails no task, so it may be anything
        amounts = [f"{each:g}" if isinstance(each, float | int) else str(each) for each in given if each is not None]
        return "/".join(amounts)[:LONGEST_NOTE] + ("" if self.note is None else f" {self.note}")


class RequestInfo:
    """
    The request that scheduled a run, shared by all runs of that request.

    Attributes:
        http_method: `GET`, `POST`, …; None for a WebSocket.
        http_route: Template of the route (`/orders/{id}`), never the raw path; None if it is unknown.
        request_id: The id that `Settings.request_id` found; None if there is none.
        context: The context variables at the moment the request reached the middleware; None after the request.
        span_context: The span current at that moment, set by `Tracing`; None without one.
        thread: Identity of the thread that runs the request's event loop.
        scope: The ASGI scope; None after the request.
        dependencies: References to the values that FastAPI's dependencies provided, from the response until they have
            ended. A key is a tuple that starts with the dependency and ends with its scope, which an old FastAPI
            leaves out. Empty without injected `BackgroundTasks`.
        notes: The keys that `note()` attached to the request.
        redact: `Settings.redact`.
        app: Identifies the app whose middleware serves the request.
    """

    http_method: str | None = None
    http_route: str | None = None
    request_id: str | None = None
    context: Context | None = None
    span_context: SpanContext | None = None
    thread: int = 0
    scope: Any = None
    dependencies: Mapping[tuple[object, ...], Callable[[], object]] = MappingProxyType({})
    notes: Mapping[str, Note] = MappingProxyType({})
    redact: Redact = staticmethod(default_redact)
    app: object = None

    @property
    def admits(self) -> bool:
        """Whether the response is still to start, so that a durable run can be on disk before it."""
        return False

    def withdraw(self, run: TaskRun) -> bool:
        """Drop a run that is waiting for its turn; False if it is not waiting here."""
        return False


class TaskRun:
    """
    One execution of a task after a response, from scheduling to its outcome.

    Attributes:
        task: The task's name, as in every label.
        info: What is known about the task.
        request: The request that scheduled the run.
        id: UUID version 7 (RFC 9562, section 5.7), hyphenated.
        origin: What caused the run: `request`, `run_on_error`, `journal` (recovered after its worker ended) or
            `dead_letter` (a replay).
        parent: The run in which user code called this one; None if the framework is the caller.
        target: The object that the framework calls: a `BackgroundTask` or another callable; None after the run.
        attempt: Number of the current or last attempt, from 1; 0 before the first.
        outcome: How the run ended; None while it is in flight.
        timestamp: When the run was scheduled, in seconds since the Unix epoch.
        scheduled_s, queued_s, started_s: Monotonic seconds of each step (`started_s` of the current attempt); None if
            the step has not been reached.
        queue_wait_s: Seconds from queued to the first attempt; None before it, and for a run with a parent.
        thread_s: Monotonic seconds at which a sync attempt began in its thread; None if unknown.
        thread: Identity of that thread while the call runs; otherwise None.
        coroutine: The coroutine of the current attempt; its frame shows which run a blocked loop's stack belongs to.
        backing_off: Whether the run is waiting for its next attempt.
        blocked_s: Seconds for which the run blocked the event loop, as far as this was noticed.
        own_notes: The keys that `note()` attached to this run alone.
        progress: The last progress that the task reported; None if it reported none.
        span_context: The span of the current attempt, set by `Tracing`; None without one.
    """

    origin = "request"
    attempt = 0
    outcome: Outcome | None = None
    queued_s: float | None = None
    started_s: float | None = None
    queue_wait_s: float | None = None
    thread_s: float | None = None
    thread: int | None = None
    coroutine: object = None
    backing_off = False
    blocked_s = 0.0
    own_notes: Mapping[str, Note] = MappingProxyType({})
    progress: Progress | None = None
    span_context: SpanContext | None = None

    def __init__(
        self, info: TaskInfo, request: RequestInfo, target: object = None, *, parent: TaskRun | None = None
    ) -> None:
        self.task, self.info, self.request = info.task, info, request
        self.target, self.parent = target, parent
        self.timestamp, self.scheduled_s = _clock.timestamp(), _clock.monotonic()
        self.id = new_run_id(self.timestamp)

    @property
    def at(self) -> datetime:
        """When the run was scheduled; aware, UTC."""
        return datetime.fromtimestamp(self.timestamp, UTC)

    @property
    def http_method(self) -> str | None:
        """Method of the request."""
        return self.request.http_method

    @property
    def http_route(self) -> str | None:
        """Route template of the request."""
        return self.request.http_route

    @property
    def request_id(self) -> str | None:
        """The request's id, if an earlier middleware left one."""
        return self.request.request_id

    @property
    def notes(self) -> dict[str, Note]:
        """The keys that `note()` attached to the run and to its request; redacted."""
        return {**self.request.notes, **self.own_notes}

    @property
    def engine(self) -> str:
        """Where the run executes: `local`, or the name of an engine."""
        return self.info.engine

    @property
    def state(self) -> str:
        """`scheduled`, `queued`, `running` or `backoff` while in flight, then the outcome."""
        if self.outcome is not None:
            return self.outcome
        if self.backing_off:
            return "backoff"
        if self.started_s is not None:
            return "running"
        return "scheduled" if self.queued_s is None else "queued"

    @property
    def thread_wait_s(self) -> float | None:
        """Seconds a sync attempt waited for a free thread; None if that was less than 5 ms or is unknown."""
        if self.thread_s is None or self.started_s is None:
            return None
        waited = self.thread_s - self.started_s
        return waited if waited >= _NOTABLE_THREAD_WAIT else None

    @property
    def trace_ids(self) -> dict[str, str | None]:
        """`trace_id` and `span_id` of the current attempt, or else of the request, in hex; None without a span."""
        span = self.span_context or self.request.span_context
        if span is None:
            return {"trace_id": None, "span_id": None}
        return {"trace_id": f"{span.trace_id:032x}", "span_id": f"{span.span_id:016x}"}

    @property
    def is_current(self) -> bool:
        """Whether this code runs in the run's own context (False when a coroutine is closed from another one)."""
        return running.get() is self

    def cancel_by_id(self) -> Literal["dropped", "cancelled", "impossible"]:
        """Cancel this run for `cancel_run`."""
        return "impossible"

    def __repr__(self) -> str:
        return f"<TaskRun {self.task} {self.id} {self.state}>"


#: The innermost run that this code is part of. A leaked context may hold a finished one: `current_run()` checks that.
running: ContextVar[TaskRun | None] = ContextVar("aftertask_run", default=None)

#: Every run of this process that has not ended, in the order of scheduling.
in_flight: dict[TaskRun, None] = {}


def new_run_id(timestamp: float, random_bytes: Callable[[int], bytes] = os.urandom) -> str:
    """A UUID version 7 for a moment in seconds since the Unix epoch (RFC 9562, section 5.7)."""
    value = int(timestamp * 1000) << 80 | int.from_bytes(random_bytes(10))
    value = value & ~(0xF << 76) | 0x7 << 76  # version
    value = value & ~(0x3 << 62) | 0x2 << 62  # variant
    return str(uuid.UUID(int=value))


def current_run() -> TaskRun | None:
    """The run that the calling code is part of, also in a sync task's thread; None outside a run."""
    run = running.get()
    return run if run is not None and run.outcome is None else None


def progress(done: float, total: float | None = None, note: str | None = None) -> None:
    """
    Report the progress of a task, from inside the task.

    The last report appears in `current_run().progress`, in the log and in the shutdown report. Outside a run, and in a
    worker process, the call does nothing.

    Args:
        done: Amount done, in any unit.
        total: Total amount in the same unit; None if unknown.
        note: Short free text, cut to 200 characters. It is not redacted, so it must not contain secrets.
    """
    run = current_run()
    if run is not None:
        text = None if note is None else str(note)[:LONGEST_NOTE]
        run.progress = Progress(done, total, text, _clock.timestamp())
