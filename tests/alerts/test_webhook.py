"""The webhook: signed JSON, to real web servers that answer, hang, refuse, reset, or ask for a pause."""

from __future__ import annotations

import base64
import functools
import json
import secrets
import socket
import subprocess
import threading
import time
from email.utils import formatdate
from typing import Any

import pytest
import standardwebhooks

from aftertask.alerts import Alert, DeliveryFailed, Route, Webhook, send_test
from aftertask.alerts.routing import channel_from_url, urls_in
from aftertask.alerts.webhook import retry_after
from kit_alerts import WebhookServer

SECRET = "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()


def alert(**values: Any) -> Alert:
    return Alert(**{"id": "alert_1", "kind": "failed", "severity": "warning", "task": "mail", **values})


def test_an_independent_library_verifies_the_signature() -> None:
    """Standard Webhooks' own verifier accepts it, and refuses it for another body, secret, id or time."""
    with WebhookServer() as server:
        Webhook(server.url, secret=SECRET, headers={"X-Team": "shop"})(alert(message="Grüße \ud800"))
        (got,) = server.accepted.wait()
    verified = standardwebhooks.Webhook(SECRET).verify(got["body"], got["headers"])
    assert verified["task"] == "mail"
    assert verified["message"].startswith("Grüße ")
    assert got["path"] == "/hook/s3cret"
    assert got["headers"]["X-Team"] == "shop"
    assert got["headers"]["Content-Type"] == "application/json"
    other = standardwebhooks.Webhook("whsec_" + base64.b64encode(b"x" * 32).decode())
    for verifier, body, headers in [
        (other, got["body"], got["headers"]),
        (standardwebhooks.Webhook(SECRET), got["body"] + b" ", got["headers"]),
        (standardwebhooks.Webhook(SECRET), got["body"], {**got["headers"], "Webhook-Id": "alert_2"}),
        (
            standardwebhooks.Webhook(SECRET),
            got["body"],
            {**got["headers"], "Webhook-Timestamp": str(int(time.time()) - 9)},
        ),
    ]:
        with pytest.raises(standardwebhooks.WebhookVerificationError):
            verifier.verify(body, {name.lower(): value for name, value in headers.items()})


def test_openssl_computes_the_same_signature() -> None:
    """Another implementation of HMAC-SHA256 agrees."""
    key = secrets.token_bytes(24)
    with WebhookServer() as server:
        Webhook(server.url, secret="whsec_" + base64.b64encode(key).decode())(alert())
        (got,) = server.accepted.wait()
    signed = f"{got['headers']['Webhook-Id']}.{got['headers']['Webhook-Timestamp']}.".encode() + got["body"]
    command = ["openssl", "dgst", "-sha256", "-mac", "HMAC", "-macopt", f"hexkey:{key.hex()}", "-binary"]
    digest = subprocess.run(command, input=signed, capture_output=True, check=True, timeout=10).stdout
    assert got["headers"]["Webhook-Signature"] == f"v1,{base64.b64encode(digest).decode()}"


def test_without_a_secret_a_request_is_not_signed() -> None:
    """It still carries the id and the time."""
    with WebhookServer() as server:
        Webhook(server.url)(alert())
        (got,) = server.accepted.wait()
    assert "Webhook-Signature" not in got["headers"]
    assert got["headers"]["Webhook-Id"] == "alert_1"


@pytest.mark.parametrize(
    ("answer", "text", "permanent", "after"),
    [
        (500, "responded with 500", False, None),
        (503, "responded with 503", False, None),
        ((429, {"Retry-After": "7"}), "responded with 429", False, 7.0),
        ((429, {"Retry-After": "999999"}), "responded with 429", False, 3600.0),
        (404, "responded with 404", True, None),
        ((302, {"Location": "http://127.0.0.1:1/"}), "responded with 302", True, None),
        ("reset", "no response from 127.0.0.1", False, None),
    ],
)
def test_any_other_answer_is_a_failure(answer: Any, text: str, permanent: bool, after: float | None) -> None:
    """The error has the status, and whether and when to retry; a redirect is not followed."""
    with WebhookServer() as server:
        server.answer = answer
        with pytest.raises(DeliveryFailed, match=text) as caught:
            Webhook(server.url)(alert())
    assert (caught.value.permanent, caught.value.retry_after) == (permanent, after)
    assert "s3cret" not in str(caught.value)


def test_a_receiver_that_hangs_is_a_failure() -> None:
    """After the webhook's own timeout."""
    with WebhookServer() as server:
        server.answer = "hang"
        with pytest.raises(DeliveryFailed, match="timed out"):
            Webhook(server.url, timeout=0.2)(alert())


def test_a_refused_connection_is_a_failure() -> None:
    """The error names the host and the cause."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: refused
        with pytest.raises(DeliveryFailed, match=r"no response from 127.0.0.1:\d+: Connection refused"):
            Webhook(f"http://127.0.0.1:{taken.getsockname()[1]}/hook/s3cret")(alert())


def test_a_host_that_cannot_be_encoded_is_a_failure() -> None:
    """A label of a host name has at most 63 characters; Python raises a `UnicodeError` for a longer one."""
    with pytest.raises(DeliveryFailed, match="no response from x"):
        Webhook(f"http://{'x' * 70}.example.org/hook/s3cret")(alert())


def test_the_route_s_timeout_covers_the_whole_call() -> None:
    """A receiver that sends a byte now and then never reaches the webhook's own timeout."""
    release = threading.Event()
    (tested,) = send_test([Route(lambda alert: release.wait(30), name="slow", timeout=0.2)])  # type: ignore[arg-type]  # returns a bool
    release.set()
    assert (tested.ok, tested.error) == (False, "slow did not return within 0.2 s")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"url": "hooks.example.org/x"}, "must begin with https"),
        ({"url": "https://"}, "needs a host"),
        ({"url": "https://exa mple.org"}, "malformed"),
        ({"url": "https://example.org:port/s3cret"}, "malformed"),
        ({"url": "https://[::1/s3cret"}, "malformed"),
        ({"url": "https://user:s3cret"}, "malformed"),
        ({"url": "s3cret:abc"}, "must begin with https"),
        ({"url": "https://user:s3cret@example.org"}, "must not contain a user or password"),
        ({"url": "ftp://example.org/s3cret"}, "got ftp://; for other schemes use Apprise"),
        ({"url": 3}, "must be a string, got int"),
        ({"secret": "s3cret"}, "whsec_"),
        ({"secret": "whsec_s3cret!"}, "24 to 64"),
        ({"secret": "whsec_" + base64.b64encode(b"short").decode()}, "24 to 64"),
        ({"secret": "whsec_s3crét"}, "24 to 64"),
        ({"headers": {"X-Team": "shop", "Authorization: Bearer s3cret": ""}}, "the name of header 2 is malformed"),
        ({"headers": {"Host": "c"}}, "set by aftertask itself"),
        ({"headers": {"X": "s3cret\r\nY: d"}}, "one line of ASCII"),
        ({"headers": ["X"]}, "must map names to values"),
        ({"timeout": 0}, "more than 0 seconds, got 0"),
    ],
)
def test_a_bad_webhook_is_refused(values: dict[str, Any], text: str) -> None:
    """The error has the fault and the way out, and no secret."""
    with pytest.raises((TypeError, ValueError)) as caught:
        Webhook(**{"url": "https://example.org", **values})
    assert text in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_retry_after_is_read_in_both_forms() -> None:
    """Seconds, or a date (RFC 9110, 10.2.3); anything else is ignored."""
    assert retry_after("3") == 3
    soon = retry_after(formatdate(time.time() + 60, usegmt=True))
    assert soon is not None and 50 < soon <= 60
    assert retry_after(formatdate(time.time() - 60, usegmt=True)) == 0
    for nonsense in (None, "", "soon", "-3", "1.5", "²"):
        assert retry_after(nonsense) is None


def test_a_repr_shows_no_secret() -> None:
    """Neither of a webhook nor of a channel of the user's own: settings are printed."""
    route = Route(Webhook("https://example.org/s3cret", secret=SECRET))
    assert repr(route) == "Route(Webhook('example.org'), name='webhook')"
    assert "s3cret" not in repr(Route(functools.partial(post, "s3cret")))


def post(token: str, alert: Alert) -> None:
    """A channel that takes a token as its first argument."""


def test_a_comma_separates_urls_only_before_a_scheme() -> None:
    """Elsewhere it is part of the URL."""
    assert urls_in(" https://a/b?x=1,2 , mailto://u:p@h?to=a,b,slack://T/B,") == [
        "https://a/b?x=1,2",
        "mailto://u:p@h?to=a,b",
        "slack://T/B,",
    ]
    with pytest.raises(ValueError, match="without a scheme"):
        channel_from_url("s3cret")


def test_the_body_has_fields_for_machines_and_a_text_for_people() -> None:
    """Many chats show a field named `text`."""
    sent = alert(count=3, error_type="shop.MailServerDown", stack="Traceback …")
    with WebhookServer() as server:
        channel_from_url(server.url)(sent)
        (got,) = server.alerts()
    assert got["title"] == "[warning] mail failed: shop.MailServerDown (3 times)"
    assert got["text"].endswith("Traceback …")
    assert got["outcome"] == "failed"
    assert got == json.loads(sent.as_json()) == sent.as_dict()
