"""The life of a run: scheduled, running, ended; and who is told of each step."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from types import AsyncGeneratorType, CoroutineType, FunctionType, GeneratorType
from typing import TYPE_CHECKING, Any, TypeVar, cast

from starlette.background import BackgroundTask

from . import _clock, _intercept
from ._context import applied
from ._dispatch import Dispatch
from ._log import emit
from .events import (
    Admission,
    Cancelled,
    Dropped,
    Failed,
    Failure,
    HazardFound,
    Lost,
    Plan,
    Request,
    Scheduled,
    Signal,
    Skipped,
    Started,
    Succeeded,
    TaskRun,
    _current,
    _live,
)
from .policies import STUCK_AFTER, PolicyBook, code_name, executor_of, is_async, registration, unwrap

if TYPE_CHECKING:
    from .settings import Settings

T = TypeVar("T")

Outer = tuple[TaskRun | None, Callable[[], None] | None]

_DOES_NOTHING = {
    GeneratorType: ("generator", "a generator function does nothing when it is called: collect it, or loop over it"),
    AsyncGeneratorType: ("generator", "an async generator does nothing when it is called: loop over it in a coroutine"),
    CoroutineType: ("unawaited_coroutine", "it returned a coroutine that nobody awaits: make it `async def`"),
}

#: With one of these a run is more than a call.
_GOVERNS = ("timeout", "retry", "limit", "expires", "on_error")

#: Functions made on the fly must not be kept for ever.
_PLANS = 2000


class Engine:
    """
    One app's runs: what is known of its tasks, who is told, and each step of a run.

    Args:
        settings: The app's settings.
        signals: Who is told, in order.
    """

    def __init__(self, settings: Settings, signals: Iterable[Signal]) -> None:
        self.settings = settings
        self.policies = PolicyBook(settings.policies)
        self.dispatch = Dispatch(signals, self.broken)
        self.gives_context = settings.context == "endpoint"
        self.stopping = False
        self.spanned = next((s.feeds for s in self.dispatch.signals if hasattr(s, "feeds")), None)
        self.batch_ended: list[Callable[[Request, int], None]] = self._offered("batch_ended")
        self.admissions: list[Admission] = self._offered("admit")
        self._plans: dict[object, Plan] = {}
        self._functions: dict[FunctionType, Plan] = {}
        self._scheduled = self.dispatch.to(Scheduled)
        self._started = self.dispatch.to(Started)
        self._succeeded = self.dispatch.to(Succeeded)
        self._failed = self.dispatch.to(Failed)
        self._cancelled = self.dispatch.to(Cancelled)
        self._dropped = self.dispatch.to(Dropped)
        self._skipped = self.dispatch.to(Skipped)
        self._lost = self.dispatch.to(Lost)
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
        """The app starts."""
        self.stopping = False
        self._each_signal("open")

    def close(self) -> None:
        """The app has stopped serving."""
        self.stopping = True
        self._each_signal("close")

    def _offered(self, name: str) -> list[Any]:
        found = (getattr(signal, name, None) for signal in self.dispatch.signals)
        return [method for method in found if callable(method)]

    def _each_signal(self, name: str) -> None:
        for method in self._offered(name):
            try:
                method()
            except Exception as error:
                self.broken(code_name(method), name, error)

    def plan(self, target: Any, *, inside: bool = False) -> Plan:
        """
        What holds for a task: its name and its policy, put together once for each function.

        Args:
            target: A `BackgroundTask`, or anything else that was given as a background.
            inside: The function of a task class that calls it itself, not the class.
        """
        if type(target) is BackgroundTask:
            func = target.func
            plan = self._functions.get(func) if type(func) is FunctionType else None
            return plan or self._plan(func, False)
        whole = not inside and (not isinstance(target, BackgroundTask) or _intercept.is_whole(target))
        return self._plan(
            (type(target) if isinstance(target, BackgroundTask) else target) if whole else target.func, whole
        )

    def _plan(self, func: Any, whole: bool) -> Plan:
        if type(func) is FunctionType:
            key: object = (func.__module__, func.__qualname__, registration(func), whole, func.__code__.co_flags)
        else:
            inner, call = unwrap(func)
            key = (code_name(inner), registration(inner), call, whole, is_async(func))
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _PLANS:
                self._plans.clear()
            plan = self._plans[key] = self._make_plan(func, whole)
        if (
            type(func) is FunctionType
            and not whole
            and func.__closure__ is None
            and "<locals>" not in func.__qualname__
        ):
            if len(self._functions) >= _PLANS:
                self._functions.clear()
            self._functions[func] = plan  # as good as for ever anyway: it belongs to its module
        return plan

    def _make_plan(self, func: Any, whole: bool) -> Plan:
        inner, call = unwrap(func)
        entry, code = registration(inner), code_name(inner)
        task = entry.name if entry is not None else code
        policy = self.policies.policy(task, call, entry.policy if entry is not None else None)
        executor = "inline" if whole else executor_of(func, policy)
        return Plan(
            task=policy.name or task,
            registered=entry is not None or self.policies.names(task),
            code=code,
            executor=executor,
            own_thread=executor == "thread" and policy.executor == "thread",
            whole=whole,
            observe=policy.observe is not False,
            owner=policy.owner,
            expected=policy.classes,
            trace=policy.trace,
            timeout=policy.timeout,
            retry=None if whole else policy.retry,
            limit=policy.limit,
            priority=policy.priority or 0,
            on_failure=policy.on_failure or self.settings.on_failure,
            expires=policy.expires,
            run_on_error=policy.run_on_error is True,
            idempotent=policy.idempotent is True,
            on_error=policy.on_error,
            alert=policy.alert is not False,
            severity=policy.severity,
            alert_after=policy.alert_after or 1,
            slow_after=policy.slow_after,
            stuck_after=policy.stuck_after or (2 * policy.timeout if policy.timeout else STUCK_AFTER),
            governed=executor == "process"
            or policy.executor == "thread"
            or any(getattr(policy, field) is not None for field in _GOVERNS),
        )

    def schedule(self, request: Request, target: Any, parent: TaskRun | None = None) -> TaskRun | None:
        """A run comes into being; None where the task is not to be observed."""
        plan = self.plan(target, inside=parent is not None)
        if not plan.observe:
            return None
        run = TaskRun(plan, request, target)
        if parent is not None:
            run.parent = parent
        _live[run] = None
        if self._scheduled is not None:
            self._scheduled(Scheduled(run, run.timestamp))
        return run

    async def run(self, run: TaskRun, call: Callable[[], Awaitable[Any]] | None = None) -> Any:
        """
        Call a scheduled run's function and tell what becomes of it; whatever it raises comes out unchanged.

        Args:
            run: The run; its target is called as the framework would.
            call: What to call in its place.
        """
        outer = self._begin(run)
        try:
            result = await (_intercept.call(run.target, self.spanned) if call is None else call())
        except Exception as error:
            self._fail(run, error)
            raise
        except BaseException:
            self._cut_off(run)
            raise
        else:
            self._succeed(run, result)
            return result
        finally:
            self._leave(run, outer)

    def run_sync(self, run: TaskRun, call: Callable[[], T]) -> T:
        """The same for a function that user code calls without awaiting it, maybe in a thread."""
        outer = self._begin(run)
        try:
            result = call()
        except Exception as error:
            self._fail(run, error)
            raise
        except BaseException:
            self._cut_off(run)
            raise
        else:
            self._succeed(run, result)
            return result
        finally:
            self._leave(run, outer)

    def _begin(self, run: TaskRun) -> Outer:
        outer = _current.get()
        _current.set(run)
        run.attempt = 1
        started = run.started_s = _clock.monotonic()
        variables = run.context or run.bound
        restore = None if variables is None else applied(variables)
        if self._started is not None:
            queued = run.queued_s
            wait = None if run.parent is not None else 0.0 if queued is None else max(0.0, started - queued)
            self._started(Started(run, _clock.timestamp(), 1, wait))
        return outer, restore

    def _succeed(self, run: TaskRun, result: object) -> None:
        if result is not None and type(result) in _DOES_NOTHING:
            self._tell_hazard(run, *_DOES_NOTHING[type(result)])
        run.outcome = "succeeded"
        if self._succeeded is not None:
            self._succeeded(Succeeded(run, _clock.timestamp(), 1, _lasted(run)))

    def _fail(self, run: TaskRun, error: Exception) -> None:
        run.outcome = "failed"
        _stopped(run)
        if self._failed is not None:
            lasted = _lasted(run)
            failure = Failure(error, self.settings.redact)
            expected = isinstance(error, run.plan.expected)
            self._failed(Failed(run, _clock.timestamp(), 1, lasted, error, failure, expected))

    def _cut_off(self, run: TaskRun) -> None:
        run.outcome = "cancelled"
        _stopped(run)
        if self._cancelled is not None:
            self._cancelled(Cancelled(run, _clock.timestamp(), 1, _lasted(run), "cancelled", None))

    @staticmethod
    def _leave(run: TaskRun, outer: Outer) -> None:
        before, restore = outer
        if restore is not None:
            restore()
        if not run.batch:
            _current.set(before)
        _live.pop(run, None)
        run.target = None

    def _tell_hazard(self, run: TaskRun, kind: str, advice: str) -> None:
        if self._hazard is not None:
            self._hazard(HazardFound(run, _clock.timestamp(), kind, None, advice))

    def never_ran(self, run: TaskRun, reason: str, stopped_by: TaskRun | None) -> None:
        """A run ends that was never started: because of an earlier one of its batch, or for `reason`."""
        now = _clock.timestamp()
        _live.pop(run, None)
        run.target = None
        if stopped_by is not None and stopped_by.outcome == "failed":
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
    return _clock.monotonic() - cast(float, run.started_s)


def _stopped(run: TaskRun) -> None:
    if run.parent is None:
        run.request.stopped_by = run
