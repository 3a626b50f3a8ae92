"""The benchmark's commands run, print every variant and check every gate; their figures belong to `make bench`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from live.servers import program

BENCH = Path(__file__).parent / "bench"
VARIANTS = ("bare", "floor", "ours", "ours_none")


@pytest.mark.long
@pytest.mark.timeout(120)
def test_one_short_round_prints_the_table_and_the_gates(tmp_path: Path) -> None:
    """Exit code 1 means that a gate failed, which one short round may do; anything else is a broken benchmark."""
    figures = tmp_path / "figures.json"
    options = ["--rounds", "1", "--batches", "3", "--variants", ",".join(VARIANTS), "--json", str(figures)]

    done = subprocess.run(
        [sys.executable, str(BENCH / "overhead.py"), *options], capture_output=True, text=True, check=False
    )

    assert done.returncode == (1 if "FAIL" in done.stdout else 0), done.stderr
    table, gates = done.stdout.split("Gates\n")
    lines = [line.split() for line in table.splitlines() if line]
    assert tuple(words[0] for words in lines if words[0] in VARIANTS) == VARIANTS
    # Nothing configured, metrics alone, not sampled, policies.
    assert [line.split()[0] for line in gates.splitlines()].count("--") == 4
    (only,) = json.loads(figures.read_text())["rounds"]
    assert set(only) == set(VARIANTS)
    assert only["ours"]["10"] > only["ours"]["1"] > only["ours"]["0"] > 0
    assert only["ours"]["served"] > only["ours"]["0"]


@pytest.mark.long
@pytest.mark.timeout(120)
def test_a_short_history_is_checked() -> None:
    """The history command prints cost and memory, and its exit code says whether both are within their limits."""
    command = [sys.executable, str(BENCH / "history.py"), "--tasks", "2000", "--pairs", "1"]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode in (0, 1), done.stderr
    cost, memory = done.stdout.splitlines()
    assert "us after 2000" in cost
    assert "traced memory grew by" in memory
    assert done.returncode == (0 if cost.startswith("pass") and memory.startswith("pass") else 1), done.stderr


@pytest.mark.long
@pytest.mark.timeout(120)
def test_a_short_run_of_both_values_of_run_after_is_checked() -> None:
    """The command prints both percentiles and their quotient; its exit code says whether that is within its limit."""
    command = [sys.executable, str(BENCH / "run_after.py"), "--turns", "2", "--connections", "20", "--requests", "5"]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    response, request, gate = done.stdout.splitlines()
    assert response.startswith("response  p99") and request.startswith("request   p99"), done.stderr
    assert "p99, request / response" in gate
    assert done.returncode == (0 if gate.startswith("pass") else 1), done.stderr


def test_an_unknown_variant_is_refused_by_name() -> None:
    """A typing error must not pass for a gate that was kept."""
    done = subprocess.run(
        [sys.executable, str(BENCH / "overhead.py"), "--variants", "our"], capture_output=True, text=True, check=False
    )

    assert done.returncode == 2
    assert "unknown variant 'our'; known variants are bare, floor" in done.stderr


def test_our_variants_write_one_line_for_each_task() -> None:
    """The floor logs each task, so a line that is left out would make aftertask look cheaper than it is."""
    # More than the 100 lines a second that are written by default.
    code = "import overhead; overhead.Driver(overhead.VARIANTS['ours_stderr']()).drive('/10', 30)"

    done = subprocess.run([sys.executable, "-c", code], cwd=BENCH, capture_output=True, text=True, check=True)

    assert done.stderr.count('"event": "task.succeeded"') == 300


@pytest.mark.long
@pytest.mark.timeout(120)
def test_a_short_load_with_open_pages_costs_little() -> None:
    """Three short rounds share the machine: twice the time is allowed, but no more of the processor than ever."""
    options = ["--rounds", "3", "--seconds", "3", "--ratio", "2", "--memory", "15"]

    done = subprocess.run(
        [sys.executable, str(BENCH / "board.py"), *options], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr
    ratio, processor, memory = done.stdout.splitlines()
    assert "with three open pages" in ratio and "of a processor" in processor and "memory grew by" in memory


@pytest.mark.long
@pytest.mark.timeout(150)
@pytest.mark.parametrize("command", ["offload.py", "celery_worker.py --rounds 1 --tasks 200"])
def test_a_short_run_beside_bare_celery_prints_its_figures(command: str) -> None:
    """What a busy machine makes of them decides nothing here."""
    program("redis-server")
    name, *options = command.split()
    done = subprocess.run([sys.executable, str(BENCH / name), *options], capture_output=True, text=True, check=False)

    # A busy machine may hold the loop up, and then the log says so.
    errors = [line for line in done.stderr.splitlines() if '"event": "loop.blocked"' not in line]
    assert done.returncode in (0, 1) and not errors, done.stderr
    assert "hand-over" in done.stdout or len(done.stdout.splitlines()) == 4
