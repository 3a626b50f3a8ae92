"""
The behaviour that an app keeps and the tasks that are seen, case by case: every kind of background, response, source,
middleware and nesting. Each runs on asyncio and trio; after each the accounts must be right.
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
import pytest
import starlette
from fastapi import APIRouter, Depends, FastAPI
from fastapi import BackgroundTasks as FBT
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
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

from aftertask import observe_functions
from aftertask.events import Started
from aftertask.testing import Recorder
from kit import LOG, Env, Layer, af, answering, boom, drive, sf


# --- kinds of background
@pytest.mark.anyio
async def test_background_task_async(env: Env) -> None:
    r = await drive(env.app(answering(BackgroundTask(af))))
    assert r.status == 200 and r.body == b"ok"
    env.expect("af", log=["af"])


@pytest.mark.anyio
async def test_background_task_sync(env: Env) -> None:
    await drive(env.app(answering(BackgroundTask(sf))))
    env.expect("sf", log=["sf"])


@pytest.mark.anyio
async def test_background_tasks_two(env: Env) -> None:
    t = BackgroundTasks()
    t.add_task(af)
    t.add_task(sf, "z")
    await drive(env.app(answering(t)))
    env.expect("af", "sf", log=["af", "z"])


@pytest.mark.anyio
async def test_background_tasks_ctor_list(env: Env) -> None:
    t = BackgroundTasks(tasks=[BackgroundTask(af), BackgroundTask(sf)])
    await drive(env.app(answering(t)))
    env.expect("af", "sf", log=["af", "sf"])


class Timed(BackgroundTasks):
    async def __call__(self):
        LOG.append("t0")
        await super().__call__()
        LOG.append("t1")


@pytest.mark.anyio
async def test_subclass_delegating(env: Env) -> None:
    t = Timed()
    t.add_task(af)
    t.add_task(sf)
    await drive(env.app(answering(t)))
    assert LOG == ["t0", "af", "sf", "t1"]
    assert "af" in env.names() and "sf" in env.names(), env.names()


class PQ(BackgroundTasks):
    """keeps (priority, n, func, args, kwargs) itself and runs them itself"""

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


@pytest.mark.anyio
async def test_subclass_priority_queue_as_unit(env: Env) -> None:
    t = PQ()
    t.add_task(af, "late", priority=5)
    t.add_task(sf, "early", priority=1)
    await drive(env.app(answering(t)))
    assert LOG == ["early", "late"], LOG
    assert env.names(), "nothing observed"


@pytest.mark.anyio
async def test_subclass_priority_queue_per_function(env: Env) -> None:
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


@pytest.mark.anyio
async def test_subclass_parallel_own_loop(env: Env) -> None:
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


@pytest.mark.anyio
async def test_subclass_of_task_retrying(env: Env) -> None:
    await drive(env.app(answering(RetryTask(boom))))
    assert LOG == ["boom"] * 3
    assert env.names()[0] == "RetryTask" and env.names().count("boom") == 3, env.names()


@pytest.mark.anyio
async def test_foreign_async_function(env: Env) -> None:
    await drive(env.app(answering(af)))
    env.expect("af", log=["af"])


class AsyncCallable:
    async def __call__(self):
        LOG.append("ac")


@pytest.mark.anyio
async def test_foreign_callable_object(env: Env) -> None:
    await drive(env.app(answering(AsyncCallable())))
    env.expect("AsyncCallable", log=["ac"])


@pytest.mark.anyio
async def test_foreign_partial_and_lambda(env: Env) -> None:
    async def e1(request):
        return PlainTextResponse("ok", background=functools.partial(af, "p"))

    async def e2(request):
        return PlainTextResponse("ok", background=lambda: af("l"))

    app = env.app(e1, e2)
    await drive(app)
    await drive(app, "/1")
    assert LOG == ["p", "l"] and len(env.names()) == 2, env.names()


# --- response classes
@pytest.mark.anyio
async def test_json_html_redirect(env: Env) -> None:
    for cls, arg in ((JSONResponse, {}), (HTMLResponse, "x"), (RedirectResponse, "/x"), (Response, b"x")):
        await drive(env.app(answering(BackgroundTask(af), cls, arg)))
    env.expect("af", "af", "af", "af", log=["af"] * 4)


@pytest.mark.anyio
async def test_streaming_spec_23_and_24(env: Env) -> None:
    async def gen():
        yield "a"
        yield "b"

    for spec in ("2.0", "2.3", "2.4"):

        async def e(request):
            return StreamingResponse(gen(), background=BackgroundTask(af))

        r = await drive(env.app(e), spec=spec)
        assert r.body == b"ab"
    env.expect("af", "af", "af", log=["af"] * 3)


@pytest.mark.anyio
async def test_streaming_early_disconnect(env: Env) -> None:
    async def gen():
        while True:
            yield "a"
            await anyio.sleep(0.001)

    async def e(request):
        return StreamingResponse(gen(), background=BackgroundTask(af))

    await drive(env.app(e), spec="2.3", early_disconnect=True)
    env.expect("af", log=["af"])


@pytest.mark.anyio
async def test_file_response(env: Env, tmp_path: Path) -> None:
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


@pytest.mark.anyio
async def test_own_call_other_names(env: Env) -> None:
    await drive(env.app(answering(BackgroundTask(af), OwnCall, {})))
    await drive(env.app(answering(af, OwnCall, {})))
    env.expect("af", "af", log=["af", "af"])


@pytest.mark.anyio
async def test_helper_method_and_closure(env: Env) -> None:
    await drive(env.app(answering(BackgroundTask(af), Helper, b"")))
    await drive(env.app(answering(af, Helper, b"")))
    env.expect("af", "af", log=["af", "af"])


@pytest.mark.anyio
async def test_super_call_and_isinstance(env: Env) -> None:
    await drive(env.app(answering(BackgroundTask(af), SuperCall, b"")))
    env.expect("af", log=["af", True])


class Tupled(PlainTextResponse):
    """decorated __call__"""

    def deco(f):
        @functools.wraps(f)
        async def w(*a, **k):
            return await f(*a, **k)

        return w

    @deco
    async def __call__(self, scope, receive, send):
        await Response.__call__(self, scope, receive, send)


@pytest.mark.anyio
async def test_decorated_call(env: Env) -> None:
    await drive(env.app(answering(BackgroundTask(af), Tupled)))
    env.expect("af", log=["af"])


class ShadowDefault(Response):
    background = None  # class attribute shadows anything on Response

    def __init__(self, content, background=None):
        Response.__init__(self, content, background=background)


@pytest.mark.anyio
async def test_subclass_shadows_background_attr(env: Env) -> None:
    await drive(env.app(answering(BackgroundTask(af), ShadowDefault, b"x")))
    env.expect("af", log=["af"])


class NotAResponse:
    def __init__(self, background):
        self.background = background

    async def __call__(self, scope, receive, send):
        await PlainTextResponse("x")(scope, receive, send)
        await self.background()


@pytest.mark.anyio
async def test_asgi_object_not_a_response(env: Env) -> None:
    """What is no `Response` and runs a task by itself is not seen; the task runs as ever."""

    async def e(request):
        return NotAResponse(BackgroundTask(af))

    await drive(env.app(e))
    env.expect(log=["af"])


@pytest.mark.anyio
async def test_sse_starlette(env: Env) -> None:
    try:
        from sse_starlette import EventSourceResponse
    except ImportError:
        return

    async def gen():
        yield {"data": "1"}

    async def e(request):
        return EventSourceResponse(gen(), background=BackgroundTask(af))

    try:
        from sse_starlette.sse import AppStatus

        AppStatus.should_exit_event = None
    except Exception:
        pass
    await drive(env.app(e))
    env.expect("af", log=["af"])


@pytest.mark.anyio
async def test_websocket_denial_response(env: Env) -> None:
    from starlette.websockets import WebSocket

    if not hasattr(WebSocket, "send_denial_response"):
        return

    async def ws(websocket):
        await websocket.send_denial_response(PlainTextResponse("no", status_code=403, background=BackgroundTask(af)))

    app = env.app(WebSocketRoute("/", ws))
    r = await drive(app, type="websocket")
    assert r.status == 403, (r.messages, r.exc)
    env.expect("af", log=["af"])


# --- where the response comes from
@pytest.mark.anyio
async def test_http_exception_handler(env: Env) -> None:
    async def e(request):
        raise HTTPException(418)

    async def h(request, exc):
        return PlainTextResponse("tea", status_code=418, background=BackgroundTask(af))

    r = await drive(env.app(e, exception_handlers={418: h}))
    assert r.status == 418
    env.expect("af", log=["af"])


@pytest.mark.anyio
async def test_server_error_500_handler(env: Env) -> None:
    async def e(request):
        raise KeyError("x")

    async def h(request, exc):
        return PlainTextResponse("err", status_code=500, background=BackgroundTask(af))

    r = await drive(env.app(e, exception_handlers={500: h}))
    assert r.status == 500 and isinstance(r.exc, KeyError)
    env.expect("af", log=["af"])


@pytest.mark.anyio
async def test_class_based_endpoint(env: Env) -> None:
    class E(HTTPEndpoint):
        async def get(self, request):
            return PlainTextResponse("x", background=BackgroundTask(af))

    await drive(env.app(Route("/", E)))
    env.expect("af", log=["af"])


@pytest.mark.anyio
async def test_sync_endpoint(env: Env) -> None:
    def e(request):
        return PlainTextResponse("x", background=BackgroundTask(af))

    await drive(env.app(e))
    env.expect("af", log=["af"])


@pytest.mark.anyio
async def test_mounted_starlette_and_router(env: Env) -> None:
    sub = Starlette(routes=[Route("/a", answering(BackgroundTask(af)))])
    rt = Router(routes=[Route("/a", answering(BackgroundTask(sf)))])
    app = env.app(Mount("/s", app=sub), Mount("/r", app=rt))
    await drive(app, "/s/a")
    await drive(app, "/r/a")
    env.expect("af", "sf", log=["af", "sf"])


@pytest.mark.anyio
async def test_inner_asgi_middleware_early_return(env: Env) -> None:
    class Early:
        def __init__(self, app):
            self.app = app

        async def __call__(self, scope, receive, send):
            await PlainTextResponse("e", background=BackgroundTask(af))(scope, receive, send)

    await drive(env.app(answering(BackgroundTask(sf)), middleware=[Middleware(Early)]))
    env.expect("af", log=["af"])


@pytest.mark.anyio
async def test_plain_asgi_app_under_middleware(env: Env) -> None:
    async def plain(scope, receive, send):
        await PlainTextResponse("p", background=BackgroundTask(af))(scope, receive, send)

    await drive(env.mw(plain))
    env.expect("af", log=["af"])


@pytest.mark.anyio
async def test_behind_other_asgi_dispatch(env: Env) -> None:
    inner = env.app(answering(BackgroundTask(af)))

    async def outer(scope, receive, send):  # like another framework's mount
        v = tuple(int(x) for x in starlette.__version__.split(".")[:2])
        child = dict(scope, root_path="/api", path="/api/" if v >= (0, 33) else "/", raw_path=b"/api/")
        await inner(child, receive, send)

    await drive(outer, "/api/")
    env.expect("af", log=["af"])


@pytest.mark.anyio
async def test_scope_copied_by_a_middleware(env: Env) -> None:
    class Copy:
        def __init__(self, app):
            self.app = app

        async def __call__(self, scope, receive, send):
            await self.app(dict(scope), receive, send)

    await drive(env.app(answering(BackgroundTask(af)), middleware=[Middleware(Copy)]))
    env.expect("af", log=["af"])


# --- middlewares around
@pytest.mark.anyio
async def test_base_http_x3(env: Env) -> None:
    t = BackgroundTasks()
    t.add_task(af)
    t.add_task(sf)
    await drive(env.app(answering(t), middleware=[Middleware(Layer)] * 3))
    env.expect("af", "sf", log=["af", "sf"])


@pytest.mark.anyio
async def test_base_http_outside_ours(env: Env) -> None:
    app = Starlette(
        routes=[Route("/", answering(BackgroundTask(af)))],
        middleware=[Middleware(Layer), env.middleware(), Middleware(Layer)],
    )
    await drive(app)
    env.expect("af", log=["af"])


@pytest.mark.anyio
async def test_base_http_attaches_background(env: Env) -> None:
    class Attach(BaseHTTPMiddleware):
        async def dispatch(self, request, call_next):
            response = await call_next(request)
            response.background = BackgroundTask(sf, "attached")
            return response

    await drive(env.app(answering(BackgroundTask(af)), middleware=[Middleware(Attach)]))
    env.expect("af", "sf", unordered=True, log=["af", "attached"])


@pytest.mark.anyio
async def test_gzip_cors(env: Env) -> None:
    r = await drive(
        env.app(
            answering(BackgroundTask(af), PlainTextResponse, "x" * 2000),
            middleware=[Middleware(GZipMiddleware), Middleware(CORSMiddleware, allow_origins=["*"])],
        ),
        headers=[(b"accept-encoding", b"gzip"), (b"origin", b"http://o")],
    )
    assert r.header("content-encoding") == "gzip" and r.header("access-control-allow-origin") == "*"
    env.expect("af", log=["af"])


@pytest.mark.anyio
async def test_buffering_middleware_background_before_body(env: Env) -> None:
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


@pytest.mark.anyio
async def test_middleware_composes_background(env: Env) -> None:
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


@pytest.mark.anyio
async def test_function_kinds(env: Env) -> None:
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


@pytest.mark.anyio
async def test_generator_function_unchanged(env: Env) -> None:
    def g():
        LOG.append("never")
        yield 1

    await drive(env.app(answering(BackgroundTask(g))))
    assert LOG == [] and len(env.names()) == 1


# --- nesting, context
@pytest.mark.anyio
async def test_nested_background_tasks(env: Env) -> None:
    async def outer():
        t = BackgroundTasks()
        t.add_task(af)
        t.add_task(sf)
        await t()

    await drive(env.app(answering(BackgroundTask(outer))))
    assert LOG == ["af", "sf"]
    names = [n.split(".")[-1] for n in env.names()]
    assert sorted(names) == ["af", "outer", "sf"], names


@pytest.mark.anyio
async def test_nested_container_in_container(env: Env) -> None:
    inner = BackgroundTasks([BackgroundTask(af), BackgroundTask(sf)])
    await drive(env.app(answering(BackgroundTasks([inner, BackgroundTask(sf, "3")]))))
    env.expect("af", "sf", "sf", log=["af", "sf", "3"])


@pytest.mark.anyio
async def test_late_append_from_inside_a_task(env: Env) -> None:
    t = BackgroundTasks()

    async def adder():
        t.add_task(sf, "late")

    t.add_task(adder)
    t.add_task(af)
    await drive(env.app(answering(t)))
    assert LOG == ["af", "late"], LOG
    assert len(env.names()) == 3, env.names()


@pytest.mark.anyio
async def test_spawned_after_request_not_attributed(env: Env) -> None:
    """a worker created in a task outlives the request; its later tasks are not this request's"""
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


@pytest.mark.anyio
async def test_outside_any_request(env: Env) -> None:
    env.mw(lambda *a: None)
    await BackgroundTask(af)()
    await BackgroundTasks([BackgroundTask(sf)])()
    env.expect(log=["af", "sf"])


@pytest.mark.anyio
async def test_response_called_without_middleware(env: Env) -> None:
    env.mw(lambda *a: None)
    await drive(PlainTextResponse("x", background=BackgroundTask(af)))
    env.expect(log=["af"])


@pytest.mark.anyio
async def test_two_apps_one_instrumented(env: Env) -> None:
    a = env.app(answering(BackgroundTask(af)))
    b = Starlette(routes=[Route("/", answering(BackgroundTask(sf)))])
    await drive(a)
    await drive(b)
    env.expect("af", log=["af", "sf"])


@pytest.mark.anyio
async def test_in_process_call_to_plain_app_from_handler(env: Env) -> None:
    b = Starlette(routes=[Route("/", answering(BackgroundTask(sf)))])

    async def e(request):
        await drive(b)  # e.g. httpx.ASGITransport
        return PlainTextResponse("x", background=BackgroundTask(af))

    await drive(env.app(e))
    env.expect("af", log=["sf", "af"])


@pytest.mark.anyio
async def test_in_process_call_to_plain_app_from_task(env: Env) -> None:
    b = Starlette(routes=[Route("/", answering(BackgroundTasks([BackgroundTask(sf)])))])

    async def caller():
        await drive(b)

    await drive(env.app(answering(BackgroundTask(caller))))
    assert LOG == ["sf"]
    assert [n.split(".")[-1] for n in env.names()] == ["caller"], env.names()


@pytest.mark.anyio
async def test_inline_call_in_handler_not_a_response_task(env: Env) -> None:
    async def e(request):
        await BackgroundTask(sf)()
        return PlainTextResponse("x", background=BackgroundTask(af))

    await drive(env.app(e))
    env.expect("af", log=["sf", "af"])


@pytest.mark.anyio
async def test_two_instances_same_app_observed_once(env: Env) -> None:
    app = Starlette(routes=[Route("/", answering(BackgroundTask(af)))], middleware=[env.middleware(), env.middleware()])
    with pytest.warns(UserWarning, match="added twice"):
        result = await drive(app)
    assert result.status == 200
    env.expect("af", log=["af"])


@pytest.mark.anyio
async def test_instances_on_app_and_mounted_app(env: Env) -> None:
    other = Recorder()
    sub = Starlette(
        routes=[Route("/a", answering(BackgroundTask(sf)))], middleware=[Middleware(lambda app: env.mw(app, other))]
    )
    app = env.app(answering(BackgroundTask(af)), Mount("/s", app=sub))
    await drive(app)
    await drive(app, "/s/a")
    assert len(env.names()) + len(other.of(Started)) == 2
    assert LOG == ["af", "sf"]


@pytest.mark.anyio
async def test_concurrent_requests_share_one_response_object(env: Env) -> None:
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
@pytest.mark.anyio
async def test_exception_same_object_stops_rest(env: Env) -> None:
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


@pytest.mark.anyio
async def test_identity_seen_by_user_code(env: Env) -> None:
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


@pytest.mark.anyio
async def test_pickle_copy_repr_isinstance(env: Env) -> None:
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


@pytest.mark.anyio
async def test_contextvars_set_in_async_endpoint_reach_task(env: Env) -> None:

    v = contextvars.ContextVar("v", default="none")

    async def look():
        LOG.append(v.get())

    async def e(request):
        v.set("endpoint")
        return PlainTextResponse("x", background=BackgroundTask(look))

    await drive(env.app(e, middleware=[Middleware(Layer)]))
    assert LOG == ["endpoint"], LOG


@pytest.mark.anyio
async def test_task_sets_contextvar_for_next_task(env: Env) -> None:
    """Starlette runs all tasks of one container in one context: task 1's set is visible to task 2"""

    v = contextvars.ContextVar("v", default="none")

    async def s():
        v.set("from task 1")

    async def look():
        LOG.append(v.get())

    await drive(env.app(answering(BackgroundTasks([BackgroundTask(s), BackgroundTask(look)]))))
    assert LOG == ["from task 1"], LOG


@pytest.mark.anyio
async def test_traceback_ends_in_user_code(env: Env) -> None:
    r = await drive(env.app(answering(BackgroundTask(boom))))
    tb = r.exc.__traceback__
    while tb.tb_next:
        tb = tb.tb_next
    assert tb.tb_frame.f_code.co_name == "boom"
    assert r.exc.__cause__ is None and r.exc.__context__ is None


# --- FastAPI


@pytest.mark.anyio
async def test_injected(env: Env) -> None:
    app = env.fastapi()

    @app.get("/")
    async def e(t: FBT):
        t.add_task(af)
        t.add_task(sf)
        return {}

    r = await drive(app)
    assert r.status == 200, r.exc
    env.expect("af", "sf", log=["af", "sf"])


@pytest.mark.anyio
async def test_injected_sync_endpoint(env: Env) -> None:
    app = env.fastapi()

    @app.get("/")
    def e(t: FBT):
        t.add_task(af)
        t.add_task(sf)
        return {}

    await drive(app)
    env.expect("af", "sf", log=["af", "sf"])


@pytest.mark.anyio
async def test_dependencies_nested_and_router(env: Env) -> None:
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


@pytest.mark.anyio
async def test_router_level_dependency_and_mounted_fastapi(env: Env) -> None:
    app, sub = env.fastapi(), FastAPI()

    async def d(t: FBT):
        t.add_task(af)

    @sub.get("/x", dependencies=[Depends(d)])
    async def e():
        return {}

    app.mount("/s", sub)
    await drive(app, "/s/x")
    env.expect("af", log=["af"])


@pytest.mark.anyio
async def test_returned_response_with_injected(env: Env) -> None:
    app = env.fastapi()

    @app.get("/")
    async def e(t: FBT):
        t.add_task(af)
        return JSONResponse({})

    await drive(app)
    env.expect("af", log=["af"])


@pytest.mark.anyio
async def test_under_three_base_http(env: Env) -> None:
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


@pytest.mark.anyio
async def test_starlette_subclass_via_depends(env: Env) -> None:
    app = env.fastapi()

    @app.get("/")
    async def e():
        t = PQ()
        t.add_task(sf)
        return JSONResponse({}, background=t)

    await drive(app)
    assert LOG == ["sf"] and env.names()


@pytest.mark.anyio
async def test_native_background_span_kept(env: Env) -> None:
    pytest.importorskip("fastapi.telemetry", reason="FastAPI traces its tasks since 0.142")
    ex = InMemorySpanExporter()
    tp = TracerProvider()
    tp.add_span_processor(SimpleSpanProcessor(ex))
    app = env.fastapi(telemetry={"tracer_provider": tp})

    @app.get("/")
    async def e(t: FBT):
        t.add_task(af)
        t.add_task(boom)
        t.add_task(sf)
        return {}

    await drive(app)
    spans = [
        (s.name, s.attributes.get("code.function.name", "").split(".")[-1], s.status.status_code.name)
        for s in ex.get_finished_spans()
        if "background" in s.name
    ]
    assert spans == [("fastapi.background_task", "af", "UNSET"), ("fastapi.background_task", "boom", "ERROR")], spans
    env.expect("af", "boom", log=["af", "boom"])
