"""Where the code is in serving a request, and the running of its backgrounds."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextvars import ContextVar, copy_context

from .. import _clock
from .._taskrun import running
from .background import BareCallable, background_of, is_container
from .batch import Batch
from .lifecycle import apply_variables
from .request import Request
from .run import Run

Call = Callable[[], Awaitable[None]]


class Serving:
    """
    Where this code is in serving a request; kept in a context variable.

    Attributes:
        request: The request.
        response: The response that is being sent here; None outside of one.
        computed: Whether the response's class computes its background, so that any task called here is its own.
        bare: What stands in for the response's background; None if nothing does.
        batch: The batch that runs here; None outside of one.
        background: The background whose runs the batch holds.
    """

    __slots__ = ("background", "bare", "batch", "computed", "request", "response")

    def __init__(
        self, request: Request, response: object = None, bare: BareCallable | None = None, *, computed: bool = False
    ) -> None:
        self.request, self.response = request, response
        self.bare = bare
        self.computed = computed
        self.batch: Batch | None = None
        self.background: object = None

    def leave(self) -> None:
        """The response has been sent; the context variable may still refer to this."""
        self.computed = False
        if self.bare is not None:
            self.bare.leave(self.response)

    def carries(self, task: object) -> bool:
        """Whether a task that is called here belongs to the request."""
        if self.batch is not None or self.computed:
            return True
        if self.response is not None and background_of(self.response)[0] is task:
            return True
        return self.request.has_scheduled(task)

    async def run(self, task: object, call: Call) -> None:
        """
        The framework, or user code in its place, calls a task or a container of the request.

        Args:
            task: What is called.
            call: Calls it as if we were absent; the tasks of a container come back here one by one.
        """
        if self.batch is not None:
            await (call() if is_container(task) else self._run_one(task, call, self.batch))
            return
        if self.response is not None and self.request.must_wait(task):
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
        """Run a batch, in the lifespan's task group if it may outlive the request."""
        self.request.begin_batch(of_response=self.response is not None)
        shutdown = self.request.parts.shutdown
        if shutdown.supervises:
            await shutdown.supervise(lambda: self._run_supervised(task, call))
        else:
            await self._run_batch(task, call)

    async def _run_supervised(self, background: object, call: Call) -> None:
        """Run a batch in a task that may outlive the request."""
        owed = None
        try:
            await self._run_batch(background, call)
        finally:
            owed = self.request.responded(None)
        if owed is not None:
            await self.request.compensate(owed)

    async def _run_batch(self, background: object, call: Call) -> None:
        """Run a background: a framework's container by its own loop, anything else as one run."""
        here = Serving(self.request, self.response, computed=self.computed)
        batch = here.batch = Batch(self.request.parts.lifecycle)
        here.background = background
        outer = serving_here.get()
        serving_here.set(here)
        error: BaseException | None = None
        self.request.guarded("start of the batch", self._begin, background)
        try:
            await (call() if is_container(background) else here._run_one(background, call, batch))
        except BaseException as raised:
            error = raised
        try:
            await batch.finish(error)
        finally:
            here.batch = None  # the context may outlive the batch
            serving_here.set(outer)
            self.request.guarded("end of the batch", self.request.end_batch, batch, background, error)
            del error  # its traceback holds this frame

    def _begin(self, background: object) -> None:
        """A batch starts."""
        self.request.parts.batch_started()
        if self.response is None:  # user code is the caller: no policy applies
            for run in self.request.waiting:
                if run.background is background or run.target is background:
                    run.observe_only()
            return
        if is_container(background):
            self.request.sort(background)

    async def _run_one(self, task: object, call: Call, batch: Batch) -> None:
        run = self.request.take(task) or self.request.guarded("late task", self._schedule_late, task)
        if run is None:
            if id(task) not in self.request.refused:  # not observed
                await call()
            return
        try:
            await batch.run(run)
        finally:
            if run.outcome is None and not run.attempt:  # cancelled before its turn: the end of the batch decides why
                self.request.waiting.insert(0, run)

    def _schedule_late(self, task: object) -> Run | None:
        """Schedule a task that was added, or served again, without being seen before its turn."""
        if id(task) in self.request.refused:
            return None
        run = self.request.schedule_or_refuse(task, self.background)
        if run is not None:
            run.queued_s = _clock.monotonic()
            if self.response is None:
                run.observe_only()
        return run


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
