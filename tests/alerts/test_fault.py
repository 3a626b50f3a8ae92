"""While every channel hangs, tasks are not slower; when the channels return, every failure has been counted."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import threading
import time
from typing import Any

import pytest
from fastapi import BackgroundTasks, FastAPI
from prometheus_client import CollectorRegistry

from aftertask import AftertaskMiddleware, Settings
from aftertask.alerts import Alert, Route, Webhook
from aftertask.signals import Metrics
from aftertask.testing import VirtualClock
from kit_alerts import AlertsFor, Inbox, WebhookServer, advance_until, counts

pytestmark = [pytest.mark.long, pytest.mark.alone, pytest.mark.timeout(300)]

#: One request in `FAILS` fails; requests per round and app; rounds.
FAILS, REQUESTS, ROUNDS = 10, 2_000, 15

#: The 99th percentile may be this much higher than with channels that answer.
LIMIT = 1.05


async def work() -> None:
    """A short task."""
    await asyncio.sleep(0)


async def breaks() -> None:
    """A short task that fails."""
    await asyncio.sleep(0)
    raise ConnectionResetError("mail server")


def app_with(*signals: Any) -> FastAPI:
    """An app whose endpoint adds a task that fails if the query asks for it."""
    app = FastAPI()
    app.add_middleware(AftertaskMiddleware, settings=Settings(registry=CollectorRegistry()), signals=signals)

    @app.get("/")
    async def endpoint(tasks: BackgroundTasks, fail: int) -> None:
        tasks.add_task(breaks if fail else work)

    return app


async def request(app: FastAPI, fail: int) -> float:
    """Serve a request and its task; the seconds it took."""

    async def receive() -> Any:
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        pass

    query = b"fail=1" if fail else b"fail=0"
    scope = {"type": "http", "method": "GET", "path": "/", "query_string": query, "headers": []}
    started = time.perf_counter()
    with contextlib.suppress(ConnectionResetError):
        await app(scope, receive, send)
    return time.perf_counter() - started


async def percentiles(apps: list[FastAPI], clock: VirtualClock) -> list[float]:
    """The 99th percentile of each app; their requests alternate, so that other load affects them alike."""
    took: list[list[float]] = [[] for _ in apps]
    for number in range(REQUESTS):
        order = range(len(apps)) if number % 2 else reversed(range(len(apps)))
        for which in order:
            took[which].append(await request(apps[which], number % FAILS == 0))
        if number % 100 == 0:
            clock.advance(0.1)  # messages become due, and calls time out
    return [statistics.quantiles(each, n=100)[98] for each in took]


def test_tasks_are_not_slower_while_every_channel_hangs(alerts_for: AlertsFor, clock: VirtualClock) -> None:
    """The ratio of the 99th percentiles, median of fifteen rounds; afterwards the counts are complete."""
    answering, blocked, inbox, release = Inbox(), Inbox(), Inbox(), threading.Event()

    def blocks(alert: Alert) -> None:
        release.wait(200)
        blocked(alert)

    async def hangs(alert: Alert) -> None:
        while not release.is_set():  # noqa: ASYNC110  # set by another thread
            await asyncio.sleep(0.1)
        inbox(alert)

    with WebhookServer() as good, WebhookServer() as hanging:
        hanging.answer = "hang"
        registry = CollectorRegistry()
        metrics = Metrics(registry)
        calm = alerts_for(Webhook(good.url), Route(answering, name="a"), Route(answering, name="b"), repeat_after=1)
        alerts = alerts_for(
            Route(Webhook(hanging.url), timeout=2),
            Route(blocks, timeout=2),
            Route(hangs, timeout=60),
            metrics=metrics,
            repeat_after=1,
        )
        apps = [app_with(Metrics(CollectorRegistry()), calm), app_with(metrics, alerts)]

        async def rounds() -> list[list[float]]:
            await percentiles(apps, clock)  # imports, policies, first alerts
            return [await percentiles(apps, clock) for _ in range(ROUNDS)]

        p99s = asyncio.run(rounds())
        assert not hanging.accepted.all and not inbox.all and not blocked.all
        ratios = sorted(hung / well for well, hung in p99s)
        hanging.answer = 200
        release.set()
        hanging.release.set()
        for received in (hanging.accepted, inbox, blocked):
            advance_until(clock, lambda: received.all, "a delivery")  # noqa: B023  # called in this round
        calm.close()
        alerts.close()
        failures = (ROUNDS + 1) * REQUESTS // FAILS
        for name, runs in {
            "webhook": [alert["count"] for alert in hanging.alerts() if alert["kind"] == "failed"],
            "hangs": [alert.count for alert in inbox.alerts if alert.kind == "failed"],
        }.items():
            # A message whose answer came too late is sent again: never too few.
            assert sum(runs) >= failures, name
            counted = counts(registry, name)
            assert counted["sent"] + counted["deduplicated"] >= failures
            assert counted["dropped"] == counted["rate_limited"] == 0
        assert sum(alert["count"] for alert in good.alerts() if alert["kind"] == "failed") == failures
        assert sum(alert.count for alert in blocked.alerts if alert.kind == "failed") >= failures
    assert statistics.median(ratios) <= LIMIT, ratios
