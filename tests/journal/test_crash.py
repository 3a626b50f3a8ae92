"""The crash test: a real uvicorn killed 50 times at random moments, under load; `make crash` does it 2 000 times."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import crash

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


def test_nothing_accepted_is_lost_without_a_word(tmp_path: Path) -> None:
    """kill -9, SIGTERM, SIGSTOP; with 1 worker and 4; effects in a file, compared with the journal."""
    seed = random.randrange(10**6)
    done = crash.run(tmp_path, 50, ["KILL", "KILL", "KILL", "TERM", "STOP"], seed)
    found = done.check()
    assert sum(done.killed.values()) >= 50
    assert found["durable succeeded"] > 0 and found["idempotent succeeded"] > 0, (seed, found)
