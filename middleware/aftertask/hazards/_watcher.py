"""The one thread of a process that looks after all its event loops, and who subscribes to which."""

from __future__ import annotations

import asyncio
import math
import os
import sys
import threading
from time import monotonic, sleep
from typing import Any

from .. import _timer
from . import _blocks
from ._blocks import Subscriber
from ._loop import LONGEST, Watch

#: The thread ends when it has had nothing to watch for so many seconds.
LINGER = 1.0


class _Watcher:
    """The thread: there while there is a loop to watch, and a while longer."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._watches: dict[int, Watch] = {}
        self._thread: threading.Thread | None = None

    def find(self, key: int, loop: Any) -> Watch | None:
        """The watch of a loop that is watched already."""
        watch = self._watches.get(key)
        return watch if watch is not None and watch.loop is loop and not watch.ended else None

    def add(self, key: int, watch: Watch) -> None:
        """One more loop."""
        with self._changed:
            if self._thread is None or not self._thread.is_alive():
                thread = threading.Thread(target=self._run, name="aftertask-loops", daemon=True)
                thread.start()  # may be refused; then it is tried again with the next batch
                self._thread = thread
            self._set({**self._watches, key: watch})
            self._changed.notify()

    def _run(self) -> None:
        while self._has_any():
            wanted = 0.0
            while watches := self._watches:
                now = monotonic()  # what the looks themselves took is nobody's fault
                wanted = max(wanted, now + 0.001)
                sleep(wanted - now)  # a third cheaper than a wait that can be ended
                now = monotonic()
                overslept, wanted = now - wanted, math.inf
                for watch in watches.values():
                    try:
                        again = watch.look(now, overslept)
                    except BaseException as error:  # or no loop of the process would be watched any more
                        watch.give_up(error)
                        again = now + LONGEST
                    if again < wanted:
                        wanted = again
                    if watch.ended:
                        self._drop(watch)

    def _has_any(self) -> bool:
        """Wait for a loop for a while; False where there is none and the thread is to end."""
        with self._changed:
            if self._changed.wait_for(lambda: self._watches, LINGER):
                return True
            self._thread = None
            return False

    def _drop(self, ended: Watch) -> None:
        with self._changed:
            self._set({key: watch for key, watch in self._watches.items() if watch is not ended})

    def _set(self, watches: dict[int, Watch]) -> None:
        self._watches = watches
        for watch in watches.values():
            watch.alone = len(watches) == 1 and not watch.ended


_watcher = _Watcher()


def _start_over() -> None:
    """A fork leaves the thread behind, and the loops are the parent's."""
    global _watcher
    _watcher = _Watcher()
    _blocks.start_over()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_over)


def this_loop() -> tuple[int, Any]:
    """A key for the event loop that runs here, and the loop; None for that on trio."""
    loop = asyncio._get_running_loop()
    if loop is not None:
        return id(loop), loop
    if _timer.on_trio():
        return id(sys.modules["trio"].lowlevel.current_trio_token()), None
    return 0, None


def watch(subscriber: Subscriber) -> Watch | None:
    """Watch the event loop that runs here for this subscriber; None where none does."""
    key, loop = this_loop()
    if not key:
        return None
    found = _watcher.find(key, loop)
    if found is None:
        found = Watch(loop, subscriber)
        found.start()
        _watcher.add(key, found)
    found.join(subscriber)
    return found


def is_here(watch: Watch) -> bool:
    """Whether this is the event loop that runs here."""
    loop = asyncio._get_running_loop()
    return watch.loop is loop if loop is not None else _watcher.find(*this_loop()) is watch


def unwatch(subscriber: Subscriber) -> None:
    """Watch the event loop that runs here no more for this subscriber."""
    found = _watcher.find(*this_loop())
    if found is not None:
        found.leave(subscriber)
