"""Traps without an error: what was given as a task does nothing, never runs, or starts too early."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from fastapi import BackgroundTasks, FastAPI, WebSocket
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry
from starlette.background import BackgroundTask
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse

from aftertask import AftertaskMiddleware, HazardFound, Settings
from aftertask.testing import Recorder
from kit import STARLETTE


def found(events: Recorder) -> list[tuple[str, str]]:
    """The kind and the task of each hazard."""
    return [(event.kind, event.run.task.rpartition(".")[2]) for event in events.of(HazardFound)]


def watched(app: FastAPI, registry: CollectorRegistry) -> tuple[TestClient, Recorder]:
    """A client of an app under the middleware, and its events."""
    events = Recorder()
    app.add_middleware(AftertaskMiddleware, settings=Settings(registry=registry), signals=[events])
    return TestClient(app), events


def numbers() -> Iterator[int]:
    yield 1


async def numbers_async() -> AsyncIterator[int]:
    yield 1


async def fine() -> None:
    """Does what a task should."""


async def numbers_of_bytes() -> None:
    """Another task."""


forgotten: list[Any] = []


def forgets_to_await() -> Any:
    forgotten.append(fine())
    return forgotten[-1]


async def endpoint_as_task() -> JSONResponse:
    return JSONResponse({})


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (numbers, "generator"),
        (numbers_async, "generator"),
        (forgets_to_await, "unawaited_coroutine"),
        (endpoint_as_task, "response_returned"),
    ],
)
def test_a_function_that_does_nothing_useful_as_a_task(
    function: Callable[[], Any], kind: str, client_for: Any, registry: CollectorRegistry
) -> None:
    """The run succeeds, as without us; the hazard shows that it did nothing."""
    events = Recorder()
    client_for(function, signals=[events]).get("/")
    assert found(events) == [(kind, function.__name__)]
    assert events.outcomes() == [(function.__name__, "succeeded")]
    for coroutine in forgotten:
        coroutine.close()  # or it is complained of whenever the worker thread lets go of it, in another test


def test_a_websocket_endpoints_tasks_never_run(registry: CollectorRegistry) -> None:
    """They are a hazard when they are added, and dropped in the end."""
    app = FastAPI()

    @app.websocket("/ws")
    async def ws(socket: WebSocket, tasks: BackgroundTasks) -> None:
        await socket.accept()
        tasks.add_task(fine)
        await socket.close()

    client, events = watched(app, registry)
    with client.websocket_connect("/ws"):
        pass
    assert found(events) == [("websocket", "fine")]
    assert events.outcomes() == [("fine", "dropped")]


def test_a_task_that_adds_to_its_own_batch(registry: CollectorRegistry) -> None:
    """The task that does it is named; what it added runs, as it does without us."""
    app = FastAPI()

    @app.get("/")
    async def endpoint(tasks: BackgroundTasks) -> None:
        async def adds() -> None:
            tasks.add_task(fine)

        tasks.add_task(adds)

    client, events = watched(app, registry)
    client.get("/")
    assert found(events) == [("mutated_tasks", "adds")]
    assert events.outcomes() == [("adds", "succeeded"), ("fine", "succeeded")]


class Holding:
    """A middleware that sends nothing before the app inside has ended."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        held: list[Any] = []

        async def keep(message: Any) -> None:
            held.append(message)

        await self.app(scope, receive, keep)
        for message in held:
            await send(message)


class Passing(BaseHTTPMiddleware):
    """Passes everything on."""

    async def dispatch(self, request: Any, call_next: Any) -> Any:
        return await call_next(request)


@pytest.mark.parametrize("injected", [True, False])
def test_a_task_that_starts_before_the_response_is_complete(injected: bool, registry: CollectorRegistry) -> None:
    """One hazard for the batch, when the response's end comes after all."""
    app = FastAPI()

    @app.get("/")
    async def endpoint(tasks: BackgroundTasks) -> Any:
        if injected:
            tasks.add_task(fine)
            return {}
        return PlainTextResponse("", background=BackgroundTask(fine))

    app.add_middleware(Holding)
    client, events = watched(app, registry)
    for _ in range(2):
        client.get("/")
    assert found(events) == [("started_early", "fine")] * 2


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_base_http_middleware_is_a_trap_only_where_starlette_makes_it_one(
    count: int, streaming: bool, registry: CollectorRegistry
) -> None:
    """Three of them start the task too early before Starlette 1.7; elsewhere there is no hazard."""
    app, order = FastAPI(), list[str]()

    async def notes() -> None:
        order.append("task")

    async def parts() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b"part"

    @app.get("/")
    async def endpoint() -> Any:
        background = BackgroundTask(notes)
        return (
            StreamingResponse(parts(), background=background)
            if streaming
            else PlainTextResponse("", 200, {}, None, background)
        )

    for _ in range(count):
        app.add_middleware(Passing)
    _, events = watched(app, registry)

    async def noting(scope: Any, receive: Any, send: Any) -> None:
        async def note(message: Any) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body"):
                order.append("complete")
            await send(message)

        await app(scope, receive, note)

    TestClient(noting).get("/")
    early = order == ["task", "complete"]
    assert found(events) == ([("started_early", "notes")] if early else [])
    if count < 3 or STARLETTE >= (1, 7):
        assert not early
    elif not streaming:
        assert early


@pytest.mark.parametrize("injects", [True, False])
def test_a_middleware_that_sets_a_background_is_no_trap(injects: bool, registry: CollectorRegistry) -> None:
    """The usual logging middleware adds a task to the response of `call_next`: the client has its answer first."""
    app = FastAPI()

    @app.get("/")
    async def endpoint(tasks: BackgroundTasks) -> None:
        if injects:
            tasks.add_task(fine)

    client, events = watched(app, registry)

    @app.middleware("http")
    async def log_it(request: Any, call_next: Any) -> Any:
        response = await call_next(request)
        response.background = BackgroundTask(numbers_of_bytes)
        return response

    client.get("/")
    assert found(events) == []
    assert sorted(events.outcomes()) == [("fine", "succeeded")] * injects + [("numbers_of_bytes", "succeeded")]
