"""The life of a run: when it is scheduled, how it ends, and what it raises."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import anyio
import pytest
from fastapi import BackgroundTasks as Injected
from fastapi import Depends, FastAPI, HTTPException, WebSocket
from prometheus_client import CollectorRegistry
from starlette.background import BackgroundTask, BackgroundTasks
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse

from aftertask import HazardFound, TaskEvent, TaskRun, current_run, get_run, observe_functions
from aftertask.events import Dropped, Failed, Scheduled, Signal, Skipped, Started, Succeeded
from aftertask.signals import Metrics
from aftertask.testing import VirtualClock
from kit import LOG, STARLETTE, Env, Layer, Stop, af, answering, boom, drive, sf

pytestmark = pytest.mark.anyio


# --- what comes out


async def test_an_exception_comes_out_as_itself(env: Env) -> None:
    """It is the same object, its traceback ends in the task, and it has no cause or context of ours."""
    r = await drive(env.app(answering(BackgroundTask(boom))))
    failed = env.seen.of(Failed)[0]
    assert r.exc is failed.error
    assert r.exc.__cause__ is None
    assert r.exc.__context__ is None
    trace = r.exc.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    assert trace is not None
    assert trace.tb_frame.f_code is boom.__code__
    assert failed.failure.type == "ValueError"


async def test_an_exception_group_is_one_failure(env: Env) -> None:
    """A task that raises a group has failed with the group, not with its members."""
    group = ExceptionGroup("two", [ValueError("a"), KeyError("b")])

    async def many() -> None:
        raise group

    r = await drive(env.app(answering(BackgroundTask(many))))
    assert r.exc is group
    assert env.seen.of(Failed)[0].failure.type == "ExceptionGroup"


async def test_a_base_exception_is_a_failure_and_is_raised(env: Env) -> None:
    """It ends the batch, and the siblings that had not started are skipped because of it."""

    async def stop() -> None:
        raise Stop

    tasks = BackgroundTasks([BackgroundTask(stop), BackgroundTask(sf)])
    with pytest.raises(Stop):
        await drive(env.app(answering(tasks)))
    failed, skipped = env.seen.of(Failed)[0], env.seen.of(Skipped)[0]
    assert failed.failure.type.endswith("Stop") and "in stop" in failed.failure.stack and failed.bad
    assert (skipped.run.attempt, skipped.reason, skipped.caused_by) == (0, "sibling_failed", failed.run)
    assert LOG == []


async def test_a_cancelled_request_cancels_its_run(env: Env) -> None:
    """The started run is cancelled, the cancellation continues, and the sibling that had not started is dropped."""
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


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_a_cancelled_nursery_is_a_cancelled_run(env: Env) -> None:
    """A nursery of trio's turns the cancellation into a group of them, which is no failure."""
    import trio

    env.settings["on_failure"] = "contain"
    started = anyio.Event()

    async def fan_out() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            started.set()

    app = env.app(answering(BackgroundTasks([BackgroundTask(fan_out), BackgroundTask(sf)])))
    async with anyio.create_task_group() as group:
        group.start_soon(drive, app)
        await started.wait()
        group.cancel_scope.cancel()
    assert env.outcomes() == [("fan_out", "cancelled"), ("sf", "dropped request_cancelled")]


async def test_a_task_that_raises_while_being_cancelled_has_failed(env: Env) -> None:
    """A task whose cleanup raises has failed with that error."""
    started = anyio.Event()

    async def bad_cleanup() -> None:
        started.set()
        try:
            await anyio.sleep_forever()
        finally:
            raise ValueError("in cleanup")

    app = env.app(answering(BackgroundTask(bad_cleanup)))
    async with anyio.create_task_group() as group:
        group.start_soon(drive, app)
        await started.wait()
        group.cancel_scope.cancel()
    assert env.outcomes() == [("bad_cleanup", "failed")]


# --- what never ran


async def test_tasks_behind_a_failed_one_are_skipped(env: Env) -> None:
    """Each skipped run names the failed one as its cause."""
    await drive(env.app(answering(BackgroundTasks([BackgroundTask(f) for f in (af, boom, sf, af)]))))
    assert env.outcomes() == [
        ("af", "succeeded"),
        ("boom", "failed"),
        ("sf", "skipped sibling_failed"),
        ("af", "skipped sibling_failed"),
    ]
    assert {event.caused_by for event in env.seen.of(Skipped)} == {env.seen.of(Failed)[0].run}


@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (HTTPException(404), "http_exception"),
        (HTTPException(499, "gone"), "http_exception"),
        (HTTPException(500), "handler_error"),
        (KeyError("x"), "handler_error"),
    ],
)
async def test_tasks_of_a_handler_that_raises_are_dropped(env: Env, error: Exception, reason: str, layers: int) -> None:
    """An HTTP error below 500 is no fault of the app and not bad; also below BaseHTTPMiddleware, in another task."""

    async def endpoint(tasks: Injected) -> None:
        tasks.add_task(sf)
        raise error

    app = env.fastapi(endpoint)
    app.user_middleware += [Middleware(Layer)] * layers
    await drive(app)
    assert env.outcomes() == [("sf", f"dropped {reason}")]
    (dropped,) = env.seen.of(Dropped)
    assert dropped.bad is (reason == "handler_error")
    assert dropped.error_type is not None and dropped.error_type.endswith(type(error).__name__)


async def test_an_error_that_an_app_handles_is_a_handler_error(env: Env) -> None:
    """An exception handler of the app responds, and the injected tasks are dropped all the same."""

    async def endpoint(tasks: Injected) -> None:
        tasks.add_task(sf)
        raise LookupError

    async def handler(request: Any, error: Exception) -> PlainTextResponse:
        return PlainTextResponse("sorry", status_code=409)

    r = await drive(env.fastapi(endpoint, exception_handlers={LookupError: handler}))
    assert r.status == 409
    assert env.outcomes() == [("sf", "dropped handler_error")]


async def test_tasks_of_a_dependency_are_dropped_when_validation_fails(env: Env) -> None:
    """A dependency may add a task before FastAPI finds another parameter invalid."""

    def dependency(tasks: Injected) -> None:
        tasks.add_task(sf)

    async def endpoint(number: int, _: None = Depends(dependency)) -> None: ...

    r = await drive(env.fastapi(endpoint))
    assert r.status == 422
    assert env.outcomes() == [("sf", "dropped validation")]


async def test_a_response_with_its_own_background_drops_the_injected_tasks(env: Env) -> None:
    """FastAPI runs the background of the returned response and leaves the injected tasks out."""

    async def endpoint(tasks: Injected) -> JSONResponse:
        tasks.add_task(sf)
        return JSONResponse({}, background=BackgroundTask(af))

    await drive(env.fastapi(endpoint))
    assert env.outcomes() == [("af", "succeeded"), ("sf", "dropped own_background")]


@pytest.mark.skipif(STARLETTE < (0, 42), reason="before 0.42 Starlette runs the tasks of a client that has gone")
async def test_tasks_of_a_client_that_has_gone_are_dropped(env: Env) -> None:
    """From ASGI 2.4 on `send` raises: neither injected tasks nor those of the response run."""

    class Chunks:
        def __aiter__(self) -> Any:
            return self

        async def __anext__(self) -> bytes:
            return b"x"

    async def endpoint(tasks: Injected) -> StreamingResponse:
        tasks.add_task(sf)
        return StreamingResponse(Chunks())

    await drive(env.fastapi(endpoint), spec="2.4", send_fails_after=2)
    assert env.outcomes() == [("sf", "dropped client_gone")]

    env.seen.clear()
    await drive(env.app(answering(BackgroundTask(sf))), spec="2.4", send_fails_after=1)
    assert env.outcomes() == [("sf", "dropped client_gone")]


async def test_every_run_of_an_error_page_ends(env: Env) -> None:
    """Starlette sends the page for a 500 after the middleware has returned; its runs have outcomes all the same."""

    async def endpoint(request: Any) -> None:
        raise KeyError("x")

    async def handler(request: Any, error: Exception) -> PlainTextResponse:
        tasks = BackgroundTasks([BackgroundTask(boom), BackgroundTask(sf)])
        return PlainTextResponse("sorry", status_code=500, background=tasks)

    app = env.app(endpoint, exception_handlers={500: handler})
    assert isinstance((await drive(app)).exc, ValueError)
    assert env.outcomes() == [("boom", "failed"), ("sf", "skipped sibling_failed")]

    env.seen.clear()
    await drive(app, spec="2.4", send_fails_after=1)
    assert env.outcomes() == [("boom", "dropped client_gone"), ("sf", "dropped client_gone")]


@pytest.mark.skipif(STARLETTE < (0, 46), reason="before 0.46 BaseHTTPMiddleware swallows the error")
async def test_tasks_of_a_stream_that_fails_are_dropped(env: Env) -> None:
    """BaseHTTPMiddleware completes the response before it raises the error of the stream."""

    async def chunks() -> Any:
        yield b"x"
        raise KeyError("in the stream")

    async def endpoint(request: Any) -> StreamingResponse:
        return StreamingResponse(chunks(), background=BackgroundTask(sf))

    await drive(env.app(endpoint, middleware=[Middleware(Layer)]))
    assert [outcome for _, outcome in env.outcomes()] == ["dropped request_failed"]


async def test_injected_tasks_of_a_websocket_are_dropped(env: Env) -> None:
    """FastAPI never runs them, and aftertask reports that."""
    app = env.fastapi()

    @app.websocket("/")
    async def endpoint(websocket: WebSocket, tasks: Injected) -> None:
        await websocket.accept()
        tasks.add_task(sf)
        await websocket.close()

    await drive(app, type="websocket")
    assert env.outcomes() == [("sf", "dropped websocket")]


async def test_a_response_that_is_thrown_away_schedules_nothing(env: Env) -> None:
    """Nor does a container that an endpoint builds and does not return."""

    async def endpoint(request: Any) -> PlainTextResponse:
        PlainTextResponse("no", background=BackgroundTask(sf))
        BackgroundTasks().add_task(sf)
        return PlainTextResponse("ok")

    await drive(env.app(endpoint))
    assert env.seen.events == []


async def test_tasks_that_their_endpoint_awaits_are_not_dropped(env: Env) -> None:
    """An endpoint that calls the injected container has run its tasks."""

    async def endpoint(tasks: Injected) -> JSONResponse:
        tasks.add_task(sf)
        await tasks()
        tasks.tasks.clear()
        return JSONResponse({})

    await drive(env.fastapi(endpoint))
    assert env.outcomes() == [("sf", "succeeded")]
    assert LOG == ["sf"]


# --- when it is scheduled, and how long it waits


async def test_a_run_exists_from_add_task_on(env: Env) -> None:
    """Scheduled is emitted in add_task, and get_run finds the run until it has ended."""
    seen: list[int] = []

    async def endpoint(tasks: Injected) -> None:
        tasks.add_task(sf)
        seen.append(len(env.seen.of(Scheduled)))
        run = env.seen.of(Scheduled)[0].run
        seen.append(await get_run(run.id) is run)

    await drive(env.fastapi(endpoint))
    assert seen == [1, True]
    run = env.seen.runs()[0]
    assert await get_run(run.id) is None
    assert run.http_route == "/"


async def test_threads_that_add_tasks_at_once_get_one_run_for_each(env: Env) -> None:
    """Whichever thread was adding when another one did, each task is scheduled at once, and only once."""
    both = threading.Barrier(2)

    class Meeting(list[BackgroundTask]):
        """Two threads that can be in `append` at the same time meet there."""

        def append(self, task: BackgroundTask) -> None:
            super().append(task)
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait(0.5)

    def endpoint(tasks: Injected) -> dict[str, int]:
        tasks.tasks = Meeting()
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda name: tasks.add_task(af, name), ("a", "b")))
        return {"scheduled": len({id(event.run.target) for event in env.seen.of(Scheduled)})}

    r = await drive(env.fastapi(endpoint))
    assert r.body == b'{"scheduled":2}'
    assert sorted(LOG) == ["a", "b"]
    assert env.outcomes() == [("af", "succeeded")] * 2


@pytest.mark.parametrize("spec", ["2.3", "2.4"])
async def test_a_run_of_a_response_exists_when_its_body_is_sent(env: Env, spec: str) -> None:
    """Scheduled is emitted before the first chunk, also below ASGI 2.4, where a task of its own streams."""
    at_first_chunk: list[int] = []

    async def chunks() -> Any:
        at_first_chunk.append(len(env.seen.of(Scheduled)))
        yield b"x"

    async def endpoint(request: Any) -> StreamingResponse:
        return StreamingResponse(chunks(), background=BackgroundTask(sf))

    await drive(env.app(endpoint), spec=spec)
    assert at_first_chunk == [1]
    assert env.seen.runs()[0].http_route == "/"


def slow_stream(clock: VirtualClock) -> Callable[..., Any]:
    """An endpoint whose response streams for 50 seconds; its first task takes 7 seconds."""

    async def chunks() -> Any:
        yield b"x"
        clock.advance(50)
        yield b"y"

    async def slow() -> None:
        clock.advance(7)

    async def endpoint(tasks: Injected) -> StreamingResponse:
        tasks.add_task(slow)
        tasks.add_task(af)
        return StreamingResponse(chunks())

    return endpoint


async def test_the_wait_begins_when_the_response_is_sent(env: Env) -> None:
    """A long stream is not part of the queue wait; the run time of an earlier sibling is."""
    with VirtualClock() as clock:
        await drive(env.fastapi(slow_stream(clock)))
    assert [event.queue_wait_s for event in env.seen.of(Started)] == [0, 7]


async def test_a_task_that_is_added_by_a_task_waits_from_then_on(env: Env) -> None:
    """Its queue wait begins when it is added, not at the end of the response."""
    with VirtualClock() as clock:

        async def adder(tasks: BackgroundTasks) -> None:
            clock.advance(5)
            tasks.add_task(af)
            clock.advance(2)

        async def injected(tasks: Injected) -> None:
            tasks.add_task(adder, tasks)

        own = BackgroundTasks()
        own.add_task(adder, own)
        # A task that is added to a container of the app's own is scheduled when its turn comes.
        for app, wait in ((env.app(answering(own)), 0), (env.fastapi(injected), 2)):
            env.seen.clear()
            await drive(app)
            assert [event.queue_wait_s for event in env.seen.of(Started)] == [0, wait]


# --- more than one of a kind


async def test_a_task_object_listed_twice_is_two_runs(env: Env) -> None:
    """Each of them has an id of its own."""
    task = BackgroundTask(af)
    await drive(env.app(answering(BackgroundTasks([task, task]))))
    env.expect("af", "af", log=["af", "af"])
    assert len({run.id for run in env.seen.runs()}) == 2


async def test_a_response_served_again_schedules_new_runs(env: Env) -> None:
    """A shared response has new runs in each request."""
    shared = PlainTextResponse("ok", background=BackgroundTasks([BackgroundTask(af), BackgroundTask(sf)]))

    async def endpoint(request: Any) -> PlainTextResponse:
        return shared

    app = env.app(endpoint)
    for _ in range(3):
        await drive(app)
    env.expect(*["af", "sf"] * 3)
    assert len({run.id for run in env.seen.runs()}) == 6


async def test_a_response_made_at_import_is_scheduled_at_its_start() -> None:
    """The first request with it has the same order of events as any later one."""
    order: list[str] = []
    shared = PlainTextResponse("ok", background=BackgroundTask(af))

    class Order:
        def __call__(self, event: TaskEvent) -> None:
            order.append(type(event).__name__)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def recorded(message: Any) -> None:
            order.append(message["type"].rpartition(".")[2])
            await send(message)

        await inner(scope, receive, recorded)

    inner = Env().mw(shared, Order())
    for _ in range(2):
        await drive(app)
        assert order == ["Scheduled", "start", "body", "Started", "Succeeded"]
        order.clear()


@pytest.mark.timeout(60)  # two seconds on a machine with nothing else to do
async def test_ten_thousand_tasks_in_a_response_all_run_in_order(env: Env) -> None:
    """Each is one run that has succeeded."""
    ran: list[int] = []

    async def number(n: int) -> None:
        ran.append(n)

    await drive(env.app(answering(BackgroundTasks([BackgroundTask(number, n) for n in range(10_000)]))))
    assert ran == list(range(10_000))
    assert len(env.seen.of(Succeeded)) == 10_000


async def test_requests_at_once_keep_their_runs_apart(env: Env) -> None:
    """200 requests with five kinds of faults end with the right number of each outcome."""

    def faulty(fault: int) -> Any:
        async def endpoint(tasks: Injected) -> Any:
            tasks.add_task(af)
            tasks.add_task(sf)
            if fault == 1:
                raise HTTPException(409)
            if fault == 2:
                tasks.tasks.insert(0, BackgroundTask(boom))
            if fault == 3:
                return JSONResponse({}, background=BackgroundTask(af))
            if fault == 4:
                raise KeyError
            return {}

        return endpoint

    app = env.fastapi()
    for fault in range(5):
        app.get(f"/{fault}", response_model=None)(faulty(fault))
    async with anyio.create_task_group() as group:
        for n in range(200):
            group.start_soon(drive, app, f"/{n % 5}")

    ended = env.outcomes()
    for what, count in {
        ("af", "succeeded"): 80,
        ("sf", "succeeded"): 40,
        ("af", "dropped http_exception"): 40,
        ("boom", "failed"): 40,
        ("af", "skipped sibling_failed"): 40,
        ("sf", "skipped sibling_failed"): 40,
        ("af", "dropped own_background"): 40,
        ("sf", "dropped handler_error"): 40,
    }.items():
        assert ended.count(what) == count, what
    assert len(ended) == len(env.seen.runs())


# --- children, and what does nothing


async def test_a_child_has_its_parent_and_no_queue_wait(env: Env) -> None:
    """A task that user code awaits inside a task is a child of its run."""

    async def parent() -> None:
        await BackgroundTask(af)()

    await drive(env.app(answering(BackgroundTask(parent))))
    child, outer = env.seen.of(Started, "af")[0], env.seen.runs("parent")[0]
    assert child.run.parent is outer
    assert child.queue_wait_s is None
    env.expect("parent", "af")


async def test_observe_functions_makes_each_function_a_child(env: Env) -> None:
    """The functions of the user's container, sync and async, are children of the container's run."""

    @observe_functions
    class Queue(BackgroundTasks):
        def __init__(self) -> None:
            super().__init__()
            self.queue: list[Any] = []

        def add_task(self, func: Any, *args: Any, **kwargs: Any) -> None:
            self.queue.append(functools.partial(func, *args, **kwargs))

        async def __call__(self) -> None:
            for call in self.queue:
                result = call()
                if result is not None:
                    await result

    tasks = Queue()
    tasks.add_task(sf, "one")
    tasks.add_task(af, "two")
    await drive(env.app(answering(tasks)))
    assert LOG == ["one", "two"]
    assert env.names() == ["Queue", "sf", "af"]
    assert {run.parent.task.rpartition(".")[2] for run in env.seen.runs() if run.parent} == {"Queue"}


async def test_observe_functions_refuses_other_classes() -> None:
    """The error names the class that it got."""
    with pytest.raises(TypeError, match="a container class with an add_task method, got <class 'int'>"):
        observe_functions(int)


async def test_a_task_that_does_nothing_is_reported_as_a_hazard(env: Env, anyio_backend: str) -> None:
    """Starlette calls a generator function, or a def that returns a coroutine, and nothing of its body runs."""

    def generator() -> Any:
        yield 1

    made: list[Any] = []

    def returns_coroutine() -> Any:
        made.append(af())
        return made[0]

    await drive(env.app(answering(BackgroundTasks([BackgroundTask(generator), BackgroundTask(returns_coroutine)]))))
    kinds = [event.kind for event in env.seen.of(HazardFound)]
    if anyio_backend == "asyncio":
        assert kinds == ["generator", "unawaited_coroutine"]
    else:  # trio itself raises where a thread returns a coroutine
        assert kinds == ["generator"]
        assert isinstance(env.seen.of(Failed)[0].error, TypeError)
    assert all(event.advice for event in env.seen.of(HazardFound))
    made[0].close()  # or Python warns of it when the worker thread frees it, in another test


async def test_current_run_is_set_in_a_task_and_in_its_thread(env: Env) -> None:
    """It is None outside of a task, and right after it."""
    seen: list[Any] = []

    def in_thread() -> None:
        seen.append(current_run())

    async def inline() -> None:
        seen.append(current_run())

    r = await drive(env.app(answering(BackgroundTasks([BackgroundTask(in_thread), BackgroundTask(inline)]))))
    assert r.exc is None
    assert seen == env.seen.runs()
    assert current_run() is None


# --- signals


async def test_a_signal_that_raises_leaves_the_task_and_the_others_alone(caplog: pytest.LogCaptureFixture) -> None:
    """The error is logged under the signal's name and counted, and the signal is called again next time."""
    env, calls, seen = Env(), list[str](), list[str]()
    registry = CollectorRegistry()

    def broken(event: TaskEvent) -> None:
        calls.append(type(event).__name__)
        raise RuntimeError("collector down")

    signals = [broken, lambda event: seen.append(type(event).__name__), Metrics(registry)]
    await drive(env.app_with_signals(signals, answering(BackgroundTask(af))))

    assert LOG == ["af"]
    assert seen == calls == ["Scheduled", "Started", "Succeeded"]
    records: list[Any] = [record for record in caplog.records if not record.message.startswith("alert.")]
    assert [vars(record)["event"] for record in records] == ["signal.failed"] * 3
    assert "broken" in records[0].signal
    component = records[0].signal
    assert registry.get_sample_value("aftertask_self_errors_total", {"component": component}) == 3


async def test_a_response_header_can_list_the_run_ids(env: Env) -> None:
    """`run_ids_header` names it; a response without tasks has none."""
    env.settings |= {"run_ids_header": "X-Run-Ids"}
    tasks = BackgroundTasks([BackgroundTask(af), BackgroundTask(sf)])
    r = await drive(env.app(answering(tasks)))
    assert r.header("x-run-ids") == ", ".join(run.id for run in env.seen.runs())
    assert (await drive(env.app(answering(None)))).header("x-run-ids") is None


async def test_an_error_response_lists_the_runs_that_were_scheduled(env: Env) -> None:
    """It carries no background and its runs are dropped, but they had been scheduled when it was sent."""

    async def refuses(tasks: Injected) -> None:
        tasks.add_task(af)
        raise HTTPException(400)

    env.settings |= {"run_ids_header": "X-Run-Ids"}
    r = await drive(env.fastapi(refuses))
    (run,) = env.seen.runs()
    assert r.status == 400 and r.header("x-run-ids") == run.id
    assert run.outcome is not None and LOG == []


async def test_an_admission_is_awaited_before_the_response_and_may_fail_it(env: Env) -> None:
    """It gets the runs that the response carries; if it raises, the client gets a 500 and the runs are dropped."""
    admitted: list[Any] = []

    class Journal(Signal):
        def __init__(self, error: Exception | None) -> None:
            self.error = error

        async def admit(self, runs: Any) -> None:
            admitted.extend((run.task.rpartition(".")[2], run.attempt) for run in runs)
            if self.error is not None:
                raise self.error

    for error in (None, OSError("disk full")):
        r = await drive(env.app_with_signals([env.seen, Journal(error)], answering(BackgroundTask(af))))
        assert r.exc is error
        assert r.status == (200 if error is None else 500)
    assert admitted == [("af", 0)] * 2
    assert [outcome for _, outcome in env.outcomes()] == ["succeeded", "dropped handler_error"]


async def test_a_request_leaves_no_reference_cycle(env: Env) -> None:
    """Its runs are freed without the garbage collector."""

    def alive() -> int:
        return sum(isinstance(thing, TaskRun) for thing in gc.get_objects())

    app = env.app(answering(BackgroundTasks([BackgroundTask(af), BackgroundTask(sf)])))
    await drive(app)
    env.seen.clear()
    gc.collect()
    gc.disable()
    try:
        before = alive()
        for _ in range(50):
            await drive(app)
        assert len(env.seen.runs()) == 100
        env.seen.clear()
        assert alive() - before < 5  # the worker thread's last call may still be held
    finally:
        gc.enable()


async def test_tasks_of_a_failed_try_are_dropped(env: Env) -> None:
    """
    A middleware inside of ours calls the app again: the tasks of the calls that failed are dropped, the others run.
    """
    tries: list[int] = []

    class Again:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            for _ in range(2):
                with contextlib.suppress(ConnectionError):
                    await self.app(scope, receive, send)
                    break

    async def endpoint(tasks: Injected) -> str:
        tries.append(1)
        tasks.add_task(af)
        if len(tries) % 2:
            raise ConnectionError
        return "ok"

    app = env.fastapi(endpoint)
    app.user_middleware.append(Middleware(Again))
    for _ in range(2):
        await drive(app)
    assert sorted(outcome for _, outcome in env.outcomes()) == ["dropped other", "dropped other", *["succeeded"] * 2]


async def test_another_app_may_respond_after_ours_has_failed(env: Env) -> None:
    """Its tasks run, and if they were observed, every run has ended."""
    plain = FastAPI()

    @plain.get("/")
    async def endpoint(tasks: Injected) -> str:
        tasks.add_task(af)
        return "ok"

    async def failing(scope: Any, receive: Any, send: Any) -> None:
        raise LookupError

    ours = env.mw(failing)

    async def root(scope: Any, receive: Any, send: Any) -> None:
        try:
            await ours(scope, receive, send)
        except LookupError:
            await plain(scope, receive, send)

    await drive(root)
    assert LOG == ["af"]


@pytest.mark.skipif(STARLETTE < (0, 42), reason="before 0.42 Starlette runs the tasks of a client that has gone")
@pytest.mark.parametrize("late", [False, True])
async def test_a_client_that_goes_drops_a_task_that_was_added_while_streaming(env: Env, late: bool) -> None:
    """It has the same reason as a task that was added before the response started."""
    streams: list[Any] = []

    async def endpoint(tasks: Injected) -> StreamingResponse:
        async def chunks() -> Any:
            yield b"x"
            if late:
                tasks.add_task(af)
            yield b"y"

        if not late:
            tasks.add_task(af)
        streams.append(chunks())
        return StreamingResponse(streams[0], background=tasks)

    r = await drive(env.fastapi(endpoint), send_fails_after=2)
    await streams[0].aclose()  # Starlette does not
    assert isinstance(r.exc, OSError)
    assert env.outcomes() == [("af", "dropped client_gone")]


@pytest.mark.parametrize("background", [None, BackgroundTask(af)])
async def test_the_request_in_the_scope_is_no_reference_cycle(env: Env, background: Any) -> None:
    """uvicorn's `send` is a method of the object that holds the scope: our record in the scope must not keep it."""

    class Cycle:
        """One request, as uvicorn holds it."""

        def __init__(self) -> None:
            self.scope = {"type": "http", "method": "GET", "path": "/", "root_path": "", "headers": []}
            self.sent: list[str] = []

        async def receive(self) -> dict[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(self, message: Any) -> None:
            self.sent.append(message["type"])

    for app in env.app(answering(background)), env.mw(PlainTextResponse("x", background=background)):
        await app(Cycle().scope, Cycle().receive, Cycle().send)
        gc.collect()
        gc.disable()
        try:
            cycle = Cycle()
            await app(cycle.scope, cycle.receive, cycle.send)
            assert cycle.sent == ["http.response.start", "http.response.body"]
            gone = weakref.ref(cycle)
            del cycle
            env.seen.clear()
            assert gone() is None
        finally:
            gc.enable()


class Slotted(PlainTextResponse):
    """A response that keeps an attribute outside of its `__dict__`."""

    __slots__ = ("extra",)


async def test_a_response_is_copied_and_pickled_as_without_the_middleware(env: Env) -> None:
    """A process without aftertask may read the pickle: a cache, shared while a new version is rolled out."""
    env.mw(PlainTextResponse("installs the hooks"))
    task = BackgroundTask(af)
    empty, carrying = PlainTextResponse("x"), PlainTextResponse("x", background=task)
    for response, background in ((empty, None), (carrying, task)):
        state: Any = response.__getstate__()
        assert state["background"] is background
        assert state.keys() == {"status_code", "background", "body", "raw_headers"}
        assert copy.copy(response).background is background
    assert pickle.loads(pickle.dumps(empty)).background is None
    slotted = Slotted("x")
    slotted.extra = 3
    assert copy.copy(slotted).extra == 3 and copy.copy(slotted).background is None
    carrying.background = None
    assert carrying.background is None
    assert copy.copy(carrying).background is None
    for response in (empty, carrying):
        del response.background
        with pytest.raises(AttributeError, match="background"):
            response.background  # noqa: B018  # the read is what is tried
        with pytest.raises(AttributeError, match="background"):
            del response.background


# --- context


async def test_an_app_that_calls_another_observed_app_keeps_its_own_tasks() -> None:
    """Each app's tasks reach the signals of that app only."""
    outer, inner = Env(), Env()
    mounted = inner.mw(PlainTextResponse("inner", background=BackgroundTask(af)))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def nowhere(message: Any) -> None: ...

        await mounted(scope, receive, nowhere)
        await PlainTextResponse("outer", background=BackgroundTask(sf))(scope, receive, send)

    await drive(outer.mw(app))
    assert inner.outcomes() == [("af", "succeeded")]
    assert outer.outcomes() == [("sf", "succeeded")]


@pytest.mark.parametrize(("context", "seen"), [("request", "unset"), ("endpoint", "set")])
async def test_context_variables_of_a_sync_endpoint_reach_its_tasks_on_request(context: Any, seen: str) -> None:
    """With `context="endpoint"` its tasks see what it set in its worker thread, and nothing after them does."""
    env = Env()
    env.settings, env.signals = {"context": context}, [env.seen]
    variable = ContextVar("variable", default="unset")
    read: list[str] = []

    def task() -> None:
        read.append(variable.get())

    def endpoint(tasks: Injected) -> None:
        variable.set("set")
        tasks.add_task(task)

    app = FastAPI()
    app.get("/")(endpoint)

    async def outer(scope: Any, receive: Any, send: Any) -> None:
        await app(scope, receive, send)
        read.append(variable.get())

    await drive(env.mw(outer))
    assert read == [seen, "unset"]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])  # trio itself ends a task that leaves one open
async def test_a_task_that_leaves_a_cancel_scope_open_stops_no_sibling(env: Env) -> None:
    """Ours is around it and cannot be closed then; without the middleware the next task would run, too."""

    async def leaves_one_open() -> None:
        anyio.CancelScope().__enter__()

    app = env.app(answering(BackgroundTasks([BackgroundTask(leaves_one_open), BackgroundTask(sf)])))

    async def in_a_task_of_its_own(*call: Any) -> None:  # as a server does: `drive` has a scope, too
        await asyncio.create_task(app(*call))

    result = await drive(in_a_task_of_its_own)
    assert result.exc is None
    assert LOG == ["sf"]
    assert env.outcomes() == [("leaves_one_open", "succeeded"), ("sf", "succeeded")]
