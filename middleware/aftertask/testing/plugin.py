"""The pytest plugin: installed with aftertask, active where a test asks for one of its fixtures."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from . import Recorder, VirtualClock


@pytest.fixture
def aftertask_events() -> Recorder:
    """A `Recorder` to hand to `AftertaskMiddleware(signals=[…])`."""
    return Recorder()


@pytest.fixture
def aftertask_clock() -> Iterator[VirtualClock]:
    """A `VirtualClock` that aftertask reads during the test."""
    with VirtualClock() as clock:
        yield clock
