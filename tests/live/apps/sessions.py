"""A shop whose session commits after its `yield`, with a pool of one connection to a database file."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import anyio
import anyio.to_thread
from fastapi import BackgroundTasks, Depends, FastAPI
from sqlalchemy import Connection, create_engine, text

from aftertask import AftertaskMiddleware, Settings

FILE = os.environ["SESSIONS_FILE"]
engine = create_engine(f"sqlite:///{FILE}", pool_size=1, max_overflow=0, pool_timeout=2)
with engine.begin() as first:
    first.execute(text("create table if not exists orders (id integer primary key)"))

app = FastAPI()
app.add_middleware(AftertaskMiddleware, settings=Settings.from_env())
begun = {number: anyio.Event() for number in (1, 2)}
seen: dict[int, Any] = {}


def session() -> Iterator[Connection]:
    """Commits after the `yield`."""
    with engine.begin() as connection:
        yield connection


def rows() -> list[int]:
    """The rows that another connection sees."""
    with closing(sqlite3.connect(FILE)) as connection:
        return [number for (number,) in connection.execute("select id from orders order by id")]


async def looks(number: int) -> None:
    """Run until the task of the other request runs, too, or for as long as a client has patience."""
    begun[number].set()
    with anyio.move_on_after(5) as scope:
        await begun[3 - number].wait()
    checked_out = engine.pool.checkedout()  # type: ignore[attr-defined]  # a queue pool
    seen[number] = {"alone": scope.cancelled_caught, "rows": await anyio.to_thread.run_sync(rows), "held": checked_out}


async def fails() -> None:
    """A task that fails."""
    raise ConnectionError("mail server down")


@app.post("/orders/{number}")
def order(number: int, tasks: BackgroundTasks, fail: bool = False, session: Connection = Depends(session)) -> int:
    """Write a row, with a task that looks at the rows."""
    session.execute(text("insert into orders (id) values (:number)"), {"number": number})
    tasks.add_task(fails) if fail else tasks.add_task(looks, number)
    return number


@app.get("/seen")
async def what_was_seen() -> dict[str, Any]:
    """What the tasks saw, and the rows that are committed."""
    return {"tasks": seen, "rows": await anyio.to_thread.run_sync(rows)}
