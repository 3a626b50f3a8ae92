"""Alerts to wherever Apprise delivers: chats, pagers, telephones, mail."""

from __future__ import annotations

import re
import warnings
from typing import Any

from ._alert import Alert
from ._channel import DeliveryFailed


class Apprise:
    """
    Sends each alert through Apprise: Slack, PagerDuty, Telegram, Teams, mail by SMTP, and a hundred more.

    Needs `pip install aftertask[alerts]`. A URL as Apprise's documentation has it: `slack://…`, `pagerduty://…`,
    `mailto://user:password@example.org?to=oncall@example.org`. It holds secrets: only its scheme is ever shown.

    Args:
        url: Apprise's URL of one service.

    Raises:
        ImportError: Apprise is not installed.
        TypeError, ValueError: Apprise does not know the scheme, or finds the URL wanting; the message shows no secret.

    Source: https://github.com/caronc/apprise/wiki
    """

    def __init__(self, url: str) -> None:
        if not isinstance(url, str):
            raise TypeError(f"Apprise.url must be a string, got {type(url).__name__}")
        scheme = url.strip().partition("://")[0].lower() if "://" in url else ""
        if not re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme):
            raise ValueError("Apprise.url must be a URL such as slack://…, got one without a scheme")
        try:
            import apprise
        except ImportError:
            raise ImportError(
                f"the alert channel {scheme}:// is delivered by Apprise, which is not installed: "
                f"pip install 'aftertask[alerts]'"
            ) from None
        self._service = _service(apprise, scheme, url.strip())
        self.name = _name(self._service, scheme)
        self._types = {severity: apprise.NotifyType[name] for severity, name in _TYPES.items()}

    def __call__(self, alert: Alert) -> None:
        """
        Deliver one alert.

        Raises:
            DeliveryFailed: Apprise could not.
        """
        kind = self._types["resolved" if alert.kind == "resolved" else alert.severity]
        result = self._service.notify(body=alert.text, title=alert.title, notify_type=kind, body_format="text")
        if not result:
            raise DeliveryFailed(f"Apprise could not deliver to {self.name}://{_why(result)}")

    def __repr__(self) -> str:
        return f"Apprise('{self.name}://…')"


_TYPES = {"info": "INFO", "warning": "WARNING", "critical": "FAILURE", "resolved": "SUCCESS"}


def _service(apprise: Any, scheme: str, url: str) -> Any:
    asset = apprise.AppriseAsset(app_id="aftertask", app_desc="aftertask", app_url="", secure_logging=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # some of its plugins import what Python is about to drop
        try:
            service = apprise.Apprise.instantiate(url, asset=asset, suppress_exceptions=False)
        except TypeError:  # AppriseImproperlyConfigured is one; its text repeats parts of the URL
            raise ValueError(
                f"Apprise finds the URL {scheme}://… wanting: a part is missing or malformed; "
                f"see https://github.com/caronc/apprise/wiki for what {scheme}:// takes"
            ) from None
    if service is None:
        raise ValueError(
            f"Apprise cannot read the URL {scheme}://…; see https://github.com/caronc/apprise/wiki for what it takes"
            if scheme in _schemes(apprise)
            else f"the scheme {scheme}:// is unknown to Apprise; https://github.com/caronc/apprise/wiki lists all"
        )
    # Its own pause between two sends, 5.5 s for most services, would use up our time limit with a second recipient.
    # `Route.rate` is the limit here.
    service.request_rate_per_sec = 0
    together = apprise.Apprise(asset=asset)
    together.add(service)
    return together


def _name(services: Any, scheme: str) -> str:
    """The service's own scheme: Apprise knows some by their web address too, such as Slack's."""
    return str(services[0].url(privacy=True)).partition("://")[0] or scheme


def _schemes(apprise: Any) -> set[str]:
    plugins = apprise.Apprise().details()["schemas"]
    return {name for plugin in plugins for kind in ("protocols", "secure_protocols") for name in plugin[kind] or ()}


def _why(result: Any) -> str:
    """What Apprise says about it, where it is a version that does; its log says it in any case."""
    logs = getattr(result, "logs", None)
    said = [str(getattr(entry, "message", entry)) for entry in logs()] if callable(logs) else []
    return f": {said[-1][:300]}" if said else "; its logger `apprise` says why"
