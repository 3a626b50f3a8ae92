"""What a background is made of: the framework's containers and tasks, and classes and callables of the app's own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from threading import get_ident
from types import FunctionType, MemberDescriptorType
from typing import Any, TypeGuard, cast

import starlette.background
from starlette.background import BackgroundTask, BackgroundTasks
from starlette.concurrency import run_in_threadpool

from .. import _clock
from .._taskrun import current_run
from ..tasks import untraced

#: The framework's own containers, which call what they hold one after another.
_CONTAINERS = {("starlette.background", "BackgroundTasks"), ("fastapi.background", "BackgroundTasks")}


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """
    One thing that the framework calls in the background.

    Attributes:
        target: The object that is called.
        func: The function that gives the task its name and policy.
        args, kwargs: What `func` is called with.
        whole: Whether the target calls `func` in its own way, so that only the call as a whole can be observed.
        call: Calls the target as the framework would, and returns what `func` returned where that can be seen.
    """

    target: object
    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, object]
    whole: bool
    call: Callable[[], Awaitable[object]]

    def named_by(self, func: object) -> Work:
        """The same work under the name and policy of another function."""
        return replace(self, func=untraced(func), whole=False)


class BareCallable(BackgroundTask):
    """Stands in for a background that is some other awaitable callable while its response is sent."""

    def __init__(self, func: Callable[[], Awaitable[object]]) -> None:
        self.bare = func
        self._users = 0  # requests that send the response now

    async def __call__(self) -> None:
        """Await it, as the response would."""
        await self.bare()

    @classmethod
    def stand_in(cls, response: Any, background: object) -> BareCallable | None:
        """
        Take the place of such a background in its response; None if this is another one, or cannot be replaced.

        Several requests may send one response at the same time: they share the stand-in, and the last one removes it.
        """
        if isinstance(background, BareCallable):
            bare = background
        elif background is None or isinstance(background, BackgroundTask) or not callable(background):
            return None
        else:
            bare = cls(background)
            try:
                response.background = bare
            except AttributeError:
                return None
        bare._users += 1
        return bare

    def leave(self, response: Any) -> None:
        """A request has sent the response."""
        self._users -= 1
        if not self._users and background_of(response)[0] is self:
            response.background = self.bare


def work_of(target: object) -> Work:
    """A task as work; a user's container or task class is called as a whole."""
    if isinstance(target, BareCallable):
        return Work(target, target.bare, (), {}, True, target)
    if not isinstance(target, BackgroundTask):
        # The response is about to call it, even if it cannot be called.
        return Work(target, target, (), {}, True, cast(Callable[[], Awaitable[object]], target))
    if owner_of_call(type(target)) is not BackgroundTask:
        return Work(target, type(target), (), {}, True, target)
    # Where another library has wrapped `BackgroundTask.__call__`, the call goes through it, and its result is not seen.
    is_wrapped = not is_starlettes(getattr(BackgroundTask.__call__, "__wrapped__", BackgroundTask.__call__))
    call = cast(Callable[[], Awaitable[object]], target) if is_wrapped else partial(call_function, target)
    # A policy may need the function itself, in a thread or a process of ours; else the call goes through the tracer.
    return Work(target, untraced(target.func), target.args, target.kwargs, False, call)


def is_container(value: object) -> TypeGuard[BackgroundTasks]:
    """Whether this is a container whose tasks are run by the framework's own loop."""
    if not isinstance(value, BackgroundTasks):
        return False
    owner = owner_of_call(type(value))
    return (owner.__module__, owner.__name__) in _CONTAINERS


def leaves(background: object) -> list[object]:
    """The tasks inside a background: a framework's container is its leaves, anything else is one."""
    return [leaf for task in background.tasks for leaf in leaves(task)] if is_container(background) else [background]


def sort_by_priority(container: BackgroundTasks, priority_of: Callable[[object], int]) -> int:
    """
    Put a container's tasks into the order of their priorities, in place, because it may still grow; nested ones, too.

    Returns the smallest priority in it.
    """
    priorities = [
        sort_by_priority(task, priority_of) if is_container(task) else priority_of(task) for task in container.tasks
    ]
    if priorities != sorted(priorities) and isinstance(container.tasks, list):
        order = sorted(range(len(priorities)), key=priorities.__getitem__)
        container.tasks[:] = [container.tasks[at] for at in order]
    return min(priorities, default=0)


def background_of(response: object) -> tuple[object, bool]:
    """
    The background that a response carries, and whether its class computes it.

    A computed one is not read: the response reads it again later and may then get another object.
    """
    declared = getattr(type(response), "background", None)
    if declared is not None and hasattr(declared, "__get__") and not isinstance(declared, MemberDescriptorType):
        return None, True
    return getattr(response, "background", None), False


async def call_function(task: BackgroundTask) -> object:
    """Call a task's function as Starlette does, and return its result."""
    if task.is_async:
        return await task.func(*task.args, **task.kwargs)
    return await run_in_threadpool(_call_in_thread, task)


def is_starlettes(function: object) -> bool:
    """Whether a function is defined in Starlette's module of background tasks, rather than wrapped around it."""
    return isinstance(function, FunctionType) and function.__code__.co_filename == starlette.background.__file__


def _call_in_thread(task: BackgroundTask) -> object:
    run = current_run()
    if run is not None and run.target is task:
        run.thread_s, run.thread = _clock.monotonic(), get_ident()
    try:
        return task.func(*task.args, **task.kwargs)
    finally:
        if run is not None:
            run.thread = None


def owner_of_call(kind: type) -> type:
    """The class whose `__call__` the instances of a class have."""
    for owner in kind.__mro__:
        if "__call__" in vars(owner):
            return owner
    raise TypeError(f"{kind!r} has no __call__")
