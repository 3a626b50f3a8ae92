"""Durable runs: on disk before the response, run after the request or not at all, and a dead letter if they fail."""

from __future__ import annotations

import re
import sqlite3
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from typing import Any

import anyio
import anyio.from_thread
import pytest
from fastapi import BackgroundTasks, FastAPI
from starlette.background import BackgroundTask
from starlette.responses import JSONResponse, StreamingResponse
from starlette.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send

from aftertask import (
    DuplicateKey,
    JournalError,
    NotSerializable,
    Policy,
    Retry,
    Settings,
    TaskRun,
    cancel_run,
    current_run,
    get_run,
    note,
    options,
    progress,
    task,
)
from aftertask.events import Cancelled, Dropped, Failed, Failure, Rejected, RequestInfo, StoredRun, Succeeded, TaskInfo
from aftertask.journal.record import Record
from kit import TASKS_COME_FIRST, ClientFor, drive, until
from live.servers import eventually

from .conftest import Journaled

DID: list[Any] = []


@pytest.fixture(autouse=True)
def nothing_done() -> None:
    """Tasks note here what they do."""
    DID.clear()


async def mail(to: str, copies: int = 1) -> str:
    """A task."""
    DID.append((to, copies))
    return f"sent to {to}"


def fails(number: int) -> None:
    """A task that fails."""
    DID.append(number)
    raise LookupError(f"no order {number}")


async def reads_its_row(path: str) -> None:
    """A task that looks at the journal."""
    with sqlite3.connect(path) as db:
        run = current_run()
        assert run is not None
        DID.append(db.execute("SELECT state, attempts FROM runs WHERE id = ?", (run.id,)).fetchone())
    db.close()


def reports() -> None:
    """A task that says how far it has come."""
    note(done=DID[0])
    progress(DID[0])


DURABLE = {"*": Policy(durable=True)}


def test_a_durable_run_is_on_disk_before_the_response_starts(shop: Journaled) -> None:
    """With its arguments, as an intent; and the run starts after the request has committed, and says so on disk."""
    app = shop.app(lambda tasks: tasks.add_task(reads_its_row, str(shop.path)), policies=DURABLE)
    before: list[Any] = []

    async def outside(scope: Any, receive: Any, send: Any) -> None:
        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                before.extend((row["state"], row["arguments"], shop.committed) for row in shop.rows())
            await send(message)

        await app(scope, receive, watched)

    anyio.run(lambda: drive(outside, method="POST"), backend=shop.backend)

    committed = 0 if TASKS_COME_FIRST else 1
    assert before == [("accepted", f'{{"path":"{shop.path}"}}', committed)]
    assert DID == [("started", 1)]


def test_it_runs_once_and_its_end_is_kept(shop: Journaled) -> None:
    """The row has times, route and outcome; the header names the run; the accounts are right."""
    with shop.client(lambda tasks: tasks.add_task(mail, "a@b", copies=2), policies=DURABLE) as client:
        answer = client.post("/")
    row = shop.row()
    assert answer.status_code == 200 and answer.headers["x-run-ids"] == row["id"]
    assert DID == [("a@b", 2)]
    assert (row["state"], row["attempts"], row["dead"], row["http_route"]) == ("succeeded", 1, None, "/")
    assert row["scheduled_at"] <= row["ready_at"] <= row["started_at"] <= row["settled_at"]
    assert not shop.execute("SELECT * FROM workers")


@pytest.mark.parametrize("how", ["commit fails", "handler fails"])
def test_a_run_of_a_failed_request_is_never_executed(shop: Journaled, how: str) -> None:
    """Whether the handler raised or the exit code of a dependency."""

    def add(tasks: BackgroundTasks) -> None:
        tasks.add_task(mail, "a@b")
        if how == "handler fails":
            raise LookupError

    shop.commit_fails = how == "commit fails"
    with shop.client(add, policies=DURABLE) as client:
        client.post("/")
    assert DID == []
    assert (shop.row()["state"], shop.row()["dead"]) == ("dropped", None)


def test_arguments_that_cannot_be_stored_fail_the_call(shop: Journaled) -> None:
    """`add_task` raises, so that the endpoint can respond with an error; nothing is promised."""
    raised: list[Exception] = []

    def add(tasks: BackgroundTasks) -> None:
        try:
            tasks.add_task(mail, object())
        except NotSerializable as error:
            raised.append(error)
            raise

    with shop.client(add, policies=DURABLE) as client:
        assert client.post("/").status_code == 500
    assert "mail: the argument 'to' of type object" in str(raised[0])
    assert shop.metric("tasks_not_run_total", task=f"{__name__}.mail", outcome="rejected", reason="not_serializable")
    assert shop.row()["state"] == "rejected"


@pytest.mark.parametrize("more", [0, 1])
def test_arguments_of_at_most_a_mebibyte_are_stored(shop: Journaled, more: int) -> None:
    """Larger ones fail the call; the error names the task, the size in bytes, and the way out."""
    raised: list[NotSerializable] = []
    to = "é" + "x" * (1024 * 1024 + more - len('{"to":"é"}'.encode()))

    def add(tasks: BackgroundTasks) -> None:
        try:
            tasks.add_task(mail, to)
        except NotSerializable as error:
            raised.append(error)

    with shop.client(add, policies=DURABLE) as client:
        assert client.post("/").status_code == 200
    assert shop.row()["state"] == ("rejected" if more else "succeeded")
    assert bool(raised) == bool(more)
    for error in raised:
        assert "mail: its arguments are 1048577 bytes of JSON, and at most 1048576 can be stored; put" in str(error)


@pytest.mark.parametrize("injected", [True, False])
def test_an_unforeseen_error_fails_the_request_too(shop: Journaled, injected: bool) -> None:
    """A durable run never fails open: the response would promise what will not happen."""
    odd = options(mail, durable=True, key="\ud800")
    with shop.client(
        lambda tasks: (
            tasks.add_task(odd, "a@b") if injected else JSONResponse({}, background=BackgroundTask(odd, "a@b"))
        )
    ) as client:
        assert client.post("/").status_code == 500
    assert DID == [] and len(shop.seen.of(Rejected)) == 1


def test_a_response_whose_own_task_cannot_be_stored_fails(shop: Journaled) -> None:
    """It would promise what will not happen."""
    with shop.client(lambda _: JSONResponse({}, background=BackgroundTask(mail, object())), policies=DURABLE) as client:
        assert client.post("/").status_code == 500
    assert DID == []


def test_only_what_is_found_by_name_is_durable(shop: Journaled) -> None:
    """Not a function inside of another, unless it is registered; not a bound method."""

    async def local() -> None: ...

    class Mailer:
        async def send(self) -> None: ...

    for target in (local, Mailer().send):
        text = "a method needs its object" if target is not local else "names no function of a module"
        with shop.client(lambda tasks, target=target: tasks.add_task(target), policies=DURABLE) as client:  # type: ignore[misc]
            assert client.post("/").status_code == 500
        assert text in shop.seen.of(Rejected)[-1].hint
    task(name="local")(local)
    with shop.client(lambda tasks: tasks.add_task(local), policies=DURABLE) as client:
        assert client.post("/").status_code == 200
    assert [row["state"] for row in shop.rows()] == ["rejected", "rejected", "succeeded"]


def test_a_journal_without_a_lifespan_is_reported(shop: Journaled, caplog: pytest.LogCaptureFixture) -> None:
    """A mounted app has none, so nothing would be recovered: one warning, with the first durable run."""
    outer = FastAPI()
    outer.mount("/sub", shop.app(lambda tasks: tasks.add_task(mail, "a@b"), policies=DURABLE))
    with TestClient(outer, backend=shop.backend) as client:  # type: ignore[arg-type]
        assert [client.post("/sub/").status_code for _ in range(2)] == [200, 200]
    with shop.client(lambda tasks: tasks.add_task(mail, "a@b"), policies=DURABLE) as client:
        client.post("/")
    lines = [vars(record) for record in caplog.records if vars(record).get("event") == "setup.mistake"]
    assert [(line["kind"], line["subject"]) for line in lines] == [("no_lifespan", str(shop.path))]
    assert "add AftertaskMiddleware to the outermost app" in lines[0]["advice"]


def test_without_a_journal_nothing_is_durable(client_for: ClientFor) -> None:
    """A policy says so when the app is built, a task when it is added: it is not run as if it were."""
    with pytest.raises(ValueError, match=re.escape("Settings.policies['x']: durable=True needs Settings.journal")):
        Settings(policies={"x": Policy(durable=True)})
    assert client_for(options(mail, durable=True)).get("/").status_code == 500
    assert client_for(options(mail, key="k")).get("/").status_code == 500


def test_a_rejection_says_why_and_what_to_do(client_for: ClientFor, caplog: pytest.LogCaptureFixture) -> None:
    """In the line and in the event, as in the exception that the caller gets, redacted."""
    client_for(options(mail, durable=True)).get("/")
    (line,) = [vars(record) for record in caplog.records if vars(record).get("event") == "task.rejected"]
    assert line["reason"] == "no_journal"
    needs = "which needs a journal, and there is none: set Settings(journal=…) or AFTERTASK_JOURNAL"
    assert line["hint"] == f"{__name__}.mail is durable, {needs}"
    assert f"no_journal: {line['hint']}" in line["message"]
    caplog.clear()
    client_for(options(mail, key="k")).get("/")
    assert f"{__name__}.mail was given key='k', {needs}" in {vars(record).get("hint") for record in caplog.records}
    caplog.clear()
    client_for(options(mail, durable=True), redact=lambda text: "gone").get("/")
    assert "gone" in {vars(record).get("hint") for record in caplog.records}


def test_what_is_added_after_the_response_has_started_is_refused(shop: Journaled) -> None:
    """It cannot be on disk before it."""
    raised: list[JournalError] = []

    def add(tasks: BackgroundTasks) -> StreamingResponse:
        async def stream() -> AsyncIterator[str]:
            yield "x"
            with pytest.raises(JournalError, match="the response has started") as info:
                tasks.add_task(mail, "a@b")
            raised.append(info.value)

        return StreamingResponse(stream(), background=tasks)

    with shop.client(add, policies=DURABLE) as client:
        assert client.post("/").text == "x"
    assert len(raised) == 1 and DID == []
    assert shop.metric("tasks_not_run_total", task=f"{__name__}.mail", outcome="rejected", reason="no_journal") == 1


# --- dead letters


def test_a_failed_durable_run_is_a_dead_letter(shop: Journaled) -> None:
    """With its error, redacted; counted, and logged."""
    with shop.client(
        lambda tasks: tasks.add_task(fails, 7),
        policies={"*": Policy(durable=True, retry=Retry(attempts=2, wait_initial=0))},
    ) as client:
        client.post("/")
    row = shop.row()
    assert (row["state"], row["dead"], row["attempts"], row["error_type"]) == ("failed", "failed", 2, "LookupError")
    assert row["error_message"] == "no order 7" and "LookupError" in row["stack"] and row["fingerprint"]
    assert shop.metric("dead_letters_total", task=f"{__name__}.fails", reason="failed") == 1
    assert DID == [7, 7]


def test_an_expected_failure_is_none(shop: Journaled) -> None:
    """It is a normal part of the task."""
    policy = Policy(durable=True, expected=LookupError)
    with shop.client(lambda tasks: tasks.add_task(fails, 7), policies={"*": policy}) as client:
        client.post("/")
    assert (shop.row()["state"], shop.row()["dead"]) == ("failed", None)


def test_a_sibling_that_is_skipped_was_accepted_too(shop: Journaled) -> None:
    """So it is a dead letter, with that reason."""

    def add(tasks: BackgroundTasks) -> None:
        tasks.add_task(fails, 1)
        tasks.add_task(mail, "a@b")

    with shop.client(add, policies=DURABLE) as client:
        client.post("/")
    assert [(row["state"], row["dead"]) for row in shop.rows()] == [("failed", "failed"), ("skipped", "skipped")]


def test_a_run_that_ends_before_an_earlier_change_is_written_is_a_dead_letter_too(shop: Journaled) -> None:
    """That its request has ended well is written before its end, and does not take the end's place."""
    other = sqlite3.connect(":memory:")

    class Locks(JSONResponse):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            nonlocal other
            await super().__call__(scope, receive, send)
            other = sqlite3.connect(shop.path, isolation_level=None, check_same_thread=False)
            other.execute("BEGIN IMMEDIATE")  # nothing is written from here on

    def add(tasks: BackgroundTasks) -> JSONResponse:
        tasks.add_task(fails, 1)
        tasks.add_task(options(mail, durable=True), "a@b")
        return Locks({})

    with shop.client(add) as client:
        client.post("/")
        other.execute("ROLLBACK")
        other.close()
        eventually(lambda: len([row for row in shop.rows() if row["settled_at"]]) == 2)
    assert [(row["state"], row["dead"]) for row in shop.rows()] == [("failed", None), ("skipped", "skipped")]


def test_history_does_not_write_the_end_of_a_run_that_is_kept() -> None:
    """The end is a change of its own, which says whether it is a dead letter; history may be written at any moment."""
    run = TaskRun(TaskInfo("mail", "mail", durable=True), RequestInfo(), None)
    record = Record(run, is_kept=True, first=run.id)
    record.finish(Failed(run, 1.0, 1, 0.1, LookupError(), Failure(LookupError(), str), False))
    for history in (record.changing(), record.row(1)):
        assert "settled_at" not in history and history.get("state") != "failed"
    assert record.ended()["state"] == "failed"


def test_a_retry_does_not_touch_the_intent_of_a_sibling(shop: Journaled) -> None:
    """Each run has its own row, whatever happens to the others."""

    def add(tasks: BackgroundTasks) -> None:
        tasks.add_task(fails, 1)
        tasks.add_task(mail, "a@b")

    policy = Policy(durable=True, on_failure="contain", retry=Retry(attempts=2, wait_initial=0))
    with shop.client(add, policies={"*": policy}) as client:
        client.post("/")
    assert [(row["state"], row["attempts"]) for row in shop.rows()] == [("failed", 2), ("succeeded", 1)]


def test_a_durable_run_that_compensates_for_an_error_is_kept(shop: Journaled) -> None:
    """From its start on: nothing was promised before."""

    def add(tasks: BackgroundTasks) -> None:
        tasks.add_task(options(fails, run_on_error=True), 3)
        raise RuntimeError

    with shop.client(add, policies=DURABLE) as client:
        assert client.post("/").status_code == 500
    assert DID == [3]
    assert (shop.row()["state"], shop.row()["dead"]) == ("failed", "failed")


# --- keys


def test_one_unsettled_run_a_key(shop: Journaled) -> None:
    """A second one is rejected, and the caller gets the id of the first; once that has ended, the key is free."""
    others: list[str] = []

    def add(tasks: BackgroundTasks) -> None:
        tasks.add_task(options(mail, key="order-42"), "a@b")
        with pytest.raises(DuplicateKey) as info:
            tasks.add_task(options(mail, key="order-42"), "a@b")
        others.append(info.value.run_id)
        tasks.add_task(options(mail, key="order-43"), "a@b")

    with shop.client(add) as client:
        client.post("/")
        client.post("/")
    rows = [row for row in shop.rows() if row["state"] == "succeeded"]
    assert [row["key"] for row in rows] == ["order-42", "order-43"] * 2
    assert others == [rows[0]["id"], rows[2]["id"]]
    assert len(shop.seen.of(Rejected)) == 2 and len(DID) == 4


def test_a_key_is_known_to_every_worker(shop: Journaled) -> None:
    """Another worker's run that has not ended has it, also if the two are admitted at the same time."""
    shop.client(lambda tasks: None).post("/")
    shop.execute(
        "INSERT INTO runs (id, task, code, state, owner, durable, idempotent, origin, key, scheduled_at) "
        "VALUES ('other', 't', 't', 'started', 99, 1, 0, 'request', 'k', 0)"
    )
    raised: list[str] = []

    def add(tasks: BackgroundTasks) -> None:
        with pytest.raises(DuplicateKey) as info:
            tasks.add_task(options(mail, key="k"), "a@b")
        raised.append(info.value.run_id)

    shop.client(add).post("/")
    assert raised == ["other"] and DID == []


def test_a_key_belongs_to_one_call() -> None:
    """Not to a task."""
    with pytest.raises(TypeError, match="use options"):
        task(key="k")
    with pytest.raises(ValueError, match="key belongs to one call"):
        Settings(policies={"x": Policy(key="k")}, journal="x.db")


def test_a_run_with_a_key_is_seen_to_run(shop: Journaled) -> None:
    """By other workers, too."""
    finish = threading.Event()

    def waits() -> None:
        finish.wait(20)

    with shop.client(lambda tasks: tasks.add_task(options(waits, key="k"))) as client, ThreadPoolExecutor() as pool:
        answer = pool.submit(client.post, "/")
        eventually(lambda: [row["state"] for row in shop.rows()] == ["started"])
        finish.set()
        assert answer.result().status_code == 200
    assert shop.row()["state"] == "succeeded"


# --- durable tasks that the app calls itself


def test_a_durable_task_that_the_app_calls_itself_is_history_only(shop: Journaled) -> None:
    """It was not promised to a client, so it is not kept; if its worker dies, it is lost."""

    async def calls() -> None:
        await BackgroundTask(reports_and_looks)()

    DID.append(shop)
    policies = {"*.reports_and_looks": Policy(durable=True)}
    with shop.client(lambda tasks: tasks.add_task(calls), policies=policies) as client:
        client.post("/")
    assert DID[1]["durable"] == 0


def reports_and_looks() -> None:
    """A task that is in the file while it runs, and keeps its row."""
    progress(1)
    (row,) = eventually(lambda: [row for row in DID[0].rows() if row["task"].endswith("reports_and_looks")])
    DID.append(row)


def test_a_durable_run_that_a_sibling_calls_has_started(shop: Journaled) -> None:
    """So that it is not run again if its worker dies."""

    async def calls(tasks: BackgroundTasks) -> None:
        await tasks.tasks[1]()

    def add(tasks: BackgroundTasks) -> None:
        tasks.add_task(calls, tasks)
        tasks.add_task(reads_its_row, str(shop.path))

    with shop.client(add, policies={"*.reads_its_row": Policy(durable=True)}) as client:
        assert client.post("/").status_code == 200
    assert DID == [("started", 1)]


# --- looking at runs, and cancelling them


def test_get_run_knows_a_run_before_during_and_after(shop: Journaled) -> None:
    """In flight as itself; afterwards from the journal, with its progress and its result."""
    found: list[Any] = []

    async def looks() -> dict[str, list[int]]:
        run = current_run()
        assert run is not None
        progress(3, 10, "pages")
        found.append(await get_run(run.id) is run)
        return {"pages": [1, 2]}

    app = shop.app(lambda tasks: tasks.add_task(options(looks, keep_result=True)))

    async def serve() -> None:
        await drive(app, method="POST")
        run = shop.seen.of(Succeeded)[0].run
        stored = await get_run(run.id)
        assert isinstance(stored, StoredRun)
        assert (stored.state, stored.outcome, stored.attempt) == ("succeeded", "succeeded", 1)
        assert stored.result == {"pages": [1, 2]} and stored.progress is not None
        assert stored.progress.text == "3/10 pages" and stored.http_route == "/"
        assert await get_run("unknown") is None

    anyio.run(serve, backend=shop.backend)
    assert found == [True]


def test_a_result_that_is_too_large_is_not_kept(shop: Journaled) -> None:
    """The run has succeeded all the same."""

    async def large() -> str:
        return "x" * 20_000

    with shop.client(lambda tasks: tasks.add_task(options(large, keep_result=True))) as client:
        client.post("/")
    assert (shop.row()["state"], shop.row()["result"]) == ("succeeded", None)


def test_a_result_is_kept_as_it_was_returned(shop: Journaled) -> None:
    """A later change of it is not seen, and a generator is not run."""
    shared = {"pages": 1}

    async def counts() -> dict[str, int]:
        return shared

    async def changes() -> None:
        shared["pages"] = 2

    def generates() -> Iterator[int]:
        DID.append("generated")
        yield 1

    def add(tasks: BackgroundTasks) -> None:
        for each in (counts, changes, generates):
            tasks.add_task(options(each, keep_result=True))

    with shop.client(add) as client:
        client.post("/")
    assert [row["result"] for row in shop.rows()] == ['{"pages":1}', "null", None]
    assert DID == []


@pytest.mark.parametrize(
    "done", [Decimal(3), "three", object(), Fraction(10**400), 10**5000], ids=lambda done: type(done).__name__
)
def test_a_durable_run_ends_whatever_it_reports(shop: Journaled, done: Any) -> None:
    """Progress of any type cannot keep its end off the disk."""
    DID.append(done)
    with shop.client(lambda tasks: tasks.add_task(reports), policies=DURABLE) as client:
        client.post("/")
    assert shop.row()["state"] == "succeeded"
    assert shop.row()["progress"] is None or shop.row()["progress"].startswith("[3.0, ")


def test_cancel_run_cancels_a_coroutine(shop: Journaled) -> None:
    """Its siblings go on, and a durable run that was cancelled by request is no dead letter."""
    started = anyio.Event
    events: dict[str, anyio.Event] = {}

    async def waits() -> None:
        events["started"].set()
        await anyio.sleep_forever()

    task(name="waits", durable=True)(waits)

    def add(tasks: BackgroundTasks) -> None:
        tasks.add_task(waits)
        tasks.add_task(mail, "a@b")

    app = shop.app(add)

    async def serve() -> None:
        events["started"] = started()
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: drive(app, method="POST"))
            await events["started"].wait()
            first, second = [event.run for event in shop.seen.events[:2]]
            assert await cancel_run(first.id) == "cancelled"
            await until(lambda: second.outcome)
            assert await cancel_run(first.id) is None

    anyio.run(serve, backend=shop.backend)
    assert shop.seen.of(Cancelled)[0].reason == "cancel_run" and DID == [("a@b", 1)]
    eventually(lambda: (shop.rows()[0]["state"], shop.rows()[0]["dead"]) == ("cancelled", None))


def test_cancel_run_drops_what_has_not_started_and_refuses_a_thread(shop: Journaled) -> None:
    """A sync function cannot be stopped; one that waits behind it never starts."""
    results: list[Any] = []

    def blocks() -> None:
        run = current_run()
        assert run is not None
        results.append(anyio.from_thread.run(cancel_run, run.id))
        waiting = next(event.run for event in shop.seen.events if event.run is not run)
        results.append(anyio.from_thread.run(cancel_run, waiting.id))

    def add(tasks: BackgroundTasks) -> None:
        tasks.add_task(blocks)
        tasks.add_task(mail, "a@b")

    with shop.client(add) as client:
        client.post("/")
    assert results == ["impossible", "dropped"] and DID == []
    assert [(event.reason, event.bad) for event in shop.seen.of(Dropped)] == [("cancel_run", False)]


def test_a_durable_task_of_an_error_page_runs(shop: Journaled) -> None:
    """The page of a 500 is sent around the middleware: it promises nothing, and the run is kept from its start on."""

    def fails_first(tasks: BackgroundTasks) -> None:
        raise ValueError("no stock")

    app = shop.app(fails_first, policies={"*.mail": Policy(durable=True)})

    @app.exception_handler(Exception)
    def page(request: Any, error: Exception) -> JSONResponse:
        return JSONResponse({}, 500, background=BackgroundTask(mail, "on-call@shop.test"))

    with TestClient(app, raise_server_exceptions=False, backend=shop.backend) as client:  # type: ignore[arg-type]
        assert client.post("/").status_code == 500
        eventually(lambda: shop.row()["state"] == "succeeded")
    assert DID == [("on-call@shop.test", 1)]
