"""Context variables that a task is given: what a sync endpoint bound in its worker thread, which has a copy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import Context, ContextVar, Token, copy_context
from typing import Any

from ._run import _current

# structlog keeps each bound key in a variable of this name, and marks an unbound one by an Ellipsis.
_BOUND = "structlog_"

_MISSING = object()


def bound_keys() -> Mapping[ContextVar[Any], Any] | None:
    """structlog's keys bound in this context; None where there are none."""
    bound = {
        var: value for var, value in copy_context().items() if var.name.startswith(_BOUND) and value is not Ellipsis
    }
    return bound or None


def applied(variables: Mapping[ContextVar[Any], Any] | Context) -> Callable[[], None]:
    """Set these variables in the current context; returns what puts back those that it changed."""
    tokens: list[tuple[ContextVar[Any], Token[Any]]] = []
    for var, value in variables.items():
        if var is not _current and var.get(_MISSING) is not value:
            tokens.append((var, var.set(value)))

    def restore() -> None:
        for var, token in reversed(tokens):
            try:
                var.reset(token)
            except ValueError:  # a coroutine that is closed from another context: that one never had it
                pass

    return restore
