"""
Write the dashboards and rules that are kept in the repository and shipped in the wheel: `make dashboards`.

    python dashboards/generate [DIR]     # into another folder than dashboards/
"""

from __future__ import annotations

import sys
from pathlib import Path

import capacity
import engine
import one_task
import overview
from aftertask.cli._rules import Options, groups, to_yaml
from aftertask.cli.rules import FILES
from boards import build

BOARDS = (overview.BOARD, one_task.BOARD, capacity.BOARD, engine.BOARD)


def main(folder: Path) -> None:
    """Write every file."""
    (folder / "rules").mkdir(parents=True, exist_ok=True)
    for board in BOARDS:
        (folder / f"{board.uid}.json").write_text(build(board))
    for name, default in FILES.items():
        (folder / "rules" / name).write_text(to_yaml(groups(Options(), default=default)))


main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1])
