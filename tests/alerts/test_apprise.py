"""Apprise: real mail to a real SMTP server, and clear errors for what it cannot do."""

from __future__ import annotations

import logging
import socket
import sys
import time
from typing import Any

import pytest

from aftertask import Settings
from aftertask.alerts import Alert, Apprise, DeliveryFailed
from alerts.receivers import mail_server

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
    """Title, text and stack, as they are."""
    with mail_server() as (address, got):
        Apprise(f"mailto://{address}/?from=shop@example.org&to=oncall@example.org&mode=insecure&format=text")(FAILED)
        (mail,) = got.wait()
    assert "[critical] mail.receipt failed: shop.MailServerDown" in str(mail["Subject"])
    assert "oncall@example.org" in mail["To"]
    (body,) = [part for part in mail.walk() if part.get_content_type() == "text/plain"]
    text = body.get_payload(decode=True).decode()
    assert "smtp refused: <b>no</b> & so on — Grüße" in text
    assert "Owner: growth" in text
    assert "Traceback (most recent call last):" in text


def test_several_recipients_are_told_at_once() -> None:
    """Apprise would wait 5.5 s before each further one, longer in all than a delivery may take."""
    started = time.monotonic()
    with mail_server() as (address, got):
        Apprise(
            f"mailto://{address}/?from=shop@example.org&to=a@example.org,b@example.org,c@example.org&mode=insecure"
        )(FAILED)
        mails = got.wait(3)
    assert {str(mail["To"]) for mail in mails} == {f"{name}@example.org" for name in "abc"}
    assert time.monotonic() - started < 5


def test_a_mail_server_that_refuses_is_a_failed_delivery(caplog: pytest.LogCaptureFixture) -> None:
    """Apprise says no; we say so, without the URL's secrets."""
    with socket.socket() as taken, caplog.at_level(logging.CRITICAL, "apprise"):
        taken.bind(("127.0.0.1", 0))
        url = f"mailto://user:s3cret@127.0.0.1:{taken.getsockname()[1]}/?from=a@example.org&to=b@example.org&mode=insecure"
        with pytest.raises(DeliveryFailed, match="Apprise could not deliver to mailto://") as caught:
            Apprise(url)(FAILED)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("slak://s3cret/b", "the scheme slak:// is unknown to Apprise"),
        ("slack://s3cret", "Apprise finds the URL slack://… wanting"),
        ("mailto://", "Apprise finds the URL mailto://… wanting"),
        ("https://example.org/s3cret", "the scheme https:// is unknown to Apprise"),
        ("s3cret", "without a scheme"),
        (None, "must be a string, got NoneType"),
    ],
)
def test_a_bad_url_is_refused(url: Any, says: str, caplog: pytest.LogCaptureFixture) -> None:
    """When the app is built, with the scheme and the way out, and without the rest of the URL."""
    with caplog.at_level(logging.CRITICAL, "apprise"), pytest.raises((TypeError, ValueError)) as caught:
        Apprise(url)
    assert says in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_without_the_extra_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the app is built, from code and from the environment."""
    monkeypatch.setitem(sys.modules, "apprise", None)
    with pytest.raises(ImportError, match=r"slack:// is delivered by Apprise.*pip install 'aftertask\[alerts\]'"):
        Apprise("slack://T/B/s3cret")
    monkeypatch.setenv("AFTERTASK_ALERTS", "slack://T/B/s3cret")
    with pytest.raises(ImportError, match="aftertask"):
        Settings.from_env()


def test_a_web_address_that_apprise_knows_is_called_by_its_service() -> None:
    """Slack's own web hook address, as it is copied from there."""
    channel = Apprise("https://hooks.slack.com/services/T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7FQ")
    assert channel.name == "slack"
    assert repr(channel) == "Apprise('slack://…')"
