"""
Which workers live: each holds an OS lock on one byte of a file beside the journal.

The kernel frees it at the moment a process dies, and keeps it for one that is only stopped: no heartbeat, no clock.
POSIX locks belong to the process, and closing any descriptor of the file frees them all: it is opened once, for good.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if sys.platform != "win32":
    import fcntl

#: Without them (Windows) there is no journal; the board, which reads one, works all the same.
CAN_LOCK = sys.platform != "win32"

#: The byte of the one process that checkpoints and prunes; workers count from 1.
JANITOR = 0


class Locks:
    """The locks that this process holds on one file; get it from `locks_on`."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._held: set[int] = set()

    def acquire(self, number: int) -> bool:
        """Lock a byte; False if a live process holds it, including this one."""
        if number in self._held:  # the kernel would let this process lock it again
            return False
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except (BlockingIOError, PermissionError):
            return False
        self._held.add(number)
        return True

    def release(self, number: int) -> None:
        """Release a byte, if this process holds it."""
        if number in self._held:
            self._held.discard(number)
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, number)


_opened: dict[tuple[int, Path], Locks] = {}


def locks_on(path: Path) -> Locks:
    """The locks of this process on a file; after a fork, the child has none of its parent's."""
    key = os.getpid(), path.resolve()
    if key not in _opened:
        _opened[key] = Locks(path)
    return _opened[key]
