"""Failures that come from something that was closed: recognised by the exception."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from .._text import error_type
from ..policies import PolicyOptions

#: How libraries report that something is closed: the name of the exception's class, its message, and the kinds of
#: arguments (`kind_of`) that it can come from.
_CLOSED: tuple[tuple[str, str, frozenset[str]], ...] = (
    (r"ValueError", r"closed file|file is closed|uninitialized stream", frozenset({"upload"})),
    (r"sqlalchemy\.exc\.(ResourceClosed|InvalidRequest|Interface|Operational)Error", r"clos", frozenset({"database"})),
    (r"sqlalchemy\.orm\.exc\.DetachedInstanceError", r"", frozenset({"database"})),
    (r"asyncpg\..*InterfaceError", r"clos|released back", frozenset({"database"})),
    (r"psycopg2?\.(OperationalError|InterfaceError)", r"clos", frozenset({"database"})),
    (r"sqlite3\.ProgrammingError", r"closed", frozenset({"database"})),
    (r"ValueError", r"no active connection", frozenset({"database"})),
    (r"RuntimeError", r"the handler is closed", frozenset({"database"})),
    (r"RuntimeError", r"Stream consumed", frozenset({"request", "generator"})),
    (r"starlette\.requests\.ClientDisconnect", r"", frozenset({"request", "generator"})),
    (r"RuntimeError", r"once a close message|after sending 'websocket\.close'", frozenset({"websocket"})),
    (r"RuntimeError", r"WebSocket is not connected", frozenset({"websocket"})),
    (r"starlette\.websockets\.WebSocketDisconnect", r"", frozenset({"websocket"})),
    (r"RuntimeError", r"response already completed|No response returned", frozenset({"response", "request"})),
)

#: What Python says of a call with a keyword that the function does not take.
_UNEXPECTED = re.compile(r"unexpected keyword argument '(\w+)'")

_DETACHED = "sqlalchemy.orm.exc.DetachedInstanceError"
DETACHED = (
    "db_session",
    "it was given a row of a database session that is closed by now: pass its id, and load it in the task",
)


def closed_kinds(error: BaseException) -> frozenset[str]:
    """The kinds of arguments that may be closed, judging by this error and its causes; empty if none."""
    return frozenset().union(
        *(
            kinds
            for one in _chain(error)
            for name, text, kinds in _CLOSED
            if re.fullmatch(name, error_type(one)) and re.search(text, _message(one), re.IGNORECASE)
        )
    )


def is_detached(error: BaseException) -> bool:
    """Whether a row was used without its session."""
    return any(error_type(one) == _DETACHED for one in _chain(error))


def misplaced_option(error: BaseException, given: object) -> str | None:
    """The advice if `add_task` was given an option of the task and passed it to the function; otherwise None."""
    found = _UNEXPECTED.search(_message(error)) if type(error) is TypeError else None
    if found is None or not isinstance(given, Mapping) or found[1] not in given:
        return None
    name = found[1]
    if name not in PolicyOptions.__annotations__ or name in ("name", "owner"):  # these belong to @task, not to a call
        return None
    write = f"add_task(options(func, {name}=…), …)"
    return f"add_task passes {name} to the function; an option of the task is set with {write}"


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen and len(seen) < 10:
        seen.add(id(one))
        yield one
        one = one.__cause__ or one.__context__


def _message(error: BaseException) -> str:
    try:
        return str(error)[:1000]
    except Exception:  # its own __str__ fails
        return ""
