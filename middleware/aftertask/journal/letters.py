"""Dead letters for people: grouped by what they have in common, and replayed or deleted one by one."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from .. import _clock
from .._taskrun import new_run_id
from . import history, rows
from .file import connect
from .rows import Place

#: What a letter without an error has for a fingerprint, where people name one.
NO_ERROR = "none"

#: How many are replayed per second, unless another rate is asked for.
PER_SECOND = 50.0


@dataclass(frozen=True, slots=True)
class Match:
    """What letters have in common; None: anything. `fingerprint` may be `NO_ERROR`."""

    task: str | None = None
    reason: str | None = None
    fingerprint: str | None = None


ANY = Match()


class Group(NamedTuple):
    """Letters of one task with the same reason and the same error: their number, and the newest."""

    match: Match
    number: int
    newest: sqlite3.Row


_MATCHES = (
    "dead IS NOT NULL AND (:task IS NULL OR task = :task) AND (:reason IS NULL OR dead = :reason) "
    f"AND (:fingerprint IS NULL OR coalesce(fingerprint, '{NO_ERROR}') = :fingerprint)"
)


def groups(db: sqlite3.Connection, match: Match = ANY, most: int = -1) -> list[Group]:
    """Groups of similar letters, the largest first; a negative `most` means all groups."""
    found = db.execute(
        "SELECT task, dead, fingerprint, count(*) AS count, max(settled_at), id FROM runs INDEXED BY runs_alike "
        f"WHERE {_MATCHES} GROUP BY task, dead, fingerprint ORDER BY count(*) DESC, task, dead LIMIT :most",
        {**asdict(match), "most": most},
    ).fetchall()
    newest = {row["id"]: row for row in named(db, [row["id"] for row in found])}
    return [
        Group(Match(row["task"], row["dead"], row["fingerprint"] or NO_ERROR), row["count"], newest[row["id"]])
        for row in found
        if row["id"] in newest
    ]


def letters(
    db: sqlite3.Connection, match: Match = ANY, before: Place | None = None, most: int = -1
) -> Sequence[sqlite3.Row]:
    """Letters, the newest first, from a position on; a negative `most` means all."""
    at, id = before or (None, None)
    return db.execute(
        f"SELECT * FROM runs INDEXED BY runs_dead WHERE {_MATCHES} "
        "AND (:at IS NULL OR settled_at <= :at) AND (:at IS NULL OR (settled_at, id) < (:at, :id)) "
        "ORDER BY settled_at DESC, id DESC LIMIT :most",
        {**asdict(match), "at": at, "id": id, "most": most},
    ).fetchall()


def named(db: sqlite3.Connection, ids: Iterable[str]) -> Sequence[sqlite3.Row]:
    """Those of the given runs that are dead letters."""
    return [row for row in history.named(db, ids) if row["dead"] is not None]


def ids(db: sqlite3.Connection, match: Match = ANY) -> list[str]:
    """The ids of all letters that match, the oldest first."""
    found = db.execute(f"SELECT id FROM runs INDEXED BY runs_alike WHERE {_MATCHES} ORDER BY settled_at", asdict(match))
    return [str(id) for (id,) in found]


def count(db: sqlite3.Connection, match: Match = ANY) -> int:
    """How many letters match."""
    found = db.execute(f"SELECT count(*) FROM runs INDEXED BY runs_alike WHERE {_MATCHES}", asdict(match))
    return int(found.fetchone()[0])


def replay(db: sqlite3.Connection, id: str) -> bool:
    """Have any worker run a letter again with its stored arguments; False if it is no longer a letter."""
    now = _clock.timestamp()
    return rows.replay(db, id, new_run_id(now), now)


def each(
    db: sqlite3.Connection,
    ids: Iterable[str],
    act: Callable[[sqlite3.Connection, str], bool],
    per_second: float | None = None,
) -> Iterator[bool]:
    """
    Act on each letter in a transaction of its own, so that workers are never held up.

    Args:
        db: A connection that may write.
        ids: The letters.
        act: `replay` or `rows.delete`.
        per_second: At most this many per second; None: as fast as it goes.

    Returns:
        An iterator that acts; of each letter, whether it still was one.
    """
    for id in ids:
        with db:
            db.execute("BEGIN IMMEDIATE")
            was_letter = act(db, id)
        yield was_letter
        if per_second is not None:
            time.sleep(1.0 / per_second)


class LetterAction:
    """
    A replay or deletion of letters that people asked for, and how far it is.

    Args:
        path: The journal.
        action: `replay` or `delete`.
        ids: The letters.

    Attributes:
        seen, done: How many letters it has come to, and how many of these still were letters.
        ended_at: When it ended, in seconds since the Unix epoch; None while it lasts.
        error: What stopped it; None if nothing did.
    """

    def __init__(self, path: Path, action: Literal["replay", "delete"], ids: Sequence[str]) -> None:
        self.path, self.action, self.ids = path, action, ids
        self.seen = self.done = 0
        self.ended_at: float | None = None
        self.error: str | None = None

    def run(self) -> None:
        """Do it, in this thread; if the process ends before it, the rest of the letters stay as they are."""
        act, rate = (replay, PER_SECOND) if self.action == "replay" else (rows.delete, None)
        try:
            with closing(connect(self.path)) as db:
                for was_letter in each(db, self.ids, act, rate):
                    self.seen += 1
                    self.done += was_letter
        except sqlite3.Error as error:
            self.error = f"the journal {self.path} cannot be written: {error}"
        finally:
            self.ended_at = _clock.timestamp()
