"""The SQL statements: how each change of a run changes its row, and how a row is read."""

from __future__ import annotations

import functools
import json
import sqlite3
from collections.abc import Collection, Mapping, Sequence
from typing import TypeAlias, get_args

from .settle import Settled, State, Unsettled, settle

#: Where a page begins: when the run before it had ended, in seconds since the Unix epoch, and its id.
Place: TypeAlias = tuple[float, str]

#: A value that SQLite keeps.
Value: TypeAlias = str | float | int | None

UNENDED: tuple[State, ...] = get_args(State)


def upsert(db: sqlite3.Connection, row: Mapping[str, Value]) -> None:
    """Write a row, over one that has not ended."""
    _execute(db, _upsert_of(tuple(row)), row)


@functools.cache
def _upsert_of(names: tuple[str, ...]) -> str:
    marks = ", ".join(f":{name}" for name in names)
    changes = ", ".join(f"{name} = excluded.{name}" for name in names if name != "id")
    return (
        f"INSERT INTO runs ({', '.join(names)}) VALUES ({marks}) ON CONFLICT (id) DO UPDATE SET {changes} "
        f"WHERE settled_at IS NULL AND owner IS excluded.owner"
    )


def _execute(db: sqlite3.Connection, statement: str, values: Mapping[str, Value]) -> sqlite3.Cursor:
    try:
        return db.execute(statement, values)
    except UnicodeEncodeError:  # a lone surrogate, such as in the name of a file: SQLite stores only valid Unicode
        texts = {name: value for name, value in values.items() if isinstance(value, str)}
        escaped = {name: text.encode("utf-8", "backslashreplace").decode() for name, text in texts.items()}
        return db.execute(statement, {**values, **escaped})


def insert(db: sqlite3.Connection, intents: Sequence[Mapping[str, Value]]) -> tuple[str, str] | None:
    """Write the intents of a response, all or none; returns the key and the run id of a conflicting run, if any."""
    for intent in intents:
        key = intent["key"]
        other = None if key is None else id_with_key(db, str(key))
        if other is not None:
            return str(key), other
    for intent in intents:
        upsert(db, intent)
    return None


def update(db: sqlite3.Connection, id: str, owner: int | None, row: Mapping[str, Value]) -> bool:
    """Change the row of a run that has not ended and belongs to this worker; False if it does not."""
    return _execute(db, _update_of(tuple(row)), {**row, "_id": id, "_owner": owner}).rowcount == 1


@functools.cache
def _update_of(names: tuple[str, ...]) -> str:
    changes = ", ".join(f"{name} = :{name}" for name in names)
    return f"UPDATE runs SET {changes} WHERE id = :_id AND owner IS :_owner AND settled_at IS NULL"


def id_with_key(db: sqlite3.Connection, key: str, except_of: int | None = None) -> str | None:
    """The unfinished run with this key, ignoring runs of the worker `except_of`."""
    found = db.execute(
        "SELECT id FROM runs WHERE key = ?1 AND settled_at IS NULL AND (?2 IS NULL OR owner IS NOT ?2)",
        (key, except_of),
    ).fetchone()
    return None if found is None else str(found[0])


# --- workers


def join(db: sqlite3.Connection, pid: int, now: float) -> int:
    """Add a worker and return its number, which no other worker of this file ever has."""
    return int(db.execute("INSERT INTO workers (pid, started_at) VALUES (?, ?)", (pid, now)).lastrowid or 0)


def leave(db: sqlite3.Connection, number: int) -> None:
    """Forget a worker that has ended, unless it has left something to settle."""
    left = "SELECT 1 FROM runs WHERE owner = ? AND settled_at IS NULL"
    db.execute(f"DELETE FROM workers WHERE number = ? AND NOT EXISTS ({left})", (number, number))


def request_cancel(db: sqlite3.Connection, id: str, now: float) -> bool:
    """Have a run cancelled by its worker, or drop it if no worker has it; False if none of this id is in flight."""
    done = db.execute("UPDATE runs SET cancel = 1 WHERE id = ? AND settled_at IS NULL", (id,))
    update(db, id, None, {"state": "dropped", "reason": "cancel_run", "settled_at": now})
    return done.rowcount == 1


def settle_worker(db: sqlite3.Connection, number: int, now: float) -> list[tuple[Settled, sqlite3.Row]]:
    """Settle every run of a worker that is gone, and forget the worker; each run with its row as it was."""
    settled: list[tuple[Settled, sqlite3.Row]] = []
    for row in db.execute("SELECT * FROM runs WHERE owner = ? AND settled_at IS NULL", (number,)).fetchall():
        left = Unsettled(row["id"], row["state"], bool(row["durable"]), bool(row["idempotent"]), row["recoveries"])
        verdict = settle(left)
        if verdict.action == "rerun":
            change: dict[str, Value] = {"state": "ready", "owner": None, "recoveries": verdict.run.recoveries}
            change["ready_at"] = now
        else:
            change = {"state": "lost", "reason": "crash", "dead": verdict.dead, "settled_at": now, "bad": 1}
        update(db, row["id"], number, change)
        settled.append((verdict, row))
    db.execute("DELETE FROM workers WHERE number = ?", (number,))
    return settled


def forget_history(db: sqlite3.Connection, number: int | None, kept: Collection[str]) -> None:
    """Delete rows of runs that are not durable, whose end could not be written; `kept` are still in flight."""
    db.execute(
        "DELETE FROM runs WHERE owner = ? AND settled_at IS NULL AND NOT durable AND key IS NULL "
        "AND id NOT IN (SELECT value FROM json_each(?))",
        (number, json.dumps(list(kept))),
    )


def free(
    db: sqlite3.Connection, skipped: Collection[str], waiting: Collection[str], most: int
) -> Sequence[sqlite3.Row]:
    """Runs that any worker may run, the oldest first, without these ids and without tasks that wait."""
    return db.execute(
        "SELECT * FROM runs WHERE owner IS NULL AND state = 'ready' AND settled_at IS NULL "
        "AND id NOT IN (SELECT value FROM json_each(?)) AND task NOT IN (SELECT value FROM json_each(?)) "
        "ORDER BY ready_at LIMIT ?",
        (json.dumps(list(skipped)), json.dumps(list(waiting)), most),
    ).fetchall()


def to_cancel(db: sqlite3.Connection, number: int | None) -> list[str]:
    """Runs of this worker that are to be cancelled."""
    found = db.execute("SELECT id FROM runs WHERE owner = ? AND settled_at IS NULL AND cancel", (number,))
    return [str(id) for (id,) in found]


def count(db: sqlite3.Connection) -> tuple[dict[str, int], int]:
    """How many runs are in each state before their end, and how many dead letters there are."""
    found = db.execute("SELECT state, count(*) FROM runs WHERE settled_at IS NULL GROUP BY state")
    (dead,) = db.execute("SELECT count(*) FROM runs WHERE dead IS NOT NULL").fetchone()
    return {**dict.fromkeys(UNENDED, 0), **{str(state): int(number) for state, number in found}}, int(dead)


def prune(db: sqlite3.Connection, befores: tuple[float, float], most_rows: int, most: int) -> int:
    """
    Delete at most `most` successes, and as many others, that have ended; returns the number of rows deleted.

    Those that ended before `befores` (successes, others) are too old, those beyond `most_rows` of each too many. Dead
    letters stay.
    """
    deleted = 0
    for which, before in zip(("= 'succeeded'", "!= 'succeeded' AND dead IS NULL"), befores, strict=True):
        of_these = f"FROM runs WHERE settled_at IS NOT NULL AND state {which}"
        (last,) = db.execute(
            f"SELECT max((SELECT settled_at {of_these} ORDER BY settled_at DESC LIMIT 1 OFFSET ?), ?)",
            (most_rows, before),
        ).fetchone()
        chosen = f"SELECT id {of_these} AND settled_at <= ? ORDER BY settled_at LIMIT ?"
        limit = before if last is None else last
        deleted += db.execute(f"DELETE FROM runs WHERE id IN ({chosen})", (limit, most)).rowcount
    return deleted


# --- dead letters


def replay(db: sqlite3.Connection, letter: str, new: str, now: float) -> bool:
    """Add a copy of a dead letter, ready for any worker; False if it is no longer one, or another run has its key."""
    done = db.execute(
        "UPDATE runs SET dead = NULL, replayed_by = ? WHERE id = ? AND dead IS NOT NULL "
        "AND NOT EXISTS (SELECT 1 FROM runs AS other WHERE other.key = runs.key AND other.settled_at IS NULL)",
        (new, letter),
    )
    if done.rowcount != 1:
        return False
    same = "task, code, durable, idempotent, key, arguments, http_method, http_route, request_id, trace_id, span_id"
    db.execute(
        f"INSERT INTO runs (id, state, origin, replay_of, scheduled_at, ready_at, {same}) "
        f"SELECT ?, 'ready', 'dead_letter', id, ?, ?, {same} FROM runs WHERE id = ?",
        (new, now, now, letter),
    )
    return True


def delete(db: sqlite3.Connection, letter: str) -> bool:
    """Delete a dead letter for good; False if it is no longer one."""
    return db.execute("DELETE FROM runs WHERE id = ? AND dead IS NOT NULL", (letter,)).rowcount == 1
