"""
The pytest plugin of aftertask, active only in tests that request one of its fixtures.

pytest imports it in every project of the environment, before the project's own conftest. So it is outside the package,
and imports nothing but pytest until a fixture is used.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def aftertask_events() -> object:
    """A `Recorder` for `AftertaskMiddleware(signals=[…])`."""
    from aftertask.testing import Recorder

    return Recorder()


@pytest.fixture
def aftertask_clock() -> Iterator[object]:
    """A `VirtualClock` that aftertask reads during the test."""
    from aftertask.testing import VirtualClock

    with VirtualClock() as clock:
        yield clock
