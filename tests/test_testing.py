"""Tools for the tests of users' apps: recorded events, waiting without sleeping, a virtual clock, fixtures."""

from __future__ import annotations

import threading

import pytest
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from aftertask import AftertaskMiddleware, Settings, TaskEvent, task
from aftertask.events import Scheduled, Succeeded
from aftertask.testing import Recorder, VirtualClock, recorded
from kit import ClientFor

pytest_plugins = ["pytester"]


def ok() -> None: ...


def test_a_recorder_keeps_events_by_kind_and_task(client_for: ClientFor) -> None:
    """`of` selects by class and by the last part of a task's name."""
    recorder = Recorder()
    client_for(ok, ok, signals=[recorder]).get("/")
    assert len(recorder.of(Scheduled)) == 2
    assert [event.run.task for event in recorder.of(Succeeded, "ok")] == [f"{__name__}.ok"] * 2
    assert recorder.of(Succeeded, "other") == []
    assert recorder.outcomes() == [("ok", "succeeded")] * 2
    recorder.clear()
    assert recorder.events == []


def test_waiting_ends_when_no_run_is_in_flight(client_for: ClientFor) -> None:
    """A test in another thread waits without sleeping."""
    recorder, go, started = Recorder(), threading.Event(), threading.Event()

    def held() -> None:
        started.set()
        go.wait(10)

    client = client_for(held, signals=[recorder])
    request = threading.Thread(target=client.get, args=["/"])
    request.start()
    assert started.wait(10)
    with pytest.raises(TimeoutError, match=r"after 0.01 s these runs are in flight: .*held .* running"):
        recorder.wait_idle(0.01)
    go.set()
    recorder.wait_idle()
    assert recorder.outcomes() == [("held", "succeeded")]
    request.join()


@pytest.mark.anyio
async def test_an_async_test_waits_on_the_event_loop(anyio_backend: str) -> None:
    """`until` and `idle` are awaited there."""
    await Recorder().idle(1)


def test_a_virtual_clock_stands_still_until_it_is_advanced(client_for: ClientFor) -> None:
    """It never goes back."""
    recorder = Recorder()
    with VirtualClock(1_800_000_000) as clock:
        client_for(lambda: clock.advance(90), signals=[recorder]).get("/")
        with pytest.raises(ValueError, match="cannot go back, got -1"):
            clock.advance(-1)
    (succeeded,) = recorder.of(Succeeded)
    assert succeeded.duration_s == 90
    assert succeeded.at.isoformat() == "2027-01-15T08:01:30+00:00"
    assert recorder.runs()[0].at.isoformat() == "2027-01-15T08:00:00+00:00"


def test_an_existing_app_can_be_recorded_repeatedly() -> None:
    """It may have been made at import and have served requests; afterwards its own signals get the events again."""
    seen: list[TaskEvent] = []
    answer = Route("/", lambda request: PlainTextResponse("x", background=BackgroundTask(ok)))
    settings = Settings(registry=CollectorRegistry(), run_ids_header="x-runs")
    app = Starlette(
        routes=[answer], middleware=[Middleware(AftertaskMiddleware, settings=settings, signals=[seen.append])]
    )
    TestClient(app).get("/")
    for _ in range(2):
        with recorded(app) as events:
            assert "x-runs" in TestClient(app).get("/").headers
        assert events.outcomes() == [("ok", "succeeded")]
    assert len(seen) == 3
    TestClient(app).get("/")
    assert len(seen) == 6


def test_an_app_without_the_middleware_cannot_be_recorded() -> None:
    """The error names the missing middleware."""
    with pytest.raises(ValueError, match="has no AftertaskMiddleware"), recorded(Starlette()):
        pass


def test_the_fixtures_come_with_the_package(pytester: pytest.Pytester) -> None:
    """The package is a pytest plugin: tests import nothing."""
    pytester.makepyfile(
        """
        from starlette.applications import Starlette
        from starlette.background import BackgroundTask
        from starlette.responses import PlainTextResponse
        from starlette.testclient import TestClient
        from aftertask import AftertaskMiddleware

        def mail(): ...

        def test_it(aftertask_events, aftertask_clock):
            app = PlainTextResponse("ok", background=BackgroundTask(mail))
            TestClient(AftertaskMiddleware(app, signals=[aftertask_events])).get("/")
            assert aftertask_events.outcomes() == [("mail", "succeeded")]
            assert aftertask_events.events[0].timestamp == aftertask_clock.timestamp()
        """
    )
    pytester.runpytest_subprocess("-q").assert_outcomes(passed=1)


def test_outcomes_have_the_full_name_of_a_registered_task(client_for: ClientFor) -> None:
    """`mail.welcome` and `shop.welcome` are two tasks; one without a name of its own is called by its function's."""

    @task(name="mail.welcome")
    def welcome() -> None: ...

    def plain() -> None: ...

    recorder = Recorder()
    client_for(welcome, plain, signals=[recorder]).get("/")
    assert recorder.outcomes() == [("mail.welcome", "succeeded"), ("plain", "succeeded")]
