"""Apprise: mail to a real SMTP server, and clear errors for what it cannot do."""

from __future__ import annotations

import logging
import socket
import sys
import time
from typing import Any

import pytest

from aftertask import Settings
from aftertask.alerts import Alert, Apprise, DeliveryFailed
from kit_alerts import mail_server

FAILED = Alert(
    id="alert_1",
    kind="failed",
    severity="critical",
    task="mail.receipt",
    owner="growth",
    error_type="shop.MailServerDown",
    message="smtp refused: <b>no</b> & so on — Grüße",
    stack="Traceback (most recent call last):\n  File …",
)


def test_a_mail_arrives() -> None:
    """It has the title, the text and the stack, unchanged."""
    with mail_server() as (address, inbox):
        Apprise(f"mailto://{address}/?from=shop@example.org&to=oncall@example.org&mode=insecure&format=text")(FAILED)
        (mail,) = inbox.wait()
    assert "[critical] mail.receipt failed: shop.MailServerDown" in str(mail["Subject"])
    assert "oncall@example.org" in mail["To"]
    (body,) = [part for part in mail.walk() if part.get_content_type() == "text/plain"]
    text = body.get_payload(decode=True).decode()
    assert "smtp refused: <b>no</b> & so on — Grüße" in text
    assert "Owner: growth" in text
    assert "Traceback (most recent call last):" in text


def test_several_recipients_get_their_mail_without_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apprise would sleep 5.5 s before each further one: together longer than a delivery may take."""
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"Apprise slept for {seconds} s"))
    with mail_server() as (address, inbox):
        Apprise(
            f"mailto://{address}/?from=shop@example.org&to=a@example.org,b@example.org,c@example.org&mode=insecure"
        )(FAILED)
        mails = inbox.wait(3)
    assert {str(mail["To"]) for mail in mails} == {f"{name}@example.org" for name in "abc"}


def test_a_mail_server_that_refuses_is_a_failed_delivery(caplog: pytest.LogCaptureFixture) -> None:
    """The error names the service, without the URL's secrets."""
    with socket.socket() as taken, caplog.at_level(logging.CRITICAL, "apprise"):
        taken.bind(("127.0.0.1", 0))
        url = f"mailto://user:s3cret@127.0.0.1:{taken.getsockname()[1]}/?from=a@example.org&to=b@example.org&mode=insecure"
        with pytest.raises(DeliveryFailed, match="Apprise could not deliver to mailto://…") as caught:
            Apprise(url)(FAILED)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("slak://s3cret/b", "Apprise cannot use the URL slak://…"),
        ("slack://s3cret", "Apprise cannot use the URL slack://…"),
        ("mailto://", "Apprise cannot use the URL mailto://…"),
        ("https://example.org/s3cret", "Apprise cannot use the URL https://…"),
        ("s3cret", "without a scheme"),
        (None, "must be a string, got NoneType"),
    ],
)
def test_a_bad_url_is_refused(url: Any, text: str, caplog: pytest.LogCaptureFixture) -> None:
    """When the app is built; the error has the scheme and the way out, and not the rest of the URL."""
    with caplog.at_level(logging.CRITICAL, "apprise"), pytest.raises((TypeError, ValueError)) as caught:
        Apprise(url)
    assert text in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_a_missing_extra_is_an_error_with_the_command_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the app is built, from code and from the environment."""
    monkeypatch.setitem(sys.modules, "apprise", None)
    with pytest.raises(ImportError, match=r"slack:// needs Apprise.*pip install 'aftertask\[alerts\]'"):
        Apprise("slack://T/B/s3cret")
    monkeypatch.setenv("AFTERTASK_ALERTS", "slack://T/B/s3cret")
    with pytest.raises(ImportError, match="aftertask"):
        Settings.from_env()


def test_a_web_address_that_apprise_recognises_is_named_after_its_service() -> None:
    """Such as the webhook address that Slack shows."""
    channel = Apprise("https://hooks.slack.com/services/T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7FQ")
    assert channel.name == "slack"
    assert repr(channel) == "Apprise('slack://…')"
