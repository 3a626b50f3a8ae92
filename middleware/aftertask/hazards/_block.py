"""One block of an event loop: which run is to blame, for how many seconds, and what is reported."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from time import monotonic, time
from types import FrameType

from anyio import CapacityLimiter

from .._core.emit import Emitter
from .._core.stacks import sight_of
from .._taskrun import TaskRun
from ..events import LoopBlocked

#: Seconds after which a block is reported while it lasts: a deadlock would never be reported otherwise.
STILL_BLOCKED = 5.0

#: Seconds after which a block by the same task is reported again.
REPORT_EVERY = 60.0


class LoopReports:
    """
    One app on an event loop; its methods are called in the watching thread.

    Args:
        threshold: Seconds without a response after which the loop counts as blocked; None means never.
        emit: The app's signals; identifies the app.
        found: Called once per block with each run to blame, the app's line, and the stack.
        responded: Called with the limiter of the loop's worker threads, a few times per second.
    """

    def __init__(
        self,
        threshold: float | None,
        emit: Emitter,
        found: Callable[[TaskRun, str, str], object],
        responded: Callable[[CapacityLimiter], object],
    ) -> None:
        self.threshold = math.inf if threshold is None else threshold
        self.redact, self.found, self.responded = emit.redact, found, responded
        self._emit = emit
        self._reported: dict[str | None, tuple[float, int]] = {}

    def owns(self, run: TaskRun | None) -> bool:
        """Whether the run is one of this app's."""
        return run is not None and run.request.app is self._emit

    def lag(self, seconds: float, threads: CapacityLimiter) -> None:
        """The loop responded, this late."""
        self._emit.each("loop_lag", lambda signal: signal.loop_lag(seconds))
        self.responded(threads)

    def blocked_for(self, run: TaskRun | None, seconds: float) -> None:
        """The loop was blocked for this many more seconds."""
        if run is not None:
            run.blocked_s += seconds
        self._emit.each("loop_blocked_for", lambda signal: signal.loop_blocked_for(run, seconds))

    def blocked(self, run: TaskRun | None, seconds: float, where: str, stack: str, *, over: bool, first: bool) -> None:
        """
        The loop was blocked, or still is.

        Args:
            first: Whether this block has not been reported yet: then at most once per task and minute.
        """
        task, now = None if run is None else run.task, monotonic()
        at, suppressed = self._reported.get(task, (-math.inf, 0))
        if first and now - at < REPORT_EVERY:
            self._reported[task] = at, suppressed + 1
            return
        self._reported[task] = now, 0
        report = LoopBlocked(run, time(), seconds, where, stack, suppressed, over)
        self._emit.each("loop_blocked", lambda signal: signal.loop_blocked(report))

    def broken(self, error: BaseException) -> None:
        """An error in aftertask; if it came from the watching itself, the loop is no longer watched."""
        contained = error if isinstance(error, Exception) else RuntimeError(f"raised {error!r}")
        self._emit.broken("aftertask.hazards", "event loop", contained)


class Block:
    """
    One time that the loop does not respond, for one app.

    A run is to blame once it has been seen at two looks in a row; other seconds count for no task.

    Args:
        app: Gets the reports, from its threshold on.
        since: When the loop was asked to respond, or this app was first watched, in monotonic seconds.
    """

    def __init__(self, app: LoopReports, since: float) -> None:
        self.app = app
        self._apps: Sequence[LoopReports] = (app,)
        self._since = self._counted = since
        self._last: TaskRun | None = None
        self._looks = 0
        self._sights: dict[TaskRun | None, tuple[str, str]] = {}
        self._seconds: dict[TaskRun | None, float] = {}
        self._is_reported = False

    def look(self, run: TaskRun | None, frames: Sequence[FrameType], now: float, apps: Sequence[LoopReports]) -> None:
        """The loop that these apps run on has still not responded, and this is on its thread."""
        self._apps = apps or self._apps
        self._looks = self._looks + 1 if run is self._last else 1
        self._last = run
        if run not in self._sights:
            self._sights[run] = sight_of(run, frames, self.app.redact)
        if self._looks > 1 and now - self._since >= self.app.threshold:
            self._count(run, now)
            if not self._is_reported and now - self._since >= STILL_BLOCKED:
                self._report(now, over=False)

    def end(self, responded: float) -> None:
        """The loop has responded again since this time, in monotonic seconds."""
        if responded - self._since >= self.app.threshold:
            self._count(self._last if self._looks > 1 else None, responded)
            self._report(responded, over=True)

    def _count(self, run: TaskRun | None, until: float) -> None:
        if run is not None and run not in self._seconds and self._reports(run):
            self.app.found(run, *self._sights[run])
        # A response may be a moment older than the look that did not see it yet.
        seconds, self._counted = max(0.0, until - self._counted), until
        self._seconds[run] = self._seconds.get(run, 0.0) + seconds
        if self._reports(run):
            self.app.blocked_for(run, seconds)

    def _report(self, now: float, *, over: bool) -> None:
        named = {run: seconds for run, seconds in self._seconds.items() if run is not None}
        run = max(named, key=named.__getitem__) if named else None
        if not self._reports(run):
            return
        where, stack = self._sights.get(run) or next(iter(self._sights.values()))
        self.app.blocked(run, now - self._since, where, stack, over=over, first=not self._is_reported)
        self._is_reported = True

    def _reports(self, run: TaskRun | None) -> bool:
        """Whether this app reports the block: only one does, the run's own or else that with the smallest threshold."""
        own = next((app for app in self._apps if app.owns(run)), None)
        return self.app is (own or min(self._apps, key=lambda app: app.threshold))
