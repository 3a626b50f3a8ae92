"""An app whose task fails while another request is under way on its connection."""

from __future__ import annotations

import anyio
import anyio.lowlevel
from fastapi import BackgroundTasks, FastAPI

from aftertask import AftertaskMiddleware, Settings, options

app = FastAPI()
app.add_middleware(AftertaskMiddleware, settings=Settings.from_env())
second_is_here = anyio.Event()
task_has_failed = anyio.Event()


async def fails() -> None:
    """Once the second request is being served."""
    await second_is_here.wait()
    task_has_failed.set()
    raise ValueError("of the first request")


@app.get("/first/{on_failure}")
async def first(on_failure: str, tasks: BackgroundTasks) -> str:
    """Answer, with a task that will fail."""
    tasks.add_task(options(fails, on_failure=on_failure))  # type: ignore[arg-type]  # one of the three, as the test says
    return "ok"


@app.get("/second")
async def second() -> str:
    """Answer after the first one's task has failed, and its connection has been dealt with."""
    second_is_here.set()
    await task_has_failed.wait()
    for _ in range(50):
        await anyio.lowlevel.checkpoint()
    return "ok"


@app.get("/ready")
async def ready() -> str:
    """It serves."""
    return "ok"
