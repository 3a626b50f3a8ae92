"""
Run Starlette's and FastAPI's own suites bare and with the middleware in every app, and compare them test by test.

    python tests/upstream/run.py                         # both, at the versions below
    python tests/upstream/run.py --package starlette     # one of them; --version for another
    python tests/upstream/run.py --control               # a middleware that swallows errors: must be noticed

The suites come from the packages' source distributions. Environments and downloads are kept in .cache/upstream.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "upstream"
VERSIONS = {"starlette": "1.10.0", "fastapi": "0.165.0"}

#: What each suite needs beside the package. FastAPI's is a dependency group of its own project file.
NEEDS = {
    "starlette": [
        *("starlette[full]", "httpx2[zstd]", "httpx", "blockbuster", "trio", "importlib-metadata", "opentelemetry-sdk"),
        *("pytest<9.2", "pytest-xdist", "pytest-timeout", "typing-extensions"),
    ],
    "fastapi": ["fastapi[standard]", "pytest-xdist", "pytest-timeout"],
}

#: Suites whose own project file names what they need.
GROUPS = {"fastapi": "tests"}

Outcomes = dict[str, str]


@dataclass
class Seen:
    """What the middleware saw: the number of apps and runs, and each hazard: test, kind, task and advice."""

    apps: int = 0
    runs: int = 0
    hazards: list[tuple[str, str, str]] = field(default_factory=list)


def run(*command: str | Path, **kwargs: object) -> None:
    """Run a command; exit with its output if it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **kwargs)  # type: ignore[call-overload]  # run's
    if done.returncode:
        raise SystemExit(f"{command} failed:\n{done.stdout}\n{done.stderr}")


def source(package: str, version: str) -> Path:
    """The unpacked source distribution."""
    folder = CACHE / f"{package}-{version}"
    if not folder.exists():
        downloads = CACHE / "downloads"
        downloads.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", package]
        run(*pip, f"{package}=={version}", "-d", downloads)
        with tarfile.open(downloads / f"{package}-{version}.tar.gz") as archive:
            archive.extractall(CACHE, filter="data")
    return folder


def environment(package: str, version: str, folder: Path) -> Path:
    """A virtual environment with the suite's needs, and with aftertask from this checkout."""
    venv = CACHE / f"venv-{package}-{version}"
    python = venv / "bin" / "python"
    if not (venv / ".made").exists():
        run(sys.executable, "-m", "venv", venv)
        run(python, "-m", "pip", "install", "-q", "--upgrade", "pip>=25.1")
        group = ["--group", f"{folder / 'pyproject.toml'}:{GROUPS[package]}"] if package in GROUPS else []
        run(python, "-m", "pip", "install", "-q", f"{package}=={version}", *NEEDS[package], *group)
        run(python, "-m", "pip", "install", "-q", "-e", ROOT)
        (venv / ".made").touch()
    return python


def suite(python: Path, folder: Path, middleware: str | None, workers: int) -> tuple[Outcomes, Seen]:
    """Each test's outcome, and what the middleware saw."""
    with tempfile.TemporaryDirectory() as scratch:
        report, counts = Path(scratch) / "report.xml", Path(scratch)
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(folder)])}
        for name in [name for name in env if name.startswith(("AFTERTASK_", "PYTEST_", "COVERAGE_", "CI"))]:
            del env[name]
        if middleware:
            env |= {"AFTERTASK_TEST_UPSTREAM": middleware, "AFTERTASK_TEST_UPSTREAM_COUNTS": str(counts)}
        command = [python, "-m", "pytest", "tests", "-q", "-p", "plugin", "-p", "no:aftertask", "-n", str(workers)]
        # Neither coverage nor anything random: the two runs must differ in the middleware alone.
        options = ["-p", "no:randomly", "-p", "no:cacheprovider", f"--junit-xml={report}", "--timeout=120"]
        done = subprocess.run([*map(str, command), *options], cwd=folder, env=env, capture_output=True, text=True)
        if not report.exists():
            raise SystemExit(f"the suite in {folder.name} did not run:\n{done.stdout[-5000:]}\n{done.stderr[-5000:]}")
        seen = Seen()
        for file in counts.glob("*.seen"):
            one = json.loads(file.read_text())
            seen.apps, seen.runs = seen.apps + one["apps"], seen.runs + one["runs"]
            seen.hazards += one["hazards"]
        return outcomes(report), seen


def outcomes(report: Path) -> Outcomes:
    """The outcome of each test in a JUnit report."""
    found: Outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found[f"{case.get('classname')}::{case.get('name')}"] = outcome
    return found


def differing(bare: Outcomes, with_it: Outcomes) -> list[str]:
    """The tests that do not end as in the bare run, with both outcomes."""
    pairs = {name: (bare.get(name, "missing"), with_it.get(name, "missing")) for name in bare.keys() | with_it.keys()}
    return sorted(f"{name}: {before}, now {after}" for name, (before, after) in pairs.items() if before != after)


def counted(found: Outcomes) -> str:
    """How many tests had each outcome."""
    counts = Counter(found.values())
    return f"{counts['passed']} passed {counts['failed']} failed {counts['skipped']} skipped"


def compare(package: str, version: str, middleware: str) -> bool:
    """Run one package's suite twice; True if each test ends as in the bare run, and no hazard was found in it."""
    folder = source(package, version)
    python = environment(package, version, folder)
    workers = max(1, (os.cpu_count() or 2))
    bare, _ = suite(python, folder, None, workers)
    with_it, seen = suite(python, folder, middleware, workers)
    differences = differing(bare, with_it)
    print(f"{package} {version}: bare {counted(bare)}; with {middleware} {counted(with_it)}", end="; ")
    print(f"apps with it {seen.apps}, runs {seen.runs}, hazards {len(seen.hazards)}", flush=True)
    for line in differences:
        print(f"  differs: {line}")
    for test, kind, what in sorted(seen.hazards):
        print(f"  a false alarm? {kind} in {test}: {what}")
    if seen.apps == 0:
        print("  no app was built with the middleware: nothing was tested")
    return not differences and seen.apps > 0 and not seen.hazards


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", choices=sorted(VERSIONS))
    parser.add_argument("--version")
    parser.add_argument("--control", action="store_true", help="expect tests to fail, under a middleware that is wrong")
    options = parser.parse_args()
    packages = [options.package] if options.package else list(VERSIONS)
    middleware = "control" if options.control else "aftertask"
    fine = [compare(package, options.version or VERSIONS[package], middleware) for package in packages]
    if options.control:
        print("the control was noticed" if not any(fine) else "the control was NOT noticed: this check cannot fail")
        return any(fine)
    return not all(fine)


if __name__ == "__main__":
    sys.exit(main())
