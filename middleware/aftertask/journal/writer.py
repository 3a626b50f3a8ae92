"""The one thread of a process that writes the journal: all waiting changes are one transaction."""

from __future__ import annotations

import os
import queue
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import anyio

from .._core.loops import CallSoon, call_soon_from_any_thread
from .._core.process import start_thread
from .._log import log
from .._text import error_type
from ..errors import JournalError
from ..signals.journal_metrics import JournalMetrics
from .file import connect, execute_when_free

#: Seconds for which history is gathered, until what must be written is tried again, and between two log lines.
GATHER, RETRY, _LOG_EVERY = 0.1, 0.5, 60.0

#: At most this many changes are one transaction.
_GROUP = 2000

#: What happens to a change that cannot be written: an intent fails the request, recovery looks again, a change of a
#: durable run is tried again until it works, and history is dropped.
Kind: TypeAlias = Literal["intent", "durable", "history", "recovery"]
Apply: TypeAlias = Callable[[sqlite3.Connection], object]


@dataclass(slots=True, eq=False)
class Change:
    """One change of the file: `apply` makes it inside of the transaction; `size` is the number of runs it is about."""

    kind: Kind
    apply: Apply
    size: int = 1
    result: object = None
    error: Exception | None = None
    wake: CallSoon | None = None
    event: anyio.Event | None = None
    since_s: float = field(default_factory=time.perf_counter)


class Writer:
    """
    Writes one journal, by group commit.

    Args:
        path: The file, which exists.
        meter: Counts.
        gather: Returns the history that has come together; called by the thread, like `history_lost` if it failed.
    """

    def __init__(
        self, path: Path, meter: JournalMetrics, gather: Callable[[], Change | None], history_lost: Callable[[], None]
    ) -> None:
        self._path, self._meter, self._gather, self._history_lost = path, meter, gather, history_lost
        self._db = connect(path)
        execute_when_free(self._db, "PRAGMA synchronous = NORMAL")  # history alone may be lost with the power
        self._db.execute("PRAGMA busy_timeout = 0")
        self._inode = os.stat(path).st_ino
        self._changes: queue.SimpleQueue[Change | None] = queue.SimpleQueue()
        self._again: list[Change] = []
        self._is_full = self._is_closing = self._is_marked = False
        self._gather_at: float | None = None
        self._logged_at = -_LOG_EVERY
        self._last: Change | None = None
        self._thread = start_thread("journal", self._run)

    def submit(self, change: Change) -> None:
        """Write a change soon, without waiting for it; from any thread."""
        self._changes.put(change)

    async def write(self, change: Change) -> object:
        """Wait until a change is on disk; returns its result, or raises JournalError if it cannot be written."""
        change.wake, change.event = call_soon_from_any_thread(), anyio.Event()
        self._changes.put(change)
        await change.event.wait()
        if change.error is not None:
            raise change.error
        return change.result

    def mark(self) -> None:
        """Called when there is history to collect."""
        if not self._is_marked:
            self._is_marked = True
            self._changes.put(None)

    def close(self, last: Apply) -> None:
        """Write the waiting changes, then this one, and end; the next worker finds what cannot be written now."""
        self._last, self._is_closing = Change("recovery", last), True
        self._changes.put(None)
        self._thread.join(10)

    # --- the thread

    def _run(self) -> None:
        while not (self._is_closing and self._changes.empty()):
            group, self._again = [*self._again, *self._take()], []
            self._commit(group)
        self._commit([change for change in (self._gather(), self._last) if change is not None])
        self._db.close()

    def _take(self) -> list[Change]:
        """The waiting changes; blocks until there are some."""
        taken: list[Change] = []
        timeouts = [RETRY] if self._again else []
        if self._gather_at is not None:
            timeouts.append(max(0.0, self._gather_at - time.monotonic()))
        try:
            change = self._changes.get(timeout=min(timeouts, default=None))
            while True:
                if change is not None:
                    taken.append(change)
                elif self._gather_at is None:
                    self._gather_at = time.monotonic() + GATHER
                if len(taken) >= _GROUP:
                    break
                change = self._changes.get_nowait()
        except queue.Empty:
            pass
        if self._gather_at is not None and time.monotonic() >= self._gather_at:
            self._gather_at, self._is_marked = None, False
            history = self._gather()
            taken += [] if history is None else [history]
        return taken

    def _commit(self, group: Sequence[Change]) -> None:
        if self._is_gone():
            # What is accepted now would not be found again; what was accepted before goes on in the file that is open.
            error = sqlite3.OperationalError("the file was deleted or replaced while it was in use; restart the app")
            self._failed([change for change in group if change.kind != "durable"], error, may_work_later=False)
            group = [change for change in group if change.kind == "durable"]
        try:
            if group:
                self._transact(group)
        except sqlite3.OperationalError as error:  # of the disk or the file, and so for all of them
            self._failed(group, error, may_work_later=not self._is_closing)
        except Exception as error:
            if len(group) == 1:
                self._failed(group, error, may_work_later=False)
            else:  # one of them is at fault
                for change in group:
                    self._commit([change])
        else:
            self._finish(group)

    def _transact(self, group: Sequence[Change]) -> None:
        db = self._db
        if not self._is_full and any(change.kind in ("intent", "durable") for change in group):
            db.execute("PRAGMA synchronous = FULL")  # from now on, what is committed has to survive a power failure
            self._is_full = True
        try:
            execute_when_free(db, "BEGIN IMMEDIATE")
            for change in group:
                change.result = change.apply(db)
            db.execute("COMMIT")
        finally:
            if db.in_transaction:
                db.execute("ROLLBACK")

    def _is_gone(self) -> bool:
        """Whether the file that is open is no longer the one at its path."""
        try:
            return os.stat(self._path).st_ino != self._inode
        except OSError:
            return True

    def _failed(self, group: Sequence[Change], error: Exception, *, may_work_later: bool) -> None:
        if not group:
            return
        for kind in {change.kind for change in group}:
            self._meter.count_journal_errors(kind)
        now = time.monotonic()
        if now - self._logged_at >= _LOG_EVERY or not may_work_later:
            self._logged_at = now
            log("error", "journal.failed", path=str(self._path), error_type=error_type(error), error_message=str(error))
        again = [change for change in group if change.kind == "durable" and may_work_later]
        given_up = [change for change in group if change.kind != "durable" or not may_work_later]
        self._again += again
        for change in given_up:
            consequence = "; no durable run of this request was accepted" if change.kind == "intent" else ""
            change.error = JournalError(f"the journal {self._path} cannot be written: {error}{consequence}")
            change.error.__cause__ = error
            if change.kind == "history":
                self._meter.count_journal_dropped(change.size)
                self._history_lost()
        self._finish(given_up)

    def _finish(self, group: Sequence[Change]) -> None:
        now_s = time.perf_counter()
        waiting: dict[CallSoon, list[anyio.Event]] = {}
        for change in group:
            if change.error is None:
                self._meter.observe_journal_write(change.kind, now_s - change.since_s)
            if change.wake is not None and change.event is not None:
                waiting.setdefault(change.wake, []).append(change.event)
        for wake, events in waiting.items():
            wake(lambda events=events: [event.set() for event in events])  # type: ignore[misc]
