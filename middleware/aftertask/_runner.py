"""The life of a run: scheduled, running, ended; and who is told of each step."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from types import AsyncGeneratorType, CoroutineType, GeneratorType
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.responses import Response

from . import _clock, _intercept
from ._context import applied
from ._dispatch import Dispatch
from ._failure import error_type
from ._frames import calls_run
from ._governed import Governor
from ._log import emit
from ._plans import Plans
from ._run import _current, _live
from ._shutdown import Supervisor, reporter
from ._timer import on_trio
from ._watch import Watch
from .errors import AftertaskError, NotSerializable, QueueFull
from .events import (
    Abandoned,
    AbandonedEnded,
    Admission,
    Cancelled,
    Dropped,
    Expired,
    Failed,
    Failure,
    HazardFound,
    Lost,
    Rejected,
    Request,
    Retrying,
    Scheduled,
    Signal,
    Skipped,
    Started,
    Succeeded,
    TaskRun,
    TimedOut,
)
from .executors.process import check as check_serializable
from .executors.thread import SharedThreads
from .policies import code_name

if TYPE_CHECKING:
    from .settings import Settings

T = TypeVar("T")

Outer = tuple[TaskRun | None, Callable[[], None] | None]

_DOES_NOTHING = {
    GeneratorType: ("generator", "a generator function does nothing when it is called: collect it, or loop over it"),
    AsyncGeneratorType: ("generator", "an async generator does nothing when it is called: loop over it in a coroutine"),
    CoroutineType: ("unawaited_coroutine", "it returned a coroutine that nobody awaits: make it `async def`"),
}


class Engine:
    """
    One app's runs: what is known of its tasks, who is told, and each step of a run.

    Args:
        settings: The app's settings.
        signals: Who is told, in order.
    """

    def __init__(self, settings: Settings, signals: Iterable[Signal]) -> None:
        self.settings = settings
        self.dispatch = Dispatch(signals, self.broken)
        self.gives_context = settings.context == "endpoint"
        self.stopping = False
        self.supervisor: Supervisor | None = None
        self.spanned = next((s.feeds for s in self.dispatch.signals if hasattr(s, "feeds")), None)
        self.serving: list[Callable[[], None]] = self._offered("serving")
        self.batch_ended: list[Callable[[Request, int], None]] = self._offered("batch_ended")
        self.watch = Watch(self.dispatch, self._is_mine, settings.redact, self.broken, self._forget_plans)
        self.serving.append(self._see_loop)
        self.admissions: list[Admission] = self._offered("admit")
        self.governor = Governor(self, settings.thread_limit)
        self._watch: list[Callable[..., None]] = self._offered("watch")
        self.plans = Plans(settings, self.governor.threads, self.watch.know, self._watch, self._offered("know_timeout"))
        self.plan = self.plans.of
        self._scheduled = self.dispatch.to(Scheduled)
        self._started = self.dispatch.to(Started)
        self._succeeded = self.dispatch.to(Succeeded)
        self._failed = self.dispatch.to(Failed)
        self._cancelled = self.dispatch.to(Cancelled)
        self._dropped = self.dispatch.to(Dropped)
        self._skipped = self.dispatch.to(Skipped)
        self._lost = self.dispatch.to(Lost)
        self._retrying = self.dispatch.to(Retrying)
        self._timed_out = self.dispatch.to(TimedOut)
        self._expired = self.dispatch.to(Expired)
        self._rejected = self.dispatch.to(Rejected)
        self._abandoned = self.dispatch.to(Abandoned)
        self._abandoned_ended = self.dispatch.to(AbandonedEnded)
        self._hazard = self.dispatch.to(HazardFound)

    def broken(self, component: str, on: str, error: Exception) -> None:
        """Tell that a part of ours raised, and count it; nothing that we do may break a task."""
        failure = Failure(error, self.settings.redact)
        emit(
            "error",
            "signal.failed",
            signal=component,
            on=on,
            error_type=failure.type,
            error_message=failure.message,
            exception=failure.stack,
        )
        for signal in self.dispatch.signals:
            count = getattr(signal, "count_self_error", None)
            if count is not None:
                count(component)

    def open(self) -> None:
        """The app starts; on its event loop."""
        self.stopping = False
        self.plans.tell()
        self._see_loop()
        reporter().open(self)
        self.watch.open()
        self._each_signal("open")

    def close(self) -> None:
        """The app has stopped serving."""
        self.stopping = True
        reporter().close(self)
        self.watch.close()
        self._each_signal("close")

    def _see_loop(self) -> None:
        """Once a start, or where nobody runs the lifespan at the first batch: the loop's threads, and who is on it."""
        self.serving = [each for each in self.serving if each != self._see_loop]
        self._shared_threads = SharedThreads()
        for watch in self._watch:
            watch(self._shared_threads, threads=True)
        if not on_trio():
            self.watch.loop = asyncio.get_running_loop()

    def _is_mine(self, run: TaskRun) -> bool:
        return getattr(run.request, "_engine", None) is self

    def _forget_plans(self) -> None:
        self.plans.forget()

    def _offered(self, name: str) -> list[Any]:
        found = (getattr(signal, name, None) for signal in self.dispatch.signals)
        return [method for method in found if callable(method)]

    def _each_signal(self, name: str) -> None:
        for method in self._offered(name):
            try:
                method()
            except Exception as error:
                self.broken(code_name(method), name, error)

    def schedule(self, request: Request, target: Any, parent: TaskRun | None = None) -> TaskRun | None:
        """
        A run comes into being; None where the task is not to be observed.

        Raises:
            QueueFull: Its limit accepts no more; it has been told `rejected`.
            NotSerializable: It cannot be sent to a process; the same.
        """
        plan = self.plan(target, inside=parent is not None)
        if not plan.observe:
            return None
        run = TaskRun(plan, request, target)
        if parent is not None:
            run.parent = parent
        _live[run] = None
        if self._scheduled is not None:
            self._scheduled(Scheduled(run, run.timestamp))
        if not plan.plain and parent is None:
            self._accept(run)
        return run

    def _accept(self, run: TaskRun) -> None:
        plan = run.plan
        if plan.priority:
            run.request.prioritised = True
        if plan.executor == "process":
            try:
                check_serializable(run.target, run.task)
            except NotSerializable:
                self._reject(run, "not_serializable")
                raise
        if plan.gate is not None:
            place = plan.gate.accept(plan.priority, plan.max_waiting)
            if place is None:
                self._reject(run, "queue_full")
                raise QueueFull(f"{run.task}: its limit accepts no more runs for now, {plan.max_waiting} may wait")
            run.places = (place,)

    @calls_run
    async def run(self, run: TaskRun, call: Callable[[], Awaitable[Any]] | None = None) -> Any:
        """
        Call a scheduled run's function and tell what becomes of it; whatever it raises comes out unchanged.

        Args:
            run: The run; its target is called as the framework would.
            call: What to call in its place.
        """
        outer = self.begin(run)
        try:
            result = await (_intercept.call(run.target, self.spanned) if call is None else call())
        except Exception as error:
            self.fail(run, error)
            raise
        except BaseException:
            self.cut_off(run)
            raise
        else:
            self.succeed(run, result)
            return result
        finally:
            self.leave(run, outer)

    @calls_run
    def run_sync(self, run: TaskRun, call: Callable[[], T]) -> T:
        """The same for a function that user code calls without awaiting it, maybe in a thread."""
        outer = self.begin(run)
        try:
            result = call()
        except Exception as error:
            self.fail(run, error)
            raise
        except BaseException:
            self.cut_off(run)
            raise
        else:
            self.succeed(run, result)
            return result
        finally:
            self.leave(run, outer)

    def begin(self, run: TaskRun) -> Outer:
        """An attempt starts; returns what `leave` puts back."""
        outer = _current.get()
        _current.set(run)
        run.attempt += 1
        started = run.started_s = _clock.monotonic()
        wait = None
        if run.attempt == 1 and run.parent is None:
            queued = run.queued_s
            wait = run.queue_wait_s = 0.0 if queued is None or queued > started else started - queued
        variables = run.context or run.bound
        restore = None if variables is None else applied(variables)
        if self._started is not None:
            self._started(Started(run, _clock.timestamp(), run.attempt, wait))
        return outer, restore

    def succeed(self, run: TaskRun, result: object) -> None:
        """The attempt returned."""
        if result is not None:
            self._look_at(run, result)
        run.outcome = "succeeded"
        if self._succeeded is not None:
            lasted = _clock.monotonic() - (run.started_s or 0.0)
            self._succeeded(Succeeded(run, _clock.timestamp(), run.attempt, lasted))

    def retrying(self, run: TaskRun, error: Exception, delay: float) -> None:
        """The attempt raised, and another will follow after `delay` seconds."""
        if self._retrying is not None:
            failure = Failure(error, self.settings.redact)
            self._retrying(Retrying(run, _clock.timestamp(), run.attempt, _lasted(run), error, failure, delay))

    def fail(self, run: TaskRun, error: Exception, *, timed_out: bool = False) -> None:
        """The last attempt raised."""
        run.outcome = "timed_out" if timed_out else "failed"
        if run.plan.on_failure == "stop":
            _stopped(run)
        tell = self._timed_out if timed_out else self._failed
        if tell is None:
            return
        now, lasted, failure = _clock.timestamp(), _lasted(run), Failure(error, self.settings.redact)
        if timed_out:
            tell(TimedOut(run, now, run.attempt, lasted, run.plan.timeout or 0.0, failure))
        else:
            tell(Failed(run, now, run.attempt, lasted, error, failure, isinstance(error, run.plan.expected)))

    def cut_off(self, run: TaskRun) -> None:
        """The attempt was cancelled, or raised what is no Exception."""
        run.outcome = "cancelled"
        _stopped(run)
        if self._cancelled is not None:
            self._cancelled(Cancelled(run, _clock.timestamp(), run.attempt, _lasted(run), "cancelled", None))

    def cut_off_waiting(self, run: TaskRun) -> None:
        """It was cancelled while it waited for its next attempt."""
        run.outcome = "cancelled"
        _stopped(run)
        if self._cancelled is not None:
            self._cancelled(Cancelled(run, _clock.timestamp(), run.attempt, None, "cancelled", None))
        self._end(run)

    def expire(self, run: TaskRun) -> None:
        """Its deadline passed before it could start."""
        run.outcome = "expired"
        if self._expired is not None:
            self._expired(Expired(run, _clock.timestamp(), "deadline"))
        self._end(run)

    def _reject(self, run: TaskRun, reason: str) -> None:
        run.outcome = "rejected"
        if self._rejected is not None:
            self._rejected(Rejected(run, _clock.timestamp(), reason))
        self._end(run)

    @staticmethod
    def refused(error: AftertaskError) -> None:
        """A task that came with its response was not accepted; nobody but the log can be told why."""
        emit("error", "task.refused", error_type=error_type(error), error_message=str(error))

    def abandon(self, run: TaskRun) -> None:
        """Nobody waits for its thread any more, which goes on."""
        if self._abandoned is not None:
            stack = self.watch.stack_of(run)
            self._abandoned(Abandoned(run, _clock.timestamp(), _lasted(run), run.plan.timeout or 0.0, stack))

    def end_abandoned(self, run: TaskRun, lasted: float) -> None:
        """That thread has come to its end."""
        if self._abandoned_ended is not None:
            self._abandoned_ended(AbandonedEnded(run, _clock.timestamp(), lasted, run.plan.timeout or 0.0))

    def leave(self, run: TaskRun, outer: Outer, *, for_good: bool = True) -> None:
        """The attempt is over, and what it had set is put back."""
        before, restore = outer
        if restore is not None:
            restore()
        if not run.batch:
            _current.set(before)
        if for_good:
            _live.pop(run, None)
            run.target = None
            if run.places:
                self._end(run)

    @staticmethod
    def _end(run: TaskRun) -> None:
        _live.pop(run, None)
        run.target = None
        if run.places:
            for place in run.places:
                place.give_back()
            run.places = ()

    def _look_at(self, run: TaskRun, result: object) -> None:
        found = _DOES_NOTHING.get(type(result))
        if found is not None:
            self.tell_hazard(run, *found)
        elif isinstance(result, Response) and not isinstance(run.target, Response):
            self.tell_hazard(
                run,
                "response_returned",
                "it returned a response, which goes nowhere: an endpoint was given as a task; "
                "give it the function that does the work",
            )

    def tell_hazard(
        self, run: TaskRun, kind: str, advice: str, *, argument: str | None = None, stack: str | None = None
    ) -> None:
        """Something was found that makes background tasks fail; from any thread."""
        if self._hazard is not None:
            self._hazard(HazardFound(run, _clock.timestamp(), kind, argument, advice, stack))

    def never_ran(self, run: TaskRun, reason: str, stopped_by: TaskRun | None) -> None:
        """A run ends that was never started: because of an earlier one of its batch, or for `reason`."""
        now = _clock.timestamp()
        self._end(run)
        if stopped_by is not None and stopped_by.outcome in ("failed", "timed_out"):
            run.outcome = "skipped"
            if self._skipped is not None:
                self._skipped(Skipped(run, now, "sibling_failed", stopped_by))
        elif (stopped_by is not None or reason == "cancelled") and self.stopping:
            run.outcome = "lost"
            if self._lost is not None:
                self._lost(Lost(run, now, "shutdown", _clock.monotonic() - run.scheduled_s))
        elif stopped_by is not None or reason == "cancelled":
            run.outcome = "cancelled"
            if self._cancelled is not None:
                self._cancelled(Cancelled(run, now, 0, None, "batch_cancelled", stopped_by))
        else:
            run.outcome = "dropped"
            if self._dropped is not None:
                self._dropped(Dropped(run, now, reason))


def _lasted(run: TaskRun) -> float:
    return _clock.monotonic() - (run.started_s or 0.0)


def _stopped(run: TaskRun) -> None:
    if run.batch:  # not a child, nor one that went on beside its siblings: those end no batch
        run.request.stopped_by = run
