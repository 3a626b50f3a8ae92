"""What was ignored in silence: each is one warning or hazard, with the remedy."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import BackgroundTasks, FastAPI
from prometheus_client import CollectorRegistry
from starlette.background import BackgroundTask
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from aftertask import AftertaskMiddleware, Limit, Policy, Settings, options, task
from aftertask.events import Failed, HazardFound
from aftertask.testing import Recorder
from kit import ClientFor, Env, answering, drive

pytestmark = pytest.mark.anyio


async def send(to: str) -> None:
    """A task."""


def base(number: int) -> int:
    """A function that is called too early."""
    return number


def decorated(func: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate without `functools.wraps`."""

    def inner(*args: Any) -> Any:
        return func(*args)

    return inner


def mistakes(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """The kind and the subject of each mistake in the log."""
    lines = [vars(record) for record in caplog.records if vars(record).get("event") == "setup.mistake"]
    assert all(line["advice"] and line["levelname"] == "WARNING" for line in lines)
    return [(line["kind"], line["subject"]) for line in lines]


def served(app: FastAPI, **settings: Any) -> None:
    """Start and stop an app under the middleware."""
    chosen = Settings(registry=CollectorRegistry(), **settings)
    app.add_middleware(AftertaskMiddleware, settings=chosen, signals=[])
    with TestClient(app):
        pass


# --- @task


def test_task_on_a_partial_warns() -> None:
    """The run has the policy of the function inside."""
    with pytest.warns(UserWarning, match=r"no effect on a functools.partial of .*base") as found:
        task(timeout=3)(functools.partial(base, 1))
    assert found[0].filename == __file__


def test_task_twice_on_one_function_warns() -> None:
    """Only the outer one counts."""
    with pytest.warns(UserWarning, match="used twice on .*twice, and only the outer one counts") as found:

        @task
        @task(timeout=3)
        def twice() -> None: ...

    assert found[0].filename == __file__


def test_a_module_that_is_loaded_again_does_not_warn() -> None:
    """A new function of the same name is registered once."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):

            @task(name="again")
            def again() -> None: ...


def test_a_task_below_a_decorator_without_wraps_is_named(
    client_for: ClientFor, caplog: pytest.LogCaptureFixture
) -> None:
    """Its name and policy are not found; the line says whose, and how to mend it."""

    @decorated
    @task(name="mail.hidden", timeout=3)
    def hidden() -> None: ...

    client_for(hidden, signals=[Recorder()]).get("/")
    (line,) = (vars(record) for record in caplog.records if vars(record).get("event") == "task.hidden")
    assert line["levelname"] == "WARNING"
    assert "it calls mail.hidden, whose @task has no effect here" in line["advice"]
    assert "functools.wraps" in line["advice"]


def test_a_decorator_with_wraps_hides_nothing(client_for: ClientFor, caplog: pytest.LogCaptureFixture) -> None:
    """The task is found through `__wrapped__`."""

    @task(name="mail.seen")
    def seen() -> None: ...

    wrapper = functools.wraps(seen)(decorated(seen))
    recorder = Recorder()
    client_for(wrapper, signals=[recorder]).get("/")
    assert [run.task for run in recorder.runs()] == ["mail.seen"]
    assert not [record for record in caplog.records if vars(record).get("event") == "task.hidden"]


def test_task_on_an_endpoint_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    """Above or below the route."""
    app = FastAPI()

    @app.get("/below")
    @task(name="below")
    async def below() -> None: ...

    @task(name="above")
    @app.get("/above")
    async def above() -> None: ...

    served(app)
    assert [kind for kind, _ in mistakes(caplog)] == ["task_on_endpoint"] * 2


# --- settings


def test_a_policy_that_matches_nothing_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    """A misspelt name or pattern; not what a registered task or a function of a loaded module has."""

    @task(name="mail.welcome")
    def welcome() -> None: ...

    policy = Policy(timeout=3)
    good = ("mail.welcome", "mail.*", "*.welcome", f"{__name__}.send", f"{__name__}.s*", "json.dumps", "json.decoder.*")
    served(FastAPI(), policies=dict.fromkeys((*good, "mial.*", "mail.welcom", f"{__name__}.sned"), policy))
    assert mistakes(caplog) == [
        ("unused_policy", "mial.*"),
        ("unused_policy", "mail.welcom"),
        ("unused_policy", f"{__name__}.sned"),
    ]


def test_a_route_at_the_metrics_path_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    """The app's own route wins."""
    app = FastAPI()
    app.get("/metrics")(lambda: "mine")
    served(app)
    assert mistakes(caplog) == [("metrics_path_taken", "/metrics")]
    caplog.clear()
    app = FastAPI()
    app.get("/metrics")(lambda: "mine")
    served(app, metrics_path=None)
    assert mistakes(caplog) == []


def test_two_limits_of_one_name_and_different_sizes_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    """Each would count for itself, under one label."""
    task(name="first", limit=Limit("smtp", 5))(functools.wraps(base)(decorated(base)))
    served(FastAPI(), policies={"*.second": Policy(limit=Limit("smtp", 9))})
    assert mistakes(caplog) == [("limit_name", "smtp")]


def test_a_result_that_is_kept_nowhere_is_reported(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """There is no journal; not where a policy says otherwise. Where each request that adds it fails, that is said."""
    for name, durable in (("kept", False), ("not.kept", False), ("refused", True)):
        task(name=name, keep_result=True, durable=durable)(functools.wraps(base)(decorated(base)))
    policies = {"not.*": Policy(keep_result=False)}
    served(FastAPI(), policies=policies)
    assert mistakes(caplog) == [("no_journal", "kept"), ("no_journal", "refused")]
    assert "refused is durable, so each request that adds it fails: there is no journal: set Settings(" in caplog.text
    assert "kept is to keep its result, which is lost: there is no journal: set Settings(journal=…)" in caplog.text
    caplog.clear()
    served(FastAPI(), policies=policies, journal=tmp_path / "tasks.db")
    assert mistakes(caplog) == []


def test_a_variable_that_explicit_settings_ignore_is_reported(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one that is in force, that repeats the default, or that the code overrides."""
    monkeypatch.setenv("AFTERTASK_DRAIN_TIMEOUT", "30")
    monkeypatch.setenv("AFTERTASK_ALERTS", "https://example.org/hook")
    monkeypatch.setenv("AFTERTASK_TRACE", "link")
    monkeypatch.setenv("AFTERTASK_RUN_AFTER", "response")
    monkeypatch.setenv("AFTERTASK_THREAD_LIMIT", "many")
    served(FastAPI(), trace="none")
    ignored = ["AFTERTASK_THREAD_LIMIT", "AFTERTASK_DRAIN_TIMEOUT", "AFTERTASK_ALERTS"]
    assert mistakes(caplog) == [("ignored_variable", name) for name in ignored]
    advice = vars(caplog.records[1])["advice"]
    assert "Settings.from_env(…)" in advice and "drain_timeout=…" in advice
    caplog.clear()
    monkeypatch.delenv("AFTERTASK_THREAD_LIMIT")
    app = FastAPI()
    settings = Settings.from_env(registry=CollectorRegistry(), alerts=[])
    app.add_middleware(AftertaskMiddleware, settings=settings, signals=[])
    with TestClient(app):
        assert mistakes(caplog) == []


# --- add_task


def test_a_result_that_a_call_asks_for_in_vain_is_a_hazard(
    client_for: ClientFor, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Once, in the words that the start has for `@task`; with a journal it is kept."""

    async def once() -> int:
        return 1

    client = client_for(options(once, keep_result=True), options(once, keep_result=True))
    assert {client.get("/").status_code for _ in range(2)} == {200}
    advice = "it is to keep its result, which is lost: there is no journal: set Settings(journal=…)"
    assert caplog.text.count(advice) == 1 and "no_journal" in caplog.text
    caplog.clear()
    with client_for(options(once, keep_result=True), journal=tmp_path / "tasks.db") as client:
        client.get("/")
    assert advice not in caplog.text


@pytest.mark.parametrize(
    ("called", "advice"),
    [
        (send, f"it was given a coroutine of {__name__}.send, as if it had been called: write add_task(send, …)"),
        (
            base,
            "it was given an object of type int, not a function: the function was probably called; pass the function",
        ),
    ],
)
async def test_a_call_in_place_of_the_function_is_a_hazard(called: Any, advice: str, env: Env) -> None:
    """`add_task(send(x))`, in a response as well."""
    result = called(1)
    await drive(env.app(answering(BackgroundTask(result))))
    (hazard,) = env.seen.of(HazardFound)
    assert (hazard.kind, hazard.run.outcome) == ("not_callable", "failed")
    assert advice in hazard.advice
    assert hazard.run.task == (f"{__name__}.send" if called is send else "builtins.int")
    assert len(env.seen.of(Failed)) == 1
    if called is send:
        result.close()


async def test_a_background_that_cannot_be_called_is_a_hazard(env: Env, caplog: pytest.LogCaptureFixture) -> None:
    """`background=send(x)`: the app gets its own error, and no error of ours is logged."""
    coroutine = send("a")
    for background, advice in ((coroutine, f"a coroutine of {__name__}.send"), ([send], "an object of type list")):
        env.seen.clear()
        result = await drive(env.app(answering(background)))
        assert isinstance(result.exc, TypeError) and "object is not callable" in str(result.exc)
        (hazard,) = env.seen.of(HazardFound)
        assert hazard.kind == "not_callable" and f"it was given {advice}" in hazard.advice
        assert "write BackgroundTask(send, …)" in hazard.advice or "BackgroundTask(send, to)" in hazard.advice
    assert "signal.failed" not in caplog.text
    coroutine.close()


async def test_add_task_of_a_call_is_a_hazard(env: Env) -> None:
    """With the container that FastAPI injects."""

    async def endpoint(tasks: BackgroundTasks) -> PlainTextResponse:
        tasks.add_task(base(3))  # type: ignore[arg-type]  # the mistake
        return PlainTextResponse("ok")

    await drive(env.fastapi(endpoint))
    assert [hazard.kind for hazard in env.seen.of(HazardFound)] == ["not_callable"]
