"""Delivery: never at a task's expense, tried again after an outage, finished at shutdown, and every run counted."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from fastapi import BackgroundTasks, FastAPI
from prometheus_client import CollectorRegistry
from starlette.testclient import TestClient

from aftertask import AftertaskMiddleware, Settings, task
from aftertask._text import default_redact
from aftertask.alerts import Alert, DeliveryFailed, Route, Webhook
from aftertask.events import Failed, Failure, RequestInfo, TaskInfo, TaskRun
from aftertask.testing import VirtualClock
from kit_alerts import AlertsFor, ClientFor, Inbox, WebhookServer, advance_until, counts, queue_length


async def mail() -> None:
    """Fails."""
    raise ConnectionRefusedError


@pytest.mark.parametrize("answer", [500, "hang", "reset", (429, {"Retry-After": "0"}), 404])
def test_after_an_outage_the_counts_are_complete(
    client_for: ClientFor, registry: CollectorRegistry, clock: VirtualClock, answer: Any
) -> None:
    """However the receiver fails, what happened meanwhile is sent when it is back, and every run is counted."""
    with WebhookServer() as server:
        server.answer = answer
        route = Route(Webhook(server.url, timeout=0.2), timeout=10_000, attempts=2)
        with client_for(mail, alerts=[route]) as client:
            for _ in range(10):
                client.get("/")
            advance_until(clock, lambda: counts(registry, "webhook")["failed"] >= 1, "a failed delivery")
            assert server.attempts.all and not server.accepted.all
            server.answer = 200
            server.release.set()
            advance_until(clock, lambda: server.accepted.all, "a delivery", step=10)
            for _ in range(10):
                client.get("/")
        sent = server.alerts(2)
    assert sum(alert["count"] for alert in sent) == 20
    counted = counts(registry, "webhook")
    assert counted["sent"] == len(sent)
    assert counted["sent"] + counted["deduplicated"] == 20
    assert counted["dropped"] == 0
    assert queue_length(registry, "webhook") == 0


def test_a_receiver_that_starts_later_gets_the_alert(
    client_for: ClientFor, registry: CollectorRegistry, clock: VirtualClock
) -> None:
    """Until then its port refuses connections."""
    server = WebhookServer()
    with client_for(mail, alerts=[Route(Webhook(server.url), timeout=10_000)]) as client:
        client.get("/")
        advance_until(clock, lambda: counts(registry, "webhook")["failed"] >= 1, "a failed delivery")
        with server:
            advance_until(clock, lambda: server.accepted.all, "a delivery", step=10)
            assert server.alerts()[0]["count"] == 1


def test_retry_after_postpones_the_next_attempt(client_for: ClientFor, clock: VirtualClock) -> None:
    """After a 429 with `Retry-After: 20` the next attempt follows 20 s later."""
    with WebhookServer() as server:
        server.answer = (429, {"Retry-After": "20"})
        with client_for(mail, alerts=[Route(Webhook(server.url), timeout=10_000)]) as client:
            client.get("/")
            clock.advance(1)
            server.attempts.wait(1)
            server.answer = 200
            started = clock.monotonic()
            advance_until(clock, lambda: server.accepted.all, "a delivery", step=0.5)
            assert clock.monotonic() - started >= 20
        assert len(server.attempts.all) == 2


@pytest.mark.parametrize("kind", ["raises", "exits", "blocks", "async_blocks", "async_raises"])
def test_a_channel_that_misbehaves_affects_no_other(
    client_for: ClientFor, registry: CollectorRegistry, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The other channel gets its alert, the failure is counted and logged without secrets, and the app can stop."""
    inbox, release = Inbox(), threading.Event()

    def bad(alert: Alert) -> Any:
        if kind == "exits":
            sys.exit(3)
        if kind == "blocks":
            release.wait(30)
            return None
        if kind == "async_blocks":
            return asyncio.sleep(30)
        if kind == "async_raises":
            return fails()
        raise ValueError("no: smtp://shop:hunter2@mail")

    async def fails() -> None:
        raise ValueError("no: smtp://shop:hunter2@mail")

    with client_for(mail, alerts=[Route(bad, timeout=0.2, attempts=1), inbox]) as client:
        client.get("/")
        inbox.wait(1)
    release.set()
    assert counts(registry, "bad")["failed"] >= 1
    assert counts(registry, "bad")["dropped"] == 1
    failed = [record.__dict__ for record in caplog.records if getattr(record, "event", None) == "alert.failed"]
    assert {record["channel"] for record in failed} == {"bad"}
    expected = {"exits": "SystemExit", "blocks": "TimeoutError", "async_blocks": "TimeoutError"}
    assert failed[0]["error_type"] == expected.get(kind, "ValueError")
    assert "hunter2" not in str(failed)
    assert failed[-1]["reason"] == "shutdown"


def test_an_async_function_is_a_channel(client_for: ClientFor) -> None:
    """It runs on an event loop of its own, in a thread of its own."""
    inbox = Inbox()

    async def send(alert: Alert) -> None:
        await asyncio.sleep(0)
        inbox((alert.task, threading.current_thread().name))

    with client_for(mail, alerts=[send]) as client:
        client.get("/")
    assert inbox.all == [(f"{__name__}.mail", "aftertask-alert-send")]


def test_a_permanent_failure_is_not_retried_at_once(client_for: ClientFor, clock: VirtualClock) -> None:
    """`DeliveryFailed(permanent=True)` ends this message's attempts; the alert is sent again after a minute."""
    inbox = Inbox()

    def gone(alert: Alert) -> None:
        inbox(alert)
        raise DeliveryFailed("gone", permanent=True)

    with client_for(mail, alerts=[Route(gone, attempts=5, timeout=10_000)]) as client:
        client.get("/")
        clock.advance(1)
        inbox.wait(1)
        started = clock.monotonic()
        advance_until(clock, lambda: len(inbox.all) == 2, "another message")
        assert clock.monotonic() - started >= 59
    first, second = inbox.alerts[:2]
    assert first.id != second.id


@pytest.fixture
def broken_logging() -> Iterator[None]:
    """An app whose structlog processor raises."""

    def broken(logger: Any, method: str, line: structlog.typing.EventDict) -> structlog.typing.EventDict:
        raise ValueError("processor")

    structlog.configure(processors=[broken])
    yield
    structlog.reset_defaults()


def test_broken_logging_does_not_stop_alerts(
    client_for: ClientFor, registry: CollectorRegistry, broken_logging: None
) -> None:
    """The error is counted; the next failure is sent as well."""
    inbox = Inbox()
    with client_for(mail, alerts=[inbox]) as client:
        client.get("/")
        inbox.wait(1)
        client.get("/")
    assert [alert.count for alert in inbox.alerts] == [1, 1]
    assert registry.get_sample_value("aftertask_self_errors_total", {"component": "aftertask.alerts"}) == 2
    assert counts(registry, "Inbox")["sent"] == 2


def test_a_broken_metric_does_not_stop_alerts(
    client_for: ClientFor, alerts_for: AlertsFor, caplog: pytest.LogCaptureFixture
) -> None:
    """The error is logged; the next failure is sent as well."""

    class Broken:
        def count_alerts(self, channel: str, status: str, count: int) -> None:
            if count:
                raise ValueError("metric")

        def observe_alert_delivery(self, channel: str, seconds: float) -> None: ...
        def set_alert_queue(self, channel: str, length: int) -> None: ...
        def self_error(self, component: str) -> None: ...

    inbox = Inbox()
    alerts = alerts_for(inbox, metrics=Broken())
    client = client_for(mail, signals=[alerts])
    client.get("/")
    inbox.wait(1)
    client.get("/")
    alerts.close()
    assert len(inbox.all) == 2
    assert [getattr(record, "event", None) for record in caplog.records].count("signal.failed") == 2


def test_shutdown_delivers_what_is_pending(client_for: ClientFor, registry: CollectorRegistry) -> None:
    """Also the follow-up, which was not due for five minutes."""
    inbox = Inbox()
    with client_for(mail, alerts=[inbox]) as client:
        client.get("/")
        inbox.wait(1)
        for _ in range(5):
            client.get("/")
        assert len(inbox.all) == 1
    assert [alert.count for alert in inbox.alerts] == [1, 5]
    assert counts(registry, "Inbox")["dropped"] == 0


def test_shutdown_sends_a_full_queue_in_few_messages(registry: CollectorRegistry, clock: VirtualClock) -> None:
    """Of a hundred groups nine get their own message, and the tenth covers the others; no run is missing."""
    inbox = Inbox()
    app = FastAPI()
    app.add_middleware(AftertaskMiddleware, settings=Settings(registry=registry, alerts=[Route(inbox, owner="shop")]))

    def failing(number: int) -> Callable[[], Any]:
        async def fails() -> None:
            raise ValueError

        return task(name=f"task{number}", owner="shop")(fails)

    functions = [failing(number) for number in range(100)]

    @app.get("/")
    async def endpoint(tasks: BackgroundTasks, number: int) -> None:
        tasks.add_task(functions[number])

    with TestClient(app, raise_server_exceptions=False) as client:
        for number in range(100):
            client.get("/", params={"number": number})
    assert len(inbox.all) == 10
    assert sum(alert.count + (alert.suppressed.runs if alert.suppressed else 0) for alert in inbox.alerts) == 100
    assert "Held back by the rate limit: 90 alerts about 90 runs" in inbox.alerts[-1].text
    counted = counts(registry, "Inbox")
    assert counted["sent"] + counted["deduplicated"] + counted["rate_limited"] == 100


@pytest.mark.long
def test_memory_is_bounded_while_a_channel_hangs(alerts_for: AlertsFor) -> None:
    """Two thousand further failures take no more memory than the first hundred."""
    release, called = threading.Event(), threading.Event()

    def hangs(alert: Alert) -> None:
        called.set()
        release.wait(60)

    alerts = alerts_for(Route(hangs, timeout=60))

    def fail(times: int) -> None:
        for _ in range(times):
            run = TaskRun(TaskInfo("mail", "shop.mail"), RequestInfo())
            failure = Failure(ConnectionRefusedError(), default_redact)
            alerts.failed(Failed(run, time.time(), 1, 0.1, failure.error, failure, expected=False))
        gc.collect()

    fail(100)
    assert called.wait(10)
    tracemalloc.start()
    try:
        fail(100)
        before, _ = tracemalloc.get_traced_memory()
        fail(2_000)
        growth = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
        release.set()
    assert growth < 50_000, f"{growth} bytes for 2 000 failures"


def test_deliveries_make_no_spans(client_for: ClientFor) -> None:
    """OpenTelemetry's HTTP instrumentation is suppressed, in an async channel too."""
    from opentelemetry.instrumentation.utils import is_http_instrumentation_enabled, is_instrumentation_enabled

    inbox = Inbox()

    def look(alert: Alert) -> None:
        inbox((is_instrumentation_enabled(), is_http_instrumentation_enabled()))

    async def look_async(alert: Alert) -> None:
        look(alert)

    with client_for(mail, alerts=[look, look_async]) as client:
        client.get("/")
    assert inbox.all == [(False, False)] * 2
    assert is_instrumentation_enabled()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_sends_only_its_own_alerts() -> None:
    """What is pending at the fork is sent by the parent alone; locks and threads are made anew."""
    with WebhookServer() as server:
        # Not from the process of the tests: at a fork OpenTelemetry's providers of other tests may wait for a thread.
        done = subprocess.run(
            [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKED, server.url],
            capture_output=True,
            text=True,
            timeout=20,
        )
        assert done.returncode == 0, done.stderr
        sent = server.alerts(2)
    assert {alert["pid"] for alert in sent} == set(map(int, done.stdout.split()))
    assert [alert["count"] for alert in sent] == [1, 1]


FORKED = """
import os, sys
from fastapi import BackgroundTasks, FastAPI
from starlette.testclient import TestClient
from aftertask import AftertaskMiddleware
from aftertask.alerts import Alerts, Route, Webhook
from aftertask.testing import VirtualClock

async def mail():
    raise ConnectionRefusedError

app = FastAPI()

@app.get("/")
async def endpoint(tasks: BackgroundTasks):
    tasks.add_task(mail)

with VirtualClock():  # what is pending at the fork stays so
    alerts = Alerts([Route(Webhook(sys.argv[1]), timeout=10_000)])
    app.add_middleware(AftertaskMiddleware, signals=[alerts])
    client = TestClient(app, raise_server_exceptions=False)
    client.get("/")
    child = os.fork()
    if child == 0:
        client.get("/")
        alerts.close()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    alerts.close()
print(os.getpid(), child)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_without_a_lifespan_the_exit_of_the_process_delivers() -> None:
    """A server that runs no lifespan does not close the signals."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_LIFESPAN], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["endpoint", "[warning] __main__.mail failed: ConnectionRefusedError"]


WITHOUT_LIFESPAN = """
from fastapi import BackgroundTasks, FastAPI
from starlette.testclient import TestClient
from aftertask import AftertaskMiddleware, Settings

async def mail():
    raise ConnectionRefusedError

app = FastAPI()
app.add_middleware(AftertaskMiddleware, settings=Settings(alerts=[lambda alert: print(alert.title)]))

@app.get("/")
async def endpoint(tasks: BackgroundTasks):
    tasks.add_task(mail)
    print("endpoint")

TestClient(app, raise_server_exceptions=False).get("/")
"""

SEVERAL_PROCESSES = """
import os
from fastapi import BackgroundTasks, FastAPI
from starlette.testclient import TestClient
from aftertask import AftertaskMiddleware, Settings

async def mail():
    raise ConnectionRefusedError

app = FastAPI()
app.add_middleware(AftertaskMiddleware, settings=Settings(alerts=[lambda alert: None]))

@app.get("/")
async def endpoint(tasks: BackgroundTasks):
    tasks.add_task(mail)

client = TestClient(app, raise_server_exceptions=False)
client.get("/")
if os.fork() == 0:
    with client:
        client.get("/")
    os._exit(0)
os.wait()
with client:
    client.get("/")
print(client.get("/metrics").text)
"""


def test_one_scrape_adds_up_several_processes(tmp_path: Path) -> None:
    """With `PROMETHEUS_MULTIPROC_DIR`: what a parent and its forked child have delivered."""
    env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL_PROCESSES], env=env, capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 0, done.stderr
    samples = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines() if line.startswith("aftertask_alert"))
    of = 'channel="_lambda_"'
    sent, merged = (samples[f'aftertask_alerts_total{{{of},status="{name}"}}'] for name in ("sent", "deduplicated"))
    assert float(sent) + float(merged) == 3
    assert float(samples[f"aftertask_alert_delivery_seconds_count{{{of}}}"]) == float(sent) >= 2
    assert samples[f"aftertask_alert_queue_length{{{of}}}"] == "0.0"
