"""What happens to a process once: the hooks around a fork."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_FORK = """
import os, sys
from aftertask._core.process import hold_for_fork

class Part:
    def __init__(self, name):
        self.name = name
        hold_for_fork(self)
    def hold(self):
        print("hold", self.name)
    def let_go(self):
        print("let go", self.name)

parts = [Part(str(number)) for number in range(9)]
del parts[3]
if (child := os.fork()) == 0:
    os._exit(0)
os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_parts_are_held_before_a_fork_from_the_last_registered_to_the_first() -> None:
    """A thread may take the lock of an earlier one while it holds that of a later one; none is held twice, or late."""
    done = subprocess.run([sys.executable, "-c", _FORK], timeout=20, capture_output=True, text=True, check=True)
    names = ["8", "7", "6", "5", "4", "2", "1", "0"]
    held, let_go = [f"hold {name}" for name in names], [f"let go {name}" for name in reversed(names)]
    assert done.stdout.splitlines() == held + let_go
