"""
A pytest plugin for the suites of Starlette and FastAPI: puts a middleware into every app that is built.

Load it with `-p plugin`. AFTERTASK_TEST_UPSTREAM chooses the middleware: `aftertask`; `empty`, which does nothing, for
suites that count the app's middleware; or `control`, which swallows exceptions, to prove that the suites notice it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.middleware import Middleware

from aftertask import AftertaskMiddleware, HazardFound, Settings, TaskEvent
from aftertask.events import Scheduled
from aftertask.signals import usual

_built = _runs = 0
_hazards: list[tuple[str, str, str]] = []


def pytest_configure(config: Any) -> None:
    """Patch the two classes that build a stack."""
    chosen = os.environ.get("AFTERTASK_TEST_UPSTREAM")
    if not chosen:
        return
    _instrument(Starlette, chosen)
    try:
        from fastapi import FastAPI
    except ImportError:
        return
    _instrument(FastAPI, chosen)


def pytest_unconfigure(config: Any) -> None:
    """Write down how many apps had it and what it saw; each of xdist's workers has its own file."""
    folder = os.environ.get("AFTERTASK_TEST_UPSTREAM_COUNTS")
    if folder and _built:
        seen = {"apps": _built, "runs": _runs, "hazards": _hazards}
        (Path(folder) / f"{os.getpid()}.seen").write_text(json.dumps(seen))


def _instrument(app_class: Any, chosen: str) -> None:
    original = app_class.build_middleware_stack

    def build_middleware_stack(self: Any) -> Any:
        global _built
        _built += 1
        kept = self.user_middleware
        self.user_middleware = [_middleware(chosen), *kept]  # where add_middleware would put it
        try:
            return original(self)
        finally:
            self.user_middleware = kept

    app_class.build_middleware_stack = build_middleware_stack


def _middleware(chosen: str) -> Middleware:
    if chosen == "control":
        return Middleware(_Swallowing)
    if chosen == "empty":
        return Middleware(_Empty)
    settings = Settings(metrics_path=None, registry=CollectorRegistry())
    return Middleware(AftertaskMiddleware, settings=settings, signals=[*usual(settings), _note])


def _note(event: TaskEvent) -> None:
    global _runs
    _runs += isinstance(event, Scheduled)
    if isinstance(event, HazardFound):
        test = os.environ.get("PYTEST_CURRENT_TEST", "").partition(" ")[0]
        _hazards.append((test, event.kind, f"{event.run.task}: {event.advice}"))


class _Swallowing:
    """The negative control: no exception leaves an app."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await self.app(scope, receive, send)
        except Exception:
            if scope["type"] != "http":
                raise


class _Empty:
    """Passes everything through."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)
