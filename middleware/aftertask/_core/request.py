"""What one request scheduled, which of it runs, and why the rest never ran."""

from __future__ import annotations

import enum
import itertools
import sys
import threading
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.background import BackgroundTasks
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message, Send
from starlette.websockets import WebSocketDisconnect

from .. import _clock
from .._log import log
from .._taskrun import RequestInfo, TaskRun, current_run
from .._text import error_type
from ..errors import AftertaskError, NotSerializable, QueueFull
from ..events import HazardFound
from .background import Work, background_of, is_container, leaves, sort_by_priority, work_of
from .batch import Batch
from .emit import Emitter
from .executors.process import check_serializable
from .lifecycle import Lifecycle
from .resolver import Resolver
from .route import http_route
from .run import Run
from .shutdown import Shutdown

T = TypeVar("T")

Scope = MutableMapping[str, Any]

#: The component that errors of the interception are counted under.
COMPONENT = "aftertask.interception"

_STARTS = frozenset({"http.response.start", "websocket.http.response.start"})
_BODIES = frozenset({"http.response.body", "websocket.http.response.body", "http.response.pathsend"})

#: The reasons for which a handler, or what came before it, failed; its compensating tasks run then.
_HANDLER_FAILED = frozenset({"http_exception", "validation", "handler_error"})

_WEBSOCKET = (
    "FastAPI never runs the tasks that are injected into a WebSocket endpoint: await the function there, or start it "
    "in a task group of your own"
)
_MUTATED = (
    "it adds a task to the batch that it runs in, which works only because Starlette happens to loop over the same "
    "list: call the function in this task, or add both in the endpoint"
)
_EARLY = (
    "it started before the response was complete, so the client waits for it, and its failure can cut the response "
    "off: a middleware holds the response back (several BaseHTTPMiddleware do, on Starlette before 1.7): update "
    "Starlette, or let that middleware pass each message on"
)


class Phase(enum.Enum):
    """How far a request has come."""

    SCHEDULED = "nothing has been sent"
    RESPONDING = "the response has started"
    SERVING = "the response is complete; its tasks run"
    CLOSED = "the call of the app has returned"


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """
    The parts of one app that a request works with.

    Attributes:
        find_request_id: `Settings.request_id`.
        keeps_context: Whether tasks get the endpoint's context variables (`Settings(context="endpoint")`).
        run_ids_header: `Settings.run_ids_header`.
        batch_started: Called on the event loop before a batch starts.
    """

    emit: Emitter
    resolver: Resolver
    lifecycle: Lifecycle
    shutdown: Shutdown
    find_request_id: Callable[[Scope], object]
    keeps_context: bool
    run_ids_header: str | None
    batch_started: Callable[[], None]


class Serving:
    """
    Where this code is in serving a request; the hooks keep it in a context variable.

    Attributes:
        response: The response that is being sent here; None outside of one.
        computed: Whether the response's class computes its background, so that any task called here is its own.
        batch: The batch that runs here; None outside of one.
        background: The background whose runs the batch holds.
    """

    __slots__ = ("background", "batch", "computed", "request", "response")

    def __init__(self, request: Request, response: object = None, *, computed: bool = False) -> None:
        self.request = request
        self.response = response
        self.computed = computed
        self.batch: Batch | None = None
        self.background: object = None

    def carries(self, task: object) -> bool:
        """Whether a task that is called here belongs to the request."""
        if self.batch is not None or self.computed:
            return True
        if self.response is not None and background_of(self.response)[0] is task:
            return True
        return self.request.has_scheduled(task)


#: Context variables leak (CPython #140947), so this alone decides nothing: `Serving.carries` goes by identity.
serving_here: ContextVar[Serving | None] = ContextVar("aftertask_serving", default=None)


class Request(RequestInfo):
    """
    The record of one request: what it scheduled, and what became of it.

    Args:
        parts: The app's parts.
        scope: The ASGI scope.
        context: The context variables when the request reached the middleware.
    """

    def __init__(self, parts: Parts, scope: Scope, context: Context) -> None:
        self.phase = Phase.SCHEDULED
        self.app = parts.emit
        self.scope = scope
        self.context = context
        self.thread = threading.get_ident()
        self._parts = parts
        self._waiting: dict[int, list[Run]] = {}
        self._containers: list[BackgroundTasks] = []
        self._finished: list[object] = []  # backgrounds whose batch is over
        self._refused: set[int] = set()
        self._verdict: str | None = None
        self._batches = 0
        self._early: Run | None = None
        self._described = self._prioritised = False

    def __deepcopy__(self, memo: object) -> Request:
        """A copied scope belongs to the same request."""
        return self

    @property
    def is_closed(self) -> bool:
        """Whether the call of the app has returned."""
        return self.phase is Phase.CLOSED

    # --- the response, seen through its messages

    def watch(self, send: Send) -> Send:
        """A `send` that notices when the response starts and when its last byte has been sent."""

        async def watched(message: Message) -> None:
            kind = message["type"]
            if kind in _STARTS and self._waiting:
                message = await self._admit(message)
            await send(message)
            if kind in _STARTS:
                self._reach(Phase.RESPONDING)
            elif kind in _BODIES and not message.get("more_body", False):
                self._complete()

        return watched

    async def _admit(self, message: Message) -> Message:
        """Await the admissions of the runs that the response carries, and name the runs in its header."""
        runs = self._unstarted()
        await self._parts.emit.admit(runs)
        name = self._parts.run_ids_header
        if name is None:
            return message
        value = ", ".join(run.id for run in runs)
        header = name.lower().encode("latin-1"), value.encode("latin-1")
        return {**message, "headers": [*message.get("headers", ()), header]}

    def _complete(self) -> None:
        self._reach(Phase.SERVING)
        if self._early is not None:
            self._hazard(self._early, "started_early", _EARLY)
            self._early = None
        now = _clock.monotonic()
        for run in self._unstarted():
            run.queued_s = now

    def _reach(self, phase: Phase) -> None:
        if self.phase is not Phase.CLOSED:
            self.phase = phase

    # --- what the hooks report

    def inject(self, container: BackgroundTasks, exits: object) -> None:
        """FastAPI created this container for the request; on `exits` are the exits of its dependencies."""
        self._containers.append(container)
        self.exits = exits

    def add(self, container: BackgroundTasks, work: Work) -> None:
        """
        A task was added to an injected container.

        Raises:
            QueueFull, NotSerializable: The task is not accepted; the run has been rejected.
        """
        run = self.schedule(work, container)
        if run is None:
            return
        if self.phase is Phase.CLOSED or any(container is done for done in self._finished):
            self._end_unstarted([run], "added_too_late", None)
            return
        if self._parts.keeps_context:
            run.variables = copy_context()
        if self.phase is Phase.SERVING:
            run.queued_s = run.scheduled_s
        self._waiting.setdefault(id(work.target), []).append(run)
        if self.scope is not None and self.scope["type"] == "websocket":
            self._hazard(run, "websocket", _WEBSOCKET)
        culprit = current_run()
        if culprit is not None and culprit.request is self and self._batches:
            self._hazard(culprit, "mutated_tasks", _MUTATED)

    def respond(self, response: object, scope: Scope) -> Serving:
        """A response starts to be sent: its background's runs are scheduled."""
        background, computed = background_of(response)
        if self.phase is Phase.CLOSED:  # a response from around us, such as the error page of a 500
            self.scope, self._verdict = scope, None
        if self._waiting and self._verdict is None:
            self._judge(background)
        if background is not None and not computed:
            self._schedule_leaves(background)
        return Serving(self, response, computed=computed)

    def responded(self, serving: Serving, error: BaseException | None) -> None:
        """A response has been sent, or has failed."""
        serving.computed = False
        if self.phase is Phase.CLOSED and not self._batches:
            self._settle(error)
            self.scope = None

    def same_provider(self, tracer: object) -> bool:
        """Whether our own spans go where those of this OpenTelemetry tracer go."""
        return self._parts.emit.same_provider(tracer)

    def broken(self, on: str, error: Exception) -> None:
        """Log and count an error of the interception."""
        self._parts.emit.broken(COMPONENT, on, error)

    def has_scheduled(self, task: object) -> bool:
        """Whether this task waits to be run, or is a container that FastAPI injected."""
        return id(task) in self._waiting or any(task is container for container in self._containers)

    async def run(self, task: Any, serving: Serving, loop: Callable[[], Awaitable[None]]) -> None:
        """
        The framework, or user code in its place, calls a task or a container of the request.

        Args:
            task: What is called.
            serving: Where it is called.
            loop: Runs a container, whose tasks come back here one by one.
        """
        if serving.batch is not None:
            await (loop() if is_container(task) else self._run_one(task, serving))
        elif self._parts.shutdown.supervises:
            self._batches += 1  # from now on: the request may end before the batch begins
            await self._parts.shutdown.supervise(lambda: self._run_supervised(task, serving, loop))
        else:
            self._batches += 1
            await self._run_batch(task, serving, loop)

    async def child(self, work: Work, parent: TaskRun, call: Callable[[], Awaitable[Any]]) -> Any:
        """User code awaits a task inside a run."""
        waiting = self._take(work.target)
        if waiting is not None:  # an injected one, which is thereby run
            waiting.observed_only = True
            await self._parts.lifecycle.live(waiting)
            return None
        results: list[Any] = []

        async def call_and_keep() -> object:
            results.append(await call())
            return results[0]

        run = self.schedule(Work(work.target, work.func, (), {}, work.whole, call_and_keep), None, parent=parent)
        if run is None:
            return await call()
        await self._parts.lifecycle.live(run)
        return results[0]

    def child_sync(self, work: Work, parent: TaskRun, call: Callable[[], T]) -> T:
        """User code calls a sync function inside a run, maybe in a thread."""
        run = self.schedule(work, None, parent=parent)
        return call() if run is None else self._parts.lifecycle.observe_sync(run, call)

    def schedule(self, work: Work, background: object, *, parent: TaskRun | None = None) -> Run | None:
        """
        A run comes into being; None if the task is not observed.

        Raises:
            QueueFull, NotSerializable: The run has been rejected.
        """
        resolved = self._parts.resolver.resolve(work.func, whole=work.whole)
        if not resolved.observe:
            return None
        self._describe()
        run = Run(resolved, self, work, parent=parent)
        run.background = background
        self._parts.emit(run.scheduled())
        if parent is None:
            self._accept(run, work)
        return run

    def _accept(self, run: Run, work: Work) -> None:
        resolved = run.resolved
        self._prioritised = self._prioritised or run.info.priority != 0
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
            self._parts.emit(run.reject("queue_full" if isinstance(error, QueueFull) else "not_serializable"))
            run.forget()
            raise

    def _describe(self) -> None:
        """Read from the scope what all runs of the request share, once."""
        if self._described or self.scope is None:
            return
        self._described = True
        self.http_method = self.scope.get("method")
        try:
            self.http_route = http_route(self.scope)
            found = self._parts.find_request_id(self.scope)
            self.request_id = None if found is None else str(found)
        except Exception as error:
            self.broken("Settings.request_id, or the route", error)

    # --- running

    async def _run_supervised(self, task: Any, serving: Serving, loop: Callable[[], Awaitable[None]]) -> None:
        """The same in a task that may outlive the request."""
        owed = None
        try:
            await self._run_batch(task, serving, loop)
        finally:
            if self.phase is Phase.CLOSED and not self._batches:
                owed = self._settle(None)
                self.scope = None
        if owed is not None:
            await self.compensate(owed)

    async def _run_batch(self, background: Any, serving: Serving, loop: Callable[[], Awaitable[None]]) -> None:
        """Run a background: a framework's container by its own loop, anything else as one run."""
        here = Serving(self, serving.response, computed=serving.computed)
        here.batch, here.background = Batch(self._parts.lifecycle), background
        outer = serving_here.get()
        serving_here.set(here)
        error: BaseException | None = None
        try:
            total = self._begin(background, serving)
            if is_container(background):
                await loop()
            else:
                await self._run_one(background, here)
        except BaseException as raised:
            error = raised
        try:
            await here.batch.finish(total, error)
        finally:
            self._end_batch(here, error)
            serving_here.set(outer)
            del error  # its traceback holds this frame

    def _begin(self, background: Any, serving: Serving) -> int:
        """A batch starts; returns the number of its runs."""
        self._parts.batch_started()
        if serving.response is None:  # user code is the caller: no policy applies
            for run in self._unstarted():
                run.observed_only = run.observed_only or run.background is background or run.target is background
        elif self.phase in (Phase.SCHEDULED, Phase.RESPONDING):
            self._early = next(iter(self._unstarted()), None)
        if self._prioritised and is_container(background):
            sort_by_priority(background, self._priority_of)
        return sum(1 for _ in leaves(background))

    async def _run_one(self, task: Any, serving: Serving) -> None:
        run = self._take(task)
        if run is None and id(task) not in self._refused:
            run = self._schedule_late(task, serving)
            if run is None and id(task) not in self._refused:
                await work_of(task).call()
        if run is None or serving.batch is None:
            return
        try:
            await serving.batch.run(run)
        finally:
            if run.outcome is None and not run.attempt:  # cancelled before its turn: the end of the batch decides why
                self._waiting.setdefault(id(task), []).insert(0, run)

    def _schedule_late(self, task: Any, serving: Serving) -> Run | None:
        """Schedule a task that was added, or served again, without being seen before its turn."""
        run = self._schedule_or_refuse(work_of(task), serving.background)
        if run is not None:
            run.queued_s = _clock.monotonic()
            run.observed_only = serving.response is None
        return run

    def _priority_of(self, task: object) -> int:
        waiting = self._waiting.get(id(task))
        if waiting:
            return waiting[0].info.priority
        work = work_of(task)
        return self._parts.resolver.resolve(work.func, whole=work.whole).info.priority

    def _take(self, task: object) -> Run | None:
        """The next run that waits for this task."""
        waiting = self._waiting.get(id(task))
        if not waiting:
            return None
        run = waiting.pop(0)
        if not waiting:
            del self._waiting[id(task)]
        return run

    def _schedule_leaves(self, background: object) -> None:
        """Schedule the runs of a background that are not scheduled yet; a task listed twice is two runs."""
        listed: dict[int, int] = {}
        for task in leaves(background):
            number = listed[id(task)] = listed.get(id(task), 0) + 1
            if number <= len(self._waiting.get(id(task), ())):
                continue
            run = self._schedule_or_refuse(work_of(task), background)
            if run is not None:
                if self.phase is Phase.SERVING:
                    run.queued_s = run.scheduled_s
                self._waiting.setdefault(id(task), []).append(run)

    def _schedule_or_refuse(self, work: Work, background: object) -> Run | None:
        """Schedule a task whose caller cannot be given an error."""
        try:
            return self.schedule(work, background)
        except (QueueFull, NotSerializable) as error:
            self._refused.add(id(work.target))
            _log_refusal(error)
            return None

    def _end_batch(self, serving: Serving, error: BaseException | None) -> None:
        """Those of the batch that never started: an earlier one failed, or the request was cancelled."""
        self._batches -= 1
        self._finished.append(serving.background)
        assert serving.batch is not None
        mine = [run for run in self._unstarted() if run.background is serving.background]
        for run in mine:
            self._take(run.target)
        culprit, serving.batch = serving.batch.stopped_by, None
        if culprit is not None:
            for run in mine:
                self._parts.emit(run.skip(culprit))
                run.forget()
        elif mine:
            self._end_unstarted(mine, self._reason(error), error)

    # --- the end

    def close(self, error: BaseException | None) -> Owed | None:
        """
        The call of the app has returned: what still waits will never run, unless its batch continues elsewhere.

        Returns:
            Compensating runs that are due now; None if there are none, or if the error response is still to be sent.
        """
        responded = error is None or self.phase is not Phase.SCHEDULED or "app" not in self.scope
        self._verdict = self._reason(error)
        owed = None
        if not self._batches:
            owed = self._settle(error)
            # The scope holds this record: what refers to the scope would be a reference cycle.
            self.scope = None
        self.phase = Phase.CLOSED
        self.exits = None
        if owed is None:
            self.context = None
        self._containers.clear()
        self._finished.clear()
        return owed if responded else None

    def _settle(self, error: BaseException | None) -> Owed | None:
        """End the runs that never started; returns those that compensate for a handler that failed."""
        unstarted, self._waiting = self._unstarted(), {}
        if not unstarted:
            return None
        reason = self._reason(error)
        compensating = [run for run in unstarted if run.resolved.run_on_error and reason in _HANDLER_FAILED]
        self._end_unstarted([run for run in unstarted if run not in compensating], reason, error)
        if not compensating:
            return None
        owed = Owed(compensating, lambda runs: self._end_unstarted(runs, reason, None))
        if self.scope is not None:
            self.scope[OWED] = owed  # until the error response has been sent, maybe from around us
        return owed

    def _end_unstarted(self, runs: Sequence[Run], reason: str, error: BaseException | None) -> None:
        if runs:
            name = None if error is None else error_type(error)
            self._parts.shutdown.end_unstarted(runs, reason, name)

    async def compensate(self, owed: Owed) -> None:
        """Run the compensating tasks of a handler that failed, now that the error response has been sent."""
        now = _clock.monotonic()
        for run in owed.runs:
            run.origin, run.queued_s = "run_on_error", now
        try:
            for run in list(owed.runs):
                try:
                    await self._parts.lifecycle.live(run)
                except Exception:  # emitted already; the server has the handler's error
                    pass
                finally:
                    if run.outcome is not None:
                        owed.runs.remove(run)
        finally:
            self.context = None
            owed.give_up()  # nothing is left unless this was cancelled

    def _judge(self, background: object) -> None:
        """Why injected tasks that wait will not run, as far as the response shows."""
        if any(background is container for container in self._containers):
            return
        error = sys.exception()  # a response to an exception does not run the injected tasks
        if error is not None:
            self._verdict = self._reason(error)
        elif background is not None and self._containers:
            self._verdict = "own_background"

    def _reason(self, error: BaseException | None) -> str:
        """The reason of `tasks_not_run_total` for runs whose request ended like this."""
        if self._verdict is not None:
            return self._verdict
        if error is None:
            return "websocket" if self.http_method is None and self._described else "other"
        if not isinstance(error, Exception):
            return "request_cancelled"
        if isinstance(error, HTTPException):
            return "http_exception" if error.status_code < 500 else "handler_error"
        if type(error).__name__ in ("RequestValidationError", "WebSocketRequestValidationError"):
            return "validation"
        if isinstance(error, (ClientDisconnect, WebSocketDisconnect)):
            return "client_gone"
        if isinstance(error, OSError) and self.phase is not Phase.SCHEDULED:
            return "client_gone"
        return "request_failed" if self.phase is Phase.SERVING else "handler_error"

    def _unstarted(self) -> list[Run]:
        return list(itertools.chain.from_iterable(self._waiting.values()))

    def _hazard(self, run: TaskRun, kind: str, advice: str) -> None:
        self._parts.emit(HazardFound(run, _clock.timestamp(), kind, None, advice))


#: Where the scope holds compensating runs until the error response has been sent.
OWED = "aftertask.owed"


class Owed:
    """
    Compensating runs that wait for the error response.

    The response may be sent by a middleware around ours, after our call has returned. If the scope is freed without
    one, they are dropped.
    """

    def __init__(self, runs: Iterable[Run], end: Callable[[Sequence[Run]], None]) -> None:
        self.runs = sorted(runs, key=lambda run: run.info.priority)
        self._end = end

    def give_up(self) -> None:
        """End those that have not run."""
        runs, self.runs = self.runs, []
        self._end(runs)

    def __del__(self) -> None:
        self.give_up()


def _log_refusal(error: AftertaskError) -> None:
    """A task that came with its response was rejected: nobody but the log can be given the error."""
    log("error", "task.refused", error_type=error_type(error), error_message=str(error))
