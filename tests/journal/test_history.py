"""What people read from a journal: every query is right, and costs the same in a file of any size."""

from __future__ import annotations

import random
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import anyio
import pytest
from prometheus_client import CollectorRegistry

from aftertask.journal import history, letters
from aftertask.journal.file import connect, prepare
from aftertask.journal.journal import Journal
from aftertask.journal.letters import Match
from aftertask.journal.rows import Place
from aftertask.signals import Metrics

STATES = ("succeeded", "failed", "dropped", "lost", "cancelled")


def fill(path: Path, number: int) -> None:
    """This many runs that have ended, many of them at the same moment, and a hundredth as many that have not."""
    prepare(path)
    chance = random.Random(number)
    with closing(connect(path)) as db:
        db.execute("PRAGMA synchronous = OFF")
        db.execute("BEGIN")
        for at in range(number):
            state = chance.choices(STATES, (90, 4, 3, 2, 1))[0]
            dead = "failed" if state == "failed" and at % 2 else None
            error = "OSError" if state == "failed" else None
            ended = None if at % 100 == 0 else 1000.0 + at // 3
            task = f"task.{at % 7}" if at % 500 else "rare"
            row = (f"{at:08d}-run", task, state if ended else "started", dead if ended else None, error, error, ended)
            db.execute(
                "INSERT INTO runs (id, task, state, dead, error_type, fingerprint, settled_at, code, owner, durable, "
                "idempotent, origin, scheduled_at, bad, error_message, stack, more, first) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, '', 1, 1, 0, 'request', 0, ?, ?, ?, ?, ?)",
                (*row, state in ("failed", "lost"), error and "refused", "x" * 9000, None, f"{at - at % 4:08d}-run"),
            )
        db.execute("COMMIT")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A journal with a few runs, and one with ten times as many."""
    folder = tmp_path_factory.mktemp("history")
    fill(folder / "small.db", 1_500)
    fill(folder / "large.db", 15_000)
    return folder


@pytest.fixture
def db(folder: Path) -> Iterator[sqlite3.Connection]:
    """The small one."""
    with closing(connect(folder / "small.db", readonly=True)) as db:
        yield db


def every_page(db: sqlite3.Connection, **query: Any) -> list[sqlite3.Row]:
    """The runs of all pages."""
    found, before = list[sqlite3.Row](), None
    while True:
        page, before = history.ended(db, before=before, **query)
        found += page
        if before is None:
            return found


QUERIES: list[dict[str, Any]] = [
    {},
    {"state": "succeeded"},
    {"state": "bad"},
    {"state": "failed"},
    {"state": "rejected"},
    {"task": "task.3"},
    {"task": "rare"},
    {"task": "task.[!3]"},
    {"task": "nothing.*"},
    {"task": "rare", "state": "bad"},
    {"text": "REFUSED"},
    {"text": "nothing"},
    {"state": "dropped", "text": "0-run"},
]


@pytest.mark.parametrize("query", QUERIES, ids=str)
@pytest.mark.parametrize("looked_at", [7, 100_000])
def test_pages_hold_every_run_once_the_newest_first(
    db: sqlite3.Connection, query: dict[str, Any], looked_at: int
) -> None:
    """Whatever the filter, and however little is looked at for a page."""
    found = every_page(db, most=50, looked_at=max(looked_at, 60), **query)
    keys = [(row["settled_at"], row["id"]) for row in found]
    assert keys == sorted(keys, reverse=True) and len(set(keys)) == len(keys)
    where, task, state = ["settled_at IS NOT NULL"], query.get("task", ""), query.get("state", "")
    where += [f"task GLOB '{task.replace('[!', '[^')}'"] if task else []
    where += ["bad" if state == "bad" else f"state = '{state}'"] if state else []
    where += [f"(error_message = lower('{query['text']}') OR id LIKE '%{query['text']}')"] if "text" in query else []
    assert len(found) == db.execute(f"SELECT count(*) FROM runs WHERE {' AND '.join(where)}").fetchone()[0]


def steps(path: Path, look: Callable[[sqlite3.Connection], object]) -> int:
    """How many hundred instructions of SQLite a query takes, on any machine."""
    count = [0]

    def tick() -> int:
        count[0] += 1
        return 0

    with closing(connect(path, readonly=True)) as db:
        db.set_progress_handler(tick, 100)
        look(db)
    return count[0]


LOOKS: dict[str, Callable[[sqlite3.Connection], object]] = {
    **{f"ended {query}": lambda db, query=query: history.ended(db, looked_at=200, **query) for query in QUERIES},  # type: ignore[misc]
    "a later page": lambda db: history.ended(db, before=(1200.0, "x"), looked_at=200),
    "unended": lambda db: history.unended(db, 10),
    "siblings": lambda db: history.siblings(db, "00000400-run", 100, looked_at=200),
    "named": lambda db: history.named(db, ["00000400-run", "nothing"]),
    "letters": lambda db: letters.letters(db, most=50),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS.keys())
def test_a_look_costs_the_same_in_a_file_of_any_size(
    folder: Path, look: Callable[[sqlite3.Connection], object]
) -> None:
    """An index leads to what is asked for, and no more than a bounded number of rows is read."""
    small, large = steps(folder / "small.db", look), steps(folder / "large.db", look)
    assert large <= 1.5 * small + 20, (small, large)


def test_siblings_are_found(db: sqlite3.Connection) -> None:
    """In the order of scheduling."""
    found = history.siblings(db, "00000400-run", 100)
    assert [row["id"] for row in found] == [f"00000{at}-run" for at in (400, 401, 402, 403)]


def test_letters_are_counted_and_grouped(db: sqlite3.Connection) -> None:
    """The groups hold every letter once; a letter without an error has a word for a fingerprint."""
    groups = letters.groups(db)
    assert sum(group.number for group in groups) == letters.count(db) == len(letters.ids(db)) > 0
    for group in groups:
        assert group.newest["id"] == letters.letters(db, group.match, most=1)[0]["id"]
        assert group.number == letters.count(db, group.match)
    assert letters.count(db, Match(fingerprint=letters.NO_ERROR)) == 0


def test_pages_of_letters_follow_each_other(db: sqlite3.Connection) -> None:
    """Each letter once, the newest first."""
    seen, before = list[str](), None
    while page := letters.letters(db, before=before, most=3):
        seen += [row["id"] for row in page]
        place: Place = page[-1]["settled_at"], page[-1]["id"]
        before = place
    assert sorted(seen) == sorted(letters.ids(db))


@pytest.mark.anyio
async def test_what_people_look_at_holds_up_nothing(tmp_path: Path) -> None:
    """A look is in a thread, over a connection of its own: while it lasts, the loop goes on, and runs are read."""
    journal = Journal(tmp_path / "tasks.db", Metrics(CollectorRegistry()).for_journal())
    journal.open()
    go, seen = threading.Event(), list[bool]()

    async def look() -> None:
        seen.append(await journal.store.browse(lambda db: go.wait(10)))

    try:
        async with anyio.create_task_group() as group:
            group.start_soon(look)
            assert await journal.store.read(history.version) > 0
            assert await journal.get_run("unknown") is None
            assert seen == []
            go.set()
        assert seen == [True]
    finally:
        journal.close()
