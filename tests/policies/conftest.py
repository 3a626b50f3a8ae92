"""A clock that stands still, and an app whose policies it drives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from aftertask.testing import VirtualClock
from kit import Env


@pytest.fixture
def env() -> Iterator[Env]:
    """An app under the middleware; after each case the accounts must be right."""
    env = Env()
    yield env
    env.check_accounts()


@pytest.fixture
def clock() -> Iterator[VirtualClock]:
    """Time passes when the test says so."""
    with VirtualClock() as clock:
        yield clock
