"""
Names and policies beside tracers that wrap what the app gives to `add_task`, whichever of the two patches first.

Each case is a process of its own: a tracer patches Starlette and FastAPI for the whole process. Those of `LIBRARIES`
that are not installed are skipped.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

#: Tracers, by the function of `CHILD` that switches them on.
LIBRARIES = {
    "datadog": "ddtrace",
    "new_relic": "newrelic",
    "opentelemetry": "opentelemetry.instrumentation.fastapi",
    "sentry": "sentry_sdk",
}

CHILD = """
import json, logging, os, sys

os.environ |= {
    "DD_INSTRUMENTATION_TELEMETRY_ENABLED": "false",
    "DD_REMOTE_CONFIGURATION_ENABLED": "false",
    "DD_TRACE_AGENT_URL": "http://127.0.0.1:1",
    "NEW_RELIC_DEVELOPER_MODE": "true",
    "NEW_RELIC_LOG": os.devnull,
}
logging.getLogger("ddtrace").setLevel(logging.CRITICAL)


def datadog():
    from ddtrace import patch
    patch(starlette=True, fastapi=True)


def new_relic():
    import newrelic.agent
    newrelic.agent.initialize()


def opentelemetry():
    from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
    FastAPIInstrumentor().instrument()


def sentry():
    import sentry_sdk
    sentry_sdk.init(dsn="http://k@127.0.0.1:1/1", traces_sample_rate=1.0, transport=lambda envelope: None)


switch_on, order = globals()[sys.argv[1]], sys.argv[2]
if order == "before":
    switch_on()

import anyio
import fastapi
from prometheus_client import CollectorRegistry
from starlette.background import BackgroundTask, BackgroundTasks
from starlette.responses import JSONResponse
from starlette.testclient import TestClient

from aftertask import AftertaskMiddleware, Policy, Settings, options, task


async def send_mail(to): ...


def resize(path): ...


@task(name="report", timeout=0.01)
async def report():
    await anyio.sleep_forever()


@task(name="export", timeout=20, limit=1)
def export(): ...


@task(name="quote", expected=(LookupError,))
def quote():
    raise LookupError


class Mailer:
    async def send(self): ...


def note(event):
    if hasattr(event, "outcome"):
        outcome = f"{event.outcome}, {'bad' if event.bad else 'fine'}"
        ended.append([event.run.task, outcome, event.run.info.executor, event.run.info.priority])


app = fastapi.FastAPI()
policies = {"json.dumps": Policy(executor="process")}
settings = Settings(registry=CollectorRegistry(), metrics_path=None, on_failure="contain", policies=policies)
app.add_middleware(AftertaskMiddleware, settings=settings, signals=[note])


@app.get("/no-tasks")
async def no_tasks(): ...


@app.get("/injected")
async def injected(tasks: fastapi.BackgroundTasks):
    tasks.add_task(send_mail, "x")
    tasks.add_task(resize, path="p")
    tasks.add_task(report)
    tasks.add_task(export)
    tasks.add_task(quote)
    tasks.add_task(Mailer().send)
    tasks.add_task(options(send_mail, priority=7), "y")
    tasks.add_task(json.dumps, [1])


@app.get("/own")
async def own():
    tasks = BackgroundTasks()
    tasks.add_task(send_mail, "x")
    tasks.add_task(options(report, timeout=0.02))
    tasks.add_task(json.dumps, [1])
    return JSONResponse({}, background=tasks)


@app.get("/one")
async def one():
    return JSONResponse({}, background=BackgroundTask(report))


with TestClient(app) as client:
    client.get("/no-tasks")  # which builds the middleware
    if order == "after":
        switch_on()
    for path in ("injected", "own", "one", "injected", "own", "one"):
        ended = []
        client.get(f"/{path}")
        print(json.dumps([path, ended]), flush=True)
os._exit(0)  # the tracers would try to reach their servers
"""

MAIL = ["__main__.send_mail", "succeeded, fine", "inline", 0]
REPORT = ["report", "timed_out, bad", "inline", 0]
DUMPS = ["json.dumps", "succeeded, fine", "process", 0]

#: Each run's task, outcome, executor and priority, by endpoint.
RIGHT = {
    "injected": [
        MAIL,
        ["__main__.resize", "succeeded, fine", "thread", 0],
        REPORT,
        ["export", "succeeded, fine", "thread", 0],
        ["quote", "failed, fine", "thread", 0],
        ["__main__.Mailer.send", "succeeded, fine", "inline", 0],
        DUMPS,
        ["__main__.send_mail", "succeeded, fine", "inline", 7],
    ],
    "own": [MAIL, REPORT, DUMPS],
    "one": [REPORT],
}


def is_installed(module: str) -> bool:
    """Whether a module can be imported; its parents are imported to find out."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.timeout(60)
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("tracer", LIBRARIES)
def test_names_and_policies_are_those_of_the_users_function(tracer: str, order: str) -> None:
    """A tracer switched on before or after the middleware is built changes no name, policy, executor or outcome."""
    if not is_installed(LIBRARIES[tracer]):
        pytest.skip(f"{LIBRARIES[tracer]} is not installed")
    command = [sys.executable, "-", tracer, order]
    done = subprocess.run(command, input=CHILD, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    seen = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["')]
    assert len(seen) == 2 * len(RIGHT), done.stderr
    for path, ended in seen:
        assert ended == RIGHT[path], done.stderr
