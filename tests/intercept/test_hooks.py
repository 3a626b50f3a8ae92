"""The hooks in Starlette and FastAPI: they fail open, take nothing of another app's, and can be removed."""

from __future__ import annotations

import contextvars
import importlib.util
import json
import subprocess
import sys
import sysconfig
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from fastapi import BackgroundTasks as Injected
from fastapi import FastAPI
from opentelemetry.sdk.trace import TracerProvider
from starlette.applications import Starlette
from starlette.background import BackgroundTask, BackgroundTasks
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from aftertask.events import METHODS, Signal
from kit import LOG, Env, af, answering, boom, drive, sf

pytestmark = pytest.mark.anyio

#: What aftertask calls on the path of a request; `admit` is left out, which may fail the request.
STEPS = [*METHODS.values(), "task_known", "pool_known", "batch_started", "self_error", "same_provider"]

#: FastAPI traces its tasks since 0.142; whether aftertask's own spans go to the same provider is asked for each.
TRACED: dict[str, Any] = (
    {"telemetry": {"tracer_provider": TracerProvider()}} if importlib.util.find_spec("fastapi.telemetry") else {}
)


def breaks(*args: Any, **kwargs: Any) -> Any:
    """A function of the user's that always raises."""
    raise RuntimeError("broken")


@pytest.mark.parametrize("background", [[af], [sf, af], [af, boom, sf]])
@pytest.mark.parametrize("broken", ["request_id", "redact", "every step of a signal"])
async def test_what_raises_in_aftertask_changes_nothing_for_the_app(broken: str, background: list[Any]) -> None:
    """With a broken setting or signal the response, the tasks and the errors are those of the app alone."""

    async def endpoint(tasks: Injected) -> str:
        for function in background:
            tasks.add_task(function)
        return "ok"

    plain, env = FastAPI(**TRACED), Env()
    plain.get("/")(endpoint)
    alone = await drive(plain)
    done = list(LOG)
    LOG.clear()

    if broken.startswith("every"):
        env.signals = [type("Broken", (Signal,), dict.fromkeys(STEPS, breaks))(), env.seen]
    else:
        env.settings |= {broken: breaks}
    result = await drive(env.fastapi(endpoint, **TRACED))
    assert (result.messages, type(result.exc), str(result.exc)) == (alone.messages, type(alone.exc), str(alone.exc))
    assert done == LOG
    ended = {boom: "failed"}
    expected = [(function.__name__, ended.get(function, "succeeded")) for function in background]
    if boom in background:
        expected[background.index(boom) + 1 :] = [("sf", "skipped sibling_failed")]
    assert env.outcomes() == expected


async def awaits_a_task(scope: Any, receive: Any, send: Any) -> None:
    """An ASGI app without a Starlette response that awaits a task by itself."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})
    await BackgroundTask(sf)()


@pytest.mark.parametrize(
    "other",
    [awaits_a_task, Starlette(routes=[Route("/", answering(BackgroundTasks([BackgroundTask(sf)])))])],
    ids=["awaits_a_task", "starlette"],
)
@pytest.mark.parametrize("place", ["endpoint", "stream", "task"])
async def test_a_leaked_context_takes_no_task_of_another_app(env: Env, place: str, other: Any) -> None:
    """An app that is served in a copy of our request's context after that request keeps its tasks to itself."""
    leaked: list[contextvars.Context] = []

    def leak(where: str) -> None:
        if where == place:
            leaked.append(contextvars.copy_context())

    async def chunks() -> AsyncIterator[bytes]:
        leak("stream")
        yield b"x"

    async def task() -> None:
        leak("task")

    async def endpoint(request: Any) -> StreamingResponse:
        leak("endpoint")
        return StreamingResponse(chunks(), background=BackgroundTasks([BackgroundTask(task)]))

    await drive(env.app(endpoint))
    async with anyio.create_task_group() as group:
        leaked[0].run(group.start_soon, drive, other)  # a new task copies the context that it is started in
    assert LOG == ["sf"]
    assert env.outcomes() == [("task", "succeeded")]


async def test_a_background_that_its_class_computes_is_one_run(env: Env) -> None:
    """A property that makes a new task each time it is read schedules nothing that never runs."""
    made: list[BackgroundTask] = []

    class Computed(PlainTextResponse):
        @property
        def background(self) -> Any:
            made.append(BackgroundTask(af))
            return made[-1]

        @background.setter
        def background(self, value: Any) -> None: ...

    await drive(env.app(answering(None, Computed, "x")))
    assert env.outcomes() == [("af", "succeeded")]
    assert len(made) == 2  # Starlette asks whether there is one, then calls it


INSTALL = """
import fastapi
from starlette.background import BackgroundTask, BackgroundTasks
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from aftertask._core import hooks

class Own(BackgroundTasks):
    async def __call__(self): ...

classes = [BackgroundTask, BackgroundTasks, fastapi.BackgroundTasks, Own]
classes += [Response, JSONResponse, StreamingResponse, FileResponse]

def state():
    names = "__call__", "__init__", "add_task", "__init_subclass__"
    return {(kind, name): vars(kind).get(name) for kind in classes for name in names}

def changed(before):
    return {name for name, value in state().items() if value is not before[name]}

bare = state()
hooks.install()
first, installed = changed(bare), state()
assert {(Response, "__call__"), (Own, "__call__"), (BackgroundTasks, "add_task")} <= first, first
hooks.install()
assert not changed(installed), "installed twice"

class Later(Response):
    async def __call__(self, scope, receive, send): ...

assert Later.__call__.__wrapped__.__qualname__ == "Later.__call__"
hooks.uninstall()
assert not changed(bare), changed(bare)
assert not hasattr(Later.__call__, "__wrapped__")
hooks.install()
assert changed(bare) == first
"""


def test_the_hooks_can_be_removed_and_installed_again() -> None:
    """`uninstall()` restores Starlette's and FastAPI's own functions, `install()` sets the hooks again."""
    subprocess.run([sys.executable, "-c", INSTALL], check=True)


async def test_a_container_class_without_a_hash_keeps_its_tasks() -> None:
    """Defining `__eq__` alone makes the containers of a class unhashable; their tasks are observed all the same."""

    class Comparable(BackgroundTasks):
        def __eq__(self, other: object) -> bool:
            return isinstance(other, Comparable) and self.tasks == other.tasks

    async def endpoint(request: Any) -> PlainTextResponse:
        tasks = Comparable()
        tasks.add_task(af)
        return PlainTextResponse("ok", background=tasks)

    env = Env()
    await drive(env.app(Route("/", endpoint)))
    env.expect("af", log=["af"])


@pytest.mark.usefixtures("no_log_handlers")
async def test_a_librarys_wrapper_that_hides_the_function_is_logged_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Its name and `@task` cannot be found; one that keeps `__wrapped__` can be seen through."""
    source = """
import functools
def opaque(func):
    async def call():
        await func()
    return call
def plain(func):
    return functools.wraps(func)(opaque(func))
"""
    library: dict[str, Any] = {"__name__": "tracer"}
    path = Path(sysconfig.get_path("purelib")) / "tracer.py"
    exec(compile(source, str(path), "exec"), library)  # a module of an installed library
    env = Env()
    app = env.app(answering(BackgroundTasks([BackgroundTask(library[name](af)) for name in ("opaque", "plain")])))
    await drive(app)
    await drive(app)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    assert [line["task"] for line in lines if line["event"] == "task.wrapped"] == ["tracer.opaque.<locals>.call"]
    assert LOG == ["af"] * 4
