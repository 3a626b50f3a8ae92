"""
A pytest plugin for the suites of other projects: puts a middleware into every app that is built.

It imports neither Starlette nor aftertask before the suite does: New Relic's agent must patch Starlette first.
Load it with `-p plugin`. AFTERTASK_TEST_UPSTREAM chooses the middleware: `aftertask`; `request`, the same with
run_after="request"; `empty`, which does nothing, for suites that count the app's middleware; or `control`, which
swallows exceptions, to prove that the suites notice it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

_built = _runs = 0
_hazards: list[tuple[str, str, str]] = []
_self_errors: list[tuple[str, str]] = []
_instrumented: set[str] = set()


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: Any, request: Any) -> None:
    """Patch before a fixture may start an app."""
    _patch()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: Any) -> None:
    """Patch before a test may start one."""
    _patch()


def _patch() -> None:
    """Patch the two classes that build a stack, once the suite has imported them."""
    chosen = os.environ.get("AFTERTASK_TEST_UPSTREAM")
    for module, name in (("starlette.applications", "Starlette"), ("fastapi.applications", "FastAPI")):
        if chosen and module in sys.modules and module not in _instrumented:
            _instrumented.add(module)
            if chosen in ("aftertask", "request"):
                import aftertask.signals  # noqa: F401  # not later, on an event loop that blockbuster watches
            _instrument(getattr(sys.modules[module], name), chosen)


def pytest_unconfigure(config: Any) -> None:
    """Write down how many apps had it and what it saw; each of xdist's workers has its own file."""
    folder = os.environ.get("AFTERTASK_TEST_UPSTREAM_COUNTS")
    if folder and _built:
        seen = {"apps": _built, "runs": _runs, "hazards": _hazards, "self_errors": _self_errors}
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


def _middleware(chosen: str) -> Any:
    from prometheus_client import CollectorRegistry
    from starlette.middleware import Middleware

    if chosen == "control":
        return Middleware(_Swallowing)
    if chosen == "empty":
        return Middleware(_Empty)
    from aftertask import AftertaskMiddleware, Settings
    from aftertask.signals import usual

    run_after: Any = "request" if chosen == "request" else "response"
    settings = Settings(metrics_path=None, registry=CollectorRegistry(), run_after=run_after)
    return Middleware(AftertaskMiddleware, settings=settings, signals=[*usual(settings), _note()])


def _note() -> Any:
    from aftertask.events import HazardFound, Scheduled, Signal

    class Note(Signal):
        """Keeps what the report shows."""

        def scheduled(self, event: Scheduled) -> None:
            global _runs
            _runs += 1

        def hazard_found(self, event: HazardFound) -> None:
            _hazards.append((_test(), event.kind, f"{event.run.task}: {event.advice}"))

        def self_error(self, component: str) -> None:
            _self_errors.append((_test(), component))

    return Note()


def _test() -> str:
    return os.environ.get("PYTEST_CURRENT_TEST", "").partition(" ")[0]


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
