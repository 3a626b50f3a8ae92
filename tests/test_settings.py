"""Settings: every mistake is an error by name when the app is built, with the way out."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.testclient import TestClient

from aftertask import AftertaskMiddleware, Policy, RegistryClash, Settings, task
from aftertask.signals import Metrics


async def app(scope: Any, receive: Any, send: Any) -> None:
    raise AssertionError("this app is never called")


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"metric_path": "/m"}, TypeError, "did you mean 'metrics_path'"),
        ({"journals": "tasks.db"}, TypeError, "did you mean 'journal'"),
        ({"journal": 1}, TypeError, "Settings.journal must be the path of a file or None, got 1"),
        ({"journal": ":memory:"}, ValueError, "Settings.journal must be the path of a SQLite file on a local disk"),
        ({"metrics_path": "metrics"}, ValueError, "begins with a slash, or None, got 'metrics'"),
        ({"metrics_path": "/"}, ValueError, "metrics_path"),
        ({"registry": None}, TypeError, "CollectorRegistry"),
        ({"tracer_provider": "otel"}, TypeError, "TracerProvider"),
        ({"trace": "children"}, ValueError, "'child', 'link', 'none', got 'children'; did you mean 'child'?"),
        ({"context": "all"}, ValueError, "'request', 'endpoint', got 'all'"),
        ({"redact": "yes"}, TypeError, "Settings.redact must be a function that is not async, got 'yes'"),
        ({"redact": app}, TypeError, "Settings.redact must be a function that is not async, got <function app"),
        ({"request_id": "x-request-id"}, TypeError, "Settings.request_id must be a function"),
        ({"success_log_rate": -1}, ValueError, "success_log_rate"),
        ({"success_log_rate": float("nan")}, ValueError, "success_log_rate"),
        ({"success_log_rate": True}, ValueError, "success_log_rate"),
        ({"max_waiting": -1}, ValueError, "max_waiting must be at least 0, got -1; None means no maximum"),
        (
            {"redact": lambda: ""},
            TypeError,
            "Settings.redact is called with one argument, but tests.test_settings.<lambda> does",
        ),
        ({"max_waiting": "many"}, TypeError, "must be a whole number, got 'many'; None means no maximum"),
        ({"run_ids_header": "a b"}, ValueError, "run_ids_header"),
        ({"exclude": "/health"}, TypeError, "Settings.exclude must be a list"),
        ({"exclude": ["health"]}, ValueError, "begin with a slash, got 'health'"),
        ({"policies": {"mail": {"owner": "x"}}}, TypeError, "policies['mail'] must be a Policy"),
        ({"policies": [Policy()]}, TypeError, "must map task names"),
    ],
)
def test_a_bad_setting_is_refused_by_name(values: dict[str, Any], error: type[Exception], message: str) -> None:
    """The message names the setting, the value it got and what is allowed."""
    with pytest.raises(error) as caught:
        Settings(**values)
    assert message in str(caught.value)


@pytest.mark.parametrize("paths", ["/a;/b", "/a; /b", "/a /b", "/a ; /b", "/a,/b;/c", "/a;", "/a; ", "/a;,/b"])
def test_excluded_paths_that_no_comma_separates_are_refused(paths: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one pattern they would match no request."""
    monkeypatch.setenv("AFTERTASK_EXCLUDE", paths)
    with pytest.raises(ValueError, match=f"AFTERTASK_EXCLUDE='{paths}': the paths must be separated by commas"):
        Settings.from_env()


def test_an_excluded_path_may_hold_a_semicolon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a space; what is around a comma does not count."""
    monkeypatch.setenv("AFTERTASK_EXCLUDE", "/a;v=1/*, /my files/b ,\n/c,")
    assert Settings.from_env().exclude == ("/a;v=1/*", "/my files/b", "/c")


@pytest.mark.parametrize(
    "journal",
    ["postgresql://shop:hunter2@db/shop", Path("postgresql://shop:hunter2@db/shop"), "file:hunter2.db?mode=rwc"],
)
def test_a_url_in_place_of_a_journal_is_refused(journal: str | Path) -> None:
    """It would become a file in a folder of that name; its password is not repeated."""
    with pytest.raises(ValueError, match="no URL") as refused:
        Settings(journal=journal)
    assert "hunter2" not in str(refused.value)


def test_the_path_of_a_journal_may_hold_colons() -> None:
    """Only what begins like a URL is taken for one."""
    for path in ("C:/tasks.db", "/var/lib/a:b/tasks.db", "tasks:v1.db"):
        assert Settings(journal=path).journal == path


@pytest.mark.parametrize(
    ("signals", "message"),
    [
        ([3], "a signal must be a Signal or a function that takes an event, got 3"),
        ([Metrics], "write Metrics()"),
        ([app], "is async"),
        (3, "signals must be a list"),
    ],
)
def test_a_bad_signal_is_refused(signals: Any, message: str) -> None:
    """Something that is no signal is an error when the app is built."""
    with pytest.raises(TypeError) as caught:
        AftertaskMiddleware(app, settings=Settings(registry=CollectorRegistry()), signals=signals)
    assert message in str(caught.value)


def test_settings_must_be_settings() -> None:
    """A dict is refused."""
    with pytest.raises(TypeError, match=r"must be an aftertask.Settings"):
        AftertaskMiddleware(app, settings={"trace": "none"})  # type: ignore[arg-type]  # the mistake


def test_an_unknown_argument_of_the_middleware_is_refused_with_a_hint() -> None:
    """Settings are not passed one by one, as other middlewares take them."""
    with pytest.raises(
        TypeError, match=r"'metrics_path' is a setting, not an argument of AftertaskMiddleware; write settings=Settings"
    ):
        AftertaskMiddleware(app, metrics_path="/m")  # type: ignore[call-arg]  # the mistake
    with pytest.raises(TypeError, match=r"unknown setting 'metric_path'; did you mean 'metrics_path'"):
        AftertaskMiddleware(app, metric_path="/m")  # type: ignore[call-arg]  # the mistake
    with pytest.raises(TypeError, match=r"write add_middleware\(AftertaskMiddleware, settings=…\), got Settings"):
        AftertaskMiddleware(app, Settings())  # type: ignore[misc]  # the mistake
    with pytest.raises(TypeError, match="unknown setting 'colour'; known are alerts, ") as raised:
        Settings(colour=1)  # type: ignore[call-arg]
    assert "reads_environment" not in str(raised.value)  # no setting


def test_a_registry_that_has_one_of_our_names_is_refused() -> None:
    """Another library's family under one of our names is an error, and nothing is half registered."""
    registry = CollectorRegistry()
    Counter("aftertask_tasks_scheduled", "theirs", ["route"], registry=registry)

    with pytest.raises(RegistryClash) as caught:
        AftertaskMiddleware(app, settings=Settings(registry=registry))

    assert "aftertask_tasks_scheduled" in str(caught.value)
    assert "Settings(registry=" in str(caught.value)


def test_a_middleware_added_twice_warns() -> None:
    """The app works, but only one of the two observes."""
    settings = Settings(registry=CollectorRegistry())
    inner = AftertaskMiddleware(app, settings=settings)
    with pytest.warns(UserWarning, match="added twice"):
        AftertaskMiddleware(inner, settings=settings)


def test_of_two_middlewares_the_one_that_observes_logs_its_policies(caplog: pytest.LogCaptureFixture) -> None:
    """The settings of the outer one are not in force."""
    twice = Starlette()
    for on_failure in ("continue", "contain"):
        settings = Settings(registry=CollectorRegistry(), on_failure=on_failure)  # type: ignore[arg-type]
        twice.add_middleware(AftertaskMiddleware, settings=settings, signals=[])
    with pytest.warns(UserWarning, match="added twice"), caplog.at_level("INFO"), TestClient(twice):
        pass
    lines = [vars(record) for record in caplog.records if vars(record).get("event") == "lifecycle.policies"]
    assert [line["on_failure"] for line in lines] == ["continue"]


def test_a_mistake_comes_out_of_the_first_request() -> None:
    """Starlette builds its middlewares late; the error is not swallowed there."""
    app = Starlette(middleware=[Middleware(AftertaskMiddleware, settings=Settings(), signals=[3])])
    with pytest.raises(TypeError, match="must be a Signal"):
        TestClient(app).get("/")


def test_the_environment_is_read_by_from_env_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """`from_env` takes each variable; explicit settings ignore them; keywords win."""
    monkeypatch.setenv("AFTERTASK_METRICS_PATH", "/internal/metrics")
    monkeypatch.setenv("AFTERTASK_TRACE", "link")
    monkeypatch.setenv("AFTERTASK_CONTEXT", "endpoint")
    monkeypatch.setenv("AFTERTASK_SUCCESS_LOG_RATE", "none")
    monkeypatch.setenv("AFTERTASK_RUN_IDS_HEADER", "X-Runs")
    monkeypatch.setenv("AFTERTASK_EXCLUDE", "/health, /internal/*")

    settings = Settings.from_env(trace="none")

    assert (settings.metrics_path, settings.trace, settings.context) == ("/internal/metrics", "none", "endpoint")
    assert (settings.success_log_rate, settings.run_ids_header) == (None, "X-Runs")
    assert settings.exclude == ("/health", "/internal/*")
    assert Settings().metrics_path == "/metrics"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("AFTERTASK_TRACE", "both", "AFTERTASK_TRACE"),
        ("AFTERTASK_SUCCESS_LOG_RATE", "many", "AFTERTASK_SUCCESS_LOG_RATE='many'"),
        ("AFTERTASK_METRICS_PATH", "metrics", "AFTERTASK_METRICS_PATH"),
        ("AFTERTASK_DRAIN_TIMEOUT", "30s", "AFTERTASK_DRAIN_TIMEOUT='30s': must be a number of seconds, or none"),
        ("AFTERTASK_MAX_WAITING", "1.5", "AFTERTASK_MAX_WAITING='1.5': must be a whole number, or none"),
        ("AFTERTASK_THREAD_LIMIT", "none", "AFTERTASK_THREAD_LIMIT='none': must be a whole number"),
        (
            "AFTERTASK_JOURNAL",
            "true",
            "AFTERTASK_JOURNAL='true': must be the path of a file, such as tasks.db, or none",
        ),
        ("AFTERTASK_RUN_IDS_HEADER", "1", "AFTERTASK_RUN_IDS_HEADER='1': must be the name of a header"),
        ("AFTERTASK_JOURNAL", "0", "AFTERTASK_JOURNAL='0': must be the path of a file"),
    ],
)
def test_a_bad_variable_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str) -> None:
    """The error names the environment variable, not the setting alone."""
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as caught:
        Settings.from_env()
    assert message in str(caught.value)


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compose file passes one on for a variable that is not set; `none` switches a setting off."""
    for name in ("METRICS_PATH", "TRACE", "THREAD_LIMIT", "SUCCESS_LOG_RATE", "ALERTS", "EXCLUDE"):
        monkeypatch.setenv(f"AFTERTASK_{name}", "")
    assert Settings.from_env() == Settings()
    monkeypatch.setenv("AFTERTASK_METRICS_PATH", "none")
    assert Settings.from_env().metrics_path is None


def test_an_unknown_variable_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt variable must not be ignored."""
    monkeypatch.setenv("AFTERTASK_TRACES", "link")
    with pytest.warns(
        UserWarning, match="unknown environment variable AFTERTASK_TRACES; did you mean 'AFTERTASK_TRACE'"
    ):
        Settings.from_env()


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("DISABLE", "did you mean 'AFTERTASK_DISABLED'?"),
        ("LOG_LEVEL", "known are AFTERTASK_ALERTS, "),
        ("POLICIES", "write it in code: Settings.from_env(policies=…)"),
        ("TIMEOUT", "'timeout' is an option of a task: write Settings(policies={'*': Policy(timeout=…)})"),
    ],
)
def test_an_unknown_variable_has_a_hint_that_is_true(name: str, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prefix that all share makes no two alike, and what is set in code is said so."""
    monkeypatch.setenv(f"AFTERTASK_{name}", "x")
    with pytest.warns(UserWarning, match=re.escape(f"unknown environment variable AFTERTASK_{name}; {hint}")):
        Settings.from_env()


def test_the_variables_of_kubernetes_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Service called aftertask gives every container variables with our prefix."""
    for name in ("AFTERTASK_SERVICE_HOST", "AFTERTASK_SERVICE_PORT_HTTP", "AFTERTASK_PORT", "AFTERTASK_PORT_80_TCP"):
        monkeypatch.setenv(name, "tcp://10.0.0.1:80")
    assert Settings.from_env().trace == "child"


def test_disabled_installs_nothing(monkeypatch: pytest.MonkeyPatch, registry: CollectorRegistry) -> None:
    """With AFTERTASK_DISABLED=1 the app runs alone: no event, no metric, no /metrics."""
    monkeypatch.setenv("AFTERTASK_DISABLED", "1")
    seen: list[object] = []
    wrapped = Starlette(
        middleware=[Middleware(AftertaskMiddleware, settings=Settings(registry=registry), signals=[seen.append])]
    )

    assert TestClient(wrapped).get("/metrics").status_code == 404
    assert not list(registry.collect())
    assert not seen


def test_disabled_takes_only_a_boolean(monkeypatch: pytest.MonkeyPatch) -> None:
    """A typo there must not leave the middleware in place unnoticed."""
    monkeypatch.setenv("AFTERTASK_DISABLED", "maybe")
    with pytest.raises(ValueError, match="AFTERTASK_DISABLED must be 1 or 0, got 'maybe'"):
        AftertaskMiddleware(app)


def test_apps_on_one_registry_register_its_metrics_once(registry: CollectorRegistry) -> None:
    """Thousands of apps may share the registry."""
    settings = Settings(registry=registry)
    for _ in range(3000):
        AftertaskMiddleware(app, settings=settings)
    assert len([m for m in registry.collect() if m.name == "aftertask_tasks_scheduled"]) == 1


def test_importing_the_package_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Nor does the registration of a task."""
    with caplog.at_level(logging.DEBUG):

        @task(name="quiet")
        def quiet() -> None: ...

    assert not [record for record in caplog.records if not record.message.startswith("alert.")]


def test_a_mistake_that_only_the_middleware_finds_is_one_line_on_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Starlette builds the middleware anew for each request; the line says how to see the mistake at startup."""
    monkeypatch.setenv("AFTERTASK_THREAD_LIMIT", "some")
    client = TestClient(Starlette(middleware=[Middleware(AftertaskMiddleware)]), raise_server_exceptions=False)
    for _ in range(3):
        assert client.get("/").status_code == 500

    (line,) = capsys.readouterr().err.splitlines()
    assert "aftertask: the app cannot serve requests: ValueError: AFTERTASK_THREAD_LIMIT='some'" in line
    assert "--lifespan on" in line and "CONFIG_KWARGS" in line


def test_an_unknown_argument_is_reported_as_well(capsys: pytest.CaptureFixture[str]) -> None:
    """It is found before the middleware exists."""
    with pytest.raises(TypeError, match="settings=Settings"):
        AftertaskMiddleware(app, thread_limit=3)
    assert "the app cannot serve requests: TypeError: 'thread_limit' is a setting" in capsys.readouterr().err
