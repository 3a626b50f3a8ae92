"""Fixtures that all tests share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.background import BackgroundTask, BackgroundTasks
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from aftertask import AftertaskMiddleware, Settings
from aftertask.tasks import registrations_forgotten
from aftertask.testing import VirtualClock
from kit import ClientFor, Env


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What a test logs may hold half of a character, which would not travel from one of several processes."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """Async tests run on asyncio and on trio."""
    return request.param


@pytest.fixture(autouse=True)
def own_registrations() -> Iterator[None]:
    """A task that a test registers with `@task` is forgotten at its end."""
    with registrations_forgotten():
        yield


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of the test run does not configure aftertask."""
    import os

    for name in [name for name in os.environ if name.startswith("AFTERTASK_") and "_TEST_" not in name]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)


@pytest.fixture
def no_log_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logging of an app that configures none: pytest installs handlers on the root logger."""
    monkeypatch.setattr(logging.getLogger("aftertask"), "parent", None)


@pytest.fixture
def registry() -> CollectorRegistry:
    """A fresh Prometheus registry."""
    return CollectorRegistry()


@pytest.fixture
def clock() -> Iterator[VirtualClock]:
    """A clock that the test advances."""
    with VirtualClock() as clock:
        yield clock


@pytest.fixture(params=["response", pytest.param("request", marks=pytest.mark.long)])
def env(request: pytest.FixtureRequest) -> Iterator[Env]:
    """
    An app under the middleware; at the end of the test each run has ended exactly once.

    Each test runs with both values of `Settings.run_after`; with `request` in `make long`, which has the time.
    """
    env = Env()
    env.settings["run_after"] = request.param
    yield env
    env.check_accounts()


@pytest.fixture
def client_for(registry: CollectorRegistry) -> Iterator[ClientFor]:
    """A client for an app whose `/` answers with these functions as background tasks, under the middleware."""
    clients: list[TestClient] = []

    def make(*functions: Callable[..., Any], signals: Iterable[Any] | None = None, **settings: Any) -> TestClient:
        async def endpoint(request: Request) -> PlainTextResponse:
            return PlainTextResponse("ok", background=BackgroundTasks([BackgroundTask(each) for each in functions]))

        chosen = Settings(**{"registry": registry, **settings})
        middleware = [Middleware(AftertaskMiddleware, settings=chosen, signals=signals)]
        app = Starlette(routes=[Route("/", endpoint)], middleware=middleware)
        client = TestClient(app, raise_server_exceptions=False)
        clients.append(client)
        return client

    yield make
    for client in clients:
        client.close()
