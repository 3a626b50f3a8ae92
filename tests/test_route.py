"""The route that a run is told with: a template, with its mounts, and never the path."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import APIRouter, FastAPI
from fastapi import BackgroundTasks as Injected
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route, Router
from starlette.testclient import TestClient

from aftertask import AftertaskMiddleware, Settings
from aftertask.testing import Recorder


def task() -> None: ...


async def endpoint(request: Any) -> PlainTextResponse:
    return PlainTextResponse("ok", background=BackgroundTask(task))


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/items/secret", "/items/{id}"),
        ("/shop/items/secret", "/shop/items/{id}"),
        ("/shop/deep/secret/x", "/shop/deep/{id}/x"),
        ("/of/secret/items/3", "/of/{customer}/items/{id}"),
    ],
)
def test_starlettes_routes_and_mounts(path: str, route: str) -> None:
    """Also where a mount has a parameter."""
    recorder = Recorder()
    items = Route("/items/{id}", endpoint)
    routes = [
        items,
        Mount(
            "/shop", routes=[Route("/items/{id}", endpoint), Mount("/deep", app=Router([Route("/{id}/x", endpoint)]))]
        ),
        Mount("/of/{customer}", routes=[Route("/items/{id}", endpoint)]),
    ]
    settings = Settings(registry=CollectorRegistry())
    middleware = [Middleware(AftertaskMiddleware, settings=settings, signals=[recorder])]
    assert TestClient(Starlette(routes=routes, middleware=middleware)).get(path).status_code == 200
    assert [run.http_route for run in recorder.runs()] == [route]


@pytest.mark.parametrize(
    ("path", "route"),
    [("/v1/orders/secret", "/v1/orders/{number}"), ("/admin/v1/orders/secret", "/admin/v1/orders/{number}")],
)
def test_fastapis_routers_and_mounted_apps(path: str, route: str) -> None:
    """With the prefixes of both."""
    recorder = Recorder()
    app, router = FastAPI(), APIRouter(prefix="/v1")

    @router.get("/orders/{number}")
    async def order(number: str, tasks: Injected) -> None:
        tasks.add_task(task)

    app.include_router(router)
    admin = FastAPI()
    admin.include_router(router)
    app.mount("/admin", admin)
    app.add_middleware(AftertaskMiddleware, settings=Settings(registry=CollectorRegistry()), signals=[recorder])
    assert TestClient(app).get(path).status_code == 200
    assert [run.http_route for run in recorder.runs()] == [route]


def test_no_route_is_none() -> None:
    """An ASGI app without routes has none to tell."""
    recorder = Recorder()
    app = PlainTextResponse("ok", background=BackgroundTask(task))
    wrapped = AftertaskMiddleware(app, settings=Settings(registry=CollectorRegistry()), signals=[recorder])
    TestClient(wrapped).get("/secret")
    assert [run.http_route for run in recorder.runs()] == [None]
