"""An app with tasks and a board, and a client that has the rights a test gives it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.background import BackgroundTask, BackgroundTasks
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.testclient import TestClient

from aftertask import AftertaskMiddleware, Settings
from aftertask.board import Board

#: The fixture `board_for`.
BoardFor = Callable[..., TestClient]

#: What a browser sends with a form of the page.
SAME = {"sec-fetch-site": "same-origin"}


def text_of(html: str) -> str:
    """What a reader sees of a page, on one line."""
    parts: list[str] = []

    class Text(HTMLParser):
        def handle_data(self, data: str) -> None:
            parts.append(data)

    Text().feed(html)
    return " ".join(" ".join(parts).split())


def page(client: TestClient, path: str = "/") -> str:
    """The text of a page."""
    response = client.get(f"/board{path}")
    assert response.status_code == 200, response.text
    return text_of(response.text)


@pytest.fixture
def board_for(registry: CollectorRegistry) -> Iterator[BoardFor]:
    """A client of an app whose `/` answers with these functions as background tasks, and whose board is at `/board`."""
    clients: list[TestClient] = []

    def make(
        *functions: Callable[..., Any],
        rights: Any = ("view", "act"),
        board: Board | None = None,
        signals: Any = None,
        backend: str = "asyncio",
        **settings: Any,
    ) -> TestClient:
        async def endpoint(request: Request) -> PlainTextResponse:
            return PlainTextResponse("ok", background=BackgroundTasks([BackgroundTask(each) for each in functions]))

        board = board or Board(authorize=lambda request: rights)
        chosen = Settings(**{"registry": registry, "on_failure": "contain", **settings})
        app = Starlette(
            routes=[Route("/", endpoint), Mount("/board", board)],
            middleware=[Middleware(AftertaskMiddleware, settings=chosen, signals=signals)],
        )
        client = TestClient(app, raise_server_exceptions=False, backend=backend)
        client.__enter__()
        clients.append(client)
        return client

    yield make
    for client in clients:
        client.__exit__(None, None, None)
