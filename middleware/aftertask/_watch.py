"""
Runs that take too long, told while they still run: slow after one limit, stuck after another.

One thread for the process looks at the runs in flight when one of them may have come to its limit; about once a minute
where none can. A task's path knows nothing of it.
"""

from __future__ import annotations

import asyncio
import functools
import math
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextvars import Context
from types import CoroutineType, FrameType
from typing import Any

from . import _clock, _frames
from ._dispatch import Dispatch
from ._run import _current, _live
from .events import Plan, Slow, Stuck, TaskRun

#: Seconds between two looks: at least, so that many limits make no busy loop, and at most.
SHORTEST, LONGEST = 0.25, 60.0

_OWN_LOOP = f"{__name__.partition('.')[0]}.executors.thread"


class Watch:
    """
    One app's runs in flight.

    Args:
        dispatch: Who is told.
        mine: Whether a run is this app's.
        redact: For stacks.
        broken: Told of an error of our own.
        forget: Called in a child process: a thread does not live through a fork, so `know` must be called again.
    """

    def __init__(
        self,
        dispatch: Dispatch,
        mine: Callable[[TaskRun], bool],
        redact: Callable[[str], str],
        broken: Callable[[str, str, Exception], None],
        forget: Callable[[], None],
    ) -> None:
        self._slow, self._stuck = dispatch.to(Slow), dispatch.to(Stuck)
        self._mine, self._redact, self._broken, self.forget = mine, redact, broken, forget
        self._lock = threading.Lock()
        self._limit = math.inf
        self._told: dict[tuple[TaskRun, int], set[type]] = {}
        self._open = True
        self.loop: asyncio.AbstractEventLoop | None = None

    @property
    def needed(self) -> bool:
        """Whether anybody wants to know, and a task has a limit."""
        return self._open and self._limit < math.inf

    def know(self, plan: Plan) -> None:
        """There is a task with these limits."""
        if self._slow is not None and plan.slow_after is not None:
            self._limit = min(self._limit, plan.slow_after)
        if self._stuck is not None:
            self._limit = min(self._limit, plan.stuck_after)
        if self.needed:
            _thread.watch(self)

    def open(self) -> None:
        """The app starts; maybe again."""
        self._open = True
        if self.needed:
            _thread.watch(self)

    def close(self) -> None:
        """The app has stopped."""
        self._open = False

    def turned(self) -> None:
        """The clock was turned: what is due by now is told before this returns."""
        if self.needed:
            self.look()

    def look_safely(self) -> float:
        """The same as `look`; an error of our own must not end the thread."""
        try:
            return self.look()
        except Exception as error:
            self._broken("aftertask.watch", "look", error)
            return LONGEST

    def look(self) -> float:
        """Tell what has come to its limit; returns after how many seconds something may next."""
        with self._lock:
            now, due = _clock.monotonic(), self._limit
            found: list[tuple[TaskRun, float]] = []
            told: dict[tuple[TaskRun, int], set[type]] = {}
            for run in list(_live):
                started = run.started_s
                if started is None or run.backing_off or run.outcome is not None or not self._mine(run):
                    continue
                kept = self._told.get((run, run.attempt))
                if kept is not None:
                    told[run, run.attempt] = kept
                plan = run.plan
                for kind, limit in ((Slow, plan.slow_after), (Stuck, plan.stuck_after)):
                    if limit is None or (kept is not None and kind in kept):
                        continue
                    if now - started < limit:
                        due = min(due, limit - (now - started))
                    elif not found or found[-1][0] is not run:
                        found.append((run, now - started))
            self._told = told
            self._tell(found)
            return due

    def _tell(self, found: Sequence[tuple[TaskRun, float]]) -> None:
        if not found:
            return
        stacks = _stacks({run for run, _ in found}, self.loop)
        for run, running in found:
            kept = self._told.setdefault((run, run.attempt), set())
            stack = self._text_of(stacks, run)
            slow, stuck = run.plan.slow_after, run.plan.stuck_after
            at = _clock.timestamp()
            if slow is not None and running >= slow and Slow not in kept:
                kept.add(Slow)
                if self._slow is not None:
                    self._slow(Slow(run, at, running, slow, stack))
            if running >= stuck and Stuck not in kept:
                kept.add(Stuck)
                if self._stuck is not None:
                    self._stuck(Stuck(run, at, running, stuck, stack))

    def stack_of(self, run: TaskRun) -> str | None:
        """Where a run is now, in another thread than this one; None where that cannot be found."""
        return self._text_of(_stacks({run}, self.loop, besides=threading.get_ident()), run)

    def _text_of(self, stacks: dict[TaskRun, list[FrameType]], run: TaskRun) -> str | None:
        frames = stacks.get(run)
        return None if frames is None else _text(frames, self._redact)


class _Thread:
    """The thread that looks, while an app needs it."""

    def __init__(self) -> None:
        self._watches: weakref.WeakSet[Watch] = weakref.WeakSet()
        self.start_over()

    def start_over(self) -> None:
        """In a child process."""
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._news = False
        for watch in list(self._watches):
            watch.forget()

    def watch(self, watch: Watch) -> None:
        """Look at this app's runs from now on; or sooner than was known."""
        _install()
        with self._changed:
            if watch not in self._watches:
                self._watches.add(watch)
                _clock.watchers.add(watch)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="aftertask-watch", daemon=True)
                self._thread.start()
            self._news = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            due = [watch.look_safely() for watch in list(self._watches) if watch.needed]
            with self._changed:
                if not due and not self._news:
                    self._thread = None
                    return
                if not self._news:
                    self._changed.wait(max(SHORTEST, min([*due, LONGEST])))
                self._news = False


_thread = _Thread()


@functools.cache
def _install() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_thread.start_over)


# --- where a run is


def _stacks(
    runs: set[TaskRun], loop: asyncio.AbstractEventLoop | None, besides: int | None = None
) -> dict[TaskRun, list[FrameType]]:
    """The frames of these runs, the innermost last, as far as they can be found: in threads, and in asyncio's tasks."""
    found: dict[TaskRun, list[FrameType]] = {}
    for thread, innermost in sys._current_frames().items():
        frames = [] if thread == besides else _frames.outwards(innermost)
        for frame in frames:
            run = _run_of_thread(frame) or _frames.run_of(frame)  # in a thread of its own; on the loop, which it blocks
            if run in runs:
                found[run] = _in_own_loop(frames) or frames
    if loop is not None and not loop.is_closed():
        for task in asyncio.all_tasks(loop):
            frames = list(_awaited(task.get_coro()))
            for frame in frames:
                run = _frames.run_of(frame)
                if run in runs and run not in found:  # a sync one is told where its thread is, not who waits for it
                    found[run] = frames
    return found


def _in_own_loop(frames: list[FrameType]) -> list[FrameType] | None:
    """What an async function awaits that has a thread and an asyncio loop of its own; None where this is none."""
    for frame in frames:
        loop = frame.f_locals.get("self") if frame.f_code.co_name == "run_until_complete" else None
        if isinstance(loop, asyncio.AbstractEventLoop):
            for task in asyncio.all_tasks(loop):
                awaited = list(_awaited(task.get_coro()))
                if any(each.f_globals.get("__name__") == _OWN_LOOP for each in awaited):
                    return awaited
    return None


def _run_of_thread(frame: FrameType) -> TaskRun | None:
    """The run in whose context anyio, or trio, calls a function in this thread."""
    if _frames.module_of(frame) not in ("anyio", "trio"):
        return None
    context = frame.f_locals.get("context")
    return context.get(_current) if isinstance(context, Context) else None


def _awaited(coroutine: Any) -> Iterable[FrameType]:
    """The frames of a coroutine and of what it awaits."""
    while isinstance(coroutine, CoroutineType) and coroutine.cr_frame is not None:
        yield coroutine.cr_frame
        coroutine = coroutine.cr_await


def _text(frames: list[FrameType], redact: Callable[[str], str]) -> str | None:
    """A stack from the task's own first frame on; None where that has none."""
    ours = [at for at, frame in enumerate(frames) if _frames.run_of(frame) or _run_of_thread(frame)]
    own = frames[_frames.after_carriers(frames, ours[-1] + 1 if ours else 0) :]
    return _frames.text(own, redact) if own else None
