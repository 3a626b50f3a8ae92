"""An app whose tasks go on until a file says so; what became of them stands in other files."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
from fastapi import BackgroundTasks, FastAPI

from aftertask import AftertaskMiddleware, Settings, progress

FOLDER = Path(os.environ["DRAINING_FOLDER"])


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Log when the app is asked to end."""
    yield
    (FOLDER / "lifespan-ended").touch()


app = FastAPI(lifespan=lifespan)
if os.environ.get("DRAINING_BARE") != "1":
    app.add_middleware(AftertaskMiddleware, settings=Settings.from_env())


async def work() -> None:
    """Until asked to end; its cleanup awaits."""
    progress(1, 2, "half way")
    (FOLDER / "begun").touch()
    try:
        while not (FOLDER / "go").exists():  # noqa: ASYNC110  # the test says so by a file
            await anyio.sleep(0.02)
        (FOLDER / "done").touch()
    except anyio.get_cancelled_exc_class():
        (FOLDER / "cancelled").touch()
        raise


def sync_work() -> None:
    """The same in a thread."""
    (FOLDER / "begun").touch()
    while not (FOLDER / "go").exists():
        time.sleep(0.02)
    (FOLDER / "done").touch()


async def after() -> None:
    """A sibling that waits for its turn."""
    (FOLDER / "after").touch()


@app.get("/work/{kind}")
async def start(kind: str, tasks: BackgroundTasks) -> str:
    """Answer, and go on working."""
    tasks.add_task(sync_work if kind == "sync" else work)
    tasks.add_task(after)
    return "ok"


@app.get("/ready")
async def ready() -> str:
    """It serves."""
    return "ok"
