"""The life of a run: when it is scheduled, how it ends, and what comes out of it."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import pickle
import time
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import anyio
import pytest
import starlette
from fastapi import BackgroundTasks as Injected
from fastapi import Depends, FastAPI, HTTPException, WebSocket
from starlette.applications import Starlette
from starlette.background import BackgroundTask, BackgroundTasks
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse

from aftertask import HazardFound, TaskEvent, TaskRun, current_run, get_run, observe_functions
from aftertask.events import Dropped, Failed, Scheduled, Signal, Skipped, Started, Succeeded
from aftertask.testing import VirtualClock
from kit import LOG, Env, Layer, Stop, af, answering, boom, drive, sf

pytestmark = pytest.mark.anyio

STARLETTE = tuple(map(int, starlette.__version__.split(".")[:2]))


# --- what comes out


async def test_an_exception_comes_out_as_itself(env: Env) -> None:
    """The same object, its traceback ending in the task, without a cause or context of ours."""
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


async def test_an_exception_group_is_a_failure_as_it_is(env: Env) -> None:
    """Its members are not taken apart."""
    group = ExceptionGroup("two", [ValueError("a"), KeyError("b")])

    async def many() -> None:
        raise group

    r = await drive(env.app(answering(BackgroundTask(many))))
    assert r.exc is group
    assert env.seen.of(Failed)[0].failure.type == "ExceptionGroup"


async def test_a_base_exception_of_the_tasks_own_is_a_failure_and_raised(env: Env) -> None:
    """It ends the batch: what had not started is skipped because of it."""

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
    """The started run is cancelled, the cancellation goes on, and what had not started is dropped."""
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


async def test_a_task_that_raises_while_being_cancelled_has_failed(env: Env) -> None:
    """What it raised is what happened to it."""
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
    """With the run that is to blame."""
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
        (HTTPException(499), "http_exception"),
        (HTTPException(500), "handler_error"),
        (KeyError("x"), "handler_error"),
    ],
)
async def test_tasks_of_a_handler_that_raises_are_dropped(env: Env, error: Exception, reason: str, layers: int) -> None:
    """Also under BaseHTTPMiddleware, where the response is sent from another task."""

    async def endpoint(tasks: Injected) -> None:
        tasks.add_task(sf)
        raise error

    app = env.fastapi(endpoint)
    app.user_middleware += [Middleware(Layer)] * layers
    await drive(app)
    assert env.outcomes() == [("sf", f"dropped {reason}")]
    assert env.seen.of(Dropped)[0].bad is (reason == "handler_error")


async def test_an_error_that_an_app_handles_is_a_handler_error(env: Env) -> None:
    """A registered exception handler answers, and the tasks are dropped all the same."""

    async def endpoint(tasks: Injected) -> None:
        tasks.add_task(sf)
        raise LookupError

    async def handler(request: Any, error: Exception) -> PlainTextResponse:
        return PlainTextResponse("sorry", status_code=409)

    r = await drive(env.fastapi(endpoint, exception_handlers={LookupError: handler}))
    assert r.status == 409
    assert env.outcomes() == [("sf", "dropped handler_error")]


async def test_tasks_of_a_dependency_are_dropped_when_validation_fails(env: Env) -> None:
    """The dependency has added them before the request was found wrong."""

    def dependency(tasks: Injected) -> None:
        tasks.add_task(sf)

    async def endpoint(number: int, _: None = Depends(dependency)) -> None: ...

    r = await drive(env.fastapi(endpoint))
    assert r.status == 422
    assert env.outcomes() == [("sf", "dropped validation")]


async def test_a_response_with_its_own_background_drops_the_injected_tasks(env: Env) -> None:
    """FastAPI leaves them out without a word."""

    async def endpoint(tasks: Injected) -> JSONResponse:
        tasks.add_task(sf)
        return JSONResponse({}, background=BackgroundTask(af))

    await drive(env.fastapi(endpoint))
    assert env.outcomes() == [("af", "succeeded"), ("sf", "dropped own_background")]


@pytest.mark.skipif(STARLETTE < (0, 42), reason="before 0.42 Starlette runs the tasks of a client that has gone")
async def test_a_client_that_goes_drops_the_tasks(env: Env) -> None:
    """From ASGI 2.4 on, where send raises; for injected tasks and those of a response."""

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


async def test_the_tasks_of_a_response_from_around_the_middleware_all_end(env: Env) -> None:
    """The error page of a 500 is served after the middleware has returned; each of its runs ends all the same."""

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
    """Under BaseHTTPMiddleware, which completes the response before it raises the error."""

    async def chunks() -> Any:
        yield b"x"
        raise KeyError("in the stream")

    async def endpoint(request: Any) -> StreamingResponse:
        return StreamingResponse(chunks(), background=BackgroundTask(sf))

    await drive(env.app(endpoint, middleware=[Middleware(Layer)]))
    assert [outcome for _, outcome in env.outcomes()] == ["dropped request_failed"]


async def test_injected_tasks_of_a_websocket_never_run(env: Env) -> None:
    """FastAPI has no place where it would run them."""
    app = FastAPI()
    app.user_middleware.insert(0, env.middleware())

    @app.websocket("/")
    async def endpoint(websocket: WebSocket, tasks: Injected) -> None:
        await websocket.accept()
        tasks.add_task(sf)
        await websocket.close()

    await drive(app, type="websocket")
    assert env.outcomes() == [("sf", "dropped websocket")]


async def test_what_is_thrown_away_schedules_nothing(env: Env) -> None:
    """A response or container that is built and not returned is nobody's business."""

    async def endpoint(request: Any) -> PlainTextResponse:
        PlainTextResponse("no", background=BackgroundTask(sf))
        BackgroundTasks().add_task(sf)
        return PlainTextResponse("ok")

    await drive(env.app(endpoint))
    assert env.seen.events == []


async def test_what_user_code_runs_itself_is_not_dropped(env: Env) -> None:
    """A handler that awaits its injected tasks has run them."""

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
    """Told there, in the endpoint, before the response."""
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


@pytest.mark.parametrize("spec", ["2.3", "2.4"])
async def test_a_run_of_a_response_exists_from_its_start_on(env: Env, spec: str) -> None:
    """Before the body is sent; also below ASGI 2.4, where the stream is a task of its own."""
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
    """An endpoint whose response streams for 50 seconds, and whose first task takes 7, which the second waits."""

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
    """A long stream is no time in the queue; a sibling's run time is."""
    with VirtualClock() as clock:
        await drive(env.fastapi(slow_stream(clock)))
    assert [event.queue_wait_s for event in env.seen.of(Started)] == [0, 7]


async def test_a_task_that_is_added_by_a_task_waits_from_then_on(env: Env) -> None:
    """Not from the end of the response."""
    with VirtualClock() as clock:

        async def adder(tasks: BackgroundTasks) -> None:
            clock.advance(5)
            tasks.add_task(af)
            clock.advance(2)

        async def injected(tasks: Injected) -> None:
            tasks.add_task(adder, tasks)

        own = BackgroundTasks()
        own.add_task(adder, own)
        # Nobody knows of what is added to a container of the app's own before its turn comes.
        for app, wait in ((env.app(answering(own)), 0), (env.fastapi(injected), 2)):
            env.seen.clear()
            await drive(app)
            assert [event.queue_wait_s for event in env.seen.of(Started)] == [0, wait]


# --- more than one of a kind


async def test_a_task_object_listed_twice_is_two_runs(env: Env) -> None:
    """Each with an id of its own."""
    task = BackgroundTask(af)
    await drive(env.app(answering(BackgroundTasks([task, task]))))
    env.expect("af", "af", log=["af", "af"])
    assert len({run.id for run in env.seen.runs()}) == 2


async def test_a_container_served_twice_is_new_runs(env: Env) -> None:
    """A shared response schedules anew for each request."""
    shared = PlainTextResponse("ok", background=BackgroundTasks([BackgroundTask(af), BackgroundTask(sf)]))

    async def endpoint(request: Any) -> PlainTextResponse:
        return shared

    app = env.app(endpoint)
    for _ in range(3):
        await drive(app)
    env.expect(*["af", "sf"] * 3)
    assert len({run.id for run in env.seen.runs()}) == 6


async def test_a_shared_response_is_seen_at_its_start() -> None:
    """Its background was there before the request; the first time is as any other."""
    order: list[str] = []
    shared = PlainTextResponse("ok", background=BackgroundTask(af))

    class Order:
        def __call__(self, event: TaskEvent) -> None:
            order.append(type(event).__name__)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def told(message: Any) -> None:
            order.append(message["type"].rpartition(".")[2])
            await send(message)

        await inner(scope, receive, told)

    inner = Env().mw(shared, Order())
    for _ in range(2):
        await drive(app)
        assert order == ["Scheduled", "start", "body", "Started", "Succeeded"]
        order.clear()


async def test_ten_thousand_tasks_in_a_response(env: Env) -> None:
    """All run once, in order, at a cost that does not grow with their number."""
    ran: list[int] = []

    async def number(n: int) -> None:
        ran.append(n)

    async def cost(count: int) -> float:
        ran.clear()
        env.seen.clear()
        app = env.app(answering(BackgroundTasks([BackgroundTask(number, n) for n in range(count)])))
        started = time.process_time()
        await drive(app)
        spent = time.process_time() - started
        assert ran == list(range(count))
        assert len(env.seen.of(Succeeded)) == count
        return spent / count

    small = min([await cost(1_000) for _ in range(3)])
    large = await cost(10_000)
    assert large < 4 * small


async def test_two_hundred_requests_at_once_with_mixed_faults(env: Env) -> None:
    """Every run is accounted for."""

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

    app = FastAPI()
    app.user_middleware.insert(0, env.middleware())
    for fault in range(5):
        app.get(f"/{fault}", response_model=None)(faulty(fault))
    async with anyio.create_task_group() as group:
        for n in range(200):
            group.start_soon(drive, app, f"/{n % 5}")

    told = env.outcomes()
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
        assert told.count(what) == count, what
    assert len(told) == len(env.seen.runs())


# --- children, and what does nothing


async def test_a_child_knows_its_parent_and_has_no_wait(env: Env) -> None:
    """A task that user code runs inside a task."""

    async def parent() -> None:
        await BackgroundTask(af)()

    await drive(env.app(answering(BackgroundTask(parent))))
    child, outer = env.seen.of(Started, "af")[0], env.seen.runs("parent")[0]
    assert child.run.parent is outer
    assert child.queue_wait_s is None
    env.expect("parent", "af")


async def test_the_functions_of_a_container_can_be_children(env: Env) -> None:
    """observe_functions: each function is a run of its own, sync and async, and stays what it is."""

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


async def test_observe_functions_wants_a_container() -> None:
    """Anything else is told."""
    with pytest.raises(TypeError, match="a container class with an add_task method, got <class 'int'>"):
        observe_functions(int)


async def test_what_does_nothing_is_told_as_a_hazard(env: Env, anyio_backend: str) -> None:
    """A generator function, and a def that returns a coroutine: Starlette calls them, and nothing happens."""

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
    made[0].close()  # or it is complained of whenever the worker thread lets go of it, in another test


async def test_the_current_run_is_known_in_a_task_and_in_its_thread(env: Env) -> None:
    """And nowhere else, also not right after it."""
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
    """It is logged by name and called again next time."""
    env, seen = Env(), list[TaskEvent]()
    calls: list[str] = []

    def broken(event: TaskEvent) -> None:
        calls.append(type(event).__name__)
        raise RuntimeError("collector down")

    class Both:
        def __call__(self, event: TaskEvent) -> None:
            for signal in (env.seen, seen.append):
                signal(event)

    from prometheus_client import CollectorRegistry

    from aftertask import AftertaskMiddleware, Settings
    from aftertask.signals import Metrics

    registry = CollectorRegistry()
    app = AftertaskMiddleware(
        Starlette(routes=env.app(answering(BackgroundTask(af))).routes),
        settings=Settings(registry=registry),
        signals=[broken, Both(), Metrics(registry)],
    )
    await drive(app)

    assert LOG == ["af"]
    assert [type(event).__name__ for event in seen] == calls == ["Scheduled", "Started", "Succeeded"]
    records: list[Any] = [record for record in caplog.records if not record.message.startswith("alert.")]
    assert [record.message for record in records] == ["signal.failed"] * 3
    assert "broken" in records[0].signal
    component = records[0].signal
    assert registry.get_sample_value("aftertask_self_errors_total", {"component": component}) == 3


async def test_the_ids_of_the_runs_can_be_in_a_header() -> None:
    """`run_ids_header` names it."""
    from prometheus_client import CollectorRegistry

    from aftertask import AftertaskMiddleware, Settings

    env = Env()
    settings = Settings(registry=CollectorRegistry(), run_ids_header="X-Run-Ids")
    inner = Starlette(routes=env.app(answering(BackgroundTasks([BackgroundTask(af), BackgroundTask(sf)]))).routes)
    r = await drive(AftertaskMiddleware(inner, settings=settings, signals=[env.seen]))
    assert r.header("x-run-ids") == ", ".join(run.id for run in env.seen.runs())
    without = await drive(AftertaskMiddleware(PlainTextResponse("ok"), settings=settings, signals=[]))
    assert without.header("x-run-ids") is None


async def test_the_response_to_an_error_names_the_injected_runs_too() -> None:
    """It carries no background, and they will not run; that they were scheduled is all that its messages know."""
    from prometheus_client import CollectorRegistry

    from aftertask import AftertaskMiddleware, Settings

    env, inner = Env(), FastAPI()

    @inner.get("/")
    async def refuses(tasks: Injected) -> None:
        tasks.add_task(af)
        raise HTTPException(400)

    settings = Settings(registry=CollectorRegistry(), run_ids_header="X-Run-Ids")
    r = await drive(AftertaskMiddleware(inner, settings=settings, signals=[env.seen]))
    (run,) = env.seen.runs()
    assert r.status == 400 and r.header("x-run-ids") == run.id
    assert run.outcome is not None and LOG == []


async def test_an_admission_is_awaited_before_the_response_and_may_fail_it() -> None:
    """With the runs that the response carries; nothing is sent where it raises, and the runs are told as dropped."""
    from prometheus_client import CollectorRegistry

    from aftertask import AftertaskMiddleware, Settings

    env, admitted = Env(), list[Any]()

    class Journal(Signal):
        def __init__(self, error: Exception | None) -> None:
            self.error = error

        async def admit(self, runs: Any) -> None:
            admitted.extend((run.task.rpartition(".")[2], run.attempt) for run in runs)
            if self.error is not None:
                raise self.error

    inner = Starlette(routes=env.app(answering(BackgroundTask(af))).routes)
    for error in (None, OSError("disk full")):
        settings = Settings(registry=CollectorRegistry())
        r = await drive(AftertaskMiddleware(inner, settings=settings, signals=[env.seen, Journal(error)]))
        assert r.exc is error
        assert (r.status is None) is (error is not None)
    assert admitted == [("af", 0)] * 2
    assert [outcome for _, outcome in env.outcomes()] == ["succeeded", "dropped handler_error"]


async def test_a_request_leaves_no_garbage(env: Env) -> None:
    """No reference cycle: what a request made is gone with it, without the collector."""

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


async def test_an_app_that_is_called_again_for_a_request_leaves_nothing_behind(env: Env) -> None:
    """A middleware inside of ours that tries again: the tasks of the tries that failed are dropped."""
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


async def test_an_app_without_us_that_serves_the_scope_after_ours_keeps_its_tasks(env: Env) -> None:
    """What comes once ours has failed is seen as a response from around us, if at all, and always told to its end."""
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
async def test_a_task_that_comes_while_the_response_streams_knows_that_it_has_started(env: Env, late: bool) -> None:
    """So a client that goes then is told as gone, as for a task that was there before."""

    async def endpoint(tasks: Injected) -> StreamingResponse:
        async def chunks() -> Any:
            yield b"x"
            if late:
                tasks.add_task(af)
            yield b"y"

        if not late:
            tasks.add_task(af)
        return StreamingResponse(chunks(), background=tasks)

    r = await drive(env.fastapi(endpoint), send_fails_after=2)
    assert isinstance(r.exc, OSError)
    assert env.outcomes() == [("af", "dropped client_gone")]


@pytest.mark.parametrize("background", [None, BackgroundTask(af)])
async def test_a_server_that_holds_the_scope_is_gone_with_its_request(env: Env, background: Any) -> None:
    """uvicorn sends by a method of what holds the scope: our mark must not keep it, in an app nor around one."""

    class Cycle:
        """One request, as uvicorn has it."""

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
    """A response that keeps something outside of its `__dict__`."""

    __slots__ = ("extra",)


async def test_a_response_is_copied_and_pickled_as_without_us(env: Env) -> None:
    """It may be read by a process that has no aftertask: a cache, shared while a new version is rolled out."""
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


async def test_the_request_belongs_to_the_outer_app_again_when_a_mounted_one_is_done() -> None:
    """Each app's own tasks are told to its own signals."""
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
async def test_what_a_sync_endpoint_set_reaches_its_tasks_if_asked(context: Any, seen: str) -> None:
    """`context="endpoint"`: the variables of its worker thread, for its own tasks and for nothing after them."""
    from prometheus_client import CollectorRegistry

    from aftertask import AftertaskMiddleware, Settings

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

    settings = Settings(registry=CollectorRegistry(), context=context)
    await drive(AftertaskMiddleware(outer, settings=settings, signals=[]))
    assert read == [seen, "unset"]
