"""The limiter behind `limit=`: never exceeded, fair, by priority, and safe from any thread."""

from __future__ import annotations

import asyncio
import gc
import heapq
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aftertask._core.limits import Limiter, SharedThreads, SharedThreadSlot, Slot
from kit import until

pytestmark = pytest.mark.anyio


def reserved(limiter: Limiter, priority: int = 0) -> Slot:
    """A slot of a limiter whose queue is never full."""
    slot = limiter.reserve(priority, None)
    assert slot is not None
    return slot


def held(limiter: Limiter, priority: int = 0) -> Slot:
    """A slot that is acquired."""
    slot = reserved(limiter, priority)
    assert slot.acquire_nowait()
    return slot


# --- order


async def test_waiting_runs_continue_by_priority_then_arrival() -> None:
    """The smallest number goes first; among equals, the first to arrive."""
    limiter, order = Limiter("x", 1), list[str]()
    first = held(limiter)

    async def wait(name: str, priority: int) -> None:
        slot = reserved(limiter, priority)
        await slot.acquire()
        order.append(name)
        slot.close()

    async with anyio.create_task_group() as group:
        for number, (name, priority) in enumerate([("b", 0), ("c", 0), ("d", 5), ("a", -1)], 1):
            group.start_soon(wait, name, priority)
            await until(lambda number=number: limiter.waiting == number)
        assert (limiter.in_use, limiter.waiting) == (1, 4)
        first.close()
    assert order == ["a", "b", "c", "d"]
    assert (limiter.in_use, limiter.waiting) == (0, 0)


async def test_a_free_slot_is_acquired_without_waiting() -> None:
    """Up to the limiter's size; a further one is not acquired until it waits."""
    limiter = Limiter("x", 2)
    slots = [reserved(limiter) for _ in range(3)]
    assert [slot.acquire_nowait() for slot in slots] == [True, True, False]
    assert slots[0].acquire_nowait(), "it is held already"
    await slots[1].acquire()
    assert (limiter.in_use, limiter.waiting) == (2, 0)


async def test_a_released_slot_can_be_acquired_again() -> None:
    """A retry acquires the slot of its run a second time."""
    limiter = Limiter("x", 1)
    slot = held(limiter)
    slot.release()
    assert limiter.in_use == 0
    await slot.acquire()
    assert limiter.in_use == 1
    slot.close()
    assert limiter.in_use == 0


async def test_a_cancelled_wait_leaves_the_slot_released() -> None:
    """The next run in the queue gets the slot."""
    limiter = Limiter("x", 1)
    first, second, third = held(limiter), reserved(limiter), reserved(limiter)
    async with anyio.create_task_group() as group:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as waiting:
                waiting.start_soon(second.acquire)
                await until(lambda: limiter.waiting == 1)
                scope.cancel()
        assert (limiter.in_use, limiter.waiting) == (1, 0)
        group.start_soon(third.acquire)
        await until(lambda: limiter.waiting == 1)
        first.close()
    assert not second.acquire_nowait(), "the third one holds it"
    third.close()
    assert second.acquire_nowait()


# --- reservations


def test_at_most_size_and_max_waiting_are_accepted() -> None:
    """Running or waiting, reserved slots count until they are closed."""
    limiter = Limiter("x", 2)
    slots = [limiter.reserve(0, 1) for _ in range(4)]
    assert [slot is not None for slot in slots] == [True, True, True, False]
    assert limiter.reserve(0, None) is not None, "without a maximum one more is accepted"
    assert slots[0] is not None
    slots[0].release()
    assert limiter.reserve(0, 1) is None
    for _ in range(3):  # closing twice gives up one reservation
        slots[0].close()
    assert limiter.reserve(0, 1) is None
    assert limiter.reserve(0, 2) is not None


def test_a_closed_slot_is_released_once() -> None:
    """However often it is closed, another run's slot stays acquired."""
    limiter = Limiter("x", 1)
    first = held(limiter)
    first.close()
    second = held(limiter)
    first.close()
    first.release()
    assert limiter.in_use == 1
    assert not reserved(limiter).acquire_nowait()
    second.close()
    assert limiter.in_use == 0


async def test_another_slot_has_the_priority_but_no_reservation() -> None:
    """A retry beside an abandoned thread, which keeps its slot, needs a further one."""
    limiter = Limiter("x", 2)
    first = held(limiter, 3)
    further = first.another()
    assert further.priority == 3
    assert further.acquire_nowait()
    assert limiter.in_use == 2
    further.close()
    assert limiter.in_use == 1
    accepted = [limiter.reserve(0, 1) for _ in range(3)]
    assert [slot is not None for slot in accepted] == [True, True, False], "only the first one is reserved"


# --- the model


class Model:
    """The simplest limiter: the holders of a slot, and a queue."""

    def __init__(self, size: int) -> None:
        self.size, self.arrivals = size, 0
        self.held: set[int] = set()
        self.queue: list[tuple[int, int, int]] = []

    def acquire(self, who: int, priority: int) -> None:
        """Hold a slot or join the queue."""
        self.arrivals += 1
        heapq.heappush(self.queue, (priority, self.arrivals, who))
        self.fill()

    def release(self, who: int) -> None:
        """Hold none, and wait for none."""
        self.held.discard(who)
        self.queue = sorted(entry for entry in self.queue if entry[2] != who)
        self.fill()

    def fill(self) -> None:
        """Give the free slots to the first ones in the queue."""
        while self.queue and len(self.held) < self.size:
            self.held.add(heapq.heappop(self.queue)[2])


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["acquire", "acquire", "try", "cancel", "release", "close"]),
        st.integers(0, 6),
        st.integers(-2, 2),
    ),
    max_size=60,
)


@given(size=st.integers(1, 4), steps=STEPS)
@settings(max_examples=150, deadline=None)
def test_no_slot_is_lost_or_acquired_twice(size: int, steps: list[tuple[str, int, int]]) -> None:
    """In any order of acquiring, cancelling, releasing and closing, the limiter does as the simplest one would."""
    asyncio.run(compare_with_model(size, steps))


async def compare_with_model(size: int, steps: list[tuple[str, int, int]]) -> None:
    """Take the same steps with the limiter and the model, and compare after each."""
    limiter, model = Limiter("x", size), Model(size)
    slots: dict[int, Slot] = {}
    tasks: dict[int, asyncio.Task[None]] = {}
    for step, who, priority in steps:
        slot = slots.get(who) or slots.setdefault(who, reserved(limiter, priority))
        idle = who not in model.held and all(entry[2] != who for entry in model.queue)
        if step == "acquire" and idle:
            tasks[who] = asyncio.ensure_future(slot.acquire())
            await asyncio.sleep(0)
            model.acquire(who, slot.priority)
        elif step == "try" and idle:
            assert slot.acquire_nowait() == (len(model.held) < size)
            if slot.held:
                model.held.add(who)
        elif step in ("release", "close") and who in model.held:
            slot.release() if step == "release" else slot.close()
            model.release(who)
        elif step == "cancel" and who in tasks and not tasks[who].done() and who not in model.held:
            await cancelled(tasks.pop(who))
            model.release(who)
        if step == "close" and who not in model.held and (idle or not slot.held):
            await cancelled(tasks.pop(who, None))
            slot.close()
            model.release(who)
            del slots[who]
        assert {number for number, each in slots.items() if each.held} == model.held
        assert (limiter.in_use, limiter.waiting) == (len(model.held), len(model.queue))
        # Exactly one reservation a slot, so that one more is accepted by a queue that has room for one more.
        room = len(slots) - size
        assert limiter.reserve(0, room) is None
        if room >= -1:
            one_more = limiter.reserve(0, room + 1)
            assert one_more is not None
            one_more.close()
    for who in model.held & tasks.keys():
        await asyncio.wait_for(tasks.pop(who), 5)
    for task in tasks.values():
        await cancelled(task)


async def cancelled(task: asyncio.Task[None] | None) -> None:
    """Cancel a task and wait for its end."""
    if task is not None:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


# --- threads and event loops


@pytest.mark.parametrize("other", ["asyncio", "trio"])
async def test_event_loops_of_several_threads_share_a_limiter(other: str) -> None:
    """A run is woken on its own event loop, whichever thread the slot was released in."""
    limiter, entered = Limiter("x", 1), threading.Event()
    first = held(limiter)

    async def wait() -> None:
        slot = reserved(limiter)
        with anyio.fail_after(10):
            await slot.acquire()
        entered.set()
        slot.close()

    async with anyio.create_task_group() as group:
        group.start_soon(anyio.to_thread.run_sync, lambda: anyio.run(wait, backend=other))
        await until(lambda: limiter.waiting == 1)
        assert not entered.is_set()
        first.close()
    assert entered.is_set()
    assert limiter.in_use == 0


def test_a_limit_holds_across_threads() -> None:
    """Four event loops in four threads have ten runs each: at most three run at the same time."""
    limiter, lock = Limiter("x", 3), threading.Lock()
    inside: list[None] = []
    most = 0

    async def run() -> None:
        nonlocal most
        slot = reserved(limiter)
        for _ in range(20):
            if not slot.acquire_nowait():
                await slot.acquire()
            with lock:
                inside.append(None)
                most = max(most, len(inside))
            await anyio.lowlevel.checkpoint()
            with lock:
                inside.pop()
            slot.release()
        slot.close()

    async def ten() -> None:
        with anyio.fail_after(15):
            async with anyio.create_task_group() as group:
                for _ in range(10):
                    group.start_soon(run)

    with ThreadPoolExecutor(4) as pool:
        ends = [pool.submit(anyio.run, ten, backend=backend) for backend in ("asyncio", "trio") * 2]
        for end in ends:
            end.result()
    assert most == 3
    assert (limiter.in_use, limiter.waiting) == (0, 0)


def test_a_run_whose_event_loop_is_closed_is_passed_over() -> None:
    """The slot goes to the next run that can still continue."""
    limiter = Limiter("x", 1)
    first, second, third = held(limiter), reserved(limiter), reserved(limiter)
    closed = asyncio.new_event_loop()
    waiting: Coroutine[Any, Any, None] = second.acquire()

    async def begin() -> None:
        with suppress(StopIteration):
            waiting.send(None)  # like a task that the closing loop leaves behind

    closed.run_until_complete(begin())
    closed.close()
    assert limiter.waiting == 1

    async def go_on() -> None:
        entering = asyncio.ensure_future(third.acquire())
        await until(lambda: limiter.waiting == 2)
        first.close()
        await asyncio.wait_for(entering, 5)

    asyncio.run(go_on())
    waiting.close()
    assert third.held
    assert (limiter.in_use, limiter.waiting) == (1, 0)


def test_a_slot_may_be_closed_in_the_middle_of_any_method() -> None:
    """
    The garbage collector closes the slots of dead runs in the thread that allocates, and must not wait for a lock.
    """
    limiter = Limiter("x", 1)
    first, garbage = held(limiter), reserved(limiter)

    class Priority(int):
        """Compared while the limiter sorts its queue: the collector might run at that moment."""

        def __eq__(self, other: object) -> bool:
            first.close()
            garbage.close()
            return int(self) == other

        __hash__ = int.__hash__

    async def wait(slot: Slot) -> None:
        await slot.acquire()
        slot.close()

    async def main() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(wait, reserved(limiter, Priority(1)))
            group.start_soon(wait, reserved(limiter, Priority(1)))

    thread = threading.Thread(target=anyio.run, args=(main,), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive(), "the limiter waits for itself"
    assert (limiter.in_use, limiter.waiting) == (0, 0)
    assert limiter.reserve(0, 0) is not None, "no reservation is left"


@pytest.fixture
def busy_collector() -> Iterator[None]:
    """The garbage collector runs at nearly every allocation."""
    before = gc.get_threshold()
    gc.set_threshold(1)
    yield
    gc.set_threshold(*before)


def test_the_collector_closes_slots_of_lost_runs(busy_collector: None) -> None:
    """Suspended runs are collected while others acquire; each slot comes back."""
    limiter = Limiter("x", 1)

    def run() -> Any:
        slot = reserved(limiter)
        slot.acquire_nowait()
        try:
            cycle = yield
            yield cycle
        finally:
            slot.close()

    def use() -> None:
        for _ in range(300):
            lost = run()
            next(lost)
            lost.send([lost])  # only the collector finds it

    thread = threading.Thread(target=use, daemon=True)
    thread.start()
    thread.join(15)
    assert not thread.is_alive(), "the limiter waits for itself"
    gc.collect()
    assert limiter.in_use == 0
    assert limiter.reserve(0, 0) is not None


# --- the shared thread pool


async def test_a_shared_thread_is_one_that_endpoints_use() -> None:
    """While it is held, one call less runs in the pool; its numbers are those of the pool."""
    pool = SharedThreads()
    anyio.to_thread.current_default_thread_limiter().total_tokens = 1
    slot = SharedThreadSlot()
    further = slot.another()
    assert slot.acquire_nowait()
    assert slot.acquire_nowait(), "it is held already"
    assert not further.acquire_nowait()
    assert (pool.name, pool.size, pool.in_use, pool.waiting) == ("default", 1, 1, 0)
    async with anyio.create_task_group() as group:
        group.start_soon(anyio.to_thread.run_sync, int)
        await until(lambda: pool.waiting == 1)
        slot.release()
    await further.acquire()
    assert pool.in_use == 1
    for _ in range(2):
        further.close()
        slot.close()
    assert pool.in_use == 0


async def test_a_shared_thread_can_be_released_in_any_thread() -> None:
    """A run may be collected in another thread than its own; a call that waits for a thread continues."""
    pool, slot = SharedThreads(), SharedThreadSlot()
    anyio.to_thread.current_default_thread_limiter().total_tokens = 1
    await slot.acquire()
    async with anyio.create_task_group() as group:
        group.start_soon(anyio.to_thread.run_sync, int)
        await until(lambda: pool.waiting == 1)
        elsewhere = threading.Thread(target=slot.close)
        elsewhere.start()
    elsewhere.join()
    assert pool.in_use == 0


def test_a_shared_thread_outlives_its_event_loop() -> None:
    """A thread that ends after its event loop releases it without an error."""
    slots: list[SharedThreadSlot] = []

    async def main() -> None:
        slots.append(SharedThreadSlot())
        await slots[0].acquire()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, main()).result(10)
    slots[0].close()
