"""From a task that fails in a real app to a person: at once, once, and never at the task's expense."""

from __future__ import annotations

import asyncio
import gc
import json
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
from fastapi import BackgroundTasks, FastAPI, HTTPException
from prometheus_client import CollectorRegistry
from starlette.testclient import TestClient

from aftertask import AftertaskMiddleware, Policy, Retry, Settings, task
from aftertask.alerts import Alert, Alerts, DeliveryFailed, Route, Webhook, _delivery, _groups, _signal, send_test
from aftertask.signals import Metrics, usual
from alerts.receivers import Got, Hook

ClientFor = Callable[..., TestClient]


@pytest.fixture(autouse=True)
def at_a_test_s_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Receivers are on this machine; waits between two attempts are short, so that a test need not take minutes."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(_delivery, "RETRY", Retry(wait_initial=0.02))
    monkeypatch.setattr(_groups, "COOL_DOWN", 0.1)


async def mail() -> None:
    """Fails."""
    raise ConnectionRefusedError("smtp://shop:hunter2@mail refused ada@example.org")


async def charge() -> None:
    """Would have succeeded."""


def numbers(registry: CollectorRegistry, channel: str) -> dict[str, float]:
    """What was counted for a channel."""
    return {
        sample.labels["status"]: sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "aftertask_alerts_total" and sample.labels["channel"] == channel
    }


def waits(registry: CollectorRegistry, channel: str) -> float | None:
    return registry.get_sample_value("aftertask_alert_queue_length", {"channel": channel})


def settle(look: Callable[[], bool], what: str) -> None:
    """Until a condition holds that another thread brings about."""
    end = time.monotonic() + 10
    while not look():
        assert time.monotonic() < end, what
        time.sleep(0.01)  # between two looks at a real condition


def test_a_failure_is_told_with_what_one_needs(client_for: ClientFor) -> None:
    """The first message says what, where, since when, whose, what did not run, and which links to follow."""
    got = Got()
    client = client_for(
        mail,
        charge,
        alerts=[got],
        runbook_url="https://runbooks.example.org/",
        policies={f"{__name__}.mail": Policy(owner="growth", severity="critical")},
        request_id=lambda scope: "r-17",
    )
    client.get("/")
    (alert,) = got.wait()
    assert alert.title == f"[critical] {__name__}.mail failed: ConnectionRefusedError"
    assert (alert.kind, alert.outcome, alert.count, alert.owner) == ("failed", "failed", 1, "growth")
    assert (alert.http_method, alert.http_route, alert.request_id) == ("GET", "/", "r-17")
    assert alert.message == "smtp://shop:[redacted]@mail refused [redacted]"
    assert "in mail" in alert.stack and "hunter2" not in alert.text + json.dumps(alert.as_dict())
    assert alert.runbook_url == "https://runbooks.example.org/TaskFailing.md"
    assert alert.not_run == {f"{__name__}.charge": 1}
    assert alert.pid == os.getpid()
    assert len(alert.fingerprint) == 16


def test_each_runbook_is_there() -> None:
    """What an alert links to is a page that is shipped."""
    pages = Path(__file__).parents[2] / "dashboards" / "runbooks"
    for name in set(_signal.RUNBOOKS.values()):
        assert (pages / f"{name}.md").is_file()


def test_a_trace_is_linked(client_for: ClientFor) -> None:
    """`Settings.trace_url` with the trace's id."""
    from opentelemetry.sdk.trace import TracerProvider

    got = Got()
    client_for(mail, alerts=[got], tracer_provider=TracerProvider(), trace_url="https://tempo/{trace_id}/x").get("/")
    (alert,) = got.wait()
    assert alert.trace_url == f"https://tempo/{alert.trace_id}/x"
    assert len(alert.trace_id) == 32


def test_what_is_not_bad_or_not_wanted_is_not_told(client_for: ClientFor) -> None:
    """Expected errors, dropped at a client's will, `alert=False`; the failure that is told comes alone."""
    got = Got()
    quiet, unlucky = got_task("quiet"), got_task("unlucky")
    policies = {quiet.__name__: Policy(alert=False), unlucky.__name__: Policy(expected=ValueError)}
    for function in (quiet, unlucky):
        client_for(function, alerts=[got], policies=policies).get("/")
    app = FastAPI()
    app.add_middleware(AftertaskMiddleware, settings=Settings(registry=CollectorRegistry(), alerts=[got]))

    @app.get("/")
    async def refuse(tasks: BackgroundTasks) -> None:
        tasks.add_task(charge)
        raise HTTPException(409)

    @app.get("/bug")
    async def bug(tasks: BackgroundTasks) -> None:
        tasks.add_task(charge)
        raise KeyError("price")

    client = TestClient(app, raise_server_exceptions=False)
    client.get("/")
    client.get("/bug")
    (alert,) = got.wait()
    assert (alert.kind, alert.reason, alert.error_type) == ("dropped", "handler_error", None)
    assert alert.title == f"[warning] {__name__}.charge was dropped: handler_error"


def got_task(name: str) -> Callable[[], Any]:
    """A registered task that fails."""

    async def failing() -> None:
        raise ValueError(name)

    failing.__name__ = name
    return task(name=name)(failing)


def test_what_one_request_dropped_is_told_together(registry: CollectorRegistry) -> None:
    """A bug in a handler that has added three tasks is one message, not three."""
    got = Got()
    app = FastAPI()
    app.add_middleware(AftertaskMiddleware, settings=Settings(registry=registry, alerts=[got]))

    @app.get("/")
    async def bug(tasks: BackgroundTasks) -> None:
        for function in (charge, mail, mail):
            tasks.add_task(function)
        raise KeyError("price")

    with TestClient(app, raise_server_exceptions=False) as client:
        client.get("/")
        client.get("/")
    (alert,) = got.alerts
    assert (alert.kind, alert.count, alert.not_run) == ("dropped", 2, {f"{__name__}.mail": 4})
    assert "Not run either" in alert.text
    assert numbers(registry, "Got") == {"sent": 1, "deduplicated": 5, "failed": 0, "rate_limited": 0, "dropped": 0}


def test_what_was_skipped_because_of_an_expected_failure_is_told_together(client_for: ClientFor) -> None:
    """The failure itself is nobody's business; that two tasks did not run is."""
    got = Got()
    client_for(mail, charge, charge, alerts=[got], policies={"*.mail": Policy(expected=OSError)}).get("/")
    (alert,) = got.wait()
    assert (alert.kind, alert.count, alert.not_run) == ("skipped", 1, {f"{__name__}.charge": 1})


def test_alert_after_waits_for_so_many_in_a_row(client_for: ClientFor) -> None:
    """The third bad run in a row is told, for all three; a success begins anew."""
    got, outcomes = Got(), iter("ffsfff")

    async def flaky() -> None:
        if next(outcomes) == "f":
            raise ValueError

    client = client_for(flaky, alerts=[got], policies={"*": Policy(alert_after=3)})
    for _ in range(6):
        client.get("/")
    (alert,) = got.wait()
    assert alert.count == 3
    assert alert.first_seen < alert.last_seen
    assert next(outcomes, None) is None


def test_routes_send_each_alert_to_whom_it_concerns(client_for: ClientFor) -> None:
    """By severity, owner and task; a channel that is told of the cause hears of the skipped run there."""
    names = ("all", "pager", "growth", "payments", "mails", "others")
    got = {name: Got() for name in names}
    client = client_for(
        mail,
        charge,
        alerts=[
            Route(got["all"], name="all"),
            Route(got["pager"], name="pager", severity="critical"),
            Route(got["growth"], name="growth", owner="growth"),
            Route(got["payments"], name="payments", owner=["payments", "finance"]),
            Route(got["mails"], name="mails", task="*.mail"),
            Route(got["others"], name="others", task="reports.*"),
        ],
        policies={"*.mail": Policy(owner="growth"), "*.charge": Policy(owner="payments", severity="critical")},
    )
    client.get("/")
    told = {
        name: [(alert.task.rpartition(".")[2], alert.kind, dict(alert.not_run)) for alert in got[name].wait()]
        for name in names[:-1]
    }
    skipped = {f"{__name__}.charge": 1}
    assert told["all"] == [("mail", "failed", skipped)]
    assert told["pager"] == [("charge", "skipped", {})]
    assert told["growth"] == told["mails"] == [("mail", "failed", {})]
    assert told["payments"] == [("charge", "skipped", {})]
    assert got["others"].all == []


def test_a_task_that_works_again_is_told(registry: CollectorRegistry) -> None:
    """After a success and a quiet time."""
    got, broken = Got(), True

    async def sync_stock() -> None:
        if broken:
            raise ValueError

    alerts = Alerts([got], resolve_after=0.3)
    app = FastAPI()
    app.add_middleware(AftertaskMiddleware, settings=Settings(registry=registry), signals=[alerts])

    @app.get("/")
    async def endpoint(tasks: BackgroundTasks) -> None:
        tasks.add_task(sync_stock)

    client = TestClient(app, raise_server_exceptions=False)
    client.get("/")
    client.get("/")
    got.wait(1)
    broken = False
    client.get("/")
    first, last = got.wait(2)
    assert (first.kind, last.kind, last.count) == ("failed", "resolved", 2)
    assert "works again" in last.title


def fail(signals: list[Any], registry: CollectorRegistry, times: int) -> None:
    """So many requests whose task fails, one after another, without a client's overhead."""
    app = FastAPI()
    app.add_middleware(AftertaskMiddleware, settings=Settings(registry=registry), signals=signals)

    @app.get("/")
    async def endpoint(tasks: BackgroundTasks) -> None:
        tasks.add_task(mail)

    async def receive() -> Any:
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        pass

    async def requests() -> None:
        for _ in range(times):
            scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": []}
            with pytest.raises(ConnectionRefusedError):
                await app(scope, receive, send)

    asyncio.run(requests())


def test_a_burst_sends_a_handful_and_loses_no_count(registry: CollectorRegistry) -> None:
    """Ten thousand failures: the first, the burst, and the others together; every one is in the counts."""
    got, metrics = Got(), Metrics(registry)
    alerts = Alerts([got], numbers=metrics, repeat_after=2)
    fail([metrics, alerts], registry, 10_000)
    alerts.close()
    failed = [alert for alert in got.alerts if alert.kind == "failed"]
    bursts = [alert for alert in got.alerts if alert.kind == "burst"]
    assert sum(alert.count for alert in failed) == 10_000
    assert len(bursts) == 1 and bursts[0].severity == "critical"
    assert f"{__name__}.mail" in bursts[0].title
    assert len(got.all) <= 8
    counted = numbers(registry, "Got")
    assert counted["sent"] == len(got.all)
    assert counted["sent"] + counted["deduplicated"] == 10_001
    assert waits(registry, "Got") == 0


@pytest.mark.parametrize(
    ("answer", "while_it_lasts"),
    [(500, 1), ("hang", 0), ("reset", 1), ((429, {"Retry-After": "0"}), 1), (404, 0)],
)
def test_after_an_outage_the_counts_add_up(
    client_for: ClientFor, registry: CollectorRegistry, answer: Any, while_it_lasts: int
) -> None:
    """Whatever the receiver does meanwhile: what failed is told when it is back, and all is counted."""
    with Hook() as hook:
        hook.answer = answer
        route = Route(Webhook(hook.url, timeout=0.2), timeout=0.4, attempts=2)
        client = client_for(mail, alerts=[route])
        with client:
            for _ in range(10):
                client.get("/")
            settle(lambda: numbers(registry, "webhook")["failed"] >= 1, "a failed delivery")
            assert len(hook.tries.all) > while_it_lasts
            hook.answer = 200
            hook.release.set()
            hook.alerts(1)
            for _ in range(10):
                client.get("/")
        told = hook.alerts(1)
    assert sum(alert["count"] for alert in told) == 20
    counted = numbers(registry, "webhook")
    assert counted["sent"] == len(told)
    assert counted["sent"] + counted["deduplicated"] == 20
    assert counted["dropped"] == 0
    assert waits(registry, "webhook") == 0


def test_nobody_there_and_then_somebody(client_for: ClientFor, registry: CollectorRegistry) -> None:
    """A refused connection; the server comes up on that port later."""
    hook = Hook()
    hook._server.server_close()
    client = client_for(mail, alerts=[Webhook(hook.url)])
    with client:
        client.get("/")
        settle(lambda: numbers(registry, "webhook")["failed"] >= 1, "a failed delivery")
        hook._server.socket = type(hook._server.socket)(hook._server.address_family, hook._server.socket_type)
        hook._server.server_bind()
        hook._server.server_activate()
        with hook:
            assert hook.alerts(1)[0]["count"] == 1


def test_what_is_asked_to_wait_waits(client_for: ClientFor) -> None:
    """429 with `Retry-After: 1`: the next attempt is a second later, and not sooner."""
    with Hook() as hook:
        hook.answer = (429, {"Retry-After": "1"})
        client_for(mail, alerts=[Webhook(hook.url)]).get("/")
        hook.tries.wait(1)
        started = time.monotonic()
        hook.answer = 200
        hook.alerts(1)
        assert time.monotonic() - started > 0.9
        assert len(hook.tries.all) == 2


@pytest.mark.parametrize("kind", ["raises", "exits", "blocks", "async_blocks", "async_raises"])
def test_a_channel_that_misbehaves_hurts_nobody_else(
    client_for: ClientFor, registry: CollectorRegistry, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The other channel is told, the failure is counted and logged, and the app can stop."""
    got, release = Got(), threading.Event()

    def bad(alert: Alert) -> Any:
        if kind == "raises":
            raise ValueError("no: smtp://shop:hunter2@mail")
        if kind == "exits":
            sys.exit(3)
        if kind == "blocks":
            release.wait(30)
        if kind == "async_blocks":
            return asyncio.sleep(30)
        return fails()

    async def fails() -> None:
        raise ValueError("no: smtp://shop:hunter2@mail")

    with client_for(mail, alerts=[Route(bad, timeout=0.2, attempts=1), got]) as client:
        client.get("/")
        got.wait(1)
        settle(lambda: numbers(registry, "bad")["failed"] >= 1, "a failed delivery")
        started = time.monotonic()
    assert time.monotonic() - started < 8
    release.set()
    assert numbers(registry, "bad")["dropped"] == 1
    failed = [record.__dict__ for record in caplog.records if record.message == "alert.failed"]
    assert failed[0]["channel"] == "bad"
    expected = {"exits": "SystemExit", "blocks": "TimeoutError", "async_blocks": "TimeoutError"}
    assert failed[0]["error_type"] == expected.get(kind, "ValueError")
    assert "hunter2" not in str(failed)
    assert failed[-1]["reason"] == "shutdown"


def test_an_async_function_is_a_channel(client_for: ClientFor) -> None:
    """On a loop of its own, in a thread of its own."""
    got = Got()

    async def tell(alert: Alert) -> None:
        await asyncio.sleep(0)
        got((alert.task, threading.current_thread().name))

    client_for(mail, alerts=[tell]).get("/")
    assert got.wait() == [(f"{__name__}.mail", "aftertask-alert-tell")]


def test_a_channel_may_say_that_it_makes_no_sense_to_try_again(client_for: ClientFor) -> None:
    """`DeliveryFailed(permanent=True)`: one attempt in this round."""
    got = Got()

    def gone(alert: Alert) -> None:
        got(alert)
        raise DeliveryFailed("gone", permanent=True)

    with client_for(mail, alerts=[Route(gone, attempts=5)]) as client:
        client.get("/")
        first, second = got.wait(2)[:2]
    assert first.id != second.id, "the second is another round"


def test_a_log_that_raises_does_not_end_the_telling(
    client_for: ClientFor, registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The app's own log processor may be broken: that is counted, and the next failure is told all the same."""
    got = Got()

    def broken(*args: Any, **kwargs: Any) -> None:
        raise ValueError("processor")

    monkeypatch.setattr(_delivery, "emit", broken)
    with client_for(mail, alerts=[got]) as client:
        client.get("/")
        got.wait(1)
        client.get("/")
    assert [alert.count for alert in got.alerts] == [1, 1]
    assert registry.get_sample_value("aftertask_self_errors_total", {"component": "aftertask.alerts"}) == 2
    assert numbers(registry, "Got")["sent"] == 2


def test_at_the_end_what_waits_is_delivered(registry: CollectorRegistry) -> None:
    """The lifespan's end brings the follow-up, which was not due for five minutes."""
    got = Got()
    app = FastAPI()
    settings = Settings(registry=registry, alerts=[got])
    app.add_middleware(AftertaskMiddleware, settings=settings)

    @app.get("/")
    async def endpoint(tasks: BackgroundTasks) -> None:
        tasks.add_task(mail)

    with TestClient(app, raise_server_exceptions=False) as client:
        client.get("/")
        got.wait(1)
        for _ in range(5):
            client.get("/")
        assert len(got.all) == 1
    assert [alert.count for alert in got.alerts] == [1, 5]
    assert numbers(registry, "Got")["dropped"] == 0


def test_at_the_end_a_full_queue_is_told_in_few_messages(registry: CollectorRegistry) -> None:
    """A thousand kinds are waiting: ten messages and one for the rest; nothing is lost."""
    got = Got()
    alerts = Alerts([got], numbers=Metrics(registry), burst=10_000)
    app = FastAPI()
    app.add_middleware(AftertaskMiddleware, settings=Settings(registry=registry), signals=[alerts])
    functions = [got_task(f"task{number}") for number in range(300)]

    @app.get("/")
    async def endpoint(tasks: BackgroundTasks, number: int) -> None:
        tasks.add_task(functions[number])

    with TestClient(app, raise_server_exceptions=False) as client:
        for number in range(300):
            client.get("/", params={"number": number})
    assert len(got.all) == 11
    told = sum(alert.count + (alert.suppressed.runs if alert.suppressed else 0) for alert in got.alerts)
    assert told == 300
    counted = numbers(registry, "Got")
    assert counted["sent"] + counted["deduplicated"] + counted["rate_limited"] == 300


def test_memory_is_bounded_while_a_channel_hangs(registry: CollectorRegistry) -> None:
    """Two thousand failures more take no more room than the first ones."""
    release = threading.Event()

    def hangs(alert: Alert) -> None:
        release.wait(60)

    signals = [Alerts([Route(hangs, timeout=60)])]
    fail(signals, registry, 500)
    gc.collect()
    tracemalloc.start()
    try:
        fail(signals, registry, 500)
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        fail(signals, registry, 2_000)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        release.set()
    assert after - before < 50_000, f"{after - before} bytes for 2 000 failures"


def test_deliveries_make_no_spans(client_for: ClientFor) -> None:
    """OpenTelemetry's package for the HTTP client is told to look away, in an async channel too."""
    from opentelemetry.instrumentation.utils import is_http_instrumentation_enabled, is_instrumentation_enabled

    got = Got()

    def look(alert: Alert) -> None:
        got((is_instrumentation_enabled(), is_http_instrumentation_enabled()))

    async def look_async(alert: Alert) -> None:
        look(alert)

    client_for(mail, alerts=[look, look_async]).get("/")
    assert got.wait(2) == [(False, False)] * 2
    assert is_instrumentation_enabled()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # since 3.12, in a process with threads
def test_a_child_process_tells_its_own_failures_only(client_for: ClientFor) -> None:
    """After a fork nothing hangs and nothing is told twice: threads and locks are made anew."""
    with Hook() as hook:
        client = client_for(mail, alerts=[Webhook(hook.url)])
        client.get("/")
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                client.get("/")
                hook_told = [outbox._groups.waiting for signal in _everyone() for outbox in signal.outboxes]
                for signal in _everyone():
                    signal.close()
                code = 0 if 1 in hook_told else 2
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        told = hook.alerts(2)
        assert {alert["pid"] for alert in told} == {os.getpid(), pid}
        assert [alert["count"] for alert in told] == [1, 1]


def _everyone() -> Iterator[Alerts]:
    return iter(list(_signal._everyone))


def test_each_channel_is_tried_by_hand() -> None:
    """One result for each: whether it took the alert, how long that took, and why not."""
    got = Got()

    def broken(alert: Alert) -> None:
        raise KeyError("token")

    with Hook() as hook:
        hook.answer = 403
        results = send_test(
            [got, Webhook(hook.url), broken, Route(lambda alert: time.sleep(1), name="slow", timeout=0.1)]
        )
    assert [(each.channel, each.ok, each.error) for each in results] == [
        ("Got", True, None),
        ("webhook", False, f"{hook.url.split('/')[2]} answered 403"),
        ("broken", False, "KeyError: 'token'"),
        ("slow", False, "slow did not return within 0.1 s"),
    ]
    assert all(each.seconds >= 0 for each in results)
    (alert,) = got.alerts
    assert (alert.kind, alert.task) == ("test", None)
    assert send_test(Settings(alerts=[got]).alerts)[0].ok


@pytest.mark.parametrize(
    ("alerts", "says"),
    [
        ("https://example.org", "must be a list of channels, got str"),
        (3, "must be a list of channels, got int"),
        ([3], "must be a URL, Webhook(…), Apprise(…) or a function, got int"),
        ([Webhook], "write Webhook(…)"),
        ([lambda: None], "takes one argument, the alert"),
        ([Route(Got(), name="x"), Route(Got(), name="x")], "two alert channels are called 'x'"),
        (["ftp//s3cret"], "without a scheme"),
        (["nonsense://s3cret"], "nonsense:// is unknown"),
    ],
)
def test_what_is_no_channel_is_refused(alerts: Any, says: str) -> None:
    """When the settings are made, so when the app is built."""
    with pytest.raises((TypeError, ValueError)) as caught:
        Settings(alerts=alerts)
    assert says in str(caught.value)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"severity": "page"}, "'info', 'warning', 'critical', got 'page'"),
        ({"name": "a b"}, "Route.name"),
        ({"timeout": 0}, "Route.timeout must be more than 0 seconds"),
        ({"attempts": 0}, "Route.attempts must be a whole number, at least 1"),
        ({"rate": 1.5}, "Route.rate"),
        ({"per": float("inf")}, "Route.per"),
        ({"owner": [""]}, "Route.owner must be a name or several"),
        ({"channel": Route(Got())}, "not another Route"),
    ],
)
def test_a_bad_route_is_refused(values: dict[str, Any], says: str) -> None:
    """By name, with the value."""
    with pytest.raises((TypeError, ValueError)) as caught:
        Route(**{"channel": Got(), **values})
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"trace_url": "https://tempo/trace"}, "Settings.trace_url must hold {trace_id}"),
        ({"trace_url": "tempo/{trace_id}"}, "Settings.trace_url must begin with https://"),
        ({"runbook_url": "runbooks"}, "Settings.runbook_url must begin with https://"),
        ({"runbook_url": 3}, "Settings.runbook_url must be a URL or None, got 3"),
    ],
)
def test_a_bad_link_is_refused(values: dict[str, Any], says: str) -> None:
    """By name, with the value."""
    with pytest.raises((TypeError, ValueError)) as caught:
        Settings(**values)
    assert says in str(caught.value)


def test_the_environment_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """`AFTERTASK_ALERTS=URL,URL` and not a line of code."""
    with Hook() as hook:
        monkeypatch.setenv("AFTERTASK_ALERTS", f"{hook.url}, json://127.0.0.1:9/x")
        monkeypatch.setenv("AFTERTASK_TRACE_URL", "https://tempo/{trace_id}")
        settings = Settings.from_env(registry=CollectorRegistry())
        assert [route.name for route in settings.alerts] == ["webhook", "json"]
        assert settings.trace_url == "https://tempo/{trace_id}"
        (alerts,) = [signal for signal in usual(settings) if isinstance(signal, Alerts)]
        assert [outbox.route.name for outbox in alerts.outboxes] == ["webhook", "json"]
        app = FastAPI()
        app.add_middleware(AftertaskMiddleware, settings=settings, signals=[Alerts(settings.alerts[:1])])

        @app.get("/")
        async def endpoint(tasks: BackgroundTasks) -> None:
            tasks.add_task(mail)

        TestClient(app, raise_server_exceptions=False).get("/")
        assert hook.alerts(1)[0]["task"] == f"{__name__}.mail"
    monkeypatch.setenv("AFTERTASK_ALERTS", "s3cret")
    with pytest.raises(ValueError, match="AFTERTASK_ALERTS") as caught:
        Settings.from_env()
    assert "s3cret" not in str(caught.value)


def test_every_status_is_told_from_the_start(registry: CollectorRegistry) -> None:
    """At 0, so that `increase()` sees the first."""
    usual(Settings(registry=registry, alerts=[Got(), Got()]))
    for channel in ("Got", "Got-2"):
        assert numbers(registry, channel) == dict.fromkeys(_delivery.STATUSES, 0)
        assert waits(registry, channel) == 0
        assert registry.get_sample_value("aftertask_alert_delivery_seconds_count", {"channel": channel}) == 0


SHARED = """
import os, time
from fastapi import BackgroundTasks, FastAPI
from prometheus_client import CollectorRegistry, generate_latest
from starlette.testclient import TestClient
from aftertask import AftertaskMiddleware, Settings
from aftertask.signals._multiprocess import all_processes

async def mail():
    raise ConnectionRefusedError

app = FastAPI()
app.add_middleware(AftertaskMiddleware, settings=Settings(registry=CollectorRegistry(), alerts=[lambda alert: None]))

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
print(generate_latest(all_processes()).decode())
"""


def test_several_processes_are_told_as_one(tmp_path: Path) -> None:
    """With `PROMETHEUS_MULTIPROC_DIR`: what a parent and its forked child have delivered, in one scrape."""
    env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", SHARED], env=env, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    told = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines() if line.startswith("aftertask_alert"))
    of = 'channel="_lambda_"'
    sent, folded = (told[f'aftertask_alerts_total{{{of},status="{status}"}}'] for status in ("sent", "deduplicated"))
    assert float(sent) + float(folded) == 3
    assert float(told[f"aftertask_alert_delivery_seconds_count{{{of}}}"]) == float(sent) >= 2
    assert told[f"aftertask_alert_queue_length{{{of}}}"] == "0.0"
