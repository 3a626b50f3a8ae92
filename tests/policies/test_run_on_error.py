"""A compensating task of a handler that then raises: run after the error response, where FastAPI drops it."""

from __future__ import annotations

import contextlib
import gc
from typing import Any

import anyio
import pytest
from fastapi import BackgroundTasks as Injected
from fastapi import Depends, FastAPI, HTTPException, Query
from fastapi.responses import JSONResponse
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware

from aftertask import Policy, Retry, task
from aftertask.events import Failed, Started, Succeeded
from aftertask.signals import Tracing
from aftertask.testing import VirtualClock
from kit import LOG, Env, Traced, boom, drive, sf, until

pytestmark = pytest.mark.anyio


@pytest.fixture
def refund(env: Env) -> Any:
    """A task that runs on errors; what had been sent by then is in the log."""

    @task(run_on_error=True)
    async def refund(order: int = 1) -> None:
        """A task that runs on errors and notes that it did."""
        LOG.append(f"refund {order}")

    return refund


def raising(error: Exception, *functions: Any) -> Any:
    """A handler that adds tasks, then raises."""

    async def endpoint(tasks: Injected) -> None:
        for function in functions:
            tasks.add_task(function)
        raise error

    return endpoint


async def served(app: Any) -> list[str]:
    """The messages of a response and what its tasks did, in order."""
    LOG.clear()

    async def logged(scope: Any, receive: Any, send: Any) -> None:
        async def log(message: Any) -> None:
            LOG.append(message["type"].rpartition(".")[2])
            await send(message)

        await app(scope, receive, log)

    await drive(logged)
    return list(LOG)


@pytest.mark.parametrize("error", [HTTPException(409), ValueError("x")], ids=["http_exception", "handler_error"])
async def test_a_compensating_task_runs_after_the_error_response(env: Env, refund: Any, error: Exception) -> None:
    """The client has the whole response by then; other tasks of the handler are dropped as ever."""
    app = env.fastapi(raising(error, sf, refund))
    assert await served(app) == ["start", "body", "refund 1"]
    reason = "http_exception" if isinstance(error, HTTPException) else "handler_error"
    assert sorted(env.outcomes()) == [("refund", "succeeded"), ("sf", f"dropped {reason}")]
    (run,) = [event.run for event in env.seen.of(Succeeded)]
    assert run.origin == "run_on_error"
    assert run.http_route == "/"
    assert env.seen.of(Started)[0].queue_wait_s is not None


async def test_a_validation_error_is_compensated(env: Env, refund: Any) -> None:
    """A dependency added the task before another parameter was found invalid."""

    async def dependency(tasks: Injected) -> None:
        tasks.add_task(refund)

    async def endpoint(number: int = Query(), given: None = Depends(dependency)) -> None: ...

    r = await drive(env.fastapi(endpoint))
    assert r.status == 422
    assert LOG == ["refund 1"]


async def test_the_apps_own_error_page_comes_first(env: Env, refund: Any) -> None:
    """The page's own background runs before the compensating task."""

    async def page(request: Any, error: Exception) -> JSONResponse:
        return JSONResponse("sorry", 500, background=BackgroundTask(sf))

    app = env.fastapi(raising(ValueError("x"), refund), exception_handlers={Exception: page})
    assert await served(app) == ["start", "body", "sf", "refund 1"]


async def test_a_compensating_task_runs_below_other_middlewares(env: Env, refund: Any) -> None:
    """A middleware may be around ours, or between ours and the endpoint."""

    async def through(request: Any, call_next: Any) -> Any:
        return await call_next(request)

    for place in ("inside", "outside"):
        app = env.fastapi(raising(ValueError("x"), refund))
        if place == "outside":
            app.add_middleware(BaseHTTPMiddleware, dispatch=through)
        else:
            app.user_middleware.append(Middleware(BaseHTTPMiddleware, dispatch=through))
        assert await served(app) == ["start", "body", "refund 1"], place


async def test_a_wrapped_app_compensates_after_its_own_error_page(env: Env, refund: Any) -> None:
    """Starlette's error page inside of ours is the error response."""
    app = FastAPI()
    app.get("/")(raising(ValueError("x"), refund))
    assert await served(env.mw(app)) == ["start", "body", "refund 1"]


async def test_errors_of_compensating_tasks_do_not_come_out(env: Env, clock: VirtualClock) -> None:
    """The server gets the handler's error alone; the task's policy holds, and it is retried."""
    env.settings["policies"] = {boom.__module__ + ".boom": Policy(run_on_error=True, retry=Retry(attempts=2))}
    error = ValueError("the handler's")
    results: list[Any] = []

    async def request() -> None:
        results.append(await drive(env.fastapi(raising(error, boom, boom))))

    async with anyio.create_task_group() as group:
        group.start_soon(request)
        for _ in range(2):
            await clock.until_waiting()
            clock.advance(60)
    assert results[0].exc is error
    assert LOG == ["boom"] * 4
    assert len(env.seen.of(Failed)) == 2


async def test_without_an_error_a_compensating_task_runs_once(env: Env, refund: Any) -> None:
    """It is a task like any other of its response."""

    async def endpoint(tasks: Injected) -> str:
        tasks.add_task(refund)
        return "ok"

    await drive(env.fastapi(endpoint))
    assert LOG == ["refund 1"]
    assert env.seen.runs()[0].origin == "request"


async def test_without_an_error_response_a_compensating_task_is_dropped(env: Env, refund: Any) -> None:
    """
    If a middleware around ours swallows the exception, the run is dropped when the request is freed.

    Not in the place that frees it, which the garbage collector chooses, and where a lock may be held, but right after.
    """

    class Swallow:
        """A middleware that responds to errors itself."""

        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            """Serve a request."""
            try:
                await self.app(scope, receive, send)
            except ValueError:
                await send({"type": "http.response.start", "status": 500, "headers": []})
                await send({"type": "http.response.body", "body": b""})

    async def endpoint(tasks: Injected) -> None:
        tasks.add_task(refund)
        raise ValueError  # a new one: one that is kept would keep the request, by its traceback

    app = env.fastapi(endpoint)
    app.add_middleware(Swallow)
    r = await drive(app)
    assert r.status == 500
    del r
    gc.collect()
    assert env.outcomes() == []
    await until(env.outcomes)
    assert env.outcomes() == [("refund", "dropped handler_error")]


@pytest.mark.parametrize("twice", [False, True])
async def test_a_compensating_task_runs_below_another_middleware_of_ours(env: Env, refund: Any, twice: bool) -> None:
    """A mounted app may have its own; the same app may have two by mistake."""

    async def endpoint(tasks: Injected) -> None:
        tasks.add_task(refund)
        raise ValueError("x")

    inner, outer = env.fastapi(endpoint), Env()
    LOG.clear()
    app = inner
    if twice:
        inner.user_middleware.insert(0, outer.middleware())
        with pytest.warns(UserWarning, match="added twice"):
            inner.middleware_stack = inner.build_middleware_stack()
    else:
        app = outer.fastapi()
        app.mount("/in", inner)
    r = await drive(app, "/" if twice else "/in/")
    assert r.status == 500
    assert LOG == ["refund 1"]


async def test_compensating_tasks_wait_for_their_siblings(env: Env) -> None:
    """They are queued together when the error response has been sent; a sibling's run time is part of the wait."""
    with VirtualClock() as clock:

        @task(name="first", run_on_error=True)
        async def first() -> None:
            clock.advance(7)

        @task(name="second", run_on_error=True)
        async def second() -> None: ...

        await drive(env.fastapi(raising(HTTPException(409), first, second)))
    assert [(event.run.task, event.queue_wait_s) for event in env.seen.of(Started)] == [("first", 0), ("second", 7)]


async def test_a_compensating_task_runs_once(env: Env, refund: Any) -> None:
    """Not again while the request is kept; if a batch is cut off, the remaining runs are dropped."""

    class Ended(BaseException):
        """An error that is not contained."""

    @task(name="cut", run_on_error=True)
    async def cut() -> None:
        raise Ended

    kept = [await drive(env.fastapi(raising(error, refund))) for error in (HTTPException(409), ValueError("x"))]
    assert [r.status for r in kept] == [409, 500]
    assert LOG == ["refund 1"] * 2
    env.seen.clear()

    with contextlib.suppress(Ended):
        await drive(env.fastapi(raising(HTTPException(409), cut, refund)))
    assert env.outcomes() == [("cut", "failed"), ("refund", "dropped http_exception")]


async def test_the_span_of_a_compensating_task_is_a_child_of_the_request(env: Env, refund: Any) -> None:
    """`aftertask.origin` shows why it ran."""
    traced = Traced()
    env.signals = [Tracing(traced.provider), env.seen]
    for error in (HTTPException(409), ValueError("x")):
        with traced.provider.get_tracer("test").start_as_current_span("request") as request:
            await drive(env.fastapi(raising(error, refund)))
        (span,) = traced.spans()
        assert span.parent is not None
        assert span.parent.span_id == request.get_span_context().span_id
        assert (span.attributes or {})["aftertask.origin"] == "run_on_error"
        traced.exporter.clear()
