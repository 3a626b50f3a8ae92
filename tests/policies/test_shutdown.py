"""The end of apps that share a process: whose runs are told, whose signal handlers are called, what is not lost."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio
import pytest
from starlette.background import BackgroundTask, BackgroundTasks
from starlette.responses import PlainTextResponse

from aftertask import Cancelled, Failed, Scheduled, Skipped, Started
from aftertask._shutdown import Reporter, Supervisor, reporter
from aftertask.testing import Recorder
from intercept.driver import Env, af, answering, boom, drive, sf

pytestmark = pytest.mark.anyio


@contextlib.asynccontextmanager
async def lifespan(app: Any) -> AsyncIterator[None]:
    """The app's lifespan, as a server runs it."""
    messages, receive = anyio.create_memory_object_stream[Any](2)
    answer, answers = anyio.create_memory_object_stream[Any](2)
    async with messages, receive, answer, answers, anyio.create_task_group() as group:
        scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
        group.start_soon(app, scope, receive.receive, answer.send)
        await messages.send({"type": "lifespan.startup"})
        assert (await answers.receive())["type"] == "lifespan.startup.complete"
        yield
        await messages.send({"type": "lifespan.shutdown"})
        assert (await answers.receive())["type"] == "lifespan.shutdown.complete"


@pytest.fixture
def handlers() -> Iterator[list[str]]:
    """What handlers of SIGTERM have heard; those of before are set again."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield []
    for number, handler in before.items():
        signal.signal(number, handler)


def hear(heard: list[str], name: str) -> Any:
    """Set a handler of SIGTERM that notes that it was called; returns the one of before."""
    return signal.signal(signal.SIGTERM, lambda number, frame: heard.append(name))


def test_a_server_that_ends_leaves_the_other_one_its_signal(env: Env, handlers: list[str]) -> None:
    """Two servers in one process, the second inside the first's time: it sets back what it found, which is ours."""
    reporter, first, second = Reporter(), env.mw(None)._engine, env.mw(None)._engine
    assert first is not None
    assert second is not None
    hear(handlers, "first")
    reporter.open(first)
    found = hear(handlers, "second")
    reporter.open(second)
    os.kill(os.getpid(), signal.SIGTERM)
    reporter.close(second)
    signal.signal(signal.SIGTERM, found)
    os.kill(os.getpid(), signal.SIGTERM)
    assert handlers == ["second", "first"]
    reporter.close(first)
    assert signal.getsignal(signal.SIGTERM) is not found  # the first one's own again
    os.kill(os.getpid(), signal.SIGTERM)
    assert handlers == ["second", "first", "first"]


def test_a_handler_that_calls_the_one_of_before_is_called_once(env: Env, handlers: list[str]) -> None:
    """An app's own over ours, and then another app of ours: no circle."""
    reporter, first, second = Reporter(), env.mw(None)._engine, env.mw(None)._engine
    assert first is not None
    assert second is not None
    hear(handlers, "server")
    reporter.open(first)
    ours: Any = signal.getsignal(signal.SIGTERM)

    def own(number: int, frame: Any) -> None:
        handlers.append("own")
        ours(number, frame)

    signal.signal(signal.SIGTERM, own)
    reporter.open(second)
    os.kill(os.getpid(), signal.SIGTERM)
    assert handlers == ["own", "server"]
    assert first.stopping
    assert second.stopping


async def test_an_app_that_ends_says_nothing_of_another_in_its_process(
    env: Env, capsys: pytest.CaptureFixture[str]
) -> None:
    """That one goes on serving: its runs hold up nothing, and it is not stopping."""
    env.settings["drain_timeout"] = 5
    go = anyio.Event()
    ends, stays = env.app(answering(None)), env.app(answering(BackgroundTask(go.wait)))
    async with lifespan(stays), anyio.create_task_group() as group:
        group.start_soon(drive, stays)
        await env.seen.until(Started, 1)
        async with lifespan(ends):
            pass
        engine: Any = env.seen.runs()[0].request
        assert not engine._engine.stopping
        go.set()
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    assert not [line for line in lines if line["event"] == "lifecycle.draining"]


async def test_a_batch_that_was_handed_over_is_its_own_though_the_request_ends_at_once(env: Env) -> None:
    """Cancelled between the two, the request must not take its runs for ones that never ran; trio begins either."""
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


class Slow:
    """A task group that has not yet begun what it was given."""

    def __init__(self) -> None:
        self.given: list[Any] = []

    def start_soon(self, function: Any) -> None:
        """Later."""
        self.given.append(function)


async def test_a_batch_counts_from_the_moment_it_is_handed_over() -> None:
    """A shutdown that comes before its first step waits for it."""
    ended: list[str] = []
    slow: Any = Slow()
    supervisor = Supervisor(slow, 5)

    async def batch() -> None:
        ended.append("batch")

    async def until_idle() -> None:
        await supervisor._until_idle()
        ended.append("idle")

    async with anyio.create_task_group() as group:
        group.start_soon(supervisor.run, batch)
        await anyio.wait_all_tasks_blocked()
        group.start_soon(until_idle)
        await anyio.wait_all_tasks_blocked()
        await slow.given.pop()()
    assert ended == ["batch", "idle"]


@pytest.mark.parametrize("drain_timeout", [None, 5])
async def test_an_app_that_fails_to_start_is_forgotten(env: Env, drain_timeout: float | None) -> None:
    """Nobody asks it to shut down: else its signal handler, and the app, would be kept."""
    env.settings["drain_timeout"] = drain_timeout

    @contextlib.asynccontextmanager
    async def life(app: Any) -> AsyncIterator[None]:
        assert len(reporter()._engines) == before + 1
        raise OSError("no database")
        yield

    before = len(reporter()._engines)
    answers: list[str] = []

    async def receive() -> dict[str, str]:
        return {"type": "lifespan.startup"}

    async def send(message: Any) -> None:
        answers.append(message["type"])

    scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
    with pytest.raises(OSError, match="no database"):
        await env.app(answering(None), lifespan=life)(scope, receive, send)
    assert answers == ["lifespan.startup.failed"]
    assert len(reporter()._engines) == before


def http() -> dict[str, Any]:
    """A request's scope."""
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
    """An app's own code makes its awaitable and throws it away: the run is dropped, as without a `drain_timeout`."""

    class Careless(PlainTextResponse):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            made, self.background = self.background, None
            await super().__call__(scope, receive, send)
            made().close()

    for timeout in (None, 5):
        env.settings = {"drain_timeout": timeout}
        app = env.app(answering(BackgroundTask(af), Careless, "x"))
        async with lifespan(app):
            assert (await drive(app)).body == b"x"
        assert env.seen.outcomes() == [("af", "dropped")]
        env.seen.clear()
