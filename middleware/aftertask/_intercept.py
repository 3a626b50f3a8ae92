"""
How Starlette and FastAPI run background tasks, and where we step in. The only module that knows.

A background task hangs on a response, which never crosses the ASGI boundary; so the middleware marks the ASGI scope,
and four hooks on Starlette's classes, set once per process when the first middleware is built, do nothing but for a
scope with our mark:

1. `Response.background`, a data descriptor: the response's own code, serving a marked scope, gets something to await
   that runs the background through us. Everybody else gets the object that was put there.
2. `BackgroundTask.__call__`: tasks that user code runs inside a task, and responses that the descriptor does not reach.
3. `BackgroundTasks.__init__`: finds the container that FastAPI injects into a request.
4. `BackgroundTasks.add_task`: a task added to such a container is scheduled.

No context variable decides whose a task is: under uvicorn a context leaks into the next request of its connection
(CPython #140947), and the tasks of an app that has no middleware would be taken.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Awaitable, Callable, Collection, Iterator, MutableMapping
from types import FrameType, FunctionType
from typing import Any, Protocol, cast

from starlette.background import BackgroundTask, BackgroundTasks
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from . import _clock
from .events import TaskRun, current_run

KEY = "aftertask"

#: The framework's own containers, which run what they hold one after another.
_LOOPS = {("starlette.background", "BackgroundTasks"), ("fastapi.background", "BackgroundTasks")}
_LOOPS_IN = {module for module, _ in _LOOPS}

Scope = MutableMapping[str, Any]
Loop = Callable[[Any], Awaitable[None]]


class Exchange(Protocol):
    """What the mark in a scope holds, as far as the hooks need it."""

    def serve(self, value: Any, served: Scope) -> Awaitable[None]:
        """Run a response's background."""
        ...

    def inject(self, container: BackgroundTasks, scope: Scope, exits: object) -> None:
        """FastAPI made this container for the request."""
        ...

    def add(self, container: BackgroundTasks) -> None:
        """A task was added to the injected container."""
        ...

    def adopt(self, target: BackgroundTask) -> Awaitable[None] | None:
        """User code runs an injected task itself; None where it is none of ours."""
        ...

    def nest(self, target: BackgroundTask, parent: TaskRun) -> Awaitable[None]:
        """User code runs a task inside a run."""
        ...

    def answered(self) -> None:
        """A response is served while injected tasks wait."""
        ...

    @property
    def owed(self) -> object:
        """What is to run after the error response; None where nothing is."""
        ...

    def compensate(self) -> Awaitable[None]:
        """Run it."""
        ...


#: The containers that FastAPI injected into the requests now in flight, by identity.
injected: dict[int, Exchange] = {}

#: Another one each time a background is put on a response or a run is kept, in any thread: while it is the one that a
#: request began with, there is nothing to look for in its messages.
change = object()

#: How many requests wait for their error response, to run something after it.
owing = 0

#: Whether a response was ever served that had its background from before the request: then every start is looked at.
shared = False


class _Stand:
    """In the place of a value, for framework code that looks before it calls: same class, attributes and truth."""

    __slots__ = ("_run", "_value")

    def __init__(self, value: Any, run: Callable[[Any], Awaitable[None]]) -> None:
        object.__setattr__(self, "_value", value)
        object.__setattr__(self, "_run", run)

    @property  # type: ignore[misc]  # the class of what it stands for
    def __class__(self) -> type:
        return type(self._value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._value, name)

    def __setattr__(self, name: str, new: Any) -> None:
        setattr(self._value, name, new)

    def __bool__(self) -> bool:
        return bool(self._value)


class Runner(_Stand):
    """A response's background, or one element of it: awaited by the framework, run by us."""

    __slots__ = ()

    def __call__(self) -> Awaitable[None]:
        return cast(Awaitable[None], self._run(self._value))


class View(_Stand):
    """A framework's container, for its own loop: `tasks` are runners, each made when its turn comes; it may grow."""

    __slots__ = ()

    @property
    def tasks(self) -> Iterator[Any]:
        """A runner for each element."""
        return (Runner(task, self._run) for task in self._value.tasks)


def loop_of(value: Any) -> Loop | None:
    """The framework's own loop, where `value` is its container; None where it is a task, or a user's container."""
    kind = type(value)
    if kind is BackgroundTask:
        return None
    for owner in kind.__mro__:
        if "__call__" in owner.__dict__:
            return owner.__dict__["__call__"] if (owner.__module__, owner.__name__) in _LOOPS else None
    return None


def leaves(value: Any) -> Iterator[Any]:
    """The tasks inside a background: a framework container is its leaves, anything else is one."""
    if loop_of(value) is None:
        yield value
    else:
        for element in value.tasks:
            if type(element) is BackgroundTask:
                yield element
            else:
                yield from leaves(element)


def is_shipped(loop: Loop) -> bool:
    """Whether this is the loop that the framework shipped: then running its elements one by one is the same."""
    return _shipped(loop, _LOOPS_IN)


def is_whole(target: Any) -> bool:
    """Whether this is a user's container or task class that calls its function itself: one run, whatever it does."""
    if not isinstance(target, BackgroundTask):
        return False
    owner = next(cls for cls in type(target).__mro__ if "__call__" in cls.__dict__)
    return owner is not BackgroundTask


def call(target: Any, spanned: Callable[[Any], bool] | None) -> Awaitable[Any]:
    """
    Call a task as the framework would, through whatever another library has put around it.

    `spanned` tells whether a tracer feeds the same provider as ours: then OpenTelemetry's own wrapper is left out, or
    there would be two spans for one attempt.
    """
    if type(target) is BackgroundTask:
        if BackgroundTask.__call__ is _hooked and _hooked_is_plain:
            if target.is_async:
                called: Awaitable[Any] = target.func(*target.args, **target.kwargs)  # cast() is a call
                return called
            return run_in_threadpool(_in_thread, target)
        unwrapped = getattr(BackgroundTask, "_otel_original_call", None)
        if unwrapped is not None and spanned is not None and spanned(_contrib_tracer(BackgroundTask.__call__)):
            return cast(Awaitable[Any], unwrapped(target))
    return cast(Awaitable[Any], target())


def _in_thread(target: BackgroundTask) -> Any:
    run = current_run()
    if run is not None:
        run.thread_s = _clock.monotonic()
    return target.func(*target.args, **target.kwargs)


def unhooked(target: Any) -> Awaitable[None]:
    """Call a task as if we were not there."""
    if isinstance(target, BackgroundTask) and not is_whole(target):
        return inner(target)
    return cast(Awaitable[None], target())


def inner(target: BackgroundTask, spanned: Callable[[Any], bool] | None = None) -> Awaitable[None]:
    """
    Call the function of a task, as `BackgroundTask.__call__` does without us.

    `spanned` as in `call`: OpenTelemetry's own wrapper, where it is under our hook, is left out.
    """
    unwrapped = getattr(BackgroundTask, "_otel_original_call", None)
    if unwrapped is not None and (unwrapped in _hooks or _shipped(unwrapped, _LOOPS_IN)) and spanned is not None:
        tracer = _contrib_tracer(_original)
        if tracer is not None and spanned(tracer):
            return cast(Awaitable[None], unwrapped(target))
    return cast(Awaitable[None], _original(target))


def native_tracer(scope: Scope) -> Any:
    """The tracer of FastAPI's own telemetry, where it traces this request's tasks; else None."""
    return getattr(scope.get("fastapi.telemetry"), "tracer", None)


def _contrib_tracer(wrapper: Any) -> Any:
    while wrapper is not None:
        code, cells = getattr(wrapper, "__code__", None), getattr(wrapper, "__closure__", None)
        if code is not None and cells and "tracer" in code.co_freevars:
            return cells[code.co_freevars.index("tracer")].cell_contents
        wrapper = getattr(wrapper, "__wrapped__", None)
    return None


def response_in(frame: FrameType | None, exchange: Exchange) -> tuple[Response, Scope | None] | None:
    """
    The response of this exchange whose own code is sending, up the stack from `frame`, with its scope.

    The scope is None where the response streams from a task of its own, below ASGI 2.4; what sends to us is ours then.
    """
    while frame is not None:
        code = frame.f_code
        if code.co_argcount or "self" in code.co_freevars:
            local = frame.f_locals
            thing = local.get("self", local.get(code.co_varnames[0]) if code.co_argcount else None)
            if isinstance(thing, Response):
                scope = scope_of(frame, thing)
                return None if scope is not None and scope.get(KEY) is not exchange else (thing, scope)
        frame = frame.f_back
    return None


def responses_in(error: BaseException) -> Iterator[tuple[Response, Scope]]:
    """The responses that were being served when this was raised, or what it came from."""
    seen: set[int] = set()
    chain: BaseException | None = error
    while chain is not None and id(chain) not in seen:
        seen.add(id(chain))
        trace = chain.__traceback__
        while trace is not None:
            # Not ours: reading a frame's locals keeps a copy of them in it, and ours hold the error: a cycle.
            ours = trace.tb_frame.f_globals.get("__package__") == __package__
            thing = None if ours else trace.tb_frame.f_locals.get("self")
            scope = scope_of(trace.tb_frame, thing) if isinstance(thing, Response) else None
            if scope is not None and id(thing) not in seen:
                seen.add(id(thing))
                yield cast(Response, thing), scope
            trace = trace.tb_next
        chain = chain.__cause__ or chain.__context__


def scope_of(frame: FrameType | None, response: Any) -> Scope | None:
    """The scope that the response's own code serves, in this frame or its callers; None where it is not its code."""
    for _ in range(5):
        if frame is None:
            return None
        names, local = frame.f_code.co_varnames, frame.f_locals
        own = frame.f_code.co_name == "__call__" and frame.f_code.co_argcount > 1
        if local.get("self", local.get(names[0]) if own else None) is not response:
            return None
        scope = local.get("scope", local.get(names[1]) if own else None)
        if scope is not None:
            return cast(Scope, scope)
        frame = frame.f_back
    return None


def background_of(response: Any) -> Any:
    """What was put on the response, whoever asks."""
    return None if response._aftertask_none else response.__dict__.get("background")


class _Background:
    """
    `Response.background`: a task lives in the instance's `__dict__`, as it does without us.

    None, which most responses have, is kept as an attribute of another name: Python keeps an instance whose `__dict__`
    was asked for in a slower way, and that is more than all the rest that a request without tasks costs.
    """

    def __get__(self, response: Any, owner: type) -> Any:
        if response is not None and response._aftertask_none:
            return _answered(sys._getframe(1), response) if injected or owing else None
        try:
            value = response.__dict__["background"]
        except (AttributeError, KeyError):
            name = f"type object {owner.__name__!r}" if response is None else f"{owner.__name__!r} object"
            raise AttributeError(f"{name} has no attribute 'background'") from None
        if value is None:
            return _answered(sys._getframe(1), response) if injected or owing else None
        scope = scope_of(sys._getframe(1), response)
        exchange = None if scope is None else scope.get(KEY)
        return value if exchange is None else Runner(value, functools.partial(exchange.serve, served=scope))

    def __set__(self, response: Any, value: Any) -> None:
        if value is None:
            response._aftertask_none = True
            return
        response.__dict__["background"] = value
        response._aftertask_none = False
        global change
        change = object()

    def __delete__(self, response: Any) -> None:
        held = response.__dict__.pop("background", self)
        if held is self and not response._aftertask_none:
            raise AttributeError("background")
        response._aftertask_none = False


def _getstate(response: Any) -> Any:
    """What a response is copied and pickled by: as without us, for it may be read where we are not."""
    state: Any = object.__getstate__(response)
    fields, *slots = state if isinstance(state, tuple) else (state,)  # a subclass may have slots
    fields = {**fields}
    if fields.pop("_aftertask_none", False):
        fields["background"] = None
    return (fields, *slots) if slots else fields


def _answered(frame: FrameType, response: Any) -> Any:
    """A response without a background is served: what runs after it all the same, or None."""
    scope = scope_of(frame, response)
    exchange: Exchange | None = None if scope is None else scope.get(KEY)
    if exchange is None:
        return None
    exchange.answered()
    return None if exchange.owed is None else Runner(None, lambda nothing: exchange.compensate())


def _asgi_scope(frame: FrameType | None) -> Scope | None:
    """The scope of the ASGI callable that awaits a task, seen through the task's containers."""
    while (
        frame is not None
        and frame.f_code.co_name == "__call__"
        and isinstance(frame.f_locals.get("self"), BackgroundTask)
    ):
        frame = frame.f_back
    scope = frame.f_locals.get("scope") if frame is not None else None
    return scope if isinstance(scope, dict) else None


def _hook_call(original: Callable[[Any], Awaitable[None]]) -> Any:
    @functools.wraps(original)
    async def __call__(self: BackgroundTask) -> None:
        run = current_run()
        if run is not None and run.target is self and not run.plan.whole:
            return await original(self)
        scope = _asgi_scope(sys._getframe(1))
        exchange: Exchange | None = None if scope is None else scope.get(KEY)
        if scope is not None and (run is None or cast(Any, run.request) is not exchange):
            # An ASGI callable serves a background: ours if marked, another app's if not.
            return await (original(self) if exchange is None else exchange.serve(self, scope))
        if run is not None and run.outcome is None:
            return await cast(Exchange, run.request).nest(self, run)
        for waiting in list(injected.values()):
            adopted = waiting.adopt(self)
            if adopted is not None:
                return await adopted
        return await original(self)

    return __call__


def _hook_init(original: Callable[..., None]) -> Any:
    @functools.wraps(original)
    def __init__(self: BackgroundTasks, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        frame = sys._getframe(1)
        if frame.f_code.co_name == "solve_dependencies":
            local = frame.f_locals
            scope = getattr(local.get("request"), "scope", None)
            exchange = scope.get(KEY) if isinstance(scope, dict) else None
            if exchange is not None:
                exchange.inject(self, scope, local.get("async_exit_stack"))

    return __init__


def _hook_add_task(original: Callable[..., None]) -> Any:
    @functools.wraps(original)
    def add_task(self: BackgroundTasks, func: Any, *args: Any, **kwargs: Any) -> None:
        original(self, func, *args, **kwargs)
        exchange = injected.get(id(self))
        if exchange is not None:
            exchange.add(self)

    return add_task


_hooked: Any = None
_original: Any = None
_hooked_is_plain = False
#: Every hook that was ever set, with what it was set around.
_hooks: dict[Any, Any] = {}


def install() -> None:
    """
    Set the hooks, once per process. They stay: another library may have wrapped ours since, and would be undone.

    Only `BackgroundTask.__call__` is looked at again with each batch, because of OpenTelemetry's FastAPI package: put
    around our hook its span would come before ours, so we go around it; taken away, it puts back what it once found.
    """
    global _hooked, _original, _hooked_is_plain
    first, found = _hooked is None, BackgroundTask.__call__
    if found is _hooked:
        return
    is_around_ours = getattr(BackgroundTask, "_otel_original_call", None) in _hooks
    if found not in _hooks and (first or found is _original or _shipped(found, _LOOPS_IN) or is_around_ours):
        hook = _hook_call(found)
        _hooks[hook] = found
        BackgroundTask.__call__ = found = hook  # type: ignore[method-assign]  # the hook
    if found in _hooks:
        _hooked, _original = found, _hooks[found]
        _hooked_is_plain = _shipped(_original, _LOOPS_IN)
    if not first:
        return
    BackgroundTasks.__init__ = _hook_init(BackgroundTasks.__init__)  # type: ignore[method-assign]  # the hook
    BackgroundTasks.add_task = _hook_add_task(BackgroundTasks.add_task)  # type: ignore[method-assign]  # the hook
    Response._aftertask_none = False  # type: ignore[attr-defined]  # the hook's own
    Response.__getstate__ = _getstate  # type: ignore[method-assign, assignment]  # goes with it
    Response.background = _Background()  # type: ignore[assignment]  # the hook


def _shipped(function: Any, modules: Collection[str]) -> bool:
    """Whether it is the framework's own function and nobody's wrapper, which may pass for it in name."""
    return type(function) is FunctionType and function.__globals__.get("__name__") in modules
