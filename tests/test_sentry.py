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

pytestmark = pytest.mark.skipif(importlib.util.find_spec("sentry_sdk") is None, reason="no sentry-sdk here")

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

from aftertask import AftertaskMiddleware, Settings, task


def charge():
    raise ValueError("no card")


async def mail():
    raise LookupError("no address")


@task(timeout=0.01)
async def slow():
    import anyio

    await anyio.sleep_forever()


def fails_with(policy, *tasks):
    app = FastAPI()
    app.add_middleware(AftertaskMiddleware, settings=Settings(registry=CollectorRegistry(), on_failure=policy))

    @app.get("/")
    async def buy(background: BackgroundTasks):
        for each in tasks:
            background.add_task(each)

    events.clear()
    with TestClient(app, raise_server_exceptions=False) as client:
        client.get("/")
    return [[one["type"] for one in event.get("exception", {}).get("values", [])] for event in events]


found = {}
for policy in ("stop", "continue", "contain"):
    found[policy] = [fails_with(policy, charge), fails_with(policy, mail), fails_with(policy, slow)]
found["two contained"] = fails_with("contain", charge, mail)
found["two continued"] = fails_with("continue", charge, mail)
print(json.dumps(found))
'''


def reported(setup: str, recipe: str = "") -> dict[str, Any]:
    """The exceptions of each event that Sentry got, for each `on_failure`."""
    done = subprocess.run([sys.executable, "-c", CHILD, setup, recipe], capture_output=True, text=True, timeout=18)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def recipe() -> str:
    """The code block of `docs/sentry.md`."""
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert len(blocks) == 1
    return str(blocks[0])


@pytest.mark.parametrize("setup", ["none", "stdlib", "structlog_alone"])
def test_one_issue_for_each_failure(setup: str) -> None:
    """For each `on_failure` Sentry gets one event for a failure, with its exception."""
    found = reported(setup)
    for policy in ("stop", "continue", "contain"):
        assert found[policy][:2] == [[["ValueError"]], [["LookupError"]]], policy
        assert [exceptions[-1] for exceptions in found[policy][2]] == ["TaskTimeout"], policy
    assert found["two contained"] == [["ValueError"], ["LookupError"]]


def test_structlog_through_stdlib_logging_needs_the_recipe_of_the_docs() -> None:
    """Lines that structlog rendered reach Sentry as text; with the recipe there is one event for a failure."""
    found = reported("structlog_through_stdlib", recipe())
    for policy in ("stop", "continue", "contain"):
        assert found[policy][:2] == [[["ValueError"]], [["LookupError"]]], policy
        assert [exceptions[-1] for exceptions in found[policy][2]] == ["TaskTimeout"], policy
    assert found["two contained"] == [["ValueError"], ["LookupError"]]
