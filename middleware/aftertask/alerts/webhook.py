"""
`Webhook`: alerts as signed JSON over HTTP.

The HTTP client is the standard library's: an occasional POST needs no connection pool and no dependency, so
`AFTERTASK_ALERTS=https://…` works without an extra.
"""

from __future__ import annotations

import base64
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

from ..policies import check_seconds
from .alert import Alert, DeliveryFailed

#: Statuses after which a retry may succeed (RFC 9110, 15.5.9 and 15.6; RFC 6585, 4; RFC 8470, 5.2).
_RETRIED = frozenset({408, 425, 429, *range(500, 600)})

#: A longer `Retry-After` is cut to this many seconds.
LONGEST_RETRY_AFTER = 3600.0

_RESERVED = frozenset(
    {"content-type", "content-length", "host", "webhook-id", "webhook-timestamp", "webhook-signature"}
)

#: The hosts of chats, whose webhooks want a JSON of their own, and Apprise's URL for each.
#: Source: https://github.com/caronc/apprise/wiki
_CHATS = {
    "hooks.slack.com": "slack://TokenA/TokenB/TokenC, the last three parts of its path",
    "discord.com": "discord://WebhookID/WebhookToken, the last two parts of its path",
    "discordapp.com": "discord://WebhookID/WebhookToken, the last two parts of its path",
    "webhook.office.com": "msteams://…",
    "logic.azure.com": "workflows://…",
    "chat.googleapis.com": "gchat://Workspace/Key/Token",
    "api.telegram.org": "tgram://BotToken/ChatID",
}

_BAD_SECRET = (
    "Webhook.secret must be 'whsec_' and the base64 of 24 to 64 random bytes; make one with: "
    "python -c \"import base64, secrets; print('whsec_' + base64.b64encode(secrets.token_bytes(32)).decode())\""
)


class Webhook:
    """
    Posts each alert as JSON (`Alert.as_dict()`) to a URL; a status from 200 to 299 means delivered.

    With a secret the request is signed according to Standard Webhooks 1.0.0: `webhook-signature` is `v1,` and the
    base64 of HMAC-SHA256 over `{webhook-id}.{webhook-timestamp}.{body}`. Redirects are not followed, so a signed
    message goes to no other receiver.

    Args:
        url: `https://…` or `http://…`. Its path may be a secret: errors, logs and `repr` show only the host.
        secret: `whsec_` and the base64 of 24 to 64 bytes; None means unsigned.
        headers: Additional headers, such as `{"Authorization": "Bearer …"}`.
        timeout: Seconds without a response after which an attempt fails, more than 0; `Route.timeout` limits the whole
            attempt.

    Raises:
        TypeError, ValueError: A value is not allowed; the message shows no secret.

    Source: https://www.standardwebhooks.com, https://github.com/standard-webhooks/standard-webhooks
    """

    name = "webhook"

    def __init__(
        self, url: str, *, secret: str | None = None, headers: Mapping[str, str] | None = None, timeout: float = 5.0
    ) -> None:
        self._host = _host(url)
        self._url = url.strip()
        self._key = None if secret is None else _key(secret)
        self._headers = _headers({} if headers is None else headers)
        check_seconds("Webhook.timeout", timeout)
        self._timeout = timeout
        self._opener = urllib.request.build_opener(_NoRedirect)

    def __call__(self, alert: Alert) -> None:
        """
        Deliver one alert.

        Raises:
            DeliveryFailed: The receiver could not be reached, or did not respond with a status from 200 to 299.
        """
        body = alert.as_json()
        headers = {"User-Agent": "aftertask", **self._headers, "Content-Type": "application/json"}
        headers |= self._signature(alert.id, body)
        request = urllib.request.Request(self._url, body, headers, method="POST")
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                response.read(1)
        except urllib.error.HTTPError as error:
            with contextlib.closing(error):
                raise DeliveryFailed(
                    f"{self._host} responded with {error.code}",
                    retry_after=retry_after(error.headers.get("Retry-After")),
                    permanent=error.code not in _RETRIED,
                ) from None
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            raise DeliveryFailed(f"no response from {self._host}: {_reason(error)}") from None

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
    def redirect_request(self, *args: object) -> None:
        return None


def retry_after(text: str | None) -> float | None:
    """`Retry-After` in seconds from now, at most an hour; None if missing or malformed (RFC 9110, 10.2.3)."""
    if text is None:
        return None
    if text.strip().isdecimal():
        return min(float(text), LONGEST_RETRY_AFTER)
    try:
        at = email.utils.parsedate_to_datetime(text).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None
    return min(max(0.0, at - time.time()), LONGEST_RETRY_AFTER)


def _reason(error: object) -> str:
    """An error without its own text, which may repeat the URL."""
    error = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(error, TimeoutError):
        return "timed out"
    text = error.strerror if isinstance(error, OSError) else None
    return text or type(error).__name__


def _host(url: object) -> str:
    """The host of a valid URL. Errors show no part of the URL but its scheme: any other part may be a secret."""
    if not isinstance(url, str):
        raise TypeError(f"Webhook.url must be a string, got {type(url).__name__}")
    text = url.strip()
    scheme, separator, _ = text.partition("://")
    if scheme.lower() not in ("http", "https") or not separator:
        raise ValueError(
            f"Webhook.url must begin with https:// or http://{f', got {scheme}://' if separator else ''}; "
            f"for other schemes use Apprise(…)"
        )
    try:
        parts = urllib.parse.urlsplit(text)
        host, _ = parts.hostname, parts.port
    except ValueError:  # its text repeats parts of the URL
        raise ValueError("Webhook.url is malformed: its host or port cannot be read") from None
    if not host or re.search(r"[\s\x00-\x1f\x7f]", text) or not text.isascii():
        raise ValueError("Webhook.url is malformed: it needs a host, and allows no spaces or non-ASCII characters")
    if parts.username is not None or parts.password is not None:
        raise ValueError("Webhook.url must not contain a user or password; use headers={'Authorization': …}")
    chat = next((url for name, url in _CHATS.items() if host == name or host.endswith(f".{name}")), None)
    if chat is not None:
        raise ValueError(
            f"{host} is a chat, which does not accept the JSON of a Webhook: use {chat} (as Apprise(…) or in "
            "AFTERTASK_ALERTS; needs pip install 'aftertask[alerts]')"
        )
    return parts.netloc


def _key(secret: object) -> bytes:
    if isinstance(secret, str) and secret.startswith("whsec_"):
        with contextlib.suppress(ValueError):
            key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
            if 24 <= len(key) <= 64:
                return key
    raise ValueError(_BAD_SECRET)


def _headers(headers: object) -> dict[str, str]:
    if not isinstance(headers, Mapping):
        raise TypeError(f"Webhook.headers must map names to values, got {type(headers).__name__}")
    for number, (name, value) in enumerate(headers.items(), 1):
        # A malformed name is not shown: it may be a whole line with its value.
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name):
            raise ValueError(f"Webhook.headers: the name of header {number} is malformed")
        if name.lower() in _RESERVED:
            raise ValueError(f"Webhook.headers: {name!r} is set by aftertask itself")
        if not isinstance(value, str) or not re.fullmatch(r"[\x20-\x7e\t]*", value):
            raise ValueError(f"Webhook.headers: the value of {name!r} must be one line of ASCII text")
    return dict(headers)
