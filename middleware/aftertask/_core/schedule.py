"""Where a run comes into being, and is accepted or rejected."""

from __future__ import annotations

import inspect

from .._log import log
from .._taskrun import RequestInfo, TaskRun
from .._text import error_type
from ..errors import NotSerializable, QueueFull
from ..events import HazardFound
from .background import Work
from .emit import Emitter
from .executors.process import check_serializable
from .resolver import Resolver
from .run import Run


def _not_callable(func: object) -> str:
    what = "a coroutine" if inspect.iscoroutine(func) else f"{type(func).__name__}, which is no function"
    return f"it was given {what}, as if it had been called: pass the function and its arguments, add_task(send, to)"


class Scheduler:
    """
    Schedules the runs of one app.

    Args:
        emit: Gets `Scheduled` and `Rejected`.
        resolver: The policies in force.
    """

    def __init__(self, emit: Emitter, resolver: Resolver) -> None:
        self._emit, self._resolver = emit, resolver

    def priority_of(self, work: Work) -> int:
        """The priority of a task."""
        return self._resolver.resolve(work.func, whole=work.whole).info.priority

    def schedule(
        self, request: RequestInfo, work: Work, background: object, *, parent: TaskRun | None = None
    ) -> Run | None:
        """
        A run comes into being; None if its task is not observed.

        Args:
            request: The request that schedules it.
            work: What will be called.
            background: The background that carries it; None if user code is the caller.
            parent: The run in which user code calls it; such a run is always accepted.

        Raises:
            QueueFull, NotSerializable: The run has been rejected.
        """
        resolved = self._resolver.resolve(work.func, whole=work.whole)
        if not resolved.observe:
            return None
        run = Run(resolved, request, work, parent=parent)
        run.background = background
        self._emit(run.scheduled())
        if not callable(work.func):
            self._emit(HazardFound(run, run.timestamp, "not_callable", None, _not_callable(work.func)))
        if parent is None:
            self._accept(run, work)
        return run

    def schedule_or_refuse(self, request: RequestInfo, work: Work, background: object) -> tuple[Run | None, bool]:
        """Schedule a task whose caller cannot be given an error: it is logged. Returns also whether it was refused."""
        try:
            return self.schedule(request, work, background), False
        except (QueueFull, NotSerializable) as error:
            log("error", "task.refused", error_type=error_type(error), error_message=str(error))
            return None, True

    def _accept(self, run: Run, work: Work) -> None:
        resolved = run.resolved
        try:
            if run.info.executor == "process":
                check_serializable(run.task, work.func, work.args, work.kwargs)
            if resolved.limiter is not None:
                slot = resolved.limiter.reserve(run.info.priority, resolved.max_waiting)
                if slot is None:
                    raise QueueFull(
                        f"{run.task}: its limit accepts no more runs at the moment; at most {resolved.max_waiting} wait"
                    )
                run.slots = (slot,)
        except (QueueFull, NotSerializable) as error:
            self._emit(run.reject("queue_full" if isinstance(error, QueueFull) else "not_serializable"))
            run.forget()
            raise
