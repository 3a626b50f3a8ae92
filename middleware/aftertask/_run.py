"""The plan of a task, the request that scheduled a run, and the run itself. Standard library only."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping
from contextvars import Context, ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, Protocol, SupportsIndex, TypeAlias

from . import _clock

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

# Our own generator: an app that seeds the global one must not get the same run ids in every worker.
_random = random.Random()
_bits = _random.getrandbits
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_random.seed)


# What the UUIDs of one millisecond share: the time, the version and the twelve bits after it. These come from the time
# and not from the generator, so that two threads get the same; the 62 bits that follow are each run's own.
_head = (0, "")
_VARIANT = 1 << 63


def _new_head(ms: int) -> str:
    global _head
    text = f"{ms:012x}"
    _head = (ms, f"{text[:8]}-{text[8:]}-7{hash((ms, os.getpid())) & 0xFFF:03x}-")
    return _head[1]


class SpanContext(Protocol):
    """
    The part of OpenTelemetry's span context that signals share.

    A tuple, as that is: trace id, span id, whether it is remote, flags. By index is a third of what a property takes.
    """

    def __getitem__(self, index: SupportsIndex, /) -> Any: ...

    @property
    def trace_id(self) -> int: ...
    @property
    def span_id(self) -> int: ...
    @property
    def trace_flags(self) -> int: ...


class RetryPolicy(Protocol):
    """When and how often a failed attempt is followed by another, as `Retry` says it."""

    @property
    def attempts(self) -> int: ...
    def wants(self, error: Exception) -> bool: ...
    def delay_s(self, attempt: int) -> float: ...


class Place(Protocol):
    """What an attempt needs before it may start: a slot of a limit, a thread."""

    def enter_now(self) -> bool: ...
    async def enter(self) -> None: ...
    def come_out(self) -> None: ...
    def give_back(self) -> None: ...
    def again(self) -> Place: ...


class Gate(Protocol):
    """Gives out places; None where that would be one too many."""

    def accept(self, priority: int, max_waiting: int | None = None) -> Place | None: ...


@dataclass(slots=True, eq=False)
class Plan:
    """
    How a task is run and observed: its policy put together, and what is the same for every run of it.

    Attributes:
        task: The task's name.
        registered: Whether `@task` or `Settings.policies` named it: then its metrics exist from the start.
        code: The function as `module.qualname`, for `code.function.name`.
        executor: `inline` on the event loop, `thread` or `process`.
        own_thread: Whether that thread is one of aftertask's, not of those that sync endpoints use.
        whole: A user's container or a subclass that calls its function itself: one run, what it calls are children.
        observe: False: as if the task were not there.
        owner: Who looks after it; None where nobody said.
        expected: Exception classes that make a run failed but not bad.
        trace: `child`, `link` or `none`; None as `Settings.trace` says.
        timeout: Seconds for each attempt; None without a limit.
        retry: When and how often a failed attempt is followed by another; None for never.
        gate: Where its runs wait for each other; None without a limit.
        max_waiting: How many the gate accepts beyond those that may be in at once; None for any number.
        priority: Smaller goes first.
        on_failure: `stop`, `continue` or `contain`.
        expires: Seconds from being scheduled within which the run must start; None for ever.
        run_on_error: Whether it runs also where the handler that added it raised.
        idempotent: Whether running it twice at once does no harm.
        on_error: Called with the run and the exception when it has failed for good; None where nobody asked.
        alert: False: no alert tells of this task.
        severity: Of its alerts; None where nobody said.
        alert_after: Bad runs before the first alert.
        slow_after: Seconds after which a running attempt is slow; None for never.
        stuck_after: Seconds after which a running attempt is stuck.
        governed: Whether a policy asks for more than to call the function and see what happens.
        plain: Whether it has no policy that changes what Starlette does.
    """

    task: str
    registered: bool
    code: str
    executor: str
    own_thread: bool
    whole: bool
    observe: bool
    owner: str | None
    expected: tuple[type[Exception], ...]
    trace: str | None
    timeout: float | None
    retry: RetryPolicy | None
    gate: Gate | None
    max_waiting: int | None
    priority: int
    on_failure: str
    expires: float | None
    run_on_error: bool
    idempotent: bool
    on_error: Callable[[TaskRun, Exception], object] | None
    alert: bool
    severity: str | None
    alert_after: int
    slow_after: float | None
    stuck_after: float
    governed: bool
    plain: bool


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a task says it is: `done` of `total`, None where it does not know, and a note of its own."""

    done: float
    total: float | None
    note: str | None
    timestamp: float

    @property
    def text(self) -> str:
        """`3/10 thumbnails`, for people."""
        of = "" if self.total is None else f"/{self.total:g}"
        return f"{self.done:g}{of}{'' if self.note is None else f' {self.note}'}"


class Request:
    """
    The request that scheduled a run: what its runs have in common.

    Attributes:
        http_method: `GET`, `POST`, …; None for a WebSocket.
        http_route: The route's template (`/orders/{id}`), never the path itself; None where no route matched.
        request_id: As `Settings.request_id` found it.
        context: The context variables as they were when the request reached the middleware; None once it is over.
        span_context: The span that was current then, for `Tracing` and `Logs`; None where there was none.
        stopped_by: The run whose failure or cancellation ended its batch; None while none has.
        prioritised: Whether one of its runs has a priority of its own.
    """

    # Most requests never get a run, so what is not known from the start is a default of the class.
    http_route: str | None = None
    request_id: str | None = None
    span_context: SpanContext | None = None
    span_parent: object = None
    http_method: str | None = None
    context: Context | None = None
    stopped_by: TaskRun | None = None
    prioritised: bool = False


#: To hand a call to a thread takes less than so many seconds; more is a wait.
_NOTABLE_WAIT = 0.005


class TaskRun:
    """
    One call of a task after a response, from the moment it is scheduled until it ends.

    Attributes:
        task: The task's name, as in every label (`TELEMETRY.md`).
        plan: How the task is run and observed: its policy put together.
        request: The request it came from.
        batch: Which batch runs it, for signals that keep something until the batch has ended; 0 where user code is the
            caller.
        origin: What brought it about: `request`, or `run_on_error`.
        parent: The run that ran this one, where user code and not the framework is the caller; else None.
        attempt: The call of the function that is under way or was the last, counted from 1; 0 before the first.
        outcome: How it ended; None while it has not.
        timestamp: When it was scheduled, in seconds since the Unix epoch.
        scheduled_s, queued_s, started_s: Monotonic seconds of its steps, the last of the current attempt; None while a
            step has not been reached.
        thread_s: When a sync task's attempt began in its thread; None for another, or before.
        blocked_s: Seconds for which it kept the event loop from answering, as far as that was seen.
        queue_wait_s: Seconds from being queued to the first attempt; None where the run never started, and where user
            code called it, so that it was in no queue.
        backing_off: Whether it waits for its next attempt.
        places: What it has taken, or will take, to run.
        abandoned: The sync attempt that went past its time limit and goes on; else None.
        progress: What the task itself said of how far it is, by `progress()`; None while it has not.
        span_context: The current attempt's span; None without tracing.
        bound: structlog's bound keys, copied from the sync endpoint that added the task; else None.
        context: The endpoint's whole context, with `Settings(context="endpoint")`; else None.
    """

    # Slots: what most runs never get is looked at twenty times in a run's life, and a default of the class takes longer
    # to find than a slot takes to set and to read (tests/bench/instructions.py).
    __slots__ = (
        "__weakref__",
        "_bits",
        "_id",
        "abandoned",
        "attempt",
        "backing_off",
        "batch",
        "blocked_s",
        "bound",
        "context",
        "origin",
        "outcome",
        "parent",
        "places",
        "plan",
        "progress",
        "queue_wait_s",
        "queued_s",
        "request",
        "scheduled_s",
        "span_context",
        "started_s",
        "target",
        "task",
        "thread_s",
        "timestamp",
    )

    def __init__(self, plan: Plan, request: Request, target: object) -> None:
        self.task = plan.task
        self.plan = plan
        self.request = request
        self.target = target
        self.timestamp = _clock.timestamp()
        self.scheduled_s = _clock.monotonic()
        self._bits = _bits(62)
        self._id: str | None = None
        self.attempt = 0
        self.batch = 0
        self.origin = "request"
        self.outcome: Outcome | None = None
        self.parent: TaskRun | None = None
        self.queued_s: float | None = None
        self.queue_wait_s: float | None = None
        self.started_s: float | None = None
        self.thread_s: float | None = None
        self.blocked_s = 0.0
        self.backing_off = False
        self.places: tuple[Place, ...] = ()
        self.abandoned: object = None
        self.progress: Progress | None = None
        self.span_context: SpanContext | None = None
        self.bound: Mapping[ContextVar[Any], Any] | None = None
        self.context: Context | None = None

    @property
    def id(self) -> str:
        """The run's id: a UUID version 7 (RFC 9562, 5.7), hyphenated."""
        found = self._id
        if found is None:
            # Made when first asked for, maybe by two threads at once: from the same parts, so it is the same.
            ms = int(self.timestamp * 1000)
            known, head = _head
            if known != ms:
                head = _new_head(ms)
            # By bytes and not by a format, which takes three times as long: the hyphen is before the last six.
            found = self._id = head + (self._bits | _VARIANT).to_bytes(8).hex("-", 6)
        return found

    @property
    def at(self) -> datetime:
        """When it was scheduled; aware, UTC."""
        return datetime.fromtimestamp(self.timestamp, UTC)

    @property
    def http_method(self) -> str | None:
        """The request's method."""
        return self.request.http_method

    @property
    def http_route(self) -> str | None:
        """The request's route template."""
        return self.request.http_route

    @property
    def request_id(self) -> str | None:
        """The request's id, where an earlier middleware left one."""
        return self.request.request_id

    @property
    def engine(self) -> str:
        """Where it runs: `local`, or an engine's name."""
        return "local"

    @property
    def max_attempts(self) -> int:
        """How often it may be called in all."""
        retry = self.plan.retry
        return 1 if retry is None else retry.attempts

    @property
    def priority(self) -> int:
        """Smaller is earlier."""
        return self.plan.priority

    @property
    def state(self) -> str:
        """`scheduled`, `queued`, `running` or `backoff`, and at last its outcome."""
        if self.outcome is not None:
            return self.outcome
        if self.backing_off:
            return "backoff"
        return "running" if self.started_s is not None else "scheduled" if self.queued_s is None else "queued"

    @property
    def thread_wait_s(self) -> float | None:
        """Seconds for which a sync task waited for a thread that sync endpoints share; None for next to none."""
        began, started = self.thread_s, self.started_s
        return None if began is None or started is None or began - started < _NOTABLE_WAIT else began - started

    def __repr__(self) -> str:
        return f"<TaskRun {self.task} {self.id} {self.outcome or 'in flight'}>"


_current: ContextVar[TaskRun | None] = ContextVar("aftertask_run", default=None)
_live: dict[TaskRun, None] = {}


def current_run() -> TaskRun | None:
    """The run that this code is part of, in a sync task's thread too; None outside of any."""
    run = _current.get()
    return run if run is not None and run.outcome is None else None


def progress(done: float, total: float | None = None, note: str | None = None) -> None:
    """
    Say, from inside a task (a sync one too), how far it is: shown in `current_run().progress`, in the report at
    shutdown and in the log.

    Outside of a run, and in a worker process, it does nothing.

    Args:
        done: How much is done, in whatever the task counts.
        total: Out of how much; None where that is not known.
        note: A few words of the task's own, shown as they are (cut to 200 characters): no secrets.
    """
    run = current_run()
    if run is not None:
        text = None if note is None else str(note)[:200]
        run.progress = Progress(done, total, text, _clock.timestamp())


def get_run(id: str) -> TaskRun | None:
    """
    The run with this id, while it is in flight in this process; None where there is none.

    Looks through all runs in flight: for a page or a handler, not for the path of a task.
    """
    return next((run for run in list(_live) if run.id == id), None)
