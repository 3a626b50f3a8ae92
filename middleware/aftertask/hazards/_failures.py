"""Failures that come from something that was closed: recognised by the exception."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .._text import error_type

#: How libraries report that something is closed: the name of the exception's class, and its message.
_CLOSED: tuple[tuple[str, str], ...] = (
    (r"ValueError", r"closed file|file is closed|uninitialized stream"),
    (r"sqlalchemy\.exc\.(ResourceClosedError|InvalidRequestError|InterfaceError|OperationalError)", r"clos"),
    (r"sqlalchemy\.orm\.exc\.DetachedInstanceError", r""),
    (r"asyncpg\..*InterfaceError", r"clos|released back"),
    (r"psycopg2?\.(OperationalError|InterfaceError)", r"clos"),
    (r"sqlite3\.ProgrammingError", r"closed"),
    (r"RuntimeError", r"Stream consumed|once a close message|after sending 'websocket\.close'|the handler is closed"),
    (r"RuntimeError", r"response already completed|No response returned|client has been closed|Session is closed"),
    (r"starlette\.requests\.ClientDisconnect", r""),
    (r"starlette\.websockets\.WebSocketDisconnect", r""),
)
_KNOWN = tuple((re.compile(name), re.compile(text, re.IGNORECASE)) for name, text in _CLOSED)

_DETACHED = "sqlalchemy.orm.exc.DetachedInstanceError"
DETACHED = (
    "db_session",
    "it was given a row of a database session that is closed by now: pass its id, and load it in the task",
)


def says_closed(error: BaseException) -> bool:
    """Whether this, or what it comes from, says that something was closed."""
    return any(
        name.fullmatch(error_type(one)) and text.search(_message(one)) for one in _chain(error) for name, text in _KNOWN
    )


def is_detached(error: BaseException) -> bool:
    """Whether a row was used without its session."""
    return any(error_type(one) == _DETACHED for one in _chain(error))


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
