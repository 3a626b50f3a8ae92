"""Sync tasks share their threads with sync endpoints: reported when they hold nearly all, and when one has waited."""

from __future__ import annotations

import threading
from typing import Any

import anyio
import anyio.to_thread
import pytest
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from aftertask import AftertaskMiddleware, HazardFound, Settings, task
from aftertask.events import Signal, Started
from aftertask.signals import usual
from aftertask.testing import Recorder
from kit import Traced, drive, until

pytestmark = pytest.mark.anyio


class Looks(Signal):
    """Counts how often the event loop, and with it its threads, has been looked at."""

    count = 0

    def loop_lag(self, seconds: float) -> None:
        """The loop responded; its threads are looked at next."""
        self.count += 1


class Pool:
    """An app whose sync tasks hold their threads until `go` is set."""

    def __init__(self, **policy: Any) -> None:
        self.go, self.held, self.events = threading.Event(), threading.Semaphore(0), Recorder()
        self.traced, self.looks = Traced(), Looks()

        def holds() -> None:
            self.held.release()
            self.go.wait(10)

        func = task(name="holds", **policy)(holds)

        async def endpoint(request: Request) -> PlainTextResponse:
            return PlainTextResponse("", background=BackgroundTask(func))

        chosen = Settings(registry=CollectorRegistry(), tracer_provider=self.traced.provider)
        signals = [*usual(chosen), self.events, self.looks]
        self.app = Starlette(
            routes=[Route("/", endpoint)],
            middleware=[Middleware(AftertaskMiddleware, settings=chosen, signals=signals)],
        )

    async def hold(self, group: Any, count: int, threads: int) -> None:
        """Start `count` tasks, and wait until `threads` of them have a thread."""
        for _ in range(count):
            group.start_soon(drive, self.app)
        got = 0
        with anyio.fail_after(10):
            while got < threads:
                got += self.held.acquire(blocking=False)
                await anyio.sleep(0.001)

    async def looked_at(self) -> None:
        """Until the threads that are busy now have been looked at."""
        seen = self.looks.count
        with anyio.fail_after(10):
            while self.looks.count < seen + 3:  # noqa: ASYNC110  # another thread looks
                await anyio.sleep(0.01)

    def found(self) -> list[HazardFound]:
        """The hazards of that kind."""
        return [event for event in self.events.of(HazardFound) if event.kind == "starved_threads"]


async def test_tasks_that_hold_most_of_the_threads_are_reported() -> None:
    """Nine of ten threads are held by tasks: one report has the task, the number and the remedy."""
    anyio.to_thread.current_default_thread_limiter().total_tokens = 10
    pool = Pool()
    async with anyio.create_task_group() as group:
        await pool.hold(group, 9, 9)
        with anyio.fail_after(10):
            while not pool.found():  # noqa: ASYNC110  # another thread looks
                await anyio.sleep(0.01)
        await pool.looked_at()
        pool.go.set()
    (found,) = pool.found()
    assert found.run.task == "holds"
    assert "hold 9 of the 10 threads" in found.advice and 'executor="thread"' in found.advice


@pytest.mark.parametrize(("count", "policy"), [(8, {}), (9, {"executor": "thread"})])
async def test_fewer_threads_and_threads_of_their_own_are_no_hazard(count: int, policy: dict[str, Any]) -> None:
    """Eight of ten are not more than 80 %, and the threads of aftertask's own pool are not shared."""
    anyio.to_thread.current_default_thread_limiter().total_tokens = 10
    pool = Pool(**policy)
    async with anyio.create_task_group() as group:
        await pool.hold(group, count, count)
        await pool.looked_at()
        pool.go.set()
    assert pool.found() == []


async def test_threads_that_endpoints_hold_are_no_hazard() -> None:
    """Nine of ten threads are busy, and a task holds only one of them."""
    anyio.to_thread.current_default_thread_limiter().total_tokens = 10
    pool = Pool()
    async with anyio.create_task_group() as group:
        for _ in range(9):
            group.start_soon(anyio.to_thread.run_sync, pool.go.wait)
        await pool.hold(group, 1, 1)
        await pool.looked_at()
        pool.go.set()
    assert pool.found() == []


async def test_a_run_that_waited_for_a_thread_shows_the_wait(caplog: pytest.LogCaptureFixture) -> None:
    """In its log line and on its span; the time is part of its duration."""
    anyio.to_thread.current_default_thread_limiter().total_tokens = 1
    pool = Pool()
    caplog.set_level("INFO")
    async with anyio.create_task_group() as group:
        await pool.hold(group, 2, 1)
        await until(lambda: len(pool.events.of(Started)) == 2)
        await anyio.sleep(0.05)  # the time that the second run waits at least
        pool.go.set()
    first, second = (span.attributes or {} for span in pool.traced.spans())
    waited = float(str(second["aftertask.thread_wait"]))
    assert waited >= 0.05 and waited > float(str(first.get("aftertask.thread_wait", 0)))
    lines = [vars(record) for record in caplog.records if getattr(record, "event", None) == "task.succeeded"]
    assert lines[1]["thread_wait_s"] == pytest.approx(waited, abs=1e-3) and lines[1]["duration_s"] >= waited - 1e-3
