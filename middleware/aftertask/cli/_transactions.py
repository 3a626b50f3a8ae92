"""Dependencies that commit after their `yield`, as their source shows: where, and by what."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .._core.dependencies import yields
from ..hazards._arguments import kind_of_class
from ._source import Scope, Source

#: Methods whose contexts commit at their end: of engines, sessions, connections of asyncpg, pools of psycopg.
_COMMITTING = {"begin", "transaction", "connection"}


@dataclass(frozen=True, slots=True)
class Ending:
    """
    What a dependency does with its transaction after the `yield`.

    Attributes:
        file, line: Where.
        commits: Whether it commits there; else it only closes a session.
    """

    file: str
    line: int
    commits: bool


def ending(source: Source, dependency: object) -> Ending | None:
    """How the transaction of a dependency ends; None if it has none, or its source does not show it."""
    scope = source.scope(dependency)
    if scope is None or not yields(scope.func):
        return None
    file, after, sessions = scope.module.file, 0, list[int]()
    for each, contexts in _inside(scope.node, ()):
        if isinstance(each, (ast.Yield, ast.YieldFrom)):
            after = after or each.lineno
            for context in contexts:
                if (
                    getattr(context.func, "attr", None) in _COMMITTING
                    or scope.dotted(context.func) == "psycopg.connect"
                ):
                    return Ending(file, context.lineno, commits=True)
                if _makes_session(scope, context):
                    sessions.append(context.lineno)
        elif after and isinstance(each, ast.Call) and getattr(each.func, "attr", None) == "commit":
            return Ending(file, each.lineno, commits=True)
    return Ending(file, sessions[0], commits=False) if sessions else None


def commits_by_hand(source: Source, endpoint: object) -> bool:
    """Whether an endpoint calls `commit()` itself."""
    scope = source.scope(endpoint)
    parts = () if scope is None else ast.walk(scope.node)
    return any(isinstance(each, ast.Call) and getattr(each.func, "attr", None) == "commit" for each in parts)


def dependencies_of(dependant: object) -> Iterator[Any]:
    """FastAPI's record of each dependency of an endpoint, and of each that these have."""
    for each in getattr(dependant, "dependencies", ()):
        yield each
        yield from dependencies_of(each)


def late_dependencies(route: object) -> Iterator[Any]:
    """The dependencies of a route that end after its tasks."""
    for dependant in dependencies_of(getattr(route, "dependant", None)):
        if getattr(dependant, "scope", None) != "function":
            yield dependant.call


def _inside(node: ast.AST, contexts: tuple[ast.Call, ...]) -> Iterator[tuple[ast.AST, tuple[ast.Call, ...]]]:
    """What a function does itself, in order, with the calls whose contexts are around it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
            continue
        yield child, contexts
        around = contexts
        if isinstance(child, (ast.With, ast.AsyncWith)):
            around += tuple(item.context_expr for item in child.items if isinstance(item.context_expr, ast.Call))
        yield from _inside(child, around)


def _makes_session(scope: Scope, call: ast.Call) -> bool:
    kind = scope.kind(call)
    return kind is not None and kind_of_class(kind) == "database"
