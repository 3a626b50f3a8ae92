"""
The only module that patches Starlette and FastAPI.

Patched, by ordinary wrappers that stay for the life of the process:

1. `Response.__call__`, and that of each subclass which defines one: it has the ASGI scope as an argument, so it finds
   the request's record there and schedules the runs of the background that the response carries.
2. `BackgroundTask.__call__`, and that of each subclass which defines one: a task that the response being sent carries
   is run by the record; a task that is called inside a run is its child; any other is left alone.
3. `BackgroundTasks.__init__` and `add_task`: a task added to the container that FastAPI injects is scheduled at once.

Every hook fails open: an error of ours is logged and counted, and the original is called.
"""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from collections.abc import Awaitable, Callable, Iterator, Mapping
from types import FunctionType
from typing import Any

from starlette.background import BackgroundTask, BackgroundTasks
from starlette.responses import Response

from .._log import log
from .._taskrun import TaskRun, current_run
from .background import (
    BareCallable,
    Work,
    background_of,
    call_function,
    is_container,
    is_starlettes,
    owner_of_call,
    work_of,
)
from .dependencies import references
from .owed import OWED, Owed
from .request import Request
from .schedule import REFUSALS
from .serve import OutsideOfAnyRequest, Serving, run_child, serving_here

#: `BackgroundTask.__call__`, or what another library has put around it.
TaskCall = Callable[[Any], Awaitable[None]]

#: Where the ASGI scope holds the request's record.
KEY = "aftertask"

#: The request that FastAPI injected a container into.
_injected: weakref.WeakKeyDictionary[BackgroundTasks, Request] = weakref.WeakKeyDictionary()


# --- 1. responses


def _hook_response(owner: type, original: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    @functools.wraps(original)
    async def __call__(self: Response, *args: Any, **kwargs: Any) -> None:
        scope: Any = args[0] if args else _scope_among(kwargs)
        request = scope.get(KEY) if isinstance(scope, dict) else None
        if request is None:
            # Not ours: maybe another app's response, in a request that one of our tasks makes in this process.
            with OutsideOfAnyRequest():
                await original(self, *args, **kwargs)
            return
        serving, outer = Serving(request, self), serving_here.get()
        serving_here.set(serving)
        request.guarded("response", _respond, serving, scope)
        try:
            await original(self, *args, **kwargs)
        finally:
            serving_here.set(outer)
            request.guarded("end of the response", serving.leave, sys.exception())
        owed = scope.get(OWED)
        if isinstance(owed, Owed) and request.is_closed:  # this was the error response
            await request.compensate(owed)

    return __call__


def _respond(serving: Serving, scope: dict[str, Any]) -> None:
    request, response = serving.request, serving.response
    if request.solved:  # the endpoint has returned: FastAPI has let go of what its dependencies gave
        request.dependencies, request.solved = references(request.solved), None
    background, serving.computed = background_of(response)
    serving.bare = BareCallable.stand_in(response, background)
    if background is not None or request.waiting or request.is_closed:
        _keep_outermost()
        request.respond(serving.bare or background, scope)


def _scope_among(kwargs: Mapping[str, object]) -> object:
    """The ASGI scope of a call by keyword, whatever its parameters are called."""
    return next((value for value in kwargs.values() if isinstance(value, dict)), None)


# --- 2. tasks


def _hook_task(owner: type, original: TaskCall) -> TaskCall:
    @functools.wraps(original)
    async def __call__(self: BackgroundTask) -> None:
        run, serving = current_run(), serving_here.get()
        if run is not None:
            await _call_in_run(owner, original, self, run)
        elif serving is not None and (serving.batch or serving.request.guarded("task", serving.carries, self)):
            await serving.run(self, functools.partial(_call_unobserved, original, self, serving.request))
        else:
            await original(self)

    return __call__


async def _call_in_run(owner: type, original: TaskCall, task: BackgroundTask, run: TaskRun) -> None:
    """A task is called inside a run: it is the run's own, or a child of it."""
    is_outermost = owner is owner_of_call(type(task))
    if run.target is task and is_outermost:
        await _call_through(original, task, run)
    elif isinstance(task, BackgroundTasks) and (is_container(task) or not is_outermost):
        await original(task)  # whose tasks come back here one by one
    elif isinstance(run.request, Request):
        # Also for a task class of the user's that calls `super().__call__()`: its function is the child.
        await run_child(run.request, _child_work(task), run, functools.partial(_call_through, original, task, run))
    else:
        await original(task)


def _child_work(task: BackgroundTask) -> Work:
    """A task that user code calls: named by its function."""
    func = vars(task).get("func")
    return work_of(task) if func is None else work_of(task).named_by(func)


async def _call_unobserved(original: TaskCall, task: BackgroundTask, request: Request) -> None:
    """
    Call a task that is not observed, or a framework's container, which runs by its own loop.

    FastAPI's loop makes a span for each task. Where that span would go where ours goes, Starlette's loop, which makes
    none, takes its place.
    """
    tracer = getattr((request.scope or {}).get("fastapi.telemetry"), "tracer", None)
    if tracer is not None and is_container(task) and request.same_provider(tracer):
        for each in task.tasks:  # it may grow
            await each()
    else:
        await original(task)


async def _call_through(original: TaskCall, task: BackgroundTask, run: TaskRun) -> None:
    """Call what was there before the hook; OpenTelemetry's own span is left out where it would double ours."""
    request = run.request
    tracer = _opentelemetrys_tracer(original)
    is_doubled = isinstance(request, Request) and tracer is not None and request.same_provider(tracer)
    if is_doubled and run.info.trace != "none":
        await call_function(task)
    else:
        await original(task)


def _opentelemetrys_tracer(function: object) -> object:
    """
    The tracer of OpenTelemetry's FastAPI instrumentation, if it has wrapped `BackgroundTask.__call__`; else None.

    It keeps what it wrapped under a name of its own, and its tracer in the wrapper's closure.
    """
    if not isinstance(function, FunctionType) or not hasattr(BackgroundTask, "_otel_original_call"):
        return None
    return inspect.getclosurevars(function).nonlocals.get("tracer")


# --- 3. the container that FastAPI injects


def _hook_init(owner: type, original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: BackgroundTasks, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        request = _request_injected_into()
        if request is not None:
            request.guarded("injection", _inject, request, self)

    return __init__


def _request_injected_into() -> Request | None:
    """
    The request for which FastAPI creates a container right now.

    The one look at another library's frame: FastAPI offers no other way to learn this. Its `solve_dependencies` calls
    the constructor that calls us; where that changes, the self-check at install notices.
    """
    caller = sys._getframe(2)
    if caller.f_code.co_name != "solve_dependencies":
        return None
    variables = caller.f_locals
    scope = getattr(variables.get("request"), "scope", None)
    request = scope.get(KEY) if isinstance(scope, dict) else None
    if not isinstance(request, Request) or request.is_closed:
        return None
    request.solved = variables.get("dependency_cache")
    return request


def _inject(request: Request, container: BackgroundTasks) -> None:
    _keep_outermost()
    request.containers[id(container)] = container
    _injected[container] = request


def _hook_add_task(owner: type, original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def add_task(self: BackgroundTasks, *args: Any, **kwargs: Any) -> None:
        request = _request_of(self)
        if request is None:
            return original(self, *args, **kwargs)
        with request.adding:
            original(self, *args, **kwargs)
            try:
                request.add(self, work_of(self.tasks[-1]))
            except REFUSALS:
                self.tasks.pop()  # the caller gets the error, and the task is as if it had not been added
                raise
            except Exception as error:
                request.broken("add_task", error)

    return add_task


def _request_of(container: BackgroundTasks) -> Request | None:
    """The request that an injected container belongs to."""
    try:
        return _injected.get(container)
    except TypeError:  # a subclass without a hash: none of FastAPI's
        return None


# --- install


Hook = Callable[[type, Any], Any]


def _as_method(function: Any) -> Any:
    """A function that takes `self` first: the wrappers of wrapt, which tracers use, work only when they are bound."""
    if type(function) is FunctionType:
        return function

    @functools.wraps(function)
    def method(self: object, *args: Any, **kwargs: Any) -> Any:
        return function.__get__(self, type(self))(*args, **kwargs)

    return method


class _Installed:
    """What has been patched, and how to undo it."""

    def __init__(self) -> None:
        self.undo: list[Callable[[], None]] = []
        self.hooks: set[object] = set()

    def patch(self, owner: type, name: str, hook: Hook) -> None:
        original = vars(owner).get(name)
        if not isinstance(original, FunctionType) or original in self.hooks:
            return
        hooked = hook(owner, _as_method(original))
        self.hooks.add(hooked)
        setattr(owner, name, hooked)
        self.undo.append(lambda: setattr(owner, name, original))

    def patch_tree(self, root: type, hook: Hook) -> None:
        """Patch `__call__` of a class and of its subclasses."""
        for owner in _tree(root):
            self.patch(owner, "__call__", hook)

    def patch_future(self, root: Any, hook: Hook) -> None:
        """Patch `__call__` of the subclasses that are still to come."""
        if "__init_subclass__" in vars(root):  # a Starlette that has one of its own: the self-check reports it
            return

        def __init_subclass__(cls: Any, /, **kwargs: Any) -> None:
            super(root, cls).__init_subclass__(**kwargs)
            self.patch(cls, "__call__", hook)

        self.hooks.add(__init_subclass__)
        root.__init_subclass__ = classmethod(__init_subclass__)
        self.undo.append(lambda: delattr(root, "__init_subclass__"))


_installed: _Installed | None = None


def install() -> None:
    """Set the hooks, once per process, and check what they see."""
    global _installed
    is_first, _installed = _installed is None, _installed or _Installed()
    for root, hook in ((Response, _hook_response), (BackgroundTask, _hook_task)):
        _installed.patch_tree(root, hook)
        _installed.patch_future(root, hook)
    if not is_first:
        return
    _installed.patch(BackgroundTasks, "__init__", _hook_init)
    _installed.patch(BackgroundTasks, "add_task", _hook_add_task)  # which FastAPI's own calls
    missing = list(_check(_installed))
    if missing:
        unseen = dict(missing)
        log("error", "hooks.incomplete", missing=list(unseen), not_seen=sorted(set(unseen.values())))


def uninstall() -> None:
    """Undo every patch, in reverse order; for tests."""
    global _installed
    if _installed is not None:
        for undo in reversed(_installed.undo):
            undo()
    _installed = None


def _tree(root: type) -> Iterator[type]:
    yield root
    subclasses: list[type] = root.__subclasses__()
    for subclass in subclasses:
        yield from _tree(subclass)


def _check(installed: _Installed) -> Iterator[tuple[str, str]]:
    """What is not hooked, and what is not seen because of it."""
    for owner, name, unseen in (
        (Response, "__call__", "tasks that a response carries"),
        (BackgroundTask, "__call__", "every background task"),
        (BackgroundTasks, "__call__", "tasks in a BackgroundTasks container"),
        (BackgroundTasks, "__init__", "tasks in a container that FastAPI injects, until the response is sent"),
        (BackgroundTasks, "add_task", "tasks in a container that FastAPI injects, until the response is sent"),
    ):
        if vars(owner).get(name) not in installed.hooks:
            yield f"{owner.__module__}.{owner.__qualname__}.{name}", unseen
    for root in (Response, BackgroundTask):
        found = vars(root).get("__init_subclass__")
        if not isinstance(found, classmethod) or found.__func__ not in installed.hooks:
            yield f"{root.__qualname__}.__init_subclass__", "classes of your own that are defined after start-up"
    utils = sys.modules.get("fastapi.dependencies.utils")
    if utils is not None:
        solve = getattr(utils, "solve_dependencies", None)
        names = inspect.signature(solve).parameters if callable(solve) else {}
        if "request" not in names:
            yield "fastapi.dependencies.utils.solve_dependencies", "tasks in an injected container that never ran"
        if "dependency_cache" not in names:
            yield "solve_dependencies(dependency_cache=…)", "transactions that are open when a task runs"


def _keep_outermost() -> None:
    """
    Set the hook of `BackgroundTask.__call__` again if OpenTelemetry's instrumentation has covered or removed it.

    Under its wrapper our span would be a child of its span, and one task would have two. When it is switched off it
    puts back what it found, which may be Starlette's own.
    """
    current = vars(BackgroundTask)["__call__"]
    if _installed is None or current in _installed.hooks:
        return
    if is_starlettes(current) or _opentelemetrys_tracer(current) is not None:
        _installed.patch(BackgroundTask, "__call__", _hook_task)
