"""An app for several workers with a journal. Its tasks run until `RELEASE` exists; alerts are lines of the log."""

import json
import os
import time
from pathlib import Path

from fastapi import BackgroundTasks, FastAPI

from aftertask import AftertaskMiddleware, Settings, task
from aftertask.alerts import Alert

RELEASE = Path(os.environ["RELEASE"])


def show(alert: Alert) -> None:
    """A channel."""
    os.write(1, json.dumps({"event": "shown", "kind": alert.kind, "task": alert.task}).encode() + b"\n")


app = FastAPI()
app.add_middleware(AftertaskMiddleware, settings=Settings(journal=os.environ["JOURNAL"], alerts=[show]))


def released() -> None:
    """Wait for the file."""
    while not RELEASE.exists():
        time.sleep(0.05)


@task(name="surviving.again", durable=True, idempotent=True)
def again() -> None:
    """Runs again after a crash."""
    released()


@task(name="surviving.once", durable=True)
def once() -> None:
    """Becomes a dead letter."""
    released()


@task(name="surviving.plain")
def plain() -> None:
    """Is lost."""
    released()


seen = set[str]()


@app.get("/{name}")
async def run(name: str, tasks: BackgroundTasks) -> int:
    """Once in a worker, add a task, and `again` twice: the second one waits for its turn; returns the worker's pid."""
    if name not in seen:
        seen.add(name)
        for each in {"again": [again, again], "once": [once], "plain": [plain]}[name]:
            tasks.add_task(each)
    return os.getpid()
