"""`Apprise`: alerts to every service that Apprise supports: chats, pagers, telephones, mail."""

from __future__ import annotations

import re
import warnings
from typing import Any

from .alert import Alert, DeliveryFailed

_DOCS = "https://github.com/caronc/apprise/wiki"
_NOTIFY_TYPES = {"info": "INFO", "warning": "WARNING", "critical": "FAILURE", "resolved": "SUCCESS"}


class Apprise:
    """
    Sends each alert through Apprise: Slack, PagerDuty, Telegram, Teams, mail by SMTP, and a hundred more.

    Needs `pip install 'aftertask[alerts]'`.

    Args:
        url: Apprise's URL of one service: `slack://…`, `pagerduty://…`,
            `mailto://user:password@example.org?to=oncall@example.org`. It holds secrets: errors, logs and `repr` show
            only its scheme.

    Raises:
        ImportError: Apprise is not installed.
        TypeError, ValueError: Apprise does not support the scheme, or cannot read the URL; the message shows no secret.

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
                f"the alert channel {scheme}:// needs Apprise, which is not installed: pip install 'aftertask[alerts]'"
            ) from None
        self._services = _services(apprise, scheme, url.strip())
        # Apprise recognises some services by their web address too; their own scheme makes the better name.
        self.name = str(self._services[0].url(privacy=True)).partition("://")[0] or scheme
        self._types = {severity: apprise.NotifyType[name] for severity, name in _NOTIFY_TYPES.items()}

    def __call__(self, alert: Alert) -> None:
        """
        Deliver one alert.

        Raises:
            DeliveryFailed: Apprise could not deliver it.
        """
        kind = self._types["resolved" if alert.kind == "resolved" else alert.severity]
        if not self._services.notify(body=alert.text, title=alert.title, notify_type=kind, body_format="text"):
            # Apprise's own words may repeat what the service answered, addresses and tokens included.
            raise DeliveryFailed(f"Apprise could not deliver to {self.name}://…; its logger `apprise` has the reason")

    def __repr__(self) -> str:
        return f"Apprise('{self.name}://…')"


def _services(apprise: Any, scheme: str, url: str) -> Any:
    """An `apprise.Apprise` with the one service of this URL."""
    asset = apprise.AppriseAsset(app_id="aftertask", app_desc="aftertask", app_url="", secure_logging=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # from the imports of its plugins
            service = apprise.Apprise.instantiate(url, asset=asset, suppress_exceptions=False)
    except Exception:  # its text repeats parts of the URL
        service = None
    if service is None:
        raise ValueError(
            f"Apprise cannot use the URL {scheme}://…: it does not support the scheme, or a part of the URL is missing "
            f"or malformed; {_DOCS} lists all schemes and their formats"
        )
    # Apprise would pause before each further recipient, for most services 5.5 s: longer than an attempt may take.
    # `Route.rate` is the limit here.
    service.request_rate_per_sec = 0
    services = apprise.Apprise(asset=asset)
    services.add(service)
    return services
