"""Two tasks that stay in flight: a registered and an unregistered one."""

import asyncio
import os

from fastapi import BackgroundTasks, FastAPI

from aftertask import AftertaskMiddleware, task

app = FastAPI()
app.add_middleware(AftertaskMiddleware)


@task(name="ages.registered")
async def registered() -> None:
    """Stays in flight."""
    await asyncio.sleep(3600)


async def unregistered() -> None:
    """Stays in flight."""
    await asyncio.sleep(3600)


@app.get("/{name}")
async def start(name: str, tasks: BackgroundTasks) -> int:
    """Add a task, and return the worker's pid."""
    tasks.add_task({"registered": registered, "unregistered": unregistered}[name])
    return os.getpid()
