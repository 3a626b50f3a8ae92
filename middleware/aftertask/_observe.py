"""For a container of the user's own that stores bare functions and runs them itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

from ._exchange import Exchange
from .events import TaskRun, current_run
from .policies import is_async

C = TypeVar("C", bound=type)


def observe_functions(container: C) -> C:
    """
    Make each function that this container class stores by `add_task` and runs itself a child run.

    For a class that keeps functions in a queue of its own: without this, the container as a whole is one run. Each
    function is wrapped when it is added and stays sync or async as it was; called outside of a run it is only called.
    Returns the class, so it can be used as a decorator.

    Raises:
        TypeError: The class has no `add_task`.
    """
    add: Callable[..., Any] | None = getattr(container, "add_task", None)
    if not isinstance(container, type) or add is None:
        raise TypeError(f"observe_functions() takes a container class with an add_task method, got {container!r}")

    @functools.wraps(add)
    def add_task(self: Any, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return add(self, _watched(func), *args, **kwargs)

    container.add_task = add_task  # type: ignore[attr-defined]  # it has one, as checked above
    return container


def _watched(func: Callable[..., Any]) -> Callable[..., Any]:
    if is_async(func):

        async def seen_async(*args: Any, **kwargs: Any) -> Any:
            parent = _running()
            if parent is None:
                return await func(*args, **kwargs)
            return await cast(Exchange, parent.request).child(func, parent, functools.partial(func, *args, **kwargs))

        return _named(seen_async, func)

    def seen(*args: Any, **kwargs: Any) -> Any:
        parent = _running()
        if parent is None:
            return func(*args, **kwargs)
        return cast(Exchange, parent.request).child_sync(func, parent, functools.partial(func, *args, **kwargs))

    return _named(seen, func)


def _running() -> TaskRun | None:
    run = current_run()
    return run if run is not None and run.outcome is None else None


def _named(wrapper: Callable[..., Any], func: Callable[..., Any]) -> Callable[..., Any]:
    try:
        return functools.wraps(func)(wrapper)
    except (AttributeError, TypeError):
        return wrapper
