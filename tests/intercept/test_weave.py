"""Statements put in front of a function's own: it stays what it was in everything else."""

from __future__ import annotations

import asyncio
import inspect
import linecache
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any, cast

import pytest
from starlette.background import BackgroundTask
from starlette.responses import Response

from aftertask import _responses
from aftertask._exchange import Exchange
from aftertask._weave import woven
from intercept.driver import Env, af, answering, drive

SOURCE = """
class Thing:
    # Something before it, so that lines are not counted from one.

    def plain(self, number: int = 2, *, by: int = 3) -> int:
        \"\"\"Multiply.\"\"\"
        return number * by

    async def failing(self) -> None:
        raise ValueError(
            self
        )

    @staticmethod
    def decorated(self):
        return "decorated"


def alone(number):
    return number
"""

LOOK = """
seen.append(self)
if stop in seen:
    return "stopped"
"""


@pytest.fixture
def module(tmp_path: Path) -> dict[str, Any]:
    """A module of its own file."""
    path = tmp_path / "thing.py"
    path.write_text(SOURCE)
    space: dict[str, Any] = {"__name__": "thing", "__file__": str(path)}
    exec(compile(f"from __future__ import annotations{SOURCE}", str(path), "exec"), space)
    linecache.checkcache(str(path))
    return space


def function(module: dict[str, Any], name: str) -> FunctionType:
    """A function of its class."""
    return cast(FunctionType, module["Thing"].__dict__[name])


def test_what_is_woven_in_runs_first_and_may_end_the_call(module: dict[str, Any]) -> None:
    """With the function's own parameters, and what else it was given."""
    seen: list[Any] = []
    made = woven(function(module, "plain"), LOOK, seen=seen, stop="stop")
    assert made("thing") == 6 and made("thing", 5, by=7) == 35
    assert made("stop") == "stopped"
    assert seen == ["thing", "thing", "stop"]


def test_it_passes_for_the_function(module: dict[str, Any]) -> None:
    """In its name, its signature, where it stands and what it is."""
    for name in ("plain", "failing"):
        before = function(module, name)
        made = woven(before, LOOK, seen=[], stop=None)
        for what in (inspect.signature, inspect.getdoc, inspect.iscoroutinefunction, asyncio.iscoroutinefunction):
            assert cast(Callable[[Any], Any], what)(made) == cast(Callable[[Any], Any], what)(before)
        assert (made.__qualname__, made.__module__, made.__globals__) == (before.__qualname__, "thing", module)
        assert made.__code__.co_firstlineno == before.__code__.co_firstlineno


async def _failing(call: Any) -> str:
    try:
        await call("self")
    except ValueError as error:
        return traceback.format_exc().replace(repr(error), "")
    return "no error"


def test_a_traceback_is_the_same_to_the_column(module: dict[str, Any]) -> None:
    """What the function itself raises."""
    before = function(module, "failing")
    made = woven(before, LOOK, seen=[], stop=None)
    assert "raise ValueError(" in asyncio.run(_failing(made))
    assert asyncio.run(_failing(made)) == asyncio.run(_failing(before))


@pytest.mark.parametrize("change", ["other", "gone", "broken"])
def test_a_source_that_is_not_what_runs_is_left_alone(module: dict[str, Any], change: str) -> None:
    """A newer version was installed meanwhile, or there are no sources here at all."""
    path = Path(module["__file__"])
    if change == "gone":
        path.unlink()
    else:
        path.write_text(SOURCE.replace("number * by", "number + by" if change == "other" else "number *"))
    linecache.clearcache()
    assert woven(function(module, "plain"), LOOK, seen=[], stop=None) is None


def test_what_it_cannot_do_it_leaves_alone(module: dict[str, Any]) -> None:
    """A decorated function, one that was put together from text, and one that is no method."""
    assert woven(function(module, "decorated").__func__, LOOK, seen=[], stop=None) is None  # type: ignore[attr-defined]
    space: dict[str, Any] = {}
    exec("def nowhere(self): return 1", space)
    assert woven(space["nowhere"], LOOK, seen=[], stop=None) is None
    assert woven(module["alone"], LOOK, seen=[], stop=None) is None


def test_responses_are_called_by_what_is_woven() -> None:
    """Here, with the Starlette that is installed; else every response would pay for a call."""
    Env().mw(None)
    call: Any = Response.__call__
    assert call.__closure__ is not None and call.__wrapped__.__closure__ is None
    assert "return await serve" not in inspect.getsource(call.__wrapped__)
    assert textwrap.dedent(inspect.getsource(call)) == textwrap.dedent(inspect.getsource(call.__wrapped__))


def test_no_file_is_read_when_the_middleware_is_built() -> None:
    """Starlette builds it on the event loop, with the first request."""
    code = """
import sys
from aftertask import AftertaskMiddleware, Settings
from prometheus_client import CollectorRegistry
from starlette.responses import Response
read = []
sys.addaudithook(lambda name, args: read.append(args[0]) if name == "open" else None)
AftertaskMiddleware(None, settings=Settings(registry=CollectorRegistry()), signals=[])
assert Response.__call__.__closure__, "the hook is not woven in"
assert not read, read
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.anyio
async def test_where_nothing_can_be_woven_a_call_goes_around(env: Env, monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks at the same."""
    env.mw(None)
    monkeypatch.setattr(_responses, "_woven_in", None)
    hook = _responses._hook_response(Response.__call__.__wrapped__)  # type: ignore[attr-defined]  # the hook has it
    monkeypatch.setattr(Response, "__call__", hook)
    made: list[Any] = []
    monkeypatch.setattr("aftertask.middleware.Exchange", lambda *args: made.append(args) or Exchange(*args))
    assert (await drive(env.app(answering(BackgroundTask(af))))).body == b"ok"
    assert (await drive(env.app(answering(None)))).body == b"ok"
    assert len(made) == 1
    env.expect("af", log=["af"])
