"""One run as the core sees it: its state, and the event that each change of state emits."""

from __future__ import annotations

from contextvars import Context
from typing import Literal

import anyio

from .. import _clock
from .._taskrun import JOURNAL, in_flight
from .._text import error_message
from ..events import (
    Cancelled,
    Dropped,
    Expired,
    Failed,
    Failure,
    Lost,
    Offloaded,
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
        arguments: The arguments as they travel to an engine; None if the run executes here.
        abandoned: Whether a thread of an earlier attempt still runs.
        key: The key of the call; None if it has none.
        confirmed: Whether the keeper has the run, and its request has ended well.
        scope: What `cancel_run` cancels; None outside of an attempt and the wait for the next one.
        cancel_requested: Whether `cancel_run` was called.
    """

    background: object = None
    slots: tuple[Slot | SharedThreadSlot, ...] = ()
    variables: Context | None = None
    arguments: object = None
    passed_timeout = False
    abandoned = False
    confirmed = False
    key: str | None = None
    scope: anyio.CancelScope | None = None
    cancel_requested = False

    def __init__(
        self, resolved: ResolvedTask, request: RequestInfo, work: Work, *, parent: TaskRun | None = None
    ) -> None:
        super().__init__(resolved.info, request, work.target, parent=parent)
        self.resolved = resolved
        self.work: Work | None = work
        self.observed_only = parent is not None
        in_flight[self] = None

    @property
    def is_kept(self) -> bool:
        """Whether the keeper has to know the run before the response is sent."""
        return (self.info.durable or self.key is not None) and not self.observed_only

    @property
    def is_handed_over(self) -> bool:
        """Whether the run is for an engine: until that has it, it has not started."""
        return self.resolved.remote is not None and not self.observed_only

    def observe_only(self) -> None:
        """User code calls the task itself, so no policy applies; a limit might wait for itself."""
        self.observed_only = True
        for slot in self.slots:
            slot.close()
        self.slots = ()

    def scheduled(self) -> Scheduled:
        """The run came into being."""
        return Scheduled(self, self.timestamp)

    def depart(self) -> None:
        """The run goes on elsewhere, without having ended."""
        in_flight.pop(self, None)
        self.forget()

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
        if self.abandoned and not self.info.idempotent:
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

    def offload(self, engine: str, queue: str, duration_s: float) -> Offloaded:
        """An engine has taken the run."""
        self._end("offloaded")
        return Offloaded(self, _clock.timestamp(), engine, queue, duration_s)

    def cancel(self) -> Cancelled:
        """An attempt, or the back-off after it, was cancelled from outside."""
        in_backoff = self.backing_off
        self._end("cancelled")
        duration_s = None if in_backoff else self._duration_s()
        reason = "cancel_run" if self.cancel_requested else "cancelled"
        return Cancelled(self, _clock.timestamp(), self.attempt, duration_s, reason)

    def revoke(self) -> Cancelled:
        """An attempt was cancelled in another process."""
        self._end("cancelled")
        return Cancelled(self, _clock.timestamp(), self.attempt, None, "revoked")

    def skip(self, caused_by: TaskRun) -> Skipped:
        """An earlier run of the batch failed."""
        self._end("skipped")
        return Skipped(self, _clock.timestamp(), "sibling_failed", caused_by)

    def drop(self, reason: str, error_type: str | None = None) -> Dropped:
        """The request ended without starting the run."""
        self._end("dropped")
        return Dropped(self, _clock.timestamp(), reason, error_type)

    def lose(self, reason: str = "shutdown") -> Lost:
        """The process ends before the run's turn, or has died with it (`crash`)."""
        self._end("lost")
        return Lost(self, _clock.timestamp(), reason, _clock.monotonic() - self.scheduled_s)

    def hand_over(self) -> Offloaded:
        """The run cannot start here now, and the journal has it: another worker, or this one later, runs it."""
        self._end("offloaded")
        return Offloaded(self, _clock.timestamp(), JOURNAL, JOURNAL, 0.0)

    def cancel_by_id(self) -> Literal["dropped", "cancelled", "impossible"]:
        """Do what `cancel_run` asks for."""
        if self.state == "running" and self.info.executor != "inline":
            return "impossible"
        self.cancel_requested = True
        if self.scope is not None:
            self.scope.cancel()
        elif not self.backing_off and not self.request.withdraw(self):
            self.cancel_requested = False
            return "impossible"
        return "cancelled" if self.attempt else "dropped"

    def reject(self, reason: str, error: Exception) -> Rejected:
        """The run was not accepted."""
        self._end("rejected")
        return Rejected(self, _clock.timestamp(), reason, error_message(error, self.request.redact))

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
        self.target = self.work = self.coroutine = self.background = self.variables = self.arguments = self.scope = None
