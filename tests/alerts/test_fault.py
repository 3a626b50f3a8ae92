"""While every channel hangs, tasks do not notice; and when the channels come back, every failure has been counted."""

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

from aftertask import AftertaskMiddleware, Retry, Settings
from aftertask.alerts import Alert, Alerts, Route, Webhook, _delivery, _groups
from aftertask.signals import Metrics
from alerts.receivers import Got, Hook

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

#: One request in so many fails; so many requests a round and app; so many rounds.
FAILS, REQUESTS, ROUNDS = 10, 2_000, 15

#: How much longer than with channels that answer the slowest hundredth of tasks may take.
LIMIT = 1.05


async def work() -> None:
    """A short task."""
    await asyncio.sleep(0)


async def breaks() -> None:
    """One that fails."""
    await asyncio.sleep(0)
    raise ConnectionResetError("mail server")


def app_with(channels: list[Any]) -> tuple[FastAPI, Alerts, Metrics]:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    alerts = Alerts(channels, numbers=metrics, repeat_after=0.5)
    app = FastAPI()
    app.add_middleware(AftertaskMiddleware, settings=Settings(registry=registry), signals=[metrics, alerts])

    @app.get("/")
    async def endpoint(tasks: BackgroundTasks, fail: int) -> None:
        tasks.add_task(breaks if fail else work)

    return app, alerts, metrics


async def one(app: FastAPI, fail: int) -> float:
    """A request and its task; how long the two took."""

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


async def race(apps: list[FastAPI]) -> list[float]:
    """The 99th percentile of each, their requests taken in turns so that what else the machine does hits all alike."""
    took: list[list[float]] = [[] for _ in apps]
    for number in range(REQUESTS):
        order = range(len(apps)) if number % 2 else reversed(range(len(apps)))
        for which in order:
            took[which].append(await one(apps[which], number % FAILS == 0))
    return [statistics.quantiles(each, n=100)[98] for each in took]


def test_while_every_channel_hangs_tasks_take_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ratio of the 99th percentiles in one run, the median of fifteen rounds; then the counts add up."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(_groups, "COOL_DOWN", 0.1)
    monkeypatch.setattr(_groups, "LONGEST_COOL_DOWN", 0.2)
    monkeypatch.setattr(_delivery, "RETRY", Retry(wait_initial=0.02))
    answering, blocked, got, release = Got(), Got(), Got(), threading.Event()

    def blocks(alert: Alert) -> None:
        release.wait(200)
        blocked(alert)

    async def hangs(alert: Alert) -> None:
        while not release.is_set():  # noqa: ASYNC110  # set by another thread
            await asyncio.sleep(0.1)
        got(alert)

    with Hook() as well, Hook() as ill:
        ill.answer = "hang"
        healthy = [Webhook(well.url), Route(answering, name="function"), Route(answering, name="async")]
        hanging = [Route(Webhook(ill.url), timeout=2), Route(blocks, timeout=2), Route(hangs, timeout=2)]
        (baseline, calm, _), (app, alerts, metrics) = app_with(healthy), app_with(hanging)

        async def rounds() -> list[list[float]]:
            await race([baseline, app])  # imports, plans, first alerts
            return [await race([baseline, app]) for _ in range(ROUNDS)]

        p99s = asyncio.run(rounds())
        assert not ill.got.all and not got.all and not blocked.all, "nothing has been delivered so far"
        ratios = [hung / well for well, hung in p99s]
        told = ", ".join(f"{ratio:.3f}" for ratio in sorted(ratios))
        print(f"p99 hanging / answering: median {statistics.median(ratios):.3f} of {told}")  # noqa: T201
        ill.answer = 200
        release.set()
        ill.release.set()
        calm.close()
        failures = (ROUNDS + 1) * REQUESTS // FAILS
        for each in (ill.got, got, blocked):
            each.wait(1)
        alerts.close()
        for name, counts in {
            "webhook": [alert["count"] for alert in ill.alerts() if alert["kind"] == "failed"],
            "hangs": [alert.count for alert in got.alerts if alert.kind == "failed"],
        }.items():
            assert sum(counts) == failures, name
            counted = {status: metrics._book._alerts[name, status] for status in _delivery.STATUSES}
            bursts = counted["sent"] - len(counts)
            assert counted["sent"] + counted["deduplicated"] == failures + bursts
            assert counted["dropped"] == counted["rate_limited"] == 0
        assert sum(alert["count"] for alert in well.alerts() if alert["kind"] == "failed") == failures
        # It took what it was given while it hung, late, and that was told again: at least once, so never too few.
        assert sum(alert.count for alert in blocked.alerts if alert.kind == "failed") >= failures
    assert statistics.median(ratios) <= LIMIT, ratios
