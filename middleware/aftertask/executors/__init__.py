"""Where a task's function is called: on the event loop as Starlette does, in a thread of ours, in a process."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, Protocol

from ..events import TaskRun

__all__ = ["Executor"]


class Executor(Protocol):
    """Calls a run's function once; what that returns or raises comes out."""

    def __call__(self, run: TaskRun, /) -> Awaitable[Any]: ...
