"""One time that an event loop does not respond: which run is to blame, for how many seconds, and who gets a report."""

from __future__ import annotations

from collections.abc import Sequence
from types import FrameType

from .._core.stacks import own_frames
from .._taskrun import TaskRun
from .._text import frames_text, is_library
from ._reports import LoopReports

#: Seconds after which a block is reported while it lasts: a deadlock would never be reported otherwise.
STILL_BLOCKED = 5.0


class Block:
    """
    One time that the loop does not respond.

    A run is to blame once it has been seen at two looks in a row; other seconds count for no task.

    Args:
        since: When the loop was asked to respond, in monotonic seconds.
    """

    def __init__(self, since: float) -> None:
        self._since = self._counted = since
        self._last: TaskRun | None = None
        self._looks = 0
        self._sights: dict[TaskRun | None, tuple[str, str]] = {}
        self._seconds: dict[TaskRun | None, float] = {}
        self._reported = False

    def look(self, run: TaskRun | None, frames: Sequence[FrameType], now: float, apps: Sequence[LoopReports]) -> None:
        """The loop has still not responded, and this is on its thread."""
        self._looks = self._looks + 1 if run is self._last else 1
        self._last = run
        if run not in self._sights:
            self._sights[run] = _sight(run, frames, apps)
        blocked_apps = self._blocked(now, apps)
        culprit = run if self._looks > 1 else None
        if culprit is not None and culprit not in self._seconds:
            for app in blocked_apps:
                app.found(culprit, *self._sights[culprit])
        if self._looks > 1:
            self._count(culprit, now, blocked_apps)
        if not self._reported and now - self._since >= STILL_BLOCKED:
            self._report(now, blocked_apps, over=False)

    def end(self, responded: float, apps: Sequence[LoopReports]) -> None:
        """The loop responds again, since this moment in monotonic seconds."""
        blocked_apps = self._blocked(responded, apps)
        self._count(self._last if self._looks > 1 else None, responded, blocked_apps)
        self._report(responded, blocked_apps, over=True)

    def _blocked(self, now: float, apps: Sequence[LoopReports]) -> list[LoopReports]:
        """The apps whose threshold has passed."""
        return [app for app in apps if now - self._since >= app.threshold]

    def _count(self, run: TaskRun | None, until: float, apps: Sequence[LoopReports]) -> None:
        seconds = until - self._counted
        if not apps or seconds <= 0:
            return
        self._counted = until
        self._seconds[run] = self._seconds.get(run, 0.0) + seconds
        if run is not None:
            run.blocked_s += seconds
        for app in apps:
            app.blocked_for(run, seconds)

    def _report(self, now: float, apps: Sequence[LoopReports], *, over: bool) -> None:
        if not self._sights or not apps:
            return
        named = {run: seconds for run, seconds in self._seconds.items() if run is not None}
        run = max(named, key=named.__getitem__) if named else None
        where, stack = self._sights.get(run) or next(iter(self._sights.values()))
        for app in apps:
            app.blocked(run, now - self._since, where, stack, over=over, first=not self._reported)
        self._reported = True


def _sight(run: TaskRun | None, frames: Sequence[FrameType], apps: Sequence[LoopReports]) -> tuple[str, str]:
    """The app's innermost line, and the stack from the task's or else the app's first frame on."""
    own = list(frames) if run is None else own_frames(run, frames)
    of_app = [at for at, frame in enumerate(own) if not is_library(frame.f_code)]
    if run is None and of_app:
        own = own[of_app[0] :]
    frame = next((frame for frame in reversed(own) if not is_library(frame.f_code)), own[-1])
    where = f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_qualname}"
    return where, frames_text(own, apps[0].redact if apps else str)
