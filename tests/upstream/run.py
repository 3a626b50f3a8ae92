"""
Run the suites of other projects bare and with the middleware in every app, and compare them test by test.

    python tests/upstream/run.py                         # Starlette's and FastAPI's, at the versions below
    python tests/upstream/run.py --realworld             # those of tracers, of libraries and of an application
    python tests/upstream/run.py --package starlette     # one of them; --version for another
    python tests/upstream/run.py --run-after request     # with tasks after the request: what differs is listed below
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


@dataclass(frozen=True)
class Suite:
    """
    A suite in the source distribution of a package.

    Attributes:
        version: The package's version.
        needs: What it needs beside the package.
        group: The dependency group of its own project file with more of that; None if there is none.
        folder: Where pytest runs, below the root of the distribution.
        tests: What pytest runs.
        env: Environment variables; `{scratch}` is a new folder for each run.
        baseline: What the apps of the bare run have; `empty`: some tests count the app's middleware, so both have one.
        realworld: Whether it is one of `make realworld`.
    """

    version: str
    needs: tuple[str, ...] = ()
    group: str | None = None
    folder: str = "."
    tests: tuple[str, ...] = ("tests",)
    env: dict[str, str] = field(default_factory=dict)
    baseline: str | None = None
    realworld: bool = False


_RUNNER = ("pytest-xdist", "pytest-timeout")

SUITES = {
    "starlette": Suite(
        "1.10.0",
        (
            *("starlette[full]", "httpx2[zstd]", "httpx", "blockbuster", "trio", "importlib-metadata"),
            *("opentelemetry-sdk", "pytest<9.2", "typing-extensions", *_RUNNER),
        ),
    ),
    "fastapi": Suite("0.165.0", ("fastapi[standard]", *_RUNNER), group="tests"),
    "newrelic": Suite(
        "14.1.0",
        ("starlette[full]", "pytest", "WebTest", *_RUNNER),
        folder="tests/framework_starlette",
        tests=(".",),
        env={"NEW_RELIC_DEVELOPER_MODE": "true"},  # or it would report to New Relic
        baseline="empty",
        realworld=True,
    ),
    "sentry_sdk": Suite(
        "2.75.0",
        (
            *(
                "fastapi[standard]",
                "starlette[full]",
                "httpx",
                "pytest",
                "pytest-asyncio",
                "pytest-forked",
                "pytest-cov",
            ),
            *("pytest-localserver", "jsonschema", "responses", "Brotli", "executing", "asttokens", "setuptools"),
            *("pysocks", "PyYAML", *_RUNNER),
        ),
        tests=("tests/integrations/starlette", "tests/integrations/fastapi"),
        baseline="empty",
        realworld=True,
    ),
    # The distributions after 3.2 lack tests/conftest.py and what test_sse.py imports.
    "sse_starlette": Suite(
        "3.2.0", _RUNNER, group="dev", tests=("tests", "-m", "not integration"), baseline="empty", realworld=True
    ),
    "fastapi_taskflow": Suite(
        "0.12.1",
        ("fastapi-taskflow[scheduler,encryption,process]", "pytest-asyncio", "httpx2", "httpx", "uvicorn", *_RUNNER),
        baseline="empty",
        realworld=True,
    ),
    "lnbits": Suite(
        "1.6.2",
        (
            *("bitstring<4.4", "asgi-lifespan", "openai", "mock", "json5"),
            *("pytest<9.1", "pytest-cov", "pytest-md", "pytest-httpserver", "pytest-mock", *_RUNNER),
        ),
        tests=("tests/api",),
        env={"LNBITS_BACKEND_WALLET_CLASS": "FakeWallet", "LNBITS_DATA_FOLDER": "{scratch}", "DEBUG": "true"},
        baseline="empty",
        realworld=True,
    ),
}

_DEPENDENCY_FIRST = "expects the dependency to end after the task, which is what `request` changes"

#: What differs with run_after="request", by the start of the test's name, and why; also in docs/database.md.
AFTER_REQUEST = {
    "starlette": {
        "tests.middleware.test_base::test_do_not_block_on_background_tasks[": (
            "serves two requests with one scope, so they are one request, whose tasks run one after another"
        ),
    },
    "fastapi": {
        "tests.test_async_dependency_cleanup::test_response_remains_cancellable_after_function_cleanup[": (
            _DEPENDENCY_FIRST
        ),
        "tests.test_dependency_concurrency::test_capacity_follows_scope_through_streaming_and_background_work[": (
            _DEPENDENCY_FIRST
        ),
        "tests.test_dependency_contextmanager::test_background_tasks": _DEPENDENCY_FIRST,
        "tests.test_dependency_contextmanager::test_sync_background_tasks": _DEPENDENCY_FIRST,
        "tests.test_telemetry.test_http::test_stream_completes_before_background_and_cleanup": _DEPENDENCY_FIRST,
        "tests.test_telemetry.test_background::test_background_task_failure[True-": (
            "expects that a task's HTTPException passes the exception handlers, which make a RuntimeError of it"
        ),
    },
}

Outcomes = dict[str, str]


@dataclass
class Seen:
    """What the middleware saw: apps, runs, hazards (test, kind, task, advice) and errors of its own (test, part)."""

    apps: int = 0
    runs: int = 0
    hazards: list[tuple[str, str, str]] = field(default_factory=list)
    self_errors: list[tuple[str, str]] = field(default_factory=list)


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


def environment(package: str, version: str, root: Path) -> Path:
    """A virtual environment with the suite's needs, and with aftertask from this checkout."""
    venv = CACHE / f"venv-{package}-{version}"
    python = venv / "bin" / "python"
    if not (venv / ".made").exists():
        run(sys.executable, "-m", "venv", venv)
        run(python, "-m", "pip", "install", "-q", "--upgrade", "pip>=25.1")
        chosen = SUITES[package]
        group = [] if chosen.group is None else ["--group", f"{root / 'pyproject.toml'}:{chosen.group}"]
        run(python, "-m", "pip", "install", "-q", f"{package}=={version}", *chosen.needs, *group)
        run(python, "-m", "pip", "install", "-q", "-e", ROOT)
        (venv / ".made").touch()
    return python


def outcomes_of(package: str, python: Path, root: Path, middleware: str | None) -> tuple[Outcomes, Seen]:
    """Each test's outcome, and what the middleware saw."""
    chosen = SUITES[package]
    # An application's tests share its database.
    workers = 0 if chosen.realworld else max(1, os.cpu_count() or 2)
    with tempfile.TemporaryDirectory() as scratch:
        report, counts = Path(scratch) / "report.xml", Path(scratch)
        paths = [Path(__file__).parent, root, *([root / "tests"] if chosen.realworld else [])]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
        for name in [
            name
            for name in env
            if name.startswith(("AFTERTASK_", "PYTEST_", "COVERAGE_", "CI", "NEW_RELIC_", "SENTRY_"))
        ]:
            del env[name]
        env |= {name: value.format(scratch=scratch) for name, value in chosen.env.items()}
        if middleware:
            env |= {"AFTERTASK_TEST_UPSTREAM": middleware, "AFTERTASK_TEST_UPSTREAM_COUNTS": str(counts)}
        command = [python, "-m", "pytest", *chosen.tests, "-q", "-p", "plugin", "-p", "no:aftertask", "-n", workers]
        # Neither coverage nor anything random: the two runs must differ in the middleware alone.
        options = ["-p", "no:randomly", "-p", "no:cacheprovider", f"--junit-xml={report}", "--timeout=120"]
        options.append("--continue-on-collection-errors")  # a distribution may lack some of its tests' helpers
        whole, limit = [*map(str, command), *options], 600 if chosen.realworld else 1800  # seconds
        done = subprocess.run(whole, cwd=root / chosen.folder, env=env, capture_output=True, text=True, timeout=limit)
        if not report.exists():
            raise SystemExit(f"the suite of {package} did not run:\n{done.stdout[-5000:]}\n{done.stderr[-5000:]}")
        seen = Seen()
        for file in counts.glob("*.seen"):
            one = json.loads(file.read_text())
            seen.apps, seen.runs = seen.apps + one["apps"], seen.runs + one["runs"]
            seen.hazards += one["hazards"]
            seen.self_errors += one["self_errors"]
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
    """Run one package's suite twice; True if each test ends as in the bare run, without hazards and errors of ours."""
    root = source(package, version)
    python = environment(package, version, root)
    bare, _ = outcomes_of(package, python, root, SUITES[package].baseline)
    with_it, seen = outcomes_of(package, python, root, middleware)
    expected = AFTER_REQUEST.get(package, {}) if middleware == "request" else {}
    if any(with_it.get(name) == "passed" and outcome == "failed" for name, outcome in bare.items()):
        # A busy machine: a test that passes bare the second time does not differ.
        again, _ = outcomes_of(package, python, root, SUITES[package].baseline)
        bare |= {name: "passed" for name, outcome in again.items() if outcome == "passed"}
    differences = differing(bare, with_it)
    unexpected = [line for line in differences if not line.startswith(tuple(expected))]
    gone = [name for name in expected if not any(line.startswith(name) for line in differences)]
    baseline = SUITES[package].baseline or "bare"
    print(f"{package} {version}: {baseline} {counted(bare)}; with {middleware} {counted(with_it)}", end="; ")
    print(
        f"apps with it {seen.apps}, runs {seen.runs}, hazards {len(seen.hazards)}, self errors {len(seen.self_errors)}",
        flush=True,
    )
    for line in differences:
        why = next((why for name, why in expected.items() if line.startswith(name)), None)
        print(f"  differs: {line}{'' if why is None else f'; it {why}'}")
    for name in gone:
        print(f"  differs no more: {name}")
    for test, kind, what in sorted(seen.hazards):
        print(f"  a false alarm? {kind} in {test}: {what}")
    for test, part in seen.self_errors:
        print(f"  an error inside aftertask: {part} in {test}")
    if seen.apps == 0:
        print("  no app was built with the middleware: nothing was tested")
    return not unexpected and not gone and seen.apps > 0 and not seen.hazards and not seen.self_errors


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", choices=sorted(SUITES))
    parser.add_argument("--version")
    parser.add_argument("--realworld", action="store_true", help="the suites of tracers, libraries and an application")
    parser.add_argument("--run-after", choices=("response", "request"), default="response", help="as in Settings")
    parser.add_argument("--control", action="store_true", help="expect tests to fail, under a middleware that is wrong")
    options = parser.parse_args()
    packages = [name for name, each in SUITES.items() if each.realworld is options.realworld]
    if options.package:
        packages = [options.package]
    middleware = "control" if options.control else "request" if options.run_after == "request" else "aftertask"
    fine = [compare(package, options.version or SUITES[package].version, middleware) for package in packages]
    if options.control:
        print("the control was noticed" if not any(fine) else "the control was NOT noticed: this check cannot fail")
        return any(fine)
    return not all(fine)


if __name__ == "__main__":
    sys.exit(main())
