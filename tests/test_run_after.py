"""Tasks after the commit, or not at all: `Settings(run_after="request")` on a real database."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastapi
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI
from prometheus_client import CollectorRegistry
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.orm import Session
from starlette.responses import StreamingResponse
from starlette.testclient import TestClient

from aftertask import AftertaskMiddleware, Settings
from aftertask.events import Dropped, Skipped
from aftertask.testing import Recorder
from kit import Layer

#: Since this version tasks run before the code after a dependency's `yield`.
TASKS_COME_FIRST = tuple(map(int, fastapi.__version__.split(".")[:2])) >= (0, 118)

pytestmark = pytest.mark.skipif(
    not TASKS_COME_FIRST, reason="before FastAPI 0.118 dependencies exit before the response"
)


class Shop:
    """An app with a database session as FastAPI's docs show it; its tasks look at the committed rows."""

    def __init__(self, engine: Engine, run_after: Any, *layers: Any, **settings: Any) -> None:
        self.engine, self.seen, self.rows_seen, self.checked_out = engine, Recorder(), list[int](), list[int]()
        self.commit_fails = False
        app = FastAPI()
        for layer in layers:
            app.add_middleware(layer)
        chosen = Settings(registry=CollectorRegistry(), run_after=run_after, **settings)
        app.add_middleware(AftertaskMiddleware, settings=chosen, signals=[self.seen])

        def session() -> Iterator[Session]:
            with Session(engine) as session:
                try:
                    yield session
                    if self.commit_fails:
                        raise RuntimeError("could not serialize access")
                    session.commit()
                except Exception:
                    session.rollback()
                    raise

        @app.post("/{what}")
        def buy(what: str, tasks: BackgroundTasks, session: Session = Depends(session)) -> Any:
            session.execute(text("insert into orders default values"))
            tasks.add_task(self.fails if what == "fails" else self.mails)
            tasks.add_task(self.mails)
            return StreamingResponse(iter(["streamed"]), background=tasks) if what == "streams" else {"ok": True}

        self.client = TestClient(app, raise_server_exceptions=False)

    def rows(self) -> int:
        """The committed rows."""
        with self.engine.connect() as connection:
            return connection.execute(text("select count(*) from orders")).scalar_one()

    def mails(self) -> None:
        """A task that looks at the database."""
        pool: Any = self.engine.pool
        self.checked_out.append(pool.checkedout())
        self.rows_seen.append(self.rows())

    def fails(self) -> None:
        """A task that fails."""
        raise ConnectionError("mail server down")


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """A database file with one table."""
    engine = create_engine(f"sqlite:///{tmp_path / 'shop.db'}")
    with engine.begin() as connection:
        connection.execute(text("create table orders (id integer primary key)"))
    yield engine
    engine.dispose()


@pytest.mark.parametrize("layers", [(), (Layer,)])
@pytest.mark.parametrize("what", ["mails", "streams"])
def test_tasks_see_the_rows_of_their_request(engine: Engine, what: str, layers: Any) -> None:
    """With `request` they start after the commit, and the request's connection is back in its pool."""
    shop = Shop(engine, "request", *layers)
    assert shop.client.post(f"/{what}").status_code == 200
    assert shop.rows_seen == [1, 1]
    assert shop.checked_out == [0, 0]
    assert shop.seen.outcomes() == [("mails", "succeeded")] * 2


def test_by_default_tasks_run_before_the_commit(engine: Engine) -> None:
    """That is FastAPI's order, and observing changes nothing."""
    shop = Shop(engine, "response")
    shop.client.post("/mails")
    assert (shop.rows_seen, shop.rows()) == ([0, 0], 1)
    assert shop.checked_out == [1, 1]


@pytest.mark.parametrize(("run_after", "rows"), [("response", 0), ("request", 1)])
def test_a_failing_task_cannot_undo_the_request(engine: Engine, run_after: str, rows: int) -> None:
    """By default its exception reaches the dependency, which rolls back although the client got 200."""
    shop = Shop(engine, run_after)
    assert shop.client.post("/fails").status_code == 200
    assert shop.rows() == rows
    assert shop.seen.outcomes() == [("fails", "failed"), ("mails", "skipped")]
    assert [event.reason for event in shop.seen.of(Skipped)] == ["sibling_failed"]


def test_tasks_of_a_failed_commit_do_not_run(engine: Engine) -> None:
    """They are dropped with the reason and the class of the error, and count as bad."""
    shop = Shop(engine, "request")
    shop.commit_fails = True
    shop.client.post("/mails")
    dropped = shop.seen.of(Dropped)
    assert [(event.reason, event.error_type, event.bad) for event in dropped] == [
        ("request_failed", "RuntimeError", True)
    ] * 2
    assert shop.rows_seen == []


def test_on_failure_holds_among_the_tasks(engine: Engine) -> None:
    """A contained failure leaves the siblings alone."""
    shop = Shop(engine, "request", on_failure="contain")
    assert shop.client.post("/fails").status_code == 200
    assert shop.seen.outcomes() == [("fails", "failed"), ("mails", "succeeded")]


def test_the_environment_can_choose_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """`AFTERTASK_RUN_AFTER`; another value is refused by name."""
    monkeypatch.setenv("AFTERTASK_RUN_AFTER", "request")
    assert Settings.from_env().run_after == "request"
    monkeypatch.setenv("AFTERTASK_RUN_AFTER", "commit")
    with pytest.raises(ValueError, match="run_after must be one of 'response', 'request', got 'commit'"):
        Settings.from_env()
