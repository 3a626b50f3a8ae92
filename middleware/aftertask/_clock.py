"""The only clock: tests turn it by replacing these names (`aftertask.testing.VirtualClock`)."""

from __future__ import annotations

import time
import weakref
from typing import Protocol

#: Seconds, for durations; its zero means nothing.
monotonic = time.perf_counter

#: Seconds since the Unix epoch, for what is shown to people.
timestamp = time.time


class Watcher(Protocol):
    """Waits for a time to come, so it wants to know when the clock is turned."""

    def turned(self) -> None: ...


watchers: weakref.WeakSet[Watcher] = weakref.WeakSet()
