"""A blocked event loop, caused on purpose: the run that is on it is named; with the line, the span, the numbers."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from aftertask import AftertaskMiddleware, HazardFound, Settings, current_run, task
from aftertask.events import Succeeded
from aftertask.hazards import _blocks, _loop, _watcher
from aftertask.hazards._blocks import Subscriber
from aftertask.hazards._cpu import clock_of_this_thread, is_fine
from aftertask.signals import usual
from aftertask.testing import Recorder
from kit import drive

pytestmark = pytest.mark.anyio

SECONDS = 0.4
LOG_KEYS = {"task", "run_id", "blocked_s", "where", "stack"}


@pytest.fixture(
    params=[("asyncio", {}), ("asyncio", {"use_uvloop": True}), ("trio", {})], ids=["asyncio", "uvloop", "trio"]
)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """On uvloop as well: it has no frame of its own in the stack."""
    return request.param


class App:
    """An app under the middleware: its one endpoint answers and calls `work` after it."""

    def __init__(self, work: Callable[..., Any], *, before: Callable[[], None] | None = None, **settings: Any) -> None:
        self.registry, self.spans, self.events = CollectorRegistry(), InMemorySpanExporter(), Recorder()
        self.logged: list[dict[str, Any]] = []
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.spans))
        chosen = Settings(**{"registry": self.registry, "tracer_provider": provider, **settings})

        async def endpoint(request: Request) -> PlainTextResponse:
            if before is not None:
                before()
            return PlainTextResponse("", background=BackgroundTask(work))

        self.served = Starlette(
            routes=[Route("/", endpoint)],
            middleware=[Middleware(AftertaskMiddleware, settings=chosen, signals=[*usual(chosen), self.events])],
        )

    def found(self) -> list[HazardFound]:
        """The blocked loops that were told of a run."""
        return [event for event in self.events.of(HazardFound) if event.kind == "blocked_loop"]

    def blocked(self, name: str) -> float:
        """Seconds that the metrics blame a task for."""
        return self.registry.get_sample_value("aftertask_event_loop_blocked_seconds_total", {"task": name}) or 0.0


@pytest.fixture(autouse=True)
def logged(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The lines that tell of a blocked loop; each test has its own minute."""
    lines: list[dict[str, Any]] = []
    end = time.monotonic() + 5
    while _watcher._watcher._watches and time.monotonic() < end:
        time.sleep(0.01)  # the loops of the test before are closed, and their watches will see it

    def emit(level: str, event: str, **keys: Any) -> None:
        if event == "loop.blocked":
            lines.append(keys)

    monkeypatch.setattr("aftertask.signals.logs.emit", emit)
    monkeypatch.setattr(_blocks, "_budget", _blocks._Budget())
    return lines


async def until(look: Callable[[], Any]) -> None:
    """Until the watching thread has told; the event loop goes on meanwhile."""
    with anyio.fail_after(10):
        while not look():  # noqa: ASYNC110  # the thread that tells knows nothing of this loop
            await anyio.sleep(0.01)


async def blocks() -> None:
    """Does what no coroutine may."""
    await anyio.sleep(0.01)
    time.sleep(SECONDS)  # noqa: ASYNC251  # on purpose


async def test_the_run_is_named_with_its_line(logged: list[dict[str, Any]]) -> None:
    """In the event, the log, the metrics and on the span."""
    app = App(blocks)
    await drive(app.served)
    await until(lambda: logged)
    (hazard,) = app.found()
    line = f"{__file__}:{blocks.__code__.co_firstlineno + 3} in blocks"
    assert hazard.run is app.events.runs("blocks")[0]
    assert line in hazard.advice and "time.sleep(SECONDS)" in str(hazard.stack)
    assert str(hazard.stack).lstrip().startswith(f'File "{__file__}"')
    (told,) = logged
    assert told["task"].endswith(".blocks") and told["run_id"] == hazard.run.id
    assert told["where"] == line and told["stack"] == hazard.stack
    assert SECONDS - 0.15 < told["blocked_s"] < SECONDS + 0.2  # it is asked up to 0.14 s after the block began
    assert app.blocked(hazard.run.task) == pytest.approx(told["blocked_s"], abs=1e-6)
    (span,) = app.spans.get_finished_spans()
    assert span.attributes is not None and 0.2 < float(str(span.attributes["aftertask.loop_blocked"])) < SECONDS + 0.1
    (event,) = span.events
    assert event.name == "aftertask.hazard" and event.attributes is not None
    assert event.attributes["kind"] == "blocked_loop" and line in str(event.attributes["advice"])
    labels = {"task": hazard.run.task, "kind": "blocked_loop"}
    assert app.registry.get_sample_value("aftertask_hazards_total", labels) == 1
    lag = {
        le: app.registry.get_sample_value("aftertask_event_loop_lag_seconds_bucket", {"le": le})
        for le in ("0.25", "+Inf")
    }
    assert (lag["+Inf"] or 0) - (lag["0.25"] or 0) == 1


async def test_work_that_keeps_the_interpreter_is_found_too() -> None:
    """A regular expression does not let other threads run while it backtracks: it is found when it has ended."""
    import re

    async def backtracks() -> None:
        start = time.perf_counter()
        while time.perf_counter() - start < 1:
            re.match(r"(a+)+$", "a" * 21 + "b")

    app = App(backtracks)
    await drive(app.served)
    await until(app.found)
    assert app.found()[0].run.task.endswith("backtracks")


async def test_a_process_that_is_waited_for_blocks_too() -> None:
    """Python waits for it in a selector, as asyncio's loop does when it has nothing to do."""

    async def waits() -> None:
        await until(lambda: app.registry.get_sample_value("aftertask_event_loop_lag_seconds_count"))  # it was asked
        command = [sys.executable, "-c", f"import time; time.sleep({SECONDS})"]
        subprocess.run(command, capture_output=True, timeout=10, check=True)  # noqa: ASYNC221

    app = App(waits)
    await drive(app.served)
    await until(app.found)
    assert app.found()[0].run.task.endswith("waits") and "subprocess.run" in str(app.found()[0].stack)


@pytest.mark.parametrize(("backend", "options"), [("asyncio", {}), ("asyncio", {"use_uvloop": True}), ("trio", {})])
def test_a_loop_that_waits_is_let_alone(backend: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not woken to say that it is alive, and is known to be on time all the same; now and then it is asked."""
    asked: list[float] = []
    ask = _loop.Watch._ask
    monkeypatch.setattr(_loop.Watch, "_ask", lambda watch, since: (asked.append(since), ask(watch, since))[1])
    monkeypatch.setattr(_loop, "ASK_EVERY", 1.0)

    async def fine() -> None:
        pass

    def on_time() -> float:
        return app.registry.get_sample_value("aftertask_event_loop_lag_seconds_count") or 0.0

    async def waits() -> tuple[int, float]:
        await drive(app.served)
        await until(on_time)
        before, count = on_time(), len(asked)
        await anyio.sleep(3.1)
        return len(asked) - count, on_time() - before

    app = App(fine)
    times, seen = anyio.run(waits, backend=backend, backend_options=options)
    assert 2 <= times <= 8  # a look in which the machine was late asks as well
    assert seen >= 14  # of about 22


async def test_what_has_no_frame_is_found_when_the_loop_is_asked(
    anyio_backend_name: str, logged: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A function of C that uvloop calls looks from outside like a loop that waits."""
    if anyio_backend_name != "asyncio":
        pytest.skip("asyncio's loops only")
    monkeypatch.setattr(_loop, "ASK_EVERY", 0.2)

    async def fine() -> None:
        pass

    app = App(fine)
    await drive(app.served)
    await until(lambda: app.registry.get_sample_value("aftertask_event_loop_lag_seconds_count"))
    asyncio.get_running_loop().call_soon(time.sleep, 1.2)
    await until(lambda: logged)
    assert logged[0]["task"] == "__none__" and 0.25 <= logged[0]["blocked_s"] <= 1.3
    assert not app.found()


class _Run:
    """What a block needs of a run."""

    task, blocked_s = "a task", 0.0


class _Placed:
    """A run on a thread, as a look finds it."""

    debugged = False

    def __init__(self, run: _Run) -> None:
        self.run = run
        self.stack = lambda redact: "stack"
        self.where = lambda: "where"


class ByHand:
    """A watch of this loop that nobody looks after, so it never answers; and whose thread's clock is turned."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.told: list[tuple[object, ...]] = []
        self.burnt = self.now = 0.0
        ours = Subscriber(0.25, [self], self._note, lambda limiter: None, str, self._note)
        self.watch = _loop.Watch(_watcher.this_loop()[1], ours)
        self.watch.clock = lambda: self.burnt
        monkeypatch.setattr(_loop, "rests", lambda thread, caller: True)
        monkeypatch.setattr(_loop, "monotonic", lambda: self.now)

    def look(self, now: float, overslept: float) -> float:
        """Look at this time."""
        self.now = now
        return self.watch.look(now, overslept)

    def _note(self, *what: object) -> None:
        self.told.append(what)

    def __getattr__(self, name: str) -> Any:
        return lambda *what: self.told.append((name, *what))


async def test_a_loop_that_was_asked_and_uses_no_processor_time_is_not_taken_to_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It looks as if it waited, but a loop that waits would have answered."""
    hand = ByHand(monkeypatch)
    for now in (100.0, 100.1, 100.25):
        assert hand.look(now, 0.0) > now
    assert hand.watch.asked == 100.0
    ((name, run, seconds),) = hand.told
    assert name == "blocked_for" and run is None and seconds == pytest.approx(0.25)


async def test_a_loop_that_waits_is_asked_where_the_watching_thread_was_kept_from_waking(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who waits for the interpreter looks as if he waited for something to happen."""
    hand = ByHand(monkeypatch)
    hand.watch.ask_at = 200.0
    for now, overslept in ((100.0, 0.0), (100.1, 0.002)):
        hand.look(now, overslept)
        hand.burnt += 0.01
    assert hand.watch.asked is None
    hand.look(100.2, 0.01)
    assert hand.watch.asked == 100.2


async def test_a_short_step_is_not_blamed_for_what_others_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds are a run's when it was there for a while; until then they are nobody's."""
    hand, (short, long) = ByHand(monkeypatch), (_Run(), _Run())
    on_it: list[_Run] = [short, short, long, long]
    monkeypatch.setattr(_loop, "place_of", lambda thread, loop: _Placed(on_it.pop(0)))
    for now in (100.0, 100.05, 100.25, 100.33, 100.41):
        hand.look(now, 0.0)
    blamed: dict[Any, float] = {}
    for _, run, seconds in (told for told in hand.told if told[0] == "blocked_for"):
        blamed[run] = blamed.get(run, 0.0) + seconds
    assert blamed == {short: pytest.approx(0.25), long: pytest.approx(0.16)}

    hand, on_it = ByHand(monkeypatch), [short, _Run(), _Run(), _Run()]
    for now in (100.0, 100.05, 100.25, 100.33, 100.41):
        hand.look(now, 0.0)
    hand.now = 100.43
    hand.watch._answer()
    hand.look(100.45, 0.0)
    assert [told[1:] for told in hand.told if told[0] == "blocked_for"] == [
        (None, pytest.approx(seconds)) for seconds in (0.25, 0.08, 0.1)
    ]


async def test_a_loop_that_sleeps_is_let_sleep_until_it_does_something(monkeypatch: pytest.MonkeyPatch) -> None:
    """While its thread uses no processor time nobody looks at its frames; as soon as it does, somebody does."""
    hand, rested = ByHand(monkeypatch), []
    monkeypatch.setattr(_loop, "rests", lambda thread, caller: not rested.append(hand.now) and hand.burnt < 0.1)
    wakes = iter([0, 0, 0, 0.001, 0, 0.3])  # seconds that it uses meanwhile

    def sleep(seconds: float) -> None:
        hand.now += seconds
        used = next(wakes)
        hand.burnt += used
        hand.now += used  # it keeps the interpreter to itself

    monkeypatch.setattr(_loop, "sleep", sleep)
    hand.watch.ask_at, hand.watch.alone, hand.watch._fine = 200.0, True, True
    hand.watch._every = 0.125
    hand.watch._asleep = None
    assert hand.look(100.0, 0.0) > hand.now
    assert rested == [100.0, 100.5 + 0.001, hand.now]
    assert hand.watch.asked == pytest.approx(hand.now - 0.3)  # it was busy for longer than the threshold


async def test_one_that_sleeps_on_is_woken_by_another_loop_and_by_its_threads_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or the other one would not be looked at for ten seconds."""
    hand = ByHand(monkeypatch)
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        hand.watch.alone = len(slept) < 3

    monkeypatch.setattr(_loop, "sleep", sleep)
    hand.watch.ask_at, hand.watch.alone = 200.0, True
    hand.look(100.0, 0.0)
    assert len(slept) == 3 and hand.watch.asked is None

    def ended() -> float:
        raise OSError

    hand.watch.clock, hand.watch.alone = ended, True
    hand.look(100.0, 0.0)
    assert len(slept) == 3 and hand.watch.clock is time.process_time


def test_a_clock_that_goes_by_ticks_does_not_tell_who_sleeps() -> None:
    """Between two ticks it stands still, whatever a thread does."""
    ticks = iter(range(1_000_000))
    assert is_fine(clock_of_this_thread()) or sys.platform == "win32"
    assert is_fine(lambda: next(ticks))
    assert not is_fine(lambda: 0.015)


async def test_a_loop_that_nobody_runs_any_more_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that is neither closed nor run again would be held for ever."""
    hand = ByHand(monkeypatch)
    loop = asyncio.new_event_loop()
    hand.watch.loop = loop
    hand.look(100.0, 0.0)
    hand.look(100.0 + _loop.FORGET_AFTER, 0.0)
    assert not hand.watch.ended
    hand.look(100.1 + _loop.FORGET_AFTER, 0.0)
    assert hand.watch.ended and hand.watch.loop is None
    loop.close()


async def test_an_endpoint_that_blocks_is_no_tasks_fault(logged: list[dict[str, Any]]) -> None:
    """It is told with its stack, under the name of no task."""

    async def fine() -> None:
        pass

    def endpoint_blocks() -> None:
        time.sleep(2 * SECONDS)

    app = App(fine, before=endpoint_blocks)
    await drive(app.served)  # the loop is watched from the first batch on, or the start of the app
    await drive(app.served)
    await until(lambda: logged)
    assert not app.found()
    assert logged[0]["task"] == "__none__" and "in test_an_endpoint_that_blocks" in logged[0]["where"]
    assert "endpoint_blocks" in logged[0]["stack"] and "time.sleep(2 * SECONDS)" in logged[0]["stack"]
    assert app.blocked("__none__") == pytest.approx(logged[0]["blocked_s"], abs=1e-6)


async def test_a_run_under_a_policy_is_named(logged: list[dict[str, Any]]) -> None:
    """With a time limit and another attempt its caller is another function of ours."""

    @task(name="limited", timeout=5, retry=None)
    async def limited() -> None:
        await blocks()

    app = App(limited)
    await drive(app.served)
    await until(app.found)
    assert app.found()[0].run.task == "limited"


@pytest.mark.skipif(sys.version_info < (3, 12), reason="a task does not tell its context before Python 3.12")
async def test_a_task_that_the_run_has_started_counts_as_the_run() -> None:
    """asyncio.gather and nurseries run their children beside it: their context says where they come from."""
    await _child_blocks()


async def test_a_child_task_counts_as_the_run_on_the_standard_loops(anyio_backend: Any) -> None:
    """There the loop's own frame holds the context, on every Python."""
    if anyio_backend[1]:
        pytest.skip("uvloop has no frames")
    await _child_blocks()


async def test_a_loop_whose_handles_another_library_wraps_is_read_as_before(
    anyio_backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Profilers put a function of their own around each callback of asyncio's."""
    if anyio_backend[0] != "asyncio" or anyio_backend[1]:
        pytest.skip("asyncio's own loop only")
    run, times = asyncio.Handle._run, 0

    def timed(handle: asyncio.Handle) -> None:
        nonlocal times
        times += 1
        run(handle)

    monkeypatch.setattr(asyncio.Handle, "_run", timed)
    await _child_blocks()
    assert times


async def _child_blocks() -> None:
    async def parent() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(blocks)

    app = App(parent)
    await drive(app.served)
    await until(app.found)
    assert app.found()[0].run.task.endswith("parent")


async def test_a_task_is_told_in_full_once_a_minute_and_counted_each_time(logged: list[dict[str, Any]]) -> None:
    """The log has one line, the metrics both."""
    app = App(blocks)
    for _ in range(2):
        await drive(app.served)
        await until(lambda before=len(app.found()): len(app.found()) >= max(1, before))
        await anyio.sleep(0.1)
    await until(lambda: len(app.found()) == 2)
    assert len(logged) == 1
    assert app.blocked(app.found()[0].run.task) > 2 * (SECONDS - 0.15)


async def test_a_loop_that_stays_blocked_is_told_while_it_is(
    logged: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deadlock would never be told otherwise."""
    monkeypatch.setattr(_blocks, "STILL_BLOCKED", 0.3)
    seen = threading.Event()

    async def stays() -> None:
        limit = time.monotonic() + 10
        while not logged and time.monotonic() < limit:
            time.sleep(0.01)  # noqa: ASYNC251  # on purpose
        seen.set()

    app = App(stays)
    await drive(app.served)
    assert seen.is_set()
    assert logged[0]["still_blocked"] is True and 0.3 <= logged[0]["blocked_s"] < 5
    await until(lambda: len(logged) == 2)
    assert logged[1]["still_blocked"] is None and logged[1]["blocked_s"] > logged[0]["blocked_s"]


async def test_none_looks_for_no_blocked_loop_and_still_measures_lag(logged: list[dict[str, Any]]) -> None:
    """`block_threshold=None`."""
    app = App(blocks, block_threshold=None)
    await drive(app.served)
    await until(lambda: app.registry.get_sample_value("aftertask_event_loop_lag_seconds_count"))
    assert not app.found() and not logged


async def test_a_debugger_is_no_hazard(logged: list[dict[str, Any]]) -> None:
    """Whoever looks at a stopped program knows that it stands still."""
    import types

    pdb = types.ModuleType("bdb")
    exec("import time\ndef interaction(seconds):\n    time.sleep(seconds)", pdb.__dict__)

    async def stopped() -> None:
        await anyio.sleep(0.01)
        pdb.interaction(SECONDS)

    app = App(stopped)
    await drive(app.served)
    await anyio.sleep(0.2)  # longer than the watching thread needs to tell
    assert not app.found() and not logged


async def test_many_short_steps_are_nobodys_fault(logged: list[dict[str, Any]]) -> None:
    """A loop that is overloaded is late, and no single run is blamed by a hazard."""

    async def short() -> None:
        for _ in range(2):
            end = time.perf_counter() + 0.005
            while time.perf_counter() < end:
                pass
            await anyio.lowlevel.checkpoint()

    app = App(short)
    async with anyio.create_task_group() as group:
        for _ in range(200):
            group.start_soon(drive, app.served)
    assert len(app.events.of(Succeeded)) == 200
    await until(lambda: app.blocked("__none__"))  # the loop answered late, which is counted under no task
    assert not app.found() and not app.blocked(app.events.runs()[0].task)


@pytest.mark.long
@pytest.mark.timeout(180)
async def test_one_of_fifty_runs_is_named_in_fifty_of_fifty_trials(logged: list[dict[str, Any]]) -> None:
    """All run at once, awaiting; one of them blocks for 0.4 s."""
    await _trials(50)


async def test_one_of_fifty_runs_is_named(logged: list[dict[str, Any]]) -> None:
    """The same, three times."""
    await _trials(3)


async def _trials(count: int) -> None:
    named = 0
    for trial in range(count):
        started, culprits = 0, list[object]()

        async def work(number: int = trial, culprits: list[object] = culprits) -> None:
            nonlocal started
            started, mine = started + 1, started
            while started < 50:  # noqa: ASYNC110  # fifty of them wait for each other
                await anyio.sleep(0.005)
            if mine == (number * 7) % 50:
                culprits.append(current_run())
                time.sleep(SECONDS)  # noqa: ASYNC251  # on purpose
            await anyio.sleep(0.01)

        app = App(work)
        async with anyio.create_task_group() as group:
            for _ in range(50):
                group.start_soon(drive, app.served)
        await until(app.found)
        assert len(app.events.of(Succeeded)) == 50
        named += [event.run for event in app.found()] == culprits
    assert named == count


async def test_a_look_that_fails_is_told_and_the_loop_is_watched_again_from_the_next_batch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The thread goes on: it looks after all loops of the process."""

    def broken(watch: _loop.Watch, now: float, overslept: float) -> float:
        raise RuntimeError("cannot look")

    app = App(blocks)
    with monkeypatch.context() as patched:
        patched.setattr(_loop.Watch, "look", broken)
        await drive(app.served)
        await until(lambda: not _watcher._watcher._watches)
    count = app.registry.get_sample_value("aftertask_self_errors_total", {"component": "aftertask.hazards"})
    assert count == 1 and not app.found()
    await drive(app.served)
    await until(app.found)


@pytest.mark.parametrize("other", [None, 5.0])
async def test_each_app_is_told_by_its_own_threshold(other: float | None) -> None:
    """Two apps share a loop: the one that looks for no blocks, or for longer ones, is told of none."""
    app = App(blocks)
    patient = App(blocks, block_threshold=other)
    await drive(patient.served)
    await drive(app.served)
    await anyio.sleep(0.3)  # from the next look on the loop is looked at as often as the least threshold wants it
    await drive(app.served)
    await drive(patient.served)
    await until(app.found)
    await until(lambda: app.blocked(app.found()[0].run.task) > 0)
    assert not patient.found()
    assert patient.blocked(app.found()[0].run.task) == patient.blocked("__none__") == 0


async def test_a_listener_that_ends_its_thread_ends_no_watching() -> None:
    """SystemExit, or a cancellation: no Exception, and no reason to look after no loop any more."""

    class Leaves:
        """Tells the interpreter to end."""

        def __call__(self, event: Any) -> None:
            if isinstance(event, HazardFound):
                raise SystemExit

    app, other = App(blocks), App(blocks)
    chosen = Settings(registry=CollectorRegistry())
    leaving = AftertaskMiddleware(
        Starlette(routes=app.served.routes), settings=chosen, signals=[*usual(chosen), Leaves()]
    )
    await drive(leaving)
    await drive(other.served)
    await drive(other.served)
    await until(other.found)


async def test_a_thread_that_is_refused_is_asked_for_again(
    monkeypatch: pytest.MonkeyPatch, logged: list[dict[str, Any]]
) -> None:
    """With the next batch; and no loop is kept meanwhile."""
    monkeypatch.setattr(_watcher, "_watcher", _watcher._Watcher())
    start, refused = threading.Thread.start, list[str]()

    def refuses(thread: threading.Thread) -> None:
        if thread.name == "aftertask-loops" and not refused:
            refused.append(thread.name)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuses)
    app = App(blocks)
    await drive(app.served)
    assert refused and not _watcher._watcher._watches
    await drive(app.served)
    await until(app.found)
    await until(lambda: logged)  # or it would be told in the next test: this watcher is the test's own


def test_a_loop_that_goes_on_in_another_thread_is_watched_there() -> None:
    """Also while another loop waits in the thread that it was run in before."""

    async def fine() -> None:
        pass

    async def later() -> None:
        await anyio.sleep(0.3)
        await blocks()

    before, app = App(fine), App(later)
    moves = asyncio.new_event_loop()

    async def first() -> None:
        await drive(before.served)
        await asyncio.sleep(0.4)

    moves.run_until_complete(first())
    time.sleep(0.3)  # somebody sees that nobody runs it
    thread = threading.Thread(target=moves.run_until_complete, args=(_and_wait(app),))
    thread.start()

    async def waits() -> None:
        await asyncio.sleep(1.2)

    asyncio.run(waits())
    thread.join(10)
    moves.close()
    assert [event.run.task for event in app.found()] == [app.events.runs()[0].task]


async def _and_wait(app: App) -> None:
    await drive(app.served)
    await asyncio.sleep(0.3)


def test_no_thread_outlives_the_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand apps, each with a loop of its own: one thread, and none when they are gone."""
    monkeypatch.setattr(_watcher, "LINGER", 0.01)
    most = 0

    async def fine() -> None:
        nonlocal most
        most = max(most, sum(thread.name == "aftertask-loops" for thread in threading.enumerate()))

    for _ in range(200):
        app = App(fine)
        asyncio.run(_drive(app))
    assert most == 1
    end = time.monotonic() + 5
    while any(thread.name == "aftertask-loops" for thread in threading.enumerate()):
        assert time.monotonic() < end, threading.enumerate()
        time.sleep(0.01)
    assert not _watcher._watcher._watches


async def _drive(app: App) -> None:
    await drive(app.served)


def test_two_loops_of_one_process(logged: list[dict[str, Any]]) -> None:
    """One app on two event loops in two threads: the one that blocks is told, the other one goes on."""
    ready = threading.Barrier(2)

    async def blocks_here() -> None:
        await asyncio.to_thread(ready.wait, 10)
        if threading.current_thread().name == "bad":
            time.sleep(SECONDS)  # noqa: ASYNC251  # on purpose
        else:
            await asyncio.sleep(SECONDS)

    app = App(blocks_here)

    async def twice() -> None:
        await drive(app.served)
        await asyncio.sleep(0.2)

    threads = [threading.Thread(target=asyncio.run, args=(twice(),), name=name) for name in ("bad", "good")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(app.found()) == 1 == len(logged)


def test_a_loop_that_is_run_again_was_not_blocked_meanwhile(logged: list[dict[str, Any]]) -> None:
    """Nobody waits for a loop that nobody runs."""

    async def fine() -> None:
        pass

    app = App(fine)
    with asyncio.Runner() as runner:
        runner.run(_drive(app))
        time.sleep(1)
        runner.run(_drive(app))
        runner.run(asyncio.sleep(0.2))
    assert not app.found() and not logged


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_fork_is_watched_by_a_thread_of_its_own() -> None:
    """The parent's thread is not there any more."""
    app = App(blocks)
    asyncio.run(_drive(app))
    before = len(app.found())
    child = os.fork()
    if not child:
        code = 1
        try:
            asyncio.run(_drive(app))
            code = 0 if len(app.found()) == before + 1 else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("value", [0, 0.001, -1, True, "soon"])
def test_a_threshold_that_makes_no_sense_is_refused(value: Any) -> None:
    """With its value and what it may be."""
    with pytest.raises(ValueError, match=r"Settings\.block_threshold must be at least 0\.01 seconds, or None"):
        Settings(block_threshold=value)


def test_the_threshold_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number, or none."""
    monkeypatch.setenv("AFTERTASK_BLOCK_THRESHOLD", "0.5")
    assert Settings.from_env().block_threshold == 0.5
    monkeypatch.setenv("AFTERTASK_BLOCK_THRESHOLD", "none")
    assert Settings.from_env().block_threshold is None
