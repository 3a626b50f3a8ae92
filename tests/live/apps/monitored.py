"""The shop with faults that can be turned on and off, limits, channels, an engine, and a journal if asked."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from pathlib import Path

from fastapi import BackgroundTasks
from fastapi.responses import JSONResponse
from starlette.background import BackgroundTask

from aftertask import AftertaskMiddleware, Retry, Settings, task
from aftertask.alerts import Alert

sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "shop"))
sys.path.insert(0, str(Path(__file__).parents[2]))
from app import app, audit

from kit_engines import Memory

go, go_threads = asyncio.Event(), threading.Event()


async def hook(alert: Alert) -> None:
    """A channel that works."""


async def broken_hook(alert: Alert) -> None:
    """A channel that does not."""
    raise ConnectionError("no answer")


app.user_middleware.clear()
settings = Settings(
    alerts=[hook, broken_hook], thread_limit=2, journal=os.environ.get("JOURNAL"), engines={"memory": Memory()}
)
app.add_middleware(AftertaskMiddleware, settings=settings)


@task(name="faults.fail")
async def fail() -> None:
    """Fails."""
    raise RuntimeError("broken")


@task(name="faults.retry", retry=Retry(attempts=3, wait_initial=0.02, wait_max=0.05))
async def retry() -> None:
    """Fails, and is tried again in vain."""
    raise ConnectionError("no answer")


@task(name="faults.hold")
async def hold() -> None:
    """Runs until it is let go."""
    await asyncio.wait_for(go.wait(), 100)


@task(name="faults.limited", limit=1)
async def limited() -> None:
    """Runs until it is let go, one at a time."""
    await asyncio.wait_for(go.wait(), 100)


@task(name="faults.hang", timeout=0.2)
def hang() -> None:
    """Outlives its time limit until it is let go."""
    go_threads.wait(100)


@task(name="faults.thread", executor="thread")
def thread() -> None:
    """Keeps one of the two threads until it is let go."""
    go_threads.wait(100)


@task(name="faults.block")
async def block() -> None:
    """Keeps the event loop from everything else."""
    time.sleep(0.5)  # noqa: ASYNC251 - this is the fault


@task(name="faults.letter", durable=True)
async def letter() -> None:
    """Becomes a dead letter."""
    raise RuntimeError("broken")


@task(name="faults.kept", durable=True)
async def kept() -> None:
    """Stays in the journal until it is let go."""
    await asyncio.wait_for(go.wait(), 100)


@task(name="faults.remote", executor="memory")
async def remote() -> None:
    """Is handed over."""


@app.post("/faults/{name}")
async def fault(name: str, tasks: BackgroundTasks) -> JSONResponse:
    """One run of a fault; `behind` has another one that waits behind it."""
    if name == "behind":
        tasks.add_task(hold)
        tasks.add_task(audit, "behind")
        return JSONResponse({}, background=tasks)
    every = {"fail": fail, "retry": retry, "hold": hold, "limited": limited, "hang": hang, "thread": thread}
    every |= {"block": block, "letter": letter, "kept": kept, "remote": remote}
    return JSONResponse({}, background=BackgroundTask(every[name]))


@app.delete("/faults")
async def release() -> dict[str, str]:
    """Lets all go that is held, and whatever comes after."""
    go.set()
    go_threads.set()
    return {}
