"""The only clock: durations, timestamps, sleeping and timeouts. Tests replace these names (`testing.VirtualClock`)."""

from __future__ import annotations

import time
import weakref
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from typing import Protocol

import anyio

#: Seconds, for durations; the zero point has no meaning.
monotonic: Callable[[], float] = time.perf_counter

#: Seconds since the Unix epoch, for what people see.
timestamp: Callable[[], float] = time.time

#: Wait for a number of seconds.
sleep: Callable[[float], Awaitable[None]] = anyio.sleep

#: A cancel scope that is cancelled after a number of seconds.
move_on_after: Callable[[float], AbstractContextManager[anyio.CancelScope, bool]] = anyio.move_on_after


class Watcher(Protocol):
    """Waits in a thread until a given time, so it must check again when a test advances the clock."""

    def clock_advanced(self) -> None: ...


watchers: weakref.WeakSet[Watcher] = weakref.WeakSet()
