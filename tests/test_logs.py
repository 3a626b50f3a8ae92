"""Log lines: where they go, what is in them, and what the task's own lines carry."""

from __future__ import annotations

import ast
import contextvars
import io
import json
import logging
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from fastapi import BackgroundTasks, FastAPI, HTTPException
from opentelemetry.sdk.trace import TracerProvider
from prometheus_client import CollectorRegistry
from starlette.background import BackgroundTask
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from aftertask import AftertaskMiddleware, Retry, Settings, current_run, progress, task
from aftertask.events import (
    METHODS,
    Abandoned,
    AbandonedEnded,
    Cancelled,
    Dropped,
    Expired,
    Failed,
    Failure,
    HazardFound,
    LoopBlocked,
    Lost,
    Offloaded,
    OffloadFailed,
    Rejected,
    RequestInfo,
    Retrying,
    Scheduled,
    Skipped,
    Slow,
    Started,
    Stuck,
    Succeeded,
    TaskEvent,
    TaskInfo,
    TaskRun,
    TimedOut,
)
from aftertask.signals import Logs, RunFilter
from aftertask.testing import VirtualClock
from kit import ClientFor

Line = dict[str, Any]

ROOT = Path(__file__).parent.parent
STDLIB = logging.getLogger("aftertask")


@task(name="logs.ok")
async def ok() -> None: ...


@task(name="logs.broken")
def broken() -> None:
    raise LookupError("password=hunter2 is wrong")


class Stderr:
    """What was written since it was last read."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.read: Callable[[], str] = lambda: capsys.readouterr().err

    def lines(self) -> list[Line]:
        """The lines, each parsed as JSON."""
        return [json.loads(line) for line in self.read().splitlines()]


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Stderr:
    """No logging is configured."""
    # pytest has handlers on the root logger, and on every logger that does not propagate.
    monkeypatch.setattr(STDLIB, "parent", None)
    return Stderr(capsys)


@pytest.fixture
def lines() -> Iterator[list[Line]]:
    """structlog is configured as by an app; its lines are kept."""
    kept: list[Line] = []

    def keep(logger: Any, name: str, line: Any) -> Any:
        kept.append(dict(line))
        raise structlog.DropEvent

    structlog.configure(processors=[structlog.contextvars.merge_contextvars, structlog.stdlib.add_log_level, keep])
    yield kept
    structlog.reset_defaults()


# --- nothing configured: JSON on stderr


def test_one_json_line_where_nothing_is_configured(client_for: ClientFor, stderr: Stderr) -> None:
    """Without any logging configuration each run ends with one JSON line on stderr, with the keys of the contract."""
    with VirtualClock(1_800_000_000):
        client_for(ok, broken, ok, tracer_provider=TracerProvider()).get("/")

    succeeded, failed, skipped = stderr.lines()
    assert succeeded.keys() == {
        *("event", "level", "timestamp", "task", "engine", "http_route", "http_method", "run_id", "attempt"),
        *("trace_id", "span_id", "duration_s", "queue_wait_s"),
    }
    assert list(succeeded)[:3] == ["event", "level", "timestamp"]
    assert (succeeded["event"], succeeded["level"], succeeded["task"]) == ("task.succeeded", "info", "logs.ok")
    assert (succeeded["http_route"], succeeded["http_method"], succeeded["attempt"]) == ("/", "GET", 1)
    assert succeeded["timestamp"] == "2027-01-15T08:00:00.000000Z"
    assert (failed["event"], failed["level"], failed["error_type"]) == ("task.failed", "error", "LookupError")
    assert len(failed["error_fingerprint"]) == 16
    assert (skipped["event"], skipped["level"], skipped["reason"]) == ("task.skipped", "warning", "sibling_failed")
    assert (skipped["caused_by"], skipped["caused_by_task"]) == (failed["run_id"], "logs.broken")


def test_text_from_exceptions_is_redacted(client_for: ClientFor, stderr: Stderr) -> None:
    """Message and stack of an exception pass `Settings.redact`."""
    client_for(broken).get("/")
    (failed,) = stderr.lines()
    assert failed["error_message"] == "password=[redacted] is wrong"
    assert "LookupError: password=[redacted] is wrong" in failed["exception"]

    client_for(broken, redact=lambda text: "nothing").get("/")
    (failed,) = stderr.lines()
    assert (failed["error_message"], failed["exception"]) == ("nothing", "nothing")


def test_no_frame_locals_and_no_arguments(registry: CollectorRegistry, stderr: Stderr) -> None:
    """Arguments, locals, headers, paths and query strings appear in no line."""
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


def test_a_dropped_run_has_its_reason_and_the_requests_trace(registry: CollectorRegistry, stderr: Stderr) -> None:
    """A run that never started has no span; its line has the ids of the request's."""
    app = FastAPI()
    provider = TracerProvider()
    app.add_middleware(AftertaskMiddleware, settings=Settings(registry=registry, tracer_provider=provider))

    @app.get("/")
    async def endpoint(tasks: BackgroundTasks) -> None:
        tasks.add_task(ok)
        raise HTTPException(409)

    traces = []

    async def under_a_span(scope: Any, receive: Any, send: Any) -> None:
        with provider.get_tracer("server").start_as_current_span("GET") as span:
            traces.append(f"{span.get_span_context().trace_id:032x}")
            await app(scope, receive, send)

    TestClient(under_a_span).get("/")
    (dropped,) = stderr.lines()
    assert (dropped["event"], dropped["reason"], dropped["attempt"]) == ("task.dropped", "http_exception", 0)
    assert [dropped["trace_id"]] == traces


def test_the_request_id_comes_from_the_state_and_never_from_a_header(
    registry: CollectorRegistry, stderr: Stderr
) -> None:
    """By default `request_id` is what an earlier middleware left in `scope["state"]`."""
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
    """A process on its own writes one JSON line to the real stderr, and nothing to stdout."""
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


@pytest.mark.parametrize("stream", ["closed", "full", "absent"])
def test_a_broken_stderr_breaks_no_task(
    stream: str, client_for: ClientFor, stderr: Stderr, monkeypatch: pytest.MonkeyPatch, registry: CollectorRegistry
) -> None:
    """Without a stderr that works there is no line, and that is no error of ours."""

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError("no space left on device")

    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", {"closed": closed, "full": Full(), "absent": None}[stream])
    assert client_for(ok, broken).get("/").text == "ok"
    assert registry.get_sample_value("aftertask_self_errors_total", {"component": "aftertask.signals.logs.Logs"}) in (
        None,
        0,
    )


def test_success_lines_are_limited_and_the_rest_is_counted(client_for: ClientFor, stderr: Stderr) -> None:
    """`success_log_rate` limits `task.succeeded` per second; failures are always logged."""
    with VirtualClock(1_800_000_000) as clock:
        client = client_for(*[ok] * 5, broken, success_log_rate=2)
        client.get("/")
        clock.advance(1)
        client.get("/")
    events = [(line["event"], line.get("suppressed_count")) for line in stderr.lines()]
    succeeded = ("task.succeeded", None)
    first = [succeeded, succeeded, ("task.failed", None)]
    assert events == [*first, ("task.succeeded", 3), succeeded, ("task.failed", 1)]


# --- structlog configured


def test_structlog_gets_the_events_as_the_app_configured_it(client_for: ClientFor, lines: list[Line]) -> None:
    """Events of all levels go to the app's structlog, which decides what is shown."""
    client_for(ok).get("/")
    assert [line["event"] for line in lines] == ["task.scheduled", "task.started", "task.succeeded"]
    assert [line["level"] for line in lines] == ["debug", "debug", "info"]
    assert lines[1]["queue_wait_s"] >= 0
    assert lines[0]["priority"] == 0


def test_structlog_never_gets_the_exception_itself(client_for: ClientFor, lines: list[Line]) -> None:
    """The app's own processors would print the exception's text, which has not been redacted."""
    client_for(broken).get("/")
    (failed,) = (line for line in lines if line["event"] == "task.failed")
    assert "exc_info" not in failed
    assert "hunter2" not in str(failed).replace('LookupError("password=hunter2 is wrong")', "")


class Output:
    """The end of a structlog pipeline."""

    def __init__(self, output: list[str]) -> None:
        self.debug = self.info = self.warning = self.error = output.append


@pytest.mark.parametrize("cached", [True, False])
def test_lines_follow_a_new_configuration_of_structlog(cached: bool, client_for: ClientFor) -> None:
    """An app, or its tests, may configure structlog again; the next line goes where the new configuration sends it."""
    kept: dict[str, list[str]] = {"first": [], "second": []}
    client = client_for(ok)
    try:
        for name, output in kept.items():
            structlog.configure(
                processors=[structlog.processors.KeyValueRenderer(key_order=["event"])],
                logger_factory=lambda *args, output=output: Output(output),
                wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
                cache_logger_on_first_use=cached,
            )
            client.get("/")
            assert [line.partition(" ")[0] for line in output] == ["event='task.succeeded'"], name
    finally:
        structlog.reset_defaults()


def by_filtering_bound_logger(level: int) -> dict[str, Any]:
    """structlog filters, as its docs show."""
    return {"wrapper_class": structlog.make_filtering_bound_logger(level)}


def by_stdlib(level: int) -> dict[str, Any]:
    """stdlib logging filters, asked by structlog."""
    STDLIB.setLevel(level)
    return {
        "wrapper_class": structlog.stdlib.BoundLogger,
        "logger_factory": structlog.stdlib.LoggerFactory(),
        "processors": [structlog.stdlib.filter_by_level, *structlog.get_config()["processors"]],
    }


@pytest.mark.parametrize("configure", [by_filtering_bound_logger, by_stdlib])
@pytest.mark.parametrize(
    ("level", "events"),
    [
        (logging.DEBUG, ["task.scheduled", "task.started", "task.succeeded"]),
        (logging.INFO, ["task.succeeded"]),
        (logging.WARNING, []),
    ],
)
def test_the_level_that_the_app_chose_decides(
    configure: Callable[[int], dict[str, Any]],
    level: int,
    events: list[str],
    client_for: ClientFor,
    lines: list[Line],
) -> None:
    """Lines below the level of the app's structlog are not logged, whichever way it filters."""
    before = STDLIB.level
    structlog.configure(**configure(level))
    try:
        client_for(ok).get("/")
    finally:
        STDLIB.setLevel(before)
    assert [line["event"] for line in lines] == events


def test_a_line_that_is_filtered_is_not_put_together(client_for: ClientFor) -> None:
    """The stack of a failure is not formatted where no line shows it."""
    redacted: list[str] = []

    def redact(text: str) -> str:
        redacted.append(text)
        return text

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        if not hasattr(structlog.make_filtering_bound_logger(logging.INFO), "is_enabled_for"):
            pytest.skip("structlog before 25.1 cannot be asked for its level")
        client_for(broken, redact=redact, signals=[Logs()]).get("/")
    finally:
        structlog.reset_defaults()
    assert redacted == []


# --- keys on the task's own lines


def test_the_tasks_own_lines_carry_the_same_keys(client_for: ClientFor, lines: list[Line]) -> None:
    """In an async task and in a sync task's thread, the app's lines have the keys that identify the run."""

    def sync() -> None:
        structlog.get_logger().info("mine")

    async def asynchronous() -> None:
        structlog.get_logger().info("mine")

    async def after() -> None: ...

    client_for(sync, asynchronous, after, tracer_provider=TracerProvider()).get("/")

    own = [line for line in lines if line["event"] == "mine"]
    ours = [line for line in lines if line["event"] == "task.succeeded"]
    assert len(own) == 2
    for mine, succeeded in zip(own, ours, strict=False):
        for key in ("task", "run_id", "attempt", "engine", "http_route", "http_method", "trace_id", "span_id"):
            assert mine[key] == succeeded[key], key
    assert own[0]["run_id"] != own[1]["run_id"]
    assert own[0]["span_id"] != own[1]["span_id"]


def test_each_attempt_has_its_own_number_and_span(client_for: ClientFor, lines: list[Line]) -> None:
    """The keys are bound anew for a second attempt."""

    @task(name="logs.twice", retry=Retry(attempts=2, wait_initial=0))
    async def twice() -> None:
        structlog.get_logger().info("mine")
        run = current_run()
        assert run is not None
        if run.attempt == 1:
            raise ConnectionError("refused")

    client_for(twice, tracer_provider=TracerProvider()).get("/")
    own = [line for line in lines if line["event"] == "mine"]
    assert [line["attempt"] for line in own] == [1, 2]
    assert own[0]["span_id"] != own[1]["span_id"]
    (retrying,) = (line for line in lines if line["event"] == "task.retrying")
    assert retrying["span_id"] == own[0]["span_id"]


def test_a_run_without_a_span_does_not_have_the_ids_of_the_one_before(client_for: ClientFor, lines: list[Line]) -> None:
    """A run with `trace="none"` has no trace id, on its own lines nor on ours."""

    @task(name="logs.traced")
    async def traced() -> None: ...

    @task(name="logs.untraced", trace="none")
    async def untraced() -> None:
        structlog.get_logger().info("mine")

    client_for(traced, untraced, traced, tracer_provider=TracerProvider()).get("/")
    seen = [line for line in lines if line["event"] in ("task.succeeded", "mine")]
    assert [(line["task"], "trace_id" in line, "span_id" in line) for line in seen] == [
        ("logs.traced", True, True),
        ("logs.untraced", False, False),
        ("logs.untraced", False, False),
        ("logs.traced", True, True),
    ]
    assert seen[0]["trace_id"] != seen[3]["trace_id"]


@pytest.mark.parametrize("fails", [False, True])
def test_what_the_app_had_bound_is_bound_again_after_the_batch(fails: bool, registry: CollectorRegistry) -> None:
    """A key of the app under a name of ours is restored, and none of ours is left, also after a failure."""
    seen: list[Line] = []

    async def look() -> None:
        seen.append(structlog.contextvars.get_contextvars())
        if fails:
            raise ValueError("no")

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        structlog.contextvars.bind_contextvars(task="mine", color="red")
        try:
            await PlainTextResponse("ok", background=BackgroundTask(look))(scope, receive, send)
        finally:
            seen.append(structlog.contextvars.get_contextvars())

    app = AftertaskMiddleware(inner, settings=Settings(registry=registry), signals=[Logs()])
    TestClient(app, raise_server_exceptions=False).get("/")
    during, afterwards = seen
    assert during["color"] == "red"
    assert during["task"].endswith("look")
    assert afterwards == {"task": "mine", "color": "red"}


@pytest.mark.parametrize("async_task", [False, True])
def test_keys_bound_in_a_sync_endpoint_reach_its_tasks(
    async_task: bool, registry: CollectorRegistry, lines: list[Line]
) -> None:
    """A sync endpoint runs in a thread with a copy of the context; the keys it bound are bound for its tasks, too."""
    app = FastAPI()
    app.add_middleware(AftertaskMiddleware, settings=Settings(registry=registry))

    def mail() -> None:
        structlog.get_logger().info("mine")

    async def mail_async() -> None:
        structlog.get_logger().info("mine")

    @app.get("/")
    def endpoint(tasks: BackgroundTasks) -> None:
        structlog.contextvars.bind_contextvars(customer="ada")
        tasks.add_task(mail_async if async_task else mail)

    TestClient(app).get("/")
    mine, succeeded = (line for line in lines if line["event"] in ("mine", "task.succeeded"))
    assert mine["customer"] == succeeded["customer"] == "ada"
    assert "customer" not in structlog.contextvars.get_contextvars()


# --- stdlib logging


def of_runs(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """The records about runs: an earlier test's alert may still be on its way, in a thread of its own."""
    return [record for record in caplog.records if record.message.startswith("task.")]


def test_stdlib_logging_gets_records_with_extras(client_for: ClientFor, caplog: pytest.LogCaptureFixture) -> None:
    """Event and keys are attributes of the record."""
    with caplog.at_level(logging.INFO):
        client_for(ok, broken).get("/")
    succeeded, failed = of_runs(caplog)
    assert re.fullmatch(r"task\.succeeded logs\.ok: took \S+ s \(GET /\)", succeeded.message)
    assert (succeeded.name, succeeded.levelno) == ("aftertask", logging.INFO)
    assert (vars(succeeded)["event"], vars(succeeded)["task"]) == ("task.succeeded", "logs.ok")
    assert vars(succeeded)["duration_s"] >= 0
    assert (vars(failed)["event"], failed.levelno) == ("task.failed", logging.ERROR)
    assert vars(failed)["error_type"] == "LookupError"


def test_the_message_of_a_failure_is_readable_by_itself(
    client_for: ClientFor, caplog: pytest.LogCaptureFixture
) -> None:
    """With a plain `basicConfig` only the message is shown: it has the task, the error, the route and the attempt."""

    @task(name="mail.welcome", retry=Retry(attempts=2, wait_initial=0))
    async def welcome() -> None:
        raise ConnectionError("100% refused\nsecond line")

    client_for(welcome, ok).get("/")
    retrying, failed, skipped = of_runs(caplog)
    assert re.fullmatch(
        r"task\.retrying mail\.welcome: ConnectionError: 100% refused; next attempt in \S+ s \(GET /, attempt 1 of 2\)",
        retrying.message,
    )
    sentence, _, explanation = failed.message.partition(" [")
    assert sentence == "task.failed mail.welcome: ConnectionError: 100% refused (GET /, attempt 2 of 2)"
    assert explanation.startswith("run_id, trace_id and more are attributes of this record")
    assert skipped.message == "task.skipped logs.ok: sibling_failed of mail.welcome (GET /)"


def test_the_record_of_a_failure_has_the_exception_and_prints_the_redacted_stack(
    client_for: ClientFor, caplog: pytest.LogCaptureFixture
) -> None:
    """Error reporters group by `exc_info`; a formatter prints the stack that passed `Settings.redact`."""
    client_for(broken).get("/")
    (failed,) = of_runs(caplog)
    assert failed.exc_info is not None
    assert isinstance(failed.exc_info[1], LookupError)
    printed = logging.Formatter("%(message)s").format(failed)
    assert printed.endswith("LookupError: password=[redacted] is wrong\n")
    assert printed.count("Traceback") == 1


def test_an_identical_failure_is_logged_in_full_once_a_minute(
    client_for: ClientFor, stderr: Stderr, clock: VirtualClock
) -> None:
    """The others are one line each without the stack; another failure or task has a first line of its own."""

    @task(name="logs.other")
    def other() -> None:
        raise LookupError("other")

    client, second = client_for(broken, on_failure="contain"), client_for(other, on_failure="contain")
    for _ in range(3):
        client.get("/")
    second.get("/")
    clock.advance(60)
    client.get("/")

    lines = stderr.lines()
    assert [(line["task"], "exception" in line, line.get("suppressed_count")) for line in lines] == [
        ("logs.broken", True, None),
        ("logs.broken", False, 1),
        ("logs.broken", False, 2),
        ("logs.other", True, None),
        ("logs.broken", True, None),
    ]
    assert all(line["error_message"] and line["error_fingerprint"] for line in lines)


def test_a_repeated_failure_prints_no_traceback(client_for: ClientFor, caplog: pytest.LogCaptureFixture) -> None:
    """Neither our text nor the one that a formatter would make of the exception."""
    client = client_for(broken)
    for _ in range(2):
        client.get("/")
    full, short = (record for record in of_runs(caplog) if record.name == "aftertask")
    formatter = logging.Formatter("%(message)s")
    assert "Traceback" in formatter.format(full)
    assert formatter.format(short) == "task.failed logs.broken: LookupError: password=[redacted] is wrong (GET /)"


def test_what_a_client_causes_is_no_warning(registry: CollectorRegistry, stderr: Stderr) -> None:
    """A task that an `HTTPException` below 500 drops is logged at info, one that a bug drops at warning."""
    app = FastAPI()
    app.add_middleware(AftertaskMiddleware, settings=Settings(registry=registry))

    @app.get("/{status}")
    async def refuse(status: int, tasks: BackgroundTasks) -> None:
        tasks.add_task(ok)
        raise HTTPException(status)

    client = TestClient(app)
    for status in (404, 503):
        client.get(f"/{status}")
    assert [(line["level"], line["reason"]) for line in stderr.lines()] == [
        ("info", "http_exception"),
        ("warning", "handler_error"),
    ]


def test_a_blocked_loop_is_one_readable_line(caplog: pytest.LogCaptureFixture) -> None:
    """With the app's own frames and the innermost one; the hazard about it has no second line."""
    run = TaskRun(TaskInfo("mail.welcome", "mail.welcome"), RequestInfo())
    frames = [(__file__, "welcome"), (json.__file__, "loads"), (__file__, "hook"), (re.__file__, "match")]
    stack = "".join(f'  File "{file}", line 1, in {name}\n    {name}()\n      ^^^^\n' for file, name in frames)
    logs = Logs()
    logs.hazard_found(HazardFound(run, 0.0, "blocked_loop", None, "it blocks the event loop", stack))
    logs.loop_blocked(LoopBlocked(run, 0.0, 0.5, "mail.py:3 in welcome", stack, 0, True))

    (line,) = caplog.records
    assert line.message.startswith(
        "loop.blocked mail.welcome: blocked the event loop for 0.5 s at mail.py:3 in welcome; make the task a plain"
    )
    assert re.findall(r"in (\w+)", vars(line)["stack"]) == ["welcome", "hook", "match"]
    assert vars(line)["advice"].startswith("make the task a plain `def`")


def test_keys_that_a_record_has_itself_get_an_underscore(caplog: pytest.LogCaptureFixture) -> None:
    """A record factory of the app may have set an attribute under a name of ours; it is left as it is."""
    factory = logging.getLogRecordFactory()

    def with_task(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = factory(*args, **kwargs)
        record.task = "the app's"
        return record

    logging.setLogRecordFactory(with_task)
    try:
        Logs().dropped(Dropped(some_run(), 0.0, "other"))
    finally:
        logging.setLogRecordFactory(factory)
    (record,) = of_runs(caplog)
    assert (vars(record)["task"], vars(record)["task_"]) == ("the app's", "logs.some")


def test_a_filter_puts_the_keys_on_the_tasks_own_stdlib_records(
    client_for: ClientFor, caplog: pytest.LogCaptureFixture
) -> None:
    """`RunFilter` on a handler adds the keys to every record; outside of a run they are None."""
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


# --- logging that fails


@pytest.mark.parametrize("how", ["structlog", "logging"])
def test_logging_that_raises_breaks_nothing_and_no_line_is_lost(
    how: str,
    client_for: ClientFor,
    registry: CollectorRegistry,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """If a processor or a filter of the app raises, lines go to stderr, and each failure is logged and counted."""

    def fails_to_log(*given: object) -> Any:
        raise RuntimeError("cannot log secret")

    ran: list[int] = []

    async def works() -> None:
        ran.append(1)

    async def fails() -> None:
        ran.append(2)
        raise KeyError("x")

    caplog.set_level("INFO")
    if how == "structlog":
        structlog.configure(processors=[fails_to_log])
    else:
        STDLIB.addFilter(fails_to_log)
    try:
        assert client_for(works, fails).get("/").status_code == 200
    finally:
        structlog.reset_defaults()
        STDLIB.removeFilter(fails_to_log)
    assert ran == [1, 2]
    written = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    assert {line["event"] for line in written} >= {"task.succeeded", "task.failed", "signal.failed"}
    assert {line["logging_error"] for line in written} == {"RuntimeError"}
    assert registry.get_sample_value("aftertask_self_errors_total", {"component": "aftertask.signals.logs.Logs"})
    assert structlog.contextvars.get_contextvars() == {}


# --- the contract: docs/telemetry.md against the code


def documented() -> dict[str, tuple[str, set[str]]]:
    """Level and keys of each event in the table of `docs/telemetry.md`."""
    text = (ROOT / "docs" / "telemetry.md").read_text().partition("## Log events")[2]
    table: dict[str, tuple[str, set[str]]] = {}
    for row in re.findall(r"^\| (`[a-z_.]+`(?:, `[a-z_.]+`)*) \| ([a-z]+)[^|]* \| (.*) \|$", text, re.MULTILINE):
        events, level, keys = row
        for event in re.findall(r"`([a-z_]+\.[a-z_]+)`", events):
            # Of a remark in parentheses no word is a key.
            table[event] = level, set(re.findall(r"`([a-z_]+)`", re.sub(r"\([^)]*\)", "", keys)))
    return table


def some_run(*, parent: TaskRun | None = None) -> TaskRun:
    """A run of no app."""
    request = RequestInfo()
    request.thread = threading.get_ident()
    return TaskRun(TaskInfo("logs.some", "logs.some"), request, parent=parent)


def every_event() -> list[TaskEvent]:
    """One event of each kind that `Logs` handles, with all it can have."""
    run, other = some_run(), some_run()
    run.started_s, run.thread_s, run.queue_wait_s = 0.0, 1.0, 0.5
    error = ValueError("no")
    failure = Failure(error, str)
    failure.hint = "closed"
    return [
        Scheduled(run, 0.0),
        Started(run, 0.0, 1, 0.1),
        Retrying(run, 0.0, 1, 0.1, error, failure, 1.0),
        Succeeded(run, 0.0, 1, 0.1, None),
        Failed(run, 0.0, 1, 0.1, error, failure, False),
        TimedOut(run, 0.0, 1, 0.1, 1.0, failure),
        Cancelled(run, 0.0, 1, 0.1, "cancelled"),
        Skipped(run, 0.0, "sibling_failed", other),
        Dropped(run, 0.0, "handler_error", "ValueError"),
        Rejected(run, 0.0, "queue_full", "wait"),
        Expired(run, 0.0, "deadline"),
        Lost(run, 0.0, "shutdown", 1.0),
        Slow(run, 0.0, 1.0, 1.0, "stack"),
        Stuck(run, 0.0, 1.0, 1.0, "stack"),
        Abandoned(run, 0.0, 1.0, 1.0, "stack"),
        AbandonedEnded(run, 0.0, 1.0, 1.0),
        HazardFound(run, 0.0, "closed_upload", "file", "read it first"),
        Offloaded(run, 0.0, "celery", "celery", 0.1),
        OffloadFailed(run, 0.0, "celery", 0.1, failure, False),
        OffloadFailed(run, 0.0, "celery", 0.1, failure, True),
    ]


def test_every_event_has_the_level_and_the_keys_of_the_docs(lines: list[Line]) -> None:
    """The table in `docs/telemetry.md` lists each line about a run with its level and the keys it may have."""
    table = documented()

    def log_all() -> None:
        logs = Logs()
        for event in every_event():
            getattr(logs, METHODS[type(event)])(event)
        logs.loop_blocked(LoopBlocked(some_run(), 0.0, 1.0, "app.py:3 in f", "stack", 2, False))

    contextvars.copy_context().run(log_all)  # keys stay bound: the runs never are current
    common = {"event", "level", "timestamp", "task", "run_id", "attempt", "engine"}
    for line in lines:
        level, keys = table[line["event"]]
        assert line["level"] == level, line["event"]
        if line["event"] in ("task.succeeded", "task.failed", "task.timed_out"):
            keys = keys - {"suppressed_count"}  # only where lines or stacks were left out
        if line["event"] in ("task.skipped", "task.dropped", "task.rejected", "task.expired", "task.cancelled"):
            assert line.keys() - common <= keys, line["event"]
        else:
            assert line.keys() - common == keys, line["event"]
    assert len(lines) == len(every_event()) + 1


def test_every_line_that_the_code_writes_is_in_the_docs() -> None:
    """Each call of `log` names a level and an event of the table, and each event of the table is written somewhere."""
    table, found = documented(), set()
    for path in (ROOT / "middleware" / "aftertask").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or len(node.args) < 2:
                continue
            level, event = (arg.value if isinstance(arg, ast.Constant) else None for arg in node.args[:2])
            if level in ("debug", "info", "warning", "error") and isinstance(event, str) and "." in event:
                assert event in table, f"{event} in {path.name}"
                assert table[event][0] == level, f"{event} in {path.name}"
                found.add(event)
    ends = ("failed", "timed_out", "cancelled", "skipped", "dropped", "rejected", "expired", "lost")
    assert found | {f"task.{outcome}" for outcome in ends} == set(table)


@pytest.mark.parametrize(
    ("given", "shown"), [((3, 10, "files"), "3/10 files"), (("half",), "half"), ((1, "many"), "1/many"), ((None,), "")]
)
def test_progress_of_any_type_is_shown(given: Any, shown: str, client_for: ClientFor, lines: list[Line]) -> None:
    """A report fails neither its task nor the lines about it."""

    async def reporting() -> None:
        progress(*given)

    client_for(reporting).get("/")
    assert [line["progress"] for line in lines if line["event"] == "task.succeeded"] == [shown]
    assert not [line for line in lines if line["event"] == "signal.failed"]
