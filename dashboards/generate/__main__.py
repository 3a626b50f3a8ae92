"""
Write the dashboards and rules that are kept in the repository and shipped in the wheel: `make dashboards`.

    python dashboards/generate [DIR]     # into another folder than dashboards/
"""

from __future__ import annotations

import sys
from pathlib import Path

from aftertask.cli._rules import Options, groups, to_yaml
from aftertask.cli.rules import FILES


def main(folder: Path) -> None:
    """Write every file."""
    for name, default in FILES.items():
        path = folder / "rules" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(to_yaml(groups(Options(), default=default)))


main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1])
