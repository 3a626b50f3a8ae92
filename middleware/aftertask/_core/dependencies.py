"""What FastAPI's dependencies gave a request, without keeping it alive longer than FastAPI does."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Mapping

from ..tasks import attribute


def yields(dependency: object) -> bool:
    """Whether a dependency has code after a `yield`."""
    calls = (dependency, attribute(dependency, "__wrapped__"), attribute(type(dependency), "__call__"))
    return any(inspect.isgeneratorfunction(call) or inspect.isasyncgenfunction(call) for call in calls)


def references(solved: Mapping[tuple[object, ...], object]) -> dict[tuple[object, ...], Callable[[], object]]:
    """
    References to the values in FastAPI's cache of dependencies, by its keys; each is called for the value, or None.

    A value that was yielded is kept, because its dependency lives until it ends. Any other one may be gone after the
    response, and what cannot be referred to weakly is left out.
    """
    found: dict[tuple[object, ...], Callable[[], object]] = {}
    for key, value in solved.items():
        if yields(key[0]):
            found[key] = functools.partial(_same, value)
        elif type(value).__weakrefoffset__:
            found[key] = weakref.ref(value)
    return found


def _same(value: object) -> object:
    return value
