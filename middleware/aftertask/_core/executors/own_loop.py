"""A function called in this thread; an async one on the thread's own event loop, so that clients outlive a run."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Mapping
from contextvars import copy_context
from typing import cast

from ..._taskrun import current_run
from ...tasks import is_async

_here = threading.local()


def call_here(function: Callable[..., object], args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
    """Call a function to its end; where the call is interrupted by a signal handler, its coroutine is cancelled."""
    if not is_async(function):
        return function(*args, **kwargs)

    async def call() -> object:
        return await cast(Awaitable[object], function(*args, **kwargs))

    coroutine = call()
    run, loop = current_run(), _loop()
    if run is not None:
        run.coroutine = coroutine  # shows where it is in a report
    task = loop.create_task(coroutine, context=copy_context())
    try:
        return loop.run_until_complete(task)
    except BaseException:
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                loop.run_until_complete(task)
        raise


def _loop() -> asyncio.AbstractEventLoop:
    if not hasattr(_here, "runner"):
        _here.runner = asyncio.Runner()
    loop: asyncio.AbstractEventLoop = _here.runner.get_loop()
    return loop
