"""Transactions of a request that are open when its tasks start or fail: `runs_before_commit`, `undoes_request`."""

from __future__ import annotations

import gc
import sqlite3
import subprocess
import sys
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import aiosqlite
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from starlette.background import BackgroundTask
from starlette.responses import JSONResponse

from aftertask import AftertaskMiddleware, HazardFound, Settings, options
from aftertask.signals import usual
from aftertask.testing import Recorder
from database.stores import Base, Order
from kit import tasks_come_first

pytestmark = tasks_come_first

INSERT = "insert into orders (customer) values (null)"


async def mails() -> None:
    """A task."""


async def fails() -> None:
    """A task that fails."""
    raise ConnectionError("mail server down")


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """A database file."""
    engine = create_engine(f"sqlite:///{tmp_path / 'shop.db'}")
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


class Watched:
    """An app with one endpoint under the middleware, and the hazards that are found."""

    def __init__(self, endpoint: Callable[..., Any], **settings: Any) -> None:
        self.events, self.registry = Recorder(), CollectorRegistry()
        self.app = FastAPI()
        chosen = Settings(registry=self.registry, **settings)
        self.app.add_middleware(AftertaskMiddleware, settings=chosen, signals=[*usual(chosen), self.events])
        self.app.get("/")(endpoint)

    def get(self) -> Watched:
        """Call the endpoint."""
        assert TestClient(self.app, raise_server_exceptions=False).get("/").status_code == 200
        return self

    @property
    def found(self) -> list[HazardFound]:
        """The hazards."""
        return self.events.of(HazardFound)

    @property
    def kinds(self) -> list[str]:
        """Their kinds."""
        return [event.kind for event in self.found]


def inserting(dependency: Callable[..., Any], statement: str = INSERT, *added: Any) -> Callable[..., Any]:
    """An endpoint that runs a statement by what the dependency yields, and adds tasks."""

    def endpoint(tasks: BackgroundTasks, given: Any = Depends(dependency)) -> None:
        given.execute(text(statement))
        for task in added or (mails,):
            tasks.add_task(task)

    return endpoint


@pytest.mark.parametrize(
    ("statement", "is_found"),
    [
        (INSERT, True),
        ("  -- who\n /* why */ INSERT into orders (customer) select 1", True),
        ("with new as (select 1 as customer) insert into orders (customer) select customer from new", True),
        ("update orders set customer = 1", True),
        ("delete from orders", True),
        ("create table more (id integer)", True),
        ("select * from orders", False),
        ("with deleted as (select 1 as update_) select * from deleted", False),
        ("pragma user_version", False),
    ],
)
def test_only_what_writes_is_a_hazard(engine: Engine, statement: str, is_found: bool) -> None:
    """A transaction that only reads has nothing to commit."""

    def session() -> Iterator[Session]:
        with Session(engine) as session:
            yield session
            session.commit()

    assert Watched(inserting(session, statement)).get().kinds == ["runs_before_commit"] * is_found


def test_a_changed_row_is_a_hazard_and_a_loaded_one_is_none(engine: Engine) -> None:
    """What the session would send at its commit counts, before it is sent."""
    with Session(engine) as session:
        session.add(Order(id=1))
        session.commit()

    def session() -> Iterator[Session]:
        with Session(engine) as session:
            yield session
            session.commit()

    def endpoint(tasks: BackgroundTasks, change: bool = False, session: Session = Depends(session)) -> None:
        order = session.get(Order, 1)
        assert order is not None
        order.customer = 7 if change else order.customer
        tasks.add_task(mails)

    shop = Watched(endpoint).get()
    assert shop.kinds == []
    TestClient(shop.app).get("/?change=true")
    assert shop.kinds == ["runs_before_commit"]


def test_a_connection_that_commits_by_itself_is_no_hazard(engine: Engine) -> None:
    """Nothing is left to commit."""

    def connection() -> Iterator[Any]:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            yield connection

    assert Watched(inserting(connection)).get().kinds == []


def test_a_rollback_by_hand_is_no_hazard(engine: Engine) -> None:
    """What was written is gone already."""

    def session() -> Iterator[Session]:
        with Session(engine) as session:
            yield session
            session.commit()

    def endpoint(tasks: BackgroundTasks, session: Session = Depends(session)) -> None:
        session.execute(text(INSERT))
        session.rollback()
        tasks.add_task(mails)

    assert Watched(endpoint).get().kinds == []


class Repository:
    """What many apps have between an endpoint and its session."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def execute(self, statement: Any) -> None:
        """Run a statement."""
        self.session.execute(statement)


def test_a_session_that_the_yielded_object_holds(engine: Engine) -> None:
    """It is found in the attributes of what the dependency yields."""

    def repository() -> Iterator[Repository]:
        with Session(engine) as session:
            yield Repository(session)
            session.commit()

    (hazard,) = Watched(inserting(repository)).get().found
    assert "repository" in hazard.advice


def test_the_innermost_dependency_is_named(engine: Engine) -> None:
    """It is the one that commits; the remedy is for it."""

    def commits() -> Iterator[Session]:
        with Session(engine) as session, session.begin():
            yield session

    def passes_on(session: Session = Depends(commits)) -> Session:
        return session

    (hazard,) = Watched(inserting(passes_on)).get().found
    assert ".commits, a dependency of its request" in hazard.advice
    assert "passes_on" not in hazard.advice and "Depends(" in hazard.advice


def test_a_session_that_is_not_yielded_has_another_remedy(engine: Engine) -> None:
    """A scope ends nothing there."""
    with Session(engine) as shared:

        def session() -> Session:
            return shared

        (hazard,) = Watched(inserting(session)).get().found
    assert 'run_after="request"' in hazard.advice and "Depends(" not in hazard.advice


def test_an_overridden_dependency_is_seen(engine: Engine) -> None:
    """It is named by the one that it replaces, as the endpoint has it."""

    def real() -> Iterator[Session]:
        raise AssertionError("overridden")
        yield

    def override() -> Iterator[Session]:
        with Session(engine) as session:
            yield session
            session.commit()

    shop = Watched(inserting(real))
    shop.app.dependency_overrides[real] = override
    (hazard,) = shop.get().found
    assert ".real, a dependency" in hazard.advice


def test_a_scoped_session_is_its_session(engine: Engine) -> None:
    """Asking does not create one."""
    scoped = scoped_session(sessionmaker(engine), scopefunc=lambda: "the only one")

    def session() -> Iterator[Any]:
        yield scoped
        scoped.commit()
        scoped.remove()

    assert Watched(inserting(session)).get().kinds == ["runs_before_commit"]

    def unused(tasks: BackgroundTasks, session: Any = Depends(session)) -> None:
        tasks.add_task(lambda: has.append(scoped.registry.has()))

    has: list[bool] = []
    assert Watched(unused).get().kinds == []
    assert has == [False]


@pytest.mark.parametrize("kind", ["sqlite3", "aiosqlite"])
def test_drivers_that_show_an_open_transaction(tmp_path: Path, kind: str) -> None:
    """sqlite3 and aiosqlite begin one with the first write."""
    file = tmp_path / "shop.db"

    async def connection() -> AsyncIterator[Any]:
        if kind == "aiosqlite":
            async with aiosqlite.connect(file) as connection:
                yield connection
                await connection.commit()
        else:
            connection = sqlite3.connect(file)
            yield connection
            connection.commit()
            connection.close()

    async def endpoint(tasks: BackgroundTasks, write: bool = True, given: Any = Depends(connection)) -> None:
        for statement in ("create table if not exists orders (id integer)", "insert into orders values (1)")[
            : 1 + write
        ]:
            done = given.execute(statement)
            if kind == "aiosqlite":
                await done
        tasks.add_task(mails)

    shop = Watched(endpoint).get()
    assert shop.kinds == ["runs_before_commit"]
    TestClient(shop.app).get("/?write=false")
    assert shop.kinds == ["runs_before_commit"]


def test_each_task_is_logged_once_and_counted_always(
    engine: Engine, capsys: pytest.CaptureFixture[str], no_log_handlers: None
) -> None:
    """One line for each task and kind."""

    def session() -> Iterator[Session]:
        with Session(engine) as session, session.begin():
            yield session

    shop = Watched(inserting(session, INSERT, mails, fails))
    for _ in range(3):
        shop.get()
    lines = [line for line in capsys.readouterr().err.splitlines() if '"task.hazard"' in line]
    assert len(lines) == 3  # mails before the commit; fails before the commit and undoing it
    counted = {
        (s.labels["task"].rpartition(".")[2], s.labels["kind"]): s.value
        for family in shop.registry.collect()
        for s in family.samples
        if s.name == "aftertask_hazards_total"
    }
    assert counted == {
        ("mails", "runs_before_commit"): 3,
        ("fails", "runs_before_commit"): 3,
        ("fails", "undoes_request"): 3,
    }


@pytest.mark.parametrize("on_failure", ["stop", "continue", "contain"])
def test_only_a_failure_that_gets_out_undoes_the_request(engine: Engine, on_failure: Any) -> None:
    """A contained one does not reach the dependency, and the row is kept."""

    def session() -> Iterator[Session]:
        with Session(engine) as session, session.begin():
            yield session

    shop = Watched(inserting(session), on_failure=on_failure)
    shop.app.get("/fails")(inserting(session, INSERT, fails))
    TestClient(shop.app, raise_server_exceptions=False).get("/fails")
    assert ("undoes_request" in shop.kinds) is (on_failure != "contain")
    with engine.connect() as connection:
        assert connection.execute(text("select count(*) from orders")).scalar_one() == (on_failure == "contain")


def test_a_timeout_undoes_the_request_like_a_failure(engine: Engine) -> None:
    """It comes out in the same way."""
    import anyio

    async def hangs() -> None:
        await anyio.sleep_forever()

    def session() -> Iterator[Session]:
        with Session(engine) as session, session.begin():
            yield session

    shop = Watched(inserting(session, INSERT, options(hangs, timeout=0.05))).get()
    assert shop.kinds == ["runs_before_commit", "undoes_request"]


def test_tasks_that_the_endpoint_awaits_itself_are_no_hazard(engine: Engine) -> None:
    """Its own code is the caller, before there is a response; FastAPI runs them again after it."""

    def session() -> Iterator[Session]:
        with Session(engine) as session, session.begin():
            yield session

    async def endpoint(tasks: BackgroundTasks, session: Session = Depends(session)) -> JSONResponse:
        session.execute(text(INSERT))
        tasks.add_task(mails)
        await tasks()
        return JSONResponse({})

    shop = Watched(endpoint).get()
    assert [outcome for _, outcome in shop.events.outcomes()] == ["succeeded"] * 2
    assert shop.kinds == ["runs_before_commit"]


def test_what_a_task_writes_itself_is_no_hazard(engine: Engine) -> None:
    """Its own session is not the request's."""

    def writes() -> None:
        with Session(engine) as session:
            session.execute(text(INSERT))
            session.commit()

    def session() -> Iterator[Session]:
        with Session(engine) as session:
            yield session

    shop = Watched(inserting(session, "select 1", writes, mails)).get()
    assert shop.kinds == []
    assert [outcome for _, outcome in shop.events.outcomes()] == ["succeeded"] * 2


def test_a_task_of_a_returned_response_is_not_seen(engine: Engine) -> None:
    """As the docs say: without injected tasks FastAPI shows no dependency. `aftertask check` finds it."""

    def session() -> Iterator[Session]:
        with Session(engine) as session, session.begin():
            yield session

    def endpoint(session: Session = Depends(session)) -> JSONResponse:
        session.execute(text(INSERT))
        return JSONResponse({}, background=BackgroundTask(mails))

    assert Watched(endpoint).get().kinds == []


def test_sqlalchemy_is_never_imported_by_us() -> None:
    """It is an app's own choice."""
    code = """
import sys
from fastapi import BackgroundTasks, FastAPI
from fastapi.testclient import TestClient
from aftertask import AftertaskMiddleware
app = FastAPI()
app.add_middleware(AftertaskMiddleware)
@app.get("/")
def endpoint(tasks: BackgroundTasks) -> None:
    tasks.add_task(print)
TestClient(app).get("/")
assert "sqlalchemy" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_sqlalchemy_that_is_imported_late_is_seen(tmp_path: Path) -> None:
    """From the first batch after its import."""
    code = f"""
from fastapi import BackgroundTasks, Depends, FastAPI
from fastapi.testclient import TestClient
from aftertask import AftertaskMiddleware, HazardFound
app, kinds = FastAPI(), []
app.add_middleware(AftertaskMiddleware, signals=[lambda e: isinstance(e, HazardFound) and kinds.append(e.kind)])
def session():
    from sqlalchemy import create_engine, text
    with create_engine("sqlite:///{tmp_path / "late.db"}").begin() as connection:
        connection.execute(text("create table if not exists orders (id integer)"))
        connection.execute(text("insert into orders values (1)"))
        yield connection
@app.get("/")
def endpoint(tasks: BackgroundTasks, given=Depends(session)) -> None:
    tasks.add_task(print)
client = TestClient(app)
client.get("/")
client.get("/")
assert kinds == ["runs_before_commit"], kinds
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_dialect_that_breaks_while_it_is_asked_harms_no_statement(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not known counts as a transaction."""

    def breaks(connection: Any) -> bool:
        raise LookupError("of the driver")

    monkeypatch.setattr(engine.dialect, "detect_autocommit_setting", breaks, raising=False)

    def session() -> Iterator[Session]:
        with Session(engine) as session:
            yield session
            session.commit()

    assert Watched(inserting(session)).get().kinds == ["runs_before_commit"]


def test_a_session_class_without_a_hash_works_as_ever(
    engine: Engine, capsys: pytest.CaptureFixture[str], no_log_handlers: None
) -> None:
    """Our listener cannot keep it, which is logged once; what it has not sent yet is seen."""

    class Unhashable(Session):
        __hash__ = None  # type: ignore[assignment]  # as a class with __eq__ has

        def __eq__(self, other: object) -> bool:
            return self is other

    def session() -> Iterator[Session]:
        with Unhashable(engine) as session:
            yield session
            session.commit()

    shop = Watched(inserting(session)).get().get()
    assert [outcome for _, outcome in shop.events.outcomes()] == ["succeeded"] * 2
    assert capsys.readouterr().err.count('"on": "after_begin"') == 1
    with engine.connect() as connection:
        assert connection.execute(text("select count(*) from orders")).scalar_one() == 2


def test_a_fastapi_that_shows_no_dependencies_is_reported() -> None:
    """The self-check names what is not seen because of it."""
    code = """
import fastapi, fastapi.dependencies.utils as utils
def solve_dependencies(*, request): ...
utils.solve_dependencies = solve_dependencies
from aftertask import AftertaskMiddleware
AftertaskMiddleware(fastapi.FastAPI())
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert '"event": "hooks.incomplete"' in line and "dependency_cache" in line
    assert "transactions that are open when a task runs" in line


class Heavy:
    """What a dependency gives."""


@pytest.mark.parametrize("observed", [False, True])
@pytest.mark.parametrize("yielded", [False, True])
def test_what_a_dependency_returns_lives_no_longer_than_without_us(observed: bool, yielded: bool) -> None:
    """It is gone when the task runs, such as a session that is closed by that; what is yielded lives until its end."""
    kept: list[weakref.ref[Heavy]] = []
    alive: list[bool] = []

    def returns() -> Heavy:
        kept.append(weakref.ref(heavy := Heavy()))
        return heavy

    def gives() -> Iterator[Heavy]:
        kept.append(weakref.ref(heavy := Heavy()))
        yield heavy

    def looks() -> None:
        gc.collect()
        alive.append(kept[0]() is not None)

    def endpoint(tasks: BackgroundTasks, given: Any = Depends(gives if yielded else returns)) -> None:
        tasks.add_task(looks)

    if observed:
        Watched(endpoint).get()
    else:
        app = FastAPI()
        app.get("/")(endpoint)
        TestClient(app).get("/")
    assert alive == [yielded]
