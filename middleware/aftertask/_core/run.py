"""One run as the core sees it: its state, and the event that each change of state emits."""

from __future__ import annotations

from contextvars import Context

from .. import _clock
from .._taskrun import in_flight
from ..events import (
    Cancelled,
    Dropped,
    Expired,
    Failed,
    Failure,
    Lost,
    Outcome,
    Rejected,
    RequestInfo,
    Retrying,
    Scheduled,
    Skipped,
    Started,
    Succeeded,
    TaskRun,
    TimedOut,
)
from ..policies import matches
from .background import Work
from .limits import SharedThreadSlot, Slot
from .resolver import ResolvedTask


class Run(TaskRun):
    """
    A run with what it needs to execute.

    Every method that changes the state returns the event to emit.

    Attributes:
        resolved: The task's policy in force.
        work: What the framework calls; None once the run is over.
        observed_only: Whether user code is the caller, so that no policy applies.
        background: The background that carries the run, by identity; None where user code is the caller.
        slots: What an attempt has to hold: a slot of a limit, a thread.
        variables: The endpoint's context variables for the task; None unless `Settings(context="endpoint")`.
        passed_timeout: Whether the policy's timeout ended the current attempt.
        abandoned: Whether a thread of an earlier attempt still runs.
    """

    __slots__ = ("abandoned", "background", "observed_only", "passed_timeout", "resolved", "slots", "variables", "work")

    def __init__(
        self, resolved: ResolvedTask, request: RequestInfo, work: Work, *, parent: TaskRun | None = None
    ) -> None:
        super().__init__(resolved.info, request, work.target, parent=parent)
        self.resolved = resolved
        self.work: Work | None = work
        self.observed_only = parent is not None
        self.background: object = None
        self.slots: tuple[Slot | SharedThreadSlot, ...] = ()
        self.variables: Context | None = None
        self.passed_timeout = self.abandoned = False
        in_flight[self] = None

    def observe_only(self) -> None:
        """User code calls the task itself, so no policy applies; a limit might wait for itself."""
        self.observed_only = True
        for slot in self.slots:
            slot.close()
        self.slots = ()

    def scheduled(self) -> Scheduled:
        """The run came into being."""
        return Scheduled(self, self.timestamp)

    def begin(self) -> Started:
        """An attempt begins."""
        self.attempt += 1
        self.backing_off = self.passed_timeout = False
        self.thread_s = self.thread = None
        self.started_s = _clock.monotonic()
        if self.attempt == 1 and not self.observed_only:
            queued_s = self.started_s if self.queued_s is None else self.queued_s
            self.queue_wait_s = max(0.0, self.started_s - queued_s)
        return Started(self, _clock.timestamp(), self.attempt, self.queue_wait_s if self.attempt == 1 else None)

    def delay_after(self, error: BaseException) -> float | None:
        """Seconds before the next attempt; None if there is none."""
        retry = self.resolved.retry
        if retry is None or self.observed_only or self.attempt >= retry.attempts or not retry.applies_to(error):
            return None
        if self.abandoned and not self.resolved.idempotent:
            return None  # the thread continues: a second attempt would do the work twice
        return retry.delay_s(self.attempt)

    def retrying(self, error: BaseException, failure: Failure, delay_s: float) -> Retrying:
        """The attempt raised, and another follows."""
        self.backing_off = True
        return Retrying(self, _clock.timestamp(), self.attempt, self._duration_s(), error, failure, delay_s)

    def succeed(self, result: object) -> Succeeded:
        """The attempt returned."""
        self._end("succeeded")
        return Succeeded(self, _clock.timestamp(), self.attempt, self._duration_s(), result)

    def fail(self, error: BaseException, failure: Failure) -> Failed:
        """The last attempt raised."""
        self._end("failed")
        expected = matches(error, self.info.expected)
        return Failed(self, _clock.timestamp(), self.attempt, self._duration_s(), error, failure, expected)

    def time_out(self, failure: Failure) -> TimedOut:
        """The timeout ended the last attempt."""
        self._end("timed_out")
        limit_s = self.info.timeout or 0.0
        return TimedOut(self, _clock.timestamp(), self.attempt, self._duration_s(), limit_s, failure)

    def cancel(self) -> Cancelled:
        """An attempt, or the back-off after it, was cancelled from outside."""
        in_backoff = self.backing_off
        self._end("cancelled")
        duration_s = None if in_backoff else self._duration_s()
        return Cancelled(self, _clock.timestamp(), self.attempt, duration_s, "cancelled")

    def skip(self, caused_by: TaskRun) -> Skipped:
        """An earlier run of the batch failed."""
        self._end("skipped")
        return Skipped(self, _clock.timestamp(), "sibling_failed", caused_by)

    def drop(self, reason: str, error_type: str | None = None) -> Dropped:
        """The request ended without starting the run."""
        self._end("dropped")
        return Dropped(self, _clock.timestamp(), reason, error_type)

    def lose(self) -> Lost:
        """The process ends before the run's turn."""
        self._end("lost")
        return Lost(self, _clock.timestamp(), "shutdown", _clock.monotonic() - self.scheduled_s)

    def reject(self, reason: str) -> Rejected:
        """The run was not accepted."""
        self._end("rejected")
        return Rejected(self, _clock.timestamp(), reason)

    def expire(self) -> Expired:
        """The deadline passed before the first attempt."""
        self._end("expired")
        return Expired(self, _clock.timestamp(), "deadline")

    def _duration_s(self) -> float:
        return _clock.monotonic() - (self.started_s or 0.0)

    def _end(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.backing_off = False
        in_flight.pop(self, None)
        for slot in self.slots:
            slot.close()
        self.slots = ()

    def forget(self) -> None:
        """Release what the run no longer needs once its ending has been emitted: signals may keep the run itself."""
        self.target = self.work = self.coroutine = self.background = self.variables = None
