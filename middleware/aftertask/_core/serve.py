"""Where the code is in serving a request, and the running of its backgrounds and of what its runs call."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from contextvars import ContextVar, copy_context
from typing import Any, TypeVar

from .. import _clock
from .._taskrun import TaskRun, running
from .background import BareCallable, Work, background_of, is_container, sort_by_priority, work_of
from .batch import Batch
from .lifecycle import apply_variables
from .request import Request
from .run import Run

Call = Callable[[], Awaitable[None]]
T = TypeVar("T")


class Serving:
    """
    Where this code is in serving a request; kept in a context variable.

    Attributes:
        request: The request.
        response: The response that is being sent here; None outside of one.
        computed: Whether the response's class computes its background, so that any task called here is its own.
        bare: What stands in for the response's background; None if nothing does.
        batch: The batch that runs here; None outside of one.
    """

    __slots__ = ("bare", "batch", "computed", "request", "response")

    def __init__(self, request: Request, response: object = None, batch: Batch | None = None) -> None:
        self.request, self.response, self.batch = request, response, batch
        self.bare: BareCallable | None = None
        self.computed = False

    def leave(self, error: BaseException | None) -> None:
        """The response has been sent, or failed with this error; the context variable may still refer to this."""
        self.computed = False
        self.request.responded(error)
        if self.bare is not None:
            self.bare.leave(self.response)

    def carries(self, task: object) -> bool:
        """Whether a task that is called here, outside of a batch, belongs to the request."""
        return self.computed or background_of(self.response)[0] is task or self.request.has_scheduled(task)

    async def run(self, task: object, call: Call) -> None:
        """
        The framework, or user code in its place, calls a task or a container of the request.

        Args:
            task: What is called.
            call: Calls it as if we were absent; the tasks of a container come back here one by one.
        """
        if self.batch is not None:
            await self._run_next(task, call, self.batch)
        elif self.response is not None and self.request.must_wait(task):
            self.request.held += ((task, self._later(task, call)),)
        else:
            await self._start(task, call)

    def _later(self, task: object, call: Call) -> Call:
        """Start a batch later, with the context variables of now: below BaseHTTPMiddleware they are other ones."""
        variables = copy_context()

        async def start() -> None:
            restore = apply_variables(variables)
            try:
                await self._start(task, call)
            finally:
                restore()

        return start

    async def _start(self, task: object, call: Call) -> None:
        """Run a batch, maybe in a task that outlives the request."""
        self.request.begin_batch(of_response=self.response is not None)
        await self.request.parts.shutdown.run(functools.partial(self._run_batch, task, call))

    async def _run_batch(self, background: object, call: Call) -> None:
        batch = Batch(self.request.parts.lifecycle, background)
        here, outer = Serving(self.request, self.response, batch), serving_here.get()
        serving_here.set(here)
        error: BaseException | None = None
        self.request.guarded("start of the batch", self._begin, background)
        try:
            await here._run_next(background, call, batch)
        except BaseException as raised:
            error = raised
        try:
            await batch.finish(error)
        finally:
            here.batch = None  # the context may outlive the batch
            serving_here.set(outer)
            owed = self.request.guarded("end of the batch", self.request.end_batch, batch, error)
            del error  # its traceback holds this frame
        if owed is not None:
            await self.request.compensate(owed)

    def _begin(self, background: object) -> None:
        """A batch starts."""
        self.request.parts.batch_started()
        if self.response is None:  # user code is the caller: no policy applies
            for run in self.request.waiting:
                if run.background is background or run.target is background:
                    run.observe_only()
            return
        known = {id(run.target): run.info.priority for run in self.request.waiting}
        if any(known.values()) and is_container(background):
            resolve = self.request.parts.scheduler.priority_of
            sort_by_priority(background, lambda task: known[id(task)] if id(task) in known else resolve(work_of(task)))
            # So that each is found at the front when its turn comes.
            self.request.waiting = sorted(self.request.waiting, key=lambda run: run.info.priority)

    async def _run_next(self, task: object, call: Call, batch: Batch) -> None:
        """A framework's container runs by its own loop, anything else is one run."""
        if is_container(task):
            await call()
            return
        run = self.request.take(task) or self.request.guarded("late task", self._schedule_late, task, batch)
        if run is None:
            if id(task) not in self.request.refused:  # not observed
                await call()
            return
        try:
            await batch.run(run)
        finally:
            if run.outcome is None and not run.attempt:  # cancelled before its turn: the end of the batch decides why
                self.request.waiting.insert(0, run)

    def _schedule_late(self, task: object, batch: Batch) -> Run | None:
        """Schedule a task that was added, or served again, without being seen before its turn."""
        if id(task) in self.request.refused:
            return None
        run = self.request.schedule_or_refuse(task, batch.background)
        if run is not None:
            run.queued_s = _clock.monotonic()
            if self.response is None:
                run.observe_only()
        return run


async def run_child(request: Request, work: Work, parent: TaskRun, call: Callable[[], Awaitable[Any]]) -> Any:
    """User code awaits a task inside a run."""
    waiting = request.take(work.target)
    if waiting is not None:  # an injected one, which is thereby run
        waiting.observe_only()
        await request.parts.lifecycle.live(waiting)
        return None
    results: list[Any] = []

    async def call_and_keep() -> object:
        results.append(await call())
        return results[0]

    seen = Work(work.target, work.func, (), {}, work.whole, call_and_keep)
    run = request.parts.scheduler.schedule(request, seen, None, parent=parent)
    if run is None:
        return await call()
    await request.parts.lifecycle.live(run)
    return results[0]


def run_child_sync(request: Request, work: Work, parent: TaskRun, call: Callable[[], T]) -> T:
    """User code calls a sync function inside a run, maybe in a thread."""
    run = request.parts.scheduler.schedule(request, work, None, parent=parent)
    return call() if run is None else request.parts.lifecycle.observe_sync(run, call)


#: Context variables leak (CPython #140947), so this alone decides nothing: `Serving.carries` goes by identity.
serving_here: ContextVar[Serving | None] = ContextVar("aftertask_serving", default=None)


class OutsideOfAnyRequest:
    """Nothing that runs inside belongs to a request or a run of ours."""

    def __enter__(self) -> None:
        self._run, self._serving = running.get(), serving_here.get()
        if self._run is not None:
            running.set(None)
        if self._serving is not None:
            serving_here.set(None)

    def __exit__(self, *raised: object) -> None:
        if self._run is not None:
            running.set(self._run)
        if self._serving is not None:
            serving_here.set(self._serving)
