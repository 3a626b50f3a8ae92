"""
The tests on the declared minimum of every dependency, on other versions of FastAPI and Starlette, and on newer Python.

    python tests/versions.py                        # all, one line each
    python tests/versions.py --only minimums        # or one requirement, such as "fastapi==0.136.*"

Environments are kept in .cache/versions. A Python that is not installed is skipped, and the line says so.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
CACHE = ROOT / ".cache" / "versions"
MINIMUMS = "minimums"

#: What is installed, and on which Python; None: the one that runs this.
ENVIRONMENTS: list[tuple[str, str | None]] = [
    (MINIMUMS, None),
    ("fastapi==0.115.*", None),
    ("fastapi==0.117.*", None),
    ("fastapi==0.118.*", None),
    ("fastapi==0.121.*", None),
    ("fastapi==0.136.*", None),
    ("fastapi==0.150.*", None),
    ("fastapi==0.165.*", None),
    ("starlette==0.41.*", None),
    ("starlette==0.46.*", None),
    ("starlette==0.52.*", None),
    ("starlette==1.10.*", None),
    ("fastapi", "3.12"),
    ("fastapi", "3.13"),
    ("fastapi", "3.14"),
]

#: What the tests need, in any version that fits.
NEEDS = [
    *(
        "pytest>=9",
        "pytest-timeout",
        "pytest-randomly",
        "pytest-xdist",
        "hypothesis",
        "trio",
        "httpx",
        "httpx2",
        "aiosmtpd",
    ),
    *("opentelemetry-instrumentation-fastapi", "opentelemetry-instrumentation-starlette", "sentry-sdk"),
    *(
        "python-multipart",
        "uvicorn",
        "uvloop",
        "sqlalchemy[asyncio]",
        "sqlmodel",
        "aiosqlite",
        "sse-starlette",
        "standardwebhooks",
        "orjson",
        "loguru",
    ),
]

#: Tests of files in the repository, with tools that have minimums of their own.
LEFT_OUT = [
    *("test_bench.py", "test_docs.py", "test_promises.py", "test_frames.py", "test_examples.py"),
    *("test_grafana_stack.py", "cli/test_dashboards.py", "cli/test_kubernetes.py", "cli/test_rules.py"),
    *("live", "database/test_postgres.py"),
]


def minimums() -> list[str]:
    """The lowest version of each dependency, extras included, that pyproject.toml allows, as `name==version`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    found = [re.match(r"([\w-]+)>=([\w.]+)", line) for line in (*project["dependencies"], *extras)]
    return [f"{match[1]}=={match[2]}" for match in found if match]


def interpreter(version: str | None) -> str | None:
    """The program of a Python version, from the path or from pyenv; None if it is not installed."""
    if version is None:
        return sys.executable
    found = shutil.which(f"python{version}")
    if found is not None and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:
        return found
    if shutil.which("pyenv") is None:
        return None
    installed = subprocess.run(["pyenv", "versions", "--bare"], capture_output=True, text=True).stdout.split()
    newest = next((name for name in reversed(installed) if name.startswith(f"{version}.")), version)
    done = subprocess.run(["pyenv", "prefix", newest], capture_output=True, text=True)
    return str(Path(done.stdout.strip()) / "bin" / "python") if done.returncode == 0 else None


def environment(requirement: str, python: str, name: str) -> Path:
    """A virtual environment with this requirement, what the tests need, and aftertask from this checkout."""
    venv = CACHE / name
    made, program = venv / ".made", venv / "bin" / "python"
    if not made.exists():
        subprocess.run([python, "-m", "venv", "--clear", str(venv)], check=True)
        packages = minimums() if requirement == MINIMUMS else [requirement]
        pip = [str(program), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        done = subprocess.run([*pip, *packages, *NEEDS, "-e", f"{ROOT}[all]"], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        made.touch()
    return program


def installed(python: Path) -> str:
    """The versions in an environment that matter most."""
    code = (
        "from importlib.metadata import version as v; import sys; print(', '.join(f'{n} {v(n)}' for n in sys.argv[1:]))"
    )
    names = ("fastapi", "starlette", "opentelemetry-sdk", "prometheus-client", "structlog", "anyio")
    return subprocess.run([str(python), "-c", code, *names], capture_output=True, text=True, check=True).stdout.strip()


def check(requirement: str, version: str | None, more: list[str]) -> tuple[bool | None, str]:
    """Whether the tests pass there, and the line to print; None if they could not be run."""
    python = interpreter(version)
    if python is None:
        return None, f"Python {version} is not installed"
    name = re.sub(r"[^\w.]+", "-", f"{requirement}-{version or 'current'}").strip("-")
    try:
        program = environment(requirement, python, name)
    except RuntimeError as error:
        return None, f"cannot be installed: {error}"
    tests = more or ["tests", *(f"--ignore=tests/{name}" for name in LEFT_OUT)]
    # Other versions warn about other things.
    command = [
        str(program),
        "-m",
        "pytest",
        "-q",
        "-n",
        "auto",
        "--dist",
        "worksteal",
        "-m",
        "not long",
        "-W",
        "default",
        *tests,
    ]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 0, "\n    ".join([f"{installed(program)}: {lines[-1]}", *failed[:40]])


def main() -> int:
    """The command; exit code 1 if tests failed, or an environment of this Python could not be made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="'minimums', or one requirement, such as 'fastapi==0.115.*'")
    parser.add_argument("--python", help="with --only: a Python version, such as 3.12")
    parser.add_argument("tests", nargs="*", help="paths or options for pytest instead of the usual ones")
    options = parser.parse_args()
    chosen = [(options.only, options.python)] if options.only else ENVIRONMENTS
    fine = True
    for requirement, version in chosen:
        holds, line = check(requirement, version, options.tests)
        fine = fine and (holds or (holds is None and version is not None))
        mark = {True: "holds", False: "FAILS", None: "skipped"}[holds]
        print(f"{mark:8} {requirement}{f' on Python {version}' if version else ''}: {line}", flush=True)
    return not fine


if __name__ == "__main__":
    sys.exit(main())
