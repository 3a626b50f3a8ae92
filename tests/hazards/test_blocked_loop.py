"""A blocked event loop: the run that blocks it is named, with the line, the span and the seconds."""

from __future__ import annotations

import asyncio
import bdb
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from aftertask import AftertaskMiddleware, HazardFound, Settings, current_run, task
from aftertask._core.emit import Emitter
from aftertask._taskrun import RequestInfo, TaskInfo
from aftertask._text import own_frames
from aftertask.events import LoopBlocked, Signal, Succeeded, TaskEvent, TaskRun
from aftertask.hazards._block import Block, LoopReports
from aftertask.signals import usual
from aftertask.testing import Recorder
from kit import Traced, drive

pytestmark = pytest.mark.anyio

#: Seconds of a block that nothing ends: longer than the default threshold, 0.25 s, at any load.
SECONDS = 0.6

#: A task's child counts as the task from this Python on, and not on trio.
SEES_CHILDREN = sys.version_info >= (3, 12)


#: Each kind of event loop; what does not depend on it is tested on one.
on_each_loop = pytest.mark.parametrize(
    "anyio_backend",
    [("asyncio", {}), ("asyncio", {"use_uvloop": True}), ("trio", {})],
    ids=["asyncio", "uvloop", "trio"],
)


@pytest.fixture
def anyio_backend() -> Any:
    """The event loop of these tests."""
    return "asyncio", {}


class Reports(Signal):
    """What a signal gets about the event loop; can be waited for while the loop is blocked."""

    def __init__(self) -> None:
        self.lags: list[float] = []
        self.seconds: list[tuple[TaskRun | None, float]] = []
        self.hazards: list[HazardFound] = []
        self.blocks: list[LoopBlocked] = []
        self._changed = threading.Condition()

    def hazard_found(self, event: HazardFound) -> None:
        """A run blocks the loop."""
        self._add(self.hazards, event)

    def loop_lag(self, seconds: float) -> None:
        """The loop responded."""
        self._add(self.lags, seconds)

    def loop_blocked_for(self, run: TaskRun | None, seconds: float) -> None:
        """More seconds."""
        self._add(self.seconds, (run, seconds))

    def loop_blocked(self, report: LoopBlocked) -> None:
        """The whole block."""
        self._add(self.blocks, report)

    def _add(self, to: list[Any], what: object) -> None:
        with self._changed:
            to.append(what)
            self._changed.notify_all()

    def wait(self, what: list[Any], count: int = 1) -> None:
        """Block until there are this many; fails after 10 seconds."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(what) >= count, 10), f"{len(what)} of {count}"

    async def until(self, what: list[Any], count: int = 1) -> None:
        """`wait`, while the event loop goes on."""
        await anyio.to_thread.run_sync(self.wait, what, count, abandon_on_cancel=True)

    async def responds(self) -> None:
        """Until the loop has responded twice: what came before has been reported."""
        await self.until(self.lags, len(self.lags) + 2)


class App:
    """An app under the middleware: its one endpoint answers, and calls `work` after it."""

    def __init__(self, work: Callable[..., Any], *, before: Callable[[], None] | None = None, **settings: Any) -> None:
        self.registry, self.events, self.reports, self.traced = CollectorRegistry(), Recorder(), Reports(), Traced()
        chosen = Settings(**{"registry": self.registry, "tracer_provider": self.traced.provider, **settings})
        self._before = before

        async def endpoint(request: Request) -> PlainTextResponse:
            if self._before is not None:
                self._before()
            return PlainTextResponse("", background=BackgroundTask(work))

        signals = [*usual(chosen), self.events, self.reports]
        self.served = Starlette(
            routes=[Route("/", endpoint)],
            middleware=[Middleware(AftertaskMiddleware, settings=chosen, signals=signals)],
        )

    def metric(self, name: str, **labels: str) -> float:
        """A sample of a metric; 0 if there is none."""
        return self.registry.get_sample_value(f"aftertask_{name}", labels) or 0.0

    def blocked(self, name: str) -> float:
        """Seconds that the metrics count for a task."""
        return self.metric("event_loop_blocked_seconds_total", task=name)


class Blocking:
    """A task that blocks the event loop until that has been reported."""

    def __init__(self, **settings: Any) -> None:
        self.app = App(self.blocks, **settings)

    async def blocks(self) -> None:
        """Do what a coroutine must not."""
        await anyio.lowlevel.checkpoint()
        self.app.reports.wait(self.app.reports.hazards, len(self.app.reports.hazards) + 1)


async def fine() -> None:
    """A task that blocks nothing."""


@on_each_loop
async def test_the_run_is_named_with_its_line(caplog: pytest.LogCaptureFixture) -> None:
    """The event, the log line, the metrics and the span name the run and the line that blocks."""
    blocking = Blocking()
    app = blocking.app
    await drive(app.served)
    await app.reports.until(app.reports.blocks)
    await app.reports.responds()  # the lag is counted after the block has been reported
    (hazard,), (report,) = app.reports.hazards, app.reports.blocks
    name = hazard.run.task
    assert hazard.run is report.run is app.events.runs("blocks")[0]
    assert hazard.kind == "blocked_loop" and "make it a plain `def`" in hazard.advice
    assert re.fullmatch(rf"{__file__}:\d+ in Reports\.wait", report.where) and report.where in hazard.advice
    first, *_ = str(hazard.stack).splitlines()
    assert first.startswith(f'  File "{__file__}", line ') and first.endswith(" in blocks")
    assert report.stack == hazard.stack and report.over and report.blocked_s >= 0.25
    # On a busy machine the last look may find the loop behind the run, but not yet responding.
    assert app.blocked(name) + app.blocked("__none__") == pytest.approx(report.blocked_s, abs=1e-6)
    assert app.blocked(name) >= 0.25
    assert app.metric("hazards_total", task=name, kind="blocked_loop") == 1
    # Of one moment: the lag is measured all the time.
    (lag,) = (each for each in app.registry.collect() if each.name == "aftertask_event_loop_lag_seconds")
    counts = {each.labels.get("le"): each.value for each in lag.samples if not each.name.endswith("_sum")}
    late = counts["+Inf"] - counts["0.25"]
    assert late == sum(seconds > 0.25 for seconds in app.reports.lags)  # 0 only if the watching thread itself woke late
    (span,) = app.traced.spans()
    assert float(str((span.attributes or {})["aftertask.loop_blocked"])) >= 0.2
    (event,) = span.events
    assert event.name == "aftertask.hazard" and (event.attributes or {})["kind"] == "blocked_loop"
    lines = [vars(record) for record in caplog.records if getattr(record, "event", None) == "loop.blocked"]
    (logged,) = [line for line in lines if line.get("run_id") == hazard.run.id]  # others come from earlier tests
    assert logged["levelname"] == "WARNING" and logged["task"] == name
    assert logged["blocked_s"] == pytest.approx(report.blocked_s, abs=1e-6)
    assert logged["stack"] == own_frames(report.stack)


def test_a_run_is_named_although_the_look_behind_the_threshold_came_too_late() -> None:
    """It was seen at two looks before: the end of the block blames it, once."""
    reports, found = Reports(), list[TaskRun]()
    emit, request = Emitter([reports], str), RequestInfo()
    request.app = emit
    run = TaskRun(TaskInfo("blocks", "shop.blocks"), request, None)
    app = LoopReports(0.25, emit, lambda run, where, stack: found.append(run), lambda threads: None)
    block = Block(app, 0.0)
    for now in (0.09, 0.17):
        block.look(run, [sys._getframe()], now, (app,))
    assert (found, reports.blocks) == ([], [])
    block.end(0.31)
    (report,) = reports.blocks
    assert (found, report.run, report.blocked_s, run.blocked_s) == ([run], run, 0.31, 0.31)


@on_each_loop
async def test_an_endpoint_that_blocks_is_not_the_fault_of_a_task() -> None:
    """It is reported with its stack, under the name of no task."""
    app = App(fine)

    def endpoint_blocks() -> None:
        app.reports.wait(app.reports.seconds)

    await drive(app.served)  # a loop without a lifespan is watched from its first batch on
    app._before = endpoint_blocks
    await drive(app.served)
    await app.reports.until(app.reports.blocks)
    (report,) = app.reports.blocks
    assert app.reports.hazards == [] and report.run is None
    assert "endpoint_blocks" in report.stack and report.where.startswith(f"{__file__}:")
    assert app.blocked("__none__") == pytest.approx(report.blocked_s, abs=1e-6)


async def test_a_run_under_a_policy_is_named() -> None:
    """A timeout and retries change nothing."""
    blocking = Blocking()

    @task(name="limited", timeout=30, retry=None)
    async def limited() -> None:
        await blocking.blocks()

    blocking.app = App(limited)
    await drive(blocking.app.served)
    assert [hazard.run.task for hazard in blocking.app.reports.hazards] == ["limited"]


@on_each_loop
async def test_a_task_that_the_run_started_counts_as_the_run(anyio_backend: Any) -> None:
    """Where the context of asyncio's current task can be read; elsewhere no task is blamed."""

    async def child() -> None:
        app.reports.wait(app.reports.seconds)

    async def parent() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(child)

    app = App(parent)
    await drive(app.served)
    await app.reports.until(app.reports.blocks)
    blamed = [hazard.run.task.rpartition(".")[2] for hazard in app.reports.hazards]
    assert blamed == (["parent"] if SEES_CHILDREN and anyio_backend[0] == "asyncio" else [])


async def test_a_block_is_reported_once_a_minute_and_counted_each_time() -> None:
    """The second block by the same task is a hazard and seconds, without a second report."""
    blocking = Blocking()
    reports = blocking.app.reports
    for count in (1, 2):
        await drive(blocking.app.served)
        await reports.responds()
        assert len(reports.hazards) == count
    assert len(reports.blocks) == 1
    assert blocking.app.blocked(reports.hazards[0].run.task) > reports.blocks[0].blocked_s


@pytest.mark.long
async def test_a_loop_that_stays_blocked_is_reported_while_it_is() -> None:
    """After five seconds: a deadlock would never be reported otherwise."""

    async def stays() -> None:
        app.reports.wait(app.reports.blocks)

    app = App(stays)
    await drive(app.served)
    await app.reports.until(app.reports.blocks, 2)
    first, last = app.reports.blocks
    assert not first.over and first.blocked_s >= 5
    assert last.over and last.blocked_s >= first.blocked_s


async def test_without_a_threshold_only_the_lag_is_measured() -> None:
    """`block_threshold=None`: no block is reported."""

    async def blocks() -> None:
        await app.reports.until(app.reports.lags)
        time.sleep(SECONDS)  # noqa: ASYNC251  # on purpose

    app = App(blocks, block_threshold=None)
    await drive(app.served)
    await app.reports.responds()
    assert max(app.reports.lags) > 0.25
    assert app.reports.hazards == app.reports.blocks == app.reports.seconds == []


async def test_a_program_stopped_by_a_debugger_is_not_blocked() -> None:
    """A developer who looks at a stopped program expects that it stands still."""

    async def stopped() -> None:
        await app.reports.until(app.reports.lags)
        bdb.Bdb().runcall(time.sleep, SECONDS)

    app = App(stopped)
    await drive(app.served)
    await app.reports.responds()
    assert app.reports.hazards == app.reports.blocks == app.reports.seconds == []


@on_each_loop
async def test_many_short_steps_have_no_single_culprit() -> None:
    """An overloaded loop is late; its seconds count for no task, and no run is a hazard."""

    async def short() -> None:
        while not app.reports.seconds:
            end = time.perf_counter() + 0.003
            while time.perf_counter() < end:
                pass
            await anyio.lowlevel.checkpoint()

    app = App(short)
    with anyio.fail_after(15):
        async with anyio.create_task_group() as group:
            for _ in range(200):
                group.start_soon(drive, app.served)
    assert {run for run, _ in app.reports.seconds} == {None}
    assert app.reports.hazards == []


@on_each_loop
async def test_one_of_fifty_runs_is_named() -> None:
    """All run at once and wait; the one that blocks is named."""
    await _name_one_of_fifty(7)


@on_each_loop
@pytest.mark.long
@pytest.mark.timeout(180)
async def test_one_of_fifty_runs_is_named_in_fifty_of_fifty_trials() -> None:
    """The same, fifty times."""
    for trial in range(50):
        await _name_one_of_fifty(trial * 7 % 50)


async def _name_one_of_fifty(number: int) -> None:
    culprits: list[TaskRun | None] = []
    started, all_started = iter(range(50)), anyio.Event()

    async def work() -> None:
        mine = next(started)
        if mine == 49:
            all_started.set()
        await all_started.wait()
        if mine == number:
            culprits.append(current_run())
            app.reports.wait(app.reports.hazards)

    app = App(work)
    async with anyio.create_task_group() as group:
        for _ in range(50):
            group.start_soon(drive, app.served)
    assert len(app.events.of(Succeeded)) == 50
    assert [hazard.run for hazard in app.reports.hazards] == culprits


@on_each_loop
async def test_an_app_whose_first_run_starts_on_a_blocked_loop_gets_its_report() -> None:
    """The loop was late before this app was watched: its run is its own, and no other app's."""

    def before() -> None:
        first.reports.wait(first.reports.seconds)

    async def blocks() -> None:
        second.reports.wait(second.reports.hazards)

    first, second = App(fine), App(blocks, before=before)
    await drive(first.served)
    await first.reports.responds()
    await drive(second.served)
    await second.reports.until(second.reports.blocks)
    (found,) = second.reports.hazards
    assert found.run.task.endswith("blocks") and first.reports.hazards == []
    assert {run for run, _ in first.reports.seconds} == {None}
    assert {run for run, _ in second.reports.seconds} == {found.run}


@pytest.mark.parametrize("other", [None, 5.0])
async def test_each_app_has_its_own_threshold(other: float | None) -> None:
    """Two apps share a loop: the one with no threshold, or a longer one, gets no report."""
    blocking, patient = Blocking(), App(fine, block_threshold=other)
    await drive(patient.served)
    await drive(blocking.app.served)
    await patient.reports.responds()
    assert len(blocking.app.reports.blocks) == 1
    assert patient.reports.hazards == patient.reports.blocks == patient.reports.seconds == []


async def test_an_app_never_reports_a_run_of_another_app() -> None:
    """Two apps share a loop: the hazard is in the signals of the app whose run blocks."""
    blocking, other = Blocking(), App(fine)
    await drive(other.served)
    await drive(blocking.app.served)
    await blocking.app.reports.until(blocking.app.reports.blocks)
    await other.reports.responds()
    assert len(blocking.app.reports.hazards) == 1
    assert other.reports.hazards == other.reports.blocks == other.reports.seconds == []


async def test_a_block_by_no_task_is_reported_by_one_app() -> None:
    """Two apps share a loop: the seconds of a blocking endpoint count once."""
    first = App(fine)
    steps = iter([lambda: None, lambda: first.reports.wait(first.reports.seconds)])
    second = App(fine, before=lambda: next(steps)())
    await drive(first.served)
    await drive(second.served)
    await drive(second.served)
    await first.reports.until(first.reports.blocks)
    await second.reports.responds()
    assert [report.run for report in first.reports.blocks] == [None]
    assert second.reports.blocks == second.reports.seconds == []


async def test_a_signal_that_exits_does_not_end_the_watching() -> None:
    """SystemExit is no Exception; the loop is watched again from the next batch on."""
    raised: list[TaskEvent] = []

    def leaves(event: TaskEvent) -> None:
        if isinstance(event, HazardFound) and not raised:
            raised.append(event)
            raise SystemExit

    async def blocks() -> None:
        while not raised:
            time.sleep(0.01)  # noqa: ASYNC251  # on purpose

    async def endpoint(request: Request) -> PlainTextResponse:
        return PlainTextResponse("", background=BackgroundTask(blocks))

    settings = Settings(registry=CollectorRegistry())
    leaving = AftertaskMiddleware(Starlette(routes=[Route("/", endpoint)]), settings=settings, signals=[leaves])
    with anyio.fail_after(10):
        await drive(leaving)
    blocking = Blocking()
    await drive(blocking.app.served)
    assert len(blocking.app.reports.hazards) == 1


async def test_a_refused_thread_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may have no thread left; the next batch tries again."""
    start, refused = threading.Thread.start, list[str]()

    def refuses(thread: threading.Thread) -> None:
        if thread.name == "aftertask-loops" and not refused:
            refused.append(thread.name)
            raise RuntimeError("can't start new thread")
        start(thread)

    await anyio.to_thread.run_sync(_no_thread_is_left)
    monkeypatch.setattr(threading.Thread, "start", refuses)
    app = App(fine)
    await drive(app.served)
    assert refused and app.events.outcomes() == [("fine", "succeeded")]
    await drive(app.served)
    await app.reports.responds()


def _no_thread_is_left() -> None:
    """Wait until the watching thread has noticed that the loops of earlier tests have ended."""
    for thread in threading.enumerate():
        if thread.name == "aftertask-loops":
            thread.join(10)
            assert not thread.is_alive()


async def _serve(app: App) -> None:
    await drive(app.served)
    await app.reports.responds()


def test_a_loop_that_goes_on_in_another_thread_is_watched_there() -> None:
    """Its run is named, though another loop now waits in its old thread."""
    blocking = Blocking()
    loop = asyncio.new_event_loop()
    loop.run_until_complete(_serve(App(fine)))
    thread = threading.Thread(target=loop.run_until_complete, args=(_serve(blocking.app),))

    async def waits() -> None:
        thread.start()
        await asyncio.to_thread(thread.join, 15)

    asyncio.run(waits())
    loop.close()
    assert [hazard.run for hazard in blocking.app.reports.hazards] == blocking.app.events.runs()


def test_no_thread_outlives_the_loops() -> None:
    """Apps with a loop each share one thread, which ends with the last loop."""
    most = 0

    async def counts() -> None:
        nonlocal most
        most = max(most, sum(thread.name == "aftertask-loops" for thread in threading.enumerate()))

    for _ in range(50):
        asyncio.run(drive(App(counts).served))
    assert most == 1
    _no_thread_is_left()


def test_two_loops_of_one_process() -> None:
    """One app on two event loops: a block of the one is no block of the other."""
    both = threading.Barrier(2)

    async def blocks_in_one() -> None:
        await asyncio.to_thread(both.wait, 10)
        if threading.current_thread().name == "bad":
            app.reports.wait(app.reports.hazards)
        else:
            await app.reports.until(app.reports.hazards)

    app = App(blocks_in_one)
    threads = [threading.Thread(target=asyncio.run, args=(_serve(app),), name=name) for name in ("bad", "good")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(15)
    assert len(app.reports.hazards) == len(app.reports.blocks) == 1


def test_a_loop_that_is_not_run_is_not_blocked() -> None:
    """A loop that stops, and is run again later, was not blocked in between."""
    app = App(fine)
    with asyncio.Runner() as runner:
        runner.run(_serve(app))
        time.sleep(SECONDS)
        runner.run(_serve(app))
    assert app.reports.hazards == app.reports.blocks == []


_FORKS = """
import asyncio, os, sys
sys.path.insert(0, {tests!r})
from hazards.test_blocked_loop import Blocking
from kit import drive

blocking = Blocking()
asyncio.run(drive(blocking.app.served))
child = os.fork()
asyncio.run(drive(blocking.app.served))
assert len(blocking.app.reports.hazards) == 2
if not child:
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_is_watched_by_a_thread_of_its_own() -> None:
    """The parent's thread does not exist in the child."""
    tests = os.path.dirname(os.path.dirname(__file__))
    subprocess.run([sys.executable, "-W", "ignore", "-c", _FORKS.format(tests=tests)], check=True, timeout=20)


@pytest.mark.parametrize("value", [0, 0.001, -1, True, "soon"])
def test_an_invalid_threshold_is_refused(value: Any) -> None:
    """The error names the setting and its range."""
    with pytest.raises(ValueError, match=r"Settings\.block_threshold must be at least 0\.01 seconds, or None"):
        Settings(block_threshold=value)


def test_the_threshold_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """`AFTERTASK_BLOCK_THRESHOLD` is a number of seconds, or `none`."""
    monkeypatch.setenv("AFTERTASK_BLOCK_THRESHOLD", "0.5")
    assert Settings.from_env().block_threshold == 0.5
    monkeypatch.setenv("AFTERTASK_BLOCK_THRESHOLD", "none")
    assert Settings.from_env().block_threshold is None
