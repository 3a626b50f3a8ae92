"""What is told of a background task: the run, its events, and who may be told. Standard library only."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from contextvars import Context, ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

from . import _clock
from ._failure import error_message, error_type, fingerprint, stack

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
    """The part of OpenTelemetry's span context that signals share."""

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
        first_s: When the first attempt started, where there was another; else None.
        backing_off: Whether it waits for its next attempt.
        places: What it has taken, or will take, to run.
        abandoned: The sync attempt that went past its time limit and goes on; else None.
        progress: What the task itself said of how far it is, by `progress()`; None while it has not.
        span_context: The current attempt's span; None without tracing.
        bound: structlog's bound keys, copied from the sync endpoint that added the task; else None.
        context: The endpoint's whole context, with `Settings(context="endpoint")`; else None.
    """

    # What a run gets later in its life is a default of the class: half the cost of setting it each time (make bench).
    attempt: int = 0
    origin: str = "request"
    first_s: float | None = None
    thread_s: float | None = None
    blocked_s: float = 0.0
    backing_off: bool = False
    places: tuple[Place, ...] = ()
    abandoned: object = None
    progress: Progress | None = None
    parent: TaskRun | None = None
    batch: int = 0
    queued_s: float | None = None
    started_s: float | None = None
    outcome: Outcome | None = None
    span_context: SpanContext | None = None
    bound: Mapping[ContextVar[Any], Any] | None = None
    context: Context | None = None
    _id: str | None = None

    def __init__(self, plan: Plan, request: Request, target: object) -> None:
        self.task = plan.task
        self.plan = plan
        self.request = request
        self.target = target
        self.timestamp = _clock.timestamp()
        self.scheduled_s = _clock.monotonic()
        self._bits = _bits(62)

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


class Failure:
    """
    What an exception says, as text that may leave the process: redacted, without frame locals, each part made once.

    Attributes:
        error: The exception itself. Its text has *not* been redacted.
        hint: What it comes from, in a sentence, where that is known; else None.
    """

    hint: str | None = None

    def __init__(self, error: BaseException, redact: Callable[[str], str]) -> None:
        self.error = error
        self._redact = redact

    @cached_property
    def type(self) -> str:
        """Bare name for builtins, else `module.Qualname`."""
        return error_type(self.error)

    @cached_property
    def message(self) -> str:
        """`str(error)`, redacted and shortened."""
        return error_message(self.error, self._redact)

    @cached_property
    def stack(self) -> str:
        """The traceback as Python prints it, redacted and shortened."""
        return stack(self.error, self._redact)

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits, the same for the same class raised from the same function."""
        return fingerprint(self.error)


@dataclass(slots=True)
class _Told:
    """
    What every event carries. Immutable by contract: a frozen dataclass costs four times as much to build.

    Attributes:
        run: The run it is about.
        timestamp: When, in seconds since the Unix epoch.
    """

    run: TaskRun
    timestamp: float

    @property
    def at(self) -> datetime:
        """When; aware, UTC."""
        return datetime.fromtimestamp(self.timestamp, UTC)


@dataclass(slots=True)
class _Ended(_Told):
    outcome: ClassVar[Outcome]

    @property
    def bad(self) -> bool:
        """Whether service levels count it as bad (`TELEMETRY.md`, Words)."""
        return True


@dataclass(slots=True)
class Scheduled(_Told):
    """A task will be called after a response."""


@dataclass(slots=True)
class Started(_Told):
    """
    An attempt begins.

    Attributes:
        attempt: Which call of the function, counted from 1.
        queue_wait_s: Seconds from the end of the response to the first attempt; None where the run was never queued
            (a child, or a later attempt).
    """

    attempt: int
    queue_wait_s: float | None


@dataclass(slots=True)
class Retrying(_Told):
    """An attempt raised, and the run will be tried again after `delay_s` seconds."""

    attempt: int
    duration_s: float
    error: Exception
    failure: Failure
    delay_s: float


@dataclass(slots=True)
class Succeeded(_Ended):
    """The last attempt returned, after `duration_s` seconds."""

    attempt: int
    duration_s: float
    outcome = "succeeded"

    @property
    def bad(self) -> bool:
        """Never."""
        return False


@dataclass(slots=True)
class Failed(_Ended):
    """
    The last attempt raised, and the run will not be tried again.

    Attributes:
        attempt: Which call failed, counted from 1.
        duration_s: Seconds in that call, by the monotonic clock.
        error: What the task raised.
        failure: The same as text, redacted.
        expected: Whether the task's policy names the error's class as expected: failed, not bad.
    """

    attempt: int
    duration_s: float
    error: Exception
    failure: Failure
    expected: bool
    outcome = "failed"

    @property
    def bad(self) -> bool:
        """Unless it was expected."""
        return not self.expected


@dataclass(slots=True)
class TimedOut(_Ended):
    """Our deadline of `limit_s` seconds ended the last attempt."""

    attempt: int
    duration_s: float
    limit_s: float
    failure: Failure
    outcome = "timed_out"


@dataclass(slots=True)
class Cancelled(_Ended):
    """
    The run was started and cut off, or its batch was cancelled before it could start.

    Attributes:
        attempt: Which call was cut off; 0 where none had begun.
        duration_s: Seconds in that call; None where none had begun.
        reason: `cancelled` (the call was cut off) or `batch_cancelled` (an earlier run of the batch was).
        caused_by: The earlier run; None where it was this one.
    """

    attempt: int
    duration_s: float | None
    reason: str
    caused_by: TaskRun | None
    outcome = "cancelled"

    @property
    def bad(self) -> bool:
        """Never: a shutdown is no failure."""
        return False


@dataclass(slots=True)
class Skipped(_Ended):
    """A sibling failed before this run's turn came."""

    reason: str
    caused_by: TaskRun | None
    outcome = "skipped"


@dataclass(slots=True)
class Dropped(_Ended):
    """
    The request ended without running it.

    Attributes:
        reason: `http_exception`, `validation`, `handler_error`, `own_background`, `client_gone` or `other`.
    """

    reason: str
    outcome = "dropped"

    @property
    def bad(self) -> bool:
        """Unless a client can cause it at will."""
        return self.reason not in ("http_exception", "validation")


@dataclass(slots=True)
class Rejected(_Ended):
    """The run was not accepted."""

    reason: str
    outcome = "rejected"


@dataclass(slots=True)
class Expired(_Ended):
    """The run's deadline passed before it could start."""

    reason: str
    outcome = "expired"

    @property
    def bad(self) -> bool:
        """Never: its owner asked for it."""
        return False


@dataclass(slots=True)
class Lost(_Ended):
    """The run was accepted and will never run or finish."""

    reason: str
    age_s: float
    outcome = "lost"


@dataclass(slots=True)
class Offloaded(_Ended):
    """The run was handed to another engine, which tells the rest."""

    engine: str
    outcome = "offloaded"

    @property
    def bad(self) -> bool:
        """Never: the engine tells how it ends."""
        return False


@dataclass(slots=True)
class Slow(_Told):
    """
    The attempt has been running for longer than its policy's `slow_after`. Told from a thread that watches, once.

    Attributes:
        running_s: How long, in seconds, when that was noticed.
        limit_s: The limit.
        stack: Where it was then, redacted; None where that cannot be read (an async task on trio).
    """

    running_s: float
    limit_s: float
    stack: str | None


@dataclass(slots=True)
class Stuck(_Told):
    """The attempt has been running for longer than its policy's `stuck_after`; the rest as for `Slow`."""

    running_s: float
    limit_s: float
    stack: str | None


@dataclass(slots=True)
class Abandoned(_Told):
    """A sync task went past its time limit; its thread cannot be killed and goes on."""

    running_s: float
    limit_s: float
    stack: str | None


@dataclass(slots=True)
class AbandonedEnded(_Told):
    """The thread of an abandoned run has ended."""

    running_s: float
    limit_s: float


@dataclass(slots=True)
class HazardFound(_Told):
    """
    Something about this task makes background tasks fail. May be told from a thread that watches the event loop.

    Attributes:
        kind: `closed_upload`, `blocked_loop`, …; `docs/hazards.md` has them all.
        argument: The argument's name; None where it is not about one.
        advice: What is wrong and what to do, in a sentence.
        stack: Where the task was, as Python prints a stack, redacted; None where that says nothing.
    """

    kind: str
    argument: str | None
    advice: str
    stack: str | None = None


@dataclass(slots=True)
class LoopBlocked:
    """
    The event loop did not answer for longer than `Settings.block_threshold`. No run's event: often none is to blame.

    Attributes:
        run: The run that was on it for most of that time; None where it was no background task.
        timestamp: When it was told, in seconds since the Unix epoch.
        blocked_s: Seconds without an answer, so far if `over` is False.
        where: The line of the app that it was at: `file:line in function`.
        stack: As Python prints a stack, from the task's own first frame on; redacted.
        suppressed: How many more of this task were left out since the last one that was told.
        over: Whether the loop answers again.
    """

    run: TaskRun | None
    timestamp: float
    blocked_s: float
    where: str
    stack: str
    suppressed: int
    over: bool


TaskEvent: TypeAlias = (
    Scheduled
    | Started
    | Retrying
    | Succeeded
    | Failed
    | TimedOut
    | Cancelled
    | Skipped
    | Dropped
    | Rejected
    | Expired
    | Lost
    | Offloaded
    | Slow
    | Stuck
    | Abandoned
    | AbandonedEnded
    | HazardFound
)

#: The events that end a run.
Ended: TypeAlias = Succeeded | Failed | TimedOut | Cancelled | Skipped | Dropped | Rejected | Expired | Lost | Offloaded

EVENTS: tuple[type[TaskEvent], ...] = TaskEvent.__args__
OUTCOMES: tuple[Outcome, ...] = tuple(kind.outcome for kind in Ended.__args__)


@runtime_checkable
class Signal(Protocol):
    """
    Is told of every event, synchronously: does no I/O, and cannot break a run. A plain function will do.

    A signal that wants but some events, or each by a function of its own, has beside this an attribute `handlers`, a
    mapping of event classes to functions. An event that no signal wants is not built. More are optional:

    - `open()` and `close()` are called when the app starts and when it has stopped.
    - `serving()` is called on the event loop when a batch starts.
    - `loop` is a `LoopListener`, told how the event loop does; one that several signals share is told once.
    - `batch_ended(request, batch)` is called in the context of a batch's runs when all of them are over: until then
      what a signal set in the context may stay.
    - `admit(runs)` is an `Admission`.
    """

    def __call__(self, event: TaskEvent, /) -> None: ...


class LoopListener(Protocol):
    """Is told how the event loop does, from threads of its own; does no I/O but to write a log line."""

    def lag(self, seconds: float, /) -> None:
        """How late the loop was, some times a second."""
        ...

    def blocked_for(self, run: TaskRun | None, seconds: float, /) -> None:
        """So many more seconds blocked, by this run; None: by no background task."""
        ...

    def blocked(self, report: LoopBlocked, /) -> None:
        """The loop was blocked, at most once a task and minute."""
        ...


@runtime_checkable
class Admission(Protocol):
    """Is awaited when a response starts, with the runs it carries; an exception fails the request."""

    async def __call__(self, runs: Sequence[TaskRun], /) -> None: ...


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
