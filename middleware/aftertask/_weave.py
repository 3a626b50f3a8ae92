"""
A few statements put in front of a function's own, where a call around it would cost too much.

What goes around `Response.__call__` is paid for by every response, with a task or without, and a call is a good part of
what a request without tasks may cost. So the function is compiled anew, from its own source, with our look in front.
"""

from __future__ import annotations

import ast
import inspect
from types import CodeType, FunctionType
from typing import Any

_FUTURE_ANNOTATIONS = annotations.compiler_flag


def woven(function: FunctionType, first: str, **names: object) -> Any:
    """
    The function with `first` as its first statements; None where its source is not to be had, or is not what runs.

    Args:
        function: A method without free variables or decorators, as it is in its class.
        first: What to run first, in terms of the function's parameters.
        names: What else `first` may name.
    """
    try:
        # Lines and columns as in its file, for tracebacks.
        tree = ast.parse(f"if True:\n{inspect.getsource(function)}")
    except (OSError, TypeError, SyntaxError):
        return None
    ast.increment_lineno(tree, function.__code__.co_firstlineno - 2)
    definition: Any = tree.body[0].body[0]  # type: ignore[attr-defined]  # of the `if`
    if getattr(definition, "decorator_list", True):
        return None
    running, again = function.__code__, _compiled(definition, function, {}).__code__
    if again.replace(co_flags=running.co_flags, co_qualname=running.co_qualname) != running:
        return None
    for statement in reversed(ast.parse(first).body):
        for node in ast.walk(statement):
            ast.copy_location(node, definition)
        definition.body.insert(0, statement)
    made = _compiled(definition, function, names)
    for name in ("__qualname__", "__doc__", "__defaults__", "__kwdefaults__", "__annotations__"):
        setattr(made, name, getattr(function, name))
    made.__wrapped__ = function
    return made


def _compiled(definition: Any, function: FunctionType, names: dict[str, object]) -> Any:
    """A function of this definition, in the place of another; `names` are free variables of it."""
    factory: Any = ast.parse(f"def factory({', '.join(names)}): return {definition.name}")
    factory.body[0].body.insert(0, definition)
    running, space = function.__code__, dict[str, Any]()
    flags = running.co_flags & _FUTURE_ANNOTATIONS
    code: CodeType = compile(factory, running.co_filename, "exec", flags, dont_inherit=True)
    exec(code, function.__globals__, space)
    return space["factory"](**names)
