"""Counts of the last ten minutes, in buckets of ten seconds: runs of a task, or the lag of the event loop."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable

from .. import _clock
from .._taskrun import TaskInfo
from ..events import Ended, Failed, Succeeded

#: The window that the board looks at: this many buckets of this many seconds.
BUCKETS, WIDTH = 60, 10.0
#: The fewest buckets that are shown.
_LEAST = 12
#: A task without a bad run for this long, and with a success since, fails no longer.
RESOLVED_AFTER = 300.0
#: Durations and waits are those of this many last runs.
_SAMPLES = 200


class Buckets:
    """Numbers by time; the window grows with them until it is full."""

    def __init__(self) -> None:
        self._values: dict[int, float] = {}
        self._oldest = int(_clock.timestamp() / WIDTH) - _LEAST + 1

    def add(self, at: float, value: float = 1.0, how: Callable[[float, float], float] = operator.add) -> None:
        """Add to the bucket of a moment, in seconds since the Unix epoch; with `max`, it keeps the largest value."""
        bucket = int(at / WIDTH)
        self._values[bucket] = how(self._values.get(bucket, 0.0), value)
        if len(self._values) > BUCKETS:
            del self._values[min(self._values)]

    def until(self, now: float) -> list[float]:
        """The buckets of the window, the oldest first."""
        end = int(now / WIDTH) + 1
        return [self._values.get(bucket, 0.0) for bucket in range(max(end - BUCKETS, self._oldest), end)]


class Tally:
    """How one task's runs ended; times are in seconds since the Unix epoch, None if there was no such run."""

    def __init__(self, info: TaskInfo) -> None:
        self.info = info
        self.ended, self.bad = Buckets(), Buckets()
        self.durations: deque[float] = deque(maxlen=_SAMPLES)
        self.waits: deque[float] = deque(maxlen=_SAMPLES)
        self.last_success: float | None = None
        self.last_bad: float | None = None
        self._since = self._last_failure = 0.0

    def count(self, event: Ended) -> None:
        """Count a run that has ended; one that says nothing about the task is not counted."""
        at, bad = event.timestamp, event.bad
        if event.outcome in ("cancelled", "expired", "offloaded") or (event.outcome == "dropped" and not bad):
            return
        self.ended.add(at)
        if event.outcome == "succeeded":
            self.last_success = at
        elif bad:
            self.bad.add(at)
            self.last_bad = at
            if event.outcome not in ("skipped", "dropped"):  # those say something about another task, or an endpoint
                self._since = self.failing_since(at) or at
                self._last_failure = at
        if isinstance(event, (Succeeded, Failed)):
            self.durations.append(event.duration_s)
        if event.run.queue_wait_s is not None:
            self.waits.append(event.run.queue_wait_s)

    def failing_since(self, now: float) -> float | None:
        """When the first run of the current series failed, in seconds since the Unix epoch; None if none is failing."""
        works = self.last_success is not None and self.last_success > self._last_failure
        return None if works and now - self._last_failure > RESOLVED_AFTER else self._since or None


def quantile(share: float, values: deque[float]) -> float | None:
    """The value that this share of the values does not exceed; None without values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None
