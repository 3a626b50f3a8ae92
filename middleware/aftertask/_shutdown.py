"""The end of a process: which runs hold it up is told, and they may be given time to end."""

from __future__ import annotations

import os
import queue
import signal
import threading
import weakref
from collections.abc import Awaitable, Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

import anyio
from anyio.abc import TaskGroup

from . import _clock, _timer
from ._log import emit
from ._run import _live
from .events import TaskRun

if TYPE_CHECKING:
    from ._runner import Engine

#: How often it is told which runs hold up the shutdown, in seconds.
TELL_EVERY = 5.0

#: How often it is looked whether the last one has ended, in seconds; only once the process is asked to end.
_LOOK_EVERY = 0.1

_SIGNALS = (signal.SIGTERM, signal.SIGINT)

#: So many runs are told one by one.
_AT_MOST = 50

#: What is cut off at the end of the time is given so many seconds for its `finally`.
_CLEANUP = 1.0


def runs_of(engines: Sequence[Engine]) -> list[TaskRun]:
    """The runs of these apps that have not ended, the oldest first."""
    return [run for run in list(_live) if getattr(run.request, "_engine", None) in engines]


def describe(runs: Sequence[TaskRun]) -> list[dict[str, Any]]:
    """What there is to say of each run that is still going."""
    now = _clock.monotonic()
    return [_described(run, now) for run in runs[:_AT_MOST]]


def _described(run: TaskRun, now: float) -> dict[str, Any]:
    told: dict[str, Any] = {
        "task": run.task,
        "run_id": run.id,
        "state": run.state,
        "age_s": round(now - (run.scheduled_s if run.started_s is None else run.started_s), 3),
        "http_route": run.http_route,
    }
    progress = run.progress
    if progress is not None:
        told["progress"] = progress.text
    return told


class Reporter:
    """
    Tells, from the moment the process is asked to end, which runs hold that up. One for a process.

    uvicorn comes to the lifespan's shutdown only when its tasks are over, so the signal itself is heard: what handled
    it before us handles it after us.
    """

    def __init__(self) -> None:
        self._engines: tuple[Engine, ...] = ()
        # A signal's handler may interrupt anything: this queue's `put` takes no lock that could be held then.
        self._noticed: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._told = 0.0
        self._lock = threading.Lock()

    def open(self, engine: Engine) -> None:
        """An app starts."""
        if engine not in self._engines:
            self._engines = (*self._engines, engine)
        if threading.current_thread() is threading.main_thread():  # nobody else may
            for number in _SIGNALS:
                self._chain(number)

    def close(self, engine: Engine) -> None:
        """An app has ended: the last word on what held it up."""
        self._look()
        self._engines = tuple(other for other in self._engines if other is not engine)
        if not self._engines and threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                before = handler = signal.getsignal(number)
                while isinstance(before, _Heard):
                    before = before.before
                if before is not handler:
                    signal.signal(number, before)

    def notice(self, engine: Engine, why: str) -> None:
        """This app is to end: say what holds it up."""
        engine.stopping = True
        self._start_thread()
        self._noticed.put(why)

    def heard(self, number: int) -> None:
        """The process is to end, so all of its apps; called by a signal's handler."""
        for engine in self._engines:
            engine.stopping = True
        self._noticed.put(signal.Signals(number).name)

    def _chain(self, number: int) -> None:
        before = signal.getsignal(number)
        # None: set by no Python code, so that it cannot be called; and who ignores a signal does not end by it.
        if before not in (None, signal.SIG_IGN) and not isinstance(before, _Heard):
            self._start_thread()
            signal.signal(number, _Heard(self, before))

    def _holding(self) -> list[TaskRun]:
        return runs_of([engine for engine in self._engines if engine.stopping])

    def _start_thread(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._report, name="aftertask-shutdown", daemon=True)
            self._thread.start()

    def _report(self) -> None:
        while True:
            why = self._noticed.get()
            tell_at = 0.0
            while self._holding():
                now = _clock.monotonic()
                if now >= tell_at:
                    tell_at = now + TELL_EVERY
                    self._tell(why)
                try:
                    why = self._noticed.get(timeout=_LOOK_EVERY) or why
                except queue.Empty:
                    pass
            self._look()

    def _tell(self, why: str | None) -> None:
        with self._lock:
            runs = self._holding()
            if runs:
                self._told = self._told or _clock.monotonic()
                waited = round(_clock.monotonic() - self._told, 3)
                emit("info", "lifecycle.draining", reason=why, inflight=len(runs), waited_s=waited, runs=describe(runs))

    def _look(self) -> None:
        """Where runs held up the shutdown, and none does any more, say so once."""
        with self._lock:
            if self._told and not self._holding():
                emit("info", "lifecycle.drained", waited_s=round(_clock.monotonic() - self._told, 3))
                self._told = 0.0


class _Heard:
    """
    A signal's handler, in front of the one that was there before.

    Each keeps its own: where another server in this process, or the app, has set one over ours meanwhile, and sets ours
    again or calls it, all that follow are called, each once.
    """

    def __init__(self, reporter: Reporter, before: Any) -> None:
        self._reporter, self.before = reporter, before

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self._reporter.heard(number)
        if callable(self.before):
            self.before(number, frame)
        elif self.before == signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


_reporter = Reporter()


def reporter() -> Reporter:
    """The one of this process."""
    return _reporter


def _after_fork() -> None:
    global _reporter
    _reporter = Reporter()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Supervisor:
    """
    Runs batches in tasks that the app's lifespan owns, so that they outlive a request that the server cancels.

    Args:
        group: The lifespan's.
        timeout: Seconds that they are given once the app is to end.
    """

    def __init__(self, group: TaskGroup, timeout: float) -> None:
        self._group = group
        self._timeout = timeout
        self._thread = threading.get_ident()
        self._active = 0
        self._idle: weakref.WeakSet[anyio.Event] = weakref.WeakSet()

    @property
    def is_here(self) -> bool:
        """Whether this code runs on the event loop that the group belongs to."""
        return threading.get_ident() == self._thread

    async def run(self, batch: Callable[[], Awaitable[None]]) -> None:
        """Run a batch, and wait for it; what it raises comes out. A cancelled wait leaves it running."""
        done, raised = anyio.Event(), list[BaseException]()

        async def supervised() -> None:
            try:
                await batch()
            except Exception as error:
                raised.append(error)
            except BaseException as error:
                raised.append(error)
                if isinstance(error, anyio.get_cancelled_exc_class()):
                    raise
            finally:
                self._active -= 1
                done.set()
                if not self._active:
                    for event in list(self._idle):
                        event.set()

        self._active += 1
        self._group.start_soon(supervised)
        await done.wait()
        if raised:
            raise raised.pop()

    async def drain(self, engine: Engine) -> None:
        """The app is to end: give its runs their time, then cut off what is left."""
        reporter().notice(engine, "lifespan.shutdown")
        try:
            await _timer.within(self._timeout, self._until_idle())
        except _timer.Overrun:
            runs = runs_of([engine])
            emit("error", "lifecycle.drain_timeout", limit_s=self._timeout, inflight=len(runs), runs=describe(runs))
            self._group.cancel_scope.cancel()
            with anyio.CancelScope(shield=True), anyio.move_on_after(_CLEANUP):
                await self._until_idle()

    async def _until_idle(self) -> None:
        if self._active:
            event = anyio.Event()
            self._idle.add(event)
            await event.wait()
