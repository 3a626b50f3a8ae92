"""A function in a worker process, for work that keeps a processor busy."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from typing import Any

import anyio
import anyio.to_process

from ..errors import NotSerializable
from ..events import TaskRun
from ..policies import is_async, without_options


class Process:
    """Calls a run's function in one of anyio's worker processes; to cancel it kills that process."""

    async def __call__(self, run: TaskRun) -> Any:
        """Call it, and wait for a free process first."""
        return await anyio.to_process.run_sync(packed(run.target), cancellable=True)


def packed(target: Any) -> Callable[[], Any]:
    """What is sent to the process."""
    call = functools.partial(without_options(target.func), *target.args, **target.kwargs)
    return functools.partial(_run, call) if is_async(call) else call


def _run(call: Callable[[], Any]) -> Any:
    return anyio.run(call)


def check(target: Any, task: str) -> None:
    """
    Refuse what cannot be sent to a process, when it is scheduled.

    Raises:
        NotSerializable: The function or an argument cannot be pickled; the message names it, never its value.
    """
    try:
        pickle.dumps(packed(target))
        return
    except Exception as error:
        cause = error
    parts = [("the function", without_options(target.func))]
    parts += [(f"argument {number}", value) for number, value in enumerate(target.args, 1)]
    parts += [(f"argument {name!r}", value) for name, value in target.kwargs.items()]
    culprit = next((f"{name} ({type(value).__name__})" for name, value in parts if not _pickles(value)), "the call")
    raise NotSerializable(
        f"task {task} has executor='process', and {culprit} cannot be pickled: {type(cause).__name__}; "
        f"pass plain data, and a function that stands in a module"
    ) from None


def _pickles(value: Any) -> bool:
    try:
        pickle.dumps(value)
    except Exception:
        return False
    return True
