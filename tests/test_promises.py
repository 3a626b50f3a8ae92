"""The promises of the code itself: imports point down, a vendor in one place, every setting and policy documented."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import aftertask
from aftertask import Settings
from aftertask.policies import PolicyOptions

ROOT = Path(__file__).parent.parent
PACKAGE = Path(aftertask.__file__).parent

#: From the top down; a module may import what stands below it.
LAYERS = [
    {"testing"},
    {"cli"},
    {"__init__"},
    {"middleware", "_observe"},
    {"hazards"},
    {"_scrape"},
    {"signals"},
    {"_exchange"},
    {"_runner"},
    {"_governed", "_batch", "_shutdown", "_plans", "_watch"},
    {"settings"},
    {"executors", "_gates"},
    {"alerts"},
    {
        "_intercept",
        "_responses",
        "_mark",
        "_messages",
        "_weave",
        "_dispatch",
        "_context",
        "_route",
        "_redact",
        "_log",
        "_frames",
    },
    {"events"},
    {"_run"},
    {"policies", "_failure"},
    {"errors", "_clock", "_timer"},
]


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """What a module imports at its top, and whether it is ours; what is for type checkers alone does not count."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from ((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                yield node.module or "", False
            elif node.module:
                yield node.module, True
            else:
                yield from ((alias.name, True) for alias in node.names)


def layer(module: str) -> int:
    """Where a module stands."""
    first = module.partition(".")[0]
    return next(place for place, names in enumerate(LAYERS) if first in names)


def test_imports_point_down() -> None:
    """No module imports one above it."""
    for path in PACKAGE.glob("*.py"):
        for name, ours in imports(path):
            if ours:
                assert layer(path.stem) <= layer(name), f"{path.name} imports {name}"
    for part in ("signals", "testing", "cli", "alerts"):
        for path in (PACKAGE / part).glob("*.py"):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.ImportFrom) and node.level == 2:
                    for name in [node.module] if node.module else [alias.name for alias in node.names]:
                        assert layer(part) <= layer(name), f"{part}/{path.name} imports {name}"


def test_a_vendor_is_imported_where_it_belongs() -> None:
    """OpenTelemetry in tracing, structlog in logging, prometheus-client in metrics; Settings names their types."""
    allowed = {
        "opentelemetry": {"signals/tracing.py", "signals/_spans.py", "settings.py", "alerts/_delivery.py"},
        "structlog": {"signals/logs.py", "_log.py"},
        "prometheus_client": {
            *("signals/metrics.py", "signals/_series.py", "signals/_multiprocess.py"),
            *("settings.py", "_scrape.py"),
        },
        "fastapi": set(),
        "apprise": {"alerts/apprise.py"},
    }
    for path in PACKAGE.rglob("*.py"):
        for name, ours in imports(path):
            vendor = name.partition(".")[0]
            if not ours and vendor in allowed:
                assert path.relative_to(PACKAGE).as_posix() in allowed[vendor], f"{path} imports {name}"


def test_importing_the_package_does_nothing() -> None:
    """No hook, no thread, no metric, no setting read, until a middleware is built."""
    code = """
import threading
from prometheus_client import REGISTRY
from starlette.background import BackgroundTask, BackgroundTasks
from starlette.responses import Response
before = BackgroundTask.__call__, BackgroundTasks.add_task, BackgroundTasks.__init__, threading.active_count()
import aftertask, aftertask.signals, aftertask.testing
assert (BackgroundTask.__call__, BackgroundTasks.add_task, BackgroundTasks.__init__, threading.active_count()) == before
assert "background" not in vars(Response)
assert not [m for m in REGISTRY.collect() if m.name.startswith("aftertask")]
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={"AFTERTASK_TRACE": "nonsense"})


def test_every_setting_and_policy_is_documented() -> None:
    """In the page on settings, by name."""
    page = (ROOT / "docs" / "settings.md").read_text()
    for name in [field.name for field in fields(Settings)] + list(PolicyOptions.__annotations__):
        assert f"| `{name}` |" in page, name


def public(body: list[ast.stmt]) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """The public classes and functions of a module, and those of its classes."""
    for node in body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body)


def test_every_public_name_has_a_docstring() -> None:
    """What a user can import says what it is for; a protocol's members and overloads may go without."""
    for path in PACKAGE.rglob("*.py"):
        for node in public(ast.parse(path.read_text()).body):
            bare = ast.unparse(node.body[-1]) == "..."
            assert ast.get_docstring(node) or bare, f"{path.name}: {node.name}"


def test_the_version_is_the_one_that_is_built() -> None:
    """pyproject.toml and the package agree."""
    assert f'version = "{aftertask.__version__}"' in (ROOT / "pyproject.toml").read_text()
