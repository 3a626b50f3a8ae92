"""
Beside others that trace: FastAPI's own telemetry and OpenTelemetry's packages for FastAPI and Starlette.

Each case is a process of its own: the packages patch classes for the whole process, and their order matters.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from importlib.metadata import version
from typing import Any

import pytest
from packaging.version import Version

#: The child process: takes the steps of its arguments one after another, and prints the spans after each `look`.
CHILD = '''
import json, sys

import fastapi
import starlette.applications
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry
from starlette.background import BackgroundTask, BackgroundTasks
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from aftertask import AftertaskMiddleware, Settings, task

backend, *steps = json.loads(sys.argv[1])
exporters = {name: InMemorySpanExporter() for name in ("ours", "other")}
providers = {name: TracerProvider() for name in exporters}
for name, provider in providers.items():
    provider.add_span_processor(SimpleSpanProcessor(exporters[name]))
ends, app = [], None


@task(name="first")
async def first(): ...


@task(name="second")
def second(): ...


@task(name="broken")
async def broken():
    raise LookupError("password=hunter2")


@task(name="outer")
async def outer():
    await BackgroundTask(first)()


async def adopted(tasks: fastapi.BackgroundTasks):
    tasks.add_task(first)
    for each in tasks.tasks:
        await each()
    tasks.tasks.clear()


async def both(tasks: fastapi.BackgroundTasks):
    tasks.add_task(first)
    tasks.add_task(second)


async def failing(tasks: fastapi.BackgroundTasks):
    tasks.add_task(broken)
    tasks.add_task(first)


async def nested(tasks: fastapi.BackgroundTasks):
    tasks.add_task(outer)


async def direct():
    return JSONResponse({}, background=BackgroundTask(first))


async def direct_both(request):
    return JSONResponse({}, background=BackgroundTasks([BackgroundTask(first), BackgroundTask(second)]))


async def direct_failing(request):
    return JSONResponse({}, background=BackgroundTasks([BackgroundTask(broken), BackgroundTask(first)]))


def make_fastapi(telemetry=None):
    global app
    app = fastapi.FastAPI(telemetry=telemetry) if telemetry else fastapi.FastAPI()
    for path, endpoint in {
        "/both": both, "/failing": failing, "/nested": nested, "/direct": direct, "/adopted": adopted
    }.items():
        app.get(path)(endpoint)


def make_starlette():
    global app
    app = starlette.applications.Starlette(
        routes=[Route("/both", direct_both), Route("/failing", direct_failing)]
    )


def add(provider="ours", mode="child"):
    """As an app does: the middleware is built with the first request."""
    settings = Settings(
        registry=CollectorRegistry(), tracer_provider=providers.get(provider), trace=mode, metrics_path=None
    )
    from aftertask.signals import usual

    signals = [*usual(settings), lambda event: ends.append(event) if hasattr(event, "outcome") else None]
    app.add_middleware(AftertaskMiddleware, settings=settings, signals=signals)


def hooks():
    """Our hooks are installed now, by another app of the process."""
    AftertaskMiddleware(None, settings=Settings(registry=CollectorRegistry()), signals=[])


def global_provider():
    trace.set_tracer_provider(providers["ours"])


def native(provider):
    make_fastapi({"tracer_provider": providers[provider]})


def instrumentor(kind):
    if kind == "fastapi":
        from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor as Instrumentor
    else:
        from opentelemetry.instrumentation.starlette import StarletteInstrumentor as Instrumentor
    return Instrumentor


def contrib(kind, provider="ours"):
    instrumentor(kind).instrument_app(app, tracer_provider=providers[provider])


def contrib_all(kind):
    """As `opentelemetry-instrument` does: every app that is made from now on."""
    instrumentor(kind)().instrument(tracer_provider=providers["ours"])


def gone(kind):
    instrumentor(kind).uninstrument_app(app)


def gone_all(kind):
    instrumentor(kind)().uninstrument()


def look(path):
    ends.clear()
    client = TestClient(app, raise_server_exceptions=False, backend=backend)
    status = client.get(path).status_code
    finished = {name: exporter.get_finished_spans() for name, exporter in exporters.items()}
    names = {span.context.span_id: span.name for spans in finished.values() for span in spans}
    looked = {"status": status, "ends": [[event.run.task, event.outcome] for event in ends]}
    for name, spans in finished.items():
        looked[name] = [
            {
                "name": span.name,
                "parent": span.parent and names.get(span.parent.span_id, "unknown"),
                "kind": span.kind.name,
                "status": [span.status.status_code.name, span.status.description],
                "scope": span.instrumentation_scope.name,
                "attributes": {
                    key: value for key, value in span.attributes.items() if "port" not in key and "duration" not in key
                },
                "events": [event.name for event in span.events],
            }
            for span in spans
        ]
        exporters[name].clear()
    print("LOOKED", json.dumps(looked))


for step, *args in steps:
    globals()[step](*args)
'''

#: The orders in which both come into one process.
ORDERS = {
    "theirs, ours": [["make_fastapi"], ["contrib", "fastapi"], ["add"]],
    "ours, theirs": [["make_fastapi"], ["add"], ["contrib", "fastapi"]],
    "our hooks first": [["make_fastapi"], ["hooks"], ["add"], ["contrib", "fastapi"]],
    "for all apps": [["contrib_all", "fastapi"], ["make_fastapi"], ["add"]],
    "for all apps, our hooks first": [["hooks"], ["contrib_all", "fastapi"], ["make_fastapi"], ["add"]],
}

has_starlette_package = pytest.mark.skipif(
    importlib.util.find_spec("opentelemetry.instrumentation.starlette") is None,
    reason="no opentelemetry-instrumentation-starlette here",
)
has_fastapi_package = pytest.mark.skipif(
    importlib.util.find_spec("opentelemetry.instrumentation.fastapi") is None,
    reason="no opentelemetry-instrumentation-fastapi here",
)
traces_tasks = pytest.mark.skipif(
    importlib.util.find_spec("opentelemetry.instrumentation.fastapi") is None
    or Version(version("opentelemetry-instrumentation-fastapi")) < Version("0.63b0"),
    reason="opentelemetry-instrumentation-fastapi traces tasks since 0.63b0",
)
has_native = pytest.mark.skipif(
    importlib.util.find_spec("fastapi.telemetry") is None, reason="FastAPI traces its tasks since 0.142"
)
Span = dict[str, Any]


def do(*steps: list[Any], backend: str = "asyncio") -> list[dict[str, Any]]:
    """Run these steps in a child process; what each look found."""
    arguments = json.dumps([backend, *steps])
    done = subprocess.run([sys.executable, "-c", CHILD, arguments], capture_output=True, text=True, timeout=18)
    assert done.returncode == 0, done.stderr
    looks = [json.loads(line.removeprefix("LOOKED ")) for line in done.stdout.splitlines() if line.startswith("LOOKED")]
    assert len(looks) == len([step for step in steps if step[0] == "look"])
    return looks


def of_tasks(spans: list[Span]) -> list[tuple[str, str | None]]:
    """The names of all spans for tasks, of any origin, and of their parents."""
    return [(span["name"], span["parent"]) for span in spans if "background" in span["name"].lower()]


def server(spans: list[Span]) -> str:
    """The name of the one request's span."""
    (name,) = (span["name"] for span in spans if span["kind"] == "SERVER")
    return str(name)


def check_both(looked: dict[str, Any], requests: str = "ours") -> None:
    """One span for each attempt, ours, under the request's."""
    parent = server(looked[requests])
    assert of_tasks(looked["ours"]) == [("background_task first", parent), ("background_task second", parent)]
    assert looked["ends"] == [["first", "succeeded"], ["second", "succeeded"]]
    assert looked["status"] == 200


def check_failing(looked: dict[str, Any], requests: str = "ours") -> None:
    """The failed attempt is marked, the skipped run has no span, the client has its answer."""
    parent = server(looked[requests])
    assert of_tasks(looked["ours"]) == [("background_task broken", parent)]
    (span,) = (span for span in looked["ours"] if span["name"] == "background_task broken")
    assert span["status"] == ["ERROR", "LookupError"]
    assert span["events"] == ["exception"]
    assert span["attributes"]["error.type"] == "LookupError"
    assert span["attributes"]["aftertask.outcome"] == "failed"
    assert looked["ends"] == [["broken", "failed"], ["first", "skipped"]]
    assert looked["status"] == 200


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@has_native
def test_fastapis_own_feeding_the_same_provider(backend: str) -> None:
    """One span for an attempt, ours, under FastAPI's request; its other spans are those of an app without aftertask."""
    looks = [["look", "/both"], ["look", "/failing"], ["look", "/direct"]]
    native = ["native", "ours"]
    without, with_us = do(native, *looks, backend=backend), do(native, ["add"], *looks, backend=backend)

    check_both(with_us[0])
    check_failing(with_us[1])
    assert of_tasks(with_us[2]["ours"]) == [("background_task first", server(with_us[2]["ours"]))]

    for bare, ours in zip(without, with_us, strict=True):
        assert bare["status"] == ours["status"]
        expected = [span for span in bare["ours"] if span["name"] != "fastapi.background_task"]
        assert [span for span in ours["ours"] if span["scope"] != "aftertask"] == expected


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@has_native
def test_fastapis_own_feeding_another_provider(backend: str) -> None:
    """Both trace the task; FastAPI's spans are exactly those of an app without aftertask."""
    looks = [["look", "/both"], ["look", "/failing"], ["look", "/direct"]]
    native = ["native", "other"]
    without, with_us = do(native, *looks, backend=backend), do(native, ["add"], *looks, backend=backend)

    check_both(with_us[0], requests="other")
    check_failing(with_us[1], requests="other")
    assert [span["status"][0] for span in with_us[1]["other"] if span["name"] == "fastapi.background_task"] == ["ERROR"]
    for bare, ours in zip(without, with_us, strict=True):
        assert bare["other"] == ours["other"]
        assert {span["scope"] for span in ours["ours"]} == {"aftertask"}


@has_native
def test_fastapis_own_span_stays_where_ours_is_switched_off() -> None:
    """`trace="none"` for the app leaves tracing to FastAPI."""
    (looked,) = do(["native", "ours"], ["add", "ours", "none"], ["look", "/both"])
    assert [span["name"] for span in looked["ours"]].count("fastapi.background_task") == 2
    assert not [span for span in looked["ours"] if span["scope"] == "aftertask"]


@has_native
def test_fastapis_own_and_the_global_provider_that_comes_late() -> None:
    """Without a provider in the settings there is no span until there is a global one, then one for each attempt."""
    before, both, failing = do(
        *(["make_fastapi"], ["add", None], ["look", "/both"], ["global_provider"]),
        *(["look", "/both"], ["look", "/failing"]),
    )
    assert before["ours"] == []
    assert before["ends"] == both["ends"]
    check_both(both)
    check_failing(failing)


@has_fastapi_package
@pytest.mark.parametrize("order", ORDERS)
def test_contrib_feeding_the_same_provider(order: str) -> None:
    """In any order, opentelemetry-instrumentation-fastapi traces the request and aftertask its tasks."""
    both, failing, direct = do(*ORDERS[order], ["look", "/both"], ["look", "/failing"], ["look", "/direct"])
    check_both(both)
    check_failing(failing)
    assert of_tasks(direct["ours"]) == [("background_task first", server(direct["ours"]))]


@traces_tasks
@pytest.mark.parametrize("order", ["theirs, ours", "ours, theirs", "our hooks first"])
def test_contrib_feeding_another_provider(order: str) -> None:
    """Both trace the task: contrib's span is what it is without us, and ours has the request's span as its parent."""
    steps = [[*step, "other"] if step[0] == "contrib" else step for step in ORDERS[order]]
    without = do(["make_fastapi"], ["contrib", "fastapi", "other"], ["look", "/both"], ["look", "/failing"])
    both, failing = do(*steps, ["look", "/both"], ["look", "/failing"])
    check_both(both, requests="other")
    check_failing(failing, requests="other")

    def theirs(looked: dict[str, Any]) -> list[Any]:
        return [(span["name"], span["status"]) for span in looked["other"] if span["name"].startswith("BackgroundTask")]

    assert [theirs(both), theirs(failing)] == [theirs(look) for look in without]
    assert [name for name, _ in theirs(both)] == ["BackgroundTask first", "BackgroundTask second"]


@traces_tasks
def test_contribs_span_stays_where_ours_is_switched_off() -> None:
    """`trace="none"` for the app leaves tracing to contrib."""
    looked, direct = do(
        *(["make_fastapi"], ["contrib", "fastapi"], ["add", "ours", "none"]), ["look", "/both"], ["look", "/direct"]
    )
    parent = server(looked["ours"])
    assert of_tasks(looked["ours"]) == [("BackgroundTask first", parent), ("BackgroundTask second", parent)]
    assert [name for name, _ in of_tasks(direct["ours"])] == ["BackgroundTask first"]
    assert looked["ends"] == [["first", "succeeded"], ["second", "succeeded"]]


@has_fastapi_package
@pytest.mark.parametrize("order", ["theirs, ours", "ours, theirs", "our hooks first"])
def test_contrib_gone_again(order: str) -> None:
    """Uninstrumenting takes contrib's patch away and nothing of ours."""
    *_, both, failing, direct = do(
        *(*ORDERS[order], ["look", "/both"], ["gone", "fastapi"]),
        *(["look", "/both"], ["look", "/failing"], ["look", "/direct"]),
    )
    # The request has no span now: FastAPI's own telemetry has no global provider.
    assert of_tasks(both["ours"]) == [("background_task first", None), ("background_task second", None)]
    assert of_tasks(failing["ours"]) == [("background_task broken", None)]
    assert failing["ends"] == [["broken", "failed"], ["first", "skipped"]]
    assert of_tasks(direct["ours"]) == [("background_task first", None)]


@has_fastapi_package
@pytest.mark.parametrize(
    ("order", "path", "ends"),
    [
        ("our hooks first", "/nested", [["first", "succeeded"], ["outer", "succeeded"]]),
        ("our hooks first", "/adopted", [["first", "succeeded"]]),
        pytest.param(
            *("theirs, ours", "/nested", [["first", "succeeded"], ["outer", "succeeded"]]),
        ),
        pytest.param(
            *("theirs, ours", "/adopted", [["first", "succeeded"]]),
        ),
    ],
)
def test_tasks_that_user_code_runs_are_seen_after_contrib_is_gone(order: str, path: str, ends: list[Any]) -> None:
    """A child run is observed, and an injected task that its endpoint ran itself is not dropped."""
    before, after = do(*ORDERS[order], ["look", path], ["gone", "fastapi"], ["look", path])
    assert before["ends"] == ends
    assert after["ends"] == ends


@has_fastapi_package
@pytest.mark.parametrize("order", ORDERS)
def test_a_child_run_beside_contrib(order: str) -> None:
    """A task that a task awaits is one span too, under its parent run's."""
    (looked,) = do(*ORDERS[order], ["look", "/nested"])
    assert of_tasks(looked["ours"]) == [
        ("background_task first", "background_task outer"),
        ("background_task outer", server(looked["ours"])),
    ]


@has_fastapi_package
@has_native
def test_fastapis_own_and_contrib_at_once() -> None:
    """FastAPI's own telemetry steps back for contrib; one span an attempt, ours."""
    both, failing = do(["native", "ours"], ["contrib", "fastapi"], ["add"], *(["look", "/both"], ["look", "/failing"]))
    check_both(both)
    check_failing(failing)


@has_starlette_package
@pytest.mark.parametrize(
    "steps",
    [
        [["make_starlette"], ["contrib", "starlette"], ["add"]],
        [["make_starlette"], ["add"], ["contrib", "starlette"]],
        [["hooks"], ["make_starlette"], ["add"], ["contrib", "starlette"]],
        [["contrib_all", "starlette"], ["make_starlette"], ["add"]],
    ],
    ids=["theirs, ours", "ours, theirs", "our hooks first", "for all apps"],
)
def test_contrib_for_starlette(steps: list[list[Any]]) -> None:
    """
    opentelemetry-instrumentation-starlette traces the request only, so our spans are there in any order.

    It is a middleware as ours is, and the one that is added last is outermost: inside of it our spans are children of
    the request's; around it they are roots.
    """
    both, failing = do(*steps, ["look", "/both"], ["look", "/failing"])
    within = steps[-1] != ["add"]
    if within:
        check_both(both)
        check_failing(failing)
    else:
        assert of_tasks(both["ours"]) == [("background_task first", None), ("background_task second", None)]
        assert of_tasks(failing["ours"]) == [("background_task broken", None)]


@has_starlette_package
def test_contrib_for_starlette_gone_again() -> None:
    """Uninstrumenting builds the app's middlewares anew; one span an attempt before and after."""
    *_, after, failing = do(
        *(["make_starlette"], ["add"], ["contrib", "starlette"], ["look", "/both"], ["gone", "starlette"]),
        *(["look", "/both"], ["look", "/failing"]),
    )
    assert of_tasks(after["ours"]) == [("background_task first", None), ("background_task second", None)]
    assert of_tasks(failing["ours"]) == [("background_task broken", None)]
    assert failing["ends"] == [["broken", "failed"], ["first", "skipped"]]


def test_no_other_instrumentation() -> None:
    """With a provider and no other instrumentation our spans are roots."""
    both, failing = do(["make_fastapi"], ["add"], ["look", "/both"], ["look", "/failing"])
    assert of_tasks(both["ours"]) == [("background_task first", None), ("background_task second", None)]
    assert of_tasks(failing["ours"]) == [("background_task broken", None)]
    assert failing["status"] == 200
