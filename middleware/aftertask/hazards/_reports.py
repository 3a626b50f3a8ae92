"""What one app's signals get about its event loop: lag, blocked seconds, and reports."""

from __future__ import annotations

import math
from collections.abc import Callable
from time import monotonic, time

from .._core.emit import Emitter
from .._taskrun import TaskRun
from ..events import LoopBlocked

#: Seconds after which a block by the same task is reported again.
REPORT_EVERY = 60.0


class LoopReports:
    """
    One app on an event loop; its methods are called in the watching thread.

    Args:
        threshold: Seconds without a response after which the loop counts as blocked; None means never.
        emit: The app's signals; identifies the app.
        found: Called once per block with a run of the app that is to blame, the app's line, and the stack.
        looked: Called a few times per second.
    """

    def __init__(
        self,
        threshold: float | None,
        emit: Emitter,
        found: Callable[[TaskRun, str, str], object],
        looked: Callable[[], object],
    ) -> None:
        self.threshold = math.inf if threshold is None else threshold
        self._emit, self._found, self._looked = emit, found, looked
        self._reported: dict[str | None, tuple[float, int]] = {}

    def redact(self, text: str) -> str:
        """`Settings.redact` of the app."""
        return self._emit.redact(text)

    def lag(self, seconds: float) -> None:
        """The loop responded, this late."""
        self._emit.each("loop_lag", lambda signal: signal.loop_lag(seconds))
        try:
            self._looked()
        except Exception as error:
            self.broken(error)

    def blocked_for(self, run: TaskRun | None, seconds: float) -> None:
        """The loop was blocked for this many more seconds."""
        self._emit.each("loop_blocked_for", lambda signal: signal.loop_blocked_for(run, seconds))

    def found(self, run: TaskRun, where: str, stack: str) -> None:
        """A run blocks the loop."""
        if run.request.app is self._emit:
            self._found(run, where, stack)

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
        """An error of ours; the loop is no longer watched if it came from the watching itself."""
        contained = error if isinstance(error, Exception) else RuntimeError(f"raised {error!r}")
        self._emit.broken("aftertask.hazards", "event loop", contained)
