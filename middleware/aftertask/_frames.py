"""Frames of running code: which run they belong to, and a stack as text that begins with the task's own code."""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Callable, Sequence
from types import CodeType, FrameType
from typing import Any, TypeVar

from ._failure import CARRIERS, LONGEST_STACK, Redact, redacted
from ._run import TaskRun

F = TypeVar("F", bound=Callable[..., Any])

#: So many frames are told of a stack, and so many are followed at most.
_SHOWN = 40
_DEEPEST = 3000

#: Between the runner and the task.
_CARRIERS = {*CARRIERS, "aftertask", "asyncio", "threading"}

_callers: set[CodeType] = set()


def calls_run(function: F) -> F:
    """Mark a function in whose frames `run` is the run that it calls."""
    _callers.add(function.__code__)
    return function


def run_of(frame: FrameType) -> TaskRun | None:
    """The run that this frame calls; None where it is none that calls one."""
    run = frame.f_locals.get("run") if frame.f_code in _callers else None
    return run if isinstance(run, TaskRun) else None


def outwards(frame: FrameType | None) -> list[FrameType]:
    """A frame and those that called it, the innermost last."""
    frames: list[FrameType] = []
    while frame is not None and len(frames) < _DEEPEST:
        frames.append(frame)
        frame = frame.f_back
    return frames[::-1]


def after_carriers(frames: Sequence[FrameType], at: int) -> int:
    """Where in these frames the task's own code begins, which ours and a library's carry; from `at` on."""
    while at < len(frames) and module_of(frames[at]) in _CARRIERS:
        at += 1
    return at


def text(frames: Sequence[FrameType], redact: Redact) -> str:
    """As Python prints a stack, redacted, without locals; a long one loses its middle."""
    # The outer frames say what the app did, the innermost one what it waits in.
    left_out = max(0, len(frames) - _SHOWN)
    kept = [*frames[: _SHOWN // 2], *frames[len(frames) - _SHOWN // 2 :]] if left_out else frames
    known = set(linecache.cache)
    told = traceback.StackSummary.extract(((frame, frame.f_lineno or 0) for frame in kept), lookup_lines=True)
    lines = told.format()
    # Python keeps each source that it has read a line of: megabytes, for a stack that is told once in a while.
    for name in set(linecache.cache) - known:
        linecache.cache.pop(name, None)
    if left_out:
        lines.insert(_SHOWN // 2, f"  [{left_out} frames left out]\n")
    return redacted("".join(lines), redact)[:LONGEST_STACK]


def module_of(frame: FrameType) -> str:
    """The top-level package of a frame's code."""
    name: object = frame.f_globals.get("__name__")
    return name.partition(".")[0] if isinstance(name, str) else ""
