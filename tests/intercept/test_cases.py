"""
The behaviour that an app keeps and the tasks that are seen, case by case: every kind of background, response, source,
middleware and nesting. Each runs on asyncio and trio; after each of them every run has ended exactly once.
"""

from __future__ import annotations

import contextvars
import copy
import functools
import heapq
import inspect
import pickle
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest
from fastapi import APIRouter, Depends, FastAPI
from fastapi import BackgroundTasks as FBT
from starlette._utils import is_async_callable
from starlette.applications import Starlette
from starlette.background import BackgroundTask, BackgroundTasks
from starlette.concurrency import run_in_threadpool
from starlette.endpoints import HTTPEndpoint
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import (
    FileResponse,
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Mount, Route, Router, WebSocketRoute

from aftertask import Policy, observe_functions
from aftertask.events import Started
from aftertask.testing import Recorder
from kit import LOG, Env, Layer, Traced, af, answering, boom, drive, sf

pytestmark = pytest.mark.anyio


# --- kinds of background


async def test_an_async_task_of_a_response_is_observed(env: Env) -> None:
    """A response with a BackgroundTask is sent whole, and its async task is one run."""
    r = await drive(env.app(answering(BackgroundTask(af))))
    assert r.status == 200 and r.body == b"ok"
    env.expect("af", log=["af"])


async def test_a_sync_task_of_a_response_is_observed(env: Env) -> None:
    """A sync task is one run, too."""
    await drive(env.app(answering(BackgroundTask(sf))))
    env.expect("sf", log=["sf"])


async def test_each_task_of_a_container_is_a_run(env: Env) -> None:
    """BackgroundTasks runs its tasks in order; each is one run."""
    t = BackgroundTasks()
    t.add_task(af)
    t.add_task(sf, "z")
    await drive(env.app(answering(t)))
    env.expect("af", "sf", log=["af", "z"])


async def test_tasks_given_to_the_constructor_are_observed(env: Env) -> None:
    """BackgroundTasks may get its tasks as a list."""
    t = BackgroundTasks(tasks=[BackgroundTask(af), BackgroundTask(sf)])
    await drive(env.app(answering(t)))
    env.expect("af", "sf", log=["af", "sf"])


class Timed(BackgroundTasks):
    async def __call__(self):
        LOG.append("t0")
        await super().__call__()
        LOG.append("t1")


async def test_a_container_that_calls_super_keeps_its_order(env: Env) -> None:
    """A container class that surrounds the framework's loop runs as ever, and its tasks are observed."""
    t = Timed()
    t.add_task(af)
    t.add_task(sf)
    await drive(env.app(answering(t)))
    assert LOG == ["t0", "af", "sf", "t1"]
    assert "af" in env.names() and "sf" in env.names(), env.names()


class PQ(BackgroundTasks):
    """A container that keeps its tasks in a heap and runs them itself."""

    def __init__(self):
        super().__init__()
        self.q = []

    def add_task(self, func, *args, priority=0, **kwargs):
        heapq.heappush(self.q, (priority, len(self.q), func, args, kwargs))

    async def __call__(self):
        while self.q:
            _, _, func, args, kwargs = heapq.heappop(self.q)
            if inspect.iscoroutinefunction(func):
                await func(*args, **kwargs)
            else:
                await run_in_threadpool(func, *args, **kwargs)


async def test_a_container_with_a_loop_of_its_own_is_observed(env: Env) -> None:
    """A container class that runs functions itself is one run."""
    t = PQ()
    t.add_task(af, "late", priority=5)
    t.add_task(sf, "early", priority=1)
    await drive(env.app(answering(t)))
    assert LOG == ["early", "late"], LOG
    assert env.names(), "nothing observed"


async def test_observe_functions_observes_each_function_of_a_container(env: Env) -> None:
    """Decorated with observe_functions, its functions are runs of their own."""
    t = observe_functions(type("PQ", (PQ,), {}))()
    t.add_task(af, "late", priority=5)
    t.add_task(sf, "early", priority=1)
    await drive(env.app(answering(t)))
    assert LOG == ["early", "late"], LOG
    assert {"af", "sf"} <= set(env.names()), env.names()


class Parallel(BackgroundTasks):
    async def __call__(self):
        async with anyio.create_task_group() as tg:
            for t in self.tasks:
                tg.start_soon(t)


async def test_tasks_that_a_container_runs_in_parallel_are_observed(env: Env) -> None:
    """A container class may run its tasks in a task group."""
    t = Parallel()
    t.add_task(af)
    t.add_task(sf)
    await drive(env.app(answering(t)))
    assert sorted(LOG) == ["af", "sf"]
    assert {"af", "sf"} <= set(env.names()), env.names()


class RetryTask(BackgroundTask):
    async def __call__(self):
        for _ in range(3):
            try:
                await super().__call__()
                break
            except ValueError:
                continue


async def test_each_call_that_a_task_class_makes_is_a_child(env: Env) -> None:
    """A task class that calls its function three times is one run with three children."""
    await drive(env.app(answering(RetryTask(boom))))
    assert LOG == ["boom"] * 3
    assert env.names()[0] == "RetryTask" and env.names().count("boom") == 3, env.names()


async def test_an_async_function_as_background_is_observed(env: Env) -> None:
    """`background=` may be any awaitable callable: an async function."""
    await drive(env.app(answering(af)))
    env.expect("af", log=["af"])


class AsyncCallable:
    async def __call__(self):
        LOG.append("ac")


async def test_a_callable_object_as_background_is_observed(env: Env) -> None:
    """An object with an async `__call__` is observed under the name of its class."""
    await drive(env.app(answering(AsyncCallable())))
    env.expect("AsyncCallable", log=["ac"])


async def test_a_partial_and_a_lambda_as_background_are_observed(env: Env) -> None:
    """A partial of an async function and a lambda that returns a coroutine are one run each."""

    async def e1(request):
        return PlainTextResponse("ok", background=functools.partial(af, "p"))

    async def e2(request):
        return PlainTextResponse("ok", background=lambda: af("l"))

    app = env.app(e1, e2)
    await drive(app)
    await drive(app, "/1")
    assert LOG == ["p", "l"] and len(env.names()) == 2, env.names()


async def test_a_background_that_is_not_observed_runs_as_ever(env: Env) -> None:
    """With `observe=False` each kind of background runs once, also a class and a callable of the app's own."""
    env.settings = {"policies": {"*": Policy(observe=False)}}
    container = type("Container", (Timed,), {})()
    container.add_task(af, "container")
    backgrounds = [BackgroundTask(af), RetryTask(sf), container, af, AsyncCallable()]
    app = env.app(*map(answering, backgrounds))
    for place in range(len(backgrounds)):
        r = await drive(app, f"/{place}" if place else "/")
        assert r.exc is None, r.exc
    assert LOG == ["af", "sf", "t0", "container", "t1", "af", "ac"]
    assert env.seen.events == []


# --- response classes
async def test_every_response_class_is_observed(env: Env) -> None:
    """JSON, HTML, redirects and plain responses."""
    for cls, arg in ((JSONResponse, {}), (HTMLResponse, "x"), (RedirectResponse, "/x"), (Response, b"x")):
        await drive(env.app(answering(BackgroundTask(af), cls, arg)))
    env.expect("af", "af", "af", "af", log=["af"] * 4)


async def test_a_stream_is_observed_with_every_asgi_version(env: Env) -> None:
    """Starlette streams in another way from ASGI 2.4 on; the task is observed in each."""

    async def gen():
        yield "a"
        yield "b"

    for spec in ("2.0", "2.3", "2.4"):

        async def e(request):
            return StreamingResponse(gen(), background=BackgroundTask(af))

        r = await drive(env.app(e), spec=spec)
        assert r.body == b"ab"
    env.expect("af", "af", "af", log=["af"] * 3)


async def test_a_client_that_leaves_an_endless_stream_does_not_stop_the_task(env: Env) -> None:
    """Below ASGI 2.4 Starlette ends the stream and runs the task."""

    async def gen():
        while True:
            yield "a"
            await anyio.lowlevel.checkpoint()

    async def e(request):
        return StreamingResponse(gen(), background=BackgroundTask(af))

    await drive(env.app(e), spec="2.3", early_disconnect=True)
    env.expect("af", log=["af"])


async def test_a_file_response_is_observed(env: Env, tmp_path: Path) -> None:
    """The file is sent whole, then the task runs."""
    (tmp_path / "hello.txt").write_bytes(b"hello")
    r = await drive(env.app(answering(BackgroundTask(af), FileResponse, str(tmp_path / "hello.txt"))))
    assert r.body == b"hello"
    env.expect("af", log=["af"])


class OwnCall(JSONResponse):
    async def __call__(this, s, r, snd):  # other parameter names
        await snd({"type": "http.response.start", "status": 200, "headers": []})
        await snd({"type": "http.response.body", "body": b"own"})
        if this.background:
            await this.background()


class Helper(Response):
    async def __call__(self, scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"own"})
        await self._finish()

    async def _finish(self):
        async def inner():
            if self.background is not None:
                await self.background()

        await inner()


class SuperCall(Response):
    async def __call__(self, scope, receive, send):
        await super().__call__(scope, receive, send)
        LOG.append(isinstance(self.background, BackgroundTask))


async def test_a_response_class_with_its_own_call_is_observed(env: Env) -> None:
    """Its `__call__` may name its parameters as it likes."""
    await drive(env.app(answering(BackgroundTask(af), OwnCall, {})))
    await drive(env.app(answering(af, OwnCall, {})))
    env.expect("af", "af", log=["af", "af"])


async def test_a_background_that_is_awaited_in_a_helper_is_observed(env: Env) -> None:
    """A response class may await its background in a method or a closure."""
    await drive(env.app(answering(BackgroundTask(af), Helper, b"")))
    await drive(env.app(answering(af, Helper, b"")))
    env.expect("af", "af", log=["af", "af"])


async def test_a_response_class_that_calls_super_is_observed_once(env: Env) -> None:
    """Two hooked calls are one run, and the background keeps its class; after the request it comes last."""
    await drive(env.app(answering(BackgroundTask(af), SuperCall, b"")))
    env.expect("af", log=[True, "af"] if env.settings["run_after"] == "request" else ["af", True])


class Tupled(PlainTextResponse):
    """A response class whose `__call__` is decorated."""

    def deco(f):
        @functools.wraps(f)
        async def w(*a, **k):
            return await f(*a, **k)

        return w

    @deco
    async def __call__(self, scope, receive, send):
        await Response.__call__(self, scope, receive, send)


async def test_a_decorated_call_is_observed(env: Env) -> None:
    """The decorator of a response class's `__call__` does not hide its task."""
    await drive(env.app(answering(BackgroundTask(af), Tupled)))
    env.expect("af", log=["af"])


class ShadowDefault(Response):
    background = None  # class attribute shadows anything on Response

    def __init__(self, content, background=None):
        Response.__init__(self, content, background=background)


async def test_a_class_attribute_named_background_does_no_harm(env: Env) -> None:
    """A response class may have a default `background` on the class."""
    await drive(env.app(answering(BackgroundTask(af), ShadowDefault, b"x")))
    env.expect("af", log=["af"])


class NotAResponse:
    def __init__(self, background):
        self.background = background

    async def __call__(self, scope, receive, send):
        await PlainTextResponse("x")(scope, receive, send)
        await self.background()


async def test_a_task_of_an_asgi_object_that_is_no_response_is_not_observed(env: Env) -> None:
    """An ASGI object that is no `Response` and runs a task by itself: the task runs, and there is no run."""

    async def e(request):
        return NotAResponse(BackgroundTask(af))

    await drive(env.app(e))
    env.expect(log=["af"])


async def test_the_response_of_sse_starlette_is_observed(env: Env) -> None:
    """EventSourceResponse runs its background by itself."""
    sse = pytest.importorskip("sse_starlette")

    async def gen():
        yield {"data": "1"}

    async def e(request):
        return sse.EventSourceResponse(gen(), background=BackgroundTask(af))

    sse.sse.AppStatus.should_exit_event = None  # releases before 3 keep the event of the first event loop
    await drive(env.app(e))
    env.expect("af", log=["af"])


async def test_the_response_that_denies_a_websocket_is_observed(env: Env) -> None:
    """It is a response like any other."""

    async def ws(websocket):
        await websocket.send_denial_response(PlainTextResponse("no", status_code=403, background=BackgroundTask(af)))

    app = env.app(WebSocketRoute("/", ws))
    r = await drive(app, type="websocket")
    assert r.status == 403, (r.messages, r.exc)
    env.expect("af", log=["af"])


# --- where the response comes from
async def test_the_response_of_an_exception_handler_is_observed(env: Env) -> None:
    """A handler of HTTP exceptions may add a task."""

    async def e(request):
        raise HTTPException(418)

    async def h(request, exc):
        return PlainTextResponse("tea", status_code=418, background=BackgroundTask(af))

    r = await drive(env.app(e, exception_handlers={418: h}))
    assert r.status == 418
    env.expect("af", log=["af"])


async def test_the_response_of_the_handler_for_500_is_observed(env: Env) -> None:
    """Starlette sends it from outside of the middleware and raises the error again; its task is observed."""

    async def e(request):
        raise KeyError("x")

    async def h(request, exc):
        return PlainTextResponse("err", status_code=500, background=BackgroundTask(af))

    r = await drive(env.app(e, exception_handlers={500: h}))
    assert r.status == 500 and isinstance(r.exc, KeyError)
    env.expect("af", log=["af"])


async def test_the_response_of_an_endpoint_class_is_observed(env: Env) -> None:
    """HTTPEndpoint returns responses like any other endpoint."""

    class E(HTTPEndpoint):
        async def get(self, request):
            return PlainTextResponse("x", background=BackgroundTask(af))

    await drive(env.app(Route("/", E)))
    env.expect("af", log=["af"])


async def test_the_response_of_a_sync_endpoint_is_observed(env: Env) -> None:
    """A sync endpoint makes its response in a thread."""

    def e(request):
        return PlainTextResponse("x", background=BackgroundTask(af))

    await drive(env.app(e))
    env.expect("af", log=["af"])


async def test_responses_of_mounted_apps_and_routers_are_observed(env: Env) -> None:
    """An app and a router below a mount."""
    sub = Starlette(routes=[Route("/a", answering(BackgroundTask(af)))])
    rt = Router(routes=[Route("/a", answering(BackgroundTask(sf)))])
    app = env.app(Mount("/s", app=sub), Mount("/r", app=rt))
    await drive(app, "/s/a")
    await drive(app, "/r/a")
    env.expect("af", "sf", log=["af", "sf"])


async def test_the_response_of_a_middleware_that_answers_itself_is_observed(env: Env) -> None:
    """A middleware inside of ours may respond before the endpoint."""

    class Early:
        def __init__(self, app):
            self.app = app

        async def __call__(self, scope, receive, send):
            await PlainTextResponse("e", background=BackgroundTask(af))(scope, receive, send)

    await drive(env.app(answering(BackgroundTask(sf)), middleware=[Middleware(Early)]))
    env.expect("af", log=["af"])


async def test_a_plain_asgi_app_can_be_wrapped(env: Env) -> None:
    """`AftertaskMiddleware(app)` observes an app that is neither Starlette nor FastAPI."""

    async def plain(scope, receive, send):
        await PlainTextResponse("p", background=BackgroundTask(af))(scope, receive, send)

    await drive(env.mw(plain))
    env.expect("af", log=["af"])


async def test_an_app_behind_another_framework_is_observed(env: Env) -> None:
    """Another framework's mount may pass on a changed copy of the scope."""
    inner = env.app(answering(BackgroundTask(af)))

    async def outer(scope, receive, send):  # like another framework's mount
        child = dict(scope, root_path="/api", path="/api/", raw_path=b"/api/")
        await inner(child, receive, send)

    await drive(outer, "/api/")
    env.expect("af", log=["af"])


async def test_a_copied_scope_belongs_to_the_same_request(env: Env) -> None:
    """A middleware inside of ours may copy the scope."""

    class Copy:
        def __init__(self, app):
            self.app = app

        async def __call__(self, scope, receive, send):
            await self.app(dict(scope), receive, send)

    await drive(env.app(answering(BackgroundTask(af)), middleware=[Middleware(Copy)]))
    env.expect("af", log=["af"])


# --- middlewares around
async def test_tasks_below_three_base_http_middlewares_are_observed(env: Env) -> None:
    """Each BaseHTTPMiddleware serves the app in a task of its own."""
    t = BackgroundTasks()
    t.add_task(af)
    t.add_task(sf)
    await drive(env.app(answering(t), middleware=[Middleware(Layer)] * 3))
    env.expect("af", "sf", log=["af", "sf"])


async def test_base_http_middlewares_on_both_sides_do_no_harm(env: Env) -> None:
    """One around ours and one inside of it."""
    app = Starlette(
        routes=[Route("/", answering(BackgroundTask(af)))],
        middleware=[Middleware(Layer), env.middleware(), Middleware(Layer)],
    )
    await drive(app)
    env.expect("af", log=["af"])


async def test_a_task_that_a_middleware_adds_is_observed(env: Env) -> None:
    """A BaseHTTPMiddleware that sets `response.background` adds a run to the endpoint's own."""

    class Attach(BaseHTTPMiddleware):
        async def dispatch(self, request, call_next):
            response = await call_next(request)
            response.background = BackgroundTask(sf, "attached")
            return response

    await drive(env.app(answering(BackgroundTask(af)), middleware=[Middleware(Attach)]))
    env.expect("af", "sf", unordered=True, log=["af", "attached"])


async def test_tasks_below_gzip_and_cors_are_observed(env: Env) -> None:
    """The middlewares of Starlette change the response and not its task."""
    r = await drive(
        env.app(
            answering(BackgroundTask(af), PlainTextResponse, "x" * 2000),
            middleware=[Middleware(GZipMiddleware), Middleware(CORSMiddleware, allow_origins=["*"])],
        ),
        headers=[(b"accept-encoding", b"gzip"), (b"origin", b"http://o")],
    )
    assert r.header("content-encoding") == "gzip" and r.header("access-control-allow-origin") == "*"
    env.expect("af", log=["af"])


async def test_a_middleware_that_holds_the_response_back_keeps_its_task(env: Env) -> None:
    """A middleware may send the messages after the app has returned: the task runs before the client has them."""

    class Buffer:
        def __init__(self, app):
            self.app = app

        async def __call__(self, scope, receive, send):
            held = []

            async def keep(m):
                held.append(m)

            await self.app(scope, receive, keep)
            for m in held:
                await send(m)

    r = await drive(env.app(answering(BackgroundTask(af)), middleware=[Middleware(Buffer)]))
    assert r.body == b"ok"
    env.expect("af", log=["af"])


async def test_a_background_put_together_from_others_runs_each_once(env: Env) -> None:
    """An endpoint and a middleware may put their tasks into new containers."""

    class Compose(BaseHTTPMiddleware):
        async def dispatch(self, request, call_next):
            response = await call_next(request)
            response.background = BackgroundTasks([BackgroundTask(sf)])
            return response

    async def e(request):
        r = PlainTextResponse("x", background=BackgroundTask(af))
        old = r.background
        new = BackgroundTasks()
        new.add_task(old)
        new.add_task(sf, "new")
        r.background = new
        assert r.background is new
        return r

    await drive(env.app(e, middleware=[Middleware(Compose)]))
    assert sorted(LOG) == ["af", "new", "sf"]
    assert env.names().count("sf") == 2 and len(env.names()) in (3, 4), env.names()


# --- kinds of function
class Obj:
    def m(self):
        LOG.append("m")

    async def am(self):
        LOG.append("am")

    def __call__(self):
        LOG.append("call")

    @classmethod
    def c(cls):
        LOG.append("c")

    @staticmethod
    async def s():
        LOG.append("s")


async def test_every_kind_of_callable_is_observed(env: Env) -> None:
    """Methods, callable objects, partials, lambdas and builtins are called as ever, one run each."""
    t = BackgroundTasks()
    o = Obj()
    for f in (
        o.m,
        o.am,
        o,
        Obj.c,
        Obj.s,
        functools.partial(sf, "ps"),
        functools.partial(af, "pa"),
        functools.partial(functools.partial(af), "ppa"),
        lambda: LOG.append("lam"),
        AsyncCallable(),
        print.__class__ and LOG.clear.__self__.copy,
    ):
        t.add_task(f)
    await drive(env.app(answering(t)))
    assert LOG == ["m", "am", "call", "c", "s", "ps", "pa", "ppa", "lam", "ac"], LOG
    assert len(env.names()) == 11, env.names()


async def test_a_generator_function_does_nothing_as_ever(env: Env) -> None:
    """Starlette calls it and nothing runs; it is one run."""

    def g():
        LOG.append("never")
        yield 1

    await drive(env.app(answering(BackgroundTask(g))))
    assert LOG == [] and len(env.names()) == 1


# --- nesting, context
async def test_tasks_that_a_task_runs_are_observed(env: Env) -> None:
    """A task may run a container of its own."""

    async def outer():
        t = BackgroundTasks()
        t.add_task(af)
        t.add_task(sf)
        await t()

    await drive(env.app(answering(BackgroundTask(outer))))
    assert LOG == ["af", "sf"]
    names = [n.split(".")[-1] for n in env.names()]
    assert sorted(names) == ["af", "outer", "sf"], names


async def test_a_container_in_a_container_is_its_tasks(env: Env) -> None:
    """Only the tasks are runs, in their order."""
    inner = BackgroundTasks([BackgroundTask(af), BackgroundTask(sf)])
    await drive(env.app(answering(BackgroundTasks([inner, BackgroundTask(sf, "3")]))))
    env.expect("af", "sf", "sf", log=["af", "sf", "3"])


async def test_a_task_added_by_a_task_of_the_same_container_is_observed(env: Env) -> None:
    """Starlette's loop reaches what is appended meanwhile."""
    t = BackgroundTasks()

    async def adder():
        t.add_task(sf, "late")

    t.add_task(adder)
    t.add_task(af)
    await drive(env.app(answering(t)))
    assert LOG == ["af", "late"], LOG
    assert len(env.names()) == 3, env.names()


async def test_tasks_of_a_worker_that_outlives_its_request_are_not_observed(env: Env) -> None:
    """A task may start a worker; what the worker runs after the request's end is not the request's."""
    go, ended = anyio.Event(), anyio.Event()
    async with anyio.create_task_group() as tg:

        async def worker():
            await go.wait()
            await BackgroundTask(sf, "later")()
            ended.set()

        async def spawner():
            if True:
                tg.start_soon(worker)

        await drive(env.app(answering(BackgroundTask(spawner))))
        n = len(env.names())
        go.set()
        await ended.wait()
    assert LOG == ["later"] and len(env.names()) == n == 1, env.names()


async def test_tasks_outside_of_any_request_are_left_alone(env: Env) -> None:
    """Awaited by hand, they run and are not observed."""
    env.mw(lambda *a: None)
    await BackgroundTask(af)()
    await BackgroundTasks([BackgroundTask(sf)])()
    env.expect(log=["af", "sf"])


async def test_a_response_outside_of_the_middleware_is_left_alone(env: Env) -> None:
    """The hooks of one app do not observe another app's response."""
    env.mw(lambda *a: None)
    await drive(PlainTextResponse("x", background=BackgroundTask(af)))
    env.expect(log=["af"])


async def test_only_the_app_with_the_middleware_is_observed(env: Env) -> None:
    """Another app in the process runs its tasks unobserved."""
    a = env.app(answering(BackgroundTask(af)))
    b = Starlette(routes=[Route("/", answering(BackgroundTask(sf)))])
    await drive(a)
    await drive(b)
    env.expect("af", log=["af", "sf"])


async def test_a_plain_app_called_by_an_endpoint_keeps_its_tasks(env: Env) -> None:
    """An endpoint may call another app in this process: the tasks of that app are not ours."""
    b = Starlette(routes=[Route("/", answering(BackgroundTask(sf)))])

    async def e(request):
        await drive(b)  # e.g. httpx.ASGITransport
        return PlainTextResponse("x", background=BackgroundTask(af))

    await drive(env.app(e))
    env.expect("af", log=["sf", "af"])


async def test_a_plain_app_called_by_a_task_keeps_its_tasks(env: Env) -> None:
    """Nor are they if a task calls that app."""
    b = Starlette(routes=[Route("/", answering(BackgroundTasks([BackgroundTask(sf)])))])

    async def caller():
        await drive(b)

    await drive(env.app(answering(BackgroundTask(caller))))
    assert LOG == ["sf"]
    assert [n.split(".")[-1] for n in env.names()] == ["caller"], env.names()


async def test_a_task_that_an_endpoint_awaits_is_left_alone(env: Env) -> None:
    """It runs before the response and is not observed; that of the response is."""

    async def e(request):
        await BackgroundTask(sf)()
        return PlainTextResponse("x", background=BackgroundTask(af))

    await drive(env.app(e))
    env.expect("af", log=["sf", "af"])


async def test_a_middleware_added_twice_observes_once(env: Env) -> None:
    """The second one warns, and each task is one run."""
    app = Starlette(routes=[Route("/", answering(BackgroundTask(af)))], middleware=[env.middleware(), env.middleware()])
    with pytest.warns(UserWarning, match="added twice"):
        result = await drive(app)
    assert result.status == 200
    env.expect("af", log=["af"])


async def test_a_mounted_app_with_its_own_middleware_observes_its_own_tasks(env: Env) -> None:
    """No task is observed by both."""
    other = Recorder()
    sub = Starlette(
        routes=[Route("/a", answering(BackgroundTask(sf)))], middleware=[Middleware(lambda app: env.mw(app, other))]
    )
    app = env.app(answering(BackgroundTask(af)), Mount("/s", app=sub))
    await drive(app)
    await drive(app, "/s/a")
    assert len(env.names()) + len(other.of(Started)) == 2
    assert LOG == ["af", "sf"]


async def test_requests_that_share_a_response_have_a_run_each(env: Env) -> None:
    """Two requests may send one response object at the same time."""
    gate = anyio.Event()
    n = 0

    async def slow():
        nonlocal n
        n += 1
        if n == 2:
            gate.set()
        await gate.wait()
        LOG.append("slow")

    shared = PlainTextResponse("s", background=BackgroundTask(slow))
    bg = shared.background

    async def e(request):
        return shared

    app = env.app(e)
    async with anyio.create_task_group() as tg:
        tg.start_soon(drive, app)
        tg.start_soon(drive, app)
    assert LOG == ["slow", "slow"] and len(env.names()) == 2, env.names()
    assert shared.background is bg


# --- transparency
async def test_a_failure_comes_out_as_the_same_object_and_stops_the_rest(env: Env) -> None:
    """As in Starlette: later tasks do not run, and the response has been sent."""
    t = BackgroundTasks()
    err = ValueError("e")

    async def fail():
        raise err

    t.add_task(af)
    t.add_task(fail)
    t.add_task(sf)
    r = await drive(env.app(answering(t)))
    assert r.exc is err and LOG == ["af"] and r.status == 200, (r.exc, LOG)
    assert len(env.names()) == 2, env.names()


async def test_user_code_sees_its_own_objects(env: Env) -> None:
    """The response has the very background and tasks that the user gave it: in the endpoint, stream, task and after."""
    seen = {}
    t = BackgroundTasks()
    t.add_task(af)
    task = t.tasks[0]

    async def look():
        seen["in_task"] = seen["r"].background is t and t.tasks[0] is task

    async def gen():
        seen["stream"] = seen["r"].background is t
        yield b"x"

    async def e(request):
        r = StreamingResponse(gen(), background=t)
        seen["r"] = r
        seen["handler"] = r.background is t and r.__dict__["background"] is t and vars(r)["background"] is t
        seen["func"] = t.tasks[0] is task and task.func in (af, look)
        return r

    await drive(env.app(e))
    seen["after"] = seen["r"].background is t

    t.tasks[:] = [BackgroundTask(look)]
    task = t.tasks[0]
    await drive(env.app(e))
    seen.pop("r")
    assert all(seen.values()), seen


async def test_responses_and_tasks_are_pickled_copied_and_shown_as_ever(env: Env) -> None:
    """The hooks change no class, attribute, name or representation."""
    env.mw(lambda *a: None)
    t = BackgroundTask(af, 1)
    r = PlainTextResponse("x", background=t)
    assert isinstance(r.background, BackgroundTask) and type(r.background) is BackgroundTask
    p = pickle.loads(pickle.dumps(r))
    assert p.background.func is af and p.background.args == (1,)
    c = copy.copy(r)
    assert c.background is t
    assert pickle.loads(pickle.dumps(BackgroundTasks([t]))).tasks[0].func is af
    assert repr(t).startswith("<starlette.background.BackgroundTask object at") and "BackgroundTask" in repr(
        r.background
    )
    assert not hasattr(Response, "background"), "class attribute appeared"
    r.background = None
    assert r.background is None
    del r.background
    with pytest.raises(AttributeError):
        _ = r.background
    assert inspect.iscoroutinefunction(BackgroundTask.__call__) and inspect.iscoroutinefunction(t.__call__)

    assert is_async_callable(t)
    assert (
        BackgroundTask.__call__.__name__ == "__call__"
        and BackgroundTask.__call__.__qualname__ == "BackgroundTask.__call__"
    )


async def test_context_variables_of_an_async_endpoint_reach_its_task(env: Env) -> None:
    """Below BaseHTTPMiddleware, too."""
    v = contextvars.ContextVar("v", default="none")

    async def look():
        LOG.append(v.get())

    async def e(request):
        v.set("endpoint")
        return PlainTextResponse("x", background=BackgroundTask(look))

    await drive(env.app(e, middleware=[Middleware(Layer)]))
    assert LOG == ["endpoint"], LOG


async def test_context_variables_of_a_task_reach_the_next_one(env: Env) -> None:
    """Starlette runs all tasks of a container in one context."""

    v = contextvars.ContextVar("v", default="none")

    async def s():
        v.set("from task 1")

    async def look():
        LOG.append(v.get())

    await drive(env.app(answering(BackgroundTasks([BackgroundTask(s), BackgroundTask(look)]))))
    assert LOG == ["from task 1"], LOG


async def test_a_traceback_ends_in_the_task(env: Env) -> None:
    """The exception has neither a cause nor a context of ours."""
    r = await drive(env.app(answering(BackgroundTask(boom))))
    tb = r.exc.__traceback__
    while tb.tb_next:
        tb = tb.tb_next
    assert tb.tb_frame.f_code.co_name == "boom"
    assert r.exc.__cause__ is None and r.exc.__context__ is None


# --- FastAPI


async def test_injected_tasks_are_observed(env: Env) -> None:
    """FastAPI injects the container into an async endpoint."""
    app = env.fastapi()

    @app.get("/")
    async def e(t: FBT):
        t.add_task(af)
        t.add_task(sf)
        return {}

    r = await drive(app)
    assert r.status == 200, r.exc
    env.expect("af", "sf", log=["af", "sf"])


async def test_injected_tasks_of_a_sync_endpoint_are_observed(env: Env) -> None:
    """They are added in a worker thread."""
    app = env.fastapi()

    @app.get("/")
    def e(t: FBT):
        t.add_task(af)
        t.add_task(sf)
        return {}

    await drive(app)
    env.expect("af", "sf", log=["af", "sf"])


async def test_tasks_of_nested_dependencies_are_observed(env: Env) -> None:
    """Dependencies and their endpoint share one container, also on an included router."""
    app, router = env.fastapi(), APIRouter(prefix="/r")

    def d1(t: FBT):
        t.add_task(sf, "d1")

    async def d2(t: FBT, _=Depends(d1)):
        t.add_task(af, "d2")
        yield 1

    @router.get("/x")
    async def e(t: FBT, _=Depends(d2)):
        t.add_task(sf, "e")
        return {}

    app.include_router(router)
    r = await drive(app, "/r/x")
    assert r.status == 200
    env.expect("sf", "af", "sf", log=["d1", "d2", "e"])


async def test_a_task_of_a_dependency_of_a_mounted_app_is_observed(env: Env) -> None:
    """A dependency of the route alone, in an app below a mount."""
    app, sub = env.fastapi(), FastAPI()

    async def d(t: FBT):
        t.add_task(af)

    @sub.get("/x", dependencies=[Depends(d)])
    async def e():
        return {}

    app.mount("/s", sub)
    await drive(app, "/s/x")
    env.expect("af", log=["af"])


async def test_injected_tasks_run_with_a_returned_response(env: Env) -> None:
    """FastAPI hangs the container on the response that the endpoint returns."""
    app = env.fastapi()

    @app.get("/")
    async def e(t: FBT):
        t.add_task(af)
        return JSONResponse({})

    await drive(app)
    env.expect("af", log=["af"])


async def test_injected_tasks_below_three_base_http_middlewares_are_observed(env: Env) -> None:
    """As those of a response."""
    app = env.fastapi()
    for _ in range(3):
        app.user_middleware.append(Middleware(Layer))

    @app.get("/")
    async def e(t: FBT):
        t.add_task(af)
        t.add_task(sf)
        return {}

    await drive(app)
    env.expect("af", "sf", log=["af", "sf"])


async def test_a_container_class_of_the_users_in_fastapi_is_observed(env: Env) -> None:
    """An endpoint may return a response with a container class of its own."""
    app = env.fastapi()

    @app.get("/")
    async def e():
        t = PQ()
        t.add_task(sf)
        return JSONResponse({}, background=t)

    await drive(app)
    assert LOG == ["sf"] and env.names()


async def test_fastapis_own_spans_of_tasks_stay(env: Env) -> None:
    """With FastAPI's own telemetry and none of ours, its spans of tasks are those of the app alone."""
    pytest.importorskip("fastapi.telemetry", reason="FastAPI traces its tasks since 0.142")
    traced = Traced()
    app = env.fastapi(telemetry={"tracer_provider": traced.provider})

    @app.get("/")
    async def e(t: FBT):
        t.add_task(af)
        t.add_task(boom)
        t.add_task(sf)
        return {}

    await drive(app)
    spans = [
        (s.name, s.attributes.get("code.function.name", "").split(".")[-1], s.status.status_code.name)
        for s in traced.spans("fastapi.background")
    ]
    assert spans == [("fastapi.background_task", "af", "UNSET"), ("fastapi.background_task", "boom", "ERROR")], spans
    env.expect("af", "boom", log=["af", "boom"])
