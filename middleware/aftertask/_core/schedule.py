"""Where a run comes into being, and is accepted or rejected."""

from __future__ import annotations

import inspect
from types import FunctionType

from starlette.background import BackgroundTask

from .. import _clock
from .._taskrun import RequestInfo, TaskRun
from .._text import error_type
from ..errors import DuplicateKey, JournalError, NotSerializable, QueueFull, UnknownExecutor
from ..events import HazardFound
from ..tasks import call_policy, code_name
from . import advice
from .background import Work, work_of
from .emit import Emitter
from .executors.process import check_serializable
from .keeper import Keeper, StoredCall
from .resolver import Resolver
from .run import Run

#: Why a run is rejected, by the error that the caller gets.
_REASONS: dict[type[Exception], str] = {
    QueueFull: "queue_full",
    NotSerializable: "not_serializable",
    DuplicateKey: "duplicate_key",
    JournalError: "no_journal",
}

#: What `add_task` may raise; of an unknown executor there is no run.
REFUSALS: tuple[type[Exception], ...] = (*_REASONS, UnknownExecutor)


def _not_callable(work: Work) -> str:
    write = "BackgroundTask" if work.whole else "add_task"
    if inspect.iscoroutine(work.func):
        name, short = code_name(work.func), work.func.__name__
        return f"it was given a coroutine of {name}, as if it had been called: write {write}({short}, …)"
    return (
        f"it was given an object of type {type(work.func).__name__}, not a function: the function was probably called; "
        f"pass the function and its arguments, {write}(send, to)"
    )


class Scheduler:
    """
    Schedules the runs of one app.

    Args:
        emit: Gets `Scheduled` and `Rejected`.
        resolver: The policies in force.
        keeper: Keeps durable runs; None if nothing does.
    """

    def __init__(self, emit: Emitter, resolver: Resolver, keeper: Keeper | None) -> None:
        self._emit, self._resolver, self._keeper = emit, resolver, keeper

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
            QueueFull, NotSerializable, DuplicateKey, JournalError: The run has been rejected.
            UnknownExecutor: The run cannot come into being.
        """
        resolved = self._resolver.resolve(work.func, whole=work.whole)
        if not resolved.observe:
            return None
        run = Run(resolved, request, work, parent=parent)
        run.background, run.key = background, None if type(work.func) is FunctionType else call_policy(work.func).key
        self._emit(run.scheduled())
        if not callable(work.func):
            self._emit(HazardFound(run, run.timestamp, "not_callable", None, _not_callable(work)))
        if parent is None:
            self._accept(run, work)
        return run

    def fails_request(self, work: Work, error: Exception) -> bool:
        """Whether a request fails because this was refused: its run has to be kept, or could not even be made."""
        func = work.func
        return (
            isinstance(error, UnknownExecutor)
            or self._resolver.resolve(func, whole=work.whole).info.durable
            or call_policy(func).key is not None
        )

    def restore(self, call: StoredCall) -> Run:
        """Schedule a call that the keeper has; a limit accepts it always."""
        work = work_of(BackgroundTask(call.func, *call.args, **call.kwargs))
        resolved = self._resolver.resolve(work.func)
        run = Run(resolved, call.request, work)
        run.id, run.origin, run.timestamp, run.confirmed = call.id, call.origin, call.timestamp, True
        run.key, run.queued_s = call_policy(work.func).key, run.scheduled_s
        run.scheduled_s -= max(0.0, _clock.timestamp() - call.timestamp)  # it expires when it would have
        self._emit(run.scheduled())
        if resolved.limiter is not None:
            slot = resolved.limiter.reserve(run.info.priority, None)
            run.slots = () if slot is None else (slot,)
        return run

    def _accept(self, run: Run, work: Work) -> None:
        resolved = run.resolved
        try:
            if run.info.executor == "process":
                check_serializable(run.task, work.func, work.args, work.kwargs)
            if resolved.remote is not None:
                run.arguments = resolved.remote.engine.encode(run.task, work.func, work.args, work.kwargs)
            if resolved.limiter is not None:
                slot = resolved.limiter.reserve(run.info.priority, resolved.max_waiting)
                if slot is None:
                    raise QueueFull(
                        f"{run.task}: its limit accepts no more runs at the moment; at most {resolved.max_waiting} wait"
                    )
                run.slots = (slot,)
            if run.info.durable or run.key is not None:
                self._accept_for_good(run)
            elif run.info.keep_result and self._keeper is None and call_policy(work.func).keep_result:
                lost = f"it {advice.LOST_RESULT}: {advice.KEEP_RESULT}"
                self._emit(HazardFound(run, run.timestamp, "no_journal", None, lost))
        except REFUSALS as error:
            self._emit(run.reject(_REASONS[type(error)], error))
            run.forget()
            raise

    def _accept_for_good(self, run: Run) -> None:
        if self._keeper is None:
            what = "is durable" if run.info.durable else f"was given key={run.key!r}"
            raise JournalError(
                f"{run.task} {what}, which needs a journal, and there is none: set Settings(journal=…) or "
                f"AFTERTASK_JOURNAL"
            )
        if not run.request.admits:
            raise JournalError(
                f"{run.task}: the response has started, or there is none, so the run cannot be on disk before it; "
                f"add it before the response is returned"
            )
        try:
            self._keeper.accept(run)
        except REFUSALS:
            raise
        except Exception as error:  # must not fail open: the response would promise what will not happen
            raise JournalError(f"{run.task} cannot be kept: {error_type(error)}: {error}") from error
