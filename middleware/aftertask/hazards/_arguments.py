"""
Arguments that are dead when the task runs: uploads, requests, database sessions; looked at when it is scheduled.

Most arguments are plain values, told by their type alone. What is true of the others depends on who closes them, and
when: the exit stacks of the FastAPI that serves the request say it (`docs/hazards.md` has the table).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from types import AsyncGeneratorType, FunctionType, GeneratorType, MethodType
from typing import Any

from starlette.background import BackgroundTask
from starlette.requests import Request

from ..events import Scheduled, TaskRun
from ..tasks import unwrap

#: Told with the task's name: the kind, the argument's name, what is wrong and what to do.
Tell = Callable[[TaskRun, str, str, str], None]

#: One level into a container, its first so many elements are looked at.
ELEMENTS = 10

#: So many bytes or characters, or elements, are kept in memory for as long as the run waits: that is worth a word.
LARGE = 10_000_000
MANY = 1_000_000

#: Classes are remembered, so many of them: an app may make them on the fly.
_CLASSES = 5000

_PLAIN = {
    *("builtins.int", "builtins.float", "builtins.bool", "builtins.NoneType", "builtins.complex", "builtins.function"),
    *("builtins.type", "builtins.method", "builtins.builtin_function_or_method", "uuid.UUID", "decimal.Decimal"),
    *("datetime.datetime", "datetime.date", "datetime.timedelta", "pathlib.PosixPath", "enum.EnumType"),
}

#: Told apart from mappings at once: to ask Mapping takes a third of the time that a look may take.
_SEQUENCES = frozenset((list, tuple, set, frozenset))

#: What an argument is, by the full name of its class or of one of its bases.
_UPLOADS = {"starlette.datastructures.UploadFile", "tempfile.SpooledTemporaryFile"}
_DATABASE = {
    *("sqlalchemy.orm.session.Session", "sqlalchemy.ext.asyncio.session.AsyncSession"),
    *("sqlalchemy.orm.scoping.scoped_session", "sqlalchemy.ext.asyncio.scoping.async_scoped_session"),
    *("sqlalchemy.engine.base.Connection", "sqlalchemy.ext.asyncio.engine.AsyncConnection"),
    *("asyncpg.connection.Connection", "asyncpg.pool.PoolConnectionProxy", "psycopg2.extensions.connection"),
    *("psycopg.Connection", "psycopg.AsyncConnection", "aiosqlite.core.Connection", "sqlite3.Connection"),
}

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
DEPENDENCY = (
    "dead_dependency",
    "what the dependency yielded is closed when the task runs ({why}): open what the task needs inside the task",
)
LARGE_ARGUMENT = (
    "large_argument",
    "it holds {size}, which stay in memory until the task has run; pass where it is to be found (a path, a key, an id)",
)

#: What a task that failed with something closed was given, and what to say of it.
_SUSPECTS = {
    "upload": UPLOAD,
    "database": SESSION,
    "request": REQUEST,
    "websocket": WEBSOCKET,
    "response": RESPONSE,
    "generator": STREAM,
}

#: Callables that carry nothing: no closure, no bound arguments, no object.
_BARE = ("type", "builtin_function_or_method")

Verdict = tuple[str, str] | None


def names_of(kind: type) -> set[str]:
    """A class and its bases, by their full names."""
    return {f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__}


def kind_of(kind: type) -> str:
    """What a value of this class is: `plain`, `upload`, `request`, `database`, …, or `other`."""
    names = names_of(kind)
    if f"{kind.__module__}.{kind.__qualname__}" in _PLAIN:
        return "plain"
    for word, known in (("upload", _UPLOADS), ("database", _DATABASE)):
        if names & known:
            return word
    if "starlette.websockets.WebSocket" in names:
        return "websocket"
    if "starlette.requests.Request" in names:
        return "request"
    if "starlette.responses.Response" in names:
        return "response"
    if issubclass(kind, (str, bytes, bytearray)):
        return "text"
    if issubclass(kind, memoryview):
        return "sized"
    if issubclass(kind, (list, tuple, set, frozenset, Mapping)):
        return "container"
    if issubclass(kind, (GeneratorType, AsyncGeneratorType)):
        return "generator"
    if any(isinstance(getattr(base, "nbytes", None), property) for base in kind.__mro__) or hasattr(kind, "nbytes"):
        return "sized"
    return "other"


class Arguments:
    """
    Looks at the arguments of runs that are scheduled.

    Args:
        tell: Told of each that will be dead.
    """

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._kinds: dict[type, str] = {}
        self._harmless: set[type] = set()
        self._plain: set[type] = set()

    def look(self, event: Scheduled) -> None:
        """Look at the arguments of a run that is scheduled."""
        run = event.run
        target = run.target
        if type(target) is not BackgroundTask:
            if isinstance(target, BackgroundTask):
                self._look_at_each(run, target)
            return None
        func = target.func
        bare = type(func) is FunctionType and func.__closure__ is None
        if not bare and type(func).__name__ not in _BARE:
            return self._look_at_each(run, target)
        if not target.kwargs and self._plain.issuperset(map(type, target.args)):
            return None
        kinds, others = self._kinds, False
        given: tuple[Iterable[Any], ...] = (target.args, target.kwargs.values()) if target.kwargs else (target.args,)
        for values in given:
            for value in values:
                kind = kinds.get(type(value)) or self._new(type(value))
                if kind == "plain" or (kind == "text" and len(value) < LARGE):
                    continue
                if kind == "other":
                    others = True
                elif kind != "container" or not self._is_harmless(value):
                    return self._look_at_each(run, target)
        return self._look_at_each(run, target) if others and exits_early(run.request) else None

    def _is_harmless(self, container: Any) -> bool:
        """Whether nothing need be looked at in a container: the usual case, made fast."""
        size, kind = len(container), type(container)
        if size >= MANY:
            return False
        if kind is dict or (kind not in _SEQUENCES and isinstance(container, Mapping)):
            container = container.values()
        return self._harmless.issuperset(map(type, container if size <= ELEMENTS else islice(container, ELEMENTS)))

    def _new(self, kind: type) -> str:
        if len(self._kinds) >= _CLASSES:
            self._kinds.clear()
            self._harmless.clear()
            self._plain.clear()
        found = self._kinds[kind] = kind_of(kind)
        if found in ("plain", "text"):
            self._harmless.add(kind)
        if found == "plain":
            self._plain.add(kind)
        return found

    def _look_at_each(self, run: TaskRun, target: Any) -> None:
        life = Life(run)
        for place, value in _given(target):
            found = self._verdict(value, life) or self._inside(value, life)
            if found is not None:
                kind, advice = found
                self._tell(run, kind, _name(target.func, place), advice)

    def suspects(self, run: TaskRun) -> Iterator[tuple[str | None, str, str]]:
        """For a task that failed with something closed: the arguments that may be it, as name, kind and advice."""
        target: Any = run.target
        if not isinstance(target, BackgroundTask):
            return
        for place, value in _given(target):
            kind = self._kinds.get(type(value)) or self._new(type(value))
            verdict = _SUSPECTS.get(kind)
            if verdict is not None:
                kind, advice = verdict
                yield _name(target.func, place), kind, advice.format(why="it failed with that")

    def _inside(self, value: Any, life: Life) -> Verdict:
        """The first finding in a container's elements."""
        if self._kinds.get(type(value)) != "container":
            return None
        elements: Iterable[Any] = value.values() if isinstance(value, Mapping) else value
        for element in islice(elements, ELEMENTS):
            found = self._verdict(element, life)
            if found is not None:
                return found
        return None

    def _verdict(self, value: Any, life: Life) -> Verdict:
        kind = self._kinds.get(type(value)) or self._new(type(value))
        if kind in ("plain", "container", "text", "sized"):
            return _large(value, kind)
        if kind == "upload":
            return life.upload(value)
        if kind == "request":
            return REQUEST
        if kind == "websocket":
            return WEBSOCKET
        if kind == "response":
            return RESPONSE if hasattr(value, "body_iterator") else None
        if kind == "generator":
            code = getattr(value, "ag_code", None)
            return STREAM if code is Request.stream.__code__ else None
        if kind == "database":
            return life.session(value)
        return life.dependency(value)


def exits_early(request: Any) -> bool:
    """Whether anything of this request is closed before its response is sent."""
    scope = getattr(request, "scope", None) or {}
    stack = scope.get("fastapi_function_astack") or getattr(request, "exits", None)
    return bool(getattr(stack, "_exit_callbacks", None))


class Life:
    """
    How long things live in the request that schedules a run.

    FastAPI puts what will be closed on exit stacks. Since 0.118 there are two in the scope, one that is left before the
    response is sent (`scope="function"`), one after its tasks; from 0.106 to 0.117 all was left before the response.
    """

    def __init__(self, run: TaskRun) -> None:
        request: Any = run.request
        self._scope: Mapping[str, Any] = getattr(request, "scope", None) or {}
        self._alive = "fastapi_inner_astack" in self._scope
        self._fastapi = self._alive or type(self._scope.get("route")).__module__.startswith("fastapi")
        self._stack = self._scope.get("fastapi_function_astack") if self._alive else getattr(request, "exits", None)
        self._yielded: list[Any] | None = None

    def upload(self, value: Any) -> Verdict:
        """An upload is closed after the tasks since FastAPI 0.118, before the response until then."""
        file = getattr(value, "file", value)
        if getattr(file, "closed", False):
            return _because(UPLOAD, "it is closed already")
        if self._fastapi and not self._alive:
            return _because(UPLOAD, f"{_fastapi()} closes it before the response; 0.118 and later do after the tasks")
        return None

    def session(self, value: Any) -> Verdict:
        """A session or connection is dead where its dependency exits before the response, or it says that it is."""
        if _says_closed(value):
            return _because(SESSION, "it is closed already")
        if self._fastapi and not self._alive and self._stack is None:
            return _because(SESSION, _left_early())  # of a response that brought its task along
        return self._before_response(value, SESSION)

    def dependency(self, value: Any) -> Verdict:
        """Anything else is dead where a dependency yielded it, or what it holds, that exits before the response."""
        return self._before_response(value, DEPENDENCY)

    def _before_response(self, value: Any, verdict: tuple[str, str]) -> Verdict:
        if self._yielded is None:
            self._yielded = list(_held_by(self._stack))
        if not self._yielded:
            return None
        held = {id(one) for one in self._yielded}
        if id(value) not in held and not any(id(part) in held for part in _parts(value)):
            return None
        why = 'its dependency has scope="function", so it exits before the response' if self._alive else _left_early()
        return _because(verdict, why)


def _because(verdict: tuple[str, str], why: str) -> Verdict:
    return verdict[0], verdict[1].format(why=why)


def _left_early() -> str:
    return f"{_fastapi()} leaves dependencies with yield before the response; 0.118 and later do after the tasks"


def _fastapi() -> str:
    return f"FastAPI {getattr(sys.modules.get('fastapi'), '__version__', '')}".rstrip()


def _held_by(stack: Any) -> Iterator[Any]:
    """What the generators on an exit stack hold in their variables: among it is what they yielded."""
    for entry in getattr(stack, "_exit_callbacks", ()):
        callback = entry[1] if isinstance(entry, tuple) else entry
        yield from _held_in(getattr(callback, "__self__", None), 5)


def _held_in(manager: Any, depth: int) -> Iterator[Any]:
    generator = getattr(manager, "gen", None)
    frame = getattr(generator, "ag_frame", None) or getattr(generator, "gi_frame", None)
    if frame is None or depth == 0:
        return
    for value in list(frame.f_locals.values()):
        if hasattr(value, "gen"):  # a context manager around the dependency's own
            yield from _held_in(value, depth - 1)
        elif not isinstance(value, (str, int, float, bool, bytes, type, type(None))):
            yield value


def _parts(value: Any) -> Iterable[Any]:
    """What an object of the app's holds: a repository around a session is as dead as the session."""
    return list(getattr(value, "__dict__", {}).values())[: 2 * ELEMENTS]


def _says_closed(value: Any) -> bool:
    for name in ("closed", "is_closed"):
        said = getattr(type(value), name, None)
        if said is not None:
            answer = getattr(value, name)
            try:
                answer = answer() if callable(answer) else answer
            except Exception:  # asyncpg's proxy, once it was given back to its pool
                return True
            return bool(answer)
    return False


def _large(value: Any, kind: str) -> Verdict:
    if kind == "container":
        size = len(value)
        return _because_large(f"{size:,} elements") if size >= MANY else None
    size = value.nbytes if kind == "sized" else len(value) if kind == "text" else 0
    if not isinstance(size, int) or size < LARGE:
        return None
    return _because_large(f"{size / 1e6:,.0f} MB")


def _because_large(size: str) -> Verdict:
    return LARGE_ARGUMENT[0], LARGE_ARGUMENT[1].format(size=size)


def _given(target: Any) -> Iterator[tuple[int | str, Any]]:
    """What a task is given, with the place of each: its number or name; what a closure, partial or method holds too."""
    func, _ = target.func, None
    while hasattr(func, "func") and hasattr(func, "keywords"):  # functools.partial
        yield from ((number, value) for number, value in enumerate(func.args))
        yield from func.keywords.items()
        func = func.func
    func = unwrap(func)[0]
    if isinstance(func, MethodType):
        yield "self", func.__self__
    closure = getattr(func, "__closure__", None)
    if closure:
        for name, cell in zip(func.__code__.co_freevars[:ELEMENTS], closure, strict=False):
            try:
                yield name, cell.cell_contents
            except ValueError:  # not assigned yet
                continue
    yield from enumerate(getattr(target, "args", ()))
    yield from getattr(target, "kwargs", {}).items()


def _name(func: Any, place: int | str) -> str:
    """An argument's name, as the function has it."""
    if isinstance(place, str):
        return place
    try:
        parameters = list(inspect.signature(func).parameters.values())
    except (TypeError, ValueError):  # a builtin that does not say
        return f"argument {place + 1}"
    if place < len(parameters) and parameters[place].kind is not inspect.Parameter.VAR_POSITIONAL:
        return parameters[place].name
    last = next((one.name for one in parameters if one.kind is inspect.Parameter.VAR_POSITIONAL), None)
    return f"argument {place + 1}" if last is None else f"*{last}"
