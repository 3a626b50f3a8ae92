"""The end of an app: what is reported, whose signal handlers are called, and which runs are lost."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import signal
import weakref
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import sniffio
from fastapi import BackgroundTasks as Injected
from fastapi import HTTPException
from starlette.background import BackgroundTask, BackgroundTasks
from starlette.responses import PlainTextResponse

from aftertask import task
from aftertask.events import Cancelled, Dropped, Failed, Lost, Scheduled, Signal, Skipped, Started
from aftertask.testing import Recorder
from kit import Env, af, answering, boom, drive, lifespan, sf

pytestmark = pytest.mark.anyio


@pytest.fixture
def handlers() -> Iterator[list[str]]:
    """The names of the SIGTERM handlers that were called; restores the handlers afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield []
    for number, handler in before.items():
        signal.signal(number, handler)


def install(called: list[str], name: str) -> Any:
    """Install a handler of SIGTERM that appends its name; returns the one from before."""
    return signal.signal(signal.SIGTERM, lambda number, frame: called.append(name))


@pytest.mark.parametrize("settings", [{"shutdown_report": True}, {"drain_timeout": 5}])
async def test_signal_handlers_are_chained_only_on_request(env: Env, handlers: list[str], settings: Any) -> None:
    """Without a shutdown report or a drain timeout the app's own handlers stay as they are."""
    install(handlers, "server")
    own = signal.getsignal(signal.SIGTERM)
    async with lifespan(env.app(answering(None))):
        assert signal.getsignal(signal.SIGTERM) is own
    env.settings |= settings
    async with lifespan(env.app(answering(None))):
        assert signal.getsignal(signal.SIGTERM) is not own
        os.kill(os.getpid(), signal.SIGTERM)
    assert handlers == ["server"]
    assert signal.getsignal(signal.SIGTERM) is own


async def test_a_server_that_ends_leaves_the_other_server_its_handler(env: Env, handlers: list[str]) -> None:
    """
    Of two servers in one process the second restores our handler when it ends, and the first one's is called again.
    """
    env.settings["shutdown_report"] = True
    install(handlers, "first")
    own = signal.getsignal(signal.SIGTERM)
    async with lifespan(env.app(answering(None))):
        found = install(handlers, "second")
        async with lifespan(env.app(answering(None))):
            os.kill(os.getpid(), signal.SIGTERM)
        signal.signal(signal.SIGTERM, found)
        os.kill(os.getpid(), signal.SIGTERM)
        assert handlers == ["second", "first"]
    assert signal.getsignal(signal.SIGTERM) is own


async def test_a_handler_that_calls_the_one_before_is_called_once(env: Env, handlers: list[str]) -> None:
    """An app may put its own handler before ours, and another app of ours may follow."""
    env.settings["shutdown_report"] = True
    install(handlers, "server")
    async with lifespan(env.app(answering(None))):
        ours: Any = signal.getsignal(signal.SIGTERM)

        def own(number: int, frame: Any) -> None:
            handlers.append("own")
            ours(number, frame)

        signal.signal(signal.SIGTERM, own)
        async with lifespan(env.app(answering(None))):
            os.kill(os.getpid(), signal.SIGTERM)
    assert handlers == ["own", "server"]


async def test_an_app_that_ends_reports_no_runs_of_another_app(env: Env, capsys: pytest.CaptureFixture[str]) -> None:
    """The other app continues: its runs hold nothing up and are not in the report."""
    env.settings["drain_timeout"] = 5
    go = anyio.Event()
    ends, stays = env.app(answering(None)), env.app(answering(BackgroundTask(go.wait)))
    async with lifespan(stays), anyio.create_task_group() as group:
        group.start_soon(drive, stays)
        await env.seen.until(Started, 1)
        async with lifespan(ends):
            pass
        go.set()
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    assert not [line for line in lines if line["event"] == "lifecycle.draining"]


async def test_a_supervised_batch_runs_though_its_request_is_cancelled_at_once(env: Env) -> None:
    """
    A request that is cancelled before its batch has started must not drop the runs; trio starts either task first.
    """
    env.settings["drain_timeout"] = 5
    for _ in range(10):
        env.seen = seen = Recorder()
        app = env.app(answering(BackgroundTasks([BackgroundTask(boom), BackgroundTask(sf)])))
        async with lifespan(app):
            with anyio.CancelScope() as request:

                async def cancelled(message: Any, request: anyio.CancelScope = request) -> None:
                    if message["type"] == "http.response.body":
                        request.cancel()

                await app(http(), None, cancelled)  # type: ignore[arg-type]  # it reads nothing
            assert request.cancelled_caught
        assert [len(seen.of(kind)) for kind in (Scheduled, Failed, Skipped, Cancelled)] == [2, 1, 1, 0]
        env.check_accounts()


@pytest.mark.parametrize("drain_timeout", [None, 5])
async def test_an_app_that_fails_to_start_leaves_nothing_behind(
    env: Env, handlers: list[str], drain_timeout: float | None
) -> None:
    """The server does not shut it down, and the signal handler must be gone all the same."""
    env.settings["drain_timeout"] = drain_timeout
    install(handlers, "server")
    own = signal.getsignal(signal.SIGTERM)

    @contextlib.asynccontextmanager
    async def life(app: Any) -> AsyncIterator[None]:
        assert (signal.getsignal(signal.SIGTERM) is own) is (drain_timeout is None)
        raise OSError("no database")
        yield

    answers: list[str] = []

    async def receive() -> dict[str, str]:
        return {"type": "lifespan.startup"}

    async def send(message: Any) -> None:
        answers.append(message["type"])

    scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
    with pytest.raises(OSError, match="no database"):
        await env.app(answering(None), lifespan=life)(scope, receive, send)
    assert answers == ["lifespan.startup.failed"]
    assert signal.getsignal(signal.SIGTERM) is own


async def test_the_runs_of_a_cancelled_request_are_lost_if_the_app_ends(env: Env) -> None:
    """A server that ends cancels its requests first and starts the lifespan's shutdown right after."""
    tasks = BackgroundTasks([BackgroundTask(anyio.sleep_forever), BackgroundTask(sf)])
    app = env.app(answering(tasks))
    async with anyio.create_task_group() as server, lifespan(app):
        request = anyio.CancelScope()

        async def serve() -> None:
            with request:
                await drive(app)

        server.start_soon(serve)
        await env.seen.until(Started)
        request.cancel()
    assert [type(event) for event in env.seen.events[-2:]] == [Cancelled, Lost]
    assert env.seen.of(Lost)[0].bad


async def test_the_runs_of_a_cancelled_request_are_dropped_if_the_app_continues(env: Env) -> None:
    """A timeout around the request cancels it, or a server whose client has gone."""
    app = env.app(answering(BackgroundTasks([BackgroundTask(anyio.sleep_forever), BackgroundTask(sf)])))
    async with lifespan(app):
        async with anyio.create_task_group() as request:
            request.start_soon(drive, app)
            await env.seen.until(Started)
            request.cancel_scope.cancel()
        await env.seen.idle()
    assert [event.reason for event in env.seen.of(Dropped)] == ["request_cancelled"]


def http() -> dict[str, Any]:
    """The scope of a request."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": "/",
        "root_path": "",
        "query_string": b"",
        "headers": [],
    }


async def test_a_background_that_is_never_started_does_not_keep_its_request_open(env: Env) -> None:
    """
    If an app's own code closes the awaitable of its background, the run is dropped, with a `drain_timeout` and without.
    """

    class Careless(PlainTextResponse):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            made, self.background = self.background, None
            await super().__call__(scope, receive, send)
            made().close()

    for timeout in (None, 5):
        env.settings |= {"drain_timeout": timeout}
        app = env.app(answering(BackgroundTask(af), Careless, "x"))
        async with lifespan(app):
            assert (await drive(app)).body == b"x"
        assert env.seen.outcomes() == [("af", "dropped")]
        env.seen.clear()


async def test_a_tasks_own_cancelled_error_ends_nothing_else(env: Env) -> None:
    """With a `drain_timeout` its batch runs beside others in the lifespan: those, and the lifespan, go on."""

    async def own() -> None:
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        await future

    if sniffio.current_async_library() == "trio":
        pytest.skip("on trio only a scope raises Cancelled")
    env.settings["drain_timeout"] = 5
    release = anyio.Event()
    app = env.app(answering(BackgroundTask(own)), answering(BackgroundTask(release.wait)))
    async with lifespan(app), anyio.create_task_group() as requests:
        requests.start_soon(drive, app, "/1")
        await env.seen.until(Started)
        with pytest.raises(asyncio.CancelledError):
            await drive(app)
        release.set()
    assert env.seen.outcomes() == [("own", "failed"), ("wait", "succeeded")]


async def test_the_drain_timeout_cancels_runs_and_not_the_apps_own_shutdown(env: Env) -> None:
    """The code after the `yield` of the app's lifespan may await as ever."""
    closed: list[str] = []

    @contextlib.asynccontextmanager
    async def resources(app: Any) -> AsyncIterator[None]:
        yield
        await anyio.sleep(0.01)
        closed.append("database")

    env.settings["drain_timeout"] = 0.01
    app = env.app(answering(BackgroundTask(anyio.sleep_forever)), lifespan=resources)
    async with lifespan(app), anyio.create_task_group() as requests:
        requests.start_soon(drive, app)
        await env.seen.until(Started)
        requests.cancel_scope.cancel()
    assert env.seen.outcomes() == [("sleep_forever", "cancelled")]
    assert closed == ["database"]


async def test_a_supervised_batch_releases_its_request(env: Env) -> None:
    """A cancelled request whose batch went on leaves nothing behind."""

    class Argument:
        pass

    release, alive = anyio.Event(), weakref.WeakSet[Argument]()
    env.settings["drain_timeout"] = 5
    env.signals = [Signal()]

    async def waits(argument: Argument) -> None:
        started.set()
        await release.wait()

    async def endpoint(tasks: Injected) -> None:
        argument = Argument()
        alive.add(argument)
        tasks.add_task(waits, argument)

    started = anyio.Event()
    app = env.fastapi(endpoint)
    async with lifespan(app):
        async with anyio.create_task_group() as requests:
            requests.start_soon(drive, app)
            await started.wait()
            requests.cancel_scope.cancel()
        assert len(alive) == 1
        release.set()
        for _ in range(20):
            await anyio.lowlevel.checkpoint()
        gc.collect()
        assert len(alive) == 0


async def test_compensating_runs_outlive_the_servers_cancellation(env: Env) -> None:
    """As any other run does with a `drain_timeout`."""
    env.settings["drain_timeout"] = 5
    release = anyio.Event()

    @task(run_on_error=True)
    async def refund() -> None:
        await release.wait()

    async def endpoint(tasks: Injected) -> None:
        tasks.add_task(refund)
        raise HTTPException(409)

    app = env.fastapi(endpoint)
    async with lifespan(app):
        async with anyio.create_task_group() as requests:
            requests.start_soon(drive, app)
            await env.seen.until(Started)
            requests.cancel_scope.cancel()
        assert env.seen.outcomes() == []
        release.set()
        await env.seen.idle()
    ((name, outcome),) = env.seen.outcomes()
    assert (name.rpartition(".")[2], outcome) == ("refund", "succeeded")


@pytest.mark.parametrize("has_lifespan", [True, False])
async def test_a_batch_starts_the_signals_only_without_a_lifespan(env: Env, has_lifespan: bool) -> None:
    """Where the server runs the lifespan, `open` has started them; else nothing shows earlier that the app serves."""
    calls: list[str] = []

    class Starts(Signal):
        def open(self) -> None:
            calls.append("open")

        def batch_started(self) -> None:
            calls.append("batch_started")

    env.signals = [Starts()]
    app = env.app(answering(BackgroundTask(af)))
    async with lifespan(app) if has_lifespan else contextlib.nullcontext():
        await drive(app)
        await drive(app)
    assert calls == (["open"] if has_lifespan else ["batch_started", "batch_started"])
