"""What can be said of an app without running it: its settings, its tasks, and what is wrong or risky."""

from __future__ import annotations

import fnmatch
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import starlette
from starlette.background import BackgroundTasks
from starlette.websockets import WebSocket

from .._core.route import with_included
from .._text import is_library_file
from ..policies import Policy, PolicyBook
from ..settings import Settings, disabled
from ..tasks import code_name, is_async, registered_tasks, registration, unwrap
from ._source import Added, Module, Source, annotated, argument_kinds, place_of

Severity = Literal["note", "warning", "error"]

_READ = "read it in the endpoint (`data = await file.read()`) and pass the bytes"
_OPEN = "open a session inside the task, and pass ids in the place of rows"

#: Before this FastAPI closed uploads and left dependencies with yield before the response.
_ALIVE_SINCE = (0, 118)


@dataclass(frozen=True, slots=True)
class Finding:
    """
    Something that is wrong or risky.

    Attributes:
        kind: As in `docs/hazards.md`.
        severity: `error`: does not work; `warning`: will fail or hurt some day; `note`: worth a thought.
        message, remedy: What it is and what to do, in words.
        file, line: Where; None where it is about the whole app.
        task: The task's name; None likewise.
    """

    kind: str
    severity: Severity
    message: str
    remedy: str
    file: str | None = None
    line: int | None = None
    task: str | None = None


class Subject:
    """
    An app, looked at.

    Args:
        app: The ASGI app.
        workers: How many processes will serve it.
        build: Makes its middleware of the arguments that it was added with, to hear what is wrong with them.
    """

    def __init__(self, app: Any, workers: int = 1, build: Callable[..., object] | None = None) -> None:
        self.app, self.workers, self.source = app, workers, Source()
        found = list(_routes(getattr(app, "routes", None)))
        self.paths, self.routes = [path for path, _ in found], [route for _, route in found]
        self.layers = _layers(app)
        self.settings: Settings | None = None
        self.mistake: str | None = None
        ours = [given for kind, given in self.layers if kind == "AftertaskMiddleware"]
        if ours:
            try:
                if build is not None:
                    build(**ours[-1])
                self.settings = ours[-1].get("settings") or Settings.from_env()
            except (TypeError, ValueError) as error:
                self.mistake = str(error)
        self.added = [one for module in self.modules() for one in module.added()]
        self._book = PolicyBook(self.settings.policies if self.settings is not None else {})
        self.functions: dict[str, Any] = {}
        for one in self.added:
            if callable(one.func):
                self.functions.setdefault(self.name(one.func), one.func)
        for module in list(sys.modules.values()):
            for value in list(vars(module).values()) if self.source.module(module.__name__) else ():
                if registration(value) is not None:
                    self.functions.setdefault(self.name(value), value)
        self.known = {entry.name for entry in registered_tasks()} | set(self.functions)
        self.tasks = sorted(self.known | set(self._book.named))

    def name(self, func: Any) -> str:
        """A task's name."""
        entry = registration(unwrap(func)[0])
        return entry.name if entry is not None else code_name(func)

    def policy(self, name: str) -> Policy:
        """What is in force for a task."""
        declared = next((entry.policy for entry in registered_tasks() if entry.name == name), None)
        return self._book.policy(name, None, declared)

    def modules(self) -> Iterator[Module]:
        """The app's own modules."""
        for name in list(sys.modules):
            module = self.source.module(name)
            if module is not None:
                yield module


def findings(subject: Subject) -> Iterator[Finding]:
    """Everything that is wrong or risky."""
    if subject.mistake is not None:
        yield Finding("settings", "error", subject.mistake, "correct it: the app does not start with it")
        return
    if subject.settings is None:
        yield Finding(
            "not_added",
            "error",
            "the app has no AftertaskMiddleware",
            "app.add_middleware(AftertaskMiddleware); a plain ASGI app is wrapped: AftertaskMiddleware(app)",
        )
    if disabled():
        yield Finding(
            "disabled",
            "warning",
            "AFTERTASK_DISABLED is set: nothing is observed, and no policy is in force",
            "take the variable away",
        )
    yield from _of_app(subject)
    for name, func in sorted(subject.functions.items()):
        yield from _of_task(subject, name, func)
    yield from _unused_containers(subject)
    seen: set[tuple[str | None, int | None, str, str]] = set()
    for added in subject.added:
        for one in _of_call(subject, added):
            key = (one.file, one.line, one.kind, one.message)
            if key not in seen:
                seen.add(key)
                yield one


# --- the app


def _of_app(subject: Subject) -> Iterator[Finding]:
    kinds = [kind for kind, _ in subject.layers]
    if kinds.count("AftertaskMiddleware") > 1:
        yield Finding(
            "added_twice",
            "warning",
            "AftertaskMiddleware is added twice",
            "remove one of the two: the inner one observes",
        )
    if "AftertaskMiddleware" in kinds:
        below = kinds[kinds.index("AftertaskMiddleware") + 1 :]
        if "OpenTelemetryMiddleware" in below:
            yield Finding(
                "middleware_order",
                "warning",
                "OpenTelemetry's middleware is inside aftertask's, so a task's span is no child of the request's",
                "add it after AftertaskMiddleware: what is added last is outermost",
            )
    stacked = sum(kind == "BaseHTTPMiddleware" for kind in kinds)
    if stacked >= 3 and _version(starlette.__version__) < (1, 7):
        yield Finding(
            "started_early",
            "warning",
            f"{stacked} BaseHTTPMiddleware on Starlette {starlette.__version__}: tasks start too early",
            "update Starlette to 1.7, or write them as plain ASGI middleware",
        )
    settings = subject.settings
    for pattern in () if settings is None else settings.policies:
        if not fnmatch.filter(subject.known, pattern):
            yield Finding(
                "unused_policy",
                "note",
                f"Settings.policies has {pattern!r}, and no task that is known here is called that",
                "correct it, unless the task is one that only the running app knows",
            )
    path = None if settings is None else settings.metrics_path
    if path is not None and any(each.rstrip("/") == path for each in subject.paths):
        yield Finding(
            "metrics_path",
            "warning",
            f"the app serves {path} itself, so aftertask does not answer there",
            "have that route tell Settings.registry too, or choose another Settings.metrics_path",
        )
    if subject.workers > 1 and not os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        yield Finding(
            "several_workers",
            "warning",
            f"{subject.workers} workers without PROMETHEUS_MULTIPROC_DIR: a scrape sees one of them at a time",
            "set PROMETHEUS_MULTIPROC_DIR to an empty directory that all workers share",
        )
    for route in subject.routes:
        endpoint = getattr(route, "endpoint", None)
        given = list(annotated(endpoint).values()) if callable(endpoint) else []
        if all(any(issubclass(kind, wanted) for kind in given) for wanted in (WebSocket, BackgroundTasks)):
            file, line = place_of(endpoint)
            yield Finding(
                "websocket",
                "error",
                f"{code_name(endpoint)} is a WebSocket endpoint with BackgroundTasks, which FastAPI never runs",
                "await the function there, or start it in a task group of your own",
                file,
                line,
            )


def _unused_containers(subject: Subject) -> Iterator[Finding]:
    for module in subject.modules():
        for line, name in module.unused_containers():
            yield Finding(
                "unused_container",
                "error",
                f"{name!r} gets tasks and is given to no response, so they never run",
                "take `tasks: BackgroundTasks` as the endpoint's parameter, or pass it to a response as `background=`",
                module.file,
                line,
            )


# --- its tasks


def _of_task(subject: Subject, name: str, func: Any) -> Iterator[Finding]:
    inner = unwrap(func)[0]
    file, line = place_of(inner)
    where_to_write = "@task(timeout=…)"
    if file is None or is_library_file(file):  # a finding points to the user's own line
        added = next((one for one in subject.added if one.func is not None and unwrap(one.func)[0] is inner), None)
        file, line = (None, None) if added is None else (added.file, added.line)
        where_to_write = f'options(…, timeout=…) here, or Settings(policies={{"{name}": Policy(timeout=…)}})'
    if inspect.isgeneratorfunction(inner) or inspect.isasyncgenfunction(inner):
        yield Finding(
            "generator",
            "error",
            f"{name} is a generator function: as a task it does nothing",
            "loop over it in a function, and add that",
            file,
            line,
            name,
        )
    elif any(getattr(route, "endpoint", None) is inner for route in subject.routes):
        yield Finding(
            "response_returned",
            "warning",
            f"{name} is an endpoint and given as a task: its answer goes nowhere",
            "add the function that does the work",
            file,
            line,
            name,
        )
    policy = subject.policy(name)
    if policy.executor in (None, "auto"):
        for call in subject.source.blocking(inner):
            yield Finding(
                "blocked_loop",
                "warning",
                f"{name} is async and calls {call.what}, which blocks the event loop: every request waits",
                f"{call.remedy}; or make the task a plain def, which runs in a thread",
                call.file,
                call.line,
                name,
            )
    for argument, kind in argument_kinds(inner).items():
        if kind in ("request", "websocket"):
            yield Finding(
                "request_scoped",
                "warning",
                f"{name} takes {argument!r}, a {kind}, which is over when it runs",
                "pass what the task needs of it",
                file,
                line,
                name,
            )
    if policy.timeout is None:
        async_ = is_async(inner)
        yield Finding(
            "no_timeout",
            "note",
            f"{name} has no timeout: a run that hangs is reported as stuck, and never ended",
            where_to_write + ("" if async_ else "; a sync task past it is abandoned, its thread cannot be stopped"),
            file,
            line,
            name,
        )


def _of_call(subject: Subject, added: Added) -> Iterator[Finding]:
    """What a task is given where it is scheduled: the parameters of the endpoint around it."""
    if added.by is None:
        return
    name = subject.name(added.func) if callable(added.func) else "the task"
    kinds = argument_kinds(added.by)
    for _, variable in added.arguments:
        if variable is None:
            continue
        kind = kinds.get(variable)
        early = _exits_early(added.by, variable)
        if kind == "upload" and not _alive():
            yield Finding(
                "closed_upload",
                "error",
                f"{name} is given the upload {variable!r}, which {_fastapi()} closes before the response",
                f"{_READ}; or update FastAPI to 0.118",
                added.file,
                added.line,
                name,
            )
        elif early is not None:
            session = kind == "database"
            yield Finding(
                "db_session" if session else "dead_dependency",
                "error",
                f"{name} is given {variable!r}, which is closed when it runs: {early}",
                _OPEN if session else "open what the task needs inside the task",
                added.file,
                added.line,
                name,
            )


def _exits_early(func: Any, parameter: str) -> str | None:
    """Why what a dependency yields to this parameter is closed before the response; None where it is not."""
    try:
        found = inspect.signature(func, eval_str=True).parameters.get(parameter)
    except Exception:  # a name for type checkers only
        found = inspect.signature(func).parameters.get(parameter)
    if found is None:
        return None
    for depends in (found.default, *getattr(found.annotation, "__metadata__", ())):
        call = getattr(depends, "dependency", None)
        if call is None or not (inspect.isgeneratorfunction(call) or inspect.isasyncgenfunction(call)):
            continue
        if not _alive():
            return f"{_fastapi()} leaves dependencies with yield before the response"
        if getattr(depends, "scope", None) == "function":
            return 'its dependency has scope="function"'
    return None


def _alive() -> bool:
    return _version(getattr(sys.modules.get("fastapi"), "__version__", "1")) >= _ALIVE_SINCE


def _fastapi() -> str:
    return f"FastAPI {getattr(sys.modules.get('fastapi'), '__version__', '')}".rstrip()


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())


# --- how an app is put together


def _routes(routes: Iterable[Any] | None, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Every route with its path, prefixes of mounts included."""
    for route in with_included(routes or ()):
        path = f"{prefix}{getattr(route, 'path', '') or ''}"
        yield path, route
        if depth < 10:
            yield from _routes(getattr(route, "routes", None), path, depth + 1)


def _layers(app: Any) -> list[tuple[str, dict[str, Any]]]:
    """The middleware around an app, outermost first: its class's name, or a base's that counts, and its arguments."""
    found: list[tuple[str, dict[str, Any]]] = []
    for _ in range(100):
        kind = type(app)
        if kind.__name__ == "AftertaskMiddleware":
            found.append((_known(kind), {"settings": getattr(app, "settings", None)}))
        for layer in getattr(app, "user_middleware", ()):
            cls = getattr(layer, "cls", None)
            if isinstance(cls, type):
                found.append((_known(cls), dict(getattr(layer, "kwargs", getattr(layer, "options", {})))))
        app = getattr(app, "app", None)
        if app is None:
            break
    return found


def _known(cls: type) -> str:
    names = [base.__name__ for base in cls.__mro__]
    return next(
        (name for name in ("AftertaskMiddleware", "OpenTelemetryMiddleware", "BaseHTTPMiddleware") if name in names),
        cls.__name__,
    )
