"""Runs for people to read, the newest first: found by an index, with a bounded number of rows read at a time."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from .._stored import READABLE_STATES
from ..policies import is_pattern
from .rows import UNENDED, Place

#: A connection to a journal.
Db: TypeAlias = sqlite3.Connection

#: At most this many rows are looked at for a page; the next page goes on where it ended.
LOOKED_AT = 5_000

_SUCCEEDED = "settled_at IS NOT NULL AND state = 'succeeded'"
_OTHER = "settled_at IS NOT NULL AND state != 'succeeded' AND dead IS NULL"
_DEAD = "dead IS NOT NULL"
_OF_TASK = "settled_at IS NOT NULL AND task = :task"

#: Where text is looked for. What is long, such as the stack, is not read.
_TEXTS = "id, reason, dead, trace_id, request_id, http_method, http_route, error_type, error_message"
_TEXT = " || ' ' || ".join(f"coalesce({name}, '')" for name in _TEXTS.split(", "))
#: What was noted, and earlier errors, are JSON.
_HAS_TEXT = f"(instr(lower({_TEXT}), lower(:text)) OR instr(lower(more), lower(:escaped)))"


def ended(
    db: Db,
    *,
    task: str = "",
    state: str = "",
    text: str = "",
    before: Place | None = None,
    most: int = 50,
    looked_at: int = LOOKED_AT,
) -> tuple[Sequence[sqlite3.Row], Place | None]:
    """
    Runs that have ended, the last to end first.

    Args:
        task: The task's name, or a pattern; empty: any.
        state: `bad` or an outcome; empty: any.
        text: Is part of the error, the reason, the request, an id or what was noted; ASCII letters in any case.
        before: Where the page begins.
        most: The most runs of a page.
        looked_at: The most rows that are looked at.

    Returns:
        The runs, and where to go on; None if there are no more.
    """
    is_exact = bool(task) and not is_pattern(task)
    filters = [_HAS_TEXT] if text else []
    if task:
        filters.append("task = :task" if is_exact else "task GLOB :task")
    if state:
        filters.append("bad" if state == "bad" else "state = :state")
    given: dict[str, str | float] = {
        "task": task if is_exact else task.replace("[!", "[^"),
        "state": state,
        "text": text,
        "escaped": json.dumps(text)[1:-1],
    }
    given |= {"looked_at": looked_at, "most": most + 1}
    if before is not None:
        given |= {"at": before[0], "id": before[1]}
    walk = _walk(_parts(state, is_exact=is_exact), is_first=before is None)
    chosen = f"SELECT id FROM ({walk}) WHERE {' AND '.join(filters) or '1'} LIMIT :most"
    found = db.execute(f"SELECT * FROM runs WHERE id IN ({chosen}) ORDER BY settled_at DESC, id DESC", given).fetchall()
    if len(found) > most:
        return found[:most], _place(found[most - 1])
    last = db.execute(f"SELECT settled_at, id FROM ({walk}) LIMIT 1 OFFSET :looked_at - 1", given).fetchone()
    return found, None if last is None else _place(last)


def _parts(state: str, *, is_exact: bool) -> Sequence[str]:
    """The parts to walk through, each along its own index: bad runs are few, and separate from the successes."""
    if state not in ("", "succeeded"):
        return _OTHER, _DEAD
    if is_exact:
        return (_OF_TASK,)
    return (_SUCCEEDED,) if state else (_SUCCEEDED, _OTHER, _DEAD)


def _walk(parts: Sequence[str], *, is_first: bool) -> str:
    place = "" if is_first else " AND settled_at <= :at AND (settled_at, id) < (:at, :id)"
    union = " UNION ALL ".join(
        f"SELECT {_TEXTS}, settled_at, task, state, bad, more FROM runs WHERE {part}{place}" for part in parts
    )
    return f"{union} ORDER BY settled_at DESC, id DESC LIMIT :looked_at"


def _place(row: sqlite3.Row) -> Place:
    return row["settled_at"], row["id"]


def find(
    db: Db,
    *,
    task: str | None = None,
    state: str | None = None,
    after: float | None = None,
    most: int = 50,
) -> Sequence[sqlite3.Row]:
    """Runs that match all given conditions, the newest first; `state` is the one that readers see."""
    states = [name for name in (*UNENDED, state) if state in (name, READABLE_STATES.get(name or ""))]
    return db.execute(
        "SELECT * FROM runs WHERE (:task IS NULL OR task = :task) AND (:after IS NULL OR scheduled_at > :after) "
        "AND (:state IS NULL OR state IN (SELECT value FROM json_each(:states))) ORDER BY id DESC LIMIT :most",
        {"task": task, "after": after, "state": state, "states": json.dumps(states), "most": most},
    ).fetchall()


def unended(db: Db, most: int) -> Sequence[sqlite3.Row]:
    """Runs of all workers that have not ended, the last to be scheduled first."""
    return db.execute(
        "SELECT * FROM runs WHERE id IN (SELECT id FROM runs INDEXED BY runs_unsettled WHERE settled_at IS NULL "
        "ORDER BY id DESC LIMIT ?) ORDER BY id DESC",
        (most,),
    ).fetchall()


def named(db: Db, ids: Iterable[str]) -> Sequence[sqlite3.Row]:
    """The runs with these ids."""
    return db.execute(
        "SELECT * FROM runs WHERE id IN (SELECT value FROM json_each(?))", (json.dumps(list(ids)),)
    ).fetchall()


def siblings(db: Db, first: str, most: int, looked_at: int = 2_000) -> Sequence[sqlite3.Row]:
    """
    The runs of one request, in the order of scheduling.

    Args:
        first: The first of them: ids begin with their time, so that the others follow it.
        most: The most runs.
        looked_at: The most runs that are looked at from the first one on.
    """
    return db.execute(
        "SELECT * FROM (SELECT * FROM runs WHERE id >= ? ORDER BY id LIMIT ?) WHERE first = ? "
        "ORDER BY scheduled_at LIMIT ?",
        (first[:13], looked_at, first, most),
    ).fetchall()


def version(db: Db) -> int:
    """A number that changes with each write over another connection."""
    return int(db.execute("PRAGMA data_version").fetchone()[0])


def arguments(db: Db, id: str) -> str | None:
    """The stored arguments of a run, as JSON; None if it has none."""
    found = db.execute("SELECT arguments FROM runs WHERE id = ?", (id,)).fetchone()
    return None if found is None or found[0] is None else str(found[0])
