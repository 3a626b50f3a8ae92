"""Two apps behind one server: `/ours` has the middleware, `/plain` has none; what was observed is at `/seen`."""

from typing import Any

from fastapi import BackgroundTasks, FastAPI, Request

from aftertask import AftertaskMiddleware, Settings
from aftertask.testing import Recorder

seen = Recorder()


async def ours_task() -> None:
    """Is observed."""


async def plain_task() -> None:
    """Is not."""


def build(function: Any) -> FastAPI:
    """An app that reads its body and adds a task."""
    built = FastAPI()

    @built.post("/")
    async def post(request: Request, tasks: BackgroundTasks) -> int:
        tasks.add_task(function)
        return len(await request.body())

    @built.get("/")
    async def get(tasks: BackgroundTasks) -> int:
        tasks.add_task(function)
        return 0

    return built


ours, plain, outcomes = build(ours_task), build(plain_task), FastAPI()
ours.add_middleware(AftertaskMiddleware, settings=Settings(metrics_path=None), signals=[seen])


@outcomes.get("/")
async def names() -> list[tuple[str, str]]:
    """Which tasks ended, and how."""
    return seen.outcomes()


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Hands a request on by its first segment."""
    if scope["type"] == "lifespan":
        await ours(scope, receive, send)
        return
    _, first, *_ = scope["path"].split("/")
    chosen = {"ours": ours, "plain": plain, "seen": outcomes}[first]
    await chosen({**scope, "path": "/", "raw_path": b"/"}, receive, send)
