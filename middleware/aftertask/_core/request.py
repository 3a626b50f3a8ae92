"""What one request scheduled, which of it runs, and why the rest never ran."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import Context, copy_context
from typing import Any, TypeVar

from starlette.background import BackgroundTasks
from starlette.types import Message, Send

from .. import _clock
from .._log import log
from .._taskrun import RequestInfo, TaskRun, current_run
from .._text import error_type
from ..events import HazardFound
from . import advice
from .background import Work, leaves, work_of
from .batch import Batch
from .owed import OWED, Owed
from .parts import Parts, Scope
from .reasons import HANDLER_FAILED, Phase, reason_of
from .route import http_route
from .run import Run
from .schedule import REFUSALS

T = TypeVar("T")

#: The messages of the server that start a response, and those that can end it.
_STARTS = frozenset({"http.response.start", "websocket.http.response.start"})
_BODIES = frozenset({"http.response.body", "websocket.http.response.body", "http.response.pathsend"})

#: The component that errors of the interception are counted under.
COMPONENT = "aftertask.interception"


class Request(RequestInfo):
    """
    The record of one request: what it scheduled, and what became of it.

    Args:
        parts: The app's parts.
        scope: The ASGI scope.
        context: The context variables when the request reached the middleware.

    Attributes:
        phase: How far the request has come.
        waiting: The runs whose turn has not come, in the order of scheduling.
        refused: The tasks that were not accepted, by identity.
        held: The batches that wait until the call of the app has returned.
        containers: The containers that FastAPI injected, by identity.
        adding: Held while a task is added to one of them.
    """

    # What most requests never need is a default of the class.
    phase = Phase.SCHEDULED
    solved: Mapping[tuple[object, ...], object] | None = None  # FastAPI's cache of dependencies, until the response
    refused: frozenset[int] = frozenset()
    _verdict: str | None = None  # why injected tasks will not run, once that is certain
    _answered: str | None = None  # the class of the exception that the app has responded to
    _batches = 0
    _early: Run | None = None
    _is_described = False
    held: tuple[tuple[object, Callable[[], Awaitable[None]]], ...] = ()
    _refusal: Exception | None = None  # of a run that had to be kept

    def __init__(self, parts: Parts, scope: Scope, context: Context) -> None:
        self.parts, self.scope, self.context = parts, scope, context
        self.app, self.redact = parts.emit, parts.emit.redact
        self.thread = threading.get_ident()
        self.waiting: list[Run] = []
        # By identity: a user's class may define equality.
        self.containers: dict[int, BackgroundTasks] = {}
        self.adding = threading.RLock()  # the threads of an endpoint may add tasks at the same time
        self._finished: dict[int, object] = {}  # backgrounds whose batch is over

    def __deepcopy__(self, memo: object) -> Request:
        """A copied scope belongs to the same request."""
        return self

    @property
    def is_closed(self) -> bool:
        """Whether the call of the app has returned."""
        return self.phase >= Phase.CLOSED

    @property
    def admits(self) -> bool:
        """Whether the response is still to start."""
        return self.phase in (Phase.SCHEDULED, Phase.UNANSWERED)

    # --- the response, seen through its messages

    def watch(self, send: Send) -> Send:
        """A `send` that notices when the response starts and when its last byte has been sent."""

        async def watched(message: Message) -> None:
            kind = message["type"]
            if kind in _STARTS:
                if self.phase is Phase.SCHEDULED:
                    self.phase = Phase.ADMITTING
                    if self._refusal is not None or self.waiting:
                        message = await self._admit(message)
                await send(message)
                self.phase = max(self.phase, Phase.RESPONDING)
            elif kind in _BODIES and not message.get("more_body", False):
                # Before it is sent: a middleware around us may go on with it before our `send` returns.
                self.phase = max(self.phase, Phase.SERVING)
                await send(message)
                self.phase = max(self.phase, Phase.COMPLETE)
                self._queue()
            else:
                await send(message)

        return watched

    async def _admit(self, message: Message) -> Message:
        """
        Await the admissions of the runs that the response carries, and name the runs in its header.

        Raises:
            Exception: The response must not start: a run that had to be kept was refused, or an admission raised.
        """
        runs = list(self.waiting)
        try:
            if self._refusal is not None:
                raise self._refusal
            await self.parts.emit.admit(runs)
        except Exception as error:
            self._refusal = None
            # An error page may still be sent: by then they have ended, and are not admitted again.
            self._end_unstarted([run for run in runs if run.is_kept and self._take_back(run)], "handler_error", error)
            raise
        if self.parts.run_ids_header is None:
            return message
        name, ids = self.parts.run_ids_header.lower(), ", ".join(run.id for run in runs)
        return {**message, "headers": [*message.get("headers", ()), (name.encode("latin-1"), ids.encode("latin-1"))]}

    def withdraw(self, run: TaskRun) -> bool:
        """Drop a run that waits for its turn; False if it does not wait here."""
        if not isinstance(run, Run) or not self._take_back(run):
            return False
        self.parts.emit(run.drop("cancel_run"))
        run.forget()
        return True

    def _take_back(self, run: Run) -> bool:
        """Take a run that waits, so that its task is not called; False if it does not wait."""
        if run not in self.waiting:
            return False
        self.waiting.remove(run)
        self.refused |= {id(run.target)}
        return True

    def _queue(self) -> None:
        """The response has been sent: its runs wait for their turn now."""
        if self._early is not None:
            self._hazard(self._early, "started_early", advice.EARLY)
            self._early = None
        now = _clock.monotonic()
        for run in self.waiting:
            run.queued_s = now

    # --- what the hooks report

    def add(self, container: BackgroundTasks, work: Work) -> None:
        """
        A task was added to an injected container.

        Raises:
            QueueFull, NotSerializable, UnknownExecutor: The task is not accepted.
        """
        self._describe()
        run = self.parts.scheduler.schedule(self, work, container)
        if run is None:
            return
        if self.phase >= Phase.CLOSED or id(container) in self._finished:
            self._end_unstarted([run], "added_too_late", None)
            return
        if self.parts.keeps_context:
            run.variables = copy_context()
        if self.phase >= Phase.SERVING:
            run.queued_s = run.scheduled_s
        self.waiting.append(run)
        if self.scope is not None and self.scope["type"] == "websocket":
            self._hazard(run, "websocket", advice.WEBSOCKET)
        culprit = current_run()
        if culprit is not None and culprit.request is self and self._batches:
            self._hazard(culprit, "mutated_tasks", advice.MUTATED)

    def respond(self, background: object, scope: Scope) -> None:
        """A response with this background starts to be sent: its runs are scheduled."""
        if self.phase >= Phase.CLOSED:  # a response from around us, such as the error page of a 500
            self.scope, self._verdict = scope, None
        elif not self._is_described:
            self.scope = scope  # a middleware inside may have copied it before the route was found
        if self.waiting and self._verdict is None and id(background) not in self.containers:
            self._judge(background)
        if background is not None:
            self._schedule_leaves(background)

    def responded(self, error: BaseException | None) -> Owed | None:
        """A response, or a batch that outlived the request, is over; returns compensating runs that are due now."""
        if self.phase < Phase.CLOSED or self._batches:
            return None
        owed = self._settle(error)
        self.scope = None
        return owed

    def has_scheduled(self, task: object) -> bool:
        """Whether this task waits to be run, or is a container that FastAPI injected."""
        return id(task) in self.containers or any(run.target is task for run in self.waiting)

    def same_provider(self, tracer: object) -> bool:
        """Whether our own spans go where those of this OpenTelemetry tracer go."""
        return bool(self.guarded("same_provider", self.parts.emit.same_provider, tracer))

    def broken(self, on: str, error: Exception) -> None:
        """Log and count an error of the interception."""
        self.parts.emit.broken(COMPONENT, on, error)

    def guarded(self, on: str, function: Callable[..., T], *args: Any) -> T | None:
        """What a function of ours returns; None if it raises, which is logged and counted: the app goes on."""
        try:
            return function(*args)
        except Exception as error:
            self.broken(on, error)
            return None

    # --- running

    def take(self, task: object) -> Run | None:
        """The next run of this task, whose turn has come; None if none waits."""
        for at, run in enumerate(self.waiting):
            if run.target is task:
                del self.waiting[at]
                return run
        return None

    def _schedule_leaves(self, background: object) -> None:
        """Schedule the runs of a background that are not scheduled yet; a task listed twice is two runs."""
        scheduled = Counter([id(run.target) for run in self.waiting])
        for task in leaves(background):
            if scheduled[id(task)]:
                scheduled[id(task)] -= 1
                continue
            run = self.schedule_or_refuse(task, background)
            if run is not None:
                run.queued_s = run.scheduled_s if Phase.SERVING <= self.phase < Phase.CLOSED else None
                self.waiting.append(run)

    def schedule_or_refuse(self, task: object, background: object) -> Run | None:
        """Schedule a task whose caller cannot get an error, which is logged; None if it is refused or not observed."""
        self._describe()
        work = work_of(task)
        try:
            return self.parts.scheduler.schedule(self, work, background)
        except REFUSALS as error:
            log("error", "task.refused", error_type=error_type(error), error_message=str(error))
            self.refused |= {id(task)}
            if self.admits and self.parts.scheduler.fails_request(work, error):
                self._refusal = error  # the response would promise what will not happen
            return None

    def _describe(self) -> None:
        """Read from the scope what all runs of the request share, once."""
        if self._is_described or self.scope is None:
            return
        self._is_described = True
        self.http_method = self.scope.get("method")
        self.http_route = self.guarded("route", http_route, self.scope)
        found = self.guarded("Settings.request_id", self.parts.find_request_id, self.scope)
        self.request_id = None if found is None else str(found)

    # --- the end

    def must_wait(self, background: object) -> bool:
        """Whether a batch starts only when the call of the app has returned."""
        if self.phase >= Phase.CLOSED:
            return False
        if self.parts.runs_after_request:
            return True
        return self.parts.keeper is not None and any(run.info.durable for run in self.waiting_for(background))

    def waiting_for(self, background: object) -> list[Run]:
        """The runs of one background that wait."""
        return [run for run in self.waiting if run.background is background]

    async def run_held(self) -> None:
        """The call of the app has returned, and nothing has failed: run the batches that were kept."""
        self.dependencies, self.solved = {}, None  # they have ended
        if self.parts.keeper is not None:
            kept = [run for background, _ in self.held for run in self.waiting_for(background) if run.info.durable]
            self.parts.keeper.confirm(kept)
        while self.held:
            (_, start), self.held = self.held[0], self.held[1:]
            await start()

    def begin_batch(self, *, of_response: bool) -> None:
        """A batch is about to run, maybe in a task that outlives the request."""
        self._batches += 1
        if of_response and self.phase < Phase.SERVING:
            self._early = next(iter(self.waiting), None)  # if the response is ever complete, the client has waited

    def end_batch(self, batch: Batch, error: BaseException | None) -> Owed | None:
        """
        End those of the batch that never started: an earlier one failed, or the request was cancelled.

        Returns:
            Compensating runs that are due now, if the batch outlived its request.
        """
        self._batches -= 1
        if self.phase < Phase.CLOSED:  # then nothing is added any more
            self._finished[id(batch.background)] = batch.background
        unstarted = self.waiting_for(batch.background)
        for run in unstarted:
            self.waiting.remove(run)
            if batch.stopped_by is not None:
                self.parts.emit(run.skip(batch.stopped_by))
                run.forget()
        if unstarted and batch.stopped_by is None:
            self._end_unstarted(unstarted, self._reason(error), error)
        return self.responded(None)

    def close(self, error: BaseException | None) -> Owed | None:
        """
        The call of the app has returned: what still waits will never run, unless its batch continues elsewhere.

        Returns:
            Compensating runs that are due now; None if there are none, or if the error response is still to be sent.
        """
        responded = error is None or self.phase >= Phase.RESPONDING or "app" not in self.scope
        owed = None
        if self.waiting:
            self._verdict = self._reason(error)
        if not self._batches:
            owed = self._settle(error) if self.waiting else None
            # The scope holds this record: what refers to the scope would be a reference cycle.
            self.scope = None
        self.phase = Phase.UNANSWERED if self.phase is Phase.SCHEDULED else Phase.CLOSED
        if owed is None:
            self.context = None
        self.containers, self._finished, self.held = {}, {}, ()
        self.dependencies, self.solved = {}, None  # they may refer to this request
        return owed if responded else None

    def _settle(self, error: BaseException | None) -> Owed | None:
        """End the runs that never started; returns those that compensate for a handler that failed."""
        unstarted, reason = self.waiting, self._reason(error)
        self.waiting = []
        compensating = [run for run in unstarted if run.resolved.run_on_error and reason in HANDLER_FAILED]
        self._end_unstarted([run for run in unstarted if run not in compensating], reason, error)
        if not compensating:
            return None
        owed = Owed(compensating, lambda runs: self._end_unstarted(runs, reason, None))
        if self.scope is not None:
            self.scope[OWED] = owed  # until the error response has been sent, maybe from around us
        return owed

    async def compensate(self, owed: Owed) -> None:
        """Run the compensating tasks of a handler that failed, now that the error response has been sent."""
        await self.parts.shutdown.run(lambda: self._compensate(owed))

    async def _compensate(self, owed: Owed) -> None:
        try:
            await owed.run(self.parts.lifecycle)
        finally:
            self.context = None

    def _end_unstarted(self, runs: Sequence[Run], reason: str, error: BaseException | None) -> None:
        if runs:
            self.parts.shutdown.end_unstarted(runs, reason, self._answered if error is None else error_type(error))

    def _judge(self, background: object) -> None:
        """Why injected tasks that wait will not run, as far as the response shows."""
        error = sys.exception()  # a response to an exception does not run the injected tasks
        if error is not None:
            self._verdict, self._answered = self._reason(error), error_type(error)
        elif background is not None and self.containers:
            self._verdict = "own_background"

    def _reason(self, error: BaseException | None) -> str:
        """The reason of `tasks_not_run_total` for runs whose request ended like this."""
        if self._verdict is not None:
            return self._verdict
        if error is None:
            return "websocket" if self._is_described and self.http_method is None else "other"
        return reason_of(error, self.phase)

    def _hazard(self, run: TaskRun, kind: str, advice: str) -> None:
        self.parts.emit(HazardFound(run, _clock.timestamp(), kind, None, advice))
