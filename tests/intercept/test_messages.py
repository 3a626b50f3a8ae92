"""The messages of a response: nothing of ours is in their way until a run waits for their end."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import BackgroundTasks as Injected
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.responses import PlainTextResponse

from aftertask import Started, _messages
from aftertask.testing import VirtualClock
from intercept.driver import LOG, Env, af, answering, drive, sf
from intercept.test_life import app_with, outcomes, slow_stream

pytestmark = pytest.mark.anyio


class Before:
    """Right inside of our middleware: what it is given to send by."""

    given: Any = None
    before: Any = None

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Keep it, and what its cell holds."""
        if scope["type"] == "http":
            Before.given, Before.before = send, held(send)
        await self.app(scope, receive, send)


def held(send: Any) -> Any:
    """What `ServerErrorMiddleware`'s send passes its messages on by; None where it is not that."""
    if isinstance(send, functools.partial):
        return None
    return send.__closure__[send.__code__.co_freevars.index("send")].cell_contents


async def test_a_request_without_tasks_has_nothing_of_ours_in_its_way(env: Env) -> None:
    """What sends its messages is what Starlette gave us."""
    r = await drive(env.app(answering(None), middleware=[Middleware(Before)]))
    assert r.body == b"ok"
    assert (
        Before.given.__code__ is _messages._passes_on() and Before.given.__module__ == ServerErrorMiddleware.__module__
    )
    assert held(Before.given) is Before.before


async def test_what_is_put_in_their_way_is_gone_with_the_request(env: Env) -> None:
    """The error page from around us is sent as without us."""
    seen: list[Any] = []

    async def page(request: Any, error: Exception) -> PlainTextResponse:
        seen.append(held(Before.given))
        return PlainTextResponse("sorry", 500)

    async def endpoint(tasks: Injected) -> None:
        tasks.add_task(af)
        seen.append(held(Before.given))
        raise ValueError("x")

    app = app_with(env, endpoint, exception_handlers={500: page})
    app.user_middleware.insert(1, Middleware(Before))
    r = await drive(app)
    assert (r.status, r.body) == (500, b"sorry")
    assert seen[0] is not Before.before and isinstance(seen[0], functools.partial)
    assert seen[1] is Before.before
    assert outcomes(env) == [("af", "dropped handler_error")]


async def _pass(request: Any, call_next: Any) -> Any:
    return await call_next(request)


class Unknown:
    """In the place of Starlette's: passes messages on in a way that we do not know."""

    def __init__(self, app: Any, **kwargs: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve."""
        way = [send]

        async def _send(message: Any) -> None:
            await way[0](message)

        await self.app(scope, receive, _send)


class Elsewhere(ServerErrorMiddleware):
    """Has a cell of the name that we look for, and no message goes through it."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve."""
        real = send

        async def _send(message: Any) -> None:
            assert send is not None
            await real(message)

        await self.app(scope, receive, _send)


@pytest.fixture(params=[None, Unknown, Elsewhere])
def unknown(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The error middleware as it is, and two that are not as we know it."""
    if request.param is not None:
        monkeypatch.setattr("starlette.applications.ServerErrorMiddleware", request.param)
        monkeypatch.setattr("fastapi.applications.ServerErrorMiddleware", request.param, raising=False)
        monkeypatch.setattr(_messages, "ServerErrorMiddleware", request.param)
    _messages._passes_on.cache_clear()
    yield request.param
    _messages._passes_on.cache_clear()


@pytest.mark.parametrize("outside", [False, True])
async def test_the_end_of_a_response_is_seen_whoever_sends_it(env: Env, unknown: Any, outside: bool) -> None:
    """By the cell or, where that is not to be had, by a `partial`; under another middleware, too."""
    assert (_messages._passes_on() is None) is (unknown is not None)
    env.settings = {"run_ids_header": "x-runs"}
    with VirtualClock() as clock:
        app = app_with(env, slow_stream(clock))
        if outside:
            app.add_middleware(BaseHTTPMiddleware, dispatch=_pass)
        r = await drive(app)
    assert r.exc is None and r.body == b"xy"
    assert r.header("x-runs") == ", ".join(run.id for run in env.seen.runs())
    assert [event.queue_wait_s for event in env.seen.of(Started)] == [0, 7]


async def test_where_the_way_of_some_requests_is_another_they_are_watched_from_then_on(env: Env) -> None:
    """A middleware around us puts something around the `send` of some: a `partial`, as ours is."""
    env.settings = {"run_ids_header": "x-runs"}

    async def tagged(tag: str, send: Any, message: Any) -> None:
        await send({**message, "tag": tag})

    class Tagging:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            posted = scope["method"] == "POST"
            await self.app(scope, receive, functools.partial(tagged, "x", send) if posted else send)

    app = env.app(answering(BackgroundTask(af)))
    app.user_middleware.insert(0, Middleware(Tagging))
    answers = [await drive(app, method=method) for method in ("GET", "POST", "POST", "GET")]
    assert [r.header("x-runs") is not None for r in answers] == [True, False, True, True]
    assert [{message.get("tag") for message in r.messages} for r in answers] == [{None}, {"x"}, {"x"}, {None}]
    env.expect(*["af"] * 4)


@pytest.mark.parametrize("background", [None, BackgroundTask(af)])
async def test_cors_around_us_stays_what_it_is(env: Env, background: Any) -> None:
    """It sends by a `partial` with arguments; of ours and that one there is but one, with all of them."""
    env.settings = {"run_ids_header": "x-runs"}
    app = env.app(answering(background))
    app.user_middleware.insert(0, Middleware(CORSMiddleware, allow_origins=["*"]))
    for _ in range(2):
        r = await drive(app, headers=[(b"origin", b"https://example.org")])
        assert (r.exc, r.header("access-control-allow-origin")) == (None, "*")
        assert (r.header("x-runs") is None) is (background is None)


async def test_a_response_that_is_not_admitted_is_answered_by_the_apps_own_page(env: Env) -> None:
    """So it must be refused before the error middleware has seen it start."""

    class Full:
        def __call__(self, event: Any) -> None: ...

        async def admit(self, runs: Any) -> None:
            raise OSError("disk full")

    async def page(request: Any, error: Exception) -> PlainTextResponse:
        return PlainTextResponse(f"sorry: {error}", 500)

    env.signals = [Full(), env.seen]
    r = await drive(env.app(answering(BackgroundTask(af)), exception_handlers={500: page}))
    assert (r.status, r.body) == (500, b"sorry: disk full")
    assert outcomes(env) == [("af", "dropped handler_error")] and LOG == []


async def test_two_runs_of_two_apps_in_one_another_are_told_to_each(env: Env) -> None:
    """A mounted app with a middleware of its own: both may look at the messages, and both let go of them."""
    inner = env.app(answering(BackgroundTask(sf)))
    outer = Env()
    app = outer.app(answering(BackgroundTask(af)))
    app.mount("/in", inner)
    assert [(await drive(app, path)).status for path in ("/in/", "/", "/in/")] == [200] * 3
    assert LOG == ["sf", "af", "sf"]
    env.expect("sf", "sf")
    outer.expect("af")
