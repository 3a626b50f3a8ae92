"""Slow and stuck: told while the run goes on, once an attempt, with where it is; at no cost to the others."""

from __future__ import annotations

import gc
import linecache
import os
import sys
import threading
import time
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
from aftertask.events import Slow, Stuck, Succeeded, _frames, _watch
from aftertask.alerts import Alert, Alerts
from aftertask.signals import Logs
from aftertask.testing import Recorder, VirtualClock
from alerts.receivers import Got


def app_of(function: Callable[..., Any], *signals: Any, **policy: Any) -> Starlette:
    async def endpoint(request: Request) -> PlainTextResponse:
        return PlainTextResponse("ok", background=BackgroundTask(function))

    settings = Settings(registry=CollectorRegistry(), policies={"*": Policy(**policy)})
    middleware = [Middleware(AftertaskMiddleware, settings=settings, signals=signals)]
    return Starlette(routes=[Route("/", endpoint)], middleware=middleware)


class Busy:
    """What a task does until the test has seen enough."""

    def __init__(self) -> None:
        self._inside, self._done = threading.Event(), threading.Event()

    def deep_in_a_socket(self) -> None:
        """Blocks."""
        self._inside.set()
        self._done.wait(20)

    async def waits_for_an_answer(self) -> None:
        """The same for an async one."""
        self._inside.set()
        while not self._done.is_set():  # noqa: ASYNC110  # set by another thread
            await anyio.sleep(0.01)

    def wait(self) -> None:
        """Until the task is there."""
        assert self._inside.wait(10)

    def end(self) -> None:
        """That was enough."""
        self._done.set()


class InFlight:
    """An app that serves one request in a thread of its own, until the test has seen enough."""

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
def test_a_sync_task_is_told_with_the_stack_of_its_thread(
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


@pytest.mark.parametrize("policy", [{}, {"timeout": 3600}, {"executor": "thread"}])
def test_an_async_task_is_told_with_what_it_awaits(recorder: Recorder, busy: Busy, policy: dict[str, Any]) -> None:
    """On asyncio, as far as the loop is known."""

    async def sync_stock() -> None:
        await busy.waits_for_an_answer()

    with VirtualClock() as clock, InFlight(app_of(sync_stock, recorder, stuck_after=60, **policy), recorder, busy):
        clock.advance(61)
        (stuck,) = recorder.of(Stuck)
        assert stuck.stack is not None
        assert "in waits_for_an_answer" in stuck.stack
        assert stuck.stack.splitlines()[0].endswith("in sync_stock")


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_an_async_task_that_blocks_the_loop_is_told_with_the_stack_of_the_loop(
    recorder: Recorder, busy: Busy, backend: str
) -> None:
    """It awaits nothing: it is on the loop's thread."""

    async def sync_stock() -> None:
        busy.deep_in_a_socket()

    with VirtualClock() as clock, InFlight(app_of(sync_stock, recorder, stuck_after=60), recorder, busy, backend):
        clock.advance(61)
        (stuck,) = recorder.of(Stuck)
        assert stuck.stack is not None
        assert "in deep_in_a_socket" in stuck.stack
        assert stuck.stack.splitlines()[0].endswith("in sync_stock")


def test_on_trio_an_async_task_is_told_without_a_stack(recorder: Recorder, busy: Busy) -> None:
    """Trio's tasks cannot be asked from another thread."""

    async def waits() -> None:
        await busy.waits_for_an_answer()

    with VirtualClock() as clock, InFlight(app_of(waits, recorder, stuck_after=60), recorder, busy, "trio"):
        clock.advance(61)
        (stuck,) = recorder.of(Stuck)
        assert stuck.stack is None


def test_a_stack_that_is_told_keeps_no_sources() -> None:
    """Python would keep every file that a frame of it stands in; what somebody else has read stays."""
    linecache.clearcache()
    mine = linecache.getline(__file__, 1)
    frames = _frames.outwards(sys._getframe())
    told = _frames.text(frames, str)
    assert "told = _frames.text(frames, str)" in told
    assert set(linecache.cache) == {__file__} and mine.startswith('"""Slow')


def test_each_attempt_is_told(recorder: Recorder, busy: Busy) -> None:
    """A second attempt that hangs is another finding; the wait between them is none."""
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
    """Nobody has to ask for it; twice its time limit where it has one."""

    def report() -> None:
        busy.deep_in_a_socket()

    with VirtualClock() as clock, InFlight(app_of(report, recorder), recorder, busy):
        clock.advance(1799)
        assert recorder.of(Stuck) == []
        clock.advance(2)
        (stuck,) = recorder.of(Stuck)
        assert stuck.limit_s == 1800
        assert recorder.of(Slow) == []


def test_the_thread_tells_by_itself(recorder: Recorder, busy: Busy) -> None:
    """In real time, without a test that turns the clock; a smaller limit that is learnt later is kept to."""

    def first() -> None: ...

    def report() -> None:
        busy.deep_in_a_socket()

    TestClient(app_of(first, recorder, stuck_after=3000)).get("/")
    other = Recorder()
    with InFlight(app_of(report, other, slow_after=0.05), other, busy):
        other.wait_for(Slow, timeout=5)


def test_the_thread_ends_when_no_app_needs_it(recorder: Recorder) -> None:
    """At close; and it begins again when the app does."""

    def report() -> None: ...

    gc.collect()  # apps of other tests
    client = TestClient(app_of(report, recorder, slow_after=1))
    for _ in range(2):
        with client:
            client.get("/")
            assert "aftertask-watch" in {thread.name for thread in threading.enumerate()}
        with _watch._thread._changed:
            others = [watch for watch in _watch._thread._watches if watch.needed]
            _watch._thread._news = not others
            _watch._thread._changed.notify_all()
        if not others:
            end = time.monotonic() + 5
            while "aftertask-watch" in {thread.name for thread in threading.enumerate()}:
                assert time.monotonic() < end
                time.sleep(0.01)  # between two looks at a real condition


def test_where_nobody_listens_nobody_looks() -> None:
    """Without a signal that wants them there is no thread and no limit to know."""

    def report() -> None: ...

    seen: list[object] = []
    signal: Any = type("S", (), {"handlers": {Succeeded: seen.append}, "__call__": lambda self, event: None})()
    before = set(_watch._thread._watches)
    TestClient(app_of(report, signal, slow_after=1)).get("/")
    assert len(seen) == 1
    assert set(_watch._thread._watches) <= before


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # since 3.12, in a process with threads
def test_a_child_process_looks_by_itself(recorder: Recorder) -> None:
    """After a fork the thread is made anew, when the child runs its first task."""

    def report() -> None: ...

    client = TestClient(app_of(report, recorder, slow_after=1))
    client.get("/")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            none = _watch._thread._thread is None
            client.get("/")
            code = 0 if none and _watch._thread._thread is not None and _watch._thread._thread.is_alive() else 2
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_a_stuck_run_reaches_a_person_and_the_log(
    recorder: Recorder, busy: Busy, caplog: pytest.LogCaptureFixture
) -> None:
    """Critical, with the stack; what is slow is a warning."""

    def report() -> None:
        busy.deep_in_a_socket()

    got = Got()
    alerts = Alerts([got])
    app = app_of(report, recorder, Logs(), alerts, slow_after=10, stuck_after=60)
    with VirtualClock() as clock, InFlight(app, recorder, busy):
        clock.advance(11)
        clock.advance(50)
        clock.advance(1)
        told: list[Alert] = got.wait(2)
        assert {alert.kind: alert.severity for alert in told} == {"slow": "warning", "stuck": "critical"}
    stuck = next(alert for alert in told if alert.kind == "stuck")
    assert stuck.title.endswith("report is stuck")
    assert stuck.stack is not None and "in report" in stuck.stack
    assert "more than 60 s" in stuck.message
    lines = [record.__dict__ for record in caplog.records if record.message in ("task.slow", "task.stuck")]
    assert [(line["message"], line["levelname"], line["limit_s"]) for line in lines] == [
        ("task.slow", "WARNING", 10),
        ("task.stuck", "WARNING", 60),
    ]
    assert all("in report" in line["stack"] for line in lines)
