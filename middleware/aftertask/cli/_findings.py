"""The rules of `aftertask check`: what is wrong or risky in an app."""

from __future__ import annotations

import contextlib
import inspect
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Literal

from starlette.routing import WebSocketRoute

from .._core.dependencies import yields
from .._core.resolver import HIDDEN, UNHIDE, is_opaque
from .._mistakes import mistakes
from .._signatures import signature_of
from .._text import is_library_file
from .._versions import is_at_least, version_of
from ..hazards._transactions import TASKS_COME_FIRST, remedy
from ..journal.file import connect
from ..settings import disabled
from ..tasks import code_name, hidden_task, is_async, unwrap
from ._source import Added, annotations_of, argument_kinds, inner_function, place_of
from ._subject import Subject
from ._transactions import commits_by_hand, dependencies_of, ending, late_dependencies

Severity = Literal["note", "warning", "error"]

_READ = "read it in the endpoint (`data = await file.read()`) and pass the bytes; or update FastAPI to 0.118"
_OPEN = "open a session inside the task, and pass ids instead of rows"
_TAKE = "take `tasks: BackgroundTasks` as the endpoint's parameter, or pass it to a response as `background=`"

_SINCE = "from FastAPI 0.118 on"


@dataclass(frozen=True, slots=True)
class Finding:
    """
    Something that is wrong or risky.

    Attributes:
        kind: As in `docs/hazards.md`.
        severity: `error`: does not work; `warning`: will fail or do harm; `note`: worth considering.
        message, remedy: What it is and what to do, in words.
        file, line: A place in the app's own source; None if it is about the whole app.
        task: The task's name; None likewise.
    """

    kind: str
    severity: Severity
    message: str
    remedy: str
    file: str | None = None
    line: int | None = None
    task: str | None = None


def findings(subject: Subject) -> list[Finding]:
    """Everything that is wrong or risky, each once."""
    if subject.mistake is not None:
        return [Finding("settings", "error", subject.mistake, "fix it: until then the app cannot serve requests")]
    found = [*_of_middleware(subject), *_of_app(subject), *_of_websockets(subject), *_unused_containers(subject)]
    found += _of_dependencies(subject)
    for name, func in sorted(subject.functions.items()):
        found += [*_of_task(subject, name, func), *_blocking(subject, name, func)]
    for added in subject.added:
        found += _of_call(subject, added)
    return list(dict.fromkeys(found))


# --- the app


def _of_middleware(subject: Subject) -> Iterator[Finding]:
    kinds = [kind for kind, *_ in subject.layers]
    if "AftertaskMiddleware" not in kinds:
        remedy = "app.add_middleware(AftertaskMiddleware); a plain ASGI app is wrapped: AftertaskMiddleware(app)"
        yield Finding("not_added", "error", "the app has no AftertaskMiddleware", remedy)
    elif "OpenTelemetryMiddleware" in kinds[kinds.index("AftertaskMiddleware") :]:
        yield Finding(
            "middleware_order",
            "warning",
            "OpenTelemetry's middleware is inside aftertask's, so a task's span is not a child of the request's",
            "add it after AftertaskMiddleware: the middleware added last is outermost",
        )
    if kinds.count("AftertaskMiddleware") > 1:
        message = "AftertaskMiddleware is added twice"
        yield Finding("added_twice", "warning", message, "remove one of the two: the inner one observes")
    if disabled():
        message = "AFTERTASK_DISABLED is set: nothing is observed, and no policy is in force"
        yield Finding("disabled", "warning", message, "remove the variable")
    stacked = kinds.count("BaseHTTPMiddleware")
    if stacked >= 3 and not is_at_least("starlette", (1, 7)):
        message = f"{stacked} BaseHTTPMiddleware on Starlette {version_of('starlette')}: tasks start too early"
        remedy = "update Starlette to 1.7, or write them as plain ASGI middleware"
        yield Finding("started_early", "warning", message, remedy)


def _of_app(subject: Subject) -> Iterator[Finding]:
    found = [] if subject.settings is None else list(mistakes(subject.app, subject.settings))
    for one in {(each.kind, each.subject): each for each in (*subject.built, *found)}.values():
        file, line = (None, None) if one.func is None else place_of(one.func)
        task = one.subject if one.kind == "no_journal" else None
        yield Finding(one.kind, "warning", one.message, one.remedy, file, line, task)
    journal = None if subject.settings is None else subject.settings.journal
    if journal is not None and not (folder := Path(journal).absolute().parent).is_dir():
        message = f"there is no folder {folder} on this machine, and without it every request fails: Settings.journal"
        yield Finding("journal_folder", "note", message, "create it where the app runs, on a local disk")
    elif journal is not None and (reason := _no_database(Path(journal))) is not None:
        message = f"Settings.journal {str(journal)!r} {reason}, so every request fails"
        yield Finding("journal_file", "error", message, "name a new file, which aftertask creates")
    for engine, risk in subject.risks():
        message = f"Settings.engines[{engine!r}]: {risk.setting} is {risk.value!r}"
        yield Finding("engine_setting", "warning", message, risk.advice)
    shared = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if shared and not Path(shared).is_dir():
        message = (
            f"PROMETHEUS_MULTIPROC_DIR={shared!r} is not a directory on this machine; without it every request fails"
        )
        yield Finding("multiproc_directory", "note", message, "create it where the app runs, before each start")
    if subject.workers > 1 and not shared:
        message = f"{subject.workers} workers without PROMETHEUS_MULTIPROC_DIR: each scrape reads only one of them"
        remedy = "set PROMETHEUS_MULTIPROC_DIR to an empty directory that all workers share"
        yield Finding("several_workers", "warning", message, remedy)


def _no_database(path: Path) -> str | None:
    """Why a journal cannot be at this path; None if there is no file yet, or one that SQLite reads."""
    if path.is_dir():
        return "is a directory"
    if not path.exists():
        return None
    try:
        with contextlib.closing(connect(path, readonly=True)) as db:
            db.execute("PRAGMA schema_version").fetchone()
    except sqlite3.DatabaseError as error:
        return f"cannot be read: {error}"
    return None


def _of_websockets(subject: Subject) -> Iterator[Finding]:
    for route in subject.routes:
        if not _is_websocket(route) or not _takes_tasks(route):
            continue
        file, line = place_of(route.endpoint)
        if file is not None and not is_library_file(file):
            message = (
                f"{code_name(route.endpoint)} is a WebSocket endpoint with BackgroundTasks, which FastAPI never runs"
            )
            remedy = "await the function there, or start it in a task group of your own"
            yield Finding("websocket", "error", message, remedy, file, line)


def _is_websocket(route: object) -> bool:
    return isinstance(getattr(route, "route", route), WebSocketRoute)


def _takes_tasks(route: object) -> bool:
    """Whether FastAPI gives `BackgroundTasks` to the endpoint of a route or to one of its dependencies."""
    dependant = getattr(route, "dependant", None)
    every = (dependant, *dependencies_of(dependant))
    return any(getattr(each, "background_tasks_param_name", None) is not None for each in every)


def _unused_containers(subject: Subject) -> Iterator[Finding]:
    for module in subject.modules():
        for line, name in module.unused_containers().items():
            message = f"tasks are added to {name!r}, which is given to no response, so they never run"
            yield Finding("unused_container", "error", message, _TAKE, module.file, line)


def _of_dependencies(subject: Subject) -> Iterator[Finding]:
    """Dependencies that commit after the tasks of their routes have run."""
    if subject.settings is not None and subject.settings.run_after == "request":
        return
    adding = {one.by for one in subject.added}
    endpoints: dict[object, list[str]] = {}
    for route in subject.routes:
        endpoint = getattr(route, "endpoint", None)
        if not _is_websocket(route) and (_takes_tasks(route) or inner_function(endpoint) in adding):
            for dependency in late_dependencies(route):
                if not commits_by_hand(subject.source, endpoint):
                    endpoints.setdefault(dependency, []).append(code_name(endpoint))
    for dependency, names in endpoints.items():
        found = ending(subject.source, dependency)
        if found is None:
            continue
        name, whose = code_name(dependency), ", ".join(sorted(set(names)))
        message = (
            f"{name} closes its session after the tasks of {whose}, which do not see what is not committed ({_SINCE})"
        )
        if found.commits:
            message = (
                f"{name} commits after the tasks of {whose} ({_SINCE}): they do not see what the request wrote, "
                "they hold its connection, and a failure rolls the request back although the client has its response"
            )
        severity: Severity = "warning" if found.commits and is_at_least("fastapi", TASKS_COME_FIRST) else "note"
        yield Finding("runs_before_commit", severity, message, remedy(dependency), found.file, found.line)


# --- its tasks


def _of_task(subject: Subject, name: str, func: object) -> Iterator[Finding]:
    inner = unwrap(func)[0]
    file, line = place_of(inner)
    remedy = "@task(timeout=…)"
    if file is None or is_library_file(file):  # a finding points to the user's own line
        added = next((one for one in subject.added if one.func is not None and unwrap(one.func)[0] is inner), None)
        file, line = (None, None) if added is None else (added.file, added.line)
        remedy = f'options(…, timeout=…) here, or Settings(policies={{"{name}": Policy(timeout=…)}})'
        if is_opaque(inner):
            message = f"{name} is a library's wrapper; the function inside it, its name and its @task are not found"
            advice = f"set its policy as Settings.policies[{name!r}], or wrap the function with functools.wraps"
            yield Finding("wrapped", "note", message, advice, file, line, name)
    place = (file, line, name)
    policy = subject.policy(name)
    if policy.durable and subject.settings is not None and subject.settings.journal is None:
        message = f"{name} is durable, so each request that adds it fails: there is no journal"
        yield Finding("no_journal", "error", message, "Settings(journal=…)", *place)
    hidden = hidden_task(inner)
    if hidden is not None:
        yield Finding("task_hidden", "warning", f"{name} {HIDDEN.format(hidden)}", UNHIDE, *place)
    if inspect.isgeneratorfunction(inner) or inspect.isasyncgenfunction(inner):
        message = f"{name} is a generator function: as a task it does nothing"
        yield Finding("generator", "error", message, "loop over it in a function, and add that", *place)
    elif any(getattr(route, "endpoint", None) is inner for route in subject.routes):
        message = f"{name} is an endpoint and added as a task: its response is sent to no client"
        yield Finding("response_returned", "warning", message, "add the function that does the work", *place)
    for argument, kind in argument_kinds(inner).items():
        if kind in ("request", "websocket"):
            message = f"{name} takes {argument!r}, a {kind}, which has ended when the task runs"
            yield Finding("request_scoped", "warning", message, "pass what the task needs of it", *place)
    if policy.timeout is None:
        message = f"{name} has no timeout: a run that hangs is reported as stuck, but never stopped"
        if not is_async(inner):
            remedy += "; a sync task past its timeout is abandoned, because its thread cannot be stopped"
        yield Finding("no_timeout", "note", message, remedy, *place)


def _blocking(subject: Subject, name: str, func: object) -> Iterator[Finding]:
    if subject.policy(name).executor not in (None, "auto"):
        return
    for call in subject.source.blocking(func):
        message = f"{name} is async and calls {call.what}, which blocks the event loop: every request waits"
        remedy = f"{call.remedy}; or make the task a plain def, which runs in a thread"
        yield Finding("blocked_loop", "warning", message, remedy, call.file, call.line, name)


def _of_call(subject: Subject, added: Added) -> Iterator[Finding]:
    """The parameters of the endpoint that a task is given where it is added."""
    if added.by is None:
        return
    name = subject.name(added.func) if added.func is not None else "the task"
    kinds, place = argument_kinds(added.by), (added.file, added.line, name)
    for variable in added.arguments:
        kind, early = kinds.get(variable), _exits_early(added.by, variable)
        if kind == "upload" and not is_at_least("fastapi", TASKS_COME_FIRST):
            message = f"{name} is given the upload {variable!r}, which {_fastapi()} closes before the response"
            yield Finding("closed_upload", "error", message, _READ, *place)
        elif early is not None:
            message = f"{name} is given {variable!r}, which is closed when it runs: {early}"
            if kind == "database":
                yield Finding("db_session", "error", message, _OPEN, *place)
            else:
                yield Finding("dead_dependency", "error", message, "open what the task needs inside the task", *place)


def _exits_early(func: FunctionType, parameter: str) -> str | None:
    """Why what a dependency yields to this parameter is closed before the response; None if it is not."""
    try:
        found = signature_of(func).parameters[parameter]
    except (KeyError, ValueError):  # a variable of its own, or no signature
        return None
    for depends in (found.default, *getattr(annotations_of(func).get(parameter), "__metadata__", ())):
        call = getattr(depends, "dependency", None)
        if call is None or not yields(call):
            continue
        if not is_at_least("fastapi", TASKS_COME_FIRST):
            return f"{_fastapi()} exits dependencies with yield before the response"
        if getattr(depends, "scope", None) == "function":
            return 'its dependency has scope="function"'
    return None


def _fastapi() -> str:
    return f"FastAPI {version_of('fastapi')}".rstrip()
