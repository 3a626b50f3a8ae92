"""The promises of the code itself, checked by reading its source: the order of imports, sizes, what is refused."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

import aftertask
from aftertask import Settings
from aftertask.policies import PolicyOptions

ROOT = Path(__file__).parent.parent
PACKAGE = Path(aftertask.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

#: From the top down. A module imports what stands on a later line, or beside it.
ORDER = (
    "__init__",
    "testing",
    "cli",
    "board",
    "celery",
    "middleware",
    "_mistakes",
    "journal",
    "signals",
    "settings",
    "alerts",
    "hazards",
    "_core.app",
    "_core.hooks",
    "_core.notes",
    "_core.observe",
    "_core.serve",
    "_core.request",
    "_core.parts",
    "_core.owed",
    "_core.route",
    "_core.reasons",
    "_core.schedule",
    "_core.batch",
    "_core.lifecycle",
    "_core.shutdown",
    "_core.keeper",
    "_core.run",
    "_core.background",
    "_core.dependencies",
    "_core.resolver",
    "_core.limits",
    "_core.executors",
    "_core.stacks",
    "_core.emit",
    "_core.advice",
    "_core.process",
    "_core.loops",
    "_core",
    "_encoding",
    "tasks",
    "engines",
    "policies",
    "events",
    "_events",
    "_stored",
    "_taskrun",
    "_text",
    "errors",
    "_log",
    "_clock",
    "_signatures",
    "_versions",
    "_version",
)


def name_of(path: Path) -> str:
    """A module's name below the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def place(module: str) -> int:
    """The index of a module in the order."""
    found = [at for at, name in enumerate(ORDER) if module == name or module.startswith(f"{name}.")]
    assert found, f"{module} has no place in the order"
    return found[0]


def imported(path: Path) -> Iterator[str]:
    """Every module of ours that a module imports, lazily or for types only, too."""
    package = name_of(path).split(".") if path.stem == "__init__" else name_of(path).split(".")[:-1]
    package = [] if path == PACKAGE / "__init__.py" else package
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            if node.module:
                yield ".".join([*base, node.module])
            else:
                yield from (".".join([*base, alias.name]) for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path: Path) -> None:
    """One order for every module; imports for type checkers and inside of functions count as well."""
    for target in imported(path):
        assert place(name_of(path)) <= place(target), f"{name_of(path)} imports {target}"


def test_there_is_no_import_circle() -> None:
    """Modules in one part of the order do not import each other in a circle either."""
    graph = {name_of(path): set(imported(path)) for path in MODULES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"import circle: {' -> '.join((*path, module))}"
        if module not in done:
            for target in graph.get(module, ()):
                visit(target, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_a_vendor_is_imported_where_it_belongs() -> None:
    """OpenTelemetry in tracing, structlog in logging, prometheus-client in metrics; Settings names their types."""
    allowed = {
        # The calls of alert channels make no spans; only OpenTelemetry's own context can switch them off.
        "opentelemetry": {"signals", "settings", "alerts.calls", "celery"},
        "structlog": {"signals.logs", "_log"},
        "prometheus_client": {"signals", "settings", "middleware"},
        "fastapi": set[str](),
        "apprise": {"alerts.apprise"},
        "typer": {"cli"},
        "jinja2": {"board"},
        "celery": {"celery"},
        "kombu": {"celery"},
        "pydantic": {"_encoding"},
        "pydantic_core": {"_encoding"},
        "sqlite3": {"journal", "cli"},
    }
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for vendor in {name.partition(".")[0] for name in names} & allowed.keys():
                module = name_of(path)
                assert any(module == each or module.startswith(f"{each}.") for each in allowed[vendor]), (
                    module,
                    vendor,
                )


# --- sizes


def lines(path: Path) -> int:
    """The lines of a file."""
    return path.read_text().count("\n")


def test_the_package_stays_small() -> None:
    """What is reached, so that it grows no further; the goal is 10 500 lines without journal, board and Celery."""
    others = [path for path in MODULES if name_of(path).partition(".")[0] not in ("board", "celery", "journal")]
    assert sum(map(lines, others)) <= 16_349


def test_the_board_stays_small() -> None:
    """Its Python, its script and its style; what is reached, the goal is 1 200 lines of Python."""
    folder = PACKAGE / "board"
    assert sum(map(lines, folder.rglob("*.py"))) <= 1_573
    assert lines(folder / "static" / "board.js") <= 300
    assert lines(folder / "static" / "board.css") <= 300


def test_the_journal_stays_small() -> None:
    """What is reached; the goal is 1 200 lines."""
    assert sum(map(lines, (PACKAGE / "journal").glob("*.py"))) <= 1_997


def test_the_celery_part_stays_small() -> None:
    """What is reached; the goal is 900 lines."""
    assert sum(map(lines, (PACKAGE / "celery").glob("*.py"))) <= 1_071


def test_no_module_is_large() -> None:
    """At most 400 lines each."""
    assert {name_of(path): lines(path) for path in MODULES if lines(path) > 400} == {}


def test_any_is_rare() -> None:
    """The package uses it at most 150 times."""
    nodes = (node for path in MODULES for node in ast.walk(ast.parse(path.read_text())))
    assert sum(isinstance(node, ast.Name) and node.id == "Any" for node in nodes) <= 150


# --- what is refused

#: The only places that may use what is refused, by module and function.
EXCEPTIONS = {
    ("_core.hooks", "_request_injected_into", "f_locals"),  # FastAPI offers no other way
    ("_core.hooks", "_request_injected_into", "_getframe"),
    ("_core.hooks", "_opentelemetrys_tracer", "_otel_original_call"),
    ("_core.stacks", "frames_of_thread", "_current_frames"),  # the stack of a blocked loop or a stuck thread
}
REFUSED_CALLS = {"exec", "eval", "compile"}
REFUSED_NAMES = {"__closure__", "cell_contents", "f_locals", "co_freevars", "co_code", "_getframe", "_current_frames"}


def refused(path: Path) -> Iterator[tuple[str, str, str]]:
    """The constructs in a module that STYLE refuses, as module, function and name."""
    tree = ast.parse(path.read_text())
    ours = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_own(node)}
    for function in [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]:
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in REFUSED_CALLS:
                yield name_of(path), function.name, node.func.id
            elif isinstance(node, ast.Attribute) and node.attr in REFUSED_NAMES:
                yield name_of(path), function.name, node.attr
            elif isinstance(node, ast.Constant) and node.value == "_otel_original_call":
                yield name_of(path), function.name, str(node.value)
            elif (
                isinstance(node, ast.Attribute) and is_private(node.attr) and not is_own(node) and node.attr not in ours
            ):
                yield name_of(path), function.name, node.attr


def is_private(name: str) -> bool:
    """A name with one leading underscore."""
    return name.startswith("_") and not name.startswith("__")


def is_own(node: ast.Attribute) -> bool:
    """Whether an attribute is read from `self` or `cls`."""
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def test_nothing_refused_is_used() -> None:
    """No generated code, no closure cells, no frames, no private names of others, but for the listed exceptions."""
    found = {each for path in MODULES for each in refused(path)}
    assert found - EXCEPTIONS == set()


def test_importing_the_package_does_nothing() -> None:
    """No hook, no thread, no metric, no handler, no setting and no source read, until a middleware is built."""
    code = """
import builtins, threading, signal, sys, logging
import fastapi, starlette.responses, prometheus_client, structlog, opentelemetry.sdk.trace, anyio, anyio.to_process
from prometheus_client import REGISTRY
from starlette.background import BackgroundTask, BackgroundTasks
from starlette.responses import Response, StreamingResponse
def state():
    classes = BackgroundTask, BackgroundTasks, fastapi.BackgroundTasks, Response, StreamingResponse
    return (
        [sorted((k, id(v)) for k, v in vars(c).items() if k in ("__call__", "__init__", "add_task", "background",
         "__init_subclass__")) for c in classes],
        threading.active_count(), signal.getsignal(signal.SIGTERM), len(REGISTRY._collector_to_names),
        structlog.is_configured(), logging.getLogger("aftertask").handlers,
    )
before = state()
real, opened = builtins.open, []
builtins.open = lambda file, *a, **k: (opened.append(str(file)), real(file, *a, **k))[1]
import aftertask, aftertask.signals, aftertask.testing, aftertask.alerts
builtins.open = real
assert state() == before, (state(), before)
assert not [file for file in opened if file.endswith(".py")], opened
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={"AFTERTASK_TRACE": "nonsense"})


# --- documentation


def test_every_setting_and_policy_is_documented() -> None:
    """The settings page lists each by name."""
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
    """Members of protocols and overloads may go without."""
    for path in MODULES:
        for node in public(ast.parse(path.read_text()).body):
            bare = ast.unparse(node.body[-1]) == "..."
            assert ast.get_docstring(node) or bare, f"{path.name}: {node.name}"


def test_the_public_names_are_few() -> None:
    """About twenty at the top; the rest in their modules."""
    assert len(aftertask.__all__) <= 25


def test_the_code_uses_the_words_of_the_field() -> None:
    """None of the words that were replaced comes back, in the tests and examples either."""
    words = ("told", "so many", "nobody", "somebody", "whoever")
    others = [path for folder in ("tests", "examples") for path in (ROOT / folder).rglob("*.py")]
    paths = [path for path in (*MODULES, *others) if path != Path(__file__)]
    found = [(path.name, word) for path in paths for word in words if re.search(rf"\b{word}\b", path.read_text())]
    assert found == []


def test_the_version_is_the_one_that_is_built() -> None:
    """pyproject.toml and the package agree."""
    assert f'version = "{aftertask.__version__}"' in (ROOT / "pyproject.toml").read_text()
