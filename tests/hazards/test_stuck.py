"""Slow and stuck runs are reported while they go on, once per attempt, with the place where they are."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from aftertask import AftertaskMiddleware, Policy, Retry, Settings
from aftertask.alerts import Alerts
from aftertask.events import Slow, Stuck
from aftertask.signals import Logs
from aftertask.testing import Recorder, VirtualClock
from kit_alerts import Inbox


def app_of(function: Callable[..., Any], *signals: Any, **policy: Any) -> Starlette:
    """An app whose `/` answers, and calls this function under this policy."""

    async def endpoint(request: Request) -> PlainTextResponse:
        return PlainTextResponse("ok", background=BackgroundTask(function))

    settings = Settings(registry=CollectorRegistry(), policies={"*": Policy(**policy)})
    middleware = [Middleware(AftertaskMiddleware, settings=settings, signals=signals)]
    return Starlette(routes=[Route("/", endpoint)], middleware=middleware)


class Busy:
    """What a task does until the test ends it."""

    def __init__(self) -> None:
        self._inside, self._done = threading.Event(), threading.Event()

    def deep_in_a_socket(self) -> None:
        """Block in a thread."""
        self._inside.set()
        self._done.wait(20)

    async def waits_for_an_answer(self) -> None:
        """Wait in a coroutine."""
        self._inside.set()
        while not self._done.is_set():  # noqa: ASYNC110  # set by another thread
            await anyio.sleep(0.01)

    def wait(self) -> None:
        """Block until the task is there."""
        assert self._inside.wait(10)

    def end(self) -> None:
        """Let the task end."""
        self._done.set()


class InFlight:
    """An app that serves one request in a thread of its own, until the block ends."""

    def __init__(self, app: Starlette, recorder: Recorder, busy: Busy, backend: str = "asyncio") -> None:
        self._client = TestClient(app, backend=backend, raise_server_exceptions=False)  # type: ignore[arg-type]  # one of them
        self._recorder, self._busy = recorder, busy

    def __enter__(self) -> Recorder:
        self._client.__enter__()
        self._thread = threading.Thread(target=self._client.get, args=("/",))
        self._thread.start()
        self._busy.wait()
        return self._recorder

    def __exit__(self, *error: object) -> None:
        self._busy.end()
        self._recorder.wait_idle()
        self._thread.join()
        self._client.__exit__(*error)  # type: ignore[arg-type]  # as it came


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def busy() -> Busy:
    return Busy()


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("policy", [{}, {"executor": "thread"}, {"timeout": 3600}])
def test_a_sync_task_is_reported_with_the_stack_of_its_thread(
    recorder: Recorder, busy: Busy, backend: str, policy: dict[str, Any]
) -> None:
    """Slow after one limit, stuck after the other; each once; the stack begins with the task's own code."""

    def report() -> None:
        busy.deep_in_a_socket()

    app = app_of(report, recorder, slow_after=10, stuck_after=60, **policy)
    with VirtualClock() as clock, InFlight(app, recorder, busy, backend):
        clock.advance(9.9)
        assert recorder.of(Slow) == []
        clock.advance(0.2)
        clock.advance(20)
        (slow,) = recorder.of(Slow)
        assert (slow.limit_s, slow.run.task) == (10, f"{__name__}.{report.__qualname__}")
        assert slow.running_s == pytest.approx(10.1)
        assert recorder.of(Stuck) == []
        clock.advance(30)
        clock.advance(500)
        (stuck,) = recorder.of(Stuck)
        assert stuck.limit_s == 60
        assert stuck.stack is not None
        first, *_, last = [line for line in stuck.stack.splitlines() if line.startswith("  File")]
        assert first.endswith("in report") and "threading.py" in last
        assert "in deep_in_a_socket" in stuck.stack
        assert len(recorder.of(Slow)) == 1
    assert recorder.outcomes() == [("report", "succeeded")]


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("policy", [{}, {"timeout": 3600}])
def test_an_async_task_is_reported_with_what_it_awaits(
    recorder: Recorder, busy: Busy, backend: str, policy: dict[str, Any]
) -> None:
    """The stack is that of the suspended coroutines."""

    async def sync_stock() -> None:
        await busy.waits_for_an_answer()

    app = app_of(sync_stock, recorder, stuck_after=60, **policy)
    with VirtualClock() as clock, InFlight(app, recorder, busy, backend):
        clock.advance(61)
        (stuck,) = recorder.of(Stuck)
        assert stuck.stack is not None
        assert "in waits_for_an_answer" in stuck.stack
        assert stuck.stack.splitlines()[0].endswith("in sync_stock")


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_an_async_task_that_blocks_the_loop_is_reported_with_the_stack_of_the_loop(
    recorder: Recorder, busy: Busy, backend: str
) -> None:
    """It awaits nothing, so its stack is on the loop's thread."""

    async def sync_stock() -> None:
        busy.deep_in_a_socket()

    with VirtualClock() as clock, InFlight(app_of(sync_stock, recorder, stuck_after=60), recorder, busy, backend):
        clock.advance(61)
        (stuck,) = recorder.of(Stuck)
        assert stuck.stack is not None
        assert "in deep_in_a_socket" in stuck.stack
        assert stuck.stack.splitlines()[0].endswith("in sync_stock")


def test_each_attempt_is_reported(recorder: Recorder, busy: Busy) -> None:
    """A second attempt that hangs is reported again; the back-off between them is not."""
    first, attempts = Busy(), [busy]

    def flaky() -> None:
        if attempts:
            first.deep_in_a_socket()
            attempts.clear()
            raise ValueError
        busy.deep_in_a_socket()

    app = app_of(flaky, recorder, stuck_after=60, retry=Retry(attempts=2, wait_initial=500, wait_max=500))
    with VirtualClock() as clock, InFlight(app, recorder, first):
        clock.advance(61)
        assert len(recorder.of(Stuck)) == 1
        first.end()
        clock.wait_until_waiting()
        clock.advance(501)
        busy.wait()
        assert len(recorder.of(Stuck)) == 1
        clock.advance(61)
        assert [stuck.run.attempt for stuck in recorder.of(Stuck)] == [2, 2]
        busy.end()


def test_without_a_policy_half_an_hour_is_stuck_and_nothing_is_slow(recorder: Recorder, busy: Busy) -> None:
    """The default limits of a task without a timeout."""

    def report() -> None:
        busy.deep_in_a_socket()

    with VirtualClock() as clock, InFlight(app_of(report, recorder), recorder, busy):
        clock.advance(1799)
        assert recorder.of(Stuck) == []
        clock.advance(2)
        (stuck,) = recorder.of(Stuck)
        assert stuck.limit_s == 1800
        assert recorder.of(Slow) == []


def test_reports_come_in_real_time(recorder: Recorder, busy: Busy) -> None:
    """Without a test that advances the clock; a smaller limit that comes up later is kept."""

    def first() -> None: ...

    def report() -> None:
        busy.deep_in_a_socket()

    TestClient(app_of(first, recorder, stuck_after=3000)).get("/")
    other = Recorder()
    with InFlight(app_of(report, other, slow_after=0.05), other, busy):
        other.wait_for(Slow)


def test_an_app_that_is_started_again_reports_again(busy: Busy) -> None:
    """Its task is not new, so nothing but the start of the app, or of a batch, shows that it is needed."""
    waits = False

    def report() -> None:
        if waits:
            busy.deep_in_a_socket()

    recorder = Recorder()
    app = app_of(report, recorder, slow_after=0.05)
    with TestClient(app) as client:
        client.get("/")
    waits = True
    with InFlight(app, recorder, busy):
        recorder.wait_for(Slow)


_THREADS = """
import sys, threading
sys.path.insert(0, {tests!r})
from hazards.test_stuck import app_of
from aftertask.events import Signal, Slow
from aftertask.testing import Recorder
from starlette.testclient import TestClient

class OnlyEnds(Signal):
    def succeeded(self, event):
        pass

def ours():
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("aftertask"))

def report():
    pass

assert ours() == []
with TestClient(app_of(report, OnlyEnds(), slow_after=1)) as client:
    client.get("/")
    assert ours() == [], ours()
for _ in range(2):
    with TestClient(app_of(report, Recorder(), slow_after=1)) as client:
        client.get("/")
        threads = [thread for thread in threading.enumerate() if thread.name.startswith("aftertask")]
        assert ours() == ["aftertask-loops", "aftertask-stuck"], ours()
    for thread in threads:
        thread.join(10)
    assert ours() == [], ours()
"""


def test_threads_exist_only_while_an_app_needs_them() -> None:
    """None without a signal that wants what they find; none after the app's shutdown; new ones when it starts again."""
    _run(_THREADS)


_FORK = """
import os, sys
sys.path.insert(0, {tests!r})
from hazards.test_stuck import Busy, InFlight, app_of
from aftertask.events import Slow
from aftertask.testing import Recorder
from starlette.testclient import TestClient

busy, recorder, waits = Busy(), Recorder(), False

def report():
    if waits:
        busy.deep_in_a_socket()

app = app_of(report, recorder, slow_after=0.05)
TestClient(app).get("/")
child = os.fork()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
waits = True
with InFlight(app, recorder, busy):
    recorder.wait_for(Slow)
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_process_reports_by_itself() -> None:
    """The parent's thread does not exist in the child, which starts its own at its first run."""
    _run(_FORK)


def _run(program: str) -> None:
    tests = os.path.dirname(os.path.dirname(__file__))
    command = [sys.executable, "-W", "ignore", "-c", program.format(tests=tests)]
    done = subprocess.run(command, timeout=20, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_stuck_run_is_alerted_and_logged(recorder: Recorder, busy: Busy, caplog: pytest.LogCaptureFixture) -> None:
    """A stuck run is critical, with its stack; a slow one is a warning."""

    def report() -> None:
        busy.deep_in_a_socket()

    inbox = Inbox()
    alerts = Alerts([inbox])
    app = app_of(report, recorder, Logs(), alerts, slow_after=10, stuck_after=60)
    with VirtualClock() as clock, InFlight(app, recorder, busy):
        clock.advance(11)
        clock.advance(50)
        clock.advance(1)
        alerted = inbox.wait(2)
        assert {alert.kind: alert.severity for alert in alerted} == {"slow": "warning", "stuck": "critical"}
    stuck = next(alert for alert in alerted if alert.kind == "stuck")
    assert stuck.title.endswith("report is stuck")
    assert stuck.stack is not None and "in report" in stuck.stack
    assert "the limit is 60 s" in stuck.message
    lines = [record.__dict__ for record in caplog.records if record.message.startswith(("task.slow", "task.stuck"))]
    assert [(line["message"].split()[0], line["levelname"], line["limit_s"]) for line in lines] == [
        ("task.slow", "WARNING", 10),
        ("task.stuck", "WARNING", 60),
    ]
    assert all("in report" in line["stack"] for line in lines)
