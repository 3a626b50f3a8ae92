"""
One issue for each failure beside Sentry's SDK with its default integrations, whichever logging the app has set up.

Each set-up is a process of its own: the SDK patches `logging` and Starlette for the whole process.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("sentry_sdk") is None, reason="no sentry-sdk here"),
    pytest.mark.timeout(60),  # a process imports FastAPI and Sentry, maybe on a busy machine
]

DOCS = Path(__file__).parent.parent / "docs" / "sentry.md"

CHILD = '''
import json, logging, os, sys

import sentry_sdk
import structlog
from sentry_sdk.transport import Transport

events = []


class Keep(Transport):
    def capture_envelope(self, envelope):
        if envelope.get_event():
            events.append(envelope.get_event())


def none():
    """No logging is configured."""


def stdlib():
    logging.basicConfig(level=logging.INFO, stream=open(os.devnull, "w"))


def structlog_alone():
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(open(os.devnull, "w")),
    )


def structlog_through_stdlib():
    stdlib()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.add_log_level,
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )


globals()[sys.argv[1]]()
sentry_sdk.init(dsn="http://k@127.0.0.1:1/1", transport=Keep(options={}))
exec(sys.argv[2])

from fastapi import BackgroundTasks, FastAPI
from prometheus_client import CollectorRegistry
from starlette.testclient import TestClient

from aftertask import AftertaskMiddleware, Retry, Settings, task


def charge():
    raise ValueError("no card")


async def mail():
    raise LookupError("no address")


@task(timeout=0.01)
async def slow():
    import anyio

    await anyio.sleep_forever()


@task(retry=Retry(attempts=2, wait_initial=0))
async def twice():
    raise KeyError("x")


def fails_with(policy, *tasks, below_a_middleware=False):
    app = FastAPI()
    if policy is not None:
        app.add_middleware(AftertaskMiddleware, settings=Settings(registry=CollectorRegistry(), on_failure=policy))
    if below_a_middleware:
        # Starlette's BaseHTTPMiddleware runs the response in a task of its own.
        @app.middleware("http")
        async def outer(request, call_next):
            return await call_next(request)

    @app.get("/")
    async def buy(background: BackgroundTasks):
        for each in tasks:
            background.add_task(each)

    events.clear()
    with TestClient(app, raise_server_exceptions=False) as client:
        client.get("/")
    return [[one["type"] for one in event.get("exception", {}).get("values", [])] for event in events]


found = {"bare, below a middleware": fails_with(None, charge, below_a_middleware=True)}
for policy in ("stop", "continue", "contain"):
    found[policy] = [fails_with(policy, each) for each in (charge, mail, slow)]
    found[f"{policy}, below a middleware"] = fails_with(policy, charge, below_a_middleware=True)
    found[f"{policy}, with a retry"] = fails_with(policy, twice)
found["two contained"] = fails_with("contain", charge, mail)
found["two continued"] = fails_with("continue", charge, mail)
print(json.dumps(found))
'''


def reported(setup: str, recipe: str = "") -> dict[str, Any]:
    """The exceptions of each event that Sentry got, for each `on_failure`."""
    done = subprocess.run([sys.executable, "-c", CHILD, setup, recipe], capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def recipe() -> str:
    """The code block of `docs/sentry.md`."""
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert len(blocks) == 1
    return str(blocks[0])


POLICIES = ("stop", "continue", "contain")
SETUPS = ("none", "stdlib", "structlog_alone", "structlog_through_stdlib")


def check(found: dict[str, Any]) -> None:
    """For each `on_failure` one event for a failure, with its exception."""
    for policy in POLICIES:
        assert found[policy][:2] == [[["ValueError"]], [["LookupError"]]], policy
        assert [exceptions[-1] for exceptions in found[policy][2]] == ["TaskTimeout"], policy
    assert found["two contained"] == [["ValueError"], ["LookupError"]]


def check_below_a_middleware(found: dict[str, Any]) -> None:
    """As without us: BaseHTTPMiddleware of old Starlette versions swallows what a task raises. Contained: one event."""
    for policy in ("stop", "continue"):
        assert found[f"{policy}, below a middleware"] == found["bare, below a middleware"], policy
    assert found["contain, below a middleware"] == [["ValueError"]]


@pytest.mark.parametrize("setup", ["none", "stdlib", "structlog_alone"])
def test_one_issue_for_each_failure(setup: str) -> None:
    """With Sentry's default integrations each failure is one event with its exception."""
    found = reported(setup)
    check(found)
    if setup != "stdlib":
        check_below_a_middleware(found)
        for policy in POLICIES:
            assert found[f"{policy}, with a retry"] == [["KeyError"]], policy


@pytest.mark.long
@pytest.mark.parametrize("setup", SETUPS)
def test_one_issue_for_each_failure_with_the_recipe_of_the_docs(setup: str) -> None:
    """With the recipe that is so for each logging set-up, below any middleware, and with retries."""
    found = reported(setup, recipe())
    check(found)
    check_below_a_middleware(found)
    for policy in POLICIES:
        assert found[f"{policy}, with a retry"] == [["KeyError"]], policy
