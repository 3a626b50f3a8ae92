"""
Arguments that are dead when the task runs: uploads, requests, closed sessions; looked at when the run is scheduled.

Only an argument, or an element of a plain container, is looked at. What an object merely holds is looked at when the
run has failed with something closed: most objects that hold a session never use it in the task.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import chain, islice
from types import (
    AsyncGeneratorType,
    FunctionType,
    GeneratorType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodType,
)
from typing import Any

from starlette.background import BackgroundTask
from starlette.requests import Request

from .._signatures import signature_of
from .._versions import version_of
from ..events import Scheduled, TaskRun
from ..tasks import attribute, closure_of, flattened, without_options

#: Called with the run, the kind, the argument's name if there is one, and the advice.
Found = Callable[[TaskRun, str, str | None, str], object]

#: At most this many elements of a container, or parts of an object, are looked at.
ELEMENTS = 10

#: Bytes or characters, and elements, above which an argument is worth a word: it stays in memory until the run ends.
LARGE = 10_000_000
MANY = 1_000_000

#: At most this many classes are remembered: an app may create them on the fly.
_CLASSES = 5000

#: What an argument is, by the full name of its class or of one of its bases.
_KINDS = {
    "upload": {"starlette.datastructures.UploadFile", "tempfile.SpooledTemporaryFile"},
    "database": {
        *("sqlalchemy.orm.session.Session", "sqlalchemy.ext.asyncio.session.AsyncSession"),
        *("sqlalchemy.orm.scoping.scoped_session", "sqlalchemy.ext.asyncio.scoping.async_scoped_session"),
        *("sqlalchemy.engine.base.Connection", "sqlalchemy.ext.asyncio.engine.AsyncConnection"),
        *("asyncpg.connection.Connection", "asyncpg.pool.PoolConnectionProxy", "psycopg2.extensions.connection"),
        *("psycopg.Connection", "psycopg.AsyncConnection", "aiosqlite.core.Connection", "sqlite3.Connection"),
    },
    "websocket": {"starlette.websockets.WebSocket"},
    "request": {"starlette.requests.Request"},
    "response": {"starlette.responses.Response"},
}
_PLAIN = (int, float, complex, bool, type(None))

UPLOAD = (
    "closed_upload",
    "the upload is closed when the task runs ({why}): read it in the endpoint (`data = await file.read()`) and pass "
    "the bytes, or copy it to a file of your own and pass the path",
)
REQUEST = (
    "request_scoped",
    "the request is over when the task runs: its body cannot be read any more, and it keeps all that belongs to it in "
    "memory; pass what the task needs of it (`request.url.path`, `request.state.user`)",
)
WEBSOCKET = (
    "request_scoped",
    "the connection is closed when the task runs, so nothing can be sent or received; pass what the task needs of it",
)
STREAM = (
    "request_scoped",
    "the request's body cannot be read any more when the task runs; read it in the endpoint and pass the bytes",
)
RESPONSE = (
    "response_stream",
    "the response has been sent when the task runs, and its stream is used up; pass what the task needs of its content",
)
SESSION = (
    "db_session",
    "the database session is closed when the task runs ({why}): open one inside the task, and pass ids instead of rows",
)
LARGE_ARGUMENT = (
    "large_argument",
    "it holds {size}, which stay in memory until the task has run; pass where it is to be found (a path, a key, an id)",
)


#: What a task that failed with something closed was given, and the advice.
_SUSPECTS = {
    "upload": UPLOAD,
    "database": SESSION,
    "request": REQUEST,
    "websocket": WEBSOCKET,
    "response": RESPONSE,
    "generator": STREAM,
}

Verdict = tuple[str, str] | None


def kind_of(value: object) -> str:
    """The kind of a value: `plain`, `text`, `container`, `upload`, `request`, `database`, …, or `other`."""
    return kind_of_class(type(value))  # type: ignore[arg-type]  # mypy does not know that a class has a hash


@functools.lru_cache(_CLASSES)
def kind_of_class(kind: type) -> str:
    """The kind of a class's values, in the same words."""
    names = {f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__}
    for word, known in _KINDS.items():
        if names & known:
            return word
    if issubclass(kind, _PLAIN):
        return "plain"
    if issubclass(kind, (str, bytes, bytearray)):
        return "text"
    if issubclass(kind, (list, tuple, set, frozenset, Mapping)):
        return "container"
    if issubclass(kind, (GeneratorType, AsyncGeneratorType)):
        return "generator"
    return "sized" if isinstance(inspect.getattr_static(kind, "nbytes", None), _DESCRIPTORS) else "other"


#: How classes declare `nbytes`: in Python, or in C.
_DESCRIPTORS = (property, GetSetDescriptorType, MemberDescriptorType)


class Arguments:
    """
    Looks at the arguments of runs.

    Args:
        found: Called for each argument that will be dead.
    """

    def __init__(self, found: Found) -> None:
        self._found = found

    def look(self, event: Scheduled) -> None:
        """Look at the arguments of a run that is scheduled."""
        target = event.run.target
        if not isinstance(target, BackgroundTask) or "func" not in vars(target):
            return
        given = _Given(target)
        for place, value in given.items():
            verdict = self._verdict(value, event.run) or self._inside(value, event.run)
            if verdict is not None:
                kind, advice = verdict
                self._found(event.run, kind, given.name(place), advice)

    def suspect(self, run: TaskRun, kinds: Collection[str]) -> tuple[str | None, str, str] | None:
        """Name, kind and advice of the first argument of these kinds, if a run failed because something is closed."""
        target = run.target
        if not isinstance(target, BackgroundTask) or "func" not in vars(target):
            return None
        given = _Given(target)
        for place, value in given.items():
            for each in (value, *parts(value)):
                if kind_of(each) in kinds:
                    kind, advice = _SUSPECTS[kind_of(each)]
                    return given.name(place), kind, advice.format(why="it failed with that")
        return None

    def _inside(self, value: Any, run: TaskRun) -> Verdict:
        """The first finding among a container's elements."""
        if kind_of(value) != "container":
            return None
        elements: Iterable[object] = value.values() if isinstance(value, Mapping) else value
        found = (self._verdict(element, run) for element in islice(elements, ELEMENTS))
        return next((verdict for verdict in found if verdict is not None), None)

    def _verdict(self, value: Any, run: TaskRun) -> Verdict:
        match kind_of(value):
            case "plain" | "other":
                return None
            case "request":
                return REQUEST
            case "websocket":
                return WEBSOCKET
            case "response":
                return RESPONSE if "body_iterator" in vars(value) else None
            case "generator":
                is_stream = isinstance(value, AsyncGeneratorType) and value.ag_code is Request.stream.__code__
                return STREAM if is_stream else None
            case "upload":
                return _upload(value, run)
            case "database":
                return _because(SESSION, why="it is closed already") if _is_closed(value) else None
            case kind:
                return _large(value, kind)


class _Given:
    """The values that a task's function gets, through `functools.partial`, `options`, methods and closures."""

    def __init__(self, task: BackgroundTask) -> None:
        func, self._args, self._kwargs = flattened(without_options(task.func), task.args, task.kwargs)
        self._func = func
        self._held: dict[str, object] = {}
        if isinstance(func, MethodType):
            self._held["self"] = func.__self__
        elif type(func) is FunctionType and "<locals>" in func.__qualname__:
            self._held = dict(islice(closure_of(func).items(), ELEMENTS))

    def items(self) -> Iterable[tuple[int | str, object]]:
        """Each value with its position or name."""
        return chain(self._held.items(), enumerate(self._args), self._kwargs.items())

    def name(self, place: int | str) -> str:
        """The argument's name in the function's signature."""
        if isinstance(place, str):
            return place
        try:
            parameters = list(signature_of(self._func).parameters.values())
        except ValueError:  # a builtin without a signature
            return f"argument {place + 1}"
        positional = [
            each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
        ]
        if place < len(positional):
            return positional[place]
        rest = next((each.name for each in parameters if each.kind is each.VAR_POSITIONAL), None)
        return f"argument {place + 1}" if rest is None else f"*{rest}"


def _upload(value: object, run: TaskRun) -> Verdict:
    """Since FastAPI 0.118 an upload is closed after the tasks; in earlier versions, before the response."""
    file = attribute(value, "file")
    if attribute(value if file is None else file, "closed") is True:
        return _because(UPLOAD, why="it is closed already")
    scope = run.request.scope or {}
    is_fastapis = type(scope.get("route")).__module__.startswith("fastapi")
    if is_fastapis and "fastapi_inner_astack" not in scope:
        version = version_of("fastapi")
        why = f"FastAPI {version} closes it before the response; 0.118 and later do after the tasks"
        return _because(UPLOAD, why=why)
    return None


def _is_closed(value: object) -> bool:
    """Whether a session or connection reports that it is closed."""
    for name in ("closed", "is_closed"):
        if attribute(type(value), name) is not None:
            try:
                answer = getattr(value, name)
                return bool(answer() if callable(answer) else answer)
            except Exception:  # asyncpg's proxy, once it has been returned to its pool
                return True
    return False


def parts(value: object) -> list[object]:
    """The attributes of one of the app's objects."""
    held = attribute(value, "__dict__")
    return list(held.values())[: 2 * ELEMENTS] if isinstance(held, dict) else []


def _because(verdict: tuple[str, str], **words: str) -> Verdict:
    return verdict[0], verdict[1].format(**words)


def _large(value: Any, kind: str) -> Verdict:
    if kind == "container":
        size = len(value)
        return _because(LARGE_ARGUMENT, size=f"{size:,} elements") if size >= MANY else None
    size = value.nbytes if kind == "sized" else len(value)
    if not isinstance(size, int) or size < LARGE:
        return None
    return _because(LARGE_ARGUMENT, size=f"{size / 1e6:,.0f} MB")
