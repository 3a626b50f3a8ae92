"""The runs of one response: what a failure does to the others, their order, deadlines, and policies in force."""

from __future__ import annotations

import gc
import json
from typing import Any

import anyio
import pytest
from fastapi import BackgroundTasks as Injected
from fastapi import Depends
from fastapi.background import BackgroundTasks as FastAPITasks
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.background import BackgroundTask, BackgroundTasks
from starlette.middleware import Middleware
from starlette.testclient import TestClient

from aftertask import AftertaskMiddleware, Limit, Policy, Retry, Settings, TaskRun, current_run, options, progress, task
from aftertask._core.run import Run
from aftertask.events import Expired, Failed, Skipped, Started, Succeeded
from aftertask.signals import Logs
from aftertask.testing import VirtualClock
from kit import LOG, Env, Stop, answering, boom, drive, sf, tasks_come_first

pytestmark = pytest.mark.anyio


def failing(name: str, error: BaseException) -> Any:
    """A task that raises this error."""

    async def call() -> None:
        LOG.append(name)
        raise error

    call.__qualname__ = call.__name__ = name
    return call


def tasks_of(*functions: Any, kind: Any = BackgroundTasks) -> Any:
    """A container of these functions."""
    return kind([BackgroundTask(func) for func in functions])


# --- on_failure


@pytest.mark.parametrize("kind", [BackgroundTasks, FastAPITasks])
async def test_continue_runs_the_siblings_and_then_raises(env: Env, kind: Any) -> None:
    """A single failure comes out as itself after the others have run."""
    env.settings["on_failure"] = "continue"
    error = ValueError("one")
    r = await drive(env.app(answering(tasks_of(failing("one", error), sf, kind=kind))))
    assert r.exc is error
    assert LOG == ["one", "sf"]
    assert env.outcomes() == [("one", "failed"), ("sf", "succeeded")]


async def test_continue_raises_several_as_a_group(env: Env, clock: VirtualClock) -> None:
    """The group is in the batch's order, though the first one failed last, after its retries."""
    env.settings["on_failure"] = "continue"
    first, second = ValueError("first"), KeyError("second")
    retried = options(failing("first", first), retry=Retry(attempts=2))
    results: list[Any] = []

    async def request() -> None:
        results.append(await drive(env.app(answering(tasks_of(retried, sf, failing("second", second))))))

    async with anyio.create_task_group() as group:
        group.start_soon(request)
        await env.seen.until(Failed)
        clock.advance(60)
    assert env.outcomes() == [("sf", "succeeded"), ("second", "failed"), ("first", "failed")]
    error = results[0].exc
    assert isinstance(error, ExceptionGroup)
    assert str(error) == "2 of 3 background tasks failed (2 sub-exceptions)"
    assert error.exceptions == (first, second)


async def test_contain_lets_nothing_out(env: Env) -> None:
    """The siblings run, the server gets no error, and the runs have failed all the same."""
    env.settings["on_failure"] = "contain"
    r = await drive(env.app(answering(tasks_of(boom, boom, sf))))
    assert r.exc is None
    assert LOG == ["boom", "boom", "sf"]
    assert [event.bad for event in env.seen.of(Failed)] == [True, True]


@pytest.mark.parametrize("muted", [True, False])
async def test_a_single_task_is_a_batch_of_one(env: Env, muted: bool) -> None:
    """A failure is contained, too, if a response carries the task without a container."""
    r = await drive(env.app(answering(BackgroundTask(options(boom, on_failure="contain" if muted else "continue")))))
    assert (r.exc is None) == muted


async def test_the_failing_runs_own_setting_decides(env: Env) -> None:
    """After contain and continue, stop ends the batch, and what was kept back comes out with it."""
    kept, ends = KeyError("kept"), ValueError("ends")
    batch = tasks_of(
        options(boom, on_failure="contain"),
        options(failing("kept", kept), on_failure="continue"),
        sf,
        failing("ends", ends),
        sf,
    )
    r = await drive(env.app(answering(batch)))
    assert isinstance(r.exc, ExceptionGroup)
    assert r.exc.exceptions == (kept, ends)
    assert LOG == ["boom", "kept", "sf", "ends"]
    (skipped,) = env.seen.of(Skipped)
    assert skipped.caused_by is not None
    assert skipped.caused_by.task.endswith("ends")


async def test_a_pending_retry_outlives_a_sibling_that_stops(env: Env, clock: VirtualClock) -> None:
    """
    A run in its back-off ends as its own setting demands; the later sibling is skipped, and then the failure comes out.
    """
    error = ValueError("ends")
    retried = options(failing("retried", KeyError()), retry=Retry(attempts=2), on_failure="contain")
    results: list[Any] = []

    async def request() -> None:
        results.append(await drive(env.app(answering(tasks_of(retried, failing("ends", error), sf)))))

    async with anyio.create_task_group() as group:
        group.start_soon(request)
        await clock.until_waiting()
        clock.advance(60)
    assert LOG == ["retried", "ends", "retried"]
    assert results[0].exc is error
    assert env.outcomes() == [("ends", "failed"), ("retried", "failed"), ("sf", "skipped sibling_failed")]


async def test_a_sibling_stays_the_cause_if_a_back_off_is_cancelled_later(env: Env, clock: VirtualClock) -> None:
    """The run that never started was skipped because of the failed sibling; it is not a dropped one."""
    retried = options(failing("retried", KeyError()), retry=Retry(attempts=2), on_failure="continue")
    async with anyio.create_task_group() as group:
        group.start_soon(drive, env.app(answering(tasks_of(retried, failing("ends", ValueError()), sf))))
        await env.seen.until(Failed)
        await clock.until_waiting()
        group.cancel_scope.cancel()
    assert env.outcomes() == [("ends", "failed"), ("retried", "cancelled"), ("sf", "skipped sibling_failed")]
    (skipped,) = env.seen.of(Skipped)
    assert skipped.caused_by is not None
    assert skipped.caused_by.task.endswith("ends")


@pytest.mark.parametrize("on_failure", ["stop", "continue", "contain"])
async def test_a_base_exception_ends_the_batch(env: Env, clock: VirtualClock, on_failure: str) -> None:
    """It comes out alone; a sibling in its back-off is cancelled, and one that had not started is skipped."""
    env.settings["on_failure"] = on_failure
    retried = options(failing("retried", KeyError()), retry=Retry(attempts=2), on_failure="continue")
    with pytest.raises(Stop):
        await drive(env.app(answering(tasks_of(retried, failing("stops", Stop()), sf))))
    assert sorted(env.seen.outcomes()) == [("retried", "cancelled"), ("sf", "skipped"), ("stops", "failed")]
    assert clock.waiting == 0


@tasks_come_first
async def test_an_exception_group_escapes_except_value_error_in_a_dependency(env: Env) -> None:
    """`except ValueError` catches a single failure and misses a group of two; after the request it gets neither."""
    env.settings["on_failure"] = "continue"
    caught: list[str] = []

    async def dependency() -> Any:
        try:
            yield
        except ValueError:
            caught.append("ValueError")
            raise
        except ExceptionGroup:
            caught.append("ExceptionGroup")
            raise

    async def endpoint(number: int, tasks: Injected, given: None = Depends(dependency)) -> str:
        for _ in range(number):
            tasks.add_task(boom)
        return "ok"

    app = env.fastapi(endpoint)
    app.get("/{number}")(endpoint)
    for number in (1, 2):
        await drive(app, f"/{number}")
    assert caught == ([] if env.settings["run_after"] == "request" else ["ValueError", "ExceptionGroup"])


# --- priority


@pytest.mark.parametrize("kind", [BackgroundTasks, FastAPITasks])
async def test_smaller_priorities_go_first_and_equals_keep_their_order(env: Env, kind: Any) -> None:
    """A nested container counts by its smallest priority."""
    functions = {name: (lambda name=name: LOG.append(name)) for name in "abcdef"}

    def prioritised(name: str, priority: int) -> BackgroundTask:
        return BackgroundTask(options(functions[name], priority=priority))

    batch = kind([BackgroundTask(functions["a"]), prioritised("b", 5), prioritised("c", -1)])
    if kind is BackgroundTasks:  # FastAPI's own loop takes no nested containers
        batch.tasks.append(BackgroundTasks([prioritised("e", 9), prioritised("f", -5)]))
    batch.add_task(functions["d"])
    await drive(env.app(answering(batch)))
    assert (["f", "e", "c", "a", "d", "b"] if kind is BackgroundTasks else ["c", "a", "d", "b"]) == LOG


async def test_a_batch_in_order_is_left_alone(env: Env) -> None:
    """The list keeps its objects in their order, and late additions run last."""
    batch = tasks_of(sf, boom)

    async def late() -> None:
        batch.add_task(sf, "late")

    batch.tasks.insert(0, BackgroundTask(options(late, priority=-1)))
    before = list(batch.tasks)
    env.settings["on_failure"] = "contain"
    await drive(env.app(answering(batch)))
    assert batch.tasks[:3] == before
    assert LOG == ["sf", "boom", "late"]


# --- expires


async def test_a_run_that_cannot_start_in_time_expires(env: Env, clock: VirtualClock) -> None:
    """Behind a slow sibling it is expired and not bad, and the next one runs."""

    async def slow() -> None:
        clock.advance(10)

    await drive(env.app(answering(tasks_of(slow, options(boom, expires=10), options(sf, expires=11)))))
    (expired,) = env.seen.of(Expired)
    assert (expired.reason, expired.bad) == ("deadline", False)
    assert LOG == ["sf"]
    assert env.outcomes() == [("slow", "succeeded"), ("boom", "expired"), ("sf", "succeeded")]


async def test_a_run_expires_while_it_waits_for_its_limit(env: Env, clock: VirtualClock) -> None:
    """It expires at its deadline, not when its turn comes, and leaves the queue."""
    go = anyio.Event()

    @task(limit=1, expires=5)
    async def waits() -> None:
        await go.wait()

    app = env.app(answering(BackgroundTask(waits)))
    async with anyio.create_task_group() as group:
        group.start_soon(drive, app)
        await env.seen.until(Started)
        group.start_soon(drive, app)
        await clock.until_waiting()
        clock.advance(5)
        await env.seen.until(Expired)
        limiter: Any = env.seen.runs()[0].resolved.limiter
        assert (limiter.in_use, limiter.waiting) == (1, 0)
        go.set()
    assert len(env.seen.of(Succeeded)) == 1


# --- on_error, expected, progress


async def test_on_error_is_called_when_the_run_has_failed(env: Env) -> None:
    """It gets the run and the exception after the last attempt, may be async, and may fail itself."""
    calls: list[tuple[TaskRun, Exception]] = []

    async def callback(run: TaskRun, error: Exception) -> None:
        assert current_run() is None or current_run() is run
        calls.append((run, error))
        raise RuntimeError("the callback's own")

    def sync_callback(run: TaskRun, error: Exception) -> None:
        calls.append((run, error))

    error = ValueError("x")
    retried = options(
        failing("fails", error), retry=Retry(attempts=2, wait_initial=0), on_error=callback, on_failure="contain"
    )
    r = await drive(env.app(answering(tasks_of(retried, options(failing("too", error), on_error=sync_callback), sf))))
    assert r.exc is error
    runs = env.seen.runs()
    assert sorted(run.task.rpartition(".")[2] for run, _ in calls) == ["fails", "too"]
    assert all(given is error for _, given in calls)
    assert len(runs) == 3


async def test_an_expected_error_is_a_failure_that_is_not_bad(env: Env) -> None:
    """`expected` matches by base class, beside a timeout, too."""
    func = options(failing("declined", KeyError()), expected=LookupError, timeout=9, on_failure="contain")
    r = await drive(env.app(answering(BackgroundTask(func))))
    assert r.exc is None
    (failed,) = env.seen.of(Failed)
    assert (failed.expected, failed.bad) == (True, False)


async def test_progress_is_on_the_run(env: Env) -> None:
    """A sync task can report progress; outside of any run a report does nothing."""
    progress(1, 2)
    seen: list[Any] = []

    def works() -> None:
        progress(3, 10, "thumbnails")
        run = current_run()
        assert run is not None
        seen.append(run.progress)

    await drive(env.app(answering(BackgroundTask(works))))
    assert [(each.done, each.total, each.note) for each in seen] == [(3, 10, "thumbnails")]


async def test_progress_is_in_the_log(env: Env, capsys: pytest.CaptureFixture[str], no_log_handlers: None) -> None:
    """The line of a run that reported progress has it as text; others do not have the key."""

    async def halfway() -> None:
        progress(2, note="of many")
        raise ValueError

    async def whole() -> None:
        progress(4, 4)

    batch = tasks_of(options(halfway, on_failure="contain"), whole, sf)
    app = env.app_with_signals([Logs(), env.seen], answering(batch))
    await drive(app)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line.get("progress") for line in lines] == ["2 of many", "4/4", None]


# --- the policies in force


def test_the_policies_in_force_are_logged_at_startup(capfd: pytest.CaptureFixture[str], no_log_handlers: None) -> None:
    """They are put together from all sources and shown as plain values."""

    @task(name="mail.send", timeout=20, retry=Retry(attempts=4, give_up_on=KeyError), owner="growth")
    async def send() -> None: ...

    smtp = Limit("smtp", 5)
    chosen = Settings(
        registry=CollectorRegistry(),
        policies={"mail.send": Policy(limit=smtp, on_error=record_nothing), "report.*": Policy(expires=60)},
    )
    app = Starlette(middleware=[Middleware(AftertaskMiddleware, settings=chosen)])
    with TestClient(app):
        pass
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if "lifecycle.policies" in line]
    (line,) = lines
    assert line["on_failure"] == "stop"
    assert line["policies"]["mail.send"] == {
        "timeout": 20,
        "retry": {
            "attempts": 4,
            "wait_initial": 1,
            "wait_max": 30,
            "on": ["Exception"],
            "give_up_on": ["KeyError"],
        },
        "limit": {"name": "smtp", "size": 5, "max_waiting": None},
        "on_error": f"{__name__}.record_nothing",
    }
    assert line["patterns"] == {"report.*": {"expires": 60}}


def record_nothing(run: TaskRun, error: Exception) -> None:
    """A callback that does nothing."""


async def test_policies_are_resolved_field_by_field(env: Env) -> None:
    """options() wins over an exact name, that over patterns in their order, those over @task, that over Settings."""

    @task(name="mail.send", timeout=1, priority=1, owner="decorator", on_failure="contain")
    async def send() -> None: ...

    env.settings |= {
        "on_failure": "continue",
        "policies": {
            "mail.*": Policy(timeout=2, priority=2, expires=2),
            "*": Policy(timeout=3, expires=3, stuck_after=3),
            "mail.send": Policy(timeout=4),
        },
    }
    for func, timeout in ((send, 4), (options(send, timeout=5), 5)):
        await drive(env.app(answering(BackgroundTask(func))))
        run = env.seen.runs()[-1]
        assert isinstance(run, Run)
        assert run.info.timeout == timeout
        assert (run.info.priority, run.resolved.expires, run.info.stuck_after) == (2, 2, 3)
        assert (run.info.owner, run.info.on_failure) == ("decorator", "contain")
    await drive(env.app(answering(BackgroundTask(sf))))
    run = env.seen.runs()[-1]
    assert isinstance(run, Run)
    assert (run.info.on_failure, run.info.timeout) == ("continue", 3)


# --- what is left over


class Counted(ValueError):
    """An error that counts its living instances."""

    alive = 0

    def __init__(self) -> None:
        super().__init__()
        Counted.alive += 1

    def __del__(self) -> None:
        Counted.alive -= 1


async def raises_counted() -> None:
    """A task that fails with such an error."""
    raise Counted


@pytest.mark.parametrize("on_failure", ["stop", "continue", "contain"])
async def test_no_cycle_keeps_an_error_alive(env: Env, on_failure: Any) -> None:
    """Its traceback holds our frames: none of them may hold the error, or only the garbage collector would free it."""
    env.signals = [lambda event: None]
    governed = options(raises_counted, retry=Retry(attempts=2, wait_initial=0), timeout=9, on_failure=on_failure)
    app = env.app(answering(tasks_of(governed, options(raises_counted, on_failure=on_failure))))
    gc.collect()
    gc.disable()
    try:
        before = Counted.alive
        (await drive(app)).exc = None  # the driver's own frame holds it, too
        assert Counted.alive == before
    finally:
        gc.enable()


# --- user code is the caller


@pytest.mark.parametrize("on_failure", ["contain", "continue"])
async def test_no_policy_applies_where_user_code_awaits_the_container(env: Env, on_failure: str) -> None:
    """An endpoint that awaits its tasks gets the error of the first, in the order in which they were added."""
    error = ValueError("one")
    raised: list[BaseException] = []
    env.settings |= {"on_failure": on_failure, "policies": {"*sf": Policy(priority=-5)}}

    async def endpoint(tasks: Injected) -> None:
        tasks.add_task(failing("one", error))
        tasks.add_task(sf)
        try:
            await tasks()
        except ValueError as seen:
            raised.append(seen)
        tasks.tasks.clear()

    await drive(env.fastapi(endpoint))
    assert raised == [error]
    assert LOG == ["one"]
    assert env.outcomes() == [("one", "failed"), ("sf", "skipped sibling_failed")]


async def test_a_run_that_another_run_awaits_waits_for_no_limit(env: Env) -> None:
    """Both share the limit of one: the outer one would wait for itself."""
    limit = Limit("mail", 1)

    async def inner() -> None:
        LOG.append("inner")

    async def outer(tasks: Injected) -> None:
        await tasks.tasks[1]()
        LOG.append("outer")

    async def endpoint(tasks: Injected) -> None:
        tasks.add_task(outer, tasks)
        tasks.add_task(inner)

    env.settings["policies"] = {"*": Policy(limit=limit)}
    await drive(env.fastapi(endpoint))
    assert LOG == ["inner", "outer", "inner"]
    env.check_accounts()


async def test_a_cancellation_during_on_error_is_not_contained(env: Env) -> None:
    """The request is cancelled, whatever `on_failure` says of the error: the sibling is dropped."""
    calls = anyio.Event()

    async def on_error(run: TaskRun, error: Exception) -> None:
        calls.set()
        await anyio.sleep_forever()

    env.settings |= {"on_failure": "contain", "policies": {"*one": Policy(on_error=on_error)}}
    app = env.app(answering(tasks_of(failing("one", ValueError()), sf)))
    ended: list[str] = []

    async def request() -> None:
        await drive(app)
        ended.append("normally")

    async with anyio.create_task_group() as requests:
        requests.start_soon(request)
        await calls.wait()
        requests.cancel_scope.cancel()
    assert ended == []
    assert env.outcomes() == [("one", "failed"), ("sf", "dropped request_cancelled")]
