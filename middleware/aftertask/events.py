"""What is told of a background task: its events, and who may be told. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import ClassVar, Protocol, TypeAlias, runtime_checkable

from ._failure import error_message, error_type, fingerprint, stack
from ._run import (
    Gate,
    Outcome,
    Place,
    Plan,
    Progress,
    Request,
    RetryPolicy,
    SpanContext,
    TaskRun,
    current_run,
    get_run,
    progress,
)

__all__ = [
    "EVENTS",
    "OUTCOMES",
    "Abandoned",
    "AbandonedEnded",
    "Admission",
    "Cancelled",
    "Dropped",
    "Ended",
    "Expired",
    "Failed",
    "Failure",
    "Gate",
    "HazardFound",
    "LoopBlocked",
    "LoopListener",
    "Lost",
    "Offloaded",
    "Outcome",
    "Place",
    "Plan",
    "Progress",
    "Rejected",
    "Request",
    "RetryPolicy",
    "Retrying",
    "Scheduled",
    "Signal",
    "Skipped",
    "Slow",
    "SpanContext",
    "Started",
    "Stuck",
    "Succeeded",
    "TaskEvent",
    "TaskRun",
    "TimedOut",
    "current_run",
    "get_run",
    "progress",
]


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
