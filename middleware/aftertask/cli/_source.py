"""What the source of an app shows: the tasks that it adds, calls that block the event loop, containers never used."""

from __future__ import annotations

import ast
import builtins
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import Any

from starlette.background import BackgroundTasks

from .._signatures import PARTLY
from .._text import is_library_file
from ..hazards._arguments import kind_of_class
from ..tasks import is_async, unwrap
from ._blocking import FUNCTIONS, METHODS

#: Functions that a task calls are read as well, up to this many calls deep.
_DEEPEST = 3

#: Objects that are called for an instance of their `class_`.
_SESSION_MAKERS = {"sqlalchemy.orm.session.sessionmaker", "sqlalchemy.ext.asyncio.session.async_sessionmaker"}

_FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Call:
    """A call that blocks, and what to use instead."""

    file: str
    line: int
    what: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Added:
    """
    A task that is added somewhere in the source.

    Attributes:
        file, line: Where.
        func: The function; None if the source does not show which.
        arguments: The names of the variables among its arguments.
        by: The function that adds it; None outside of functions.
    """

    file: str
    line: int
    func: Any
    arguments: tuple[str, ...]
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
        #: By the line of their first decorator, as Python counts.
        self.functions = {_first_line(node): (node, owner) for node, owner, _ in _functions(self.tree)}

    def added(self) -> Iterator[Added]:
        """Every task that is added in this module."""
        yield from self._added(Scope(self), _own_calls(self.tree))
        for node, owner, outermost in _functions(self.tree):
            if outermost:
                kind = self.owner(owner)
                calls = (inner for inner in ast.walk(node) if isinstance(inner, ast.Call))
                yield from self._added(Scope(self, node, self._function(node, kind), kind), calls)

    def owner(self, name: str | None) -> type | None:
        """The class of this name."""
        found = self.names.get(name) if name else None
        return found if isinstance(found, type) else None

    def _function(self, node: _FunctionNode, owner: type | None) -> FunctionType | None:
        func = inner_function((self.names if owner is None else vars(owner)).get(node.name))
        place = (self.file, _first_line(node))
        # Another one may have taken its name.
        return func if func is not None and (func.__code__.co_filename, func.__code__.co_firstlineno) == place else None

    def _added(self, scope: Scope, calls: Iterable[ast.Call]) -> Iterator[Added]:
        for call in calls:
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            if name not in ("add_task", "BackgroundTask"):
                continue
            named = {each.arg: each.value for each in call.keywords}
            given = [*call.args, *named.values()]
            func = named.get("func", given[0] if call.args else None)
            if func is not None:
                variables = tuple(each.id for each in given if isinstance(each, ast.Name) and each is not func)
                yield Added(self.file, call.lineno, scope.task(func), variables, scope.func)

    def unused_containers(self) -> dict[int, str]:
        """Each `BackgroundTasks()` that a function makes and fills and uses for nothing else: its line and name."""
        found = {}
        for node, _ in self.functions.values():
            scope, parts = Scope(self, node), list(ast.walk(node))
            uses = [each.id for each in parts if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Load)]
            adds = [
                each.value.id
                for each in parts
                if isinstance(each, ast.Attribute) and each.attr == "add_task" and isinstance(each.value, ast.Name)
            ]
            for name, value in _assigned(node):
                kind = scope.kind(value) if isinstance(value, ast.Call) else None
                if kind and issubclass(kind, BackgroundTasks) and 0 < adds.count(name) == uses.count(name):
                    found[value.lineno] = name
        return found


class Scope:
    """
    The names in one function, or outside of functions.

    Args:
        node, func: The function, as source and as it is; None where it is not to be found.
        owner: The class of which it is a method.
    """

    def __init__(
        self,
        module: Module,
        node: _FunctionNode | None = None,
        func: FunctionType | None = None,
        owner: type | None = None,
    ) -> None:
        self.module, self.func = module, func
        self.node: ast.AST = module.tree if node is None else node
        self._imports: dict[str, str] = {}
        #: Each local variable with its class; None where that does not show.
        self._kinds: dict[str, type | None] = {}
        if node is None:
            return
        self._imports = dict(_imports(node))
        parts = list(ast.walk(node))
        self._kinds = dict.fromkeys(each.arg for each in parts if isinstance(each, ast.arg))
        self._kinds |= {each.name: None for each in parts[1:] if isinstance(each, (_FunctionNode, ast.ClassDef))}
        names = [each for each in parts if isinstance(each, ast.Name)]
        self._kinds |= {each.id: None for each in names if isinstance(each.ctx, ast.Store)}
        self._kinds |= annotated(func) if func is not None else {}
        self._kinds |= {name: owner for name in ("self", "cls") if owner is not None and name in self._kinds}
        for name, value in _assigned(node):
            self._kinds[name] = self.kind(value)

    def dotted(self, node: ast.expr) -> str | None:
        """A name with its import resolved: `sleep` is `time.sleep`. None if it is neither imported nor built in."""
        if isinstance(node, ast.Attribute):
            owner = self.dotted(node.value)
            return None if owner is None else f"{owner}.{node.attr}"
        if not isinstance(node, ast.Name) or node.id in self._kinds:
            return None
        if node.id in self.module.names and node.id not in self._imports:
            name = self.module.imports.get(node.id, "")
            return (
                name if _loaded(name) is self.module.names[node.id] else None
            )  # another value may have taken its name
        return self._imports.get(node.id, f"builtins.{node.id}")

    def value(self, node: ast.expr) -> Any:
        """The object that a name stands for; None if only running the code would show it."""
        if isinstance(node, ast.Name) and node.id not in self._kinds:
            found = self.module.names.get(node.id, vars(builtins).get(node.id))
            return _loaded(self._imports[node.id]) if node.id in self._imports else found
        if not isinstance(node, ast.Attribute):
            return None
        owner = self.value(node.value)
        if isinstance(owner, ModuleType):
            return vars(owner).get(node.attr)
        kind = owner if isinstance(owner, type) else self.kind(node.value)
        found = None if kind is None else inspect.getattr_static(kind, node.attr, None)
        if isinstance(found, staticmethod):
            return found.__func__
        if isinstance(found, classmethod) or (isinstance(found, FunctionType) and kind is not owner):
            return MethodType(
                found.__func__ if isinstance(found, classmethod) else found, kind
            )  # its name is that of the class, as when it runs
        return found

    def kind(self, node: ast.expr) -> type | None:
        """The class of an expression's value, if an annotation, the call of a class or the module shows it."""
        if isinstance(node, ast.Name) and node.id in self._kinds:
            return self._kinds[node.id]
        if isinstance(node, ast.Call):
            made = self.value(node.func)
            if f"{type(made).__module__}.{type(made).__qualname__}" in _SESSION_MAKERS:
                made = made.class_
            return made if isinstance(made, type) else None
        value = self.value(node) if isinstance(node, (ast.Name, ast.Attribute)) else None
        return None if value is None else type(value)

    def task(self, node: ast.expr) -> Any:
        """The function that is added as a task; None if the source does not show it."""
        if isinstance(node, ast.Call):  # options(f, …), partial(f, …), a wrapper of another library
            inner = self.task(node.args[0]) if node.args else None
            return inner if inspect.isroutine(inner) else None
        found = self.value(node)
        return found if callable(found) else None

    def remedy(self, call: ast.Call) -> str | None:
        """What to use instead of a call that blocks; None if it does not."""
        found = FUNCTIONS.get(self.dotted(call.func) or "")
        kind = self.kind(call.func.value) if isinstance(call.func, ast.Attribute) else None
        for base in () if found or kind is None else kind.__mro__:
            methods, remedy = METHODS.get(f"{base.__module__}.{base.__qualname__}", ((), ""))
            if getattr(call.func, "attr", None) in methods:
                return remedy
        return found


class Source:
    """The app's own modules, read when they are asked for."""

    def __init__(self) -> None:
        self._modules: dict[str, Module | None] = {}

    def module(self, name: str) -> Module | None:
        """A module of the app; None if it is a library's, or cannot be read."""
        if name not in self._modules:
            self._modules[name] = self._read(name)
        return self._modules[name]

    @staticmethod
    def _read(name: str) -> Module | None:
        module = sys.modules.get(name)
        file = getattr(module, "__file__", None)
        if module is None or not isinstance(file, str) or not file.endswith(".py") or is_library_file(file):
            return None
        try:
            return Module(module)
        except (OSError, SyntaxError, UnicodeDecodeError):
            return None

    def scope(self, func: object) -> Scope | None:
        """The names in a function of the app; None if its source is not to be found, such as a lambda's."""
        inner = inner_function(func)
        module = None if inner is None else self.module(inner.__module__)
        if inner is None or module is None or inner.__code__.co_filename != module.file:
            return None
        found = module.functions.get(inner.__code__.co_firstlineno)
        if found is None:
            return None
        node, name = found
        bound = func.__self__ if isinstance(func, MethodType) else module.owner(name)
        return Scope(module, node, inner, bound if bound is None or isinstance(bound, type) else type(bound))

    def blocking(self, func: Any) -> list[Call]:
        """The calls in an async function that block the event loop, also in the functions that it calls."""
        func = unwrap(func)[0]
        return list(self._blocking(func, _DEEPEST, set())) if is_async(func) else []

    def _blocking(self, func: Any, deep: int, seen: set[FunctionType | None]) -> Iterator[Call]:
        scope = self.scope(func)
        if scope is None or scope.func in seen:
            return
        seen.add(scope.func)
        for call in _own_calls(scope.node):
            remedy = scope.remedy(call)
            if remedy is not None:
                name = scope.dotted(call.func) or ast.unparse(call.func)
                yield Call(scope.module.file, call.lineno, f"{name}()", remedy)
            elif deep:
                for inner in self._blocking(scope.value(call.func), deep - 1, seen):
                    yield Call(inner.file, inner.line, f"{inner.what} in {ast.unparse(call.func)}()", inner.remedy)


def annotated(func: object) -> dict[str, type]:
    """The classes that a function's parameters are annotated with, as far as they can be found."""
    inner = inner_function(func)
    hints = {} if inner is None else annotations_of(inner)
    found = {}
    for name, hint in hints.items():
        hint = getattr(hint, "__origin__", hint) if hasattr(hint, "__metadata__") else hint
        if isinstance(hint, type) and name != "return":
            found[name] = hint
    return found


def annotations_of(func: FunctionType) -> Mapping[str, object]:
    """The annotations of a function, evaluated as far as they can be."""
    for form in ({"eval_str": True}, PARTLY):
        with suppress(Exception):  # a name for type checkers only
            return inspect.get_annotations(func, **form)
    return {}


def argument_kinds(func: object) -> dict[str, str]:
    """What a function's parameters are: `upload`, `request`, `database`, …"""
    return {name: kind_of_class(kind) for name, kind in annotated(func).items()}


def place_of(func: object) -> tuple[str | None, int | None]:
    """The file and line where a function begins."""
    inner = inner_function(func)
    return (None, None) if inner is None else (inner.__code__.co_filename, inner.__code__.co_firstlineno)


def inner_function(func: Any) -> FunctionType | None:
    """The plain function inside what libraries wrapped around it, or of a method."""
    try:
        func = inspect.unwrap(unwrap(func)[0]) if callable(func) else None
    except ValueError:  # without end: a proxy, which makes up any attribute
        return None
    func = func.__func__ if type(func) is MethodType else func
    return func if type(func) is FunctionType else None


def _loaded(dotted: str) -> Any:
    """What an import gives; None if its module is not loaded."""
    if dotted in sys.modules:
        return sys.modules[dotted]
    module, _, name = dotted.rpartition(".")
    return vars(sys.modules[module]).get(name) if module in sys.modules else None


def _imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                yield (alias.asname, alias.name) if alias.asname else (first, first)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _assigned(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Each variable that is assigned an expression, or is the target of a `with`."""
    for each in ast.walk(node):
        pairs: list[tuple[ast.expr | None, ast.expr | None]] = []
        if isinstance(each, ast.Assign):
            pairs = [(target, each.value) for target in each.targets]
        elif isinstance(each, (ast.AnnAssign, ast.NamedExpr)):
            pairs = [(each.target, each.value)]
        elif isinstance(each, (ast.With, ast.AsyncWith)):
            pairs = [(item.optional_vars, item.context_expr) for item in each.items]
        for target, value in pairs:
            if isinstance(target, ast.Name) and value is not None:
                yield target.id, value


def _functions(
    node: ast.AST, owner: str | None = None, outermost: bool = True
) -> Iterator[tuple[_FunctionNode, str | None, bool]]:
    """Every function, the class around it, and whether it is in no other function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _FunctionNode):
            yield child, owner, outermost
            yield from _functions(child, None, False)
        else:
            yield from _functions(child, child.name if isinstance(child, ast.ClassDef) else owner, outermost)


def _first_line(node: _FunctionNode) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def _own_calls(node: ast.AST) -> Iterator[ast.Call]:
    """The calls that run when a function is called: not its decorators', nor those in functions that it defines."""
    for child in node.body if isinstance(node, _FunctionNode) else ast.iter_child_nodes(node):
        if isinstance(child, (_FunctionNode, ast.Lambda, ast.ClassDef)):
            continue
        if isinstance(child, ast.Call):
            yield child
        yield from _own_calls(child)
