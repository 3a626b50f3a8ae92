"""`Channel`: anything that takes an alert and delivers it."""

from __future__ import annotations

import math
from collections.abc import Awaitable
from typing import Protocol, runtime_checkable

from ..errors import AftertaskError
from .alert import Alert


@runtime_checkable
class Channel(Protocol):
    """
    Takes an alert and delivers it: `Webhook`, `Apprise`, or any sync or async function. An exception means failure.

    Each call runs in a thread of its own, never on the app's event loop; an async channel gets an asyncio event loop
    for the duration of the call. A channel may raise `DeliveryFailed` to control when delivery is tried again.
    """

    def __call__(self, alert: Alert, /) -> Awaitable[None] | None: ...


class DeliveryFailed(AftertaskError):
    """
    An alert could not be delivered.

    Args:
        message: Why. It is logged, so it must not hold a secret.
        retry_after: Seconds after which the receiver wants the next attempt, at least 0; None if it did not ask.
        permanent: Whether an immediate retry is pointless, such as after a wrong address.

    Raises:
        ValueError: `retry_after` is negative or infinite.
    """

    __module__ = "aftertask.alerts"  # `error_type` is a public name

    def __init__(self, message: str, *, retry_after: float | None = None, permanent: bool = False) -> None:
        super().__init__(message)
        if retry_after is not None and not 0 <= retry_after < math.inf:
            raise ValueError(f"DeliveryFailed.retry_after must be at least 0 seconds, or None, got {retry_after!r}")
        self.retry_after = retry_after
        self.permanent = permanent
