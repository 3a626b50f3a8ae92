"""An app for several workers: one task that succeeds, one that fails, one that hangs until it is cut off."""

import asyncio
import os

from fastapi import BackgroundTasks, FastAPI

from aftertask import AftertaskMiddleware, task

app = FastAPI()
app.add_middleware(AftertaskMiddleware)


@task(name="workers.ok")
async def ok() -> None:
    """Nothing to do."""


@task(name="workers.broken")
def broken() -> None:
    """Fails."""
    raise LookupError


@task(name="workers.endless")
async def endless() -> None:
    """Stays in flight."""
    await asyncio.sleep(3600)


@app.get("/ok")
async def run_ok(tasks: BackgroundTasks) -> int:
    """The worker's pid."""
    tasks.add_task(ok)
    return os.getpid()


@app.get("/broken")
def run_broken(tasks: BackgroundTasks) -> int:
    """The worker's pid."""
    tasks.add_task(broken)
    return os.getpid()


@app.get("/endless")
async def run_endless(tasks: BackgroundTasks) -> int:
    """The worker's pid."""
    tasks.add_task(endless)
    return os.getpid()
