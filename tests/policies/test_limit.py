"""Concurrency limits: never exceeded, fair, by priority, and with a bounded queue."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from fastapi import BackgroundTasks as Injected
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry
from starlette.background import BackgroundTask, BackgroundTasks

from aftertask import AftertaskMiddleware, Limit, Policy, QueueFull, Settings, options, task
from aftertask._core.run import Run
from aftertask.events import Abandoned, AbandonedEnded, Cancelled, Rejected, Scheduled, Started, Succeeded
from aftertask.signals import Metrics
from aftertask.testing import Recorder
from kit import LOG, Env, answering, drive, until

pytestmark = pytest.mark.anyio


class Crowd:
    """A task whose runs wait for each other's release; counts how many run at the same time."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self.go = anyio.Event()

    async def __call__(self) -> None:
        """Run until `go` is set."""
        self.now += 1
        self.most = max(self.most, self.now)
        await self.go.wait()
        await anyio.lowlevel.checkpoint()
        self.now -= 1


async def started(env: Env, count: int) -> None:
    """Wait until this number of runs have started."""
    await env.seen.until(Started, count)


async def test_a_limit_holds_under_500_requests(env: Env) -> None:
    """All 500 runs succeed, and at most 7 run at the same time."""
    crowd = Crowd()
    crowd.go.set()
    app = env.app(answering(BackgroundTask(options(crowd, limit=7))))
    async with anyio.create_task_group() as group:
        for _ in range(500):
            group.start_soon(drive, app)
    assert crowd.most == 7
    assert len(env.seen.of(Succeeded)) == 500
    limiter: Any = env.seen.runs()[0].resolved.limiter
    assert (limiter.in_use, limiter.waiting) == (0, 0)


async def test_a_limit_is_shared_by_the_tasks_that_name_it(env: Env) -> None:
    """Tasks of several apps may share one `Limit`."""
    smtp = Limit("smtp", 2)
    crowd = Crowd()

    async def other() -> None:
        await crowd()

    apps = [env.app(answering(BackgroundTask(options(func, limit=smtp)))) for func in (crowd, other, crowd)]
    async with anyio.create_task_group() as group:
        for app in apps:
            group.start_soon(drive, app)
        await started(env, 2)
        limiter: Any = env.seen.runs()[0].resolved.limiter
        await until(lambda: limiter.waiting == 1)
        assert (crowd.now, limiter.in_use) == (2, 2)
        crowd.go.set()
    assert crowd.most == 2
    assert len(env.seen.of(Succeeded)) == 3


async def test_runs_wait_for_a_limit_by_priority(env: Env) -> None:
    """Smaller priorities run first, equal ones in the order of their arrival."""
    smtp, crowd, order = Limit("smtp", 1), Crowd(), list[int]()

    def sending(number: int) -> Any:
        async def send() -> None:
            order.append(number)

        return send

    priorities = [5, 0, 5, -1, 0]
    tasks = [BackgroundTask(options(sending(at), limit=smtp, priority=p)) for at, p in enumerate(priorities)]
    app = env.app(answering(BackgroundTask(options(crowd, limit=smtp))), *(answering(each) for each in tasks))
    async with anyio.create_task_group() as group:
        group.start_soon(drive, app)
        await started(env, 1)
        for number in range(len(tasks)):
            group.start_soon(drive, app, f"/{number + 1}")
            await anyio.wait_all_tasks_blocked()
        crowd.go.set()
    assert order == [3, 1, 4, 0, 2]


def refusing_app(recorder: Recorder, crowd: Any, **more: Any) -> FastAPI:
    """An app whose handler responds with 503 when a task is refused."""
    app = FastAPI()

    @app.get("/")
    async def endpoint(tasks: Injected) -> Any:
        try:
            tasks.add_task(crowd)
        except QueueFull as full:
            return JSONResponse({"detail": str(full)}, 503)
        return {"tasks": len(tasks.tasks)}

    chosen = Settings(metrics_path=None, registry=CollectorRegistry(), **more)
    app.add_middleware(AftertaskMiddleware, settings=chosen, signals=[recorder])
    return app


@pytest.mark.parametrize("where", ["settings", "limit"])
async def test_add_task_raises_if_the_queue_is_full(where: str) -> None:
    """The handler can respond with 503, the run is rejected, and the container is as before."""
    recorder, crowd = Recorder(), Crowd()

    async def work() -> None:
        await crowd()

    name = f"{work.__module__}.{work.__qualname__}"
    more: dict[str, Any] = (
        {"max_waiting": 2, "policies": {name: Policy(limit=1)}}
        if where == "settings"
        else {"policies": {name: Policy(limit=Limit("crowd", 1, max_waiting=2))}}
    )
    app = refusing_app(recorder, work, **more)
    statuses: list[int | None] = []

    async def request() -> None:
        statuses.append((await drive(app)).status)

    async with anyio.create_task_group() as group:
        for number in range(1, 4):
            group.start_soon(request)
            await recorder.until(Scheduled, number)
        refused = await drive(app)
        assert refused.status == 503
        assert b"accepts no more runs at the moment" in refused.body
        crowd.go.set()
    assert statuses == [200, 200, 200]
    assert [event.reason for event in recorder.of(Rejected)] == ["queue_full"]
    assert recorder.of(Rejected)[0].bad
    assert len(recorder.of(Succeeded)) == 3
    accepted = await drive(app)
    assert accepted.body == b'{"tasks":1}'


async def test_a_task_of_a_response_is_rejected_if_the_queue_is_full(env: Env) -> None:
    """No caller could get the error: the run is rejected, the client gets its response, and the siblings run."""
    crowd = Crowd()

    async def sibling() -> None:
        LOG.append("sibling")

    async def work() -> None:
        await crowd()

    func = options(work, limit=Limit("one", 1, max_waiting=0))
    plain = env.app(answering(BackgroundTask(func)))
    full = env.app(answering(BackgroundTasks([BackgroundTask(func), BackgroundTask(sibling)])))
    async with anyio.create_task_group() as group:
        group.start_soon(drive, plain)
        await started(env, 1)
        result = await drive(full)
        crowd.go.set()
    assert result.status == 200
    assert result.exc is None
    assert LOG == ["sibling"]
    assert [event.reason for event in env.seen.of(Rejected)] == ["queue_full"]


async def test_a_run_that_is_cancelled_while_it_waits_leaves_the_queue(env: Env) -> None:
    """It is dropped, and its place in the queue is free for another run."""
    crowd = Crowd()
    app = env.app(answering(BackgroundTask(options(crowd, limit=Limit("one", 1, max_waiting=1)))))
    async with anyio.create_task_group() as group:
        group.start_soon(drive, app)
        await started(env, 1)
        limiter: Any = env.seen.runs()[0].resolved.limiter
        async with anyio.create_task_group() as inner:
            inner.start_soon(drive, app)
            await until(lambda: limiter.waiting == 1)
            inner.cancel_scope.cancel()
        assert (limiter.in_use, limiter.waiting) == (1, 0)
        group.start_soon(drive, app)
        await until(lambda: limiter.waiting == 1)
        crowd.go.set()
    assert env.outcomes() == [("Crowd", "dropped request_cancelled"), *[("Crowd", "succeeded")] * 2]


async def test_a_dropped_run_leaves_the_queue(env: Env) -> None:
    """If a handler raises after `add_task`, the next request's task is accepted."""

    @task(limit=Limit("one", 1, max_waiting=0))
    async def never() -> None: ...

    async def endpoint(tasks: Injected) -> None:
        tasks.add_task(never)
        raise ValueError

    app = env.fastapi(endpoint)
    for _ in range(2):
        await drive(app)
    assert env.outcomes() == [("never", "dropped handler_error")] * 2


async def test_the_metrics_show_a_limit_and_the_thread_pool(env: Env) -> None:
    """Size, slots in use and waiting runs are there from the start, by the limiter's and the pool's name."""
    registry, crowd = CollectorRegistry(), Crowd()

    @task(limit=Limit("smtp", 2))
    async def mail() -> None:
        await crowd()

    def value(name: str) -> float | None:
        return registry.get_sample_value(f"aftertask_concurrency_{name}", {"limiter": "smtp"})

    env.settings["registry"] = registry
    app = env.app_with_signals([Metrics(registry), env.seen], answering(BackgroundTask(mail)))
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(drive, app)
        await started(env, 2)
        await until(lambda: value("waiting") == 1)
        assert (value("limit"), value("in_use")) == (2, 2)
        assert registry.get_sample_value("aftertask_threadpool_limit", {"pool": "default"}) == 40
        crowd.go.set()
    assert (value("in_use"), value("waiting")) == (0, 0)


async def test_sync_endpoints_at_once_share_one_limiter(env: Env) -> None:
    """They schedule a task's first runs in threads: with two limiters the limit would be exceeded."""
    together, most, now = threading.Barrier(4, timeout=10), 0, 0

    async def counted() -> None:
        nonlocal most, now
        now += 1
        most = max(most, now)
        await anyio.lowlevel.checkpoint()
        now -= 1

    def endpoint(tasks: Injected) -> str:
        together.wait()  # all four are here at once
        tasks.add_task(options(counted, limit=1))
        return "ok"

    app = env.fastapi(endpoint)
    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(drive, app)
    assert most == 1
    assert len(env.seen.of(Succeeded)) == 4


async def test_a_task_and_a_shared_limit_may_have_one_name(env: Env) -> None:
    """A task's own limit is not the `Limit` of the same name."""

    async def other() -> None: ...

    async def own() -> None: ...

    app = env.app(answering(BackgroundTask(options(other, limit=Limit("smtp", 1)))), answering(BackgroundTask(own)))
    await drive(app)
    task(name="smtp", limit=1)(own)
    await drive(app, "/1")
    limiters = [run.resolved.limiter for run in env.seen.runs() if isinstance(run, Run)]
    assert [limiter and limiter.name for limiter in limiters] == ["smtp", "smtp"]
    assert limiters[0] is not limiters[1]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_cancelled_thread_keeps_its_slot(env: Env) -> None:
    """A server cancels the request; the thread continues, and the next run waits for its end."""
    begun, may_end = threading.Event(), threading.Event()

    def work() -> None:
        LOG.append("begins")
        begun.set()
        assert may_end.wait(10)
        LOG.append("ends")

    app = env.app(answering(BackgroundTask(options(work, limit=1))))
    first = asyncio.ensure_future(drive(app))
    await anyio.to_thread.run_sync(begun.wait, 10)
    first.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await first
    second = asyncio.ensure_future(drive(app))
    await anyio.wait_all_tasks_blocked()
    assert LOG == ["begins"]
    may_end.set()
    await second
    assert LOG == ["begins", "ends", "begins", "ends"]
    assert len(env.seen.of(Cancelled)) == len(env.seen.of(Succeeded)) == len(env.seen.of(AbandonedEnded)) == 1


async def test_a_limit_does_not_abandon_threads(env: Env) -> None:
    """A cancelled scope waits for its thread, as without a limit."""
    begun, may_end = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        assert may_end.wait(10)
        LOG.append("ends")

    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:
            group.start_soon(drive, env.app(answering(BackgroundTask(options(work, limit=1)))))
            await anyio.to_thread.run_sync(begun.wait, 10)
            scope.cancel()
            may_end.set()
    assert LOG == ["ends"]
    assert not env.seen.of(Abandoned)
