"""The same on a real PostgreSQL, through SQLAlchemy and through its drivers, with commits that the server refuses."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import asyncpg
import psycopg
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from aftertask.events import Dropped
from database.stores import CommittingAsyncStore, CoreStore, FlushingStore, Shop, Store, SyncStore
from kit import tasks_come_first
from live.postgres import postgres

pytestmark = [pytest.mark.long, pytest.mark.timeout(120), tasks_come_first]

SERIALIZABLE = "SERIALIZABLE"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A PostgreSQL of this module."""
    with postgres() as address:
        yield address


def sync_engine(address: str, **options: Any) -> Any:
    return create_engine(f"postgresql+psycopg:{address}", **options)


def async_engine(address: str, **options: Any) -> Any:
    return create_async_engine(f"postgresql+asyncpg:{address}", **options)


class DriverStore(Store):
    """A database without SQLAlchemy."""

    commits_by_hand = False
    in_use = 0

    def __init__(self, address: str) -> None:
        self.look = sync_engine(address)
        SyncStore(self.look)
        self.address = f"postgresql:{address}"

    def rows(self) -> int:
        with self.look.connect() as connection:
            return int(connection.execute(text("select count(*) from orders")).scalar_one())

    def checked_out(self) -> int:
        return self.in_use

    def close(self) -> None:
        self.look.dispose()


class AsyncpgStore(DriverStore):
    """asyncpg with a transaction around the request."""

    error = "asyncpg.exceptions.ForeignKeyViolationError"

    async def session(self) -> AsyncIterator[Any]:
        """As asyncpg's docs show it, with a pool."""
        async with asyncpg.create_pool(self.address, min_size=1, max_size=2) as pool, pool.acquire() as connection:
            self.in_use += 1
            try:
                async with connection.transaction():
                    yield connection
            finally:
                self.in_use -= 1

    async def insert(self, session: Any, customer: int | None = None) -> None:
        await session.execute("insert into orders (customer) values ($1)", customer)

    async def select(self, session: Any) -> None:
        await session.fetch("select 1")


class PsycopgStore(DriverStore):
    """psycopg, which begins a transaction by itself."""

    error = "psycopg.errors.ForeignKeyViolation"
    commits_by_hand = True

    def session(self) -> Iterator[Any]:
        """As psycopg's docs show it."""
        # By itself a connection stays open when its commit fails.
        with contextlib.closing(psycopg.connect(self.address)) as connection, connection:
            self.in_use += 1
            try:
                yield connection
            finally:
                self.in_use -= 1

    def insert(self, session: Any, customer: int | None = None) -> None:
        session.execute("insert into orders (customer) values (%s)", [customer])

    def select(self, session: Any) -> None:
        session.execute("select 1")

    def commit(self, session: Any) -> None:
        session.commit()


STORES: dict[str, Callable[[str], Store]] = {
    "SQLAlchemy, psycopg": lambda address: SyncStore(sync_engine(address)),
    "SQLAlchemy, psycopg, flushed": lambda address: FlushingStore(sync_engine(address)),
    "SQLAlchemy core, psycopg": lambda address: CoreStore(sync_engine(address)),
    "SQLAlchemy, asyncpg": lambda address: CommittingAsyncStore(async_engine(address), sync_engine(address)),
    "asyncpg": AsyncpgStore,
    "psycopg": PsycopgStore,
}


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, address: str) -> Iterator[Store]:
    """Each way to PostgreSQL."""
    with contextlib.closing(STORES[request.param](address)) as store:
        yield store


@pytest.mark.parametrize(("run_after", "rows_seen", "held"), [("response", 0, 1), ("request", 1, 0)])
def test_rows_seen_and_connections_held(store: Store, run_after: str, rows_seen: int, held: int) -> None:
    """By default the task sees no row and the connection is held; after the request it sees it and none is held."""
    shop = Shop(store, run_after)
    with shop.client() as client:
        assert client.post("/mails").status_code == 200
        assert store.rows() == 1
    assert shop.rows_seen == [rows_seen] * 2
    assert shop.checked_out == [0 if type(store) is SyncStore else held] * 2  # a row not flushed needs no connection
    assert shop.hazards() == ([] if run_after == "request" else [("runs_before_commit", "mails")] * 2)
    shop.check_accounts()


@pytest.mark.parametrize(("run_after", "rows"), [("response", 0), ("request", 1)])
def test_rows_kept_after_a_failing_task(store: Store, run_after: str, rows: int) -> None:
    """By default the failure undoes the request."""
    shop = Shop(store, run_after)
    with shop.client() as client:
        assert client.post("/fails").status_code == 200
        assert store.rows() == rows
    assert shop.seen.outcomes() == [("fails", "failed"), ("mails", "skipped")]
    undone = [("runs_before_commit", "fails"), ("undoes_request", "fails")]
    assert shop.hazards() == ([] if run_after == "request" else undone)
    shop.check_accounts()


def test_a_deferred_constraint_drops_the_tasks(store: Store) -> None:
    """The commit fails, so the tasks do not run; the reason and the error's class are reported."""
    shop = Shop(store, "request")
    with shop.client() as client:
        assert client.post("/orphan").status_code == 200
        assert store.rows() == 0
    assert {(event.reason, event.error_type, event.bad) for event in shop.seen.of(Dropped)} == {
        ("request_failed", store.error, True)
    }
    assert shop.rows_seen == []
    assert shop.hazards() == []
    shop.check_accounts()


class Racing(Store):
    """Another transaction reads and writes the same between the request's write and its commit."""

    def interfere(self, look: Any) -> None:
        """Commit a transaction that this one cannot be serialized with."""
        with look.connect().execution_options(isolation_level=SERIALIZABLE) as other, other.begin():
            other.execute(text("select count(*) from orders")).scalar_one()
            other.execute(text("insert into orders (customer) values (null)"))


class RacingSync(FlushingStore, Racing):
    def insert(self, session: Any, customer: int | None = None) -> None:
        self.select(session)
        super().insert(session, customer)
        self.interfere(self.engine)


class RacingAsync(CommittingAsyncStore, Racing):
    async def insert(self, session: AsyncSession, customer: int | None = None) -> None:
        await self.select(session)
        await super().insert(session, customer)
        self.interfere(self.look)


@pytest.mark.parametrize("kind", ["psycopg", "asyncpg"])
@pytest.mark.parametrize(("run_after", "ran"), [("response", 2), ("request", 0)])
def test_a_serialization_failure_drops_the_tasks(address: str, kind: str, run_after: str, ran: int) -> None:
    """By default they have run by then, for an order that never was; after the request they are dropped."""
    store: Store = (
        RacingSync(sync_engine(address, isolation_level=SERIALIZABLE))
        if kind == "psycopg"
        else RacingAsync(async_engine(address, isolation_level=SERIALIZABLE), sync_engine(address))
    )
    shop = Shop(store, run_after)
    with contextlib.closing(store), shop.client() as client:
        assert client.post("/mails").status_code == 200
        assert store.rows() == 1  # the other one's
    assert len(shop.rows_seen) == ran
    if run_after == "request":
        assert {(event.reason, event.error_type) for event in shop.seen.of(Dropped)} == {
            (
                "request_failed",
                {"psycopg": "sqlalchemy.exc.OperationalError", "asyncpg": "sqlalchemy.exc.DBAPIError"}[kind],
            )
        }
    shop.check_accounts()


def test_what_was_committed_by_hand_is_no_hazard(store: Store) -> None:
    """Reading again after that is none either, but to psycopg, which shows only that a transaction is open."""
    if not store.commits_by_hand:
        pytest.skip("its dependency commits by a context manager")
    shop = Shop(store, "response")
    with shop.client() as client:
        assert client.post("/commits").status_code == 200
    assert shop.hazards() == ([("runs_before_commit", "mails")] * 2 if isinstance(store, PsycopgStore) else [])
