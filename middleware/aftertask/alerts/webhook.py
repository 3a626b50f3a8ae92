"""
Alerts as JSON over HTTP, signed.

The client is the standard library's: one POST now and then needs no pool, no HTTP/2 and no dependency, so that
`AFTERTASK_ALERTS=https://…` is enough to receive an alert.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import email.utils
import hashlib
import hmac
import http.client
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any

from ._alert import Alert
from ._channel import DeliveryFailed

#: Answers after which another attempt may succeed (RFC 9110, 15.5.9 and 15.6; RFC 6585, 4; RFC 8470, 5.2).
TRY_AGAIN = frozenset({408, 425, 429, *range(500, 600)})

#: Nobody is made to wait longer than this, in seconds, whatever `Retry-After` says.
LONGEST_RETRY_AFTER = 3600.0

_OURS = frozenset({"content-type", "content-length", "host", "webhook-id", "webhook-timestamp", "webhook-signature"})


class Webhook:
    """
    Posts each alert as JSON (`Alert.as_dict()`) to a URL; an answer from 200 to 299 is a delivery.

    With a secret it is signed as Standard Webhooks 1.0.0 says: `webhook-signature` is `v1,` and the base64 of
    HMAC-SHA256 over `{webhook-id}.{webhook-timestamp}.{body}`, so that libraries of many languages can verify it.
    Redirects are not followed: a signed message must not go elsewhere.

    Args:
        url: `https://…` or `http://…`. It is a secret if its path is one: only its host is ever shown.
        secret: `whsec_` and the base64 of 24 to 64 bytes; None: not signed.
        headers: Sent along, such as `{"Authorization": "Bearer …"}`.
        timeout: Seconds without a sign of life after which an attempt has failed; `Route.timeout` limits the whole.

    Raises:
        TypeError, ValueError: A value is not one of those allowed; the message shows no secret.

    Source: https://www.standardwebhooks.com, https://github.com/standard-webhooks/standard-webhooks
    """

    name = "webhook"

    def __init__(
        self, url: str, *, secret: str | None = None, headers: Mapping[str, str] | None = None, timeout: float = 5.0
    ) -> None:
        self._host = _host(url)
        self._url = url.strip()
        self._key = None if secret is None else _key(secret)
        self._headers = _headers(headers or {})
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout < float("inf"):
            raise ValueError(f"Webhook.timeout must be more than 0 seconds, got {timeout!r}")
        self._timeout = timeout
        self._opener = urllib.request.build_opener(_NoRedirect)

    def __call__(self, alert: Alert) -> None:
        """
        Deliver one alert.

        Raises:
            DeliveryFailed: The receiver could not be reached, or did not answer from 200 to 299.
        """
        body = alert.as_json()
        headers = {"User-Agent": "aftertask", **self._headers, "Content-Type": "application/json"}
        headers |= self._signature(alert.id, body)
        request = urllib.request.Request(self._url, body, headers, method="POST")
        try:
            with self._opener.open(request, timeout=self._timeout) as answer:
                answer.read(1)
        except urllib.error.HTTPError as error:
            with contextlib.closing(error):
                raise DeliveryFailed(
                    f"{self._host} answered {error.code}",
                    retry_after=retry_after(error.headers.get("Retry-After")),
                    permanent=error.code not in TRY_AGAIN,
                ) from None
        except urllib.error.URLError as error:
            raise DeliveryFailed(f"{self._host} cannot be reached: {_said(error.reason)}") from None
        except (OSError, http.client.HTTPException) as error:
            raise DeliveryFailed(f"{self._host} did not answer: {_said(error)}") from None

    def _signature(self, id: str, body: bytes) -> dict[str, str]:
        timestamp = str(int(time.time()))
        headers = {"webhook-id": id, "webhook-timestamp": timestamp}
        if self._key is not None:
            signed = hmac.digest(self._key, f"{id}.{timestamp}.".encode() + body, hashlib.sha256)
            headers["webhook-signature"] = f"v1,{base64.b64encode(signed).decode()}"
        return headers

    def __repr__(self) -> str:
        return f"Webhook({self._host!r})"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:
        return None


def retry_after(text: str | None) -> float | None:
    """
    `Retry-After` in seconds from now, an hour at most; None where it is missing or makes no sense (RFC 9110, 10.2.3).
    """
    if text is None:
        return None
    if text.strip().isdecimal():
        return min(float(text), LONGEST_RETRY_AFTER)
    try:
        at = email.utils.parsedate_to_datetime(text).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None
    return min(max(0.0, at - time.time()), LONGEST_RETRY_AFTER)


def _said(error: object) -> str:
    """An error without the address that some of them repeat."""
    if isinstance(error, TimeoutError):
        return "timed out"
    return getattr(error, "strerror", None) or type(error).__name__


def _host(url: object) -> str:
    if not isinstance(url, str):
        raise TypeError(f"Webhook.url must be a string, got {type(url).__name__}")
    text = url.strip()
    try:
        parts = urllib.parse.urlsplit(text)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"Webhook.url is malformed: {error}") from None
    if parts.scheme.lower() not in ("http", "https"):
        scheme = parts.scheme or "nothing"
        raise ValueError(
            f"Webhook.url must begin with https:// or http://, got {scheme!r}; for other schemes use Apprise(…)"
        )
    if not host or re.search(r"[\s\x00-\x1f\x7f]", text) or not text.isascii():
        raise ValueError("Webhook.url is malformed: it needs a host, and no blanks or letters outside of ASCII")
    if parts.username is not None or parts.password is not None:
        raise ValueError("Webhook.url must not hold a user or password; use headers={'Authorization': …}")
    return parts.netloc


def _key(secret: object) -> bytes:
    help = (
        "Webhook.secret must be 'whsec_' and the base64 of 24 to 64 random bytes; make one with: "
        "python -c \"import base64, secrets; print('whsec_' + base64.b64encode(secrets.token_bytes(32)).decode())\""
    )
    if not isinstance(secret, str) or not secret.startswith("whsec_"):
        raise ValueError(help)
    try:
        key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except binascii.Error:
        raise ValueError(help) from None
    if not 24 <= len(key) <= 64:
        raise ValueError(help)
    return key


def _headers(headers: object) -> dict[str, str]:
    if not isinstance(headers, Mapping):
        raise TypeError(f"Webhook.headers must map names to values, got {type(headers).__name__}")
    for name, value in headers.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name):
            raise ValueError(f"Webhook.headers: {name!r} is no header's name")
        if name.lower() in _OURS:
            raise ValueError(f"Webhook.headers: {name!r} is set by aftertask itself")
        if not isinstance(value, str) or not re.fullmatch(r"[\x20-\x7e\t]*", value):
            raise ValueError(f"Webhook.headers: the value of {name!r} must be one line of ASCII text")
    return dict(headers)
