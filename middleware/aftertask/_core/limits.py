"""Concurrency limits: who may run now, in the order of priority and arrival."""

from __future__ import annotations

import copy
import functools
import heapq
import itertools
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import anyio
import anyio.to_thread

from .loops import CallSoon, call_soon_from_any_thread, this_loop

#: Numbers those that wait, in the order in which they came.
_arrivals = itertools.count()


class Limiter:
    """
    Gives out a limited number of slots; runs wait for one by priority, then by arrival.

    Works for any number of event loops and threads of one process.

    Args:
        name: The `limiter` label of its metrics.
        size: Number of slots, at least 1.

    Attributes:
        in_use: Number of slots held.
    """

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size
        self.in_use = 0
        self._reserved = 0
        self._queue: list[_Waiter] = []
        self._given_up = 0
        # The garbage collector may end a run, and so release its slot, in a thread that holds the lock. A release
        # therefore never waits for the lock: it is put into this queue, and the holder of the lock carries it out.
        self._lock = threading.Lock()
        self._releases: deque[tuple[Slot, bool]] = deque()

    @property
    def waiting(self) -> int:
        """Number of runs that wait for a slot."""
        return len(self._queue) - self._given_up

    def reserve(self, priority: int, max_waiting: int | None) -> Slot | None:
        """
        Reserve a slot, to be acquired later; None if the queue is full.

        Args:
            priority: Smaller goes first.
            max_waiting: Maximum number of reservations beyond `size`; None means no maximum.
        """
        with self._locked():
            if max_waiting is not None and self._reserved >= self.size + max_waiting:
                return None
            self._reserved += 1
        return Slot(self, priority, reserved=True)

    def acquire(self, slot: Slot, waiter: _Waiter | None = None) -> bool:
        """Whether the slot is held now. If it is not, the waiter is put into the queue."""
        with self._locked():
            if not slot.held and self.in_use < self.size:
                self.in_use += 1
                slot.held = True
            elif not slot.held and waiter is not None:
                slot.waiter = waiter
                heapq.heappush(self._queue, waiter)
            return slot.held

    def release(self, slot: Slot, *, for_good: bool) -> None:
        """Release a slot that is held, or remove it from the queue; may be called inside of any other method."""
        self._releases.append((slot, for_good))
        self._settle()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock:
            self._carry_out_releases()  # a slot that was released before is not held any more
            yield
        self._settle()

    def _settle(self) -> None:
        # If the lock is taken, its holder comes here after it; so whatever is left in the queue is carried out.
        while self._releases and self._lock.acquire(blocking=False):
            try:
                self._carry_out_releases()
            finally:
                self._lock.release()

    def _carry_out_releases(self) -> None:
        while self._releases:
            slot, for_good = self._releases.popleft()
            if slot.held:
                slot.held = False
                self._hand_over()
            elif slot.waiter is not None:
                slot.waiter.given_up, slot.waiter = True, None
                self._given_up += 1
                self._sweep()
            if for_good and slot.reserved:
                slot.reserved = False
                self._reserved -= 1

    def _hand_over(self) -> None:
        """Give the slot that became free to the next one in the queue."""
        while self._queue:
            waiter = heapq.heappop(self._queue)
            if waiter.given_up:
                self._given_up -= 1
            elif waiter.call_soon(waiter.event.set):  # not if its event loop is closed, where it waits no longer
                waiter.slot.held, waiter.slot.waiter = True, None
                return
        self.in_use -= 1

    def _sweep(self) -> None:
        # Those that gave up would stay until their turn, in a long queue for ever: removed once they are half of it.
        if self._given_up * 2 > len(self._queue):
            self._queue = [waiter for waiter in self._queue if not waiter.given_up]
            heapq.heapify(self._queue)
            self._given_up = 0


class Slot:
    """
    One run's slot of a limiter: acquired for each attempt, and closed once, with the run.

    Only its limiter, which holds its lock then, changes the attributes.

    Attributes:
        held: Whether it is acquired.
        reserved: Whether it counts as a reservation; until it is closed.
        waiter: Its place in the queue; None if it does not wait.
    """

    __slots__ = ("held", "limiter", "priority", "reserved", "waiter")

    def __init__(self, limiter: Limiter, priority: int, *, reserved: bool) -> None:
        self.limiter = limiter
        self.priority = priority
        self.reserved = reserved
        self.held = False
        self.waiter: _Waiter | None = None

    def acquire_nowait(self) -> bool:
        """Acquire it if that needs no waiting; returns whether it is held."""
        return self.limiter.acquire(self)

    async def acquire(self) -> None:
        """Acquire it when it is its turn. If the wait is cancelled, the slot is released."""
        waiter = _Waiter(self.priority, self, call_soon_from_any_thread())
        if not self.limiter.acquire(self, waiter):
            try:
                await waiter.event.wait()
            except BaseException:
                self.release()
                raise

    def release(self) -> None:
        """Release it; it may be acquired again. From any thread, and without effect if it is not held."""
        self.limiter.release(self, for_good=False)

    def close(self) -> None:
        """Release it for good and give up the reservation. From any thread; a second time has no effect."""
        self.limiter.release(self, for_good=True)

    def another(self) -> Slot:
        """A further slot of the same limiter, with the same priority and without a reservation."""
        return Slot(self.limiter, self.priority, reserved=False)


@dataclass(order=True, slots=True)
class _Waiter:
    """A task that waits for its slot, on its own event loop; in the order in which they are woken."""

    priority: int
    slot: Slot = field(compare=False)
    call_soon: CallSoon = field(compare=False)
    number: int = field(default_factory=functools.partial(next, _arrivals))
    event: anyio.Event = field(compare=False, default_factory=anyio.Event)
    given_up: bool = field(compare=False, default=False)


class SharedThreads:
    """The thread pool of this event loop that sync endpoints and sync tasks share, for its numbers."""

    name = "default"

    def __init__(self) -> None:
        self._limiter = anyio.to_thread.current_default_thread_limiter()
        self._loop = this_loop()

    @property
    def is_here(self) -> bool:
        """Whether this is the pool of the event loop that runs here."""
        return this_loop() is self._loop

    @property
    def size(self) -> float:
        """Maximum number of threads."""
        return self._limiter.total_tokens

    @property
    def in_use(self) -> float:
        """Number of threads in use."""
        return self._limiter.borrowed_tokens

    @property
    def waiting(self) -> float:
        """Number of calls that wait for a thread."""
        return self._limiter.statistics().tasks_waiting


class SharedThreadSlot:
    """A thread of that pool, held until the call in it has really ended; used like a `Slot`."""

    def __init__(self) -> None:
        self._limiter = anyio.to_thread.current_default_thread_limiter()
        self._call_soon, self._thread = call_soon_from_any_thread(), threading.get_ident()
        self._held = False

    def acquire_nowait(self) -> bool:
        """Acquire a thread if one is free; returns whether it is held."""
        # Looked up first: before 4.15, anyio raises trio's own WouldBlock on trio.
        if not self._held and self._limiter.available_tokens >= 1:
            try:
                self._limiter.acquire_on_behalf_of_nowait(self)
                self._held = True
            except anyio.WouldBlock:  # others wait already
                pass
        return self._held

    async def acquire(self) -> None:
        """Acquire a thread when one is free."""
        if not self._held:
            await self._limiter.acquire_on_behalf_of(self)
            self._held = True

    def release(self) -> None:
        """Release it; it may be acquired again. From any thread, and without effect if it is not held."""
        if not self._held:
            return
        self._held = False
        release = functools.partial(self._limiter.release_on_behalf_of, self)
        try:
            release() if threading.get_ident() == self._thread else self._call_soon(release)
        except RuntimeError:  # the event loop is closed, so nothing waits for this pool any more
            pass

    def close(self) -> None:
        """The same: there are no reservations."""
        self.release()

    def another(self) -> SharedThreadSlot:
        """A further thread of the same pool."""
        other = copy.copy(self)
        other._held = False
        return other
