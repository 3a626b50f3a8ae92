"""The ASGI middleware: marks each request's scope, and answers `GET /metrics`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Awaitable, Iterable, Sequence
from contextvars import Context, copy_context
from typing import Any

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import _scrape
from ._exchange import Exchange
from ._intercept import install
from ._mark import EXCHANGE, KEY
from ._messages import Around, Messages
from ._route import route_path
from ._runner import Engine
from ._shutdown import Supervisor
from .events import Signal
from .hazards import around
from .settings import Settings, disabled, unknown_argument
from .signals import usual


class AftertaskMiddleware:
    """
    Observe every background task of an app: `app.add_middleware(AftertaskMiddleware)`.

    Works in every FastAPI and Starlette app, on asyncio and trio; for a plain ASGI app wrap it:
    `AftertaskMiddleware(app)`. With `AFTERTASK_DISABLED=1` in the environment it passes everything through and installs
    nothing.

    Args:
        app: The ASGI app inside.
        settings: None: `Settings.from_env()`.
        signals: Who is told of every event; None: `aftertask.signals.usual(settings)`. An empty list is nobody.

    Raises:
        TypeError, ValueError: A setting or a signal is not one; the message names it.
        RegistryClash: The registry holds a metric of one of our names that is not ours.
    """

    def __new__(cls, *args: Any, **named: Any) -> AftertaskMiddleware:
        """Refuse an argument that there is not: the settings are not given one by one."""
        for name in named:
            if name not in ("app", "settings", "signals"):
                raise TypeError(unknown_argument(name))
        return super().__new__(cls)

    def __init__(
        self, app: ASGIApp, *, settings: Settings | None = None, signals: Iterable[Signal] | None = None
    ) -> None:
        self.app = app
        self._disabled = disabled()
        self._special = ""  # is in every path
        if self._disabled:
            return
        settings = Settings.from_env() if settings is None else settings
        if not isinstance(settings, Settings):
            raise TypeError(f"settings must be an aftertask.Settings or None, got {settings!r}")
        if signals is not None and not isinstance(signals, Iterable):
            raise TypeError(f"signals must be a list of signals or None, got {signals!r}")
        _warn_if_twice(app)
        self._settings = settings
        chosen, hazards = around(usual(settings) if signals is None else signals, settings.block_threshold)
        self._engine = Engine(settings, chosen)
        if hazards is not None:
            hazards.attach(self._engine)
        self._excluded = _excluded(settings.exclude)
        self._messages = Messages(self._look_closer, refuses=bool(self._engine.admissions))
        install()

    def exchange(self, came_with: tuple[Context, Send] | None) -> Exchange:
        """One request and its response; for the hooks. `came_with` is None once the request is over."""
        return Exchange(self._engine, self._messages, came_with)

    def _look_closer(self, at_all: bool) -> None:
        """Whether something else than to observe may be to do at any path, or at those alone that have ours in them."""
        self._special = "" if at_all or self._excluded is not None else self._settings.metrics_path or "\0"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, or the lifespan."""
        # Most requests have no task and pay for each bytecode here (docs/performance.md).
        try:
            is_special = self._special in scope["path"] or KEY in scope
        except KeyError:
            is_special = True
        if is_special:
            served = self._serve_otherwise(scope, receive, send)
            if served is not None:
                await served
                return
            send = self._messages.around(send) if scope["type"] == "http" else Around(send)
        mark: list[Any] = [None, self, (copy_context(), send)]
        scope[KEY] = mark
        try:
            await self.app(scope, receive, send)
        except BaseException as error:
            if not mark.pop() and mark[EXCHANGE].close(error, scope):
                await mark[EXCHANGE].compensate()
            raise
        if not mark.pop() and mark[EXCHANGE].close(None, scope):
            await mark[EXCHANGE].compensate()

    def _serve_otherwise(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None] | None:
        """What is not a request to the app in which nobody has marked the scope yet; None where it is one after all."""
        kind = scope["type"]
        if self._disabled or kind not in ("http", "websocket", "lifespan"):
            return self.app(scope, receive, send)
        if kind == "lifespan":
            return self._live(self._engine, scope, receive, send)
        if self._is_scrape(scope):
            return _scrape.answer(scope, receive, send, self._settings.registry)
        if self._excluded is not None and self._excluded.fullmatch(route_path(scope)):
            return self._under_no_mark(self.app, scope, receive, send)
        if scope.get(KEY) is not None:
            return self._under_no_mark(self, scope, receive, send)
        return None

    async def _under_no_mark(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """The scope is an outer app's again afterwards, unless something is owed once a 500 handler has answered."""
        outer = scope.pop(KEY, None)
        try:
            await app(scope, receive, send)
        except BaseException:
            inner = scope.get(KEY)
            if outer is not None and not (inner and inner[EXCHANGE] and inner[EXCHANGE].owed):
                scope[KEY] = outer
            raise
        if outer is not None:
            scope[KEY] = outer

    def _is_scrape(self, scope: Scope) -> bool:
        path = self._settings.metrics_path
        return (
            path is not None
            and scope["type"] == "http"
            and scope["method"] in ("GET", "HEAD")
            and route_path(scope) == path
            and not _scrape.is_taken(scope, self.app, path)
        )

    async def _live(self, engine: Engine, scope: Scope, receive: Receive, send: Send) -> None:
        """The app's lifespan, which owns its runs where they are to outlive the server's cancellation."""
        is_open = False

        async def watched() -> Message:
            nonlocal is_open
            message = await receive()
            if message["type"] == "lifespan.startup":
                engine.open()
                is_open = True
            elif message["type"] == "lifespan.shutdown":
                if engine.supervisor is not None:
                    await engine.supervisor.drain(engine)
                engine.close()
                is_open = False
            return message

        try:
            await self._supervised(engine, scope, watched, send)
        finally:
            if is_open:  # it failed to start, or ended without being asked to
                engine.close()

    async def _supervised(self, engine: Engine, scope: Scope, receive: Receive, send: Send) -> None:
        timeout = self._settings.drain_timeout
        if timeout is None:
            await self.app(scope, receive, send)
            return
        raised: Exception | None = None
        async with anyio.create_task_group() as group:
            engine.supervisor = Supervisor(group, timeout)
            try:
                await self.app(scope, receive, send)
            except Exception as error:
                raised = error  # out of the group it would come as an ExceptionGroup
            finally:
                engine.supervisor = None
        if raised is not None:
            raise raised


def _warn_if_twice(app: object) -> None:
    inner: object = app
    for _ in range(100):
        if isinstance(inner, AftertaskMiddleware):
            warnings.warn(
                "AftertaskMiddleware was added twice to one app: the inner one observes its tasks, the outer one none; "
                "remove one of the two add_middleware calls",
                stacklevel=4,
            )
            return
        inner = getattr(inner, "app", None)
        if inner is None:
            return


def _excluded(paths: Sequence[str]) -> re.Pattern[str] | None:
    """One pattern for all excluded paths: `{name}` is one segment, `*` anything."""
    if not paths:
        return None
    parts = []
    for path in paths:
        text = re.sub(r"\\\{[^/]*?\\\}", "[^/]+", re.escape(path))
        parts.append(text.replace(r"\*", ".*"))
    return re.compile("|".join(parts))
