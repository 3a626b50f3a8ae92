"""The route of a run: the template as the app's OpenAPI shows it, with every prefix; never a raw path."""

from __future__ import annotations

import functools
import gc
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI, WebSocket
from fastapi import BackgroundTasks as Injected
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.convertors import UUIDConvertor
from starlette.endpoints import HTTPEndpoint
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import PlainTextResponse
from starlette.routing import Host, Mount, Route, Router, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.testclient import TestClient, WebSocketDenialResponse

from aftertask import AftertaskMiddleware, Settings
from aftertask.testing import Recorder
from kit import FASTAPI

ID = "6F9619FF-8B86-D011-B42D-00CF4FC964FF"
if not re.fullmatch(UUIDConvertor.regex, ID):  # Starlette 0.41 matches small letters only
    ID = ID.lower()


def task() -> None:
    """A task."""


async def endpoint(request: Any) -> PlainTextResponse:
    """Respond with a task; many routes share it."""
    return PlainTextResponse("ok", background=BackgroundTask(task))


async def bound(first: int, request: Any) -> PlainTextResponse:
    """The same, with an argument bound before."""
    return PlainTextResponse("ok", background=BackgroundTask(task))


class Item(HTTPEndpoint):
    """The same as a class."""

    async def get(self, request: Any) -> PlainTextResponse:
        """Respond with a task."""
        return PlainTextResponse("ok", background=BackgroundTask(task))


async def denied(websocket: Any) -> None:
    """Refuse a WebSocket by a response with a task."""
    await websocket.send_denial_response(PlainTextResponse("no", 403, background=BackgroundTask(task)))


async def with_task(request: Any, error: Any) -> PlainTextResponse:
    """Handle an error by a response with a task."""
    return PlainTextResponse("no", error.status_code, background=BackgroundTask(task))


async def add_task_to_all(request: Any, call_next: Any) -> Any:
    """Give every response a task, as middleware that writes an audit log does."""
    response = await call_next(request)
    response.background = BackgroundTask(task)
    return response


def observed(app: Any) -> Recorder:
    """Add the middleware to an app."""
    recorder = Recorder()
    app.add_middleware(AftertaskMiddleware, settings=Settings(registry=CollectorRegistry()), signals=[recorder])
    return recorder


def routes_of(app: Any, *paths: str, method: str = "GET", **client: Any) -> list[str | None]:
    """The routes of the runs that these requests schedule."""
    recorder = observed(app)
    with TestClient(app, raise_server_exceptions=False, **client) as browser:
        for path in paths:
            browser.request(method, path)
    return [run.request.http_route for run in recorder.runs()]


# --- Starlette

STARLETTE: list[tuple[str, str | None]] = [
    ("/", "/"),
    ("/items/secret", "/items/{id}"),
    ("/class/secret", "/class/{id}"),
    ("/partial/secret", "/partial/{id}"),
    # Converters: what was requested is not what the endpoint gets.
    ("/numbers/007", "/numbers/{number}"),
    ("/floats/1.50", "/floats/{number}"),
    (f"/ids/{ID}", "/ids/{id}"),
    ("/files/deep/secret.txt", "/files/{name}"),
    # Mounts: of routes, of a router, of an app, one in another, with and without middleware, at the root.
    ("/shop/items/secret", "/shop/items/{id}"),
    ("/shop/deep/secret/x", "/shop/deep/{id}/x"),
    ("/app/items/secret", "/app/items/{id}"),
    ("/app/", "/app/"),
    ("/zipped/items/secret", "/zipped/items/{id}"),
    ("/wrapped/items/secret", "/wrapped/items/{id}"),
    ("/at-root/secret", "/at-root/{id}"),
    ("/of/secret/items/3", "/of/{customer}/items/{id}"),
    ("/of/items/items/items", "/of/{customer}/items/{id}"),
    ("/versions/v1/v1", "/versions/{ver}/{ver2}"),
    ("/numbered/007/007", "/numbered/{a}/{b}"),
    (f"/owned/{ID}/files/a/{ID}", "/owned/{id}/files/{name}"),
    # An app whose routes cannot be seen serves all below its mount.
    ("/plain/secret", "/plain/{path}"),
]


def starlette_app() -> Starlette:
    """An app with one route or mount of each kind."""
    items = Route("/items/{id}", endpoint)
    sub_app = Starlette(routes=[Route("/", endpoint), items])
    return Starlette(
        routes=[
            Route("/", endpoint),
            items,
            Route("/class/{id}", Item),
            Route("/partial/{id}", functools.partial(bound, 1)),
            Route("/numbers/{number:int}", endpoint),
            Route("/floats/{number:float}", endpoint),
            Route("/ids/{id:uuid}", endpoint),
            Route("/files/{name:path}", endpoint),
            Mount("/shop", routes=[items, Mount("/deep", app=Router([Route("/{id}/x", endpoint)]))]),
            Mount("/app", app=sub_app),
            Mount("/zipped", app=GZipMiddleware(BaseHTTPMiddleware(sub_app, add_task_to_all))),
            Mount("/wrapped", routes=[items], middleware=[Middleware(GZipMiddleware)]),
            Mount("/of/{customer}", routes=[items]),
            Mount("/versions/{ver}", routes=[Route("/{ver2}", endpoint)]),
            Mount("/numbered/{a:int}", routes=[Route("/{b:int}", endpoint)]),
            Mount("/owned/{id:uuid}", routes=[Route("/files/{name:path}", endpoint)]),
            Mount("/plain", app=PlainTextResponse("ok", background=BackgroundTask(task))),
            Mount("/", routes=[Route("/at-root/{id}", endpoint)]),
        ]
    )


@pytest.mark.parametrize(("path", "route"), STARLETTE)
def test_starlettes_routes_and_mounts(path: str, route: str) -> None:
    """Each way to nest them has its whole template, whatever the values in the path are."""
    found = routes_of(starlette_app(), path)
    assert found
    assert set(found) == {route}


def test_one_app_serves_all_its_routes() -> None:
    """Requests one after another do not mix up the routes of one endpoint."""
    paths = [path for path, _ in STARLETTE if "zipped" not in path]
    assert routes_of(starlette_app(), *paths, *paths) == [dict(STARLETTE)[path] for path in paths] * 2


def test_the_first_route_that_matches_is_the_one() -> None:
    """One function at `/` and as a catch-all is served by the first, as Starlette does it."""
    app = Starlette(routes=[Route("/", endpoint), Route("/{path:path}", endpoint)])
    assert routes_of(app, "/a/b", "/") == ["/{path}", "/"]


@pytest.mark.parametrize(
    ("method", "path", "route"),
    [("GET", "/secret", None), ("GET", "/shop/secret", None), ("POST", "/items/secret", "/items/{id}")],
)
def test_a_response_to_an_error(method: str, path: str, route: str | None) -> None:
    """Without a route there is no template (404); a route of another method is one (405)."""
    items = [Route("/items/{id}", endpoint)]
    app = Starlette(routes=[*items, Mount("/shop", routes=items)], exception_handlers={404: with_task, 405: with_task})
    assert routes_of(app, path, method=method) == [route]


def test_files_of_a_mount(tmp_path: Path) -> None:
    """The name of the file is no part of the template."""
    (tmp_path / "secret.txt").write_text("x")
    app = Starlette(routes=[Mount("/static", StaticFiles(directory=tmp_path))])
    app.add_middleware(BaseHTTPMiddleware, dispatch=add_task_to_all)
    assert routes_of(app, "/static/secret.txt") == ["/static/{path}"]


@pytest.mark.parametrize(
    ("host", "path", "route"),
    [
        ("api.example.org", "/items/secret", "/items/{id}"),
        ("secret.example.org", "/items/secret", "/items/{number}"),
        ("elsewhere.org", "/shop/items/secret", "/shop/items/{id}"),
    ],
)
def test_hosts(host: str, path: str, route: str) -> None:
    """A host is no part of the template; inside of it everything is as elsewhere."""
    items = Route("/items/{id}", endpoint)
    app = Starlette(
        routes=[
            Host("api.example.org", app=Router([items])),
            Host("{customer}.example.org", app=Starlette(routes=[Mount("/items", routes=[Route("/{number}", Item)])])),
            Mount("/shop", routes=[Host("elsewhere.org", app=Router([items]))]),
        ]
    )
    assert routes_of(app, path, base_url=f"http://{host}") == [route]


@pytest.mark.parametrize("path", ["/api/shop/items/secret", "/api/of/secret/items/secret"])
def test_below_a_root_path_of_the_server(path: str) -> None:
    """The root path is no part of the template."""
    route = "/shop/items/{id}" if "shop" in path else "/of/{customer}/items/{id}"
    assert routes_of(starlette_app(), path, root_path="/api") == [route]


@pytest.mark.parametrize("path", ["/items/secret", "/api/items/secret"])
def test_a_proxy_may_remove_the_root_path(path: str) -> None:
    """With and without it in the path."""
    assert routes_of(starlette_app(), path, root_path="/api") == ["/items/{id}"]


def test_a_path_that_begins_like_the_root_path() -> None:
    """`/apiary` is not below `/api`."""
    assert routes_of(Starlette(routes=[Route("/apiary/{id}", endpoint)]), "/apiary/1", root_path="/api") == [
        "/apiary/{id}"
    ]


def test_a_websocket_that_is_refused() -> None:
    """A WebSocket's response has the template of its route, in a mount too."""
    app = Starlette(routes=[WebSocketRoute("/ws/{id}", denied), Mount("/of/{x}", routes=[WebSocketRoute("/", denied)])])
    recorder = observed(app)
    for path in ("/ws/secret", "/of/secret/"):
        with pytest.raises(WebSocketDenialResponse), TestClient(app).websocket_connect(path):
            pass
    assert [run.request.http_route for run in recorder.runs()] == ["/ws/{id}", "/of/{x}/"]


def test_no_route_is_none() -> None:
    """An ASGI app without routes has no template."""
    recorder = Recorder()
    app = PlainTextResponse("ok", background=BackgroundTask(task))
    wrapped = AftertaskMiddleware(app, settings=Settings(registry=CollectorRegistry()), signals=[recorder])
    TestClient(wrapped).get("/secret")
    assert [run.request.http_route for run in recorder.runs()] == [None]


def test_an_app_whose_routes_cannot_be_seen() -> None:
    """A function around an app hides its routes: no template, rather than a wrong one."""
    inner = Starlette(routes=[Route("/items/{id}", endpoint)])

    async def hiding(scope: Any, receive: Any, send: Any) -> None:
        await inner(scope, receive, send)

    app = Starlette(routes=[Mount("/hidden", app=hiding)])
    assert routes_of(app, "/hidden/items/secret", "/hidden/items/other") == [None, None]


def test_a_route_that_is_added_later() -> None:
    """Routes may be added while the app runs, for an endpoint that has one already."""
    app = Starlette(routes=[Route("/old/{id}", endpoint)])
    recorder = observed(app)
    client = TestClient(app)
    client.get("/old/secret")
    app.router.routes.append(Route("/new/{id}", endpoint))
    client.get("/new/secret")
    assert [run.request.http_route for run in recorder.runs()] == ["/old/{id}", "/new/{id}"]


# --- FastAPI


def fastapi_router(**options: Any) -> APIRouter:
    """A router with one route of each kind."""
    router = APIRouter(**options)

    @router.get("/orders/{number}")
    async def order(number: int, tasks: Injected) -> None:
        tasks.add_task(task)

    @router.get("/files/{name:path}")
    def file(name: str, tasks: Injected) -> None:
        tasks.add_task(task)

    @router.post("/orders/{number}")
    async def change(number: int) -> PlainTextResponse:
        return PlainTextResponse("ok", background=BackgroundTask(task))

    @router.websocket("/ws/{id}")
    async def ws(websocket: WebSocket, id: str) -> None:
        await denied(websocket)

    router.add_route("/raw/{id}", endpoint)
    return router


def flat() -> FastAPI:
    """An included router without a prefix."""
    app = FastAPI()
    app.include_router(fastapi_router())
    return app


def prefixes() -> FastAPI:
    """A prefix of the router's own, and one of its inclusion."""
    app = FastAPI()
    app.include_router(fastapi_router(prefix="/own"), prefix="/included")
    return app


def nested() -> FastAPI:
    """Routers in routers, with a parameter in a prefix; the innermost is included twice."""
    app, outer, middle, inner = FastAPI(), APIRouter(prefix="/outer"), APIRouter(), fastapi_router()
    middle.include_router(inner, prefix="/of/{customer}")
    outer.include_router(middle, prefix="/middle")
    app.include_router(outer)
    app.include_router(inner, prefix="/again")
    return app


def mounted() -> FastAPI:
    """An app with an included router, mounted twice, once with a parameter; and mounts below it."""
    app, sub_app = FastAPI(), FastAPI()
    sub_app.include_router(fastapi_router(), prefix="/v1")
    sub_app.mount("/deeper", flat())
    app.mount("/admin", sub_app)
    app.mount("/of/{number}", sub_app)
    return app


def starlettes() -> FastAPI:
    """Starlette's routes and mounts in FastAPI, and the other way round."""
    app = FastAPI()
    app.mount("/starlette", Starlette(routes=[Mount("/shop", app=prefixes()), Route("/raw/{id}", endpoint)]))
    app.add_route("/raw/{id}", endpoint)
    app.host("api.example.org", prefixes())
    return app


def mounts_in_routers() -> FastAPI:
    """A mount and a host in an included router."""
    app, router = FastAPI(), APIRouter()
    router.mount("/shop", Starlette(routes=[Route("/raw/{id}", endpoint)]))
    router.host("api.example.org", prefixes())
    app.include_router(router, prefix="/v1")
    return app


FASTAPIS: list[tuple[Callable[[], FastAPI], str, str]] = [
    (flat, "/orders/007", "/orders/{number}"),
    (flat, "/files/deep/secret.txt", "/files/{name}"),
    (flat, "/raw/secret", "/raw/{id}"),
    (prefixes, "/included/own/orders/007", "/included/own/orders/{number}"),
    (prefixes, "/included/own/files/a/b", "/included/own/files/{name}"),
    (prefixes, "/included/raw/secret", "/included/raw/{id}"),
    (nested, "/outer/middle/of/7/orders/7", "/outer/middle/of/{customer}/orders/{number}"),
    (nested, "/outer/middle/of/7/files/7", "/outer/middle/of/{customer}/files/{name}"),
    (nested, "/again/orders/7", "/again/orders/{number}"),
    (mounted, "/admin/v1/orders/007", "/admin/v1/orders/{number}"),
    (mounted, "/of/7/v1/orders/7", "/of/{number}/v1/orders/{number}"),
    (mounted, "/of/v1/v1/files/v1/v1", "/of/{number}/v1/files/{name}"),
    (mounted, "/admin/deeper/orders/7", "/admin/deeper/orders/{number}"),
    (starlettes, "/raw/secret", "/raw/{id}"),
    (starlettes, "/starlette/raw/secret", "/starlette/raw/{id}"),
    (starlettes, "/starlette/shop/included/own/orders/7", "/starlette/shop/included/own/orders/{number}"),
    (starlettes, "http://api.example.org/included/own/orders/7", "/included/own/orders/{number}"),
]
if FASTAPI >= (0, 138):  # before, an included router lost its mounts, and a route of Starlette's some of its prefixes
    FASTAPIS += [
        (nested, "/outer/middle/of/7/raw/7", "/outer/middle/of/{customer}/raw/{id}"),
        (mounts_in_routers, "/v1/shop/raw/secret", "/v1/shop/raw/{id}"),
        (mounts_in_routers, "http://api.example.org/v1/included/own/orders/7", "/v1/included/own/orders/{number}"),
    ]


@pytest.mark.parametrize(("make", "path", "route"), FASTAPIS)
def test_fastapis_routers_and_apps(make: Callable[[], FastAPI], path: str, route: str) -> None:
    """The prefixes of routers in routers, of mounts and of apps in apps are in the template."""
    assert routes_of(make(), path) == [route]


@pytest.mark.parametrize("make", [flat, prefixes, nested])
def test_the_template_is_the_one_of_the_openapi(make: Callable[[], FastAPI]) -> None:
    """Every template is a path of the app's own documentation."""
    app = make()
    documented = list(app.openapi()["paths"])
    found = routes_of(app, *(path.format(customer=1, number=7, name="a/b") for path in documented))
    assert sorted(str(route) for route in found) == sorted(documented)


def test_an_other_method_of_the_same_path() -> None:
    """`POST` has the template of `GET`, also where the response carries the task."""
    assert routes_of(nested(), "/again/orders/7", method="POST") == ["/again/orders/{number}"]


def test_a_websocket_of_an_included_router() -> None:
    """Its response has the whole template, too."""
    app = prefixes()
    recorder = observed(app)
    with pytest.raises(WebSocketDenialResponse), TestClient(app).websocket_connect("/included/own/ws/secret"):
        pass
    assert [run.request.http_route for run in recorder.runs()] == ["/included/own/ws/{id}"]


@pytest.mark.filterwarnings("ignore:The `root_path` parameter is deprecated")
@pytest.mark.parametrize("path", ["/orders/7", "/api/orders/7"])
def test_below_a_root_path_of_the_app(path: str) -> None:
    """`FastAPI(root_path=…)` is no part of the template, whether a proxy removes it or not."""
    app = FastAPI(root_path="/api")
    app.include_router(fastapi_router())
    assert routes_of(app, path) == ["/orders/{number}"]


@pytest.mark.filterwarnings("ignore:The `root_path` parameter is deprecated")
def test_a_mounted_app_with_a_root_path() -> None:
    """It may name the prefix that it is mounted under."""
    app, sub_app = FastAPI(), FastAPI(root_path="/sub")
    sub_app.include_router(fastapi_router())
    app.mount("/sub", sub_app)
    assert routes_of(app, "/sub/orders/7") == ["/sub/orders/{number}"]


def test_the_path_of_an_inclusion_alone() -> None:
    """An included route may have no path of its own."""
    app, router = FastAPI(), APIRouter()

    @router.get("")
    async def users(tasks: Injected) -> None:
        tasks.add_task(task)

    app.include_router(router, prefix="/users")
    assert routes_of(app, "/users") == ["/users"]


def test_an_app_can_be_collected() -> None:
    """Nothing that is remembered of its routes keeps it alive."""
    app = prefixes()
    assert routes_of(app, "/included/own/orders/7")
    gone = weakref.ref(app)
    del app
    gc.collect()
    assert gone() is None
