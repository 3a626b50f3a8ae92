"""An app with a journal, and what is in its file."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from fastapi import BackgroundTasks, Depends, FastAPI
from prometheus_client import CollectorRegistry
from starlette.testclient import TestClient

from aftertask import AftertaskMiddleware, Settings
from aftertask.signals import usual
from aftertask.testing import Recorder

Add = Callable[[BackgroundTasks], Any]


class Journaled:
    """
    Apps whose `POST /` adds tasks, over one journal.

    Args:
        folder: Where the file is.
        backend: `asyncio` or `trio`.
    """

    def __init__(self, folder: Path, backend: str) -> None:
        self.path, self.backend = folder / "tasks.db", backend
        self.registry, self.seen = CollectorRegistry(), Recorder()
        self.commit_fails = False
        self.committed = 0

    def app(self, add: Add, **settings: Any) -> FastAPI:
        """An app whose endpoint does this with its tasks, and commits when the request is over."""
        app = FastAPI()
        chosen = Settings(
            **{"journal": self.path, "registry": self.registry, "run_ids_header": "x-run-ids", **settings}
        )
        signals = [*usual(chosen), self.seen]
        app.add_middleware(AftertaskMiddleware, settings=chosen, signals=signals)

        def session() -> Iterator[None]:
            yield
            if self.commit_fails:
                raise RuntimeError("could not serialize access")
            self.committed += 1

        @app.post("/")
        def endpoint(tasks: BackgroundTasks, _: None = Depends(session)) -> Any:
            return add(tasks)

        return app

    def client(self, add: Add, **settings: Any) -> TestClient:
        """A client of such an app."""
        return TestClient(self.app(add, **settings), raise_server_exceptions=False, backend=self.backend)  # type: ignore[arg-type]

    def execute(self, sql: str, *values: Any) -> list[dict[str, Any]]:
        """The rows of a statement."""
        with closing(sqlite3.connect(self.path, timeout=20, isolation_level=None)) as db:
            db.row_factory = sqlite3.Row
            return [dict(row) for row in db.execute(sql, values)]

    def rows(self) -> list[dict[str, Any]]:
        """Every run in the file, the oldest first."""
        return self.execute("SELECT * FROM runs ORDER BY scheduled_at")

    def row(self) -> dict[str, Any]:
        """The only run in the file."""
        (row,) = self.rows()
        return row

    def metric(self, name: str, **labels: str) -> float | None:
        """The value of one sample."""
        return self.registry.get_sample_value(f"aftertask_{name}", labels)


@pytest.fixture
def shop(tmp_path: Path, anyio_backend: str) -> Journaled:
    """Apps over a fresh journal, on asyncio and on trio."""
    return Journaled(tmp_path, anyio_backend)
