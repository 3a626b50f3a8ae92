"""The environment of each case."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kit import Env


@pytest.fixture
def env() -> Iterator[Env]:
    """An app under the middleware; after each case the accounts must be right."""
    env = Env()
    yield env
    env.check_accounts()
