"""One worker's access to the file: its number and lock, the thread that writes, and a connection that reads."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TypeVar, cast

import anyio
import anyio.to_thread

from .. import _clock
from .._core.process import on_fork
from ..errors import JournalError
from ..events import Signal
from ..signals.journal_metrics import JournalMetrics
from . import rows
from .file import beside, connect, execute_when_free, prepare
from .janitor import Janitor
from .locks import locks_on
from .writer import Apply, Change, Kind, Writer

T = TypeVar("T")

#: Seconds after which a file that could not be opened is tried again.
_REOPEN = 5.0


class Reader:
    """A connection that reads, in any thread; made at the first look."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._db: sqlite3.Connection | None = None

    def __call__(self, look: Callable[[sqlite3.Connection], T]) -> T:
        """Read in this thread; raises JournalError."""
        try:
            with self._lock:
                if self._db is None:
                    self._db = connect(self._path, readonly=True)
                return look(self._db)
        except sqlite3.Error as error:
            raise JournalError(f"the journal {self._path} cannot be read: {error}") from error

    def close(self) -> None:
        """Close the connection."""
        with self._lock:  # a thread may be reading for a look that was cancelled: SQLite would crash
            if self._db is not None:
                self._db.close()


class Opened:
    """The parts that exist only while the file is open."""

    def __init__(self, path: Path, writer: Callable[[], Writer]) -> None:
        self.locks = locks_on(beside(path, "workers"))
        with closing(connect(path)) as db:
            execute_when_free(db, "BEGIN IMMEDIATE")
            self.number = rows.join(db, os.getpid(), _clock.timestamp())
            # Before the others see the row: they settle what is not locked.
            if not self.locks.acquire(self.number):
                raise JournalError(f"the journal {path}: worker {self.number} lives already; was the file replaced?")
            try:
                db.execute("COMMIT")
            except sqlite3.Error:  # the next one who tries, here or elsewhere, gets the same number
                self.locks.release(self.number)
                raise
        # What people look at has a connection of its own: a long look holds up no run.
        self.reader, self.browsing = Reader(path), Reader(path)
        self.writer = writer()
        self.janitor = Janitor(path, self.locks)

    def close(self) -> None:
        """Write the waiting changes; the next worker gets the runs that are left."""
        self.janitor.close()
        self.writer.close(lambda db: rows.leave(db, self.number))
        self.reader.close()
        self.browsing.close()
        self.locks.release(self.number)


#: What a child process inherited: closing it there would free the locks of its parent.
_inherited: list[Opened] = []


class Store:
    """
    A journal's file, opened when it is first needed.

    Args:
        path: The file.
        meter: Counts.
        gather, history_lost: As in `Writer`.

    Raises:
        JournalError: The file cannot be used; the message says why and what to do.
    """

    def __init__(
        self, path: Path, meter: JournalMetrics, gather: Callable[[], Change | None], history_lost: Callable[[], None]
    ) -> None:
        self.path, self._writer = path, lambda: Writer(path, meter, gather, history_lost)
        self.opened: Opened | None = None
        self._failed_s, self._is_inherited = float("-inf"), False
        self._lock = threading.RLock()
        prepare(path)
        on_fork(self)

    def open(self) -> Opened:
        """The open file; raises JournalError if it cannot be opened, which is not tried at every call."""
        opened = self.opened
        if opened is not None:
            return opened
        with self._lock:
            if self._is_inherited:
                raise JournalError(
                    f"the journal {self.path} was open when this process was forked, and cannot be used here: fork "
                    f"workers before the app starts"
                )
            if self.opened is None:
                if _clock.monotonic() - self._failed_s < _REOPEN:
                    raise JournalError(f"the journal {self.path} could not be opened; it is tried again in a moment")
                self._failed_s = _clock.monotonic()  # until it has worked
                try:
                    prepare(self.path)
                    self.opened, self._failed_s = Opened(self.path, self._writer), float("-inf")
                except (sqlite3.Error, OSError) as error:
                    raise JournalError(f"the journal {self.path} cannot be opened: {error}") from error
            return self.opened

    def close(self) -> None:
        """Write the waiting changes, and close."""
        opened = self.opened
        if opened is not None:
            opened.close()  # what it still writes has this worker's number
            self.opened = None

    def after_fork(self) -> None:
        """The child joins as a new worker, unless the file was open: SQLite cannot be used across a fork."""
        if self.opened is not None:
            _inherited.append(self.opened)
            self._is_inherited = True
        self.opened, self._lock = None, threading.RLock()

    @property
    def number(self) -> int | None:
        """The number of this worker; None while the file is not open."""
        opened = self.opened
        return None if opened is None else opened.number

    def submit(self, apply: Apply) -> None:
        """Change a durable run's row, sooner or later; once closed the row is left for the next worker to settle."""
        opened = self.opened
        if opened is not None:
            opened.writer.submit(Change("durable", apply))

    async def write(self, kind: Kind, apply: Callable[[sqlite3.Connection], T]) -> T:
        """Make a change and wait until it is on disk; raises JournalError."""
        return cast(T, await self.open().writer.write(Change(kind, apply)))

    async def browse(self, look: Callable[[sqlite3.Connection], T]) -> T:
        """Read for people, in a thread and over a connection of its own; raises JournalError."""
        return await in_thread(lambda: self.open().browsing(look))

    async def read(self, look: Callable[[sqlite3.Connection], T]) -> T:
        """Read in a thread; raises JournalError."""
        return await in_thread(lambda: self.read_now(look))

    def read_now(self, look: Callable[[sqlite3.Connection], T]) -> T:
        """Read in this thread; raises JournalError."""
        return self.open().reader(look)


async def in_thread(call: Callable[[], T]) -> T:
    """Call in a thread that is none of the pool that endpoints share: it may be full when this is needed."""
    return await anyio.to_thread.run_sync(call, limiter=anyio.CapacityLimiter(1))


class Journaling(Signal):
    """
    The signal that keeps a journal, as its readers find it.

    Attributes:
        store: Its file.
        meter: Counts of its work.
    """

    store: Store
    meter: JournalMetrics
