"""The end of an app: which runs hold it up, time for them to finish, and what becomes of those that never started."""

from __future__ import annotations

import queue
import threading
from collections.abc import Awaitable, Callable, Sequence

import anyio
from anyio.abc import TaskGroup

from .. import _clock
from .._log import log
from .._taskrun import in_flight
from ..events import TaskRun
from .emit import Emitter
from .loops import cancelled_from_outside
from .process import off_termination, on_termination, start_thread
from .run import Run

#: Seconds between two reports of the runs that hold up the shutdown.
REPORT_EVERY = 5.0

#: Seconds between two looks whether they have ended; only while the process is asked to end.
_LOOK_EVERY = 0.1

#: A report lists at most this many runs.
_LISTED = 50

#: Seconds that runs get for their `finally` after the drain timeout has cancelled them, and the watch to end.
_CLEANUP = 1.0

#: Seconds within which a server that cancels its requests because it ends also starts the lifespan's shutdown.
_SHUTDOWN_FOLLOWS = 0.1


class Shutdown:
    """
    One app's shutdown.

    Args:
        emit: Gets the endings of runs that never started.
        drain_timeout: Seconds that runs get to finish, and outlive the server's cancellation; None: no such time.
        report: Whether to log the runs that hold up the shutdown, from SIGTERM or SIGINT on.

    Attributes:
        stopping: Whether the app is about to end.
    """

    def __init__(self, emit: Emitter, *, drain_timeout: float | None, report: bool) -> None:
        self.stopping = False
        self._emit, self._drain_timeout = emit, drain_timeout
        self._reporter = _Reporter(self.runs) if report or drain_timeout is not None else None
        self._group: TaskGroup | None = None
        self._thread = 0
        self._batches: set[anyio.CancelScope] = set()
        self._watch: anyio.CancelScope | None = None
        self._watch_ended = anyio.Event()
        self._idle = anyio.Event()
        self._undecided: list[tuple[Run, str, str | None]] = []

    def runs(self) -> list[TaskRun]:
        """This app's runs in flight, the oldest first."""
        return [run for run in list(in_flight) if run.request.app is self._emit]

    # --- the app's lifespan

    async def lifespan(self, serve: Callable[[], Awaitable[None]]) -> None:
        """Run the app's lifespan in a task group that outlives single requests."""
        raised: BaseException | None = None
        async with anyio.create_task_group() as group:
            self._group, self._thread = group, threading.get_ident()
            try:
                await serve()
            except anyio.get_cancelled_exc_class():
                raise
            except BaseException as error:
                raised = error  # out of the group it would come as a group
            finally:
                self._group = None
                self._end_watch()
        if raised is not None:
            raise raised

    def open(self) -> None:
        """The app starts, maybe again."""
        self.stopping = False
        if self._reporter is not None:
            self._reporter.start()
            on_termination(self)

    def on_termination(self, signal_name: str) -> None:
        """The process is asked to end."""
        self.stopping = True
        if self._reporter is not None:
            self._reporter.notify(signal_name)

    async def drain(self) -> None:
        """The lifespan's shutdown has begun: give the runs their time, then cancel what is left."""
        self.on_termination("lifespan.shutdown")
        for run, _, _ in self._undecided:
            self._end(run, "", None)
        self._undecided.clear()
        self._end_watch()
        if self._group is None:
            return
        if self._watch is not None:
            # A server ends its event loop right after the shutdown: what still runs then would fail the lifespan.
            with anyio.CancelScope(shield=True), anyio.move_on_after(_CLEANUP):
                await self._watch_ended.wait()
        if (limit_s := self._drain_timeout) is None:
            await self._wait_until_idle()  # for runs that no request waits for
            return
        with _clock.move_on_after(limit_s):
            await self._wait_until_idle()
        if self._batches:
            runs = self.runs()
            log("error", "lifecycle.drain_timeout", limit_s=limit_s, inflight=len(runs), runs=_described(runs))
            for scope in list(self._batches):  # not the group, whose scope is that of the app's own shutdown, too
                scope.cancel()
            with anyio.CancelScope(shield=True), anyio.move_on_after(_CLEANUP):
                await self._wait_until_idle()

    def close(self) -> None:
        """The app has ended."""
        self.stopping = True
        if self._reporter is not None:
            off_termination(self)
            self._reporter.stop()

    def watch(self, watch: Callable[[], Awaitable[None]]) -> None:
        """Run this beside the app, until its shutdown begins."""
        assert self._group is not None  # the app has just started
        scope, ended = self._watch, self._watch_ended = anyio.CancelScope(), anyio.Event()

        async def until_shutdown() -> None:
            try:
                with scope:
                    await watch()
            finally:
                ended.set()

        self._group.start_soon(until_shutdown)

    def _end_watch(self) -> None:
        if self._watch is not None:
            self._watch.cancel()

    def start(self, batch: Callable[[], Awaitable[None]]) -> None:
        """Run a batch that belongs to no request of this process; does nothing once the app has ended."""
        if self._group is not None:
            self._supervise(self._group, batch)

    # --- batches that outlive their request

    def _group_here(self) -> TaskGroup | None:
        """The lifespan's task group; None if there is none, or if it belongs to another event loop."""
        return self._group if threading.get_ident() == self._thread else None

    async def run(self, batch: Callable[[], Awaitable[None]]) -> None:
        """
        Run a batch, and wait for it.

        With a drain timeout it runs in the lifespan's task group, where a cancelled wait leaves it running.
        """
        group = None if self._drain_timeout is None else self._group_here()
        if group is None:
            await batch()
            return
        done, raised = self._supervise(group, batch)
        await done.wait()
        if raised:
            raise raised.pop()

    def _supervise(
        self, group: TaskGroup, batch: Callable[[], Awaitable[None]]
    ) -> tuple[anyio.Event, list[BaseException]]:
        """Start a batch; the drain waits for it from this moment on."""
        done, raised = anyio.Event(), list[BaseException]()

        async def supervised() -> None:
            with scope:
                try:
                    await batch()
                except BaseException as error:
                    raised.append(error)
                    if cancelled_from_outside(error):
                        raise
                finally:
                    self._batches.discard(scope)
                    done.set()
                    if not self._batches:
                        self._idle.set()

        scope = anyio.CancelScope()
        self._batches.add(scope)
        group.start_soon(supervised)
        return done, raised

    async def _wait_until_idle(self) -> None:
        if self._batches:
            self._idle = anyio.Event()
            await self._idle.wait()

    # --- runs that never started

    def end_unstarted(self, runs: Sequence[Run], reason: str, error_type: str | None) -> None:
        """
        End runs that never started, because their request ended or because the app does.

        A server that ends cancels its requests first and starts the lifespan's shutdown immediately afterwards: runs of
        a cancelled request wait for that moment to know which of the two it was.
        """
        for run in runs:
            if run.confirmed:
                self._end(run, reason, error_type)
        runs = [run for run in runs if run.outcome is None]
        group = self._group_here()
        if reason == "request_cancelled" and not self.stopping and group is not None:
            self._undecided += [(run, reason, error_type) for run in runs]
            group.start_soon(self._decide)
            return
        for run in runs:
            self._end(run, reason, error_type)

    async def _decide(self) -> None:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(_SHUTDOWN_FOLLOWS)
        undecided, self._undecided = self._undecided, []
        for run, reason, error_type in undecided:
            self._end(run, reason, error_type)

    def _end(self, run: Run, reason: str, error_type: str | None) -> None:
        if run.confirmed:
            self._emit(run.hand_over())
        else:
            self._emit(run.lose() if self.stopping else run.drop(reason, error_type))
        run.forget()


class _Reporter:
    """Logs, from a thread of its own, which runs hold up the shutdown."""

    def __init__(self, runs: Callable[[], list[TaskRun]]) -> None:
        self._runs = runs
        # A signal handler may interrupt anything: `put` of this queue takes no lock that could be held then.
        self._notices: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._notices = queue.SimpleQueue()
            self._thread = start_thread("shutdown", self._report)

    def notify(self, reason: str) -> None:
        self._notices.put(reason)

    def stop(self) -> None:
        self._notices.put(None)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(1.0)

    def _report(self) -> None:
        reason = self._notices.get()
        began_s = _clock.monotonic()
        report_at, reported = 0.0, False
        while reason is not None and (runs := self._runs()):
            now = _clock.monotonic()
            if now >= report_at:
                report_at, reported = now + REPORT_EVERY, True
                waited_s = round(now - began_s, 3)
                log(
                    "info",
                    "lifecycle.draining",
                    reason=reason,
                    inflight=len(runs),
                    waited_s=waited_s,
                    runs=_described(runs),
                )
            try:
                reason = self._notices.get(timeout=_LOOK_EVERY)
            except queue.Empty:
                pass
        if reported and not self._runs():
            log("info", "lifecycle.drained", waited_s=round(_clock.monotonic() - began_s, 3))


def _described(runs: Sequence[TaskRun]) -> list[dict[str, object]]:
    """Runs in flight as plain values for a log line; at most 50."""
    now = _clock.monotonic()
    return [
        {
            "task": run.task,
            "run_id": run.id,
            "state": run.state,
            "age_s": round(now - (run.scheduled_s if run.started_s is None else run.started_s), 3),
            "http_route": run.http_route,
            **({} if run.progress is None else {"progress": run.progress.text}),
            **({"notes": notes} if (notes := run.notes) else {}),
        }
        for run in runs[:_LISTED]
    ]
