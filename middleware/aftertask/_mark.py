"""Whose request it is: the mark that the middleware puts into the ASGI scope, and how the hooks find it."""

from __future__ import annotations

from collections.abc import Awaitable, MutableMapping
from types import FrameType
from typing import Any, Protocol

from starlette.background import BackgroundTask, BackgroundTasks
from starlette.responses import Response

from .events import TaskRun

Scope = MutableMapping[str, Any]

KEY = "aftertask"

#: A marked scope holds a list under `KEY`: most requests have no task, and nothing is made faster than a list. Its
#: exchange, None until somebody wants it; the middleware, which makes it; and while the request lasts, what it came
#: with: the context variables, and the `send` by which its messages go out (`_messages`). That is nothing (an empty
#: tuple) as soon as the exchange has it: so one look at it tells whether there is an exchange.
EXCHANGE, MIDDLEWARE, CAME_WITH = range(3)


class Exchange(Protocol):
    """One request and its response, as far as the hooks need it."""

    def answer(self, response: Response, scope: Scope) -> Any:
        """A response is served; returns what is to be called in its place."""
        ...

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

    @property
    def owed(self) -> object:
        """What is to run after the error response; None where nothing is."""
        ...

    def compensate(self) -> Awaitable[None]:
        """Run it."""
        ...


#: The requests whose responses are looked at even where they have no background: by the identity of the container that
#: FastAPI injected, or of what is owed once an error response is out.
expecting: dict[int, Exchange] = {}


def is_known(scope: Scope) -> bool:
    """Whether this scope belongs to a request that has an exchange already."""
    mark = scope.get(KEY)
    return mark is not None and mark[EXCHANGE] is not None


def exchange_of(scope: Scope) -> Exchange | None:
    """The request that this scope belongs to; None where it has no mark."""
    mark = scope.get(KEY)
    if mark is None:
        return None
    exchange: Exchange | None = mark[EXCHANGE]
    if exchange is None:
        lasts = len(mark) > CAME_WITH
        exchange = mark[EXCHANGE] = mark[MIDDLEWARE].exchange(mark[CAME_WITH] if lasts else None)
        if lasts:
            mark[CAME_WITH] = ()
    return exchange


def asgi_scope(frame: FrameType | None) -> Scope | None:
    """The scope of the ASGI callable that awaits a task, seen through the task's containers."""
    while (
        frame is not None
        and frame.f_code.co_name == "__call__"
        and isinstance(frame.f_locals.get("self"), BackgroundTask)
    ):
        frame = frame.f_back
    scope = frame.f_locals.get("scope") if frame is not None else None
    return scope if isinstance(scope, dict) else None
