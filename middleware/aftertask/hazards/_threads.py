"""The threads that sync tasks share with sync endpoints: told when tasks hold nearly all of them."""

from __future__ import annotations

from collections import Counter
from time import monotonic

from anyio import CapacityLimiter

from .._run import _live
from ..events import TaskRun

#: Tasks that hold more than this share of the threads leave too few for endpoints.
SHARE = 0.8

#: How often the runs are looked through while the pool is that busy, and how often it is told, in seconds.
LOOK_EVERY = 0.5
TELL_EVERY = 60.0

KIND = "starved_threads"


class Threads:
    """Looks at the shared pool, from the event loop that it belongs to."""

    def __init__(self) -> None:
        self._look_at = self._tell_at = 0.0

    def look(self, limiter: CapacityLimiter) -> tuple[TaskRun, str] | None:
        """The run to tell it of and what to say, where tasks hold too many threads; looked at and told but so often."""
        limit, busy = limiter.total_tokens, limiter.borrowed_tokens
        if busy <= SHARE * limit:
            return None
        now = monotonic()
        if now < self._look_at or now < self._tell_at:
            return None
        self._look_at = now + LOOK_EVERY
        holding = [run for run in list(_live) if _holds(run)]
        if len(holding) <= SHARE * limit:
            return None
        self._tell_at = now + TELL_EVERY
        task, most = Counter(run.task for run in holding).most_common(1)[0]
        return next(run for run in holding if run.task == task), (
            f"background tasks hold {min(len(holding), busy)} of the {limit:g} threads that they share with sync "
            f'endpoints, {most} of them this one: give it @task(executor="thread"), which has threads of its own '
            f"(Settings.thread_limit), or a limit"
        )


def _holds(run: TaskRun) -> bool:
    plan = run.plan
    if plan.executor != "thread" or plan.own_thread or run.outcome is not None or run.started_s is None:
        return False
    return run.thread_s is not None or bool(run.places)
