"""The threads that sync tasks share with sync endpoints: reported when tasks hold nearly all of them."""

from __future__ import annotations

from collections import Counter
from time import monotonic

from anyio import CapacityLimiter

from .._taskrun import TaskRun, in_flight

#: Tasks that hold more than this share of the threads leave too few for endpoints.
SHARE = 0.8

#: Seconds between two looks through the runs while the pool is that busy, and between two reports.
LOOK_EVERY = 0.5
REPORT_EVERY = 60.0

KIND = "starved_threads"


class Threads:
    """Looks at the shared pool."""

    def __init__(self) -> None:
        self._look_at = self._report_at = 0.0

    def look(self, limiter: CapacityLimiter) -> tuple[TaskRun, str] | None:
        """A run that holds a thread and the advice, if tasks hold too many; None if not, or if reported recently."""
        limit, busy = limiter.total_tokens, limiter.borrowed_tokens
        if busy <= SHARE * limit:
            return None
        now = monotonic()
        if now < self._look_at or now < self._report_at:
            return None
        self._look_at = now + LOOK_EVERY
        # Those in a thread that sync endpoints share, as far as their state shows.
        holding = [run for run in list(in_flight) if run.info.shares_threads and run.state == "running"]
        if len(holding) <= SHARE * limit:
            return None
        self._report_at = now + REPORT_EVERY
        task, most = Counter(run.task for run in holding).most_common(1)[0]
        return next(run for run in holding if run.task == task), (
            f"background tasks hold {min(len(holding), busy)} of the {limit:g} threads that they share with sync "
            f'endpoints, {most} of them this one: give it @task(executor="thread"), which has threads of its own '
            f"(Settings.thread_limit), or a limit"
        )
