"""Everything that exists once per process: threads, what happens after a fork and at exit, chained signal handlers."""

from __future__ import annotations

import atexit
import os
import signal
import threading
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol


class Forked(Protocol):
    """Something whose threads and locks do not survive a fork."""

    def after_fork(self) -> None: ...


class Exiting(Protocol):
    """Something that has a last word before the process ends."""

    def at_exit(self) -> None: ...


_forked: weakref.WeakSet[Forked] = weakref.WeakSet()
_exiting: weakref.WeakSet[Exiting] = weakref.WeakSet()
_registered: set[str] = set()


def on_fork(part: Forked) -> None:
    """Call `part.after_fork()` in every child process, for as long as `part` exists."""
    _forked.add(part)
    # Not at import: importing the package registers nothing.
    if "fork" not in _registered and hasattr(os, "register_at_fork"):
        _registered.add("fork")
        os.register_at_fork(after_in_child=_after_fork)


class HeldForFork(Protocol):
    """Something with a lock that no other thread may hold while the process forks: its copy would never be free."""

    def hold(self) -> None: ...
    def let_go(self) -> None: ...


# Keys only: their order is that of registration.
_held: weakref.WeakKeyDictionary[HeldForFork, None] = weakref.WeakKeyDictionary()


def hold_for_fork(part: HeldForFork) -> None:
    """
    Call `part.hold()` before each fork, and `part.let_go()` in the parent after it.

    The part that was registered last is held first, as `os.register_at_fork` does it: a thread may take the lock of an
    earlier part while it holds that of a later one.
    """
    _held[part] = None
    if "hold" not in _registered and hasattr(os, "register_at_fork"):
        _registered.add("hold")
        os.register_at_fork(before=_hold, after_in_parent=_let_go)


def _hold() -> None:
    for part in reversed(list(_held)):
        part.hold()


def _let_go() -> None:
    for part in list(_held):
        part.let_go()


def on_exit(part: Exiting) -> None:
    """Call `part.at_exit()` when the interpreter exits, if `part` still exists."""
    _exiting.add(part)
    if "exit" not in _registered:
        _registered.add("exit")
        atexit.register(_at_exit)


def start_thread(name: str, target: Callable[[], object]) -> threading.Thread:
    """A running daemon thread, so that it never keeps the process alive."""
    thread = threading.Thread(target=target, name=f"aftertask-{name}", daemon=True)
    thread.start()
    return thread


def _after_fork() -> None:
    for part in list(_forked):
        part.after_fork()


def _at_exit() -> None:
    for part in list(_exiting):
        part.at_exit()


class Terminating(Protocol):
    """Something that reacts when the process is asked to end."""

    def on_termination(self, signal_name: str) -> None: ...


# A tuple, replaced as a whole: a signal handler may interrupt any other code.
_terminating: tuple[Terminating, ...] = ()
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def on_termination(part: Terminating) -> None:
    """
    Call `part.on_termination(name)` at SIGTERM and SIGINT, before the handlers that are installed now.

    Does nothing outside of the main thread, which alone may install handlers. The call must not take a lock.
    """
    global _terminating
    if threading.current_thread() is not threading.main_thread():
        return
    _terminating = (*_terminating, part)
    for number in _SIGNALS:
        before = signal.getsignal(number)
        # None: installed by code that is not Python, and cannot be called. An ignored signal does not end the process.
        if before not in (None, signal.SIG_IGN) and not isinstance(before, _ChainedHandler):
            signal.signal(number, _ChainedHandler(before))


def off_termination(part: Terminating) -> None:
    """Undo `on_termination`; with the last part, the handlers from before are restored."""
    global _terminating
    _terminating = tuple(other for other in _terminating if other is not part)
    if _terminating or threading.current_thread() is not threading.main_thread():
        return
    for number in _SIGNALS:
        before = current = signal.getsignal(number)
        while isinstance(before, _ChainedHandler):
            before = before.before
        if before is not current:
            signal.signal(number, before)


class _ChainedHandler:
    """A signal handler in front of the one that was installed before, which is called afterwards."""

    def __init__(self, before: Any) -> None:
        self.before = before

    def __call__(self, number: int, frame: FrameType | None) -> None:
        for part in _terminating:
            part.on_termination(signal.Signals(number).name)
        if callable(self.before):
            self.before(number, frame)
        elif self.before == signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
