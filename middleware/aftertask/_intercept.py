"""
How Starlette and FastAPI run background tasks, and where we step in. With `_responses`, the only one that knows.

A background task hangs on a response, which never crosses the ASGI boundary; so the middleware marks the ASGI scope,
and four hooks on Starlette's classes, set once per process when the first middleware is built, do nothing but for a
scope with our mark:

1. `__call__` of the response classes (`_responses`): a response awaits its background through us.
2. `BackgroundTask.__call__`: tasks that user code runs inside a task, and what serves a background and is no response.
3. `BackgroundTasks.__init__`: finds the container that FastAPI injects into a request.
4. `BackgroundTasks.add_task`: a task added to such a container is scheduled.

No context variable decides whose a task is: under uvicorn a context leaks into the next request of its connection
(CPython #140947), and the tasks of an app that has no middleware would be taken.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, cast

from starlette.background import BackgroundTask, BackgroundTasks
from starlette.concurrency import run_in_threadpool

from . import _clock
from ._mark import Exchange, Scope, asgi_scope, exchange_of, expecting
from ._responses import hook_responses, plain, shipped
from .events import current_run

#: The framework's own containers, which run what they hold one after another.
_LOOPS = {("starlette.background", "BackgroundTasks"), ("fastapi.background", "BackgroundTasks")}
_LOOPS_IN = {module for module, _ in _LOOPS}

Loop = Callable[[Any], Awaitable[None]]


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
                yield from leaves(plain(element))


def is_shipped(loop: Loop) -> bool:
    """Whether this is the loop that the framework shipped: then running its elements one by one is the same."""
    return shipped(loop, _LOOPS_IN)


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
    if unwrapped is not None and (unwrapped in _hooks or shipped(unwrapped, _LOOPS_IN)) and spanned is not None:
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


def _hook_call(original: Callable[[Any], Awaitable[None]]) -> Any:
    @functools.wraps(original)
    async def __call__(self: BackgroundTask) -> None:
        run = current_run()
        if run is not None and run.target is self and not run.plan.whole:
            return await original(self)
        scope = asgi_scope(sys._getframe(1))
        exchange = None if scope is None else exchange_of(scope)
        if scope is not None and (run is None or cast(Any, run.request) is not exchange):
            # An ASGI callable serves a background: ours if marked, another app's if not.
            return await (original(self) if exchange is None else exchange.serve(self, scope))
        if run is not None and run.outcome is None:
            return await cast(Exchange, run.request).nest(self, run)
        for waiting in list(expecting.values()):
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
            scope: Any = getattr(local.get("request"), "scope", None)
            exchange = exchange_of(scope) if isinstance(scope, dict) else None
            if exchange is not None:
                exchange.inject(self, scope, local.get("async_exit_stack"))

    return __init__


def _hook_add_task(original: Callable[..., None]) -> Any:
    @functools.wraps(original)
    def add_task(self: BackgroundTasks, func: Any, *args: Any, **kwargs: Any) -> None:
        original(self, plain(func), *args, **kwargs)
        exchange = expecting.get(id(self))
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
    if found not in _hooks and (first or found is _original or shipped(found, _LOOPS_IN) or is_around_ours):
        hook = _hook_call(found)
        _hooks[hook] = found
        BackgroundTask.__call__ = found = hook  # type: ignore[method-assign]  # the hook
    if found in _hooks:
        _hooked, _original = found, _hooks[found]
        _hooked_is_plain = shipped(_original, _LOOPS_IN)
    if not first:
        return
    BackgroundTasks.__init__ = _hook_init(BackgroundTasks.__init__)  # type: ignore[method-assign]  # the hook
    BackgroundTasks.add_task = _hook_add_task(BackgroundTasks.add_task)  # type: ignore[method-assign]  # the hook
    hook_responses()
