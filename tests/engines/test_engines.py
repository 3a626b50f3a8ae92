"""Runs handed to an engine in memory: what is emitted, what falls back, and what a hanging engine cannot do."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import anyio
import pytest
from fastapi import BackgroundTasks
from prometheus_client import CollectorRegistry
from starlette.background import BackgroundTask
from starlette.responses import PlainTextResponse

from aftertask import AftertaskMiddleware, Policy, Retry, Settings, options, task
from aftertask._core.executors.engine import Remote
from aftertask.engines import Handover
from aftertask.errors import EngineUnavailable, NotSerializable, UnknownExecutor
from aftertask.events import (
    Failed,
    Offloaded,
    OffloadFailed,
    RequestInfo,
    Scheduled,
    Started,
    Succeeded,
    TaskInfo,
    TaskRun,
)
from aftertask.signals import Metrics, Tracing
from kit import LOG, ClientFor, Env, Traced, af, answering, boom, drive, sf
from kit_engines import Memory

pytestmark = pytest.mark.anyio


@pytest.fixture
def memory(env: Env) -> Iterator[Memory]:
    """The engine of the app, as `memory`."""
    engine = Memory()
    env.settings["engines"] = {"memory": engine}
    yield engine
    engine.goes_on.set()


def on(function: Any, **policy: Any) -> Any:
    """A call whose run is handed to the engine."""
    return options(function, executor="memory", **policy)


async def test_a_run_is_handed_over_after_the_response_and_ends_offloaded(env: Env, memory: Memory) -> None:
    """The engine gets it off the event loop under its id; the function is not called here."""
    await drive(env.app(answering(BackgroundTask(on(af), "x"))))
    (handover,) = memory.taken
    assert handover.arguments == ("x",)
    assert [type(event) for event in env.seen.events] == [Scheduled, Started, Offloaded]
    (ended,) = env.seen.of(Offloaded)
    assert (ended.engine, ended.queue, ended.bad, ended.run.id) == ("memory", "memory", False, handover.run.id)
    assert LOG == [] and threading.get_ident() not in memory.threads


async def test_a_run_that_is_not_taken_fails_its_attempt(env: Env, memory: Memory) -> None:
    """With `on_unavailable="raise"` it fails like any attempt, and is handed over again where a retry is set."""
    memory.is_closed = True
    result = await drive(env.app(answering(BackgroundTask(on(af, retry=Retry(attempts=2, wait_initial=0.0))))))
    assert isinstance(result.exc, EngineUnavailable) and result.status == 200
    assert len(env.seen.of(OffloadFailed)) == 2 and len(env.seen.of(Failed)) == 1
    assert env.seen.of(Failed)[0].failure.type == "aftertask.EngineUnavailable"
    assert LOG == []


@pytest.mark.parametrize(("function", "ran"), [(af, ["af"]), (sf, ["sf"])])
async def test_a_run_that_is_not_taken_may_run_here(env: Env, memory: Memory, function: Any, ran: list[str]) -> None:
    """With `on_unavailable="local"` the same attempt calls the function here."""
    memory.is_closed, memory.on_unavailable = True, "local"
    result = await drive(env.app(answering(BackgroundTask(on(function)))))
    assert result.exc is None and ran == LOG
    assert [type(event) for event in env.seen.events] == [Scheduled, Started, OffloadFailed, Succeeded]
    assert env.seen.of(OffloadFailed)[0].falls_back


async def test_a_hanging_engine_holds_nothing_beyond_its_deadline(env: Env, memory: Memory) -> None:
    """Runs fall back at the deadline; those that no thread has begun to send are never sent."""
    memory.on_unavailable, memory.deadline = "local", 0.05
    memory.goes_on.clear()
    app = env.app(answering(BackgroundTask(on(af))))
    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            for _ in range(20):
                group.start_soon(drive, app)
    assert LOG == ["af"] * 20
    memory.goes_on.set()
    memory.deadline = 5.0
    await drive(app)
    assert len(memory.threads) <= 4 and len(memory.asked) <= 5  # what no thread had begun is never asked for
    assert [each.run.id for each in memory.taken] == [event.run.id for event in env.seen.of(Offloaded)]


class Exits(Memory):
    """An engine with a library that raises what is no `Exception`, as often as an engine has threads and more."""

    def submit(self, handover: Handover) -> str:
        """Raise it at first."""
        self.asked.append(handover)
        if len(self.asked) <= 6:
            raise SystemExit
        return super().submit(handover)


async def test_a_thread_survives_whatever_an_engine_raises() -> None:
    """The run was not taken, which is known at once, and the next one finds a thread."""
    remote = Remote("memory", Exits(deadline=60.0))
    run = TaskRun(TaskInfo("mail", "app.mail"), RequestInfo())
    with anyio.fail_after(15):
        for _ in range(6):
            with pytest.raises(EngineUnavailable, match="did not take mail: SystemExit"):
                await remote.submit(Handover(run=run, arguments=None, expires_s=None))
        assert await remote.submit(Handover(run=run, arguments=None, expires_s=None)) == "memory"


async def test_an_argument_that_cannot_travel_is_refused_where_the_task_is_added(env: Env, memory: Memory) -> None:
    """`add_task` raises, and the run is rejected."""

    async def endpoint(tasks: BackgroundTasks) -> str:
        with pytest.raises(NotSerializable, match="cannot travel"):
            tasks.add_task(on(af), ValueError())
        return "ok"

    await drive(env.fastapi(endpoint))
    assert env.outcomes() == [("af", "rejected")]
    assert memory.taken == []


async def test_siblings_run_here_as_ever(env: Env, memory: Memory) -> None:
    """Order and `on_failure` are those of the batch; what a failure skips is not handed over."""
    batch = BackgroundTasks([BackgroundTask(on(af)), BackgroundTask(boom), BackgroundTask(on(sf))])
    await drive(env.app(answering(batch)))
    assert env.outcomes() == [("af", "offloaded"), ("boom", "failed"), ("sf", "skipped sibling_failed")]
    assert len(memory.taken) == 1


async def test_the_deadline_of_a_run_travels_with_it(env: Env, memory: Memory) -> None:
    """The engine gets the seconds that are left."""
    await drive(env.app(answering(BackgroundTask(on(af, expires=60)))))
    assert 0 < (memory.taken[0].expires_s or 0) <= 60


def test_metrics_and_spans_of_a_hand_over(client_for: ClientFor, registry: CollectorRegistry) -> None:
    """Counted by status from 0 on; the attempt's span ends with the outcome `offloaded`."""
    engine, traced = Memory(), Traced()
    signals = [Tracing(traced.provider), Metrics(registry)]
    client = client_for(on(af), signals=signals, engines={"memory": engine})

    def count(status: str) -> float | None:
        return registry.get_sample_value("aftertask_offload_total", {"engine": "memory", "status": status})

    client.get("/")
    assert [count(status) for status in ("ok", "error", "fallback")] == [1, 0, 0]
    (span,) = traced.spans()
    assert (span.attributes or {})["aftertask.outcome"] == "offloaded"
    assert registry.get_sample_value("aftertask_offload_seconds_count", {"engine": "memory"}) == 1


# --- settings


def test_an_executor_that_does_not_exist_is_an_error_when_the_app_is_built() -> None:
    """The message names the task, the value and the way out."""

    @task(executor="celry")
    def lonely() -> None: ...

    async def app(*args: Any) -> None: ...

    with pytest.raises(ValueError, match=r"lonely has executor='celry'.*add Settings\(engines="):
        AftertaskMiddleware(app, settings=Settings(registry=CollectorRegistry()))
    engines = {"celery": Memory()}
    with pytest.raises(ValueError, match="did you mean 'celery'"):
        AftertaskMiddleware(app, settings=Settings(registry=CollectorRegistry(), engines=engines))
    policies = {f"{__name__}.{lonely.__qualname__}": Policy(executor="celery")}
    AftertaskMiddleware(app, settings=Settings(registry=CollectorRegistry(), engines=engines, policies=policies))


async def test_an_unknown_executor_of_one_call_is_an_error_where_it_is_added(env: Env) -> None:
    """`add_task` raises it, and the task does not run."""
    raised: list[Exception] = []

    async def endpoint(tasks: BackgroundTasks) -> PlainTextResponse:
        with pytest.raises(UnknownExecutor, match=r"sf has executor='celry'.*add Settings") as info:
            tasks.add_task(options(sf, executor="celry"))
        raised.append(info.value)
        return PlainTextResponse("ok")

    assert (await drive(env.fastapi(endpoint))).status == 200
    assert isinstance(raised[0], ValueError) and (LOG, env.seen.events) == ([], [])


async def test_a_response_with_a_task_of_an_unknown_executor_fails(env: Env) -> None:
    """There is no `add_task` that could raise it; the task does not run."""
    result = await drive(env.app(answering(BackgroundTask(options(sf, executor="celry")))))
    assert isinstance(result.exc, UnknownExecutor) and result.status == 500
    assert (LOG, env.seen.events) == ([], [])


@pytest.mark.parametrize(
    ("engines", "message"),
    [
        ([], "must map names to engines"),
        ({"local": Memory()}, "cannot be an engine's name"),
        ({"thread": Memory()}, "cannot be an engine's name"),
        ({"celery": object()}, "must be an engine"),
    ],
)
def test_engines_are_checked(engines: Any, message: str) -> None:
    """A mistake is an error that names the entry."""
    with pytest.raises((TypeError, ValueError), match=message):
        Settings(engines=engines)
