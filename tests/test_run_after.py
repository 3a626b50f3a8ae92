"""`Settings(run_after="request")` beside everything else; with databases it is tested in `database/`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry
from sqlalchemy import create_engine
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse

from aftertask import AftertaskMiddleware, Settings
from aftertask.events import Dropped, Started
from aftertask.testing import Recorder
from database.stores import Shop, SyncStore
from kit import LOG, Env, Layer, af, boom, drive, tasks_come_first

AFTER_REQUEST = pytest.mark.parametrize("env", ["request"], indirect=True)


@tasks_come_first
@pytest.mark.parametrize("layers", [(), (Layer,)])
def test_tasks_of_a_stream_and_below_a_middleware(tmp_path: Path, layers: Any) -> None:
    """They see the rows, too."""
    store = SyncStore(create_engine(f"sqlite:///{tmp_path / 'shop.db'}"))
    shop = Shop(store, "request", None, *layers)
    with shop.client() as client:
        for what in ("mails", "streams"):
            assert client.post(f"/{what}").status_code == 200
    store.close()
    assert shop.rows_seen == [1, 1, 2, 2]
    shop.check_accounts()


def test_the_environment_can_choose_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """`AFTERTASK_RUN_AFTER`; another value is refused by name."""
    monkeypatch.setenv("AFTERTASK_RUN_AFTER", "request")
    assert Settings.from_env().run_after == "request"
    monkeypatch.setenv("AFTERTASK_RUN_AFTER", "commit")
    with pytest.raises(ValueError, match="run_after must be one of 'response', 'request', got 'commit'"):
        Settings.from_env()


@pytest.mark.anyio
@AFTER_REQUEST
async def test_a_stream_that_breaks_drops_the_tasks(env: Env) -> None:
    """The response was never complete, and its tasks never ran."""

    async def parts() -> Any:
        yield "one"
        raise LookupError("no more")

    async def endpoint(request: Request) -> StreamingResponse:
        return StreamingResponse(parts(), background=BackgroundTask(af))

    error = (await drive(env.app(endpoint))).exc
    while isinstance(error, BaseExceptionGroup):  # as Starlette 0.41 raises it
        (error,) = error.exceptions
    assert isinstance(error, LookupError)
    assert env.outcomes() == [("af", "dropped handler_error")]
    assert LOG == []


@pytest.mark.anyio
@AFTER_REQUEST
async def test_a_middleware_that_fails_after_the_response_drops_the_tasks(env: Env) -> None:
    """Whatever raises before the call has returned, no task runs."""

    class Fails:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await self.app(scope, receive, send)
            raise LookupError("after the response")

    async def endpoint(request: Request) -> PlainTextResponse:
        return PlainTextResponse("x", background=BackgroundTask(af))

    result = await drive(env.app(endpoint, middleware=[Middleware(Fails)]))
    assert (result.status, type(result.exc)) == (200, LookupError)
    (dropped,) = env.seen.of(Dropped)
    assert (dropped.reason, dropped.error_type, dropped.bad) == ("request_failed", "LookupError", True)
    assert LOG == []


@pytest.mark.anyio
@AFTER_REQUEST
async def test_a_failure_reaches_the_server_and_nothing_inside(env: Env) -> None:
    """As ever it is the same object; a middleware inside has ended by then."""
    inside: list[str] = []

    class Inside:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            try:
                await self.app(scope, receive, send)
            except Exception:
                inside.append("failed")
                raise
            inside.append("ended")
            LOG.append("ended")

    async def endpoint(request: Request) -> PlainTextResponse:
        return PlainTextResponse("x", background=BackgroundTask(boom))

    result = await drive(env.app(endpoint, middleware=[Middleware(Inside)]))
    assert (result.status, str(result.exc)) == (200, "boom")
    assert inside == ["ended"]
    assert LOG == ["ended", "boom"]


@pytest.mark.anyio
@AFTER_REQUEST
async def test_the_queue_wait_includes_the_time_until_the_request_has_ended(env: Env) -> None:
    """It begins with the last byte of the response, as ever."""

    class Slow:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await self.app(scope, receive, send)
            await anyio.sleep(0.1)

    async def endpoint(request: Request) -> PlainTextResponse:
        return PlainTextResponse("x", background=BackgroundTask(af))

    await drive(env.app(endpoint, middleware=[Middleware(Slow)]))
    (started,) = env.seen.of(Started)
    assert started.queue_wait_s is not None and started.queue_wait_s >= 0.1


def test_a_mounted_app_waits_for_the_whole_request() -> None:
    """The middleware of the outer app holds the tasks; dependencies of the inner one have ended."""
    order: list[str] = []
    inner, outer, seen = FastAPI(), FastAPI(), Recorder()

    def dependency() -> Iterator[None]:
        yield
        order.append("dependency")

    @inner.get("/")
    def endpoint(tasks: BackgroundTasks, given: None = Depends(dependency)) -> None:
        tasks.add_task(order.append, "task")

    outer.mount("/inner", inner)
    settings = Settings(registry=CollectorRegistry(), run_after="request")
    outer.add_middleware(AftertaskMiddleware, settings=settings, signals=[seen])
    assert TestClient(outer).get("/inner/").status_code == 200
    assert order == ["dependency", "task"]
    assert [run.run.http_route for run in seen.of(Started)] == ["/inner/"]
