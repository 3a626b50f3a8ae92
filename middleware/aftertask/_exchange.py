"""One request and its response: which runs it schedules, which of them run, and what becomes of the others."""

from __future__ import annotations

import functools
import itertools
import operator
import sys
import threading
import weakref
from collections.abc import Awaitable, Callable, Collection, Iterator, MutableMapping
from contextvars import Context, copy_context
from typing import Any, TypeVar, cast

from starlette.background import BackgroundTask, BackgroundTasks
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.websockets import WebSocketDisconnect

from . import _clock, _intercept, _mark, _responses
from ._batch import Batch
from ._context import bound_keys
from ._messages import Message, Messages, Send
from ._route import http_route
from ._run import _current
from ._runner import Engine
from ._shutdown import Supervisor
from .errors import NotSerializable, QueueFull
from .events import Request, TaskRun, current_run

T = TypeVar("T")

Scope = MutableMapping[str, Any]

_STARTS = frozenset({"http.response.start", "websocket.http.response.start"})
_BODIES = frozenset({"http.response.body", "websocket.http.response.body", "http.response.pathsend"})

#: Why a run is dropped where its handler, or what came before it, raised.
_HANDLER_RAISED = frozenset({"http_exception", "validation", "handler_error"})

#: What an error of our own is logged and counted under.
_PART = "aftertask.interception"

_WEBSOCKET = (
    "websocket",
    "FastAPI never runs the tasks that are injected into a WebSocket endpoint: await the function there, or start it "
    "in a task group of the app's own",
)
_MUTATED = (
    "mutated_tasks",
    "it adds a task to the batch that it runs in, which works only because Starlette happens to loop over the same "
    "list: call the function in this task, or add both in the endpoint",
)
_EARLY = (
    "started_early",
    "it started before the response was complete, so the client waits for it, and its failure can cut the response "
    "off: a middleware holds the response back (several BaseHTTPMiddleware do, on Starlette before 1.7): update "
    "Starlette, or have that middleware pass each message on",
)

# What every request waits for until it has runs; never written to.
_NOTHING: dict[int, TaskRun] = {}
_NO_TWINS: dict[int, list[TaskRun]] = {}


class Exchange(Request):
    """
    One request and its response, as the mark in the scope: which runs it scheduled, and what became of them.

    Attributes:
        scope: Where a response is served or tasks were injected; None before, and once it is over, or there would be a
            cycle for each request.
        exits: FastAPI's exit stack of the request's dependencies; None where nothing was injected.
    """

    # What most of them never need is a default of the class.
    exits: object = None
    _container: BackgroundTasks | None = None
    _injected: tuple[BackgroundTasks, ...] = ()
    scope: Scope | None = None
    _added = 0
    _thread = 0
    _reserved: tuple[Any, int] | None = None
    _complete_s: float | None = None
    _started = False
    _verdict: str | None = None

    _waiting: dict[int, TaskRun] = _NOTHING
    _twins: dict[int, list[TaskRun]] = _NO_TWINS  # the further runs of a task that is listed more than once
    _refused: Collection[int] = ()
    _owed: weakref.ref[_Owed] | None = None
    _away = 0
    _closing: Scope | None = None
    _serving = False
    _early: TaskRun | None = None
    _unwatch: Callable[[], None] | None = None

    def __init__(self, engine: Engine, messages: Messages, came_with: tuple[Context, Send] | None = None) -> None:
        self._engine = engine
        self._messages = messages
        self._over = came_with is None
        self._send: Send | None = None
        if came_with is not None:
            self.context, self._send = came_with

    # --- the response, watched through its messages

    def _watch(self) -> None:
        """From now on the messages on their way out come by `_pass_on`: for most requests they never need to."""
        if self._send is not None:
            self._unwatch, self._send = self._messages.watch(self._send, self._pass_on), None

    def _pass_on(self, send: Send, message: Message) -> Awaitable[None]:
        """Send a message, and notice when the response starts and when its last byte is out."""
        kind = message["type"]
        if kind in _STARTS:
            return self._start(send, message)
        if kind in _BODIES and not message.get("more_body", False):
            return self._finish(send, message)
        return send(message)

    async def _start(self, send: Send, message: Message) -> None:
        runs = self._runs()
        if runs:
            for admission in self._engine.admissions:
                await admission(runs)
            header = self._engine.settings.run_ids_header
            if header is not None:
                value = ", ".join(run.id for run in runs)
                message = {**message, "headers": [*message.get("headers", ()), _header(header, value)]}
        self._started = True
        await send(message)

    async def _finish(self, send: Send, message: Message) -> None:
        await send(message)
        self._complete()

    def _complete(self) -> None:
        if self._early is not None:
            self._engine.tell_hazard(self._early, *_EARLY)
            self._early = None
        now = self._complete_s = _clock.monotonic()
        for run in self._runs():
            run.queued_s = now

    # --- what the hooks tell

    def inject(self, container: BackgroundTasks, scope: Scope, exits: object) -> None:
        """FastAPI made this container for the request; on `exits` is what its dependencies close."""
        if self._over:
            return  # another app serves this scope, after ours has failed
        _intercept.install()
        self._watch()  # a task may be added only while the response is being sent
        self._container = container
        self._injected = (*self._injected, container)  # an app that is called again makes another
        self.scope = scope
        self.exits = exits
        self._thread = threading.get_ident()
        _mark.expecting[id(container)] = self

    def add(self, container: BackgroundTasks) -> None:
        """A task was added to the injected container: a run is scheduled."""
        try:
            if self._added == 0 and self.scope is not None:
                self._note(self.scope)
            run = self._engine.schedule(self, container.tasks[-1])
            if run is None:
                return
            self._added += 1
            run.batch = id(container)
            if self._complete_s is not None:
                run.queued_s = run.scheduled_s  # added by a task: the response has long been sent
            if self._engine.gives_context:
                run.context = copy_context()
            elif threading.get_ident() != self._thread:
                run.bound = bound_keys()
            self._keep(run)
            if self.http_method is None or self._serving:
                self._tell_trap(run)
        except (QueueFull, NotSerializable):
            container.tasks.pop()  # the caller is told, and the task is as if it had not been added
            raise
        except Exception as error:
            self._engine.broken(_PART, "add_task", error)

    def _tell_trap(self, run: TaskRun) -> None:
        if self.http_method is None:
            self._engine.tell_hazard(run, *_WEBSOCKET)
        culprit = current_run()
        if culprit is not None and culprit.request is self:
            self._engine.tell_hazard(culprit, *_MUTATED)

    def answer(self, response: Response, scope: Scope) -> Any:
        """A response is served: what its background holds is scheduled. Returns what is to be called in its place."""
        own = self._guarded("response", self._answer, response, scope)
        return response if own is None else own

    def _answer(self, response: Response, scope: Scope) -> Any:
        background = _responses.plain(getattr(response, "background", None))
        if (background is None or background is not self._container) and self._waiting and self._verdict is None:
            error = sys.exception()  # if the response is for an exception, injected tasks will not run for it
            if error is not None:
                self._verdict = self._reason(error)
        own = _responses.own(response, self, scope)
        if background is not None and not self._over:
            self.scope = scope
            if self.http_method is None:
                self._note(scope)
            self._reserve(background)
        return own

    def adopt(self, target: BackgroundTask) -> Awaitable[None] | None:
        """User code runs an injected task itself: a run all the same, without a policy. None: it is none of ours."""
        if id(target) not in self._waiting:
            return None
        run = self._take(id(target))
        run.batch = 0
        return self._engine.run(run)

    def nest(self, target: BackgroundTask, parent: TaskRun) -> Awaitable[None]:
        """User code runs a task inside a run: a child, unless it waits to be run anyway."""
        adopted = self.adopt(target)
        if adopted is not None:
            return adopted
        run = self._guarded("child", self._engine.schedule, self, target, parent)
        call = functools.partial(_intercept.inner, target, None if run is None else self._engine.spanned)
        return call() if run is None else self._engine.run(run, call)

    async def child(self, func: Any, parent: TaskRun, call: Callable[[], Awaitable[T]]) -> T:
        """A container of the user's calls an async function inside its run: a child."""
        run = self._guarded("child", self._engine.schedule, self, BackgroundTask(func), parent)
        return await call() if run is None else cast(T, await self._engine.run(run, call))

    def child_sync(self, func: Any, parent: TaskRun, call: Callable[[], T]) -> T:
        """The same for a sync function, maybe in a thread."""
        run = self._guarded("child", self._engine.schedule, self, BackgroundTask(func), parent)
        return call() if run is None else self._engine.run_sync(run, call)

    def serve(self, value: Any, served: Scope) -> Awaitable[None]:
        """Run a response's background: a framework container's elements one after another, anything else as one run."""
        supervisor = self._engine.supervisor
        if supervisor is not None and supervisor.is_here:
            return self._away_from_here(supervisor, value, served)
        return self._serve(value, served)

    async def _away_from_here(self, supervisor: Supervisor, value: Any, served: Scope) -> None:
        self._away += 1  # from now on: the request may end before the batch has begun
        await supervisor.run(functools.partial(self._elsewhere, value, served))

    async def _elsewhere(self, value: Any, served: Scope) -> None:
        """The same in a task that is not the request's, and that may outlive it."""
        error: BaseException | None = None
        try:
            await self._serve(value, served)
        except BaseException as raised:
            error = raised
            raise
        finally:
            self._away -= 1
            owes_now = self._closing is not None and not self._away and self.close(error, self._closing)
            del error  # or there would be a cycle: this frame, the exception, its traceback
            if owes_now:
                await self.compensate()

    async def _serve(self, value: Any, served: Scope) -> None:
        # No local here may be called `scope`: the hooks would take this frame for an ASGI app's.
        _intercept.install()
        batch, outer = Batch(id(value)), _current.get()
        self._guarded("hand-over", self._hand_over, value, served)
        for serving in self._engine.serving:
            self._guarded("start of the batch", serving)
        try:
            loop = _intercept.loop_of(value)
            if loop is None:
                await self._one(value, batch)
            else:
                if self.prioritised:
                    self._guarded("priority", self._sort, value)
                tracer = _intercept.native_tracer(served)
                muted = tracer is None or (self._engine.spanned is not None and self._engine.spanned(tracer))
                await self._each(value, loop, batch, muted)
            if batch.open:
                await batch.finish(_size(value), None)
        except BaseException as error:
            if batch.open:
                await batch.finish(_size(value), error)
            raise
        finally:
            # What a run and its signals set in the context stays until the batch is over: between two runs nobody
            # looks, and setting a context variable costs a quarter of a microsecond.
            _current.set(outer)  # not reset(token): a coroutine may be closed from another context
            for batch_ended in self._engine.batch_ended:
                self._guarded("end of the batch", batch_ended, self, batch.id)
            if self._over and self._waiting:  # a response from around us: nobody else is to come
                self._guarded("end of the request", self._settle, sys.exception(), served)
        if self._owed is not None:  # it was the background of the error response
            await self.compensate()

    # --- the batch

    def _each(self, value: Any, loop: _intercept.Loop, batch: Batch, muted: bool) -> Awaitable[None]:
        if muted and _intercept.is_shipped(loop):
            return self._run_each(value, batch)
        return loop(_responses.View(value, functools.partial(self._element, batch=batch, muted=muted)))

    async def _run_each(self, container: Any, batch: Batch) -> None:
        for element in container.tasks:  # it may grow meanwhile
            await (
                self._one(element, batch) if type(element) is BackgroundTask else self._element(element, batch, True)
            )

    def _sort(self, container: Any) -> int:
        """Put a container's tasks into the order of their priorities, in place: it may still grow. Its own, too."""
        tasks = container.tasks
        priorities = [self._priority(each) for each in tasks]
        if any(map(operator.gt, priorities, priorities[1:])) and isinstance(tasks, list):
            tasks[:] = [tasks[at] for at in sorted(range(len(tasks)), key=priorities.__getitem__)]
        return min(priorities, default=0)

    def _priority(self, element: Any) -> int:
        waiting = self._waiting.get(id(element))
        if waiting is not None:
            return waiting.plan.priority
        return self._engine.plan(element).priority if _intercept.loop_of(element) is None else self._sort(element)

    def _element(self, element: Any, batch: Batch, muted: bool) -> Awaitable[None]:
        element = _responses.plain(element)
        loop = _intercept.loop_of(element)
        return self._one(element, batch) if loop is None else self._each(element, loop, batch, muted)

    def _one(self, target: Any, batch: Batch) -> Awaitable[Any]:
        """Run the run that was scheduled for this task, or one that is scheduled now."""
        key = id(target)
        try:
            if key in self._waiting:
                run: TaskRun | None = self._take(key)
            elif key in self._refused:
                return _nothing()
            else:
                run = self._engine.schedule(self, target)
                if run is not None:
                    run.batch = batch.id
                    if self._complete_s is not None:
                        run.queued_s = _clock.monotonic()
        except (QueueFull, NotSerializable) as error:
            self._engine.refused(error)
            return _nothing()
        except Exception as error:
            self._engine.broken(_PART, "hand-over", error)
            run = None
        if run is None:
            return _intercept.unhooked(target)
        return self._engine.run(run) if run.plan.plain else self._govern(run, batch)

    async def _govern(self, run: TaskRun, batch: Batch) -> None:
        """A run under a policy: what its failure does to the batch is its own."""
        on_failure = run.plan.on_failure
        keep = _forget if on_failure == "contain" else batch.keep()
        if not run.plan.governed:
            try:
                await self._engine.run(run)
            except Exception as raised:
                keep(raised)
            return
        spawn = None if on_failure == "stop" else batch.spawn
        error = await self._engine.governor.run(run, spawn, keep)
        try:
            if error is not None and on_failure == "stop":
                raise error
            if error is not None:
                keep(error)
        finally:
            del error  # its traceback holds this frame: there would be a cycle

    def _take(self, key: int) -> TaskRun:
        run = self._waiting.pop(key)
        if key in self._twins:
            twins = self._twins[key]
            self._waiting[key] = twins.pop(0)
            if not twins:
                del self._twins[key]
        return run

    def _nth(self, key: int, count: int) -> TaskRun | None:
        """The run that waits for a task's so-manieth place in a background, from 1 on."""
        if count == 1:
            return self._waiting.get(key)
        twins = self._twins.get(key, ())
        return twins[count - 2] if count - 2 < len(twins) else None

    def _runs(self) -> list[TaskRun]:
        """All that wait."""
        return [*self._waiting.values(), *itertools.chain.from_iterable(self._twins.values())]

    def _hand_over(self, background: Any, served: Scope) -> None:
        if not self._over:
            self.scope = served
        self._note(served)
        self._reserve(background)
        self._serving = True
        if self._complete_s is None:  # a response that carried nothing we knew of, or went out around us
            self._complete()
            # Is its last byte still to come? Not where its client is gone.
            self._early = next(iter(self._waiting.values()), None)

    def _reserve(self, background: Any) -> None:
        """Schedule what a background holds and is not scheduled yet; a task listed twice is two runs."""
        size = len(getattr(background, "tasks", ()))
        if background is self._container and size == self._added:
            return
        if self._reserved is not None and self._reserved[0] is background and self._reserved[1] == size:
            return
        if self._container is not None and background is not self._container and self._verdict is None:
            self._verdict = "own_background"
        self._reserved = (background, size)
        batch, claimed = id(background), dict[int, int]()
        for target in _intercept.leaves(background):
            count = claimed[id(target)] = claimed.get(id(target), 0) + 1
            known = self._nth(id(target), count)
            try:
                run = self._engine.schedule(self, target) if known is None else known
            except (QueueFull, NotSerializable) as error:
                self._engine.refused(error)
                self._refused = {*self._refused, id(target)}
                continue
            if run is not None:
                run.batch = batch
                if known is None:
                    run.queued_s = self._complete_s
                    self._keep(run)

    def _keep(self, run: TaskRun) -> None:
        if self._waiting is _NOTHING:
            self._waiting = {}
            self._watch()
        key = id(run.target)
        if key not in self._waiting:
            self._waiting[key] = run
        elif self._twins is _NO_TWINS:
            self._twins = {key: [run]}
        else:
            self._twins.setdefault(key, []).append(run)

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

    def close(self, error: BaseException | None, scope: Scope) -> bool:
        """
        Our `__call__` for this scope ends: what still waits will never run, unless its batch goes on elsewhere.

        Returns:
            Whether something is owed that need not wait: `ServerErrorMiddleware` is still to answer from around us
            where nothing has been sent.
        """
        if self._unwatch is not None:
            self._unwatch()
        self._send = self._unwatch = None  # which hold us, and the server, which may hold the scope
        if self._away:
            self._closing = scope
            return False
        for container in self._injected:
            _mark.expecting.pop(id(container), None)
        if self._waiting:
            self._guarded("end of the request", self._settle, error, scope)
        self._over = True
        # The scope holds us: what may hold the scope must go.
        self.scope = self._container = self._reserved = self._closing = self.exits = None
        self._injected = ()
        if self._owed is None:
            self.context = None
            return False
        return error is None or self._started or "app" not in scope

    def _settle(self, error: BaseException | None, scope: Scope) -> None:
        reason = self._reason(error) if error is not None else self._verdict or "other"
        stopped_by, waiting = self.stopped_by, self._runs()
        self._waiting, self._twins = _NOTHING, _NO_TWINS
        owed: list[TaskRun] = []
        for run in waiting:
            same = stopped_by is not None and stopped_by.batch == run.batch
            if run.plan.run_on_error and not same and reason in _HANDLER_RAISED:
                owed.append(run)
            else:
                self._engine.never_ran(run, reason, stopped_by if same else None)
        if owed:
            # The scope keeps them, not we: who holds a run holds us, and they must be told when the request is gone.
            kept = scope[f"{_mark.KEY}.owed"] = _Owed(self._engine, owed, reason)
            self._owed = weakref.ref(kept)
            _mark.expecting[id(kept)] = self

    # --- what is to run although its handler raised

    @property
    def owed(self) -> _Owed | None:
        """The runs that wait for the error response; None where none does."""
        return None if self._owed is None else self._owed()

    async def compensate(self) -> None:
        """Run what is owed, now that the error response is out; nothing comes out of it but what is no Exception."""
        owed, self._owed = self.owed, None
        if owed is not None:
            try:
                now = _clock.monotonic()
                for run in owed.take():
                    run.origin, run.batch, run.queued_s = "run_on_error", 0, now
                    await self._compensate_by(run)
            finally:
                owed.give_up()  # nothing is left, unless this was cut off
        self.context = None

    async def _compensate_by(self, run: TaskRun) -> None:
        try:
            if run.plan.governed:
                await self._engine.governor.run(run, None, _forget)
            else:
                await self._engine.run(run)
        except Exception:
            pass  # it has been told, and the server has an error to hear of already

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


class _Owed:
    """Runs that wait for the error response; told dropped if that never comes."""

    def __init__(self, engine: Engine, runs: list[TaskRun], reason: str) -> None:
        self._engine, self._reason = engine, reason
        self._runs = sorted(runs, key=lambda run: run.priority)[::-1]  # the first is taken from the end

    def take(self) -> Iterator[TaskRun]:
        """Each of them, in the order of their priorities: nobody has to look for their error response any more."""
        _mark.expecting.pop(id(self), None)
        while self._runs:
            yield self._runs.pop()

    def give_up(self) -> None:
        """They will not run."""
        for run in self.take():
            self._engine.never_ran(run, self._reason, None)

    def __del__(self) -> None:
        self.give_up()


def _size(background: Any) -> int:
    return sum(1 for _ in _intercept.leaves(background))


async def _nothing() -> None:
    pass


def _forget(error: Exception) -> None:
    pass


def _header(name: str, value: str) -> tuple[bytes, bytes]:
    return name.lower().encode("latin-1"), value.encode("latin-1")
