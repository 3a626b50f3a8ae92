"""Databases, each with the dependency that its docs show, and a shop whose tasks look at the rows."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

from fastapi import BackgroundTasks, Depends, FastAPI
from prometheus_client import CollectorRegistry
from sqlalchemy import Connection, Engine, ForeignKey, create_engine, event, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from starlette.responses import StreamingResponse
from starlette.testclient import TestClient

from aftertask import AftertaskMiddleware, HazardFound, Settings
from aftertask.signals import usual
from aftertask.testing import Recorder
from kit import FASTAPI

#: Since this version a dependency has a scope.
HAS_SCOPE = FASTAPI >= (0, 121)


class Base(DeclarativeBase):
    """The tables."""


class Customer(Base):
    """An order's customer; there is none."""

    __tablename__ = "customers"
    id: Mapped[int] = mapped_column(primary_key=True)


class Order(Base):
    """A row that a request writes; whether its customer exists is found out by the commit."""

    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[int | None] = mapped_column(ForeignKey("customers.id", deferrable=True, initially="DEFERRED"))


class Store:
    """
    A database and the dependency for it.

    Attributes:
        session: The dependency, which commits after its `yield` and rolls back on an error.
        error: What a commit raises whose row has a customer that does not exist.
        commits_by_hand: Whether an endpoint may commit, too.
    """

    error = "sqlalchemy.exc.IntegrityError"
    commits_by_hand = True
    session: Callable[..., Any]
    insert: Callable[..., Any]
    select: Callable[..., Any]
    commit: Callable[..., Any]

    def rows(self) -> int:
        """The rows that another connection sees."""
        raise NotImplementedError

    def checked_out(self) -> int:
        """How many connections of the app's pool are in use."""
        raise NotImplementedError

    async def stop(self) -> None:
        """Close what belongs to the app's event loop."""

    def close(self) -> None:
        """Close all other connections."""


def _enforce(connection: Any, record: object) -> None:
    cursor = connection.cursor()
    cursor.execute("pragma foreign_keys = on")
    cursor.close()


class SyncStore(Store):
    """SQLAlchemy's sync session, which FastAPI runs in threads."""

    session_class: Any = Session

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        if engine.dialect.name == "sqlite":
            event.listen(engine, "connect", _enforce)
        Base.metadata.drop_all(engine)
        Base.metadata.create_all(engine)

    def session(self) -> Iterator[Session]:
        """As FastAPI's docs show it."""
        with self.session_class(self.engine) as session:
            try:
                yield session
                session.commit()
            except Exception:
                session.rollback()
                raise

    def insert(self, session: Any, customer: int | None = None) -> None:
        """Write a row, which is sent by the commit."""
        session.add(Order(customer=customer))

    def select(self, session: Any) -> None:
        """Read."""
        session.execute(text("select count(*) from orders"))

    def commit(self, session: Any) -> None:
        """Commit by hand."""
        session.commit()

    def rows(self) -> int:
        with self.engine.connect() as connection:
            return connection.execute(text("select count(*) from orders")).scalar_one()

    def checked_out(self) -> int:
        return self.engine.pool.checkedout()  # type: ignore[attr-defined]  # a queue pool

    def close(self) -> None:
        self.engine.dispose()


class FlushingStore(SyncStore):
    """The same with a row that is sent before the commit."""

    def insert(self, session: Any, customer: int | None = None) -> None:
        super().insert(session, customer)
        session.flush()


class CoreStore(SyncStore):
    """A connection of SQLAlchemy's core, by `engine.begin()`, and SQL by hand."""

    commits_by_hand = False

    def session(self) -> Iterator[Connection]:  # type: ignore[override]  # another kind of it
        """As SQLAlchemy's docs show it."""
        with self.engine.begin() as connection:
            yield connection

    def insert(self, session: Any, customer: int | None = None) -> None:
        session.execute(text("insert into orders (customer) values (:customer)"), {"customer": customer})


class SQLModelStore(SyncStore):
    """SQLModel's session."""

    def __init__(self, engine: Engine) -> None:
        import sqlmodel

        self.session_class = sqlmodel.Session
        super().__init__(engine)


class AsyncStore(Store):
    """SQLAlchemy's async session."""

    commits_by_hand = False

    def __init__(self, engine: AsyncEngine, look: Engine) -> None:
        self.engine, self.look = engine, look
        if engine.dialect.name == "sqlite":
            event.listen(engine.sync_engine, "connect", _enforce)
        Base.metadata.drop_all(look)
        Base.metadata.create_all(look)

    async def session(self) -> AsyncIterator[AsyncSession]:
        """As SQLAlchemy's docs show it."""
        async with AsyncSession(self.engine) as session, session.begin():
            yield session

    async def insert(self, session: AsyncSession, customer: int | None = None) -> None:
        session.add(Order(customer=customer))
        await session.flush()

    async def select(self, session: AsyncSession) -> None:
        await session.execute(text("select count(*) from orders"))

    async def commit(self, session: AsyncSession) -> None:
        await session.commit()

    def rows(self) -> int:
        with self.look.connect() as connection:
            return connection.execute(text("select count(*) from orders")).scalar_one()

    def checked_out(self) -> int:
        return self.engine.pool.checkedout()  # type: ignore[attr-defined]  # a queue pool

    async def stop(self) -> None:
        await self.engine.dispose()

    def close(self) -> None:
        self.look.dispose()


class CommittingAsyncStore(AsyncStore):
    """The same with a commit after the `yield`."""

    commits_by_hand = True

    async def session(self) -> AsyncIterator[AsyncSession]:
        """As FastAPI's docs show it for a sync session."""
        async with AsyncSession(self.engine) as session:
            try:
                yield session
                await session.commit()
            except Exception:
                await session.rollback()
                raise


SQLITE: dict[str, Callable[[Path], Store]] = {
    "sync": lambda file: SyncStore(create_engine(f"sqlite:///{file}")),
    "flushed": lambda file: FlushingStore(create_engine(f"sqlite:///{file}")),
    "core": lambda file: CoreStore(create_engine(f"sqlite:///{file}")),
    "sqlmodel": lambda file: SQLModelStore(create_engine(f"sqlite:///{file}")),
    "async": lambda file: AsyncStore(
        create_async_engine(f"sqlite+aiosqlite:///{file}"), create_engine(f"sqlite:///{file}")
    ),
    "async, commit": lambda file: CommittingAsyncStore(
        create_async_engine(f"sqlite+aiosqlite:///{file}"), create_engine(f"sqlite:///{file}")
    ),
}


class Shop:
    """
    An app with a store; its tasks look at the rows that are committed.

    Args:
        store: The database.
        run_after: `Settings.run_after`.
        scope: The scope of the dependency; None is FastAPI's default.
        layers: Middleware inside ours.
        settings: More of `Settings`.
    """

    def __init__(self, store: Store, run_after: Any, scope: str | None = None, *layers: Any, **settings: Any) -> None:
        self.store, self.seen = store, Recorder()
        self.rows_seen, self.checked_out = list[int](), list[int]()
        self.registry = CollectorRegistry()

        @contextlib.asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[None]:
            yield
            await store.stop()

        app = self.app = FastAPI(lifespan=lifespan)
        for layer in layers:
            app.add_middleware(layer)
        chosen = Settings(registry=self.registry, run_after=run_after, **settings)
        app.add_middleware(AftertaskMiddleware, settings=chosen, signals=[*usual(chosen), self.seen])
        self.depends = Depends(store.session) if scope is None else Depends(store.session, scope=scope)  # type: ignore[arg-type]
        self._route()

    def _route(self) -> None:
        store, depends = self.store, self.depends

        def finish(what: str, tasks: BackgroundTasks) -> Any:
            tasks.add_task(self.fails if what == "fails" else self.mails)
            tasks.add_task(self.mails)
            return StreamingResponse(iter(["streamed"]), background=tasks) if what == "streams" else {"ok": True}

        customer = {"orphan": 1}
        if inspect.iscoroutinefunction(store.insert):

            async def buy(what: str, tasks: BackgroundTasks, session: Any = depends) -> Any:
                await (store.select(session) if what == "reads" else store.insert(session, customer.get(what)))
                if what == "commits":
                    await store.commit(session)
                    await store.select(session)
                return finish(what, tasks)

        else:

            def buy(what: str, tasks: BackgroundTasks, session: Any = depends) -> Any:  # type: ignore[misc]
                store.select(session) if what == "reads" else store.insert(session, customer.get(what))
                if what == "commits":
                    store.commit(session)
                    store.select(session)
                return finish(what, tasks)

        self.app.post("/{what}")(buy)

    def client(self, backend: Any = "asyncio") -> TestClient:
        """A client on one event loop, which does not raise what the app raises; to be used as a context."""
        return TestClient(self.app, raise_server_exceptions=False, backend=backend)

    def mails(self) -> None:
        """A task that looks at the database."""
        self.checked_out.append(self.store.checked_out())
        self.rows_seen.append(self.store.rows())

    def fails(self) -> None:
        """A task that fails."""
        raise ConnectionError("mail server down")

    def hazards(self) -> list[tuple[str, str]]:
        """The kind and the task of each hazard."""
        return [(event.kind, event.run.task.rpartition(".")[2]) for event in self.seen.of(HazardFound)]

    def check_accounts(self) -> None:
        """Check that what was scheduled has finished, in the metrics as well."""
        scheduled = self._sum("aftertask_tasks_scheduled_total")
        assert scheduled == self._sum("aftertask_tasks_finished_total") + self._sum("aftertask_tasks_inflight")
        assert self._sum("aftertask_tasks_inflight") == 0
        assert scheduled == len(self.seen.outcomes())

    def _sum(self, name: str) -> float:
        return sum(s.value for family in self.registry.collect() for s in family.samples if s.name == name)
