"""What makes background tasks fail, found by name: dead arguments, a blocked loop, starved threads, traps."""

from __future__ import annotations

from collections.abc import Iterable
from types import AsyncGeneratorType, CoroutineType, GeneratorType

from anyio import CapacityLimiter
from starlette.responses import Response

from .. import _clock
from .._core.emit import Emitter, overrides
from .._taskrun import TaskRun
from ..events import (
    Failed,
    HazardFound,
    Retrying,
    Scheduled,
    Signal,
    Started,
    Succeeded,
    TaskInfo,
    TimedOut,
)
from . import _failures
from ._arguments import Arguments
from ._block import LoopReports
from ._threads import KIND, Threads
from ._transactions import Transactions
from .loop import WATCHER
from .stuck import StuckWatch

__all__ = ["Hazards", "Hints"]

_BLOCKED = (
    "it blocks the event loop, so every request of the process waits: at {where}; make it a plain `def`, which runs in "
    "a thread, or await something that does not block"
)

#: What a task returned, and why that means that it did nothing.
_TRAPS: tuple[tuple[type, str, str], ...] = (
    (
        GeneratorType,
        "generator",
        "a generator function does nothing when it is called: loop over it in a function, and add that",
    ),
    (
        AsyncGeneratorType,
        "generator",
        "an async generator does nothing when it is called: loop over it in a coroutine, and add that",
    ),
    (CoroutineType, "unawaited_coroutine", "it returned a coroutine that is never awaited: make it `async def`"),
    (
        Response,
        "response_returned",
        "it returned a response, which goes nowhere: an endpoint was given as a task; give it the function that does "
        "the work",
    ),
)


class Hazards(Signal):
    """
    Finds what makes an app's background tasks fail, and emits `HazardFound`, `Slow` and `Stuck`.

    Args:
        threshold: `Settings.block_threshold`.
    """

    def __init__(self, threshold: float | None) -> None:
        self._threshold = threshold
        self._arguments, self._threads = Arguments(self._found), Threads()
        self._transactions = Transactions(self._found)

    @staticmethod
    def wanted_by(signals: Iterable[object]) -> bool:
        """Whether any of these signals would get what is found."""
        methods = ("hazard_found", "slow", "stuck", "loop_lag", "loop_blocked_for", "loop_blocked")
        return any(
            not isinstance(signal, Signal) or any(overrides(signal, method) for method in methods) for signal in signals
        )

    def attach(self, emit: Emitter) -> None:
        """Emit through this app's signals; call it once, before the app is built."""
        self._emit = emit
        self._transactions.listen()
        self._stuck = StuckWatch(emit)
        self._reports = LoopReports(self._threshold, emit, self._loop_blocked_by, self._look_at_threads)

    def close(self) -> None:
        """The app has stopped."""
        self._stuck.stop()
        WATCHER.unwatch(self._reports)

    def batch_started(self) -> None:
        """The app or a batch starts, maybe on an event loop that is not watched yet: watch it, and the runs."""
        WATCHER.watch(self._reports)
        self._stuck.start()

    open = batch_started

    def watch_runs(self) -> None:
        """Watch runs where no event loop of an app runs: in the worker of an engine."""
        self._stuck.start()

    def task_known(self, info: TaskInfo) -> None:
        """A task with limits of its own exists."""
        self._stuck.add(info)

    def scheduled(self, event: Scheduled) -> None:
        """Look at the arguments of a run."""
        self._arguments.look(event)

    def started(self, event: Started) -> None:
        """Look for a transaction of the request that is still open."""
        if event.run.request.dependencies:
            self._transactions.started(event.run)

    def _failed(self, event: Failed | TimedOut) -> None:
        """Look for a transaction of the request that the failure ends."""
        self._transactions.failed(event.run)

    failed = timed_out = _failed

    def succeeded(self, event: Succeeded) -> None:
        """Look at what a task returned."""
        if event.result is None:
            return
        for kind, hazard, advice in _TRAPS:
            # By its type: a mock says that it is of any class.
            if issubclass(type(event.result), kind) and not isinstance(event.run.target, Response):
                self._found(event.run, hazard, None, advice)

    def hint(self, run: TaskRun, error: BaseException) -> str | None:
        """The likely cause of a failure, if it is an argument; one that was dead is emitted as a hazard, too."""
        misplaced = _failures.misplaced_option(error, getattr(run.target, "kwargs", None))
        if misplaced is not None:
            return misplaced
        kinds = _failures.closed_kinds(error)
        found = self._arguments.suspect(run, kinds) if kinds else None
        if found is None and _failures.is_detached(error):
            found = (None, *_failures.DETACHED)
        if found is None:
            return None
        argument, kind, advice = found
        self._found(run, kind, argument, advice)
        return advice if argument is None else f"argument {argument!r}: {advice}"

    def _loop_blocked_by(self, run: TaskRun, where: str, stack: str) -> None:
        if run.request.app is self._emit:
            self._emit(HazardFound(run, _clock.timestamp(), "blocked_loop", None, _BLOCKED.format(where=where), stack))

    def _look_at_threads(self, threads: CapacityLimiter) -> None:
        found = self._threads.look(threads)
        if found is not None and found[0].request.app is self._emit:
            self._found(found[0], KIND, None, found[1])

    def _found(self, run: TaskRun, kind: str, argument: str | None, advice: str) -> None:
        self._emit(HazardFound(run, _clock.timestamp(), kind, argument, advice))


class Hints(Signal):
    """Comes before the other signals, so that they find the likely cause in a failure."""

    def __init__(self, hazards: Hazards) -> None:
        self._hazards = hazards

    def _failed(self, event: Failed | TimedOut | Retrying) -> None:
        """An attempt raised, or passed its timeout."""
        event.failure.hint = self._hazards.hint(event.run, event.failure.error)

    failed = timed_out = retrying = _failed
