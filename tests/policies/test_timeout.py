"""Timeouts: an async attempt is cancelled, a sync one is abandoned."""

from __future__ import annotations

import threading
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from prometheus_client import CollectorRegistry
from starlette.background import BackgroundTask, BackgroundTasks

from aftertask import Retry, TaskTimeout, task
from aftertask.events import (
    Abandoned,
    AbandonedEnded,
    Cancelled,
    Failed,
    Retrying,
    Skipped,
    Started,
    Succeeded,
    TimedOut,
)
from aftertask.signals import Metrics
from aftertask.testing import VirtualClock
from kit import LOG, Env, Result, answering, drive, sf

pytestmark = pytest.mark.anyio


class Running:
    """A request beside the test, and its result."""

    def __init__(self) -> None:
        self.result: Result | None = None

    async def of(self, app: Any) -> None:
        """Serve one request."""
        self.result = await drive(app)


async def test_an_async_attempt_is_cancelled_at_its_timeout(env: Env, clock: VirtualClock) -> None:
    """It is timed out with its limit, raises TaskTimeout, and the next sibling is skipped."""

    @task(timeout=20)
    async def endless() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            LOG.append("cleanup")

    request = Running()
    async with anyio.create_task_group() as group:
        group.start_soon(request.of, env.app(answering(BackgroundTasks([BackgroundTask(endless), BackgroundTask(sf)]))))
        await clock.until_waiting()
        clock.advance(20)
    (event,) = env.seen.of(TimedOut)
    assert (event.attempt, event.duration_s, event.limit_s, event.bad) == (1, 20, 20, True)
    assert event.failure.type == "aftertask.TaskTimeout"
    assert event.failure.message.endswith("endless did not finish within its timeout of 20 s")
    assert request.result is not None
    assert isinstance(request.result.exc, TaskTimeout)
    assert isinstance(request.result.exc, TimeoutError)
    assert [event.reason for event in env.seen.of(Skipped)] == ["sibling_failed"]
    assert LOG == ["cleanup"]


async def test_cleanup_after_a_timeout_needs_a_shield_to_await(env: Env, clock: VirtualClock) -> None:
    """The attempt is in a cancelled scope: what its `finally` awaits is cancelled, too, unless it is shielded."""

    @task(timeout=1)
    async def tidy() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.lowlevel.checkpoint()
            LOG.append("shielded")
            await anyio.lowlevel.checkpoint()
            LOG.append("not shielded")

    async with anyio.create_task_group() as group:
        group.start_soon(Running().of, env.app(answering(BackgroundTask(tidy))))
        await clock.until_waiting()
        clock.advance(1)
    assert LOG == ["shielded"]
    assert len(env.seen.of(TimedOut)) == 1


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_a_nursery_is_cancelled_at_the_timeout(env: Env, clock: VirtualClock) -> None:
    """A nursery of trio's turns the cancellation into a group of them: the run is timed out all the same."""
    import trio

    @task(timeout=1)
    async def fan_out() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)

    request = Running()
    async with anyio.create_task_group() as group:
        group.start_soon(request.of, env.app(answering(BackgroundTask(fan_out))))
        await clock.until_waiting()
        clock.advance(1)
    assert env.outcomes() == [("fan_out", "timed_out")]
    assert request.result is not None
    assert isinstance(request.result.exc, TaskTimeout)


async def test_a_timeout_shows_where_the_task_was(env: Env, clock: VirtualClock) -> None:
    """The error's cause has the stack of the cancelled attempt."""

    @task(timeout=1)
    async def waits_here() -> None:
        await anyio.sleep_forever()

    async with anyio.create_task_group() as group:
        group.start_soon(Running().of, env.app(answering(BackgroundTask(waits_here))))
        await clock.until_waiting()
        clock.advance(1)
    (event,) = env.seen.of(TimedOut)
    assert "waits_here" in event.failure.stack.replace(event.failure.message, "")


async def test_a_timeout_error_of_the_tasks_own_is_a_failure(env: Env, clock: VirtualClock) -> None:
    """Only the policy's timeout makes a run timed out."""

    @task(timeout=20)
    async def own() -> None:
        raise TimeoutError("a socket's")

    await drive(env.app(answering(BackgroundTask(own))))
    assert env.seen.of(TimedOut) == []
    assert env.seen.of(Failed)[0].failure.type == "TimeoutError"
    assert clock.waiting == 0


async def test_a_task_that_catches_its_timeout_and_returns_has_succeeded(env: Env, clock: VirtualClock) -> None:
    """A task may catch its cancellation and return."""

    @task(timeout=1)
    async def stubborn() -> None:
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            LOG.append("went on")

    request = Running()
    async with anyio.create_task_group() as group:
        group.start_soon(request.of, env.app(answering(BackgroundTask(stubborn))))
        await clock.until_waiting()
        clock.advance(1)
    assert [type(event) for event in env.seen.of(Succeeded)] == [Succeeded]
    assert LOG == ["went on"]
    assert request.result is not None
    assert request.result.exc is None


async def test_a_cancellation_from_outside_is_no_timeout(env: Env, clock: VirtualClock) -> None:
    """The run is cancelled, also if its timeout passes at the same time."""
    started = anyio.Event()

    @task(timeout=1)
    async def endless() -> None:
        started.set()
        await anyio.sleep_forever()

    for both in (False, True):
        started = anyio.Event()
        async with anyio.create_task_group() as group:
            group.start_soon(drive, env.app(answering(BackgroundTask(endless))))
            await started.wait()
            group.cancel_scope.cancel()
            if both:
                clock.advance(1)
    assert [event.reason for event in env.seen.of(Cancelled)] == ["cancelled", "cancelled"]
    assert env.seen.of(TimedOut) == []
    assert clock.waiting == 0


class Blocking:
    """A sync task that runs until the test lets it end."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.may_end = threading.Event()
        self.calls = 0

    def __call__(self) -> None:
        """Run until the test lets it end."""
        self.calls += 1
        self.begun.set()
        assert self.may_end.wait(10)


async def abandon(env: Env, clock: VirtualClock, function: Any, blocking: Blocking) -> Running:
    """Serve a request with this task, and let its timeout pass while it runs."""
    request = Running()
    async with anyio.create_task_group() as group:
        group.start_soon(request.of, env.app(answering(BackgroundTask(function))))
        await anyio.to_thread.run_sync(blocking.begun.wait, 10)
        clock.advance(5)
    return request


async def test_a_sync_attempt_is_abandoned_at_its_timeout(env: Env, clock: VirtualClock) -> None:
    """The request ends at once; the thread continues, is reported with its stack, and again when it ends."""
    blocking = Blocking()

    @task(timeout=5)
    def slow() -> None:
        blocking()

    request = await abandon(env, clock, slow, blocking)
    assert request.result is not None
    assert isinstance(request.result.exc, TaskTimeout)
    (left,) = env.seen.of(Abandoned)
    assert (left.running_s, left.limit_s) == (5, 5)
    assert left.stack is not None
    assert left.stack.splitlines()[0].endswith("in slow")  # the task's own first frame
    assert "may_end.wait(10)" in left.stack
    assert env.seen.of(AbandonedEnded) == []
    clock.advance(7)
    blocking.may_end.set()
    (ended,) = await env.seen.until(AbandonedEnded)
    assert (ended.running_s, ended.limit_s, ended.run) == (12, 5, left.run)
    order = [type(event) for event in env.seen.events]
    assert order.index(Abandoned) < order.index(TimedOut) < order.index(AbandonedEnded)


async def test_an_abandoned_thread_keeps_its_slots(env: Env, clock: VirtualClock) -> None:
    """The slots of its limit and of its pool are taken until it ends."""
    blocking, registry = Blocking(), CollectorRegistry()
    env.signals = [Metrics(registry), env.seen]

    @task(name="slow", timeout=5, limit=1)
    def slow() -> None:
        blocking()

    def value(metric: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"aftertask_{metric}", labels)

    before = anyio.to_thread.current_default_thread_limiter().borrowed_tokens
    await abandon(env, clock, slow, blocking)
    limiter: Any = env.seen.runs()[0].resolved.limiter
    threads = anyio.to_thread.current_default_thread_limiter()
    assert (limiter.in_use, threads.borrowed_tokens) == (1, before + 1)
    assert value("abandoned_threads", task="slow") == value("concurrency_in_use", limiter="slow") == 1
    assert value("task_timeout_seconds", task="slow") == 5
    blocking.may_end.set()
    await env.seen.until(AbandonedEnded)
    assert (limiter.in_use, threads.borrowed_tokens) == (0, before)
    assert value("abandoned_threads", task="slow") == value("concurrency_in_use", limiter="slow") == 0


async def test_an_abandoned_attempt_is_not_retried(env: Env, clock: VirtualClock) -> None:
    """A second call beside the first would do the work twice."""
    blocking = Blocking()

    @task(timeout=5, retry=Retry(attempts=3))
    def slow() -> None:
        blocking()

    await abandon(env, clock, slow, blocking)
    blocking.may_end.set()
    await env.seen.until(AbandonedEnded)
    assert env.seen.of(Retrying) == []
    assert len(env.seen.of(TimedOut)) == len(env.seen.of(Started)) == 1


async def test_an_abandoned_attempt_of_an_idempotent_task_is_retried(env: Env, clock: VirtualClock) -> None:
    """The second attempt runs beside the thread of the first."""
    blocking = Blocking()

    @task(timeout=5, retry=Retry(attempts=2, wait_initial=0), idempotent=True, limit=2)
    def slow() -> None:
        if blocking.begun.is_set():
            LOG.append("second")
        else:
            blocking()

    request = Running()
    async with anyio.create_task_group() as group:
        group.start_soon(request.of, env.app(answering(BackgroundTask(slow))))
        await anyio.to_thread.run_sync(blocking.begun.wait, 10)
        clock.advance(5)
        await clock.until_waiting()
        clock.advance(0)
    assert LOG == ["second"]
    limiter: Any = env.seen.runs()[0].resolved.limiter
    assert limiter.in_use == 1
    blocking.may_end.set()
    await env.seen.until(AbandonedEnded)
    assert limiter.in_use == 0
    assert len(env.seen.of(Succeeded)) == 1
    assert [event.attempt for event in env.seen.of(Started)] == [1, 2]


async def test_a_cancel_scope_around_a_thread_does_nothing() -> None:
    """anyio's `fail_after` around a sync call waits for the thread, unlike our timeout."""
    begun, may_end = threading.Event(), threading.Event()

    def blocks() -> None:
        begun.set()
        assert may_end.wait(10)

    async def end_it() -> None:
        await anyio.to_thread.run_sync(begun.wait, 10)
        scope.cancel()
        await anyio.lowlevel.checkpoint()
        LOG.append("past its timeout")
        may_end.set()

    LOG.clear()
    async with anyio.create_task_group() as group:
        group.start_soon(end_it)
        with anyio.CancelScope() as scope:
            await anyio.to_thread.run_sync(blocks)
        LOG.append("over")
    assert LOG == ["past its timeout", "over"]


async def test_many_abandoned_threads_are_reported_with_their_stacks(env: Env) -> None:
    """Reading what a coroutine awaits while it executes crashed Python 3.11."""
    release = threading.Event()

    @task(timeout=0.001)
    def blocks() -> None:
        release.wait(0.1)

    app = env.app(answering(BackgroundTask(blocks)))
    for _ in range(300):
        await drive(app)
    release.set()
    await env.seen.idle()
    abandoned = env.seen.of(Abandoned)
    assert len(abandoned) > 200  # all but a few whose thread had not begun
    assert any("in blocks" in (event.stack or "") for event in abandoned)
