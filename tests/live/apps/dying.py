"""Serves one request over a journal in a process that ends at a chosen moment: `python dying.py JOURNAL MOMENT`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import anyio
from fastapi import BackgroundTasks, Depends, FastAPI
from prometheus_client import CollectorRegistry

from aftertask import AftertaskMiddleware, Settings, options, progress, task

JOURNAL, MOMENT = (sys.argv[1], sys.argv[2]) if __name__ == "__main__" else ("", "")
DID: list[Any] = []


async def once(number: int) -> None:
    """Must not run twice."""
    await work(number)


async def again(number: int) -> None:
    """May run again."""
    await work(number)


async def plain(number: int) -> None:
    """Is not durable."""
    progress(number, 10, "pages")
    await work(number)


def declare() -> None:
    """Register the tasks; not on import, because they would be known to every app of the importing process."""
    task(name="dying.once", durable=True)(once)
    task(name="dying.again", durable=True, idempotent=True)(again)
    task(name="dying.plain")(plain)


async def new(number: int) -> None:
    """Is registered in a newer version only."""
    progress(number)


async def work(number: int) -> None:
    """Note the call; in the process that is to die in a task, die."""
    DID.append(number)
    if MOMENT == "in plain":
        await anyio.sleep(1.3)  # so that progress and history are on disk
    if MOMENT.startswith("in "):
        os._exit(9)
    if MOMENT == "stop":
        await anyio.sleep_forever()


def session() -> Iterator[None]:
    """In the process that is to die before the commit, that is here."""
    yield
    if MOMENT == "before the commit":
        os._exit(9)


def app(journal: str, registry: CollectorRegistry | None = None, **settings: Any) -> FastAPI:
    """The app; its tasks are those that a request names."""
    made = FastAPI()
    chosen = Settings(journal=journal, registry=registry or CollectorRegistry(), **settings)
    made.add_middleware(AftertaskMiddleware, settings=chosen)

    @made.post("/{names}")
    async def endpoint(names: str, tasks: BackgroundTasks, _: None = Depends(session)) -> None:
        for number, name in enumerate(names.split("-")):
            tasks.add_task(options({"once": once, "again": again, "plain": plain}[name], on_failure="contain"), number)

    return made


async def main() -> None:
    """Run the lifespan, and one request in it."""
    from kit import drive, until

    served = app(JOURNAL)
    to_app: Any
    from_app: Any
    to_app, receive = anyio.create_memory_object_stream[Any](5)
    send, from_app = anyio.create_memory_object_stream[Any](5)
    async with anyio.create_task_group() as group:
        group.start_soon(served, {"type": "lifespan"}, receive.receive, send.send)
        await to_app.send({"type": "lifespan.startup"})
        assert (await from_app.receive())["type"] == "lifespan.startup.complete"
        names = {"before the commit": "once", "in once": "once-once", "in again": "again-once", "in plain": "plain"}
        names |= {"stop": "once", "idle": "", "newer": ""}
        if MOMENT == "newer":
            task(name="dying.new", durable=True)(new)
        if MOMENT in ("idle", "newer"):
            os.write(1, b"ready\n")
            await anyio.sleep_forever()
        if MOMENT == "stop":
            group.start_soon(lambda: drive(served, "/once", method="POST"))
            await until(lambda: DID)
            os.write(1, b"ready\n")
            await anyio.sleep_forever()
        await drive(served, f"/{names[MOMENT]}", method="POST")
    raise AssertionError("it should have died")


if __name__ == "__main__":
    declare()
    anyio.run(main)
