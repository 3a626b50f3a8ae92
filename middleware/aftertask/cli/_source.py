"""What is wrong or risky in an app's source: tasks that block the event loop, and arguments that will be dead."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from .._text import is_library_file
from ..hazards._arguments import kind_of
from ..tasks import is_async, unwrap

#: Calls that wait, as they are written once imports are resolved, and what to use instead.
_HTTP = "use httpx.AsyncClient"
_DATABASE = "use the driver's async side"
_PROCESS = "use anyio.run_process"
BLOCKING = {
    "time.sleep": "use anyio.sleep or asyncio.sleep",
    **{f"requests.{name}": _HTTP for name in ("get", "post", "put", "patch", "delete", "head", "options", "request")},
    "urllib.request.urlopen": _HTTP,
    "urllib.request.urlretrieve": _HTTP,
    "urllib3.request": _HTTP,
    **{
        f"httpx.{name}": _HTTP
        for name in ("get", "post", "put", "patch", "delete", "head", "request", "stream", "Client")
    },
    **{f"subprocess.{name}": _PROCESS for name in ("run", "call", "check_call", "check_output", "getoutput", "Popen")},
    "os.system": _PROCESS,
    "os.popen": _PROCESS,
    "os.wait": _PROCESS,
    "os.waitpid": _PROCESS,
    **{f"{name}.connect": _DATABASE for name in ("sqlite3", "psycopg", "psycopg2", "pymysql", "MySQLdb", "cx_Oracle")},
    "mysql.connector.connect": _DATABASE,
    "psycopg.Connection.connect": _DATABASE,
    "pymongo.MongoClient": _DATABASE,
    **{f"redis.{name}": "use redis.asyncio" for name in ("Redis", "StrictRedis", "from_url")},
    **{f"boto3.{name}": "use aioboto3" for name in ("client", "resource")},
    **{f"smtplib.{name}": "use aiosmtplib" for name in ("SMTP", "SMTP_SSL", "LMTP")},
    **{f"ftplib.{name}": "run it in a thread" for name in ("FTP", "FTP_TLS")},
    "paramiko.Transport": "run it in a thread",
    "socket.create_connection": "use anyio.connect_tcp",
    "socket.getaddrinfo": "use anyio.getaddrinfo",
    "socket.gethostbyname": "use anyio.getaddrinfo",
    "shutil.copytree": "run it in a thread",
    "shutil.make_archive": "run it in a thread",
    "builtins.input": "run it in a thread",
}

#: The same for methods of an argument, by the kind of class that it is annotated with.
_SYNC_SESSIONS = {"sqlalchemy.orm.session.Session", "sqlalchemy.engine.base.Connection", "sqlite3.Connection"}
_SYNC_SESSIONS |= {"psycopg.Connection", "psycopg2.extensions.connection"}
_QUERIES = {"execute", "scalars", "scalar", "get", "query", "commit", "flush", "refresh", "rollback", "exec"}

#: Functions that a task calls are read as well, up to this many calls deep.
_DEEP = 3


@dataclass(frozen=True, slots=True)
class Call:
    """Something found at a line of the source."""

    file: str
    line: int
    what: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Added:
    """
    A task that is scheduled somewhere in the source.

    Attributes:
        file, line: Where.
        func: The function; None where the source alone does not say which.
        arguments: What it is given, as names of variables; None for anything else. By position, then by name.
        by: The function in which that happens.
    """

    file: str
    line: int
    func: Any
    arguments: tuple[tuple[int | str, str | None], ...]
    by: FunctionType | None


class Module:
    """
    One module of the app, read once.

    Raises:
        OSError, SyntaxError: It cannot be read.
    """

    def __init__(self, module: ModuleType) -> None:
        self.file = str(module.__file__)
        self.names = vars(module)
        self.tree = ast.parse(Path(self.file).read_text("utf-8"), self.file)
        self.imports = dict(_imports(self.tree))

    def dotted(self, node: ast.expr) -> str | None:
        """A name as it is written, its import resolved: `sleep` is `time.sleep`."""
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            return None
        first = self.imports.get(node.id, f"builtins.{node.id}" if node.id == "input" else node.id)
        return ".".join([first, *reversed(parts)])

    def value(self, node: ast.expr) -> Any:
        """The object that a name of the module stands for; None if finding it out would mean running code."""
        if isinstance(node, ast.Attribute):
            owner = self.value(node.value)
            return inspect.getattr_static(owner, node.attr, None) if isinstance(owner, (ModuleType, type)) else None
        return self.names.get(node.id) if isinstance(node, ast.Name) else None

    def added(self) -> Iterator[Added]:
        """Every task that is scheduled in this module."""
        for scope, call in _calls(self.tree, None):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            if not call.args or name not in ("add_task", "BackgroundTask"):
                continue
            by = None if scope is None else self._function(scope)
            given: list[tuple[int | str, str | None]] = [
                (place, getattr(arg, "id", None)) for place, arg in enumerate(call.args[1:])
            ]
            given += [(keyword.arg, getattr(keyword.value, "id", None)) for keyword in call.keywords if keyword.arg]
            yield Added(self.file, call.lineno, self._task(call.args[0]), tuple(given), by)

    def _task(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Call) and node.args:  # options(f, …), partial(f, …)
            return self._task(node.args[0])
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
            return next((vars(each)[node.attr] for each in self._classes() if node.attr in vars(each)), None)
        return self.value(node)

    def _classes(self) -> Iterator[type]:
        """The classes that the module defines."""
        name = self.names.get("__name__")
        yield from (each for each in self.names.values() if isinstance(each, type) and each.__module__ == name)

    def unused_containers(self) -> Iterator[tuple[int, str]]:
        """Line and name of each `BackgroundTasks()` that a function fills and uses for nothing else."""
        for function in ast.walk(self.tree):
            if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            made = {
                target.id: node.lineno
                for node in ast.walk(function)
                if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
                for target in node.targets
                if isinstance(target, ast.Name)
                and (self.dotted(node.value.func) or "").rpartition(".")[2] == "BackgroundTasks"
            }
            adds = [
                node.value for node in ast.walk(function) if isinstance(node, ast.Attribute) and node.attr == "add_task"
            ]
            uses = [
                node for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
            ]
            for name, line in made.items():
                filled = sum(isinstance(owner, ast.Name) and owner.id == name for owner in adds)
                if filled and filled == sum(use.id == name for use in uses):
                    yield line, name

    def _function(self, scope: ast.AST) -> FunctionType | None:
        found = self.names.get(getattr(scope, "name", ""))
        found = unwrap(found)[0] if callable(found) else found
        found = inspect.unwrap(found) if callable(found) else found
        return found if isinstance(found, FunctionType) and found.__code__.co_filename == self.file else None


class Source:
    """The app's own modules, read when they are asked for."""

    def __init__(self) -> None:
        self._modules: dict[str, Module | None] = {}

    def module(self, name: str) -> Module | None:
        """A module of the app; None where it is a library's, or cannot be read."""
        if name not in self._modules:
            self._modules[name] = self._read(name)
        return self._modules[name]

    @staticmethod
    def _read(name: str) -> Module | None:
        module = sys.modules.get(name)
        file = getattr(module, "__file__", None)
        if module is None or file is None or not file.endswith(".py"):
            return None
        if is_library_file(file):
            return None
        try:
            return Module(module)
        except (OSError, SyntaxError, UnicodeDecodeError):
            return None

    def blocking(self, func: Any) -> list[Call]:
        """The calls in an async function that block the event loop; in the plain functions that it calls, too."""
        func = unwrap(func)[0]
        return list(self._blocking(func, _DEEP, set())) if is_async(func) else []

    def _blocking(self, func: Any, deep: int, seen: set[Any]) -> Iterator[Call]:
        func = inspect.unwrap(getattr(func, "__func__", func))
        module = self.module(getattr(func, "__module__", "") or "")
        if module is None or not isinstance(func, FunctionType) or func in seen:
            return
        seen.add(func)
        try:
            lines, first = inspect.getsourcelines(func)
            tree = ast.parse(textwrap.dedent("".join(lines)))
        except (OSError, SyntaxError, TypeError):
            return
        sessions = {name for name, kind in annotated(func).items() if _is_sync_session(kind)}
        local = dict(_imports(tree))
        for call in _own_calls(tree.body[0]):
            line = first + call.lineno - 1
            dotted = module.dotted(call.func) or ""
            head, _, rest = dotted.partition(".")
            dotted = f"{local[head]}.{rest}".rstrip(".") if head in local else dotted
            remedy = BLOCKING.get(dotted)
            owner = call.func.value if isinstance(call.func, ast.Attribute) else None
            if remedy is not None:
                yield Call(module.file, line, f"{dotted}()", remedy)
            elif isinstance(owner, ast.Name) and owner.id in sessions and call.func.attr in _QUERIES:  # type: ignore[attr-defined]  # it has an owner, so it is an Attribute
                yield Call(module.file, line, f"{ast.unparse(call.func)}()", _DATABASE)
            elif deep:
                helper = module.value(call.func)
                if isinstance(helper, FunctionType) and not is_async(helper):
                    for inner in self._blocking(helper, deep - 1, seen):
                        yield Call(inner.file, inner.line, f"{inner.what} in {helper.__qualname__}()", inner.remedy)


def annotated(func: Any) -> dict[str, type]:
    """The classes that a function's parameters are annotated with, as far as they can be found."""
    try:
        hints = inspect.get_annotations(func, eval_str=True)
    except Exception:  # a name for type checkers only
        hints = inspect.get_annotations(func)
    found = {}
    for name, hint in hints.items():
        hint = getattr(hint, "__origin__", hint) if hasattr(hint, "__metadata__") else hint
        if isinstance(hint, type) and name != "return":
            found[name] = hint
    return found


def argument_kinds(func: Any) -> dict[str, str]:
    """What a function's parameters are: `upload`, `request`, `database`, …"""
    return {name: kind_of(kind) for name, kind in annotated(func).items()}


def place_of(func: Any) -> tuple[str | None, int | None]:
    """The file and line where a function begins."""
    code = getattr(inspect.unwrap(unwrap(func)[0]) if callable(func) else func, "__code__", None)
    return (None, None) if code is None else (code.co_filename, code.co_firstlineno)


def _is_sync_session(kind: type) -> bool:
    return any(f"{base.__module__}.{base.__qualname__}" in _SYNC_SESSIONS for base in kind.__mro__)


def _imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield (
                    alias.asname or alias.name.partition(".")[0],
                    alias.name if alias.asname else alias.name.partition(".")[0],
                )
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _calls(node: ast.AST, scope: ast.AST | None) -> Iterator[tuple[ast.AST | None, ast.Call]]:
    """Every call, with the outermost function that it stands in."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Call):
            yield scope, child
        is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
        yield from _calls(child, child if is_function and scope is None else scope)


def _own_calls(node: ast.AST) -> Iterator[ast.Call]:
    """The calls that run when a function is called: not its decorators', nor those in functions that it defines."""
    for child in node.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) else ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
            continue
        if isinstance(child, ast.Call):
            yield child
        yield from _own_calls(child)
