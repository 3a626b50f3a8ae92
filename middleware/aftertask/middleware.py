"""`AftertaskMiddleware`: serves requests through the core, and responds to `GET /metrics`."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry
from starlette.types import ASGIApp, Receive, Scope, Send

from ._core.app import App
from ._core.emit import Emitter
from ._core.route import mounted_apps, route_path, serves
from ._mistakes import log_mistakes
from ._text import default_redact
from .events import Signal, TaskEvent
from .hazards import Hazards, Hints
from .settings import Settings, disabled, unknown_argument
from .signals import Metrics, usual
from .signals.scrape import answer

if TYPE_CHECKING:
    from .journal.journal import Journal

_REFUSED = (
    "aftertask: the app cannot serve requests: {}. A server may start all the same and answer each request with 500; "
    "to refuse to start, run uvicorn with --lifespan on, or gunicorn with a worker class that has "
    'CONFIG_KWARGS = {{"lifespan": "on"}}\n'
)

#: The mistakes already written to stderr: Starlette builds the middleware again for each request.
_refused: set[str] = set()


class Companion:
    """
    Base class of an app that is mounted inside the observed app and shows what is observed, such as the board.

    Attributes:
        signal: Receives the events of the app from the start.
    """

    signal: Signal

    def attach(self, emit: Emitter, settings: Settings | None) -> None:
        """Called when the middleware has been built with `signal` among its signals; again if it is built again."""
        raise NotImplementedError


class AftertaskMiddleware:
    """
    Observe every background task of an app: `app.add_middleware(AftertaskMiddleware)`.

    It works in every FastAPI and Starlette app, on asyncio and trio. Wrap a plain ASGI app instead:
    `AftertaskMiddleware(app)`. With `AFTERTASK_DISABLED=1` in the environment, it passes everything through and
    installs nothing.

    Args:
        app: The ASGI app inside.
        settings: The app's settings; None means `Settings.from_env()`.
        signals: They receive every event; None means `aftertask.signals.usual(settings)`, an empty list means none.

    Raises:
        TypeError, ValueError: A setting or a signal is invalid; the message names it.
        RegistryClash: The registry already has a metric with one of aftertask's names.
    """

    def __new__(cls, *args: Any, **named: Any) -> AftertaskMiddleware:
        """Refuse an unknown argument with a hint: settings are passed neither one by one nor by position."""
        unknown = [unknown_argument(name) for name in named if name not in ("app", "settings", "signals")]
        if len(args) > 1:
            unknown.append(f"write add_middleware(AftertaskMiddleware, settings=…), got {type(args[1]).__name__}")
        if unknown:
            _report(error := TypeError(unknown[0]))
            raise error
        return super().__new__(cls)

    def __init__(
        self,
        app: ASGIApp,
        *,
        settings: Settings | None = None,
        signals: Iterable[Signal | Callable[[TaskEvent], object]] | None = None,
    ) -> None:
        self.app = app
        self._core: App | None = None
        try:
            if not disabled():
                self._core = self._built(app, settings, signals)
        except Exception as error:
            _report(error)
            raise

    def _built(
        self, app: ASGIApp, settings: Settings | None, signals: Iterable[Signal | Callable[[TaskEvent], object]] | None
    ) -> App:
        settings = Settings.from_env() if settings is None else settings
        if not isinstance(settings, Settings):
            raise TypeError(f"settings must be an aftertask.Settings or None, got {settings!r}; write Settings(…)")
        if signals is not None and not isinstance(signals, Iterable):
            raise TypeError(
                f"signals must be a list of signals or None, got {signals!r}; write signals=[*usual(settings), …], "
                "with usual from aftertask.signals"
            )
        self.settings = settings
        is_covered = _warn_if_twice(app)
        log_mistakes(app, settings)
        self._metrics_path, self._registry = settings.metrics_path, settings.registry
        self._excluded = _excluded(settings.exclude)
        hazards = Hazards(settings.block_threshold)
        companions = [each for each in mounted_apps(app) if isinstance(each, Companion)]
        chosen = [*(usual(settings) if signals is None else signals), *(each.signal for each in companions)]
        journal = None if settings.journal is None else _journal(settings.journal, chosen)
        if journal is not None:
            chosen.append(journal)
        wanted = hazards.wanted_by(chosen)
        emit = Emitter([Hints(hazards), *chosen, hazards] if wanted else chosen, settings.redact)
        if wanted:
            hazards.attach(emit)
        for companion in companions:
            companion.attach(emit, settings)
        if journal is not None:
            journal.attach(emit)
        return App(
            emit,
            policies=settings.policies,
            on_failure=settings.on_failure,
            max_waiting=settings.max_waiting,
            thread_limit=settings.thread_limit,
            drain_timeout=settings.drain_timeout,
            shutdown_report=settings.shutdown_report,
            request_id=settings.request_id,
            run_ids_header=settings.run_ids_header,
            keeps_context=settings.context == "endpoint",
            run_after=settings.run_after,
            engines=settings.engines,
            keeper=journal,
            is_covered=is_covered,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, or the lifespan."""
        core = self._core
        if core is None or scope["type"] not in ("http", "websocket", "lifespan"):
            await self.app(scope, receive, send)
        elif scope["type"] == "lifespan":
            await core.lifespan(self.app, scope, receive, send)
        elif self._is_scrape(scope):
            await answer(scope, receive, send, self._registry)
        elif self._excluded is not None and self._excluded.fullmatch(route_path(scope)):
            await core.serve_unobserved(self.app, scope, receive, send)
        else:
            await core.serve(self.app, scope, receive, send)

    def _is_scrape(self, scope: Scope) -> bool:
        path = self._metrics_path
        return (
            path is not None
            and scope["path"].endswith(path)
            and scope["type"] == "http"
            and scope["method"] in ("GET", "HEAD")
            and route_path(scope) == path
            # If the middleware is part of an app, the scope names it.
            and not serves(scope.get("app") or self.app, path)
        )


def _report(error: Exception) -> None:
    """Write a mistake to stderr, once: servers that start an app without its lifespan log no reason then."""
    text = default_redact(f"{type(error).__name__}: {error}".replace("\n", " "))
    if text not in _refused and sys.stderr is not None:
        _refused.add(text)
        sys.stderr.write(_REFUSED.format(text))


def _journal(path: str | Path, signals: Iterable[object]) -> Journal:
    try:
        from .journal.journal import Journal
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"Settings.journal needs {error.name}; install it with: pip install 'aftertask[journal]'", name=error.name
        ) from None
    metrics = next((signal for signal in signals if isinstance(signal, Metrics)), None)
    # Without that signal its metrics are nowhere exposed.
    return Journal(path, (metrics or Metrics(CollectorRegistry())).for_journal())


def _warn_if_twice(app: object) -> bool:
    """Whether another middleware is already inside, and observes the tasks."""
    inner: object = app
    for _ in range(100):
        if isinstance(inner, AftertaskMiddleware):
            warnings.warn(
                "AftertaskMiddleware was added twice to one app: the inner one observes its tasks, the outer one none; "
                "remove one of the two add_middleware calls",
                stacklevel=5,
            )
            return True
        inner = getattr(inner, "app", None)
    return False


def _excluded(paths: Sequence[str]) -> re.Pattern[str] | None:
    """One pattern for all excluded paths: `{name}` is one segment, `*` is anything."""
    if not paths:
        return None
    patterns = (re.sub(r"\\\{[^/]*?\\\}", "[^/]+", re.escape(path)).replace(r"\*", ".*") for path in paths)
    return re.compile("|".join(patterns))
