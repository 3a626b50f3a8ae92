"""Keeps the file small: one process per machine checkpoints and prunes."""

from __future__ import annotations

import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path

from .._core.process import start_thread
from .._log import log
from .._text import error_type
from . import rows
from .file import BUSY, beside, connect
from .locks import JANITOR, Locks

#: Successes are kept for 7 days, all other runs for 30, and at most a million rows of each; dead letters stay. If the
#: file has more bytes than this, history makes room, the oldest successes first.
KEPT = (7 * 86400.0, 30 * 86400.0)
KEPT_ROWS, KEPT_BYTES = 1_000_000, 4 * 1024**3

_USED = (
    "SELECT (page_count - freelist_count) * page_size FROM pragma_page_count, pragma_freelist_count, pragma_page_size"
)

#: Bytes of the write-ahead log from which it is worth a checkpoint.
_WAL = 4 * 1024 * 1024

_LOOK_EVERY, _PRUNE_EVERY, _PRUNED_AT_ONCE = 1.0, 60.0, 500


class Janitor:
    """A thread that does its work only if no other process does."""

    def __init__(self, path: Path, locks: Locks) -> None:
        self._path, self._locks, self._db = path, locks, connect(path)
        self._closing = threading.Event()
        self._thread = start_thread("journal-janitor", self._run)

    def close(self) -> None:
        """Let another process do it."""
        self._closing.set()
        self._thread.join(10)

    def _run(self) -> None:
        with closing(self._db) as db:
            while not self._locks.acquire(JANITOR):
                if self._closing.wait(_LOOK_EVERY):
                    return
            prune_at = 0.0
            while not self._closing.wait(_LOOK_EVERY):
                try:
                    if beside(self._path, "wal").stat().st_size > _WAL:
                        checkpoint(db)
                    if time.monotonic() >= prune_at:
                        prune_at = time.monotonic() + _PRUNE_EVERY
                        while prune(db) and not self._closing.wait(0.05):  # writers come between
                            pass
                except (sqlite3.Error, OSError) as error:
                    log("warning", "journal.not_pruned", path=str(self._path), error_type=error_type(error))
                    self._closing.wait(_PRUNE_EVERY)
        self._locks.release(JANITOR)


def checkpoint(db: sqlite3.Connection) -> None:
    """Copy the whole write-ahead log into the file: only then does the next writer start the log from its beginning."""
    db.execute("PRAGMA busy_timeout = 250")  # ms: while it waits for a reader, writers wait, too
    # The first one leaves what is written meanwhile, and under load something always is; the second one stops writers.
    for mode in ("PASSIVE", "FULL"):
        db.execute(f"PRAGMA wal_checkpoint({mode})").fetchall()
    db.execute(f"PRAGMA busy_timeout = {BUSY * 1000:.0f}")


def prune(db: sqlite3.Connection, *, most_rows: int = KEPT_ROWS, most_bytes: int = KEPT_BYTES) -> bool:
    """Delete a small batch of rows that are too old or too many; False if there is none left."""
    now, (used,) = time.time(), db.execute(_USED).fetchone()
    ages = [KEPT] if used <= most_bytes else [KEPT, (0.0, KEPT[1]), (0.0, 0.0)]
    return any(rows.prune(db, (now - good, now - other), most_rows, _PRUNED_AT_ONCE) for good, other in ages)
