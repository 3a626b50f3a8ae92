"""Runs that compensate for a handler that failed, until the error response has been sent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from .. import _clock
from .lifecycle import Lifecycle
from .loops import CallSoon, call_soon_from_any_thread
from .run import Run

#: Where the scope holds compensating runs until the error response has been sent.
OWED = "aftertask.owed"


class Owed:
    """
    Compensating runs that wait for the error response.

    The response may be sent by a middleware around ours, after our call has returned. If the scope that holds them is
    freed without one, they end as dropped.

    Args:
        runs: The runs, in any order.
        end: Ends those that will not run.
    """

    def __init__(self, runs: Iterable[Run], end: Callable[[Sequence[Run]], None]) -> None:
        self.runs = sorted(runs, key=lambda run: run.info.priority)
        self._end = end
        try:
            self._call_soon: CallSoon = call_soon_from_any_thread()
        except RuntimeError:  # the request's coroutine is closed outside of its event loop
            self._call_soon = lambda _: False

    async def run(self, lifecycle: Lifecycle) -> None:
        """Run them: the error response has been sent."""
        now = _clock.monotonic()
        for run in self.runs:
            run.origin, run.queued_s = "run_on_error", now
        try:
            for run in list(self.runs):
                try:
                    await lifecycle.live(run)
                except Exception:  # emitted already; the server has the handler's error
                    pass
                finally:
                    if run.outcome is not None:
                        self.runs.remove(run)
        finally:
            self.give_up()  # nothing is left unless this was cancelled

    def give_up(self) -> None:
        """End the runs that have not run."""
        runs, self.runs = self.runs, []
        self._end(runs)

    def __del__(self) -> None:
        # Not here: garbage is collected at any line of any thread, which may hold a lock that a signal waits for.
        if self.runs and not self._call_soon(self.give_up):
            self.give_up()  # the event loop is closed
