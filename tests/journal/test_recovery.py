"""What a worker leaves that is gone: settled by another one, once, while that runs."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from fastapi import BackgroundTasks
from prometheus_client import CollectorRegistry
from starlette.testclient import TestClient

from aftertask import DuplicateKey, Policy, cancel_run, note, options, task
from aftertask.alerts import Alert
from aftertask.events import Dropped
from aftertask.journal import rows
from aftertask.journal.file import beside
from aftertask.journal.locks import Locks
from aftertask.journal.settle import DEAD
from kit import tasks_come_first
from live.servers import eventually

from .conftest import Journaled

APPS = Path(__file__).parent.parent / "live" / "apps"
sys.path.insert(0, str(APPS))

import dying  # noqa: E402  # an app whose tasks are known here by the same names

pytestmark = pytest.mark.timeout(120)  # a process imports FastAPI, maybe on a busy machine


@pytest.fixture(params=["asyncio", pytest.param("trio", marks=pytest.mark.long)])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """The loop looks for others once a second, so each test takes its time."""
    return request.param


@pytest.fixture(autouse=True)
def known_tasks() -> None:
    """The tasks of the app that dies are known here, too."""
    dying.declare()


def command(shop: Journaled, moment: str) -> list[str]:
    """The command of a process that dies at this moment."""
    return [sys.executable, str(APPS / "dying.py"), str(shop.path), moment]


ENV = {**os.environ, "PYTHONPATH": os.pathsep.join([str(APPS.parent.parent), *sys.path])}


def die(shop: Journaled, moment: str) -> None:
    """A worker that dies at this moment."""
    done = subprocess.run(command(shop, moment), env=ENV, capture_output=True, text=True, timeout=60)
    assert done.returncode == 9, done.stderr


@contextlib.contextmanager
def living(shop: Journaled, moment: str) -> Iterator[subprocess.Popen[str]]:
    """A worker that lives until the end."""
    child = subprocess.Popen(command(shop, moment), env=ENV, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    with child:
        assert child.stdout.readline() == "ready\n"
        try:
            yield child
        finally:
            child.kill()


@pytest.fixture
def worker(shop: Journaled) -> Iterator[TestClient]:
    """Another worker, which knows the tasks."""
    dying.DID.clear()
    with TestClient(dying.app(str(shop.path), shop.registry), backend=shop.backend) as client:  # type: ignore[arg-type]
        yield client


def settled(shop: Journaled) -> list[tuple[str, str | None]]:
    """How each run has ended, and why it is a dead letter; waits for that."""
    eventually(lambda: all(row["settled_at"] for row in shop.rows()), seconds=60, what="settling")
    return [(row["state"], row["dead"]) for row in shop.rows()]


def accounts(shop: Journaled, name: str) -> dict[str, float | None]:
    """Runs of a task in the metrics of the worker that settles."""
    found = {
        "scheduled": shop.metric("tasks_scheduled_total", task=name, engine="local"),
        "lost": shop.metric("tasks_finished_total", task=name, engine="local", outcome="lost"),
        "bad": shop.metric("tasks_bad_total", task=name, engine="local"),
    }
    assert shop.metric("tasks_not_run_total", task=name, outcome="lost", reason="crash") == found["lost"]
    return found


@tasks_come_first
def test_an_intent_without_the_end_of_its_request_is_never_run(shop: Journaled, request: pytest.FixtureRequest) -> None:
    """The request may not have committed: a dead letter says so."""
    die(shop, "before the commit")
    assert shop.row()["state"] == "accepted"
    request.getfixturevalue("worker")
    assert settled(shop) == [("lost", "unconfirmed")]
    assert dying.DID == []
    eventually(lambda: accounts(shop, "dying.once") == {"scheduled": 1, "lost": 1, "bad": 1})
    assert shop.metric("journal_recovered_total", task="dying.once", action="dead_lettered") == 1
    assert shop.metric("dead_letters_total", task="dying.once", reason="unconfirmed") == 1


def test_a_run_that_had_started_is_shown_and_one_that_had_not_is_run(
    shop: Journaled, request: pytest.FixtureRequest
) -> None:
    """The second run of the batch is run here, under its own id, with its stored arguments."""
    die(shop, "in once")
    first, second = shop.rows()
    assert (first["state"], second["state"]) == ("started", "ready")
    request.getfixturevalue("worker")
    assert settled(shop) == [("lost", "interrupted"), ("succeeded", None)]
    assert dying.DID == [1] and shop.rows()[1]["id"] == second["id"]


def test_an_idempotent_run_is_started_again(shop: Journaled, request: pytest.FixtureRequest) -> None:
    """And counted."""
    die(shop, "in again")
    request.getfixturevalue("worker")
    assert settled(shop) == [("succeeded", None), ("succeeded", None)]
    assert sorted(dying.DID) == [0, 1] and shop.rows()[0]["recoveries"] == 1
    assert shop.metric("journal_recovered_total", task="dying.again", action="rerun") == 1
    assert accounts(shop, "dying.again") == {"scheduled": 1, "lost": 0, "bad": 0}
    assert accounts(shop, "dying.once") == {"scheduled": 1, "lost": 0, "bad": 0}


def test_a_task_that_kills_its_worker_ends_in_the_dead_letters(shop: Journaled, request: pytest.FixtureRequest) -> None:
    """After three recoveries."""
    die(shop, "in again")
    shop.execute("UPDATE runs SET recoveries = 3 WHERE task = 'dying.again'")
    request.getfixturevalue("worker")
    assert settled(shop)[0] == ("lost", "max_recoveries")
    assert dying.DID == [1]


def test_a_run_that_was_not_durable_is_lost_with_a_word(shop: Journaled, request: pytest.FixtureRequest) -> None:
    """With its task and what it had reported; the accounts stay right."""
    die(shop, "in plain")
    request.getfixturevalue("worker")
    assert settled(shop) == [("lost", None)]
    row = shop.row()
    assert row["reason"] == "crash" and '"pages"' in row["progress"] and dying.DID == []
    eventually(lambda: accounts(shop, "dying.plain") == {"scheduled": 1, "lost": 1, "bad": 1})


def first_alert(shop: Journaled, moment: str) -> Alert:
    """The first alert of a worker that finds what one left that died at this moment."""
    die(shop, moment)
    alerts: list[Alert] = []
    app = dying.app(str(shop.path), shop.registry, alerts=[alerts.append])
    with TestClient(app, backend=shop.backend):  # type: ignore[arg-type]
        return eventually(lambda: alerts, seconds=60)[0]


@pytest.mark.long
def test_a_lost_run_is_alerted(shop: Journaled) -> None:
    """By its task, in the worker that notices."""
    alert = first_alert(shop, "in plain")
    assert (alert.task, alert.kind, alert.reason) == ("dying.plain", "lost", "crash")
    assert alert.message.endswith("s ago; it will never run or finish")


@pytest.mark.long
def test_a_dead_letter_of_a_dead_worker_is_alerted(shop: Journaled, caplog: pytest.LogCaptureFixture) -> None:
    """The alert says that it is one, and why; the log has one line about it."""
    alert = first_alert(shop, "in once")
    assert (alert.task, alert.kind, alert.run_id) == ("dying.once", "lost", shop.rows()[0]["id"])
    assert alert.message.endswith(f"s ago; it is a dead letter: {DEAD['interrupted']}")
    assert accounts(shop, "dying.once")["lost"] == 1
    log = caplog.text
    assert log.count("task.dead_lettered") == 1 and "task.lost" not in log


def test_a_sibling_that_dies_is_noticed_within_seconds(shop: Journaled, worker: TestClient) -> None:
    """Not only at the start."""
    with living(shop, "stop") as sibling:
        assert shop.row()["state"] == "started"
        began = time.monotonic()
        sibling.kill()
        sibling.wait()
        assert settled(shop) == [("lost", "interrupted")]
        assert time.monotonic() - began < 20  # a second, on a machine that is not busy


@pytest.mark.long
def test_a_worker_that_is_stopped_is_not_dead(shop: Journaled, worker: TestClient) -> None:
    """Its lock is held through SIGSTOP; nothing of it is touched."""
    with living(shop, "stop") as sibling:
        sibling.send_signal(signal.SIGSTOP)
        numbers = [row["number"] for row in shop.execute("SELECT number FROM workers")]
        assert len(numbers) == 2
        writes = shop.metric("journal_write_seconds_count", op="recovery")
        looks = eventually(lambda: worker.get("/metrics").text)  # it goes on looking meanwhile
        time.sleep(2.5)  # two looks of the other worker
        assert looks and shop.row()["state"] == "started"
        assert shop.metric("journal_write_seconds_count", op="recovery") == writes
        sibling.send_signal(signal.SIGCONT)


def test_a_task_that_no_worker_knows_waits_ten_minutes(shop: Journaled, worker: TestClient) -> None:
    """For a worker of another version; then it is a dead letter that says so. It blocks no other."""
    columns = "(id, task, code, state, durable, idempotent, origin, arguments, scheduled_at, ready_at)"
    for id, name, arguments, age in (
        ("old", "gone", "{}", 700),
        ("new", "gone", "{}", 10),
        ("misfit", "dying.once", '{"number": "x"}', 700),
        ("fits", "dying.once", '{"number": 5}', 5),
    ):
        ready = time.time() - age
        values = (id, name, f"nowhere.{name}", arguments, ready, ready)
        shop.execute(f"INSERT INTO runs {columns} VALUES (?, ?, ?, 'ready', 1, 0, 'request', ?, ?, ?)", *values)
    eventually(lambda: dying.DID == [5])
    eventually(lambda: sum(row["settled_at"] is not None for row in shop.rows()) == 3)
    found = {row["id"]: (row["state"], row["dead"]) for row in shop.rows()}
    assert found == {
        "old": ("lost", "unknown_task"),
        "new": ("ready", None),
        "misfit": ("lost", "arguments"),
        "fits": ("succeeded", None),
    }
    assert "number" in next(row["error_message"] for row in shop.rows() if row["id"] == "misfit")
    eventually(lambda: accounts(shop, "dying.once") == {"scheduled": 2, "lost": 1, "bad": 1})
    eventually(lambda: accounts(shop, "gone") == {"scheduled": 1, "lost": 1, "bad": 1})


@pytest.mark.long
def test_a_task_of_a_newer_version_waits_for_a_worker_of_that(shop: Journaled, worker: TestClient) -> None:
    """In a rolling restart two versions share the file: the one that does not know the task leaves it alone."""
    columns = "(id, task, code, state, durable, idempotent, origin, arguments, scheduled_at, ready_at)"
    values = ("new", "dying.new", "somewhere.new", '{"number": 7}', time.time(), time.time())
    shop.execute(f"INSERT INTO runs {columns} VALUES (?, ?, ?, 'ready', 1, 0, 'request', ?, ?, ?)", *values)
    counted = shop.metric("journal_write_seconds_count", op="recovery")
    eventually(lambda: shop.metric("journal_entries", state="ready") == 1, what="a look of the old worker")
    assert shop.row()["owner"] is None and shop.metric("journal_write_seconds_count", op="recovery") == counted
    with living(shop, "newer"):
        assert settled(shop) == [("succeeded", None)]
        assert shop.row()["progress"].startswith("[7,")


def test_another_workers_run_is_cancelled_through_the_journal(shop: Journaled, worker: TestClient) -> None:
    """By the worker that has it; one that no worker has is dropped at once."""
    with living(shop, "stop"):
        assert worker.portal is not None
        assert worker.portal.call(cancel_run, shop.row()["id"]) == "requested"
        assert settled(shop) == [("cancelled", None)]
        assert worker.portal.call(cancel_run, shop.row()["id"]) is None


async def fails(key: str = "") -> None:
    """Is not durable by its policy: a call of it was, by `options`."""
    dying.DID.append(shop_rows())
    raise LookupError(key)


shop_rows: Callable[[], Any] = list


def put(shop: Journaled, id: str, **more: Any) -> None:
    """A run that is ready, and that no worker has."""
    now = time.time()
    row = {"id": id, "task": f"{__name__}.fails", "code": f"{__name__}.fails", "state": "ready", "durable": 1}
    row |= {"idempotent": 0, "origin": "request", "arguments": "{}", "scheduled_at": now, "ready_at": now, **more}
    shop.execute(f"INSERT INTO runs ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})", *row.values())


def test_a_stored_run_is_what_it_was_when_it_was_accepted(shop: Journaled, monkeypatch: pytest.MonkeyPatch) -> None:
    """Durable, so that its start is on disk and its failure a letter; with its deadline, counted from then."""
    dying.DID.clear()
    monkeypatch.setattr(sys.modules[__name__], "shop_rows", lambda: shop.rows()[-1]["state"])
    with shop.client(lambda tasks: None, policies={"*": Policy(expires=600)}):
        put(shop, "late", scheduled_at=time.time() - 700)
        put(shop, "now")
        assert settled(shop) == [("expired", None), ("failed", "failed")]
    assert dying.DID == ["started"]


@pytest.mark.long
def test_any_number_of_unknown_runs_blocks_no_other(shop: Journaled, worker: TestClient) -> None:
    """They are older, and stay for ten minutes."""
    for number in range(250):
        put(shop, f"unknown-{number}", task="gone", code="nowhere.gone", ready_at=time.time() - 60)
    put(shop, "known", task="dying.once", code="x", arguments='{"number": 1}')
    eventually(lambda: dying.DID == [1])


def test_a_stored_run_has_its_key(shop: Journaled) -> None:
    """A call with the same key is rejected while it runs, and a letter with it is not replayed."""
    taken: list[str] = []

    def add(tasks: BackgroundTasks) -> None:
        with pytest.raises(DuplicateKey) as info:
            tasks.add_task(options(fails, key="k"))
        taken.append(info.value.run_id)

    task(name="waits", durable=True)(waits)
    with shop.client(add) as client:
        put(shop, "letter", key="k", settled_at=time.time(), state="failed", dead="failed")
        put(shop, "first", task="waits", code=f"{__name__}.waits", key="k")
        eventually(lambda: shop.rows()[1]["state"] == "started")
        assert client.post("/").status_code == 200
        with contextlib.closing(sqlite3.connect(shop.path, timeout=20, isolation_level=None)) as db:
            assert not rows.replay(db, "letter", "replayed", time.time())
            assert client.portal is not None and client.portal.call(cancel_run, "first") == "cancelled"
            eventually(lambda: shop.rows()[1]["settled_at"])
            assert rows.replay(db, "letter", "replayed", time.time())
    assert taken == ["first"] and shop.execute("SELECT key FROM runs WHERE id = 'replayed'") == [{"key": "k"}]


async def waits() -> None:
    """Until it is cancelled."""
    await anyio.sleep_forever()


def test_what_a_stored_run_notes_is_redacted(shop: Journaled) -> None:
    """By the app's own rule, as in a run of a request."""
    task(name="notes", durable=True)(notes)
    with shop.client(lambda tasks: None, redact=lambda text: text.replace("4711", "[id]")):
        put(shop, "run", task="notes", code=f"{__name__}.notes")
        eventually(lambda: shop.row()["settled_at"])
    assert '"customer": "c-[id]"' in shop.row()["more"]


async def notes() -> None:
    """Notes whose work it is."""
    note(customer="c-4711")


def test_a_lock_is_free_when_its_process_dies(shop: Journaled) -> None:
    """Also after kill -9, and only then."""
    with living(shop, "idle") as sibling:
        locks, (row,) = Locks(beside(shop.path, "workers")), shop.execute("SELECT number FROM workers")
        assert not locks.acquire(row["number"])
        sibling.kill()
        sibling.wait()
        assert locks.acquire(row["number"]) and not locks.acquire(row["number"])


def test_a_replayed_letter_is_a_new_run(shop: Journaled, worker: TestClient) -> None:
    """With the stored arguments, linked both ways; if it fails it is a dead letter again."""
    columns = "(id, task, code, state, durable, idempotent, origin, arguments, scheduled_at, settled_at, dead)"
    values = "'letter', 'dying.once', 'x', 'failed', 1, 0, 'request', ?, ?, ?, 'failed'"
    ended = time.time() - 10
    shop.execute(f"INSERT INTO runs {columns} VALUES ({values})", '{"number":3}', ended - 1, ended)
    with contextlib.closing(sqlite3.connect(shop.path, isolation_level=None)) as db:
        assert rows.replay(db, "letter", "replayed", time.time())
        assert not rows.replay(db, "letter", "twice", time.time())
    eventually(lambda: dying.DID == [3])
    letter, new = settled(shop)
    assert (letter, new) == (("failed", None), ("succeeded", None))
    first, second = shop.rows()
    assert (first["replayed_by"], second["replay_of"], second["origin"]) == ("replayed", "letter", "dead_letter")


def test_the_registry_is_not_asked_for_what_it_has_not() -> None:
    """Without a journal there are none of its families."""
    registry = CollectorRegistry()
    from aftertask.signals import Metrics

    Metrics(registry)
    assert not [metric.name for metric in registry.collect() if "journal" in metric.name or "dead" in metric.name]


HELD: list[str] = []


async def needs_startup() -> None:
    """Uses what the app's startup creates."""
    assert HELD == ["pool"]


def test_a_stored_run_waits_for_the_startup_of_the_app(shop: Journaled) -> None:
    """A pool that the lifespan opens is there before what an earlier process has left runs."""
    task(name="needs_startup", durable=True)(needs_startup)
    HELD.clear()

    @contextlib.asynccontextmanager
    async def lifespan(app: object) -> AsyncIterator[None]:
        await anyio.sleep(0.3)  # longer than the first look takes
        HELD.append("pool")
        yield

    app = shop.app(lambda tasks: None)
    app.router.lifespan_context = lifespan
    app.build_middleware_stack()
    put(shop, "first", task="needs_startup", code=f"{__name__}.needs_startup")
    with TestClient(app, backend=shop.backend):  # type: ignore[arg-type]
        eventually(lambda: shop.rows()[0]["settled_at"])
    assert shop.rows()[0]["state"] == "succeeded"


def test_a_compensating_run_does_not_start_beside_one_with_its_key(shop: Journaled) -> None:
    """Another worker takes the key while the handler runs: the run ends, and its function is not called."""
    dying.DID.clear()

    def add(tasks: BackgroundTasks) -> None:
        tasks.add_task(options(fails, key="k", durable=True, run_on_error=True))
        put(shop, "other", key="k", owner=99, state="started")
        raise RuntimeError("broken")

    with shop.client(add) as client:
        assert client.post("/").status_code == 500
        eventually(lambda: len(shop.seen.of(Dropped)) == 1)
    assert dying.DID == [] and [row["state"] for row in shop.rows()] == ["dropped", "started"]
