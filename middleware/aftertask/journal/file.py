"""The SQLite file: its format, how it is opened, and when it is refused or moved aside."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from pathlib import Path

from .._log import log
from ..errors import JournalError
from .locks import CAN_LOCK, locks_on

#: "atsk": the file is a journal, and not some other application's database.
_APPLICATION = 0x6174736B
FORMAT = 2

#: Seconds to wait for another process that writes.
BUSY = 5.0

#: File systems over a network, where SQLite's locks do not work.
_REMOTE = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "lustre", "fuse.sshfs"}

_SCHEMA = f"""
CREATE TABLE runs (
  id TEXT PRIMARY KEY, task TEXT NOT NULL, code TEXT NOT NULL, state TEXT NOT NULL, owner INTEGER,
  durable INTEGER NOT NULL, idempotent INTEGER NOT NULL, recoveries INTEGER NOT NULL DEFAULT 0,
  key TEXT, origin TEXT NOT NULL, replay_of TEXT, replayed_by TEXT, cancel INTEGER NOT NULL DEFAULT 0,
  http_method TEXT, http_route TEXT, request_id TEXT, trace_id TEXT, span_id TEXT, first TEXT,
  scheduled_at REAL NOT NULL, ready_at REAL, started_at REAL, settled_at REAL, attempts INTEGER NOT NULL DEFAULT 0,
  queue_wait_s REAL, duration_s REAL, bad INTEGER NOT NULL DEFAULT 0, reason TEXT, dead TEXT, fingerprint TEXT,
  error_type TEXT, error_message TEXT, more TEXT,
  progress TEXT, result TEXT, arguments TEXT, stack TEXT -- what may be long is last: a filter need not read it
) WITHOUT ROWID;
CREATE UNIQUE INDEX runs_key ON runs (key) WHERE key IS NOT NULL AND settled_at IS NULL;
CREATE INDEX runs_unsettled ON runs (owner, state, ready_at) WHERE settled_at IS NULL;
CREATE INDEX runs_succeeded ON runs (settled_at) WHERE settled_at IS NOT NULL AND state = 'succeeded';
CREATE INDEX runs_other ON runs (settled_at) WHERE settled_at IS NOT NULL AND state != 'succeeded' AND dead IS NULL;
CREATE INDEX runs_dead ON runs (settled_at) WHERE dead IS NOT NULL;
CREATE INDEX runs_alike ON runs (task, dead, fingerprint, settled_at) WHERE dead IS NOT NULL;
CREATE INDEX runs_task ON runs (task, settled_at) WHERE settled_at IS NOT NULL;
CREATE TABLE workers (number INTEGER PRIMARY KEY AUTOINCREMENT, pid INTEGER NOT NULL, started_at REAL NOT NULL);
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {FORMAT};
"""


def connect(path: Path, *, readonly: bool = False) -> sqlite3.Connection:
    """A connection to a journal that exists; it may be handed to another thread."""
    db = sqlite3.connect(path, timeout=BUSY, isolation_level=None, check_same_thread=False)
    db.row_factory = sqlite3.Row
    db.execute(f"PRAGMA query_only = {int(readonly)}")
    # SQLite before 3.51.3 can corrupt a file that two processes checkpoint: only the janitor does.
    db.execute("PRAGMA wal_autocheckpoint = 0")
    return db


def execute_when_free(db: sqlite3.Connection, statement: str) -> None:
    """
    Execute a statement that needs a lock, waiting for others in short steps.

    SQLite's own steps become so long that two busy writers halve each other, and it does not wait at all if two
    processes start the write-ahead log of a new file at once.
    """
    give_up_s = time.monotonic() + BUSY
    while True:
        try:
            db.execute(statement)
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > give_up_s:
                raise
            time.sleep(0.0005)  # about as long as a small transaction


def require(path: Path) -> None:
    """Check that a file is a journal of this format; raises JournalError if it is not."""
    if not path.is_file():
        raise JournalError(f"there is no journal at {path}")
    with closing(connect(path, readonly=True)) as db:
        found = tuple(db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
    if found != (_APPLICATION, FORMAT):
        raise JournalError(f"{path} is not a journal of format {FORMAT}, which this version of aftertask reads")


def prepare(path: Path) -> None:
    """
    Check the file, and create it if it is missing.

    A journal of another format is moved aside, with a log line, if all its runs are settled and no dead letter is left.

    Raises:
        JournalError: The file cannot be used; the message says why and what to do.
    """
    if not CAN_LOCK:
        raise JournalError(f"the journal {path} needs file locks, which Windows lacks; leave Settings.journal out")
    if not path.parent.is_dir():
        remedy = "~ is not expanded: write the whole path" if "~" in path.parts else "create it first"
        raise JournalError(f"the journal {path} cannot be created: there is no folder {path.parent}; {remedy}")
    if path.is_dir():
        raise JournalError(f"the journal {path} is a folder; name a file in it, such as {path / 'tasks.db'}")
    remote = remote_file_system(path.parent, Path("/proc/self/mountinfo"))
    if remote is not None:
        why = f"is on a network file system ({remote}), where SQLite's locks do not work"
        raise JournalError(f"the journal {path} {why}; name a file on a local disk")
    try:
        with closing(connect(path)) as db:
            other = _create_or_check(db, path)
        # Its last connection is closed: everything is in the file itself now.
        if other is not None:
            _move_aside(path, other)
            with closing(connect(path)) as db:
                _create_or_check(db, path)
    except sqlite3.DatabaseError as error:
        raise JournalError(
            f"the journal {path} cannot be opened: {error}; whether it holds durable runs is unknown, so it stays "
            f"where it is: move it away, or name another file"
        ) from error


def _create_or_check(db: sqlite3.Connection, path: Path) -> int | None:
    """Create or check the tables; returns the file's format if it is another one and the file may be moved aside."""
    execute_when_free(db, "PRAGMA journal_mode = WAL")
    # In a transaction, so that two workers that start at once do not both create the tables.
    execute_when_free(db, "BEGIN IMMEDIATE")
    try:
        (application,) = db.execute("PRAGMA application_id").fetchone()
        (version,) = db.execute("PRAGMA user_version").fetchone()
        (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if not tables:
            for statement in _SCHEMA.split(";"):
                db.execute(statement)
        elif application != _APPLICATION:
            raise JournalError(f"the file {path} is a database of another application; name another file")
        elif version != FORMAT:
            _check_unneeded(db, path, version)
            return int(version)
        else:
            db.execute("SELECT count(*) FROM runs WHERE settled_at IS NULL").fetchone()
        db.execute("COMMIT")
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")
    return None


def _check_unneeded(db: sqlite3.Connection, path: Path, version: int) -> None:
    """A file of another format that holds only history may be moved aside; any other stays."""
    other = f"the journal {path} has format {version}, and this version of aftertask reads format {FORMAT}"
    try:
        (left,) = db.execute(
            "SELECT count(*) FROM runs WHERE durable AND (settled_at IS NULL OR dead IS NOT NULL)"
        ).fetchone()
        workers = [number for (number,) in db.execute("SELECT number FROM workers")]
    except sqlite3.DatabaseError as error:
        raise JournalError(f"{other}; whether it holds durable runs is unknown ({error}): name another file") from error
    if left:
        raise JournalError(
            f"{other}; {left} durable runs in it have not ended or are dead letters: let the other version finish or "
            f"delete them, or name another file"
        )
    locks = locks_on(beside(path, "workers"))
    for number in workers:
        if not locks.acquire(number):
            raise JournalError(f"{other}, and a worker of that version is using it: name another file")
        locks.release(number)


def _move_aside(path: Path, version: int) -> None:
    aside = beside(path, f"format{version}.{int(time.time())}")
    try:
        path.rename(aside)
    except FileNotFoundError:  # another worker that starts now was faster
        return
    log("warning", "journal.moved_aside", path=str(path), moved_to=str(aside), format=version, reads=FORMAT)


def beside(path: Path, part: str) -> Path:
    """The path of a file that belongs to a journal, such as `tasks.db-workers`."""
    return path.with_name(f"{path.name}-{part}")


def remote_file_system(folder: Path, mounts: Path) -> str | None:
    """
    The type of the file system of a folder if it is one over a network; None if it is local, or unknown.

    Args:
        folder: A folder that exists.
        mounts: `/proc/self/mountinfo` (see `man 5 proc`), which only Linux has.
    """
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return None
    found = {}
    for line in lines:
        fields, _, rest = line.partition(" - ")
        found[fields.split(" ")[4].replace("\\040", " ")] = rest.split(" ")[0]
    place = folder.resolve()
    kind = next((found[str(above)] for above in (place, *place.parents) if str(above) in found), None)
    return kind if kind in _REMOTE else None
