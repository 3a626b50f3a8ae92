"""Tasks and the transaction of their request, by `run_after`, FastAPI's version and the dependency's scope."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from aftertask.events import Dropped, HazardFound
from database.stores import HAS_SCOPE, SQLITE, Shop, Store
from kit import TASKS_COME_FIRST, tasks_come_first
from kit_alerts import Inbox

needs_scope = pytest.mark.skipif(not HAS_SCOPE, reason="dependencies have a scope since FastAPI 0.121")

#: `run_after`, the scope, and whether the dependency ends before the tasks.
CELLS = [
    pytest.param("response", None, not TASKS_COME_FIRST, id="response"),
    pytest.param("request", None, True, id="request"),
    pytest.param("response", "function", True, id="response, scope=function", marks=needs_scope),
    pytest.param("response", "request", False, id="response, scope=request", marks=needs_scope),
    pytest.param("request", "function", True, id="request, scope=function", marks=needs_scope),
]


@pytest.fixture(params=SQLITE)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """A database in a file."""
    with contextlib.closing(SQLITE[request.param](tmp_path / "shop.db")) as store:
        yield store


@pytest.mark.parametrize(("run_after", "scope", "ends_first"), CELLS)
def test_whether_tasks_see_the_rows_of_their_request(
    store: Store, run_after: str, scope: str | None, ends_first: bool
) -> None:
    """They do if the dependency ends first; then its connection is back in its pool, too."""
    shop = Shop(store, run_after, scope)
    with shop.client() as client:
        assert client.post("/mails").status_code == 200
        assert store.rows() == 1
    assert shop.rows_seen == ([1, 1] if ends_first else [0, 0])
    assert shop.seen.outcomes() == [("mails", "succeeded")] * 2
    shop.check_accounts()


@pytest.mark.parametrize(("run_after", "scope", "ends_first"), CELLS)
def test_trio(tmp_path: Path, run_after: str, scope: str | None, ends_first: bool) -> None:
    """A sync session runs in threads there, too."""
    store = SQLITE["flushed"](tmp_path / "shop.db")
    shop = Shop(store, run_after, scope)
    with contextlib.closing(store), shop.client("trio") as client:
        assert client.post("/fails").status_code == 200
        assert client.post("/mails").status_code == 200
        assert store.rows() == (2 if ends_first else 1)
    assert shop.rows_seen == ([2, 2] if ends_first else [0, 0])
    assert ("undoes_request" in {kind for kind, _ in shop.hazards()}) is not ends_first
    shop.check_accounts()


@pytest.mark.parametrize(("run_after", "scope", "ends_first"), CELLS)
def test_what_a_failing_task_does_to_the_rows(
    store: Store, run_after: str, scope: str | None, ends_first: bool
) -> None:
    """Nothing if the dependency ends first; else it rolls back, though the client got 200."""
    shop = Shop(store, run_after, scope)
    with shop.client() as client:
        assert client.post("/fails").status_code == 200
        assert store.rows() == (1 if ends_first else 0)
    assert shop.seen.outcomes() == [("fails", "failed"), ("mails", "skipped")]
    shop.check_accounts()


@pytest.mark.parametrize(("run_after", "scope", "ends_first"), CELLS)
@pytest.mark.parametrize("kind", ["flushed", "core", "async"])
def test_how_long_the_connection_is_held(
    tmp_path: Path, kind: str, run_after: str, scope: str | None, ends_first: bool
) -> None:
    """Until the dependency ends, so while the tasks run if they come first."""
    store = SQLITE[kind](tmp_path / "shop.db")
    shop = Shop(store, run_after, scope)
    with contextlib.closing(store), shop.client() as client:
        client.post("/mails")
    assert shop.checked_out == ([0, 0] if ends_first else [1, 1])


@pytest.mark.parametrize(("run_after", "scope", "ends_first"), CELLS)
def test_what_a_failing_commit_does_to_the_tasks(
    store: Store, run_after: str, scope: str | None, ends_first: bool
) -> None:
    """They do not run if the dependency ends first; after the response they are dropped as bad, `request_failed`."""
    shop = Shop(store, run_after, scope)
    with shop.client() as client:
        status = client.post("/orphan").status_code
        assert store.rows() == 0
    shop.check_accounts()
    if not ends_first:
        assert (status, shop.seen.outcomes()) == (200, [("mails", "succeeded")] * 2)
        return
    assert shop.rows_seen == []
    dropped = shop.seen.of(Dropped)
    if scope == "function" or not TASKS_COME_FIRST:  # the commit fails before the response, which is an error then
        assert status == 500
        assert {(event.reason, event.error_type) for event in dropped} == {("handler_error", store.error)}
        return
    assert status == 200
    assert [(event.reason, event.error_type, event.bad) for event in dropped] == [
        ("request_failed", store.error, True)
    ] * 2


@tasks_come_first
def test_tasks_of_a_failed_commit_are_reported(
    store: Store, capsys: pytest.CaptureFixture[str], no_log_handlers: None
) -> None:
    """By a warning with the error's class, an alert, and the metrics."""
    inbox = Inbox()
    shop = Shop(store, "request", alerts=[inbox])
    with shop.client() as client:
        client.post("/orphan")
        inbox.wait()
    lines = [line for line in capsys.readouterr().err.splitlines() if '"task.dropped"' in line]
    assert len(lines) == 2
    assert all('"reason": "request_failed"' in line and f'"error_type": "{store.error}"' in line for line in lines)
    assert f"its request failed after the response was sent ({store.error})" in inbox.alerts[0].text


# --- hazards


@tasks_come_first
def test_a_task_before_the_commit_is_a_hazard(store: Store) -> None:
    """It names the dependency and the remedies; once for each run."""
    shop = Shop(store, "response")
    with shop.client() as client:
        client.post("/mails")
    assert shop.hazards() == [("runs_before_commit", "mails")] * 2
    advice = shop.seen.of(HazardFound)[0].advice
    assert ".session" in advice and 'scope="function"' in advice and 'run_after="request"' in advice
    assert ("0.121" in advice) is not HAS_SCOPE


@tasks_come_first
def test_a_failure_that_undoes_the_request_is_a_hazard(store: Store) -> None:
    """It names the task that failed."""
    shop = Shop(store, "response")
    with shop.client() as client:
        client.post("/fails")
    assert shop.hazards() == [("runs_before_commit", "fails"), ("undoes_request", "fails")]


@tasks_come_first
def test_a_contained_failure_undoes_nothing(store: Store) -> None:
    """It does not reach the dependency."""
    shop = Shop(store, "response", on_failure="contain")
    with shop.client() as client:
        client.post("/fails")
        assert store.rows() == 1
    assert {kind for kind, _ in shop.hazards()} == {"runs_before_commit"}


@pytest.mark.parametrize(("run_after", "scope", "ends_first"), CELLS)
@pytest.mark.parametrize("what", ["reads", "commits"])
def test_nothing_to_commit_is_no_hazard(
    store: Store, what: str, run_after: str, scope: str | None, ends_first: bool
) -> None:
    """Nothing was written, or it was committed by hand before."""
    if what == "commits" and not store.commits_by_hand:
        pytest.skip("a connection of engine.begin() cannot be committed by hand")
    assert_no_hazard(store, what, run_after, scope)


@pytest.mark.parametrize(("run_after", "scope", "ends_first"), [cell for cell in CELLS if cell.values[2]])
@pytest.mark.parametrize("what", ["fails", "mails"])
def test_a_dependency_that_has_ended_is_no_hazard(
    store: Store, what: str, run_after: str, scope: str | None, ends_first: bool
) -> None:
    """Whatever the task does."""
    assert_no_hazard(store, what, run_after, scope)


def assert_no_hazard(store: Store, what: str, run_after: str, scope: str | None) -> None:
    """One request, and nothing is found."""
    shop = Shop(store, run_after, scope)
    with shop.client() as client:
        assert client.post(f"/{what}").status_code == 200
    assert shop.hazards() == []
