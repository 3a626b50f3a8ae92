"""Sync tasks share their threads with sync endpoints: told when they hold nearly all, and when one has waited."""

from __future__ import annotations

import threading
from typing import Any

import anyio
import anyio.to_thread
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from aftertask import AftertaskMiddleware, HazardFound, Settings, task
from aftertask.hazards._threads import Threads
from aftertask.signals import usual
from aftertask.testing import Recorder
from kit import drive

pytestmark = pytest.mark.anyio


class Pool:
    """An app whose sync tasks hold their threads until they are let go."""

    def __init__(self, **policy: Any) -> None:
        self.go, self.held, self.events = threading.Event(), threading.Semaphore(0), Recorder()
        self.spans = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.spans))

        def holds() -> None:
            self.held.release()
            self.go.wait(10)

        func = task(name="holds", **policy)(holds)

        async def endpoint(request: Request) -> PlainTextResponse:
            return PlainTextResponse("", background=BackgroundTask(func))

        chosen = Settings(registry=CollectorRegistry(), tracer_provider=provider)
        signals = [*usual(chosen), self.events]
        self.app = Starlette(
            routes=[Route("/", endpoint)],
            middleware=[Middleware(AftertaskMiddleware, settings=chosen, signals=signals)],
        )

    async def hold(self, group: Any, count: int, threads: int) -> None:
        """Start so many tasks, and wait until so many of them have a thread."""
        for _ in range(count):
            group.start_soon(drive, self.app)
        got = 0
        with anyio.fail_after(10):
            while got < threads:
                got += self.held.acquire(blocking=False)
                await anyio.sleep(0.001)

    def found(self) -> list[HazardFound]:
        """The hazards of that kind."""
        return [event for event in self.events.of(HazardFound) if event.kind == "starved_threads"]


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How many threads were busy each time that the pool was looked at, and looked through."""
    seen: list[float] = []
    look = Threads.look

    def looked(threads: Threads, limiter: anyio.CapacityLimiter) -> Any:
        seen.append(limiter.borrowed_tokens)
        return look(threads, limiter)

    monkeypatch.setattr("aftertask.hazards._threads.LOOK_EVERY", 0.0)
    monkeypatch.setattr(Threads, "look", looked)
    return seen


async def looked_twice(looks: list[float]) -> None:
    """Until the threads that are busy now were looked at twice."""
    looks.clear()
    with anyio.fail_after(5):
        while len(looks) < 2:  # noqa: ASYNC110  # another thread looks
            await anyio.sleep(0.01)


async def test_tasks_that_hold_most_of_the_threads_are_told(looks: list[float]) -> None:
    """Ten threads, nine of them held by tasks: once, with the task, the number and the remedy."""
    anyio.to_thread.current_default_thread_limiter().total_tokens = 10
    pool = Pool()
    async with anyio.create_task_group() as group:
        await pool.hold(group, 9, 9)
        with anyio.fail_after(5):
            while not pool.found():  # noqa: ASYNC110  # the watching thread sees it
                await anyio.sleep(0.01)
        await looked_twice(looks)
        pool.go.set()
    (found,) = pool.found()
    assert found.run.task == "holds"
    assert "hold 9 of the 10 threads" in found.advice and 'executor="thread"' in found.advice


@pytest.mark.parametrize(("count", "policy"), [(8, {}), (9, {"executor": "thread"})])
async def test_fewer_threads_and_threads_of_ones_own_are_fine(
    count: int, policy: dict[str, Any], looks: list[float]
) -> None:
    """Eighty per cent are not more than eighty per cent; and our threads are nobody else's."""
    anyio.to_thread.current_default_thread_limiter().total_tokens = 10
    pool = Pool(**policy)
    async with anyio.create_task_group() as group:
        await pool.hold(group, count, count)
        await looked_twice(looks)
        pool.go.set()
    assert pool.found() == []


async def test_endpoints_that_hold_them_are_not_the_tasks_fault(looks: list[float]) -> None:
    """Threads that no task holds."""
    anyio.to_thread.current_default_thread_limiter().total_tokens = 10
    pool = Pool()
    async with anyio.create_task_group() as group:
        for _ in range(9):
            group.start_soon(anyio.to_thread.run_sync, pool.go.wait)
        await pool.hold(group, 1, 1)
        await looked_twice(looks)
        pool.go.set()
    assert pool.found() == []


async def test_a_run_that_waited_for_a_thread_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """In its log line and on its span; one that did not wait says nothing."""
    anyio.to_thread.current_default_thread_limiter().total_tokens = 1
    pool = Pool()
    caplog.set_level("INFO")
    async with anyio.create_task_group() as group:
        await pool.hold(group, 2, 1)
        await anyio.sleep(0.05)
        pool.go.set()
    first, second = (span.attributes or {} for span in pool.spans.get_finished_spans())
    assert float(str(first.get("aftertask.thread_wait", 0))) < 0.05  # handing it over takes a moment on a busy machine
    assert float(str(second["aftertask.thread_wait"])) >= 0.05
    lines = [vars(record) for record in caplog.records if record.message == "task.succeeded"]
    assert [line.get("thread_wait_s", 0) >= 0.05 for line in lines] == [False, True]
    assert lines[1]["duration_s"] >= lines[1]["thread_wait_s"]
