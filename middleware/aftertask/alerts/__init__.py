"""
Alerts: a failure reaches a person, once, in time, with what they need.

`Settings(alerts=[Webhook("https://…"), Apprise("slack://…"), a_function])`, or `AFTERTASK_ALERTS=URL,URL`.
"""

from __future__ import annotations

from ._alert import Alert, Kind, Suppressed
from ._channel import Channel, DeliveryFailed, Route
from ._signal import Alerts
from ._test import Tested, send_test
from .apprise import Apprise
from .webhook import Webhook

__all__ = [
    "Alert",
    "Alerts",
    "Apprise",
    "Channel",
    "DeliveryFailed",
    "Kind",
    "Route",
    "Suppressed",
    "Tested",
    "Webhook",
    "send_test",
]
