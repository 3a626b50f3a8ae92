"""Retries: which errors are retried, when, and what siblings and signals see of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import anyio
import pytest
from prometheus_client import CollectorRegistry
from starlette.background import BackgroundTask, BackgroundTasks

from aftertask import Retry, TaskRun, current_run, options, task
from aftertask.events import Cancelled, Failed, Retrying, Scheduled, Skipped, Started, Succeeded, TimedOut
from aftertask.signals import Logs, Metrics, Tracing
from aftertask.testing import VirtualClock
from kit import LOG, Env, Traced, answering, drive, sf

pytestmark = pytest.mark.anyio


def flaky(failures: int, name: str = "flaky", error: Exception | None = None) -> Callable[[], Any]:
    """A task that fails this number of times, then succeeds."""
    calls = 0

    async def call() -> None:
        nonlocal calls
        calls += 1
        LOG.append(f"{name} {calls}")
        if calls <= failures:
            raise error or ConnectionError(f"{name} {calls}")

    call.__qualname__ = call.__name__ = name
    return call


@pytest.fixture
def longest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every back-off has its maximum."""
    monkeypatch.setattr(random, "uniform", lambda low, high: high)


async def turn(clock: VirtualClock, *delays: float) -> None:
    """Wait for each back-off and let it pass."""
    for delay in delays:
        await clock.until_waiting()
        clock.advance(delay)


@pytest.mark.usefixtures("longest")
async def test_a_run_is_retried_until_it_succeeds(env: Env, clock: VirtualClock) -> None:
    """Each wait doubles; the events come in order, each with its attempt."""
    func = options(flaky(2), retry=Retry(attempts=4, wait_initial=3))
    async with anyio.create_task_group() as group:
        group.start_soon(drive, env.app(answering(BackgroundTask(func))))
        await turn(clock, 3, 6)
    assert [(type(event), getattr(event, "attempt", None)) for event in env.seen.events] == [
        (Scheduled, None),
        (Started, 1),
        (Retrying, 1),
        (Started, 2),
        (Retrying, 2),
        (Started, 3),
        (Succeeded, 3),
    ]
    assert [event.delay_s for event in env.seen.of(Retrying)] == [3, 6]
    assert [event.queue_wait_s for event in env.seen.of(Started)] == [0, None, None]
    assert env.seen.runs()[0].info.max_attempts == 4


@pytest.mark.usefixtures("longest")
async def test_the_last_attempts_failure_is_the_runs(env: Env, clock: VirtualClock) -> None:
    """It comes out as Starlette would have raised it, and later siblings are skipped."""
    func = options(flaky(9), retry=Retry(attempts=2, wait_initial=1))
    results: list[Any] = []

    async def request() -> None:
        results.append(await drive(env.app(answering(BackgroundTasks([BackgroundTask(func), BackgroundTask(sf)])))))

    async with anyio.create_task_group() as group:
        group.start_soon(request)
        await turn(clock, 1)
    (failed,) = env.seen.of(Failed)
    assert (failed.attempt, failed.bad) == (2, True)
    assert results[0].exc is failed.error
    assert str(failed.error) == "flaky 2"
    assert len(env.seen.of(Skipped)) == 1


async def test_only_the_named_errors_are_retried(env: Env) -> None:
    """Neither an error of `give_up_on` nor one that `on` does not name is retried."""
    retry = Retry(attempts=3, on=OSError, give_up_on=ConnectionError)
    for error in (ConnectionError("down"), ValueError("bad")):
        await drive(env.app(answering(BackgroundTask(options(flaky(9, error=error), retry=retry)))))
    assert LOG == ["flaky 1", "flaky 1"]
    assert env.seen.of(Retrying) == []


async def test_a_timeout_is_retried(env: Env, clock: VirtualClock) -> None:
    """TaskTimeout is an exception like any other to a retry, and each attempt has the whole timeout."""

    @task(timeout=5, retry=Retry(attempts=2, wait_initial=0))
    async def endless() -> None:
        await anyio.sleep_forever()

    async with anyio.create_task_group() as group:
        group.start_soon(drive, env.app(answering(BackgroundTask(endless))))
        await turn(clock, 5, 0, 5)
    assert [event.failure.type for event in env.seen.of(Retrying)] == ["aftertask.TaskTimeout"]
    assert [(event.attempt, event.duration_s) for event in env.seen.of(TimedOut)] == [(2, 5)]


@pytest.mark.parametrize("on_failure", ["continue", "contain"])
async def test_a_back_off_does_not_hold_the_siblings_up(env: Env, clock: VirtualClock, on_failure: Any) -> None:
    """Under continue and contain they run meanwhile; the request ends after the last attempt."""
    env.settings["on_failure"] = on_failure
    func = options(flaky(1), retry=Retry(attempts=2))
    done = anyio.Event()

    async def sibling() -> None:
        LOG.append("sibling")
        assert env.seen.runs()[0].state == "backoff"
        done.set()

    async with anyio.create_task_group() as group:
        app = env.app(answering(BackgroundTasks([BackgroundTask(func), BackgroundTask(sibling)])))
        group.start_soon(drive, app)
        await done.wait()
        assert LOG == ["flaky 1", "sibling"]
        await turn(clock, 60)
    assert LOG == ["flaky 1", "sibling", "flaky 2"]
    assert len(env.seen.of(Succeeded)) == 2


async def test_under_stop_the_siblings_wait_for_a_back_off(env: Env, clock: VirtualClock) -> None:
    """The order of the batch is kept."""
    func = options(flaky(1), retry=Retry(attempts=2))
    async with anyio.create_task_group() as group:
        group.start_soon(drive, env.app(answering(BackgroundTasks([BackgroundTask(func), BackgroundTask(sf)]))))
        await clock.until_waiting()
        assert env.seen.runs()[0].state == "backoff"
        assert env.seen.runs()[1].state == "queued"
        clock.advance(60)
    assert LOG == ["flaky 1", "flaky 2", "sf"]


async def test_a_later_attempt_sees_what_siblings_have_set(env: Env, clock: VirtualClock) -> None:
    """The attempts and the siblings of a batch share one context, in the order in which they ran."""
    var: ContextVar[str] = ContextVar("var", default="nothing")
    seen: list[str] = []
    sibling_ran = anyio.Event()

    async def sets() -> None:
        run = current_run()
        assert run is not None
        seen.append(f"attempt {run.attempt} saw {var.get()}")
        var.set(f"attempt {run.attempt}")
        if run.attempt == 1:
            raise ValueError

    async def sibling() -> None:
        seen.append(f"sibling saw {var.get()}")
        var.set("sibling")
        sibling_ran.set()

    func = options(sets, retry=Retry(attempts=2), on_failure="continue")
    async with anyio.create_task_group() as group:
        group.start_soon(drive, env.app(answering(BackgroundTasks([BackgroundTask(func), BackgroundTask(sibling)]))))
        await sibling_ran.wait()
        await turn(clock, 60)
    assert seen == ["attempt 1 saw nothing", "sibling saw attempt 1", "attempt 2 saw sibling"]


async def test_a_run_can_be_cancelled_in_its_back_off(env: Env, clock: VirtualClock) -> None:
    """It is cancelled with the attempt that was made, alone and beside siblings."""
    for on_failure in ("stop", "contain"):
        func = options(flaky(1), retry=Retry(attempts=2), on_failure=on_failure)  # type: ignore[arg-type]  # a str here
        async with anyio.create_task_group() as group:
            group.start_soon(drive, env.app(answering(BackgroundTask(func))))
            await clock.until_waiting()
            group.cancel_scope.cancel()
    assert [(event.attempt, event.duration_s, event.reason) for event in env.seen.of(Cancelled)] == [
        (1, None, "cancelled")
    ] * 2
    assert clock.waiting == 0


class Whole(BackgroundTask):
    """A task class that calls its function itself."""

    async def __call__(self) -> None:
        """Call the function as Starlette would."""
        await self.func(*self.args, **self.kwargs)


async def test_a_task_class_of_the_users_is_not_retried(env: Env) -> None:
    """User code is the caller of the function, so no policy applies."""
    env.settings["policies"] = {}
    func = options(flaky(9), retry=Retry(attempts=5))
    await drive(env.app(answering(Whole(func))))
    assert LOG == ["flaky 1"]
    assert env.seen.of(Retrying) == []


@pytest.mark.usefixtures("longest")
async def test_each_attempt_has_a_span_linked_to_the_first(env: Env, clock: VirtualClock) -> None:
    """The spans are siblings; failed ones have status ERROR, and only the last has an outcome."""
    traced, registry = Traced(), CollectorRegistry()
    lines: list[TaskRun] = []
    signals = [Tracing(traced.provider), Metrics(registry), Logs(), lambda event: lines.append(event.run), env.seen]
    func = options(flaky(2), retry=Retry(attempts=3, wait_initial=1), on_failure="contain")
    with traced.provider.get_tracer("test").start_as_current_span("request"):
        async with anyio.create_task_group() as group:
            group.start_soon(drive, env.app_with_signals(signals, answering(BackgroundTask(func))))
            await turn(clock, 1, 2)
    spans = traced.spans()
    attributes = [dict(span.attributes or {}) for span in spans]
    assert [each["aftertask.attempt"] for each in attributes] == [1, 2, 3]
    assert [each.get("aftertask.outcome") for each in attributes] == [None, None, "succeeded"]
    assert [span.status.status_code.name for span in spans] == ["ERROR", "ERROR", "UNSET"]
    first = spans[0].get_span_context()
    assert [[link.context.span_id for link in span.links] for span in spans] == [[], [first.span_id], [first.span_id]]
    assert len({span.parent.span_id for span in spans if span.parent}) == 1
    labels = {"task": env.seen.runs()[0].task, "engine": "local"}
    assert registry.get_sample_value("aftertask_retries_total", labels) == 2
    assert registry.get_sample_value("aftertask_queue_wait_seconds_count", labels) == 1
    assert registry.get_sample_value("aftertask_queue_wait_seconds_sum", labels) == 0  # until its first attempt
    assert registry.get_sample_value("aftertask_attempt_duration_seconds_count", {**labels, "result": "error"}) == 2
    assert registry.get_sample_value("aftertask_end_to_end_seconds_sum", labels) == 3
