"""Where a run is right now: its frames, the run that a stack belongs to, and the stack as text."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator, Sequence
from itertools import dropwhile
from types import CoroutineType, FrameType, GeneratorType

from .._taskrun import TaskRun, in_flight, running
from .._text import CARRIERS, Redact, frames_text, is_library, package_of

#: Deeper stacks, and longer chains of awaited coroutines, are cut.
_DEEPEST = 3000


def stack_of(run: TaskRun, redact: Redact) -> str | None:
    """
    The stack of a run from the task's own first frame on, as Python prints it; redacted, without locals.

    None if it cannot be read: the run waits for a thread, or its function is in another process.
    """
    frames = frames_of(run)
    return frames_text(frames, redact) if frames else None


def frames_of(run: TaskRun) -> list[FrameType]:
    """The frames of a run from the task's own first frame on, the innermost last; empty if they cannot be read."""
    thread = run.thread
    frames = frames_of_thread(run.request.thread if thread is None else thread)
    at = _first_frame(run, frames)
    if at is not None:  # an async task that executes at this moment
        return without_carriers(frames[at:])
    awaited = without_carriers(list(_awaited(run.coroutine)))
    if awaited or thread is None or run.thread != thread:  # the call may have returned while its frames were read
        return awaited
    ours = [at for at, frame in enumerate(frames) if package_of(frame) == "aftertask"]
    return without_carriers(frames[ours[0] :] if ours else frames)


def run_on(frames: Sequence[FrameType]) -> TaskRun | None:
    """The innermost run whose coroutine is executing in these frames; None if there is none."""
    place = {id(frame): at for at, frame in enumerate(frames)}
    found = [(place[id(frame)], run) for run in list(in_flight) if id(frame := _coroutine_frame(run)) in place]
    return max(found, key=lambda one: one[0])[1] if found else None


def run_of_current_task(loop: object) -> TaskRun | None:
    """
    The run that started asyncio's current task, by `asyncio.gather` or a task group; None on trio, and before 3.12.

    A context may have leaked (CPython #140947), so a run that does not execute is not meant.
    """
    if sys.version_info >= (3, 12) and isinstance(loop, asyncio.AbstractEventLoop):
        task = asyncio.current_task(loop)
        run = task.get_context().get(running) if isinstance(task, asyncio.Task) else None
        return run if run is not None and run.state == "running" else None
    return None


def sight_of(run: TaskRun | None, frames: Sequence[FrameType], redact: Redact) -> tuple[str, str]:
    """
    The app's innermost line in the frames of a thread, and the stack as text.

    The stack begins with the task's own first frame, or else with the app's.
    """
    at = None if run is None else _first_frame(run, frames)
    outer = dropwhile(lambda frame: is_library(frame.f_code), frames)
    own = (list(outer) if at is None else without_carriers(frames[at:])) or list(frames)
    frame = next((frame for frame in reversed(own) if not is_library(frame.f_code)), own[-1])
    where = f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_qualname}"
    return where, frames_text(own, redact)


def frames_of_thread(thread: int) -> list[FrameType]:
    """The frames of a thread, the innermost last; empty if there is no such thread."""
    frames: list[FrameType] = []
    frame = sys._current_frames().get(thread)
    while frame is not None and len(frames) < _DEEPEST:
        frames.append(frame)
        frame = frame.f_back
    return frames[::-1]


def without_carriers(frames: Sequence[FrameType]) -> list[FrameType]:
    """These frames without the outer ones of aftertask and of the libraries that carry its call."""
    return list(dropwhile(lambda frame: package_of(frame) in CARRIERS, frames))


def _first_frame(run: TaskRun, frames: Sequence[FrameType]) -> int | None:
    own = _coroutine_frame(run)
    return None if own is None else next((at for at, frame in enumerate(frames) if frame is own), None)


def _coroutine_frame(run: TaskRun) -> FrameType | None:
    coroutine = run.coroutine
    return coroutine.cr_frame if isinstance(coroutine, CoroutineType) else None


def _awaited(coroutine: object) -> Iterator[FrameType]:
    """The frames of a suspended coroutine and of what it awaits, the innermost last."""
    for _ in range(_DEEPEST):
        if isinstance(coroutine, CoroutineType):
            # Of a coroutine that executes, Python 3.11 crashes when it looks for what is awaited.
            frame, inner = coroutine.cr_frame, None if coroutine.cr_running else coroutine.cr_await
        elif isinstance(coroutine, GeneratorType):  # made by types.coroutine
            frame, inner = coroutine.gi_frame, None if coroutine.gi_running else coroutine.gi_yieldfrom
        else:
            return
        if frame is None:
            return
        yield frame
        coroutine = inner
