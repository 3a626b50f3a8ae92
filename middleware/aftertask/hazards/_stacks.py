"""Where a thread is: which run is on it, and its stack as text that begins with the task's own code."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from contextvars import Context
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any, TypeAlias

from .. import _frames
from .._failure import is_library
from .._run import _current
from ..events import TaskRun

#: asyncio's loop, where nobody has patched it.
_RUN_ONCE = getattr(getattr(asyncio.BaseEventLoop, "_run_once", None), "__code__", None)

_HANDLE_RUN = asyncio.Handle._run.__code__  # as it was: others put theirs around it

#: Who stands in the stack when a developer has stopped the program to look at it.
_DEBUGGERS = {"bdb", "pdb", "ipdb", "pudb", "pydevd", "_pydevd_bundle", "_pydevd_frame_eval", "debugpy"}


#: A frame, by what stays of it: its identity, and its code.
Caller: TypeAlias = tuple[int, CodeType]


@dataclass(slots=True)
class Place:
    """
    Where a thread was.

    Attributes:
        run: The run on it; None where there was none.
        frames: Its frames, the innermost last.
        own: Where in them the task's own code begins; 0 without a run.
    """

    run: TaskRun | None
    frames: list[FrameType]
    own: int

    @property
    def debugged(self) -> bool:
        """Whether a debugger has stopped it."""
        return any(_frames.module_of(frame) in _DEBUGGERS for frame in self.frames)

    def where(self) -> str:
        """The app's innermost line: `file:line in function`; Python's own or a library's where the app has none."""
        frames = self.frames[self.own :] or self.frames
        frame = next((frame for frame in reversed(frames) if not is_library(frame.f_code)), frames[-1])
        return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_qualname}"

    def stack(self, redact: Callable[[str], str]) -> str:
        """As Python prints a stack, from the task's or else the app's first frame on; redacted, without locals."""
        frames = self.frames[self.own :]
        if self.run is None:
            first = next((at for at, frame in enumerate(frames) if not is_library(frame.f_code)), 0)
            frames = frames[first:]
        return _frames.text(frames, redact)


def rests(thread: int, caller: Caller | None) -> bool:
    """
    Whether a thread's event loop waits for something to happen; False where that cannot be told.

    Args:
        thread: Its identity.
        caller: Who calls the callbacks of a loop that has no frame of its own: on uvloop whoever runs the loop. None
            for asyncio's own loop, or where it is not known.
    """
    frame = sys._current_frames().get(thread)
    if frame is None:
        return False
    caller_frame = frame.f_back
    if caller_frame is not None and caller_frame.f_code is _RUN_ONCE:
        return frame.f_globals.get("__name__") == "selectors"
    if frame.f_code.co_name == "get_events":
        return _frames.module_of(frame) == "trio"
    return caller is not None and (id(frame), frame.f_code) == caller


def place_of(thread: int, loop: Any) -> Place | None:
    """Where a thread is that runs this event loop (None on trio); None where there is no such thread."""
    innermost = sys._current_frames().get(thread)
    if innermost is None:
        return None
    frames = _frames.outwards(innermost)
    for at in range(len(frames) - 1, -1, -1):
        run = _frames.run_of(frames[at])
        if run is not None:
            return Place(run, frames, min(_frames.after_carriers(frames, at + 1), len(frames) - 1))
    return Place(_run_in(_context(frames, loop)), frames, 0)


def _run_in(context: Context | None) -> TaskRun | None:
    """
    The run that an asyncio or trio task of the app's own was started in, while that run goes on.

    Nothing but a finding hangs on it, so a context that leaked (CPython #140947) does no harm.
    """
    run = None if context is None else context.get(_current)
    return run if run is not None and run.outcome is None and run.attempt else None


def _context(frames: Sequence[FrameType], loop: Any) -> Context | None:
    """The context of the task that is on the loop: from the loop's own frames, or from uvloop, which has none."""
    for frame in frames:
        code = frame.f_code
        if code is _HANDLE_RUN:
            return getattr(frame.f_locals.get("self"), "_context", None)
        if code.co_name == "unrolled_run" and _frames.module_of(frame) == "trio":
            return getattr(frame.f_locals.get("task"), "context", None)
    task = None if loop is None else asyncio.current_task(loop)
    get_context = getattr(task, "get_context", None)  # since Python 3.12
    return None if get_context is None else get_context()
