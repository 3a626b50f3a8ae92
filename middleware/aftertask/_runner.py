"""The life of a batch and of each run in it: scheduled, queued, running, ended."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from contextvars import copy_context
from types import AsyncGeneratorType, CoroutineType, FrameType, FunctionType, GeneratorType
from typing import TYPE_CHECKING, Any, TypeVar, cast

from starlette.background import BackgroundTask, BackgroundTasks
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.websockets import WebSocketDisconnect

from . import _clock, _intercept
from ._context import applied, bound_keys
from ._dispatch import Dispatch
from ._log import emit
from ._route import http_route
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
from .policies import PolicyBook, code_name, is_async, registration, unwrap

if TYPE_CHECKING:
    from .settings import Settings

T = TypeVar("T")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Outer = tuple[TaskRun | None, Callable[[], None] | None]
Send = Callable[[Message], Awaitable[None]]

_STARTS = frozenset({"http.response.start", "websocket.http.response.start"})
_BODIES = frozenset({"http.response.body", "websocket.http.response.body", "http.response.pathsend"})
_DOES_NOTHING = {
    GeneratorType: ("generator", "a generator function does nothing when it is called: collect it, or loop over it"),
    AsyncGeneratorType: ("generator", "an async generator does nothing when it is called: loop over it in a coroutine"),
    CoroutineType: ("unawaited_coroutine", "it returned a coroutine that nobody awaits: make it `async def`"),
}

#: What an error of our own is logged and counted under.
_PART = "aftertask.interception"

#: Functions made on the fly must not be kept for ever.
_PLANS = 2000


class Engine:
    """
    One app's runs: what is known of its tasks, who is told, and each step of a run.

    Args:
        settings: The app's settings.
        signals: Who is told, in order.
        admissions: Awaited when a response with runs starts.
    """

    def __init__(self, settings: Settings, signals: Iterable[Signal], admissions: Sequence[Admission] = ()) -> None:
        self.settings = settings
        self.policies = PolicyBook(settings.policies)
        self.admissions = tuple(admissions)
        self.dispatch = Dispatch(signals, self.broken)
        self.gives_context = settings.context == "endpoint"
        self.stopping = False
        self.spanned = next((s.feeds for s in self.dispatch.signals if hasattr(s, "feeds")), None)
        ends = (getattr(signal, "batch_ended", None) for signal in self.dispatch.signals)
        self.batch_ended: tuple[Callable[[Request, int], None], ...] = tuple(end for end in ends if end is not None)
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

    def _each_signal(self, name: str) -> None:
        for signal in self.dispatch.signals:
            method = getattr(signal, name, None)
            if callable(method):
                try:
                    method()
                except Exception as error:
                    self.broken(code_name(signal), name, error)

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
        return Plan(
            task=policy.name or task,
            registered=entry is not None or self.policies.names(task),
            code=code,
            executor="inline" if whole or is_async(func) else "thread",
            whole=whole,
            observe=policy.observe is not False,
            owner=policy.owner,
            expected=policy.classes,
            trace=policy.trace,
        )

    def schedule(self, exchange: Exchange, target: Any, parent: TaskRun | None = None) -> TaskRun | None:
        """A run comes into being; None where the task is not to be observed."""
        plan = self.plan(target, inside=parent is not None)
        if not plan.observe:
            return None
        run = TaskRun(plan, exchange, target)
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
        cast(Exchange, run.request).stopped_by = run


# What every request waits for until it has runs; never written to.
_NOTHING: dict[int, list[TaskRun]] = {}


class Exchange(Request):
    """
    One request and its response, as the mark in the scope: which runs it scheduled, and what became of them.

    Attributes:
        stopped_by: The run whose failure or cancellation ended its batch; None while none has.
        touched: Whether there ever was a task in this request, so that it must be closed.
        scope: The scope it marks; None once it is over, or there would be a cycle for each request.
    """

    # One of these is made for every request, so what most of them never need is a default of the class.
    stopped_by: TaskRun | None = None
    touched = False
    _container: BackgroundTasks | None = None
    _served: Scope | None = None
    _added = 0
    _thread = 0
    _reserved: tuple[Any, int] | None = None
    _complete_s: float | None = None
    _started = False
    _verdict: str | None = None

    _waiting: dict[int, list[TaskRun]] = _NOTHING

    def __init__(self, engine: Engine, scope: Scope) -> None:
        self._engine = engine
        self.scope: Scope | None = scope
        self.context = copy_context()

    # --- the response, watched through its messages

    def sender(self, send: Send) -> Send:
        """`send`, and we notice when the response starts and when its last byte is out."""

        attached = _intercept.attached

        def watched(message: Message) -> Awaitable[None]:
            if self._waiting or _intercept.attached != attached:
                kind = message["type"]
                if kind in _STARTS:
                    return self._start(send, message)
                if kind in _BODIES and not message.get("more_body", False):
                    return self._finish(send, message)
            return send(message)

        return watched

    async def _start(self, send: Send, message: Message) -> None:
        self._guarded("response start", self._see_start, sys._getframe(1))
        self._started = True
        runs = [run for waiting in self._waiting.values() for run in waiting]
        if runs:
            for admission in self._engine.admissions:
                await admission(runs)
            header = self._engine.settings.run_ids_header
            if header is not None:
                value = ", ".join(run.id for run in runs)
                message = {**message, "headers": [*message.get("headers", ()), _header(header, value)]}
        await send(message)

    def _see_start(self, frame: FrameType) -> None:
        response = _intercept.response_in(frame, self)
        if response is None:
            return
        self.answered()
        background = _intercept.background_of(response[0])
        if background is not None:
            self._note(response[1] or self.scope or {})
            self._reserve(background)

    async def _finish(self, send: Send, message: Message) -> None:
        await send(message)
        self._complete()

    def _complete(self) -> None:
        now = self._complete_s = _clock.monotonic()
        for waiting in self._waiting.values():
            for run in waiting:
                run.queued_s = now

    # --- what the hooks tell

    def inject(self, container: BackgroundTasks, scope: Scope) -> None:
        """FastAPI made this container for the request."""
        self.touched = True
        self._container = container
        self._served = scope
        self._thread = threading.get_ident()
        _intercept.injected[id(container)] = self

    def add(self, container: BackgroundTasks) -> None:
        """A task was added to the injected container: a run is scheduled."""
        try:
            if self._added == 0 and self._served is not None:
                self._note(self._served)
            run = self._engine.schedule(self, container.tasks[-1])
            if run is None:
                return
            self._added += 1
            run.batch = id(container)
            run.queued_s = self._complete_s
            if self._engine.gives_context:
                run.context = copy_context()
            elif threading.get_ident() != self._thread:
                run.bound = bound_keys()
            self._keep(run)
        except Exception as error:
            self._engine.broken(_PART, "add_task", error)

    def answered(self) -> None:
        """A response is served while injected tasks wait: if that is for an exception, they will not run for it."""
        if self._waiting and self._verdict is None:
            error = sys.exception()
            if error is not None:
                self._verdict = self._reason(error)

    def adopt(self, target: BackgroundTask) -> Awaitable[None] | None:
        """User code runs an injected task itself: a run all the same, without a policy. None: it is none of ours."""
        if id(target) not in self._waiting:
            return None
        run = self._take(id(target))
        run.batch = 0
        return self._engine.run(run)

    def nest(self, target: BackgroundTask, parent: TaskRun) -> Awaitable[None]:
        """User code runs a task inside a run: a child."""
        run = self._guarded("child", self._engine.schedule, self, target, parent)
        call = functools.partial(_intercept.inner, target)
        return call() if run is None else self._engine.run(run, call)

    async def child(self, func: Any, parent: TaskRun, call: Callable[[], Awaitable[T]]) -> T:
        """A container of the user's calls an async function inside its run: a child."""
        run = self._guarded("child", self._engine.schedule, self, BackgroundTask(func), parent)
        return await call() if run is None else cast(T, await self._engine.run(run, call))

    def child_sync(self, func: Any, parent: TaskRun, call: Callable[[], T]) -> T:
        """The same for a sync function, maybe in a thread."""
        run = self._guarded("child", self._engine.schedule, self, BackgroundTask(func), parent)
        return call() if run is None else self._engine.run_sync(run, call)

    async def serve(self, value: Any, served: Scope) -> None:
        """Run a response's background: a framework container's elements one after another, anything else as one run."""
        # No local here may be called `scope`: the hooks would take this frame for an ASGI app's.
        batch, outer = id(value), _current.get()
        self._guarded("hand-over", self._hand_over, value, served)
        try:
            loop = _intercept.loop_of(value)
            if loop is None:
                await self._one(value, batch)
            else:
                tracer = _intercept.native_tracer(served)
                muted = tracer is None or (self._engine.spanned is not None and self._engine.spanned(tracer))
                await self._each(value, loop, batch, muted)
        finally:
            # What a run and its signals set in the context stays until the batch is over: between two runs nobody
            # looks, and setting a context variable costs a quarter of a microsecond.
            _current.set(outer)  # not reset(token): a coroutine may be closed from another context
            for batch_ended in self._engine.batch_ended:
                self._guarded("end of the batch", batch_ended, self, batch)

    # --- the batch

    def _each(self, value: Any, loop: _intercept.Loop, batch: int, muted: bool) -> Awaitable[None]:
        if muted and _intercept.is_shipped(loop):
            return self._run_each(value, batch)
        return loop(_intercept.View(value, functools.partial(self._element, batch=batch, muted=muted)))

    async def _run_each(self, container: Any, batch: int) -> None:
        for element in container.tasks:  # it may grow meanwhile
            await (
                self._one(element, batch) if type(element) is BackgroundTask else self._element(element, batch, True)
            )

    def _element(self, element: Any, batch: int, muted: bool) -> Awaitable[None]:
        loop = _intercept.loop_of(element)
        return self._one(element, batch) if loop is None else self._each(element, loop, batch, muted)

    def _one(self, target: Any, batch: int) -> Awaitable[Any]:
        """Run the run that was scheduled for this task, or one that is scheduled now."""
        key = id(target)
        try:
            if key in self._waiting:
                return self._engine.run(self._take(key))
            run = self._engine.schedule(self, target)
        except Exception as error:
            self._engine.broken(_PART, "hand-over", error)
            run = None
        if run is None:
            return _intercept.unhooked(target)
        run.batch = batch
        if self._complete_s is not None:
            run.queued_s = _clock.monotonic()
        return self._engine.run(run)

    def _take(self, key: int) -> TaskRun:
        waiting = self._waiting[key]
        if len(waiting) == 1:
            del self._waiting[key]
        return waiting.pop(0)

    def _hand_over(self, background: Any, served: Scope) -> None:
        self._note(served)
        self._reserve(background)
        if self._complete_s is None:  # a response that carried nothing we knew of, or went out around us
            self._complete()

    def _reserve(self, background: Any) -> None:
        """Schedule what a background holds and is not scheduled yet; a task listed twice is two runs."""
        size = len(getattr(background, "tasks", ()))
        if background is self._container and size == self._added:
            return
        if self._reserved is not None and self._reserved[0] is background and self._reserved[1] == size:
            return
        if self._container is not None and background is not self._container and self._verdict is None:
            self._verdict = "own_background"
        self.touched = True
        self._reserved = (background, size)
        batch, claimed = id(background), dict[int, int]()
        for target in _intercept.leaves(background):
            known = self._waiting.get(id(target), ())
            count = claimed[id(target)] = claimed.get(id(target), 0) + 1
            run = known[count - 1] if count <= len(known) else self._engine.schedule(self, target)
            if run is not None:
                run.batch = batch
                if count > len(known):
                    run.queued_s = self._complete_s
                    self._keep(run)

    def _keep(self, run: TaskRun) -> None:
        if self._waiting is _NOTHING:
            self._waiting = {}
        key = id(run.target)
        if key in self._waiting:
            self._waiting[key].append(run)
        else:
            self._waiting[key] = [run]

    def _note(self, scope: Scope) -> None:
        self.http_method = scope.get("method")
        if self.http_route is None:
            self.http_route = self._guarded("route", http_route, scope)
        if self.request_id is None:
            self.request_id = self._guarded("Settings.request_id", self._engine.settings.find_request_id, scope)

    def _guarded(self, on: str, function: Callable[..., T], *args: Any) -> T | None:
        """What the function returns; None where it raises, which is told and goes no further."""
        try:
            return function(*args)
        except Exception as error:
            self._engine.broken(_PART, on, error)
            return None

    # --- the end

    def close(self, error: BaseException | None) -> None:
        """Our `__call__` ends: what still waits will never run."""
        if self._container is not None:
            _intercept.injected.pop(id(self._container), None)
        if self._waiting or error is not None:
            self._guarded("end of the request", self._settle, error)
        # The scope holds us: what may hold the scope must go.
        self._served = self._container = self._reserved = self.scope = self.context = None

    def _settle(self, error: BaseException | None) -> None:
        if error is not None and self.stopped_by is None:
            for response, scope in _intercept.responses_in(error):
                background = _intercept.background_of(response)
                if scope.get(_intercept.KEY) is self and background is not None:
                    self._note(scope)
                    self._reserve(background)
        reason = self._reason(error) if error is not None else self._verdict or "other"
        stopped_by, waiting, self._waiting = self.stopped_by, self._waiting, _NOTHING
        for run in (run for runs in waiting.values() for run in runs):
            same = stopped_by is not None and stopped_by.batch == run.batch
            self._engine.never_ran(run, reason, stopped_by if same else None)

    def _reason(self, error: BaseException) -> str:
        if not isinstance(error, Exception):
            return "cancelled"
        if isinstance(error, HTTPException):
            return "http_exception"
        if type(error).__name__ in ("RequestValidationError", "WebSocketRequestValidationError"):
            return "validation"
        gone = isinstance(error, (ClientDisconnect, WebSocketDisconnect)) or (
            isinstance(error, OSError) and self._started
        )
        return "client_gone" if gone else "handler_error"


def _header(name: str, value: str) -> tuple[bytes, bytes]:
    return name.lower().encode("latin-1"), value.encode("latin-1")
