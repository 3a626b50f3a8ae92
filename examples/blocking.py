"""
A task that blocks the event loop is found by name, and fixed in three ways. Run it and look:

    uvicorn blocking:app --app-dir examples
    curl -X POST http://127.0.0.1:8000/blocking
    for kind in thread process client; do curl -X POST "http://127.0.0.1:8000/$kind"; done

You will see `loop.blocked` for `pages.blocking` with the line of this file that blocks, and no such line for the
others. Before anything runs, `aftertask check blocking:app --app-dir examples` finds the same line in the source.
"""

import hashlib
import os
import time

import anyio
from fastapi import BackgroundTasks, FastAPI

from aftertask import AftertaskMiddleware, task

SECONDS = float(os.environ.get("SECONDS", "1"))

app = FastAPI()
app.add_middleware(AftertaskMiddleware)


@task(name="pages.blocking")
async def fetch_blocking() -> None:
    """`async def`, but the call in it waits without `await`: every request of the process waits with it."""
    time.sleep(SECONDS)  # noqa: ASYNC251  # stands for a client such as requests


@task(name="pages.thread", executor="thread")
def fetch_in_thread() -> None:
    """A plain `def` runs in a thread; with `executor="thread"` in one of aftertask's own."""
    time.sleep(SECONDS)


@task(name="pages.process", executor="process")
def compute_in_process() -> None:
    """For what computes: a thread would hold up the others, because only one runs Python code at a time."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        hashlib.sha256(b"a page").hexdigest()


@task(name="pages.client")
async def fetch_with_client() -> None:
    """A client that awaits, such as httpx."""
    await anyio.sleep(SECONDS)


TASKS = {
    "blocking": fetch_blocking,
    "thread": fetch_in_thread,
    "process": compute_in_process,
    "client": fetch_with_client,
}


@app.post("/{kind}")
async def start(kind: str, tasks: BackgroundTasks) -> dict[str, str]:
    """Add one of the tasks."""
    tasks.add_task(TASKS[kind])
    return {"status": "ok"}
