"""
What a request has written and not committed when its tasks start or fail, by the sessions that its dependencies gave.

What SQLAlchemy has written is known by its public events; a driver only reports that a transaction is open.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from .._core.dependencies import yields
from .._log import log
from .._text import error_type
from .._versions import is_at_least
from ..events import TaskRun
from ..tasks import code_name
from ._arguments import Found, kind_of, parts

#: Since this FastAPI tasks run before the code after a dependency's `yield`, and `Depends` has a `scope`.
TASKS_COME_FIRST, HAS_SCOPE = (0, 118), (0, 121)

_BEFORE = (
    "it starts while the transaction of {name}, a dependency of its request, is open: it does not see what the request "
    "wrote, and the request's connection is held until it has ended; {remedy}"
)
_UNDOES = (
    "its failure reaches {name}, a dependency of its request, while the transaction is open: what the request wrote is "
    "rolled back, although the client has its response; {remedy}"
)

_WRITES = re.compile(
    r"(\s|--[^\n]*\n|/\*.*?\*/)*"
    r"((insert|update|delete|merge|replace|create|alter|drop|truncate|copy|call|do)\b"
    r"|with\b.*\b(insert\s+into|update\s+\S+\s+set|delete\s+from|merge\s+into)\b)",
    re.IGNORECASE | re.DOTALL,
)

#: SQLAlchemy's connections in whose transaction something has been written, and the connections of its sessions.
_wrote: WeakSet[object] = WeakSet()
_connections: WeakKeyDictionary[object, WeakSet[object]] = WeakKeyDictionary()
_listening: set[str] = set()
_failed: set[str] = set()


class Transactions:
    """
    Looks for transactions of a request that are open while its tasks run.

    Args:
        found: Called for each run that starts, or fails, before one has ended.
    """

    def __init__(self, found: Found) -> None:
        self._found = found

    @staticmethod
    def listen() -> None:
        """Listen to SQLAlchemy's events, if the app has imported it; once per process."""
        engine, orm = sys.modules.get("sqlalchemy.engine"), sys.modules.get("sqlalchemy.orm")
        if hasattr(engine, "Engine") and "engine" not in _listening:
            _listening.add("engine")
            _on("Engine", engine, after_cursor_execute=_executed, commit=_wrote.discard, rollback=_wrote.discard)
        if hasattr(orm, "Session") and "orm" not in _listening:
            _listening.add("orm")
            _on("Session", orm, after_begin=_began)

    def started(self, run: TaskRun) -> None:
        """A run starts its first attempt, or another one."""
        self.listen()  # an app may import SQLAlchemy late
        if run.attempt == 1:
            self._look(run, "runs_before_commit", _BEFORE)

    def failed(self, run: TaskRun) -> None:
        """A run has failed for good."""
        if run.info.on_failure != "contain":
            self._look(run, "undoes_request", _UNDOES)

    def _look(self, run: TaskRun, kind: str, advice: str) -> None:
        if run.queue_wait_s is None:  # user code is the caller
            return
        dependency = next(_open(run), None)
        if dependency is not None:
            self._found(run, kind, None, advice.format(name=code_name(dependency), remedy=remedy(dependency)))


def remedy(dependency: object) -> str:
    """The remedy for a dependency that ends after the tasks."""
    settings = 'Settings(run_after="request") starts tasks after the commit, or not at all'
    if not yields(dependency):
        return settings
    scope = f'Depends({code_name(dependency)}, scope="function") commits before the response'
    return f"{scope}{'' if is_at_least('fastapi', HAS_SCOPE) else ' (FastAPI 0.121 and later)'}; {settings}"


def _open(run: TaskRun) -> Iterator[object]:
    """The dependencies of a request whose transaction is open, the innermost first."""
    if not is_at_least("fastapi", TASKS_COME_FIRST):
        return
    for (dependency, *rest), reference in list(run.request.dependencies.items()):
        value = reference()
        if rest[-1:] != ["function"] and any(_is_open(each) for each in (value, *parts(value))):
            yield dependency


def _is_open(value: Any) -> bool:
    """Whether a session or a connection has uncommitted changes."""
    if kind_of(value) != "database":
        return False
    if not any(base.__module__.startswith("sqlalchemy.") for base in type(value).__mro__):
        return _driver_is_open(value)
    if hasattr(value, "registry"):  # a scoped session stands for the one of this thread or context
        return bool(value.registry.has()) and _is_open(value.registry())
    # An async session or connection is a sync one inside.
    return _has_written(getattr(value, "sync_session", None) or getattr(value, "sync_connection", None) or value)


def _has_written(value: Any) -> bool:
    if value in _wrote or not _wrote.isdisjoint(_connections.get(value, ())):
        return True
    if not hasattr(value, "dirty"):  # a connection
        return False
    return any((*value.new, *value.deleted, *filter(value.is_modified, value.dirty)))


def _driver_is_open(value: Any) -> bool:
    try:
        for name in ("is_in_transaction", "in_transaction"):  # asyncpg; sqlite3, aiosqlite
            if hasattr(type(value), name):
                found: object = getattr(value, name)
                return (found() if callable(found) else found) is True
        # psycopg and libpq: 1 active, 2 in a transaction, 3 in a failed one.
        return bool(value.info.transaction_status in (1, 2, 3)) and getattr(value, "read_only", None) is not True
    except Exception:  # a driver's own word that the connection is closed, or back in its pool
        return False


# --- SQLAlchemy's events


def _on(owner: str, module: ModuleType | None, **listeners: Callable[..., object]) -> None:
    for name, listener in listeners.items():
        sys.modules["sqlalchemy.event"].listen(getattr(module, owner), name, _failing_open(name, listener))


def _failing_open(name: str, listener: Callable[..., object]) -> Callable[..., None]:
    @functools.wraps(listener)
    def called(*args: object) -> None:
        try:
            listener(*args)
        except Exception as error:
            if name not in _failed:
                _failed.add(name)
                log("error", "signal.failed", signal="aftertask.hazards", on=name, error_type=error_type(error))

    return called


def _executed(connection: Any, cursor: object, statement: str, *rest: object) -> None:
    if connection not in _wrote and _WRITES.match(statement) and not _commits_itself(connection):
        _wrote.add(connection)


def _commits_itself(connection: Any) -> bool:
    try:
        return bool(connection.dialect.detect_autocommit_setting(connection.connection.dbapi_connection))
    except Exception:  # an SQLAlchemy before 2.0.43, or a driver that does not show it
        level: object = connection.get_execution_options().get("isolation_level")
        return level == "AUTOCOMMIT"


def _began(session: object, transaction: object, connection: object) -> None:
    _connections.setdefault(session, WeakSet()).add(connection)
