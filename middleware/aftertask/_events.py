"""The events of a run's life; public through `aftertask.events`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import ClassVar, TypeAlias

from ._taskrun import Outcome, TaskRun
from ._text import error_message, error_type, fingerprint, stack


class Failure:
    """
    An exception as text that may leave the process: redacted, without frame locals, each part made once.

    Attributes:
        error: The exception itself. Its own text has *not* been redacted.
        hint: The likely cause in one sentence; None if unknown.
    """

    def __init__(self, error: BaseException, redact: Callable[[str], str]) -> None:
        self.error = error
        self.hint: str | None = None
        self._redact = redact

    @cached_property
    def type(self) -> str:
        """Class of the exception: the bare name for builtins, else `module.Qualname`."""
        return error_type(self.error)

    @cached_property
    def message(self) -> str:
        """`str(error)`, redacted, at most 1 000 characters."""
        return error_message(self.error, self._redact)

    @cached_property
    def stack(self) -> str:
        """The traceback as Python prints it, from the task's first frame on; redacted and shortened."""
        return stack(self.error, self._redact)

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits, the same for the same class raised in the same function."""
        return fingerprint(self.error)


@dataclass(slots=True)
class _Event:
    """
    What every event has. Treat events as immutable: signals share them.

    Attributes:
        run: The run that the event is about.
        timestamp: When it happened, in seconds since the Unix epoch.
    """

    run: TaskRun
    timestamp: float

    @property
    def at(self) -> datetime:
        """When it happened; aware, UTC."""
        return datetime.fromtimestamp(self.timestamp, UTC)


@dataclass(slots=True)
class _Ending(_Event):
    outcome: ClassVar[Outcome]

    @property
    def bad(self) -> bool:
        """Whether the run counts against the service level (`docs/telemetry.md`, Words)."""
        return True


@dataclass(slots=True)
class _Harmless(_Ending):
    """An end that is not the task's fault: a success, a shutdown, its owner's deadline, a hand-over to an engine."""

    @property
    def bad(self) -> bool:
        """Always False."""
        return False


@dataclass(slots=True)
class Scheduled(_Event):
    """A run was scheduled."""


@dataclass(slots=True)
class Started(_Event):
    """
    An attempt begins.

    Attributes:
        attempt: Number of the attempt, from 1.
        queue_wait_s: Seconds from the response to the first attempt; None for later attempts and for children.
    """

    attempt: int
    queue_wait_s: float | None


@dataclass(slots=True)
class Retrying(_Event):
    """An attempt raised; the next one starts after `delay_s` seconds."""

    attempt: int
    duration_s: float
    error: BaseException
    failure: Failure
    delay_s: float


@dataclass(slots=True)
class Succeeded(_Harmless):
    """
    The function returned.

    Attributes:
        attempt: Number of the last attempt.
        duration_s: Seconds the last attempt took.
        result: What the function returned; None if the executor does not keep it.
    """

    attempt: int
    duration_s: float
    result: object
    outcome = "succeeded"


@dataclass(slots=True)
class Failed(_Ending):
    """
    The last attempt raised, and no other follows.

    Attributes:
        attempt: Number of the last attempt.
        duration_s: Seconds the last attempt took.
        error: What the task raised: an `Exception`, or its own `CancelledError` or `SystemExit`.
        failure: The same as redacted text.
        expected: Whether the task's policy lists the exception's class as expected.
    """

    attempt: int
    duration_s: float
    error: BaseException
    failure: Failure
    expected: bool
    outcome = "failed"

    @property
    def bad(self) -> bool:
        """Whether the exception was unexpected."""
        return not self.expected


@dataclass(slots=True)
class TimedOut(_Ending):
    """The policy's timeout of `limit_s` seconds ended the last attempt."""

    attempt: int
    duration_s: float
    limit_s: float
    failure: Failure
    outcome = "timed_out"


@dataclass(slots=True)
class Cancelled(_Harmless):
    """
    The run had started and was cancelled from outside.

    Attributes:
        attempt: Number of the attempt that was cancelled, or that preceded the cancelled back-off.
        duration_s: Seconds the cancelled attempt took; None if the run was in back-off.
        reason: `cancelled`, `revoked`, or `cancel_run` if that function was called.
    """

    attempt: int
    duration_s: float | None
    reason: str
    outcome = "cancelled"


@dataclass(slots=True)
class Skipped(_Ending):
    """An earlier run of the batch (`caused_by`) failed before this run's turn came."""

    reason: str
    caused_by: TaskRun | None
    outcome = "skipped"


@dataclass(slots=True)
class Dropped(_Ending):
    """
    The run's request ended without starting it.

    Attributes:
        reason: `http_exception`, `validation`, `handler_error`, `own_background`, `client_gone`, `request_cancelled`,
            `request_failed`, `added_too_late`, `websocket`, `cancel_run`, `revoked` or `other` (`docs/telemetry.md`).
        error_type: Class of the exception that ended the request; None if there was none.
    """

    reason: str
    error_type: str | None = None
    outcome = "dropped"

    @property
    def bad(self) -> bool:
        """False for reasons that a client can cause at will, and for runs that were cancelled or revoked on purpose."""
        return self.reason not in ("http_exception", "validation", "revoked", "cancel_run")


@dataclass(slots=True)
class Rejected(_Ending):
    """
    The run was not accepted.

    Attributes:
        reason: `queue_full`, `not_serializable`, `duplicate_key` or `no_journal`.
        hint: Why, and what to do; redacted. None if unknown.
    """

    reason: str
    hint: str | None = None
    outcome = "rejected"


@dataclass(slots=True)
class Expired(_Harmless):
    """The run's deadline passed before it could start."""

    reason: str
    outcome = "expired"


@dataclass(slots=True)
class Lost(_Ending):
    """
    The run was accepted and will never run or finish.

    Attributes:
        reason: `shutdown` if the process ends; `crash` if it died, or if no worker can run what it left behind.
        dead: Why a durable run is now a dead letter, for people to read; None if it is not one.
    """

    reason: str
    age_s: float
    dead: str | None = None
    outcome = "lost"


@dataclass(slots=True)
class Offloaded(_Harmless):
    """
    The run was handed to another engine, whose worker emits the rest.

    Attributes:
        engine: The engine's name.
        queue: The queue that the run went to.
        duration_s: Seconds the hand-over took.
    """

    engine: str
    queue: str
    duration_s: float
    outcome = "offloaded"


@dataclass(slots=True)
class OffloadFailed(_Event):
    """
    An engine did not take the run.

    Attributes:
        engine: The engine's name.
        duration_s: Seconds until the hand-over had failed.
        failure: The cause as redacted text.
        falls_back: Whether the run executes in this process; if not, its attempt fails.
    """

    engine: str
    duration_s: float
    failure: Failure
    falls_back: bool


@dataclass(slots=True)
class _RunsLong(_Event):
    """
    An attempt has been running for too long; emitted once per attempt.

    Attributes:
        running_s: Seconds for which it had been running when this was noticed.
        limit_s: The limit in seconds.
        stack: Where the task was, redacted; None if that cannot be read.
    """

    running_s: float
    limit_s: float
    stack: str | None


@dataclass(slots=True)
class Slow(_RunsLong):
    """An attempt has been running longer than `slow_after`; emitted from a watching thread."""


@dataclass(slots=True)
class Stuck(_RunsLong):
    """An attempt has been running longer than `stuck_after`; emitted from a watching thread."""


@dataclass(slots=True)
class Abandoned(_RunsLong):
    """A sync attempt passed its timeout; its thread cannot be stopped and continues."""


@dataclass(slots=True)
class AbandonedEnded(_Event):
    """The thread of an abandoned attempt has ended, after `running_s` seconds."""

    running_s: float
    limit_s: float


@dataclass(slots=True)
class HazardFound(_Event):
    """
    A known mistake that makes background tasks fail was found; may be emitted from a watching thread.

    Attributes:
        kind: `closed_upload`, `blocked_loop`, …; all are in `docs/hazards.md`.
        argument: Name of the argument at fault; None if no argument is.
        advice: What is wrong and what to do, in one sentence.
        stack: Where the task was, redacted; None if a stack would say nothing.
    """

    kind: str
    argument: str | None
    advice: str
    stack: str | None = None


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
    | OffloadFailed
    | Slow
    | Stuck
    | Abandoned
    | AbandonedEnded
    | HazardFound
)

#: The events that end a run.
Ended: TypeAlias = Succeeded | Failed | TimedOut | Cancelled | Skipped | Dropped | Rejected | Expired | Lost | Offloaded

EVENTS: tuple[type[TaskEvent], ...] = TaskEvent.__args__


@dataclass(slots=True)
class LoopBlocked:
    """
    The event loop did not respond for longer than `Settings.block_threshold`.

    Attributes:
        run: The run that blocked it; None if no background task is to blame.
        timestamp: When this report was made, in seconds since the Unix epoch.
        blocked_s: Seconds without a response; if `over` is False, the seconds so far.
        where: The app's innermost line: `file:line in function`.
        stack: The stack of the loop's thread from the task's first frame on; redacted.
        suppressed: Number of reports about the same task that were left out since the last one.
        over: Whether the loop responds again.
    """

    run: TaskRun | None
    timestamp: float
    blocked_s: float
    where: str
    stack: str
    suppressed: int
    over: bool
