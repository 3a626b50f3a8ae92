"""What makes background tasks fail, told by name: dead arguments, the blocked loop, starved threads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from ..events import Failed, HazardFound, LoopListener, Retrying, Scheduled, Signal, TaskEvent, TaskRun, TimedOut
from . import _failures, _watcher
from ._arguments import Arguments
from ._blocks import Subscriber
from ._loop import Watch
from ._threads import KIND, Threads

if TYPE_CHECKING:
    from .._runner import Engine

__all__ = ["Hazards", "around"]

_PART = "aftertask.hazards"

BLOCKED = (
    "it blocks the event loop, so every request of the process waits: at {where}; make it a plain `def`, which runs in "
    "a thread, or await something that does not block"
)


def around(signals: Iterable[Signal], threshold: float | None) -> tuple[list[Signal], Hazards | None]:
    """
    The signals, and around them what finds hazards, where any of them wants to know.

    Args:
        signals: Who is told.
        threshold: Seconds from which on the event loop is blocked; None: blocked loops are not looked for.
    """
    chosen = list(signals)
    if not any(_wants(signal) for signal in chosen):
        return chosen, None
    hazards = Hazards(threshold)
    return [Hints(hazards), *chosen, hazards], hazards


def _wants(signal: object) -> bool:
    handlers = getattr(signal, "handlers", None)
    return handlers is None or HazardFound in handlers or hasattr(signal, "loop")


class Hazards:
    """
    Finds what makes an app's background tasks fail, and has it told.

    Args:
        threshold: Seconds without an answer from which on the event loop is blocked; None: not looked for.
    """

    def __init__(self, threshold: float | None) -> None:
        self._threshold = math.inf if threshold is None else threshold
        self._arguments, self._threads = Arguments(self.tell), Threads()
        self._engine: Engine | None = None
        self._subscriber: Subscriber | None = None
        self._watch: Watch | None = None
        self.handlers: dict[type[TaskEvent], Callable[[Any], None]] = {Scheduled: self._arguments.look}

    def __call__(self, event: TaskEvent) -> None:
        """Look at what is scheduled; other events are passed over."""
        if isinstance(event, Scheduled):
            self._arguments.look(event)

    def attach(self, engine: Engine) -> None:
        """Tell what is found through this engine."""
        self._engine = engine
        found = {id(loop): loop for s in engine.dispatch.signals if (loop := getattr(s, "loop", None)) is not None}
        listeners: list[LoopListener] = list(found.values())
        self._subscriber = Subscriber(
            threshold=self._threshold,
            listeners=listeners,
            found=self._on_blocked,
            looked=self._on_look,
            redact=engine.settings.redact,
            broken=self._broken,
        )

    def open(self) -> None:
        """The app starts: watch its event loop."""
        self.serving()

    def close(self) -> None:
        """The app has stopped serving on this loop."""
        if self._subscriber is not None:
            _watcher.unwatch(self._subscriber)
        self._watch = None

    def serving(self) -> None:
        """A batch starts, maybe on a loop that is not watched yet: of an app whose lifespan nobody runs."""
        watch = self._watch
        if watch is None or watch.ended or not _watcher.is_here(watch):
            if self._subscriber is None:
                return
            self._watch = _watcher.watch(self._subscriber)

    def tell(self, run: TaskRun, kind: str, argument: str | None, advice: str) -> None:
        """Have a hazard told."""
        if self._engine is not None:
            self._engine.tell_hazard(run, kind, advice, argument=argument)

    def hint(self, run: TaskRun, error: BaseException) -> str | None:
        """What a failure comes from, where that is an argument that was dead; told as a hazard, too."""
        if not _failures.says_closed(error):
            return None
        found = list(self._arguments.suspects(run))
        if not found and _failures.is_detached(error):
            found = [(None, *_failures.DETACHED)]
        if not found:
            return None
        argument, kind, advice = found[0]
        self.tell(run, kind, argument, advice)
        return advice if argument is None else f"argument {argument!r}: {advice}"

    def _on_blocked(self, run: TaskRun, where: str, stack: str) -> None:
        engine = self._engine
        if engine is not None and getattr(run.request, "_engine", None) is self._engine:
            engine.tell_hazard(run, "blocked_loop", BLOCKED.format(where=where), stack=stack)

    def _on_look(self, limiter: Any) -> None:
        found = self._threads.look(limiter)
        if found is not None:
            self.tell(found[0], KIND, None, found[1])

    def _broken(self, on: str, error: Exception) -> None:
        if self._engine is not None:
            self._engine.broken(_PART, on, error)


class Hints:
    """Stands before the other signals, so that they find in a failure what it comes from."""

    def __init__(self, hazards: Hazards) -> None:
        self._hazards = hazards
        self.handlers: dict[type[TaskEvent], Callable[[Any], None]] = dict.fromkeys(
            (Failed, TimedOut, Retrying), self._on_failed
        )

    def __call__(self, event: TaskEvent) -> None:
        """Look at a failure; other events are passed over."""
        if isinstance(event, (Failed, TimedOut, Retrying)):
            self._on_failed(event)

    def _on_failed(self, event: Failed | TimedOut | Retrying) -> None:
        failure = event.failure
        failure.hint = self._hazards.hint(event.run, failure.error)
