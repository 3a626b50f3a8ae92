"""`observe_functions`: the functions that a container class of the app's own keeps and calls are child runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from .._taskrun import current_run
from ..tasks import is_async
from .background import Work
from .request import Request
from .serve import run_child, run_child_sync

C = TypeVar("C", bound=type)


def observe_functions(container_class: C) -> C:
    """
    Make each function that this container class stores by `add_task` and calls itself a child run.

    For a class that keeps functions in a queue of its own; without this, the container as a whole is one run. A
    function stays sync or async, and outside of a run it is only called. Returns the class, so that it can be used as a
    decorator.

    Raises:
        TypeError: The class has no `add_task`.
    """
    add: Callable[..., Any] | None = getattr(container_class, "add_task", None)
    if not isinstance(container_class, type) or add is None:
        raise TypeError(f"observe_functions() takes a container class with an add_task method, got {container_class!r}")

    @functools.wraps(add)
    def add_task(self: Any, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return add(self, _observed(func), *args, **kwargs)

    container_class.add_task = add_task  # type: ignore[attr-defined]  # it has one, as checked above
    return container_class


def _observed(func: Callable[..., Any]) -> Callable[..., Any]:
    work = functools.partial(Work, None, func, (), {}, False)
    if is_async(func):

        async def observed_async(*args: Any, **kwargs: Any) -> Any:
            run, call = current_run(), functools.partial(func, *args, **kwargs)
            if run is None or not isinstance(run.request, Request):
                return await call()
            return await run_child(run.request, work(call), run, call)

        return _named(observed_async, func)

    def observed(*args: Any, **kwargs: Any) -> Any:
        run, call = current_run(), functools.partial(func, *args, **kwargs)
        if run is None or not isinstance(run.request, Request):
            return call()
        return run_child_sync(run.request, work(call), run, call)

    return _named(observed, func)


def _named(wrapper: Callable[..., Any], func: Callable[..., Any]) -> Callable[..., Any]:
    try:
        return functools.wraps(func)(wrapper)
    except (AttributeError, TypeError):  # a callable that hides its attributes
        return wrapper
