"""What the tests share: an ASGI driver in the place of a server, and an app whose observed tasks can be compared."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import anyio.lowlevel
import fastapi
import pytest
import starlette
from fastapi import FastAPI
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import PlainTextResponse
from starlette.routing import BaseRoute, Route
from starlette.testclient import TestClient

from aftertask import AftertaskMiddleware, Settings
from aftertask.events import Dropped, Skipped, Started
from aftertask.testing import Recorder

FASTAPI, STARLETTE = (tuple(map(int, each.__version__.split(".")[:2])) for each in (fastapi, starlette))

#: Since this version tasks run before the code after a dependency's `yield`; until then that ran before the response.
TASKS_COME_FIRST = FASTAPI >= (0, 118)
tasks_come_first = pytest.mark.skipif(
    not TASKS_COME_FIRST, reason="before FastAPI 0.118 dependencies end before the response"
)

#: The fixture `client_for`.
ClientFor = Callable[..., TestClient]

#: What tasks have done, in order; `Env` empties it.
LOG: list[Any] = []


async def af(x: str = "af") -> None:
    """An async task."""
    await anyio.lowlevel.checkpoint()
    LOG.append(x)


def sf(x: str = "sf") -> None:
    """A sync task."""
    LOG.append(x)


async def boom(x: str = "boom") -> None:
    """A task that fails."""
    LOG.append(x)
    raise ValueError(x)


class Stop(BaseException):
    """An error that is no `Exception`."""


class Layer(BaseHTTPMiddleware):
    """A middleware that serves the app in a task of its own."""

    async def dispatch(self, request: Any, call_next: Any) -> Any:
        """Pass the request on."""
        return await call_next(request)


class Traced:
    """
    A tracer provider whose spans are kept.

    Args:
        kwargs: Arguments of `TracerProvider`.
    """

    run_after: Any = "response"

    def __init__(self, **kwargs: Any) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(**kwargs)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))

    def spans(self, prefix: str = "background_task") -> list[ReadableSpan]:
        """The ended spans whose name starts with the prefix, in the order of their ends."""
        return [span for span in self.exporter.get_finished_spans() if span.name.startswith(prefix)]


async def until(condition: Callable[[], object]) -> None:
    """Let other tasks and threads run until something holds; fails after 10 seconds."""
    with anyio.fail_after(10):
        while not condition():
            await anyio.lowlevel.checkpoint()


_ON_THE_WAY = (
    "Scheduled",
    "Started",
    "Retrying",
    "Slow",
    "Stuck",
    "Abandoned",
    "AbandonedEnded",
    "HazardFound",
    "OffloadFailed",
)


class Result:
    """What an app sent, and what it raised."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.exc: BaseException | None = None
        self.scope: dict[str, Any] = {}

    @property
    def start(self) -> dict[str, Any] | None:
        """The message that started the response; None if there was none."""
        return next((m for m in self.messages if m["type"].endswith("http.response.start")), None)

    @property
    def status(self) -> int | None:
        """The response's status; None if there was no response."""
        return None if self.start is None else self.start["status"]

    @property
    def body(self) -> bytes:
        """The whole body."""
        return b"".join(m.get("body", b"") for m in self.messages if m["type"].endswith("http.response.body"))

    def header(self, name: str) -> str | None:
        """One response header; None if it is missing."""
        found = [v.decode() for k, v in (self.start or {"headers": ()})["headers"] if k.decode().lower() == name]
        return found[0] if found else None


async def drive(
    app: Any,
    path: str = "/",
    *,
    method: str = "GET",
    spec: str = "2.3",
    type: str = "http",
    headers: Any = (),
    early_disconnect: bool = False,
    send_fails_after: int | None = None,
    body: bytes = b"",
) -> Result:
    """
    Serve one request.

    Args:
        app: The ASGI app.
        path: Its path.
        method: Its method.
        spec: The ASGI version of the server; from 2.4 on `send` raises if the client has gone.
        type: `http` or `websocket`.
        headers: More request headers.
        early_disconnect: The client disconnects right after its request.
        send_fails_after: `send` raises OSError after this number of messages; None means never.
        body: The request's body.
    """
    result = Result()
    result.scope = scope = {
        "type": type,
        "asgi": {"version": "3.0", "spec_version": spec},
        "http_version": "1.1",
        "server": ("t", 80),
        "client": ("c", 1),
        "scheme": "http" if type == "http" else "ws",
        "root_path": "",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"host", b"t"), *headers],
    }
    if type == "http":
        scope["method"] = method
    else:
        scope |= {"subprotocols": [], "extensions": {"websocket.http.response": {}}}
    done = anyio.Event()
    requested = False

    async def receive() -> dict[str, Any]:
        nonlocal requested
        if not requested:
            requested = True
            return (
                {"type": "websocket.connect"}
                if type == "websocket"
                else {"type": "http.request", "body": body, "more_body": False}
            )
        if not early_disconnect:
            await done.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if send_fails_after is not None and len(result.messages) >= send_fails_after:
            raise OSError("the client has gone")
        result.messages.append(message)
        if message["type"].endswith("http.response.body") and not message.get("more_body"):
            done.set()

    try:
        with anyio.fail_after(50):  # the start of a worker process alone may take over 10 s on a busy machine
            await app(scope, receive, send)
    except Exception as exc:
        result.exc = exc
    return result


@contextlib.asynccontextmanager
async def lifespan(app: Any) -> AsyncIterator[None]:
    """Run the app's lifespan, as a server does."""
    messages, receive = anyio.create_memory_object_stream[Any](2)
    answer, answers = anyio.create_memory_object_stream[Any](2)
    async with messages, receive, answer, answers, anyio.create_task_group() as group:
        scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
        group.start_soon(app, scope, receive.receive, answer.send)
        await messages.send({"type": "lifespan.startup"})
        assert (await answers.receive())["type"] == "lifespan.startup.complete"
        yield
        await messages.send({"type": "lifespan.shutdown"})
        assert (await answers.receive())["type"] == "lifespan.shutdown.complete"


class Env:
    """An app under the middleware, and what the middleware saw of it."""

    def __init__(self) -> None:
        self.seen = Recorder()
        self.settings: dict[str, Any] = {}
        self.signals: Any = None
        LOG.clear()

    def mw(self, app: Any, seen: Any = None) -> AftertaskMiddleware:
        """The middleware around an ASGI app."""
        settings = Settings(**{"metrics_path": None, "registry": CollectorRegistry(), **self.settings})
        return AftertaskMiddleware(app, settings=settings, signals=self.signals or [seen or self.seen])

    def app_with_signals(self, signals: Any, *endpoints: Any) -> Starlette:
        """An app whose middleware has these signals."""
        self.signals = signals
        return self.app(*endpoints)

    def middleware(self) -> Middleware:
        """The middleware as Starlette takes it."""
        return Middleware(self.mw)

    def names(self) -> list[str]:
        """The functions of the runs that were started, children included, in order."""
        return [event.run.task.rpartition(".")[2] for event in self.seen.of(Started)]

    def app(self, *endpoints: Any, middleware: Any = (), **kwargs: Any) -> Starlette:
        """A Starlette app with these endpoints at `/`, `/1`, `/2` …"""
        routes = [
            endpoint
            if isinstance(endpoint, BaseRoute)
            else Route("/" if place == 0 else f"/{place}", endpoint, methods=["GET", "POST"])
            for place, endpoint in enumerate(endpoints)
        ]
        return Starlette(routes=routes, middleware=[self.middleware(), *middleware], **kwargs)

    def fastapi(self, endpoint: Any = None, **kwargs: Any) -> FastAPI:
        """A FastAPI app, with this endpoint at `/`."""
        app = FastAPI(**kwargs)
        app.user_middleware.insert(0, self.middleware())
        if endpoint is not None:
            app.get("/")(endpoint)
        return app

    def outcomes(self) -> list[tuple[str, str]]:
        """Each task's outcome in the order of the ends, with the reason if it never ran."""
        found = []
        for event in self.seen.events:
            if hasattr(event, "outcome"):
                reason = f" {event.reason}" if isinstance(event, (Skipped, Dropped)) else ""
                found.append((event.run.task.rpartition(".")[2], f"{event.outcome}{reason}"))
        return found

    def expect(self, *names: str, log: Any = None, unordered: bool = False) -> None:
        """Check that these runs were started, that `LOG` holds this, and the accounts."""
        order: Callable[[Any], Any] = sorted if unordered else list
        assert order(self.names()) == order(names)
        if log is not None:
            assert order(LOG) == order(log)
        self.check_accounts()

    def check_accounts(self) -> None:
        """Check that each run was scheduled first and ended exactly once."""
        emitted: dict[Any, list[str]] = {}
        for event in self.seen.events:
            emitted.setdefault(event.run, []).append(type(event).__name__)
        for run, events in emitted.items():
            ends = [name for name in events if name not in _ON_THE_WAY]
            assert events[0] == "Scheduled", (run, events)
            assert len(ends) == 1, (run, events)
            assert events.index(ends[0]) >= events.index("Started") if "Started" in events else True, (run, events)


def answering(background: Any, cls: Any = PlainTextResponse, *args: Any) -> Any:
    """An endpoint whose response has this background."""

    async def endpoint(request: Any) -> Any:
        return cls(*(args or ("ok",)), background=background)

    return endpoint
