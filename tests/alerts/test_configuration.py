"""Alerts are configured by `Settings` or by the environment; a mistake is reported when the app is built."""

from __future__ import annotations

import threading
from typing import Any
from unittest.mock import MagicMock

import pytest
from prometheus_client import CollectorRegistry

from aftertask import Settings
from aftertask.alerts import Alert, Alerts, Channel, Route, Webhook, send_test
from aftertask.alerts.delivery import STATUSES
from aftertask.signals import usual
from kit_alerts import AlertsFor, ClientFor, Inbox, WebhookServer, counts, queue_length


async def mail() -> None:
    """Fails."""
    raise ConnectionRefusedError


@pytest.mark.parametrize(
    ("alerts", "text"),
    [
        ("https://example.org", "must be a list of channels, got str"),
        (3, "must be a list of channels, got int"),
        ([3], "must be a URL, Webhook(…), Apprise(…) or a function, got int"),
        ([Webhook], "write Webhook(…)"),
        ([lambda: None], "takes one argument, the alert"),
        ([Route(Inbox(), name="x"), Route(Inbox(), name="x")], "two alert channels are named 'x'"),
        (["ftp//s3cret"], "without a scheme"),
        (["nonsense://s3cret"], "cannot use the URL nonsense://…"),
    ],
)
def test_what_is_not_a_channel_is_refused(alerts: Any, text: str) -> None:
    """When the settings are made; the error shows no secret."""
    with pytest.raises((TypeError, ValueError)) as caught:
        Settings(alerts=alerts)
    assert text in str(caught.value)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"severity": "page"}, "'info', 'warning', 'critical', got 'page'"),
        ({"name": "a b"}, "Route.name"),
        ({"timeout": 0}, "Route.timeout must be more than 0 seconds"),
        ({"attempts": 0}, "Route.attempts must be at least 1, got 0"),
        ({"rate": 1.5}, "Route.rate"),
        ({"per": float("inf")}, "Route.per"),
        ({"owner": [""]}, "Route.owner must be one name or several"),
        ({"channel": Route(Inbox())}, "not another Route"),
    ],
)
def test_a_bad_route_is_refused(values: dict[str, Any], text: str) -> None:
    """The error names the argument and its value."""
    with pytest.raises((TypeError, ValueError)) as caught:
        Route(**{"channel": Inbox(), **values})
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"burst": 1}, "Alerts.burst must be at least 2, got 1"),
        ({"repeat_after": 0}, "Alerts.repeat_after must be more than 0 seconds"),
        ({"trace_url": "https://tempo/trace"}, "Alerts.trace_url must contain {trace_id}"),
    ],
)
def test_a_bad_option_of_alerts_is_refused(values: dict[str, Any], text: str) -> None:
    """The error names the argument and its value."""
    with pytest.raises(ValueError) as caught:
        Alerts([Inbox()], **values)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"trace_url": "https://tempo/trace"}, "Settings.trace_url must contain {trace_id}"),
        ({"trace_url": "tempo/{trace_id}"}, "Settings.trace_url must begin with https://"),
        ({"runbook_url": "runbooks"}, "Settings.runbook_url must begin with https://"),
        ({"runbook_url": 3}, "Settings.runbook_url must be a URL or None, got 3"),
    ],
)
def test_a_bad_link_is_refused(values: dict[str, Any], text: str) -> None:
    """The error names the setting and its value."""
    with pytest.raises((TypeError, ValueError)) as caught:
        Settings(**values)
    assert text in str(caught.value)


def test_channels_have_unique_names(alerts_for: AlertsFor) -> None:
    """A second channel of a kind gets a number; a name is never made up by a mock."""
    alerts = alerts_for(Inbox(), Inbox(), Route(Inbox(), name="Inbox-2"), MagicMock(), "json://127.0.0.1:9/x")
    assert [route.name for route in alerts.routes] == ["Inbox", "Inbox-3", "Inbox-2", "MagicMock", "json"]


def test_functions_and_classes_are_channels() -> None:
    """`Channel` describes anything that takes an alert."""
    assert isinstance(Webhook("https://example.org"), Channel)
    assert isinstance(mail, Channel)


def test_the_environment_is_enough(monkeypatch: pytest.MonkeyPatch, client_for: ClientFor) -> None:
    """`AFTERTASK_ALERTS=URL,URL` needs no line of code."""
    with WebhookServer() as server:
        monkeypatch.setenv("AFTERTASK_ALERTS", f"{server.url}, {server.url}")
        monkeypatch.setenv("AFTERTASK_TRACE_URL", "https://tempo/{trace_id}")
        settings = Settings.from_env(registry=CollectorRegistry())
        assert [route.name for route in settings.alerts if isinstance(route, Route)] == ["webhook", "webhook-2"]
        assert settings.trace_url == "https://tempo/{trace_id}"
        with client_for(mail, signals=usual(settings)) as client:
            client.get("/")
        assert [alert["task"] for alert in server.alerts(2)] == [f"{__name__}.mail"] * 2
    monkeypatch.setenv("AFTERTASK_ALERTS", "s3cret")
    with pytest.raises(ValueError, match="AFTERTASK_ALERTS") as caught:
        Settings.from_env()
    assert "s3cret" not in str(caught.value)


def test_every_status_exists_from_the_start(registry: CollectorRegistry) -> None:
    """At 0, so that `increase()` sees the first delivery."""
    signals = usual(Settings(registry=registry, alerts=[Inbox(), Inbox()]))
    for channel in ("Inbox", "Inbox-2"):
        assert counts(registry, channel) == dict.fromkeys(STATUSES, 0)
        assert queue_length(registry, channel) == 0
        assert registry.get_sample_value("aftertask_alert_delivery_seconds_count", {"channel": channel}) == 0
    assert signals


def test_send_test_tries_each_channel() -> None:
    """One result per channel: whether it accepted the alert, how long it took, and why it failed, redacted."""
    inbox, release = Inbox(), threading.Event()

    def broken(alert: Alert) -> None:
        raise KeyError("token=s3cret")

    def hangs(alert: Alert) -> None:
        release.wait(30)

    with WebhookServer() as server:
        server.answer = 403
        results = send_test([inbox, Webhook(server.url), broken, Route(hangs, timeout=0.1)])
    release.set()
    assert [(each.channel, each.ok, each.error) for each in results] == [
        ("Inbox", True, None),
        ("webhook", False, f"{server.url.split('/')[2]} responded with 403"),
        ("broken", False, "KeyError: 'token=[redacted]'"),
        ("hangs", False, "hangs did not return within 0.1 s"),
    ]
    assert all(each.seconds >= 0 for each in results)
    (alert,) = inbox.alerts
    assert (alert.kind, alert.task) == ("test", None)
    assert send_test(Settings(alerts=[inbox]).alerts)[0].ok
