"""Concurrency limits: never exceeded, fair, by priority, and with a bounded queue."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from fastapi import BackgroundTasks as Injected
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from starlette.background import BackgroundTask, BackgroundTasks

from aftertask import (
    Abandoned,
    AbandonedEnded,
    AftertaskMiddleware,
    Cancelled,
    Limit,
    Policy,
    QueueFull,
    Rejected,
    Scheduled,
    Settings,
    Started,
    Succeeded,
    options,
    task,
)
from aftertask._gates import Gate, Place
from aftertask.signals import Metrics
from aftertask.testing import Recorder
from intercept.driver import LOG, Env, answering, drive

pytestmark = pytest.mark.anyio


class Crowd:
    """A task that waits until it is let go, and counts how many of its runs are at it at once."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self.go = anyio.Event()

    async def __call__(self) -> None:
        """Be there for a while."""
        self.now += 1
        self.most = max(self.most, self.now)
        await self.go.wait()
        await anyio.lowlevel.checkpoint()
        self.now -= 1


async def started(env: Env, count: int) -> None:
    """Until so many runs have started."""
    await env.seen.until(Started, count)


async def test_never_exceeded_under_500_requests(env: Env) -> None:
    """500 requests at once, a limit of 7: all run, never more than 7."""
    crowd = Crowd()
    crowd.go.set()
    app = env.app(answering(BackgroundTask(options(crowd, limit=7))))
    async with anyio.create_task_group() as group:
        for _ in range(500):
            group.start_soon(drive, app)
    assert crowd.most == 7
    assert len(env.seen.of(Succeeded)) == 500
    gate: Any = env.seen.runs()[0].plan.gate
    assert (gate.in_use, gate.waiting, gate._accepted) == (0, 0, 0)


async def test_a_limit_is_shared_by_the_tasks_that_name_it(env: Env) -> None:
    """Of whatever app."""
    smtp = Limit("smtp", 2)
    crowd = Crowd()

    async def other() -> None:
        await crowd()

    apps = [env.app(answering(BackgroundTask(options(func, limit=smtp)))) for func in (crowd, other, crowd)]
    async with anyio.create_task_group() as group:
        for app in apps:
            group.start_soon(drive, app)
        await started(env, 2)
        gate: Any = env.seen.runs()[0].plan.gate
        with anyio.fail_after(10):
            while gate.waiting < 1:  # there is no event of a run that waits
                await anyio.lowlevel.checkpoint()
        assert (crowd.now, gate.in_use) == (2, 2)
        crowd.go.set()
    assert crowd.most == 2
    assert len(env.seen.of(Succeeded)) == 3


async def test_who_waits_for_a_limit_goes_by_priority() -> None:
    """Smaller first; equals in the order in which they came."""
    gate = Gate("smtp", 1)
    order: list[tuple[int, int]] = []

    async def come(priority: int, number: int) -> None:
        place = gate.accept(priority)
        assert place is not None
        await place.enter()
        order.append((priority, number))
        place.give_back()

    first = gate.accept(0)
    assert first is not None
    await first.enter()
    async with anyio.create_task_group() as group:
        for number, priority in enumerate([5, 0, 5, -1, 0]):
            group.start_soon(come, priority, number)
            while gate.waiting <= number:  # no event tells that somebody waits
                await anyio.lowlevel.checkpoint()
        first.give_back()
    assert order == [(-1, 3), (0, 1), (0, 4), (5, 0), (5, 2)]


def app_with(recorder: Recorder, crowd: Any, **more: Any) -> FastAPI:
    """An app whose handler answers 503 when a task is refused."""
    app = FastAPI()

    @app.get("/")
    async def endpoint(tasks: Injected) -> Any:
        try:
            tasks.add_task(crowd)
        except QueueFull as full:
            return JSONResponse({"detail": str(full)}, 503)
        return {"tasks": len(tasks.tasks)}

    chosen = Settings(metrics_path=None, registry=CollectorRegistry(), **more)
    app.add_middleware(AftertaskMiddleware, settings=chosen, signals=[recorder])
    return app


@pytest.mark.parametrize("where", ["settings", "limit"])
async def test_a_full_queue_is_told_to_the_handler(where: str) -> None:
    """One runs, two wait; the fourth is refused, its handler answers 503, and the container is as before."""
    recorder, crowd = Recorder(), Crowd()

    async def work() -> None:
        await crowd()

    name = f"{work.__module__}.{work.__qualname__}"
    more: dict[str, Any] = (
        {"max_waiting": 2, "policies": {name: Policy(limit=1)}}
        if where == "settings"
        else {"policies": {name: Policy(limit=Limit("crowd", 1, max_waiting=2))}}
    )
    app = app_with(recorder, work, **more)
    statuses: list[int | None] = []

    async def request() -> None:
        statuses.append((await drive(app)).status)

    async with anyio.create_task_group() as group:
        for number in range(1, 4):
            group.start_soon(request)
            await recorder.until(Scheduled, number)
        refused = await drive(app)
        assert refused.status == 503
        assert b"accepts no more runs for now" in refused.body
        crowd.go.set()
    assert statuses == [200, 200, 200]
    assert [event.reason for event in recorder.of(Rejected)] == ["queue_full"]
    assert recorder.of(Rejected)[0].bad
    assert len(recorder.of(Succeeded)) == 3
    accepted = await drive(app)
    assert accepted.body == b'{"tasks":1}'


async def test_at_hand_over_a_full_queue_is_told_rejected(env: Env, capsys: pytest.CaptureFixture[str]) -> None:
    """A task that came with its response cannot be refused to anybody: told, logged, and not run; siblings are."""
    crowd = Crowd()

    async def sibling() -> None:
        LOG.append("sibling")

    async def work() -> None:
        await crowd()

    func = options(work, limit=Limit("one", 1, max_waiting=0))
    plain = env.app(answering(BackgroundTask(func)))
    full = env.app(answering(BackgroundTasks([BackgroundTask(func), BackgroundTask(sibling)])))
    async with anyio.create_task_group() as group:
        group.start_soon(drive, plain)
        await started(env, 1)
        result = await drive(full)
        crowd.go.set()
    assert result.status == 200
    assert result.exc is None
    assert LOG == ["sibling"]
    assert [event.reason for event in env.seen.of(Rejected)] == ["queue_full"]


async def test_cancelled_while_it_waits(env: Env) -> None:
    """Its place is given up: who came later gets it."""
    crowd = Crowd()
    app = env.app(answering(BackgroundTask(options(crowd, limit=1))))
    async with anyio.create_task_group() as group:
        group.start_soon(drive, app)
        await started(env, 1)
        gate: Any = env.seen.runs()[0].plan.gate
        async with anyio.create_task_group() as inner:
            inner.start_soon(drive, app)
            with anyio.fail_after(10):
                while not gate.waiting:  # there is no event of a run that waits
                    await anyio.lowlevel.checkpoint()
            inner.cancel_scope.cancel()
        assert (gate.in_use, gate.waiting) == (1, 0)
        crowd.go.set()
    assert [event.attempt for event in env.seen.of(Cancelled)] == [0]
    assert (gate.in_use, gate._accepted) == (0, 0)


async def test_a_dropped_run_gives_its_place_back() -> None:
    """A handler that raises after `add_task`."""
    recorder = Recorder()

    @task(limit=1)
    async def never() -> None: ...

    app = FastAPI()

    @app.get("/")
    async def endpoint(tasks: Injected) -> None:
        tasks.add_task(never)
        raise ValueError

    chosen = Settings(metrics_path=None, registry=CollectorRegistry())
    app.add_middleware(AftertaskMiddleware, settings=chosen, signals=[recorder])
    await drive(app)
    gate: Any = recorder.runs()[0].plan.gate
    assert gate._accepted == 0


async def test_a_limits_numbers_are_told(env: Env) -> None:
    """From the start, by the limiter's name, and of a pool of threads by the pool's."""
    registry, crowd = CollectorRegistry(), Crowd()

    @task(limit=Limit("smtp", 2))
    async def mail() -> None:
        await crowd()

    env.settings["registry"] = registry
    app = env.app_with_signals([Metrics(registry), env.seen], answering(BackgroundTask(mail)))
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(drive, app)
        await started(env, 2)
        told = {
            name: registry.get_sample_value(f"aftertask_concurrency_{name}", {"limiter": "smtp"})
            for name in ("limit", "in_use", "waiting")
        }
        assert (told["limit"], told["in_use"]) == (2, 2)
        assert registry.get_sample_value("aftertask_threadpool_limit", {"pool": "default"}) == 40
        crowd.go.set()
    assert registry.get_sample_value("aftertask_concurrency_in_use", {"limiter": "smtp"}) == 0
    assert registry.get_sample_value("aftertask_concurrency_waiting", {"limiter": "smtp"}) == 0


class Reference:
    """What a gate must do, written in the plainest way: who is in, and who waits in which order."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.inside: set[int] = set()
        self.queue: list[tuple[int, int, int]] = []
        self.arrivals = 0

    def enter(self, who: int, priority: int) -> None:
        """Come."""
        if len(self.inside) < self.size:
            self.inside.add(who)
        else:
            self.arrivals += 1
            heapq.heappush(self.queue, (priority, self.arrivals, who))

    def leave(self, who: int) -> None:
        """Go, from wherever one is."""
        if who in self.inside:
            self.inside.remove(who)
            if self.queue:
                self.inside.add(heapq.heappop(self.queue)[2])
        else:
            self.queue = [entry for entry in self.queue if entry[2] != who]
            heapq.heapify(self.queue)


class Wakeless(Place):
    """A place whose owner is no task: it only notes that it was woken."""

    __slots__ = ()

    def wake(self) -> bool:
        """Woken."""
        return True


Step = tuple[str, int, int]
STEPS = st.lists(
    st.tuples(st.sampled_from(["enter", "come_out", "give_back"]), st.integers(0, 7), st.integers(-2, 2)), max_size=80
)


@given(size=st.integers(1, 4), steps=STEPS)
@settings(max_examples=300, deadline=None)
def test_no_slot_is_lost_or_given_twice(size: int, steps: list[Step]) -> None:
    """Under any order of starts, ends, cancellations and time-outs the gate does as the plainest one would."""
    gate, plain = Gate("x", size), Reference(size)
    places: dict[int, Wakeless] = {}
    for kind, who, priority in steps:
        place = places.get(who)
        if kind == "enter":
            if place is None:
                place = places[who] = Wakeless(gate, priority, accepted=True)
                gate._accepted += 1
            if place.inside or place.entry is not None:
                continue
            gate._enter(place, queue=True)
            plain.enter(who, place.priority)
        elif place is not None:
            if place.inside or place.entry is not None:
                plain.leave(who)
            place.come_out() if kind == "come_out" else place.give_back()
            if kind == "give_back":
                place.give_back()  # a second time changes nothing
                del places[who]
        inside = {number for number, each in places.items() if each.inside}
        assert inside == plain.inside
        assert gate.in_use == len(inside) <= size
        assert gate.waiting == len(plain.queue)
        assert gate._accepted == len(places)
        assert len(gate._queue) <= 2 * gate.waiting + 1


def test_the_collector_may_end_a_run_while_the_gate_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs in whatever thread allocates, also inside the gate: what it gives back there is let out all the same."""
    gate = Gate("x", 1)
    first, garbage, waiter = (Wakeless(gate, 0, accepted=True) for _ in range(3))
    gate._accepted = 3
    assert first.enter_now()
    push = heapq.heappush

    def collecting(queue: Any, entry: Any) -> None:
        first.give_back()
        garbage.give_back()
        push(queue, entry)

    def in_a_thread() -> None:
        with monkeypatch.context() as patched:
            patched.setattr("aftertask._gates.heapq.heappush", collecting)
            entered.append(gate._enter(waiter, queue=True))

    entered: list[bool] = []
    thread = threading.Thread(target=in_a_thread, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive(), "the gate waits for itself"
    assert entered == [True]
    assert (gate.in_use, gate.waiting, gate._accepted) == (1, 0, 1)


def test_a_waiter_whose_loop_was_closed_is_passed_over() -> None:
    """In the same thread, too: who leaves after that does not fail, and the next one gets the slot."""
    gate = Gate("x", 1)
    first, second, third = gate.accept(0), gate.accept(0), gate.accept(0)
    assert first is not None
    assert second is not None
    assert third is not None
    closed = asyncio.new_event_loop()

    async def begin() -> Any:
        await first.enter()
        waiting = asyncio.ensure_future(second.enter())
        await anyio.wait_all_tasks_blocked()
        return waiting

    waiting = closed.run_until_complete(begin())
    closed.close()

    async def go_on() -> None:
        entering = asyncio.ensure_future(third.enter())
        await anyio.wait_all_tasks_blocked()
        first.give_back()
        await asyncio.wait_for(entering, 5)

    asyncio.run(go_on())
    assert third.inside
    assert gate.in_use == 1
    waiting._log_destroy_pending = False  # it can never end: its loop is gone


def test_two_threads_that_are_first_find_one_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sync endpoints schedule a task's first run in threads: with two gates the limit would be exceeded."""
    smtp = Limit("smtp", 2)
    engine: Any = Env().mw(None)._engine
    plans, together = engine.plans, threading.Barrier(2, timeout=10)
    make = Gate

    def slow(*args: Any) -> Gate:
        with contextlib.suppress(threading.BrokenBarrierError):
            together.wait(0.2)  # both are here at once, if both can be
        return make(*args)

    monkeypatch.setattr("aftertask._plans.Gate", slow)
    for limit in (2, smtp):
        together.reset()
        target = BackgroundTask(options(print, limit=limit))
        with ThreadPoolExecutor(2) as pool:
            found = [pool.submit(plans.of, target) for _ in range(2)]
            assert found[0].result(10).gate is found[1].result(10).gate


async def test_a_limit_is_not_the_one_of_a_task_by_its_name(env: Env) -> None:
    """A task may be called like a `Limit` of others, and have a number of its own."""

    async def other() -> None: ...

    async def own() -> None: ...

    app = env.app(answering(BackgroundTask(options(other, limit=Limit("smtp", 1)))), answering(BackgroundTask(own)))
    await drive(app)
    task(name="smtp", limit=1)(own)
    await drive(app, "/1")
    gates: list[Any] = [run.plan.gate for run in env.seen.runs()]
    assert [gate.name for gate in gates] == ["smtp", "smtp"]
    assert gates[0] is not gates[1]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_cancelled_thread_keeps_its_slot(env: Env) -> None:
    """A server cancels asyncio's task, which nothing can shield a thread from: the next one waits for its end."""
    begun, may_end = threading.Event(), threading.Event()

    def work() -> None:
        LOG.append("begins")
        begun.set()
        assert may_end.wait(10)
        LOG.append("ends")

    app = env.app(answering(BackgroundTask(options(work, limit=1))))
    first = asyncio.ensure_future(drive(app))
    await anyio.to_thread.run_sync(begun.wait, 10)
    first.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await first
    second = asyncio.ensure_future(drive(app))
    await anyio.wait_all_tasks_blocked()
    assert LOG == ["begins"]
    may_end.set()
    await second
    assert LOG == ["begins", "ends", "begins", "ends"]
    assert len(env.seen.of(Cancelled)) == len(env.seen.of(Succeeded)) == len(env.seen.of(AbandonedEnded)) == 1


async def test_a_thread_is_waited_for_where_a_scope_is_cancelled(env: Env) -> None:
    """A limit alone changes nothing about that."""
    begun, may_end = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        assert may_end.wait(10)
        LOG.append("ends")

    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:
            group.start_soon(drive, env.app(answering(BackgroundTask(options(work, limit=1)))))
            await anyio.to_thread.run_sync(begun.wait, 10)
            scope.cancel()
            may_end.set()
    assert LOG == ["ends"]
    assert not env.seen.of(Abandoned)
