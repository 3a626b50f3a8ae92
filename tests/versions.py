"""
Our own suite on older and newer FastAPI, Starlette and Python: which of them hold.

    python tests/versions.py                     # all, a table at the end
    python tests/versions.py --only fastapi==0.115.14

Environments are kept in .cache/versions. An interpreter that is not there is skipped with a word.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CACHE = ROOT / ".cache" / "versions"

#: What is installed, and for which Python; None is the one that runs this.
ENVIRONMENTS: list[tuple[str, str | None]] = [
    ("fastapi==0.115.*", None),
    ("fastapi==0.136.*", None),
    ("fastapi==0.150.*", None),
    ("fastapi", None),
    ("starlette==0.41.*", None),
    ("starlette==0.46.*", None),
    ("starlette==0.52.*", None),
    ("fastapi", "3.12"),
    ("fastapi", "3.13"),
]

#: What the tests need beside FastAPI or Starlette.
NEEDS = [
    *("aiosmtpd", "standardwebhooks"),
    *("pytest>=9", "pytest-timeout", "pytest-randomly", "hypothesis", "trio", "httpx2", "httpx", "sse-starlette"),
    *("opentelemetry-instrumentation-fastapi", "opentelemetry-instrumentation-starlette"),
    *("python-multipart", "uvicorn", "sqlalchemy", "uvloop"),
]

#: The part of the suite that asks what depends on a version: interception, and the signals on top of it.
TESTS = [
    "tests/test_route.py",
    "tests/intercept",
    "tests/policies",
    "tests/test_metrics.py",
    "tests/test_logs.py",
    "tests/test_tracing.py",
    "tests/test_policies.py",
    "tests/test_coexistence.py",
    "tests/test_watch.py",
    "tests/alerts",
    "tests/hazards",
]


def interpreter(version: str | None) -> str | None:
    """The program of a Python version: on the path, or one that pyenv knows; None where there is none."""
    if version is None:
        return sys.executable
    found = shutil.which(f"python{version}")
    if found is not None and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:
        return found
    if shutil.which("pyenv") is None:
        return None
    done = subprocess.run(["pyenv", "prefix", _newest(version) or version], capture_output=True, text=True)
    return str(Path(done.stdout.strip()) / "bin" / "python") if done.returncode == 0 else None


def _newest(version: str) -> str | None:
    known = subprocess.run(["pyenv", "versions", "--bare"], capture_output=True, text=True).stdout.split()
    return next((name for name in reversed(known) if name.startswith(f"{version}.")), None)


def environment(requirement: str, python: str, name: str) -> Path:
    """A virtual environment with this requirement, the tests' needs and aftertask from this checkout."""
    venv = CACHE / name
    made = venv / ".made"
    program = venv / "bin" / "python"
    if not made.exists():
        subprocess.run([python, "-m", "venv", "--clear", str(venv)], check=True)
        pip = [str(program), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        packages = [requirement] if requirement.startswith("fastapi") else [requirement, "fastapi"]
        done = subprocess.run([*pip, *packages, *NEEDS, "-e", f"{ROOT}[alerts]"], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        made.touch()
    return program


def installed(python: Path) -> str:
    """The versions that were installed."""
    code = "import fastapi, starlette; print(f'fastapi {fastapi.__version__}, starlette {starlette.__version__}')"
    return subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def check(requirement: str, version: str | None, more: list[str]) -> tuple[bool | None, str]:
    """Whether the suite passes there, and what to say of it; None where it could not be tried."""
    python = interpreter(version)
    if python is None:
        return None, f"no Python {version} here"
    name = re.sub(r"[^\w.]+", "-", f"{requirement}-{version or 'current'}").strip("-")
    try:
        program = environment(requirement, python, name)
    except RuntimeError as error:
        return None, f"cannot be installed: {error}"
    tests = more or TESTS
    command = [str(program), "-m", "pytest", "-q", "-m", "not live and not long", "-W", "default", *tests]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 0, "\n    ".join([f"{installed(program)}: {lines[-1]}", *failed[:20]])


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one requirement, such as fastapi==0.115.*")
    parser.add_argument("tests", nargs="*", help="paths or options for pytest in place of the usual ones")
    options = parser.parse_args()
    chosen = [(options.only, None)] if options.only else ENVIRONMENTS
    fine = True
    for requirement, version in chosen:
        holds, word = check(requirement, version, options.tests)
        fine = fine and holds is not False
        mark = {True: "holds", False: "FAILS", None: "skipped"}[holds]
        print(f"{mark:8} {requirement}{f' on Python {version}' if version else ''}: {word}", flush=True)
    return not fine


if __name__ == "__main__":
    sys.exit(main())
