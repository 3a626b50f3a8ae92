"""Which alerts a failing task in a real app causes, what they contain, and who gets them."""

from __future__ import annotations

import gc
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import BackgroundTasks, FastAPI, HTTPException
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from prometheus_client import CollectorRegistry
from starlette.testclient import TestClient

from aftertask import AftertaskMiddleware, Policy, Settings, task
from aftertask.alerts import Alert, Route
from aftertask.alerts.describe import RUNBOOKS
from aftertask.events import Cancelled, Dropped, Lost, Rejected, RequestInfo, Slow, TaskInfo, TaskRun
from aftertask.testing import VirtualClock
from kit_alerts import AlertsFor, ClientFor, Inbox, counts


async def mail() -> None:
    """Fails."""
    raise ConnectionRefusedError("smtp://shop:hunter2@mail refused ada@example.org")


async def charge() -> None:
    """Would succeed."""


def failing_task(name: str) -> Callable[[], Any]:
    """A registered task that fails."""

    async def failing() -> None:
        raise ValueError(name)

    return task(name=name)(failing)


def test_a_failure_is_sent_with_all_that_is_needed(client_for: ClientFor) -> None:
    """The first message has the error, the stack, the route, the owner, what did not run, and links."""
    inbox = Inbox()
    with client_for(
        mail,
        charge,
        alerts=[inbox],
        runbook_url="https://runbooks.example.org/",
        policies={f"{__name__}.mail": Policy(owner="growth", severity="critical")},
        request_id=lambda scope: "r-17",
    ) as client:
        client.get("/")
        inbox.wait()
    (alert,) = inbox.alerts
    assert alert.title == f"[critical] {__name__}.mail failed: ConnectionRefusedError"
    assert (alert.kind, alert.outcome, alert.count, alert.owner) == ("failed", "failed", 1, "growth")
    assert (alert.http_method, alert.http_route, alert.request_id) == ("GET", "/", "r-17")
    assert alert.message == "smtp://shop:[redacted]@mail refused [redacted]"
    assert alert.stack is not None and "in mail" in alert.stack
    assert "hunter2" not in alert.text + json.dumps(alert.as_dict())
    assert alert.runbook_url == "https://runbooks.example.org/TaskFailing.md"
    assert alert.not_run == {f"{__name__}.charge": 1}
    assert f"Not run because of it: {__name__}.charge (1)" in alert.text
    assert alert.pid == os.getpid()
    assert len(alert.fingerprint) == 16


def test_every_runbook_exists() -> None:
    """An alert links to a page that is shipped."""
    pages = Path(__file__).parents[2] / "dashboards" / "runbooks"
    for name in set(RUNBOOKS.values()):
        assert (pages / f"{name}.md").is_file()


def test_an_alert_links_to_the_trace(client_for: ClientFor) -> None:
    """`Settings.trace_url` with the id of the trace."""
    from opentelemetry.sdk.trace import TracerProvider

    inbox = Inbox()
    with client_for(
        mail, alerts=[inbox], tracer_provider=TracerProvider(), trace_url="https://tempo/{trace_id}/x"
    ) as client:
        client.get("/")
        inbox.wait()
    (alert,) = inbox.alerts
    assert alert.trace_id is not None and len(alert.trace_id) == 32
    assert alert.trace_url == f"https://tempo/{alert.trace_id}/x"


def test_what_is_not_bad_or_not_wanted_is_not_sent(client_for: ClientFor, registry: CollectorRegistry) -> None:
    """Expected errors, runs dropped at a client's will, `alert=False`; the bug of a handler is sent."""
    inbox = Inbox()
    policies = {"quiet": Policy(alert=False), "unlucky": Policy(expected=ValueError)}
    for function in (failing_task("quiet"), failing_task("unlucky")):
        with client_for(function, alerts=[inbox], policies=policies, registry=CollectorRegistry()) as client:
            client.get("/")
    app = FastAPI()
    app.add_middleware(AftertaskMiddleware, settings=Settings(registry=registry, alerts=[inbox]))

    @app.get("/")
    async def refuse(tasks: BackgroundTasks) -> None:
        tasks.add_task(charge)
        raise HTTPException(409)

    @app.get("/bug")
    async def bug(tasks: BackgroundTasks) -> None:
        tasks.add_task(charge)
        raise KeyError("price")

    with TestClient(app, raise_server_exceptions=False) as client:
        client.get("/")
        client.get("/bug")
    (alert,) = inbox.alerts
    assert (alert.kind, alert.reason, alert.error_type) == ("dropped", "handler_error", "KeyError")
    assert alert.title == f"[warning] {__name__}.charge was dropped: handler_error"
    assert alert.message == "Not started: the request's handler failed (KeyError)"


def run(**info: Any) -> TaskRun:
    """A run of a task."""
    return TaskRun(TaskInfo("mail", "shop.mail", **info), RequestInfo())


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        ("own_background", "the handler returned a response with its own background tasks"),
        ("client_gone", "the client disconnected"),
        ("request_cancelled", "its request was cancelled"),
        ("request_failed", "its request failed after the response was sent"),
        ("added_too_late", "it was added after its request had ended"),
        ("websocket", "a WebSocket endpoint has no response to carry background tasks"),
        ("other", "other"),
    ],
)
def test_an_alert_explains_why_a_run_was_dropped(reason: str, text: str, alerts_for: AlertsFor) -> None:
    """In a sentence, beside the reason that the metrics use."""
    inbox = Inbox()
    alerts = alerts_for(inbox)
    alerts.dropped(Dropped(run(), time.time(), reason))
    alerts.close()
    (alert,) = inbox.alerts
    assert (alert.reason, alert.message, alert.severity) == (reason, f"Not started: {text}", "warning")


def test_kinds_have_their_own_severity_and_text(alerts_for: AlertsFor) -> None:
    """A lost run is critical, a rejected one a warning, and a slow one never critical."""
    inbox = Inbox()
    alerts = alerts_for(inbox)
    alerts.lost(Lost(run(), time.time(), "shutdown", 12.0))
    alerts.rejected(Rejected(run(), time.time(), "no_journal", "set Settings(journal=…)"))
    alerts.slow(Slow(run(severity="critical"), time.time(), 31.0, 30.0, "in mail"))
    alerts.close()
    assert {(alert.kind, alert.severity, alert.message, alert.stack) for alert in inbox.alerts} == {
        ("lost", "critical", "Scheduled 12 s ago; it will never run or finish", None),
        ("rejected", "warning", "Not accepted: the journal could not keep it", None),
        ("slow", "warning", "Running for 31 s; the limit is 30 s", "in mail"),
    }
    assert "set Settings(journal=…)" in {alert.hint for alert in inbox.alerts}


def test_runs_that_one_request_dropped_share_an_alert(registry: CollectorRegistry, clock: VirtualClock) -> None:
    """A bug in a handler that added three tasks is one message, not three."""
    inbox = Inbox()
    app = FastAPI()
    app.add_middleware(AftertaskMiddleware, settings=Settings(registry=registry, alerts=[inbox]))

    @app.get("/")
    async def bug(tasks: BackgroundTasks) -> None:
        for function in (charge, mail, mail):
            tasks.add_task(function)
        raise KeyError("price")

    with TestClient(app, raise_server_exceptions=False) as client:
        client.get("/")
        client.get("/")
    (alert,) = inbox.alerts
    assert (alert.kind, alert.count, alert.not_run) == ("dropped", 2, {f"{__name__}.mail": 4})
    assert f"Also not run: {__name__}.mail (4)" in alert.text
    assert counts(registry, "Inbox") == {"sent": 1, "deduplicated": 5, "failed": 0, "rate_limited": 0, "dropped": 0}


def test_runs_skipped_after_an_expected_failure_share_an_alert(client_for: ClientFor) -> None:
    """The failure itself is not sent; the two tasks that did not run are."""
    inbox = Inbox()
    with client_for(mail, charge, charge, alerts=[inbox], policies={"*.mail": Policy(expected=OSError)}) as client:
        client.get("/")
    (alert,) = inbox.alerts
    assert (alert.kind, alert.count, alert.not_run) == ("skipped", 1, {f"{__name__}.charge": 1})


def test_alert_after_counts_bad_runs_in_a_row(client_for: ClientFor) -> None:
    """The third bad run in a row is sent and counts all three; a success starts over."""
    inbox, outcomes = Inbox(), iter("ffsfff")

    async def flaky() -> None:
        if next(outcomes) == "f":
            raise ValueError

    with client_for(flaky, alerts=[inbox], policies={"*": Policy(alert_after=3)}) as client:
        for _ in range(6):
            client.get("/")
    (alert,) = inbox.alerts
    assert alert.count == 3
    assert alert.first_seen < alert.last_seen
    assert next(outcomes, None) is None


def test_routes_select_by_severity_owner_and_task(client_for: ClientFor) -> None:
    """A channel that gets the alert about the cause has the skipped run in it, of any owner; others by itself."""
    names = ("all", "pager", "growth", "payments", "mails", "others")
    inbox = {name: Inbox() for name in names}
    with client_for(
        mail,
        charge,
        alerts=[
            Route(inbox["all"], name="all"),
            Route(inbox["pager"], name="pager", severity="critical"),
            Route(inbox["growth"], name="growth", owner="growth"),
            Route(inbox["payments"], name="payments", owner=["payments", "finance"]),
            Route(inbox["mails"], name="mails", task="*.mail"),
            Route(inbox["others"], name="others", task="reports.*"),
        ],
        policies={"*.mail": Policy(owner="growth"), "*.charge": Policy(owner="payments", severity="critical")},
    ) as client:
        client.get("/")
    sent = {
        name: [(str(alert.task).rpartition(".")[2], alert.kind, alert.not_run) for alert in inbox[name].alerts]
        for name in names
    }
    skipped = {f"{__name__}.charge": 1}
    assert sent["all"] == [("mail", "failed", skipped)]
    assert sent["pager"] == [("charge", "skipped", {})]
    assert sent["growth"] == sent["mails"] == [("mail", "failed", skipped)]
    assert sent["payments"] == [("charge", "skipped", {})]
    assert sent["others"] == []


def test_a_task_that_works_again_is_resolved(client_for: ClientFor, alerts_for: AlertsFor, clock: VirtualClock) -> None:
    """After a success and 5 minutes without a bad run."""
    inbox, broken = Inbox(), True

    async def sync_stock() -> None:
        if broken:
            raise ValueError

    client = client_for(sync_stock, signals=[alerts_for(inbox)])
    client.get("/")
    client.get("/")
    clock.advance(1)
    inbox.wait(1)
    broken = False
    client.get("/")
    clock.advance(300)
    first, last = inbox.wait(2)
    assert (first.kind, first.count, last.kind, last.count) == ("failed", 2, "resolved", 2)
    assert last.title == f"[resolved] {sync_stock.__module__}.{sync_stock.__qualname__} works again"


def test_a_burst_counts_what_failed_and_not_what_was_skipped(
    client_for: ClientFor, alerts_for: AlertsFor, clock: VirtualClock
) -> None:
    """Ten failures that skip thirty runs are no burst of 25."""
    inbox = Inbox()
    alerts = alerts_for(inbox)
    client = client_for(mail, charge, charge, charge, signals=[alerts])
    for _ in range(10):
        client.get("/")
    clock.advance(1)
    alerts.close()
    assert [(alert.kind, alert.count, alert.not_run) for alert in inbox.alerts] == [
        ("failed", 10, {f"{__name__}.charge": 30})
    ]


def test_an_alert_about_an_outage_says_since_when(
    client_for: ClientFor, alerts_for: AlertsFor, clock: VirtualClock
) -> None:
    """The second message counts its own runs and all of the outage."""
    inbox = Inbox()
    client = client_for(mail, signals=[alerts_for(inbox)])
    client.get("/")
    clock.advance(1)
    inbox.wait(1)
    client.get("/")
    client.get("/")
    clock.advance(301)
    first, second = inbox.wait(2)
    assert (first.count, first.total, first.since) == (1, 1, first.first_seen)
    assert "in all" not in first.text
    assert (second.count, second.total, second.since) == (2, 3, first.first_seen)
    assert "; failing since 2027-01-15 08:00:00 UTC, 3 runs in all" in second.text
    assert json.loads(second.as_json())["since"] == first.first_seen.isoformat()


def test_a_burst_sends_a_few_messages_and_counts_every_run(
    client_for: ClientFor, alerts_for: AlertsFor, clock: VirtualClock, registry: CollectorRegistry
) -> None:
    """Four hundred failures: the first, the burst, and the others together."""
    from aftertask.signals import Metrics

    inbox, metrics = Inbox(), Metrics(registry)
    alerts = alerts_for(inbox, metrics=metrics, repeat_after=2)
    client = client_for(mail, signals=[metrics, alerts])
    for _ in range(400):
        client.get("/")
        clock.advance(0.02)
    alerts.close()
    failed = [alert for alert in inbox.alerts if alert.kind == "failed"]
    bursts = [alert for alert in inbox.alerts if alert.kind == "burst"]
    assert sum(alert.count for alert in failed) == 400
    assert len(bursts) == 1 and bursts[0].severity == "critical"
    assert f"25 bad runs in 0.48 s: {__name__}.mail (25)" in bursts[0].title
    assert len(inbox.all) <= 6
    counted = counts(registry, "Inbox")
    assert counted["sent"] == len(inbox.all)
    assert counted["sent"] + counted["deduplicated"] == 401


def test_the_json_has_every_field() -> None:
    """An alert made by hand, for a test of one's own channel, has an id, a time and an origin."""
    alert = Alert(kind="test", severity="info", message="Grüße \ud800")
    fields = json.loads(alert.as_json())
    assert fields["title"] == "[test] aftertask can reach you"
    assert fields["pid"] == os.getpid() and fields["id"].startswith("alert_")
    assert fields["first_seen"].endswith("+00:00")


#: Where a virtual clock starts.
NOW = 1_800_000_000.0


def cancelled(at: float, task: str = "report.build") -> Cancelled:
    """The end of a run that had started and was cancelled."""
    return Cancelled(TaskRun(TaskInfo(task, task), RequestInfo()), at, 1, 12.0, "cancelled")


def test_runs_that_a_shutdown_cancels_are_cut_off(alerts_for: AlertsFor, clock: VirtualClock) -> None:
    """Those cancelled just before the app closes, and those whose clean-up takes longer than its shutdown."""
    inbox = Inbox()
    alerts = alerts_for(inbox)
    alerts.open()
    for _ in range(2):
        alerts.cancelled(cancelled(NOW))
    alerts.close()
    alerts.cancelled(cancelled(NOW, "mail.late"))
    alerts.close()

    report, late = inbox.wait(2)
    assert (report.kind, report.outcome, report.task, report.count) == ("cut_off", "cancelled", "report.build", 2)
    assert report.title == "[warning] report.build was cut off by a shutdown (2 times)"
    assert report.message == "It had been running for 12 s when the app was shut down, and did not finish"
    assert late.task == "mail.late"


def test_a_run_cancelled_with_its_request_is_not_cut_off(alerts_for: AlertsFor, clock: VirtualClock) -> None:
    """An app that closes much later has nothing to do with it, nor is one reported that wants no alerts."""
    inbox = Inbox()
    alerts = alerts_for(inbox)
    alerts.cancelled(cancelled(NOW))
    clock.advance(10)
    quiet = TaskRun(TaskInfo("quiet", "quiet", alert=False), RequestInfo())
    alerts.cancelled(Cancelled(quiet, NOW + 10, 1, 1.0, "cancelled"))
    alerts.close()
    assert inbox.all == []


@pytest.mark.parametrize(
    ("resource", "variable", "expected"),
    [("shop", "other", "shop"), (None, "other", "other"), (None, None, None)],
)
def test_the_service_is_opentelemetrys(
    resource: str | None, variable: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`service.name` of the provider's resource, else the variable; never `unknown_service`."""
    for name in ("OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES"):
        monkeypatch.delenv(name, raising=False)
    attributes = {"service.name": "unknown_service:python" if resource is None else resource}
    provider = TracerProvider(resource=Resource(attributes))
    if variable is not None:
        monkeypatch.setenv("OTEL_SERVICE_NAME", variable)
    inbox = Inbox()
    app = FastAPI()
    chosen = Settings(registry=CollectorRegistry(), alerts=[inbox], tracer_provider=provider)
    app.add_middleware(AftertaskMiddleware, settings=chosen)

    @app.get("/")
    async def endpoint(tasks: BackgroundTasks) -> None:
        tasks.add_task(mail)

    with TestClient(app, raise_server_exceptions=False) as client:
        client.get("/")
    (alert,) = inbox.wait()
    assert alert.service == expected


def test_a_run_that_garbage_collection_ends_waits_for_no_lock(alerts_for: AlertsFor) -> None:
    """Its coroutine may be closed at any line, so also while the end of another run is counted."""
    alerts, run, now = alerts_for(Inbox()), TaskRun(TaskInfo("mail", "mail"), RequestInfo()), time.time()
    ended: list[str] = []

    def collect(phase: str, info: object) -> None:
        if threading.current_thread() is thread:
            ended.append(phase)
            alerts.cancelled(Cancelled(run, now, 1, 0.1, "cancelled"))

    def lose() -> None:
        for _ in range(100):
            alerts.lost(Lost(run, now, "shutdown", 1.0))

    thread, thresholds = threading.Thread(target=lose, daemon=True), gc.get_threshold()
    gc.callbacks.append(collect)
    gc.set_threshold(1)
    try:
        thread.start()
        thread.join(10)
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(collect)
    assert ended and not thread.is_alive()
