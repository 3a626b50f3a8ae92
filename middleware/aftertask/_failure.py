"""What an exception says as text: its class, its message, its stack, and a fingerprint that groups its kind."""

from __future__ import annotations

import hashlib
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType, TracebackType

Redact = Callable[[str], str]

#: A message is cut to so many characters, a stack to so many, its middle left out.
LONGEST_MESSAGE = 1_000
LONGEST_STACK = 10_000

#: What stands in the place of a text that could not be redacted: it must not get out as it is.
WITHHELD = "[redaction failed: text withheld]"

_OURS = str(Path(__file__).parent)

#: What calls a task for us, in a thread too.
CARRIERS = ("anyio", "starlette", "trio", "outcome")

_LIBRARIES = tuple(
    {path for name in ("stdlib", "platstdlib", "purelib", "platlib") if (path := sysconfig.get_path(name))}
)


def error_type(error: BaseException) -> str:
    """An exception's class: bare name for builtins, else `module.Qualname`."""
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def error_message(error: BaseException, redact: Redact) -> str:
    """`str(error)`, redacted, at most 1 000 characters; never raises."""
    try:
        text = str(error)
    except Exception as broken:
        text = f"[its message cannot be read: {type(broken).__name__}]"
    text = redacted(text, redact)
    return text if len(text) <= LONGEST_MESSAGE else f"{text[: LONGEST_MESSAGE - 1]}…"


def stack(error: BaseException, redact: Redact) -> str:
    """
    The traceback as Python prints it, with causes and groups, from the task's own first frame on; without locals.

    The frames between the runner and the task (ours, those of anyio and trio) are left out. Redacted; a long one loses
    its middle.
    """
    try:
        told = traceback.TracebackException.from_exception(error, limit=None, compact=True)
        skipped = _frames_before_the_task(error.__traceback__)
        del told.stack[:skipped]
        text = "".join(told.format())
    except Exception as broken:  # a __str__ or source line that cannot be read
        text = f"[its stack cannot be read: {type(broken).__name__}]"
    text = redacted(text, redact)
    if len(text) <= LONGEST_STACK:
        return text
    half = LONGEST_STACK // 2
    return f"{text[:half]}\n[{len(text) - LONGEST_STACK} characters left out]\n{text[-half:]}"


def fingerprint(error: BaseException) -> str:
    """
    Sixteen hex digits: the same for the same class raised in the same function of the app, on any line.

    The function is the innermost frame that is neither a library's nor Python's own; else the innermost of all.
    """
    # A time limit's error is raised by us: where the task was then, its cause tells.
    cause = error.__cause__
    trace = error.__traceback__ or (None if cause is None else cause.__traceback__)
    frames = [frame.f_code for frame, _ in traceback.walk_tb(trace)]
    own = [code for code in frames if not is_library(code)]
    codes = own or frames
    return hashlib.sha256(f"{error_type(error)}\n{_place(codes[-1]) if codes else ''}".encode()).hexdigest()[:16]


def redacted(text: str, redact: Redact) -> str:
    """What may be shown of a text; never raises, and never gives back what could not be redacted."""
    try:
        return str(redact(text))
    except Exception:
        return WITHHELD


def _frames_before_the_task(trace: TracebackType | None) -> int:
    """How many frames at the outer end belong to us, or to what carries a call into a thread."""
    count = skipped = 0
    ours = False
    while trace is not None:
        count += 1
        frame: FrameType = trace.tb_frame
        if frame.f_code.co_filename.startswith(_OURS):
            ours, skipped = True, count
        elif ours and frame.f_globals.get("__name__", "").partition(".")[0] in CARRIERS:
            skipped = count
        else:
            break
        trace = trace.tb_next
    return skipped if trace is not None else 0


def is_library(code: CodeType) -> bool:
    """Whether this is no code of the app's: ours, a library's or Python's own."""
    name = code.co_filename
    return name.startswith((_OURS, "<frozen")) or name.startswith(_LIBRARIES)


def _place(code: CodeType) -> str:
    return f"{Path(code.co_filename).name}:{code.co_qualname}"
