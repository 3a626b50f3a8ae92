"""One app's parts, wired in one place, and the way of a request through them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import copy_context

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .._taskrun import running
from ..engines import Engine
from ..policies import Policy
from .emit import Emitter
from .hooks import KEY, install
from .keeper import Keeper, StoredCall
from .lifecycle import Lifecycle
from .limits import SharedThreads
from .loops import cancelled_from_outside
from .owed import OWED
from .parts import Parts
from .request import Request
from .resolver import Resolver
from .run import Run
from .schedule import Scheduler
from .serve import Serving, serving_here
from .shutdown import Shutdown


class App:
    """
    The core of one app's middleware.

    Args:
        emit: The app's signals.
        policies, on_failure, max_waiting, thread_limit, drain_timeout, shutdown_report, request_id,
        run_ids_header, run_after, engines: As in `Settings`.
        keeps_context: Whether tasks get the endpoint's context variables.
        keeper: Keeps durable runs; None if nothing does.
        is_covered: Whether another middleware, inside, observes the tasks, so that these policies are not in force.
    """

    def __init__(
        self,
        emit: Emitter,
        *,
        policies: Mapping[str, Policy],
        on_failure: str,
        max_waiting: int | None,
        thread_limit: int,
        drain_timeout: float | None,
        shutdown_report: bool,
        request_id: Callable[[Scope], object],
        run_ids_header: str | None,
        keeps_context: bool,
        run_after: str,
        engines: Mapping[str, Engine],
        keeper: Keeper | None = None,
        is_covered: bool = False,
    ) -> None:
        self.emit = emit
        self.resolver = Resolver(
            policies,
            on_failure=on_failure,
            max_waiting=max_waiting,
            thread_limit=thread_limit,
            engines=engines,
            emitter=self.emit,
        )
        self._keeper, self._is_covered = keeper, is_covered
        self.shutdown = Shutdown(self.emit, drain_timeout=drain_timeout, report=shutdown_report)
        self._parts = Parts(
            emit=emit,
            scheduler=Scheduler(emit, self.resolver, keeper),
            lifecycle=Lifecycle(self.emit, self.resolver.threads, keeper),
            shutdown=self.shutdown,
            find_request_id=request_id,
            keeps_context=keeps_context,
            run_ids_header=run_ids_header,
            keeper=keeper,
            runs_after_request=run_after == "request",
            batch_started=self._batch_started,
        )
        self._threads: SharedThreads | None = None
        self._is_open = False
        install()

    async def serve(self, inner: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request: its record is in the scope while the app runs."""
        request = Request(self._parts, scope, copy_context())
        outer_record, outer_run, outer_serving = scope.get(KEY), running.get(), serving_here.get()
        scope[KEY] = request
        serving_here.set(Serving(request))
        if outer_run is not None:
            running.set(None)
        error: BaseException | None = None
        try:
            await inner(scope, receive, request.watch(send))
            if request.held:
                await request.run_held()
        except BaseException as raised:
            error = raised
            raise
        finally:
            owed = request.guarded("end of the request", request.close, error)
            serving_here.set(outer_serving)
            if outer_run is not None:
                running.set(outer_run)
            # The outermost record stays, and one that still owes runs: an error handler around us is still to respond.
            if outer_record is not None and (error is None or OWED not in scope):
                scope[KEY] = outer_record
            del error  # its traceback holds this frame
            if owed is not None:
                await request.compensate(owed)

    async def serve_unobserved(self, inner: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request whose tasks are left alone."""
        outer_record = scope.pop(KEY, None)
        try:
            await inner(scope, receive, send)
        finally:
            if outer_record is not None:
                scope[KEY] = outer_record

    async def lifespan(self, inner: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the lifespan: the app's own start and end are those of the signals."""
        is_open = False

        async def watched_send(message: Message) -> None:
            await send(message)
            if message["type"] == "lifespan.startup.complete" and is_open:
                self._watch_stored()  # not earlier: stored runs need what the app's own startup creates

        async def watched() -> Message:
            nonlocal is_open
            message = await receive()
            if message["type"] == "lifespan.startup":
                self._open()
                is_open = True
            elif message["type"] == "lifespan.shutdown":
                await self.shutdown.drain()
                self._close()
                is_open = False
            return message

        try:
            await self.shutdown.lifespan(lambda: inner(scope, watched, watched_send))
        finally:
            if is_open:  # it failed to start, or ended without being asked to
                self._close()

    def _batch_started(self) -> None:
        if not self._is_open:  # the server does not run the lifespan
            self._measure_threads()
            self.emit.batch_started()

    def _measure_threads(self) -> None:
        """Have the thread pool of this event loop measured."""
        if self._threads is None or not self._threads.is_here:
            self._threads = SharedThreads()
            self.emit.pool_known(self._threads, threads=True)

    def _open(self) -> None:
        self._is_open = True
        if not self._is_covered:
            self.resolver.log_policies()
        self._measure_threads()
        self.shutdown.open()
        self.emit.open()

    def _watch_stored(self) -> None:
        if (keeper := self._keeper) is not None:
            self.shutdown.watch(lambda: keeper.watch(self._start_stored, self.resolver.waiting_tasks))

    def _start_stored(self, call: StoredCall) -> None:
        run = self._parts.scheduler.restore(call)
        self.shutdown.start(lambda: self._run_stored(run))

    async def _run_stored(self, run: Run) -> None:
        """Run what the keeper had; what the task raises has been emitted, and has no caller."""
        try:
            await self._parts.lifecycle.live(run)
        except BaseException as error:
            if cancelled_from_outside(error):
                raise
        finally:
            if run.outcome is None:  # cancelled before its turn: the keeper gets it back
                self.shutdown.end_unstarted([run], "other", None)

    def _close(self) -> None:
        self._is_open = False
        self.shutdown.close()
        self.emit.close()
