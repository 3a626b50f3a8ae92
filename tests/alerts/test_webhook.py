"""The web hook: JSON, signed, to real receivers that answer, hang, refuse, reset, or ask to be left alone."""

from __future__ import annotations

import base64
import json
import secrets
import socket
import subprocess
import time
from email.utils import formatdate
from typing import Any

import pytest
import standardwebhooks

from aftertask.alerts import Alert, DeliveryFailed, Route, Webhook
from aftertask.alerts._channel import channel_of, urls_in
from aftertask.alerts._delivery import try_once
from aftertask.alerts.webhook import retry_after
from alerts.receivers import Hook

SECRET = "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The receivers are on this machine."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def alert(**values: Any) -> Alert:
    return Alert(**{"id": "alert_1", "kind": "failed", "severity": "warning", "task": "mail", **values})


def test_it_posts_json_that_an_independent_library_verifies() -> None:
    """Standard Webhooks' own verifier accepts the signature, and refuses it for another body, secret or id."""
    with Hook() as hook:
        Webhook(hook.url, secret=SECRET, headers={"X-Team": "shop"})(alert(message="Grüße \ud800"))
        (got,) = hook.got.wait()
    told = standardwebhooks.Webhook(SECRET).verify(got["body"], got["headers"])
    assert told["task"] == "mail"
    assert told["message"].startswith("Grüße ")
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


def test_openssl_verifies_the_signature_too() -> None:
    """Another implementation of HMAC-SHA256 comes to the same."""
    key = secrets.token_bytes(24)
    with Hook() as hook:
        Webhook(hook.url, secret="whsec_" + base64.b64encode(key).decode())(alert())
        (got,) = hook.got.wait()
    signed = f"{got['headers']['Webhook-Id']}.{got['headers']['Webhook-Timestamp']}.".encode() + got["body"]
    command = ["openssl", "dgst", "-sha256", "-mac", "HMAC", "-macopt", f"hexkey:{key.hex()}", "-binary"]
    digest = subprocess.run(command, input=signed, capture_output=True, check=True, timeout=10).stdout
    assert got["headers"]["Webhook-Signature"] == f"v1,{base64.b64encode(digest).decode()}"


def test_without_a_secret_it_is_not_signed() -> None:
    """The id and the time are there all the same."""
    with Hook() as hook:
        Webhook(hook.url)(alert())
        (got,) = hook.got.wait()
    assert "Webhook-Signature" not in got["headers"]
    assert got["headers"]["Webhook-Id"] == "alert_1"


@pytest.mark.parametrize(
    ("answer", "says", "permanent", "after"),
    [
        (500, "answered 500", False, None),
        (503, "answered 503", False, None),
        ((429, {"Retry-After": "7"}), "answered 429", False, 7.0),
        ((429, {"Retry-After": "999999"}), "answered 429", False, 3600.0),
        (404, "answered 404", True, None),
        ((302, {"Location": "http://127.0.0.1:1/"}), "answered 302", True, None),
        ("reset", "did not answer|cannot be reached", False, None),
    ],
)
def test_an_answer_that_is_none_is_told(answer: Any, says: str, permanent: bool, after: float | None) -> None:
    """Whether another attempt makes sense, and when; a redirect is not followed."""
    with Hook() as hook:
        hook.answer = answer
        with pytest.raises(DeliveryFailed, match=says) as caught:
            Webhook(hook.url)(alert())
    assert (caught.value.permanent, caught.value.retry_after) == (permanent, after)
    assert "s3cret" not in str(caught.value)


def test_a_receiver_that_hangs_is_given_up() -> None:
    """After the web hook's own time-out."""
    with Hook() as hook:
        hook.answer = "hang"
        with pytest.raises(DeliveryFailed, match="timed out"):
            Webhook(hook.url, timeout=0.2)(alert())


def test_nobody_there_is_told() -> None:
    """A refused connection."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: refused
        with pytest.raises(DeliveryFailed, match=r"127.0.0.1:\d+ cannot be reached: Connection refused"):
            Webhook(f"http://127.0.0.1:{taken.getsockname()[1]}/hook/s3cret")(alert())


def test_a_receiver_that_trickles_is_given_up_as_a_whole() -> None:
    """One byte now and then never times out by itself: the route's limit is for all of it."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def slow(alert: Alert) -> None:
            with socket.create_connection(server.getsockname()) as connection:
                connection.recv(1)

        started = time.monotonic()
        error, _ = try_once(Route(slow, timeout=0.2), alert())
        assert isinstance(error, TimeoutError)
        assert time.monotonic() - started < 5
        server.accept()[0].close()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"url": "hooks.example.org/x"}, "must begin with https"),
        ({"url": "https://"}, "needs a host"),
        ({"url": "https://exa mple.org"}, "malformed"),
        ({"url": "https://example.org:port/s3cret"}, "malformed"),
        ({"url": "https://[::1/s3cret"}, "malformed"),
        ({"url": "https://user:s3cret@example.org"}, "must not hold a user or password"),
        ({"url": "ftp://example.org/s3cret"}, "got 'ftp'; for other schemes use Apprise"),
        ({"url": 3}, "must be a string, got int"),
        ({"secret": "s3cret"}, "whsec_"),
        ({"secret": "whsec_s3cret!"}, "24 to 64"),
        ({"secret": "whsec_" + base64.b64encode(b"short").decode()}, "24 to 64"),
        ({"headers": {"a b": "c"}}, "'a b' is no header's name"),
        ({"headers": {"Host": "c"}}, "set by aftertask itself"),
        ({"headers": {"X": "s3cret\r\nY: d"}}, "one line of ASCII"),
        ({"headers": ["X"]}, "must map names to values"),
        ({"timeout": 0}, "more than 0 seconds, got 0"),
    ],
)
def test_a_bad_web_hook_is_refused(values: dict[str, Any], says: str) -> None:
    """With what is wrong and the way out, and without the secret."""
    with pytest.raises((TypeError, ValueError)) as caught:
        Webhook(**{"url": "https://example.org", **values})
    assert says in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_retry_after_is_read_in_both_forms() -> None:
    """Seconds, or a date (RFC 9110, 10.2.3); nonsense is nothing."""
    assert retry_after("3") == 3
    soon = retry_after(formatdate(time.time() + 60, usegmt=True))
    assert soon is not None and 50 < soon <= 60
    assert retry_after(formatdate(time.time() - 60, usegmt=True)) == 0
    for nonsense in (None, "", "soon", "-3", "1.5", "²"):
        assert retry_after(nonsense) is None


def test_its_repr_shows_no_secret() -> None:
    """Settings are printed."""
    assert (
        repr(Route(Webhook("https://example.org/s3cret", secret=SECRET)))
        == "Route(Webhook('example.org'), name='webhook')"
    )


def test_urls_are_told_apart_by_what_comes_after_a_comma() -> None:
    """A comma may be part of a URL."""
    assert urls_in(" https://a/b?x=1,2 , mailto://u:p@h?to=a,b,slack://T/B,") == [
        "https://a/b?x=1,2",
        "mailto://u:p@h?to=a,b",
        "slack://T/B,",
    ]
    with pytest.raises(ValueError, match="without a scheme"):
        channel_of("s3cret")


def test_what_is_sent_is_json_for_machines_and_text_for_people() -> None:
    """`text` stands beside the fields, so that chats which look for it show something."""
    said = alert(count=3, error_type="shop.MailServerDown", stack="Traceback …")
    with Hook() as hook:
        channel_of(hook.url)(said)
        (got,) = hook.alerts()
    assert got["title"] == "[warning] mail failed: shop.MailServerDown (3 times)"
    assert got["text"].endswith("Traceback …")
    assert got["outcome"] == "failed"
    assert got == json.loads(said.as_json()) == said.as_dict()
