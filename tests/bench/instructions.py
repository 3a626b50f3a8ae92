"""
What observing a background task costs in instructions, which depend on the day less than the clock does.

    python tests/bench/instructions.py                        # needs valgrind; minutes
    python tests/bench/instructions.py --variants bare,ours

The variants and the apps are those of `overhead.py`, each in a child of its own under callgrind: 400 requests less 100
requests is 300 without what starting costs. What the kernel does is not in it, nor what a cold cache costs.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import overhead

SHORT, LONG = 100, 400
USUAL = ("bare", "floor", "passing", "native", "ours", "ours_metrics", "ours_unsampled", "ours_none")


def count(tasks: int, names: Sequence[str]) -> dict[str, float]:
    """Instructions for a request with so many tasks, by variant."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={folder}/out.%p", sys.executable, __file__]
        done = subprocess.run(
            [*command, "--variants", ",".join(names), "--drive", str(tasks)],
            env={**os.environ, "PYTHONHASHSEED": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=True,
        )
        pids = json.loads(done.stdout)
        totals = {which: _total(Path(folder, f"out.{pid}")) for which, pid in pids.items()}
    return {name: (totals[f"{name} {LONG}"] - totals[f"{name} {SHORT}"]) / (LONG - SHORT) for name in names}


def _total(file: Path) -> int:
    found = re.search(r"^(?:totals|summary): (\d+)", file.read_text(), re.MULTILINE)
    assert found is not None, file
    return int(found[1])


def drive(tasks: int, names: Sequence[str]) -> None:
    """Under callgrind: one child after another, and which process each was."""
    pids = {}
    for name in names:
        for requests in (SHORT, LONG):
            pid = os.fork()
            if pid == 0:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                driver = overhead.Driver(overhead.VARIANTS[name]())
                driver.drive(f"/{tasks}", 100)
                gc.collect()
                gc.freeze()
                driver.drive(f"/{tasks}", requests)
                os._exit(0)
            os.waitpid(pid, 0)
            pids[f"{name} {requests}"] = pid
    print(json.dumps(pids), flush=True)
    os._exit(0)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default=",".join(USUAL), help=f"some of {', '.join(overhead.VARIANTS)}")
    parser.add_argument("--drive", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = list(dict.fromkeys(["bare", *options.variants.split(",")]))
    if options.drive is not None:
        drive(options.drive, names)
    if shutil.which("valgrind") is None:
        parser.error("valgrind is not installed")
    none, one, ten = (count(tasks, names) for tasks in overhead.REQUESTS)
    print(f"{'':16}{'task, added':>12}{'one task, added':>17}{'no task, x bare':>17}")
    for name in names:
        added = (ten[name] - one[name] - ten["bare"] + one["bare"]) / 9
        print(f"{name:16}{added:12.0f}{one[name] - one['bare']:17.0f}{none[name] / none['bare']:17.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
