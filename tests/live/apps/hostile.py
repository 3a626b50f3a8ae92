"""An app whose task has a hostile name, error, progress and argument."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from aftertask import AftertaskMiddleware, progress, task
from aftertask.board import Board

TEXT = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'\u202e\x00" + "x" * 10_000


@task(name=TEXT, owner=TEXT, durable=True)
async def hostile(what: str) -> None:
    """Fail."""
    progress(1, 2, TEXT)
    raise ValueError(TEXT)


async def endpoint(request: Request) -> PlainTextResponse:
    """Add the task."""
    return PlainTextResponse("ok", background=BackgroundTask(hostile, TEXT))


app = Starlette(routes=[Route("/", endpoint), Mount("/aftertask", Board(insecure=True))])
app.add_middleware(AftertaskMiddleware)
