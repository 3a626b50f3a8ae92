"""Where a task's function is called: in anyio's threads, in our own, or on an event loop in one of our own."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry
from starlette.background import BackgroundTask
from starlette.routing import Route

from aftertask import TaskEvent, current_run, options
from aftertask._core.run import Run
from aftertask.events import Abandoned, AbandonedEnded, Failed, Started, Succeeded, TimedOut
from aftertask.signals import Metrics
from aftertask.testing import VirtualClock
from kit import LOG, Env, answering, drive, until

pytestmark = pytest.mark.anyio


def sync_endpoint(request: Any) -> Any:
    """A sync endpoint, which runs in one of anyio's threads."""
    return JSONResponse("at once")


@pytest.mark.parametrize("executor", ["auto", "thread"])
async def test_tasks_in_our_threads_leave_those_of_endpoints_alone(env: Env, executor: Any) -> None:
    """With 45 slow sync tasks a sync endpoint waits for a thread under `auto`, and responds at once under `thread`."""
    go, registry = threading.Event(), CollectorRegistry()

    def slow() -> None:
        assert go.wait(10)

    env.settings["registry"] = registry
    app = env.app_with_signals(
        [Metrics(registry), env.seen],
        answering(BackgroundTask(options(slow, executor=executor))),
        Route("/sync", sync_endpoint),
    )
    limiter = anyio.to_thread.current_default_thread_limiter()
    statuses: list[Any] = []

    async def ask() -> None:
        statuses.append((await drive(app, "/sync")).status)

    def waiting(pool: str) -> float | None:
        return registry.get_sample_value("aftertask_threadpool_waiting", {"pool": pool})

    async with anyio.create_task_group() as group:
        try:
            for _ in range(45):
                group.start_soon(drive, app)
            await until(lambda: waiting("default" if executor == "auto" else "aftertask") == 5)
            if executor == "thread":
                await ask()
                assert statuses == [200]
                assert limiter.borrowed_tokens == 0
                assert registry.get_sample_value("aftertask_threadpool_busy", {"pool": "aftertask"}) == 40
            else:
                group.start_soon(ask)
                await until(lambda: waiting("default") == 6)  # the endpoint waits for a thread, too
                assert statuses == []
        finally:
            go.set()
    assert statuses == [200]
    assert len(env.seen.of(Succeeded)) == 45
    assert registry.get_sample_value("aftertask_threadpool_busy", {"pool": "aftertask"}) in (0, None)


async def test_at_most_thread_limit_tasks_run_in_our_threads(env: Env) -> None:
    """With two threads the third run starts when one of them has ended."""
    env.settings["thread_limit"] = 2
    go = threading.Event()

    def slow() -> None:
        assert go.wait(10)

    app = env.app(answering(BackgroundTask(options(slow, executor="thread"))))
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(drive, app)
        await env.seen.until(Started, 2)
        first = env.seen.runs()[0]
        assert isinstance(first, Run)
        slot: Any = first.slots[0]
        limiter = slot.limiter
        await until(lambda: limiter.waiting == 1)
        assert len(env.seen.of(Started)) == 2
        go.set()
    assert len(env.seen.of(Succeeded)) == 3
    assert (limiter.in_use, limiter.waiting) == (0, 0)


async def test_an_async_function_in_a_thread_has_a_loop_of_its_own(env: Env, anyio_backend_name: str) -> None:
    """The loop is of the app's kind, and current_run() is the function's run."""
    main, seen = threading.get_ident(), []

    async def blocks(x: int, *, y: int) -> None:
        await anyio.lowlevel.checkpoint()
        run = current_run()
        loop = asyncio.get_running_loop() if anyio_backend_name == "asyncio" else None
        seen.append((threading.get_ident() != main, run is not None and run.attempt, x, y, loop))

    await drive(env.app(answering(BackgroundTask(options(blocks, executor="thread"), 1, y=2))))
    ((elsewhere, attempt, x, y, loop),) = seen
    assert (elsewhere, attempt, x, y) == (True, 1, 1, 2)
    if anyio_backend_name == "asyncio":
        assert loop is not asyncio.get_running_loop()
    assert env.seen.runs()[0].info.executor == "thread"
    assert len(env.seen.of(Succeeded)) == 1


async def test_an_error_in_a_thread_comes_out(env: Env) -> None:
    """A sync and an async function raise as they would on the event loop."""
    error = ValueError("x")

    def sync() -> None:
        raise error

    async def coroutine() -> None:
        raise error

    for func in (sync, coroutine):
        r = await drive(env.app(answering(BackgroundTask(options(func, executor="thread")))))
        assert r.exc is error
    assert [event.error for event in env.seen.of(Failed)] == [error, error]


async def test_an_async_function_in_a_thread_is_cancelled_at_its_timeout(env: Env, clock: VirtualClock) -> None:
    """The thread is abandoned, and ends when the function comes to an await."""
    begun = threading.Event()

    async def endless() -> None:
        begun.set()
        try:
            await anyio.sleep_forever()
        finally:
            LOG.append("cancelled there")

    func = options(endless, executor="thread", timeout=5, on_failure="contain")
    async with anyio.create_task_group() as group:
        group.start_soon(drive, env.app(answering(BackgroundTask(func))))
        await anyio.to_thread.run_sync(begun.wait, 10)
        clock.advance(5)
        await env.seen.until(TimedOut)
        await env.seen.until(AbandonedEnded)
    assert LOG == ["cancelled there"]
    assert len(env.seen.of(Abandoned)) == 1


async def test_the_stack_of_a_failure_in_a_thread_begins_with_the_task(env: Env) -> None:
    """The frames that carry the call into the thread are left out, on asyncio and trio."""

    def fails() -> None:
        raise LookupError("no such order")

    first: list[str] = []

    def read(event: TaskEvent) -> None:
        if isinstance(event, Failed):  # read here, as the log does: the traceback grows on its way out
            first.append(event.failure.stack.splitlines()[1].rpartition(" ")[2])

    for func in (fails, options(fails, executor="thread"), options(fails, timeout=5)):
        await drive(env.app_with_signals([env.seen, read], answering(BackgroundTask(func))))
    assert first == ["fails"] * 3


async def test_a_call_in_a_thread_begins_by_the_clock_of_the_test(env: Env, clock: VirtualClock) -> None:
    """No time passes on that clock, so the run has not waited for its thread."""
    begun: list[tuple[float | None, float | None]] = []

    def notes() -> None:
        run = current_run()
        assert run is not None
        begun.append((run.started_s, run.thread_s))

    await drive(env.app(answering(BackgroundTask(options(notes, executor="thread")))))
    assert begun[0][0] == begun[0][1] is not None
