"""An app for several workers. Its tasks succeed, fail, recover, outlive a timeout, or run until they are stopped."""

import asyncio
import os
import time

from fastapi import BackgroundTasks, FastAPI

from aftertask import AftertaskMiddleware, Retry, current_run, task

app = FastAPI()
app.add_middleware(AftertaskMiddleware)


@task(name="workers.ok")
async def ok() -> None:
    """Succeeds."""


@task(name="workers.broken")
def broken() -> None:
    """Fails."""
    raise LookupError


@task(name="workers.recovering", retry=Retry(attempts=3, wait_initial=0.05))
async def recovering() -> None:
    """Succeeds at the third attempt."""
    run = current_run()
    assert run is not None
    if run.attempt < 3:
        raise ConnectionError


@task(name="workers.abandoned", timeout=0.05)
def abandoned() -> None:
    """Outlives its timeout."""
    time.sleep(0.5)


@task(name="workers.endless")
async def endless() -> None:
    """Runs until it is cut off."""
    await asyncio.sleep(3600)


TASKS = {
    "ok": ok,
    "broken": broken,
    "recovering": recovering,
    "abandoned": abandoned,
    "endless": endless,
}


@app.get("/{name}")
async def run(name: str, tasks: BackgroundTasks) -> int:
    """Add a task, and return the worker's pid."""
    tasks.add_task(TASKS[name])
    return os.getpid()
