"""An app that is killed: each order commits in the exit code of a dependency, and its tasks note what they do."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Annotated

import anyio
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException
from prometheus_client import CollectorRegistry

from aftertask import AftertaskMiddleware, Settings, current_run, task

_effects = os.open(os.environ["EFFECTS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def note(*words: object) -> None:
    """One line in the file of effects; a single write of O_APPEND is atomic."""
    os.write(_effects, (" ".join(map(str, words)) + "\n").encode())


async def effect(kind: str, order: int) -> None:
    """What every task does."""
    run = current_run()
    note("start", kind, order, run and run.id)
    await anyio.sleep(random.uniform(0, 0.02))
    note("end", kind, order, run and run.id)


@task(durable=True)
async def durable(order: int) -> None:
    """Survives; is never run twice."""
    await effect("durable", order)


@task(durable=True, idempotent=True)
async def idempotent(order: int) -> None:
    """Survives, and may be run again."""
    await effect("idempotent", order)


@task
async def plain(order: int) -> None:
    """Dies with its process."""
    await effect("plain", order)


def session(order: int, how: str) -> Iterator[None]:
    """Commits when the request is over."""
    yield
    if how == "commit_fails":
        raise RuntimeError("could not serialize access")
    note("commit", order)


app = FastAPI()
app.add_middleware(
    AftertaskMiddleware,
    settings=Settings(journal=os.environ["JOURNAL"], registry=CollectorRegistry(), run_ids_header="x-run-ids"),
)


@app.post("/{kind}/{how}/{order}")
async def place(
    kind: str, how: str, order: int, tasks: BackgroundTasks, _: Annotated[None, Depends(session)]
) -> dict[str, int]:
    """An order of this kind, whose request may fail."""
    tasks.add_task({"durable": durable, "idempotent": idempotent, "plain": plain}[kind], order)
    if how == "refused":
        raise HTTPException(400)
    return {"order": order}


@app.get("/ready")
async def ready() -> str:
    """For the driver."""
    return "ok"
