"""
Alerts: a failure reaches a person, once, in time, with all that is needed to act.

`Settings(alerts=[Webhook("https://…"), Apprise("slack://…"), a_function])`, or `AFTERTASK_ALERTS=URL,URL`.
"""

from __future__ import annotations

from .alert import Alert, Channel, DeliveryFailed, Kind
from .apprise import Apprise
from .calls import Tested, send_test
from .routing import Route
from .signal import Alerts
from .webhook import Webhook

__all__ = [
    "Alert",
    "Alerts",
    "Apprise",
    "Channel",
    "DeliveryFailed",
    "Kind",
    "Route",
    "Tested",
    "Webhook",
    "send_test",
]
