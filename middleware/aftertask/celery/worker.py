"""`instrument_worker`: gives a Celery worker the same spans, metrics and log lines as a web process."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from contextvars import Token
from dataclasses import asdict
from threading import get_ident
from weakref import WeakValueDictionary

from celery import Celery, Task, exceptions, signals
from celery.app.task import Context
from celery.signals import worker_init
from celery.worker import WorkController
from celery.worker.request import Request
from kombu.message import Message

from .. import _clock
from .._core.emit import Emitter
from .._core.run import Run
from .._log import log
from .._taskrun import TaskRun, running
from .._text import error_type
from ..errors import TaskTimeout
from ..events import HazardFound, Signal, TaskEvent
from ..hazards import Hazards, Hints
from ..policies import PolicyBook
from ..settings import Settings, disabled
from ..signals import Logs, Metrics
from ..signals.exposition import serve
from ..signals.families import NO_TASK
from ..signals.messaging import WorkerTracing, flush
from .checks import risks
from .header import NAME
from .letters import COMPONENT, REASONS, UNKNOWN_TASK, Letter, Letters
from .publishing import observe_publishing
from .runs import ENGINE, Runs, is_first, is_redelivered, raised
from .tasks import Offloaded, register

#: Seconds that a process of the pool, when it ends, gives the export of its last spans.
FLUSH = 5.0

_REDELIVERED = (
    "the broker delivered its message again: its worker died, or did not finish within the visibility timeout; make "
    "the task idempotent, or raise that timeout above its longest run"
)


def instrument_worker(
    app: Celery,
    *,
    settings: Settings | None = None,
    signals: Iterable[Signal | Callable[[TaskEvent], object]] | None = None,
    metrics_port: int | None = None,
    metrics_address: str = "127.0.0.1",
) -> None:
    """
    Observe every task of a Celery app, where it is sent and where it is executed; call it where the app is created.

    For a prefork worker, set `PROMETHEUS_MULTIPROC_DIR` to an empty directory; otherwise a scrape sees none of its
    processes. With `AFTERTASK_DISABLED=1` the call does nothing, and so does a second call in one process.

    Args:
        app: The Celery app.
        settings: None means `Settings.from_env()`. The worker uses `registry`, `tracer_provider`, `trace`, `redact`,
            `policies` and `success_log_rate`.
        signals: The signals that receive every event; None means spans, metrics and log lines.
        metrics_port: Port on which the worker's main process serves the metrics of all its processes; None: no port.
        metrics_address: Address on which that port is opened.
    """
    if disabled() or _instrumented:
        return
    _instrumented.append(app)
    settings = Settings.from_env() if settings is None else settings
    system = observe_publishing(app, settings.tracer_provider, spans=settings.trace != "none").system
    observers = None if signals is None else list(signals)

    def start(sender: WorkController, **_: object) -> None:
        # A class, or its short name.
        pool = getattr(sender.pool_cls, "__module__", str(sender.pool_cls)).rpartition(".")[2]
        if not _workers:  # a worker that is embedded in another program may start a second time
            _workers.append(Worker(app, settings, observers, (metrics_address, metrics_port), system=system, pool=pool))

    worker_init.connect(start, weak=False)


class Worker:
    """
    Turns Celery's signals into events; made in a worker's main process, before that starts its pool.

    Args:
        app, settings, observers: As in `instrument_worker`, which calls the observers `signals`.
        address: Where the metrics are served; without a port they are not.
        system: The broker's name.
        pool: The pool's short name, such as `prefork`.
    """

    def __init__(
        self,
        app: Celery,
        settings: Settings,
        observers: list[Signal | Callable[[TaskEvent], object]] | None,
        address: tuple[str, int | None],
        *,
        system: str,
        pool: str,
    ) -> None:
        self._app, self._settings, self._address, self._system, self._pool = app, settings, address, system, pool
        self._hazards = Hazards(None)  # a worker has no event loop that serves others
        #: The runs that execute here, by message and thread, and what was current before each.
        self._here: dict[tuple[str, int], tuple[Run, Token[TaskRun | None]]] = {}
        #: What this main process has received, while Celery knows it: when a process that was killed began its run.
        self._received: WeakValueDictionary[str, Request] = WeakValueDictionary()
        book = PolicyBook(settings.policies)
        if observers is None:
            observers = [
                WorkerTracing(settings.tracer_provider, trace=settings.trace),
                Metrics(settings.registry, tasks=book.named, engine=ENGINE),
                Logs(success_log_rate=settings.success_log_rate),
            ]
        self._emit = Emitter([Hints(self._hazards), *observers, self._hazards], settings.redact)
        self._hazards.attach(self._emit)
        self._letters = Letters(app, system, self._emit)
        register(app, book, self._emit)
        self._runs = Runs(book, self._emit, system=system, executor=pool)
        for signal, receiver in (
            (signals.worker_ready, self._ready),
            (signals.worker_process_shutdown, self._process_ends),
            (signals.worker_shutdown, self._process_ends),
            (signals.task_received, self._receive),
            (signals.task_prerun, self._prerun),
            (signals.task_postrun, self._postrun),
            (signals.task_retry, self._retry),
            (signals.task_failure, self._failure),
            (signals.task_revoked, self._revoked),
            (signals.task_unknown, self._unknown),
        ):
            signal.connect(self._guarded(receiver), weak=False)

    # --- the processes of a worker

    def _ready(self, **_: object) -> None:
        """The main process has started its pool, and knows every task: their series exist from now on, at 0."""
        for name, task in self._app.tasks.items():
            if not name.startswith("celery."):
                resolved = self._runs.resolve(task)
                for reason in REASONS if isinstance(task, Offloaded) and resolved.observe else ():
                    self._letters.count(resolved.info.task, reason, 0)
        self._letters.count(NO_TASK, UNKNOWN_TASK, 0)
        self._emit.each("open", lambda signal: None if signal is self._hazards else signal.open())
        if self._pool == "prefork" and "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            advice = "a scrape sees no process of the pool; set PROMETHEUS_MULTIPROC_DIR to an empty directory"
            log("warning", "metrics.several_workers", workers=self._app.conf.worker_concurrency, advice=advice)
        ours = {name: task.policy for name, task in self._app.tasks.items() if isinstance(task, Offloaded)}
        for risk in risks(self._app, ours, system=self._system, pool=self._pool):
            message = functools.partial("worker.setting {}".format, risk.text())
            log("warning", "worker.setting", message=message, **asdict(risk))
        host, port = self._address
        if port is not None:
            try:
                serve(self._settings.registry, host, port)
            except OSError as error:
                self._emit.broken(COMPONENT, f"metrics on {host}:{port}", error)

    def _process_ends(self, **_: object) -> None:
        """A process of the pool, or the main one, ends: anything it has not sent or exported would be lost."""
        self._letters.close(FLUSH)
        flush(self._settings.tracer_provider, FLUSH)

    # --- a run, in the process that executes it

    def _receive(self, request: Request, **_: object) -> None:
        self._received[request.id] = request

    def _prerun(self, task_id: str, task: Task, **_: object) -> None:
        if task.request.is_eager:  # called in this process, by user code
            return
        run = self._runs.run(task, task.request)
        if run is None:
            return
        self._hazards.watch_runs()
        if is_first(task.request):
            self._emit(run.scheduled())
        else:
            self._emit.arrived(run)
        self._here[task_id, get_ident()] = run, running.set(run)
        self._emit(run.begin())
        run.thread = get_ident()
        if is_redelivered(task.request):
            self._emit(HazardFound(run, _clock.timestamp(), "redelivered", None, _REDELIVERED))

    def _current(self, task_id: str | None) -> Run | None:
        run, _ = self._here.get((task_id or "", get_ident()), (None, None))
        return run if run is not None and run.outcome is None else None

    def _retry(self, sender: Task, request: Context, reason: exceptions.Retry | None = None, **_: object) -> None:
        if reason is None:  # a cold shutdown has killed the process of a run; Celery calls that a retry, and sends none
            self._end_elsewhere(sender, request, exceptions.WorkerShutdown())
        elif (run := self._current(request.id)) is not None:
            error = raised(request, reason.exc if isinstance(reason.exc, BaseException) else reason)
            delay_s = reason.when if isinstance(reason.when, (int, float)) else 0.0
            self._emit(run.retrying(error, self._emit.failure(error), float(delay_s)))
            self._leave(run)

    def _failure(self, sender: Task, task_id: str, exception: BaseException, **_: object) -> None:
        run = self._current(task_id)
        if run is not None:
            error = raised(sender.request, exception)
            self._fail(run, error)
            self._bury(sender, run, sender.request, error, later=False)
        # A message ends where Celery makes it the current one. Without that it reports a hard time limit a second time,
        # also of a message that it has requeued, a rejected message, and a result that could not be stored.
        elif sender.request.id == task_id and not sender.request.is_eager:
            self._end_elsewhere(sender, sender.request, exception)

    def _fail(self, run: Run, error: BaseException) -> None:
        failure = self._emit.failure(error)
        timed_out = isinstance(error, (exceptions.SoftTimeLimitExceeded, exceptions.TimeLimitExceeded, TaskTimeout))
        self._emit(run.time_out(failure) if timed_out else run.fail(error, failure))

    def _postrun(self, task_id: str, retval: object, state: str | None = None, **_: object) -> None:
        run, token = self._here.pop((task_id, get_ident()), (None, None))
        if run is None or token is None:
            return
        try:
            if run.outcome is not None or run.backing_off:
                return
            if state is None:  # the process ends, and the main one reports that
                self._leave(run)
            elif isinstance(retval, exceptions.Reject):
                self._leave(run) if retval.requeue else self._fail(run, retval)
            else:
                self._emit(run.succeed(None if isinstance(retval, Exception) else retval))
        finally:
            running.reset(token)
            run.forget()

    def _leave(self, run: Run) -> None:
        """The run may continue in another process; that is not decided here."""
        self._emit.departed(run)
        run.depart()

    def _bury(self, task: Task, run: Run, request: Context, error: BaseException, *, later: bool) -> None:
        """A run of `@task` that ended for good becomes a dead letter."""
        letter = task.dead_letter(run, request, error) if isinstance(task, Offloaded) else None
        if letter is not None:
            self._letters.send(letter, later=later)

    # --- a run, seen from the main process

    def _end_elsewhere(self, task: Task, request: Context, error: BaseException) -> None:
        """The process that executed a run is gone."""
        run = self._runs.run(task, request)
        if run is None:
            return
        run.attempt += 1
        began = getattr(self._received.get(run.id), "time_start", None) or _clock.timestamp()
        run.started_s = _clock.monotonic() - max(0.0, _clock.timestamp() - began)
        if isinstance(error, exceptions.WorkerLostError):
            self._emit(run.lose("crash"))
        elif isinstance(error, exceptions.WorkerShutdown):
            self._emit(run.cancel())
        else:
            self._fail(run, error)
        self._bury(task, run, request, error, later=True)
        run.forget()

    def _revoked(self, sender: Task, request: Context, terminated: bool, expired: bool, **_: object) -> None:
        run = self._runs.run(sender, request)
        if run is None:
            return
        if terminated:
            run.attempt += 1
            self._emit(run.revoke())
        else:
            if is_first(request):
                self._emit(run.scheduled())
            self._emit(run.expire() if expired else run.drop("revoked"))
        run.forget()

    def _unknown(self, sender: object, message: Message, name: str, id: str, **_: object) -> None:
        """Celery drops a message whose task it does not know; a message of `CeleryEngine` becomes a dead letter."""
        header = message.headers.get(NAME)
        if isinstance(header, Mapping) and "signature" in header:
            args, kwargs, _embedded = message.payload
            letter = Letter(name, id, args, kwargs, header, name, UNKNOWN_TASK, error_type(exceptions.NotRegistered()))
            self._letters.send(letter, later=True)

    # --- errors of ours

    def _guarded(self, receiver: Callable[..., object]) -> Callable[..., None]:
        """A receiver whose errors are logged and counted; Celery would only log them."""

        @functools.wraps(receiver)
        def guarded(**keywords: object) -> None:
            try:
                receiver(**keywords)
            except Exception as error:
                self._emit.broken(COMPONENT, receiver.__name__, error)

        return guarded


#: The app that this process observes, and what does so if the process is a worker.
_instrumented: list[Celery] = []
_workers: list[Worker] = []
