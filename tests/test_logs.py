"""Log lines: where they go, what they say, what the task's own lines carry."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import structlog
from fastapi import BackgroundTasks, FastAPI, HTTPException
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import TracerProvider
from prometheus_client import CollectorRegistry
from starlette.testclient import TestClient

from aftertask import AftertaskMiddleware, Settings, _log, current_run, task
from aftertask.signals import Logs, RunFilter
from aftertask.testing import VirtualClock

ClientFor = Callable[..., TestClient]


@task(name="logs.ok")
async def ok() -> None: ...


@task(name="logs.broken")
def broken() -> None:
    raise LookupError("password=hunter2 is wrong")


class Stderr:
    """What was written since it was last read."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.read: Callable[[], str] = lambda: capsys.readouterr().err

    def lines(self) -> list[dict[str, Any]]:
        """The JSON lines, each one parsed."""
        return [json.loads(line) for line in self.read().splitlines()]


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Stderr:
    """Nothing is configured, and stderr is read."""
    monkeypatch.setattr(_log, "_handled", lambda: False)  # pytest puts handlers on every logger
    return Stderr(capsys)


@pytest.fixture
def lines() -> Iterator[list[dict[str, Any]]]:
    """structlog is configured as an app would, and its lines are kept."""
    kept: list[dict[str, Any]] = []

    def keep(logger: Any, name: str, event: Any) -> Any:
        kept.append(dict(event))
        raise structlog.DropEvent

    structlog.configure(processors=[structlog.contextvars.merge_contextvars, structlog.stdlib.add_log_level, keep])
    yield kept
    structlog.reset_defaults()


def test_one_json_line_where_nothing_is_configured(client_for: ClientFor, stderr: Stderr) -> None:
    """At info and above, to stderr, with the keys of the contract."""
    with VirtualClock(1_800_000_000):
        client_for(ok, broken, ok, tracer_provider=TracerProvider()).get("/")

    succeeded, failed, skipped = stderr.lines()
    assert succeeded.keys() == {
        *("event", "level", "timestamp", "task", "engine", "http_route", "http_method", "run_id", "attempt"),
        *("trace_id", "span_id", "duration_s", "queue_wait_s"),
    }
    assert (succeeded["event"], succeeded["level"], succeeded["task"]) == ("task.succeeded", "info", "logs.ok")
    assert (succeeded["http_route"], succeeded["http_method"], succeeded["attempt"]) == ("/", "GET", 1)
    assert succeeded["timestamp"] == "2027-01-15T08:00:00.000000Z"
    assert (failed["event"], failed["level"], failed["error_type"]) == ("task.failed", "error", "LookupError")
    assert len(failed["error_fingerprint"]) == 16
    assert (skipped["event"], skipped["level"], skipped["reason"]) == ("task.skipped", "warning", "sibling_failed")
    assert skipped["caused_by"] == failed["run_id"]


def test_text_from_exceptions_is_redacted(client_for: ClientFor, stderr: Stderr) -> None:
    """Message and stack, by Settings.redact."""
    client_for(broken).get("/")
    (failed,) = stderr.lines()
    assert failed["error_message"] == "password=[redacted] is wrong"
    assert "LookupError: password=[redacted] is wrong" in failed["exception"]

    client_for(broken, redact=lambda text: "nothing").get("/")
    (failed,) = stderr.lines()
    assert (failed["error_message"], failed["exception"]) == ("nothing", "nothing")


def test_no_frame_locals_and_no_arguments(registry: CollectorRegistry, stderr: Stderr) -> None:
    """What a task was given stays with it."""
    app = FastAPI()
    app.add_middleware(AftertaskMiddleware, settings=Settings(registry=registry))

    def charge(card: str) -> None:
        pin = card[-4:]
        raise ValueError(f"declined {len(pin)}")

    @app.get("/orders/{number}")
    def endpoint(number: str, tasks: BackgroundTasks) -> None:
        tasks.add_task(charge, "secret-argument")

    client = TestClient(app, raise_server_exceptions=False, headers={"x-secret": "secret-header"})
    client.get("/orders/secret-path?q=secret-query")

    text = stderr.read()
    assert '"http_route": "/orders/{number}"' in text
    assert "secret-" not in text.replace('tasks.add_task(charge, "secret-argument")', "")


def test_structlog_gets_the_events_as_the_app_configured_it(client_for: ClientFor, lines: list[dict[str, Any]]) -> None:
    """All levels: what is shown is the app's own decision."""
    client_for(ok).get("/")
    assert [line["event"] for line in lines] == ["task.scheduled", "task.started", "task.succeeded"]
    assert [line["level"] for line in lines] == ["debug", "debug", "info"]
    assert lines[1]["queue_wait_s"] >= 0
    assert lines[0]["priority"] == 0


def test_the_tasks_own_lines_carry_the_same_keys(client_for: ClientFor, lines: list[dict[str, Any]]) -> None:
    """In an async task and in a sync task's thread; and what was bound before comes back."""

    def sync() -> None:
        structlog.get_logger().info("mine")

    async def asynchronous() -> None:
        structlog.get_logger().info("mine")

    async def after() -> None: ...

    client_for(sync, asynchronous, after, tracer_provider=TracerProvider()).get("/")

    own = [line for line in lines if line["event"] == "mine"]
    ours = [line for line in lines if line["event"] == "task.succeeded"]
    assert len(own) == 2
    for mine, told in zip(own, ours, strict=False):
        for key in ("task", "run_id", "attempt", "engine", "http_route", "http_method", "trace_id", "span_id"):
            assert mine[key] == told[key], key
    assert own[0]["run_id"] != own[1]["run_id"]
    assert own[0]["span_id"] != own[1]["span_id"]


def test_a_run_without_a_span_has_not_the_ids_of_the_one_before(
    client_for: ClientFor, lines: list[dict[str, Any]]
) -> None:
    """Neither on its own lines nor on ours."""

    @task(name="logs.traced")
    async def traced() -> None: ...

    @task(name="logs.untraced", trace="none")
    async def untraced() -> None:
        structlog.get_logger().info("mine")

    client_for(traced, untraced, traced, tracer_provider=TracerProvider()).get("/")
    told = [line for line in lines if line["event"] in ("task.succeeded", "mine")]
    assert [(line["task"], "trace_id" in line, "span_id" in line) for line in told] == [
        ("logs.traced", True, True),
        ("logs.untraced", False, False),
        ("logs.untraced", False, False),
        ("logs.traced", True, True),
    ]
    assert told[0]["trace_id"] != told[3]["trace_id"]


def test_what_the_app_had_bound_comes_back_after_the_batch(registry: CollectorRegistry) -> None:
    """Also under a name of ours."""
    seen: list[dict[str, Any]] = []

    async def look() -> None:
        seen.append(structlog.contextvars.get_contextvars())

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        from starlette.background import BackgroundTask
        from starlette.responses import PlainTextResponse

        structlog.contextvars.bind_contextvars(task="mine", color="red")
        await PlainTextResponse("ok", background=BackgroundTask(look))(scope, receive, send)
        seen.append(structlog.contextvars.get_contextvars())

    TestClient(AftertaskMiddleware(inner, settings=Settings(registry=registry), signals=[Logs()])).get("/")
    during, afterwards = seen
    assert during["color"] == "red"
    assert during["task"].endswith("look")
    assert afterwards == {"task": "mine", "color": "red"}


def test_keys_bound_in_a_sync_endpoint_reach_its_tasks(
    registry: CollectorRegistry, lines: list[dict[str, Any]]
) -> None:
    """A sync endpoint runs in a thread with a copy of the context; its bound keys are copied, and no other variable."""
    app = FastAPI()
    app.add_middleware(AftertaskMiddleware, settings=Settings(registry=registry))

    def mail() -> None:
        structlog.get_logger().info("mine")

    @app.get("/")
    def endpoint(tasks: BackgroundTasks) -> None:
        structlog.contextvars.bind_contextvars(customer="ada")
        tasks.add_task(mail)

    TestClient(app).get("/")
    assert next(line for line in lines if line["event"] == "mine")["customer"] == "ada"
    assert "customer" not in structlog.contextvars.get_contextvars()


def test_stdlib_logging_gets_records_with_extras(client_for: ClientFor, caplog: pytest.LogCaptureFixture) -> None:
    """The message is the event, the keys are attributes."""
    with caplog.at_level(logging.INFO):
        client_for(ok, broken).get("/")
    # Those of runs alone: an earlier test's alert may still be on its way, in a thread of its own.
    succeeded, failed = (record for record in caplog.records if record.message.startswith("task."))
    assert (succeeded.name, succeeded.message, succeeded.levelno) == ("aftertask", "task.succeeded", logging.INFO)
    assert vars(succeeded)["task"] == "logs.ok"
    assert vars(succeeded)["duration_s"] >= 0
    assert (failed.message, failed.levelno) == ("task.failed", logging.ERROR)
    assert vars(failed)["error_type"] == "LookupError"


def test_a_filter_puts_the_keys_on_the_tasks_own_stdlib_records(
    client_for: ClientFor, caplog: pytest.LogCaptureFixture
) -> None:
    """RunFilter on a handler; outside of a run the keys are there and None."""
    runs = []

    def sync() -> None:
        runs.append(current_run())
        logging.getLogger("shop").warning("mine")

    caplog.handler.addFilter(RunFilter())
    try:
        client_for(sync).get("/")
        logging.getLogger("shop").warning("outside")
    finally:
        caplog.handler.filters.clear()
    mine, outside = (record for record in caplog.records if record.name == "shop")
    assert vars(mine)["run_id"] == runs[0].id
    assert vars(mine)["http_route"] == "/"
    assert vars(outside)["run_id"] is None


def test_success_lines_are_limited_and_the_rest_is_counted(client_for: ClientFor, stderr: Stderr) -> None:
    """`success_log_rate` a second; failures always."""
    with VirtualClock(1_800_000_000) as clock:
        client = client_for(*[ok] * 5, broken, success_log_rate=2)
        client.get("/")
        clock.advance(1)
        client.get("/")
    events = [(line["event"], line.get("suppressed_count")) for line in stderr.lines()]
    second = [("task.succeeded", None), ("task.succeeded", None), ("task.failed", None)]
    assert events == [*second, ("task.succeeded", 3), *second[1:]]


def test_a_dropped_task_is_told_with_its_reason(registry: CollectorRegistry, stderr: Stderr) -> None:
    """And the request's trace, though it never had a span."""
    app = FastAPI()
    provider = TracerProvider()
    app.add_middleware(AftertaskMiddleware, settings=Settings(registry=registry, tracer_provider=provider))

    @app.get("/")
    async def endpoint(tasks: BackgroundTasks) -> None:
        tasks.add_task(ok)
        raise HTTPException(409)

    async def under_a_span(scope: Any, receive: Any, send: Any) -> None:
        with provider.get_tracer("server").start_as_current_span("GET"):
            await app(scope, receive, send)

    TestClient(under_a_span).get("/")
    (dropped,) = stderr.lines()
    assert (dropped["event"], dropped["reason"], dropped["attempt"]) == ("task.dropped", "http_exception", 0)
    assert len(dropped["trace_id"]) == 32


def test_the_request_id_comes_from_the_state_and_never_from_a_header(
    registry: CollectorRegistry, stderr: Stderr
) -> None:
    """What an earlier middleware left in scope["state"]["request_id"]."""
    app = FastAPI()

    @app.get("/")
    async def endpoint(tasks: BackgroundTasks) -> None:
        tasks.add_task(ok)

    app.add_middleware(AftertaskMiddleware, settings=Settings(registry=registry))

    async def outer(scope: Any, receive: Any, send: Any) -> None:
        scope.setdefault("state", {})["request_id"] = "from-state"
        await app(scope, receive, send)

    TestClient(outer, headers={"x-request-id": "from-header"}).get("/")
    assert stderr.lines()[0]["request_id"] == "from-state"


def test_an_app_without_any_configuration_writes_one_line(tmp_path: Path) -> None:
    """In a process of its own, as it is run: one JSON line on the real stderr, and nothing on stdout."""
    (tmp_path / "app.py").write_text(
        "from fastapi import BackgroundTasks, FastAPI\n"
        "from starlette.testclient import TestClient\n"
        "from aftertask import AftertaskMiddleware\n"
        "app = FastAPI()\n"
        "app.add_middleware(AftertaskMiddleware)\n"
        "async def mail(): ...\n"
        "@app.get('/')\n"
        "async def endpoint(tasks: BackgroundTasks): tasks.add_task(mail)\n"
        "TestClient(app).get('/')\n"
    )
    done = subprocess.run([sys.executable, "app.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
    (line,) = done.stderr.splitlines()
    assert json.loads(line)["task"] == "__main__.mail"
    assert done.stdout == ""


def test_a_broken_stderr_breaks_no_task(client_for: ClientFor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed stream is nobody's business but its owner's."""
    monkeypatch.setattr(_log, "_handled", lambda: False)
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    assert client_for(ok, broken).get("/").text == "ok"


@pytest.mark.parametrize("how", ["structlog", "logging"])
def test_logging_that_raises_breaks_nothing_and_no_line_is_lost(
    how: str,
    client_for: ClientFor,
    registry: CollectorRegistry,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A processor or a filter of the app's own; the lines go to stderr, and each failure is told and counted."""

    def broken(*given: object) -> Any:
        raise RuntimeError("cannot log, and says what it was given: secret")

    ran: list[int] = []

    async def works() -> None:
        ran.append(1)

    async def fails() -> None:
        ran.append(2)
        raise KeyError("x")

    caplog.set_level("INFO")
    if how == "structlog":
        structlog.configure(processors=[broken])
    else:
        logging.getLogger("aftertask").addFilter(broken)
    try:
        assert client_for(works, fails).get("/").status_code == 200
    finally:
        structlog.reset_defaults()
        logging.getLogger("aftertask").removeFilter(broken)
    assert ran == [1, 2]
    told = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    assert {line["event"] for line in told} >= {"task.succeeded", "task.failed", "signal.failed"}
    assert {line["logging_error"] for line in told} == {"RuntimeError"}
    assert registry.get_sample_value("aftertask_self_errors_total", {"component": "aftertask.signals.logs.Logs"})


@given(st.floats(0, 4e9, allow_nan=False))
def test_a_timestamp_is_told_to_the_microsecond(timestamp: float) -> None:
    """Put together by hand, so it is compared with what Python makes of it."""
    second = int(timestamp)
    told = datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    assert _log.iso(timestamp) == f"{told}.{int((timestamp - second) * 1e6):06d}Z"
