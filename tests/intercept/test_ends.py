"""The end of a task that ends itself, of one that comes too late, and of those whose handler failed."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from fastapi import BackgroundTasks as Injected
from fastapi import Depends
from starlette.background import BackgroundTask, BackgroundTasks

from aftertask.events import Dropped, Failed, Skipped
from kit import LOG, Env, af, answering, drive, sf, tasks_come_first

pytestmark = pytest.mark.anyio

on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio"])

#: Since this version tasks run before the code after a dependency's `yield`.


# --- a task's own BaseException


async def gives_up() -> None:
    """A task that awaits something which was cancelled: a connection pool, a client's inner task."""
    shared = asyncio.create_task(asyncio.sleep(0))
    shared.cancel()
    await shared


async def exits() -> None:
    """The `main` of a command-line tool."""
    sys.exit(2)


def exits_in_thread() -> None:
    """The same as a sync function."""
    sys.exit(2)


@on_asyncio
@pytest.mark.parametrize(
    ("task", "error", "kind"),
    [
        (gives_up, asyncio.CancelledError, "asyncio.exceptions.CancelledError"),
        (exits, SystemExit, "SystemExit"),
        (exits_in_thread, SystemExit, "SystemExit"),
    ],
)
async def test_a_task_that_cancels_itself_or_exits_has_failed(
    env: Env, task: Any, error: type[BaseException], kind: str
) -> None:
    """Its own CancelledError or SystemExit is a bad failure with class and stack, and comes out as it is."""
    app = env.app(answering(BackgroundTasks([BackgroundTask(task), BackgroundTask(sf)])))
    with pytest.raises(error) as raised:
        await drive(app)
    assert env.outcomes() == [(task.__name__, "failed"), ("sf", "skipped sibling_failed")]
    (failed,), (skipped,) = env.seen.of(Failed), env.seen.of(Skipped)
    assert failed.error is raised.value
    assert failed.bad and not failed.expected
    assert failed.failure.type == kind
    assert f"in {task.__name__}" in failed.failure.stack
    assert skipped.caused_by is failed.run


@on_asyncio
async def test_a_task_that_cancels_itself_is_contained(env: Env) -> None:
    """Under `contain` its siblings run and nothing comes out, as for any other failure."""
    env.settings |= {"on_failure": "contain"}
    app = env.app(answering(BackgroundTasks([BackgroundTask(gives_up), BackgroundTask(sf)])))
    assert (await drive(app)).exc is None
    assert env.outcomes() == [("gives_up", "failed"), ("sf", "succeeded")]


async def test_a_cancellation_from_outside_is_not_contained(env: Env) -> None:
    """Under `contain`, too, a cancelled request cancels its run, and the siblings do not start."""
    env.settings |= {"on_failure": "contain"}
    started = anyio.Event()

    async def endless() -> None:
        started.set()
        await anyio.sleep_forever()

    app = env.app(answering(BackgroundTasks([BackgroundTask(endless), BackgroundTask(sf)])))
    async with anyio.create_task_group() as group:
        group.start_soon(drive, app)
        await started.wait()
        group.cancel_scope.cancel()
    assert env.outcomes() == [("endless", "cancelled"), ("sf", "dropped request_cancelled")]
    assert LOG == []


# --- too late


async def test_a_task_that_is_added_after_its_request_has_ended_is_dropped(env: Env) -> None:
    """The container outlives its request, but nothing calls what is added to it: a bad drop, emitted at once."""
    kept: list[BackgroundTasks] = []

    async def endpoint(tasks: Injected) -> None:
        kept.append(tasks)

    await drive(env.fastapi(endpoint))
    kept[0].add_task(af)
    assert env.outcomes() == [("af", "dropped added_too_late")]
    assert env.seen.of(Dropped)[0].bad
    assert LOG == []


@tasks_come_first
@pytest.mark.parametrize("earlier", [[], [sf]])
async def test_a_task_that_is_added_after_the_yield_of_a_dependency(env: Env, earlier: list[Any]) -> None:
    """The tasks of the request have run by then, or are still to run, after the request."""

    async def dependency(tasks: Injected) -> AsyncIterator[None]:
        for task in earlier:
            tasks.add_task(task)
        yield
        tasks.add_task(af)

    async def endpoint(_: None = Depends(dependency)) -> None: ...

    await drive(env.fastapi(endpoint))
    if env.settings["run_after"] == "request":
        assert env.outcomes() == [*[("sf", "succeeded")] * len(earlier), ("af", "succeeded")]
        return
    assert env.outcomes() == [*[("sf", "succeeded")] * len(earlier), ("af", "dropped added_too_late")]
    assert env.seen.of(Dropped)[0].bad
