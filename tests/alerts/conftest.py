"""What a test of alerts leaves behind is ended: its threads would log into the tests that come after it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from aftertask.alerts import Alerts


@pytest.fixture(autouse=True)
def closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every signal that the test has made is closed after it; a second time changes nothing."""
    made: list[Alerts] = []
    real = Alerts.__init__

    def remember(self: Alerts, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(Alerts, "__init__", remember)
    yield
    for signal in made:
        signal.close()
