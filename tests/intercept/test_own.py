"""Response classes with code of their own: it is called with the response itself, and may do anything with it."""

from __future__ import annotations

import asyncio
import copy
import gc
import inspect
import pickle
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any, ClassVar

import anyio
import pytest
from starlette.background import BackgroundTask, BackgroundTasks
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from aftertask.events import Scheduled
from kit import LOG, Env, af, answering, drive, sf

pytestmark = pytest.mark.anyio


async def out(response: Any, send: Send) -> None:
    """Send a response by hand."""
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body})


async def test_own_code_is_called_with_the_response_itself(env: Env) -> None:
    """It has its own class and identity, and a background that it sets while it is sent is observed."""
    kept: list[Any] = []

    class Changing(Response):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            assert self is kept[0] and type(self) is Changing
            await out(self, send)
            await self.background()
            self.background = BackgroundTasks([BackgroundTask(sf)])
            await self.background()
            del self.background

    async def endpoint(request: Any) -> Response:
        kept.append(Changing("x", background=BackgroundTask(af)))
        return kept[0]

    r = await drive(env.app(endpoint))
    assert r.exc is None
    assert "background" not in vars(kept[0])
    env.expect("af", "sf", log=["af", "sf"])


class Reusing(PlainTextResponse):
    """Does with its background what `use` does, before it is sent."""

    use: ClassVar[Callable[[Any], Any]]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        again = type(self).use(self)
        if again is not None:
            await again(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def wraps(response: Any) -> None:
    """Put the background into a container with one more task."""
    tasks = BackgroundTasks()
    tasks.add_task(response.background)
    tasks.add_task(sf)
    response.background = tasks


def puts_beside(response: Any) -> None:
    """The same with a list of tasks."""
    response.background = BackgroundTasks([response.background, BackgroundTask(sf)])


def hands_on(response: Any) -> Any:
    """Give the background to another response, which is sent instead."""
    return PlainTextResponse("x", background=response.background)


def copies(response: Any) -> None:
    """Copy the response and take the background from the copy."""
    copied = copy.copy(response)
    copied.background = None
    assert pickle.loads(pickle.dumps(copy.copy(response.body))) == b"x"
    copy.copy(response.background)


def saves(response: Any) -> None:
    """Remove the background and restore it."""
    saved = response.background
    del response.background
    response.background = saved


@pytest.mark.parametrize("spec", ["one", "several", "bare"])
@pytest.mark.parametrize("use", [wraps, puts_beside, hands_on, copies, saves])
async def test_own_code_may_change_its_background(env: Env, use: Any, spec: str) -> None:
    """Each task runs in order, and each run that was scheduled has one outcome."""

    class Response_(Reusing):
        pass

    Response_.use = use
    made = {"one": BackgroundTask(af), "several": BackgroundTasks([BackgroundTask(af)]), "bare": af}[spec]
    r = await drive(env.app(answering(made, Response_, "x")))
    assert (r.exc, r.body) == (None, b"x")
    if (use, spec) == (wraps, "bare"):
        env.check_accounts()
        return  # the callable becomes a task, and the run of the callable itself is dropped
    assert (["af", "sf"] if use in (wraps, puts_beside) else ["af"]) == LOG
    assert env.names().count("af") == 1
    assert {run.outcome for run in env.seen.runs()} == {"succeeded"}
    assert not any("Runner" in run.task for run in env.seen.runs())


async def test_requests_that_share_a_response_class_of_the_users_have_a_run_each(env: Env) -> None:
    """Five requests send one response at the same time; afterwards it has its own background again."""
    gate = anyio.Event()

    class Slow(PlainTextResponse):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await super().__call__(scope, receive, send)

    async def af_slow() -> None:
        LOG.append("slow")

    async def slow_send(response: Any, scope: Any, receive: Any, send: Any) -> None:
        async def waiting(message: Any) -> None:
            await gate.wait()
            await send(message)

        await response(scope, receive, waiting)

    shared = Slow("x", background=af_slow)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await slow_send(shared, scope, receive, send)

    under = env.mw(app)
    async with anyio.create_task_group() as group:
        for _ in range(5):
            group.start_soon(drive, under)
        await anyio.wait_all_tasks_blocked()
        gate.set()
    assert shared.background is af_slow
    assert [run.outcome for run in env.seen.runs()] == ["succeeded"] * 5
    assert len({run.request for run in env.seen.runs()}) == 5


@pytest.mark.parametrize("background", [BackgroundTask(af), BackgroundTasks([BackgroundTask(af)])])
async def test_a_background_that_is_set_while_the_response_streams_is_observed(env: Env, background: Any) -> None:
    """It stays the object that was set."""
    kept: list[Any] = []

    async def chunks() -> AsyncIterator[bytes]:
        yield b"x"
        kept[0].background = background
        assert kept[0].background is background

    async def endpoint(request: Any) -> Response:
        kept.append(StreamingResponse(chunks()))
        return kept[0]

    r = await drive(env.app(endpoint))
    assert r.exc is None and r.body == b"x" and LOG == ["af"]
    assert len(env.names()) == 1
    assert kept[0].background is background


class Slots(Response):
    """Keeps attributes outside of its `__dict__`, and reads them in its own `__call__`."""

    __slots__ = ("__private", "extra")

    def __init__(self, content: str, background: Any = None) -> None:
        super().__init__(content, background=background)
        self.extra, self.__private = "extra", "private"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        LOG.append(f"{self.extra} {self.__private}")
        await out(self, send)
        if self.background is not None:
            await self.background()


async def test_a_response_class_may_have_slots(env: Env) -> None:
    """With a background and without, its own code reads them."""
    await drive(env.app(answering(af, Slots, "x")))
    await drive(env.app(answering(None, Slots, "x")))
    env.expect("af", log=["extra private", "af", "extra private"])


async def test_no_subclass_is_made_of_a_response_class(env: Env) -> None:
    """A class that lists its subclasses sees none of ours, and `__del__` runs once."""

    class Registered(PlainTextResponse):
        known: ClassVar[list[str]] = []

        def __init_subclass__(cls, *, name: str, **named: Any) -> None:
            super().__init_subclass__(**named)
            cls.known.append(name)

    class Final(Registered, name="final"):
        def __del__(self) -> None:
            LOG.append("del")

    await drive(env.app(answering(BackgroundTask(af), Final, "x")))
    gc.collect()
    assert Registered.known == ["final"]
    env.expect("af", log=["af", "del"])


async def test_a_call_that_a_subclass_inherits_or_gets_later_is_observed(env: Env) -> None:
    """
    The class that defines `__call__` is hooked; one that is set afterwards is called as it is, and its tasks are
    observed.
    """
    env.mw(PlainTextResponse("installs the hooks"))

    async def own_call(self: Any, scope: Scope, receive: Receive, send: Send) -> None:
        await out(self, send)
        await self.background()

    class Parent(PlainTextResponse):
        __call__ = own_call

    class Child(Parent):
        pass

    class Later(PlainTextResponse):
        pass

    assert Parent.__call__ is not own_call
    Later.__call__ = own_call  # type: ignore[method-assign]  # the case
    for kind in (Parent, Child, Later):
        await drive(env.app(answering(BackgroundTask(af), kind, "x")))
    env.expect("af", "af", "af", log=["af"] * 3)


async def test_a_response_can_be_called_by_keyword(env: Env) -> None:
    """Whatever the class calls its parameters."""

    class Named(PlainTextResponse):
        async def __call__(self, s: Any, r: Any, answer: Any) -> None:
            await super().__call__(s, r, answer)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/named":
            await Named("x", background=BackgroundTask(sf))(s=scope, r=receive, answer=send)
        else:
            await PlainTextResponse("x", background=BackgroundTask(af))(scope=scope, receive=receive, send=send)

    await drive(env.mw(app))
    await drive(env.mw(app), "/named")
    env.expect("af", "sf", log=["af", "sf"])


@pytest.mark.parametrize("kind", [Response, PlainTextResponse, StreamingResponse])
async def test_the_call_is_a_coroutine_function(env: Env, kind: type) -> None:
    """A server checks that when a response is the app."""
    env.mw(PlainTextResponse("installs the hooks"))
    looks_so: Callable[[Any], bool] = inspect.iscoroutinefunction
    if sys.version_info < (3, 12):
        looks_so = asyncio.iscoroutinefunction
    assert looks_so(kind.__call__)
    assert kind.__call__.__qualname__ in ("Response.__call__", "StreamingResponse.__call__")


async def test_a_response_below_base_http_middleware_is_scheduled_at_its_start(env: Env) -> None:
    """Scheduled is emitted before the middleware, which runs in another task, has the response."""
    order: list[str] = []

    class Layer(BaseHTTPMiddleware):
        async def dispatch(self, request: Any, call_next: Any) -> Any:
            response = await call_next(request)
            order.append(f"layer {len(env.seen.of(Scheduled))}")
            return response

    async def endpoint(request: Any) -> Response:
        return PlainTextResponse("ok", background=BackgroundTask(af))

    await drive(env.app(endpoint, middleware=[Middleware(Layer)] * 2))
    assert order == ["layer 1", "layer 1"]
    env.expect("af", log=["af"])
