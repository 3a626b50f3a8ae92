"""
Functions with annotations that only a type checker can read: all that looks at a signature works with them.

Python 3.14 evaluates annotations when they are asked for, so there it works without the import from `__future__`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from fastapi.testclient import TestClient

from aftertask import HazardFound, NotSerializable, Settings
from aftertask._encoding import encode
from aftertask.celery.header import fingerprint
from aftertask.testing import recorded

FUTURE = "from __future__ import annotations\n"

APP = """
from typing import TYPE_CHECKING

from fastapi import BackgroundTasks, FastAPI, Request

from aftertask import AftertaskMiddleware, task

if TYPE_CHECKING:
    from nowhere import Alert, Amount, Session

app = FastAPI()
app.add_middleware(AftertaskMiddleware)


@task(timeout=1)
def audit(request: Request, session: Session) -> None: ...


@task(timeout=1, durable=True)
async def charge(amount: Amount) -> None: ...


def channel(alert: Alert) -> None: ...


@task(timeout=1)
def mistake(request: "Request" | None) -> None: ...  # raises whenever it is evaluated


@app.post("/")
async def endpoint(request: Request, tasks: BackgroundTasks) -> None:
    tasks.add_task(audit, request, None)
    tasks.add_task(mistake, request)
"""


@pytest.fixture(params=[FUTURE, ""] if sys.version_info >= (3, 14) else [FUTURE])
def source(request: pytest.FixtureRequest) -> str:
    """The app's source, with annotations that are text, and with those that are evaluated late."""
    return f"{request.param}{APP}"


@pytest.fixture
def shop(source: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The app as a module."""
    module = ModuleType("lazy_shop")
    monkeypatch.setitem(sys.modules, "lazy_shop", module)
    exec(compile(source, "lazy_shop.py", "exec", dont_inherit=True), vars(module))
    return module


def test_a_dead_argument_is_named(source: str, shop: ModuleType) -> None:
    """By the parameter, or by its number where the signature cannot be read."""
    with recorded(shop.app) as events:
        assert TestClient(shop.app).post("/").status_code == 200
    assert [(found.kind, found.argument) for found in events.of(HazardFound)] == [
        ("request_scoped", "request"),
        ("request_scoped", "request" if source.startswith(FUTURE) else "argument 1"),
    ]
    assert events.outcomes() == [("lazy_shop.audit", "succeeded"), ("lazy_shop.mistake", "succeeded")]


def test_arguments_are_refused_by_name(shop: ModuleType) -> None:
    """What they are is not known, so they cannot be stored."""
    with pytest.raises(NotSerializable, match=r"lazy_shop\.charge: .*'Amount' is not defined"):
        encode(shop.charge, (3,), {})


def test_parameters_have_a_fingerprint(shop: ModuleType) -> None:
    """The same one each time, and another one for other parameters."""
    first = fingerprint(shop.audit)
    fingerprint.cache_clear()
    assert fingerprint(shop.audit) == first != fingerprint(shop.charge)


def test_it_can_be_a_channel(shop: ModuleType) -> None:
    """Only the number of its arguments counts."""
    assert Settings(alerts=[shop.channel])


def test_the_command_checks_the_app(source: str, tmp_path: Path) -> None:
    """It reads every function of the app's modules."""
    (tmp_path / "lazy_shop.py").write_text(source)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AFTERTASK_", "WEB_CONC"))}
    command = [sys.executable, "-m", "aftertask.cli", "check", "lazy_shop:app", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, env=clean)
    assert done.stderr == ""
    kinds = [finding["kind"] for finding in json.loads(done.stdout)["findings"]]
    # Where all annotations are text and one cannot be evaluated, none is.
    assert kinds == (["no_journal"] if source.startswith(FUTURE) else ["no_journal", "request_scoped"])
