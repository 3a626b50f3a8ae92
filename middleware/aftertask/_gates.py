"""Who may start now: concurrency limits and the order of those that wait for them."""

from __future__ import annotations

import heapq
import threading
from typing import Any, TypeAlias

import anyio

from . import _timer


class Gate:
    """
    Lets so many in at once; the others wait, by priority and then in the order in which they came.

    For any number of event loops and threads of one process.

    Args:
        name: The `limiter` label of its metrics.
        size: How many at once.
    """

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size
        self.in_use = 0
        self._accepted = 0
        # The garbage collector may end a run, and so give a place back, while this very thread is in here: that one is
        # let out when the other has done.
        self._lock = threading.RLock()
        self._busy = False
        self._leaving: list[tuple[Place, bool]] = []
        self._queue: list[_Entry] = []
        self._gone = 0
        self._order = 0

    @property
    def waiting(self) -> int:
        """How many stand in the queue."""
        return len(self._queue) - self._gone

    def accept(self, priority: int, max_waiting: int | None = None) -> Place | None:
        """
        A place for somebody who will come; None where that is one too many.

        Args:
            priority: Smaller goes first.
            max_waiting: How many are accepted beyond those that may be in at once; None for any number.
        """
        with self._lock:
            if max_waiting is not None and self._accepted >= self.size + max_waiting:
                return None
            self._accepted += 1
        return Place(self, priority, accepted=True)

    def _enter(self, place: Place, *, queue: bool) -> bool:
        """Whether it is in; else it stands in the queue now, where it wants to."""
        with self._lock:
            self._busy = True
            if self.in_use < self.size:
                self.in_use += 1
                place.inside = True
            elif queue:
                self._order += 1
                place.entry = [place.priority, self._order, place]
                heapq.heappush(self._queue, place.entry)
            self._busy = False
            if self._leaving:
                self._let_out()
            return place.inside

    def _leave(self, place: Place, *, for_good: bool) -> None:
        with self._lock:
            if self._busy:
                self._leaving.append((place, for_good))
                return
            self._busy = True
            self._take_out(place, for_good)
            self._busy = False
            if self._leaving:
                self._let_out()

    def _let_out(self) -> None:
        while self._leaving:
            self._busy = True
            self._take_out(*self._leaving.pop())
            self._busy = False  # in the loop: one that came while it was True is seen by its condition

    def _take_out(self, place: Place, for_good: bool) -> None:
        if place.inside:
            place.inside = False
            if self._queue:
                self._next()
            else:
                self.in_use -= 1
        elif place.entry is not None:
            place.entry[2] = None
            place.entry = None
            self._gone += 1
            self._sweep()
        if for_good and place.accepted:
            place.accepted = False
            self._accepted -= 1

    def _next(self) -> None:
        while self._queue:
            place = heapq.heappop(self._queue)[2]
            if place is None:
                self._gone -= 1
            elif place.wake():
                place.entry, place.inside = None, True
                return
        self.in_use -= 1

    def _sweep(self) -> None:
        # Those that gave up below others would stay until their turn: taken out once they are half of all.
        if self._gone * 2 > len(self._queue):
            self._queue = [entry for entry in self._queue if entry[2] is not None]
            heapq.heapify(self._queue)
            self._gone = 0


class Place:
    """One run's place at a gate; it may go in and come out again, and is given back once."""

    __slots__ = ("_event", "_soon", "_thread", "accepted", "entry", "gate", "inside", "priority")

    def __init__(self, gate: Gate, priority: int, *, accepted: bool = False) -> None:
        self.gate = gate
        self.priority = priority
        self.accepted = accepted
        self.inside = False
        self.entry: _Entry | None = None

    def enter_now(self) -> bool:
        """Go in, if nobody has to wait; whether that is so."""
        return self.inside or self.gate._enter(self, queue=False)

    async def enter(self) -> None:
        """Go in, when it is its turn; where the wait is cancelled, it is outside as before."""
        self._event = anyio.Event()
        self._soon, self._thread = _timer.calls_soon(), threading.get_ident()
        if not self.inside and not self.gate._enter(self, queue=True):
            try:
                await self._event.wait()
            except BaseException:
                self.come_out()
                raise

    def wake(self) -> bool:
        """Tell the one that waits that it is in; False where its event loop is no more."""
        try:
            if threading.get_ident() == self._thread:
                self._event.set()
            else:
                self._soon(self._event.set)
        except RuntimeError:
            return False
        return True

    def again(self) -> Place:
        """Another place like this one, which stays taken by what is still inside."""
        return Place(self.gate, self.priority)

    def come_out(self) -> None:
        """Let the next one in; this one may enter again."""
        self.gate._leave(self, for_good=False)

    def give_back(self) -> None:
        """Come out for good; from any thread, and at any time. A second time changes nothing."""
        self.gate._leave(self, for_good=True)


#: Priority, order of arrival, and who it is; None once that one has given up.
_Entry: TypeAlias = list[Any]
