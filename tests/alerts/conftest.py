"""Fixtures for the tests of alerts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from aftertask.alerts import Alerts
from aftertask.testing import VirtualClock
from kit_alerts import AlertsFor


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Receivers run on this machine."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def alerts_for() -> Iterator[AlertsFor]:
    """`Alerts` that are closed after the test, as the app's shutdown would close them."""
    made: list[Alerts] = []

    def make(*channels: Any, **options: Any) -> Alerts:
        made.append(Alerts(channels, **options))
        return made[-1]

    yield make
    for alerts in made:
        alerts.close()


@pytest.fixture
def clock() -> Iterator[VirtualClock]:
    """A clock that the test advances."""
    with VirtualClock() as clock:
        yield clock
