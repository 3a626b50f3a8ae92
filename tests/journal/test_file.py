"""The file: refused, moved aside, pruned; and what happens when it cannot be written."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from prometheus_client import CollectorRegistry
from starlette.testclient import TestClient

from aftertask import AftertaskMiddleware, JournalError, Policy, Settings, options, progress, task
from aftertask.journal import rows
from aftertask.journal.file import BUSY, FORMAT, beside, connect, prepare, remote_file_system
from aftertask.journal.janitor import Janitor, prune
from aftertask.journal.locks import Locks
from aftertask.journal.writer import Writer
from aftertask.signals import Metrics
from kit import drive
from live.servers import eventually

from .conftest import Journaled


async def quick(number: int = 0) -> None:
    """A task."""


def fails() -> None:
    """A task that fails."""
    raise LookupError("no order")


def reads_a_file() -> None:
    """A task that fails with the name of a file that is no UTF-8."""
    raise ValueError(f"no picture: {os.fsdecode(bytes([255]))}.png")


DURABLE = {"*": Policy(durable=True)}


# --- what is refused at the start


def old(path: Path, *, left: str = "") -> None:
    """A journal of another format, with one run that has ended, and another one where `left` says what is left."""
    prepare(path)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        columns = "(id, task, code, state, durable, idempotent, origin, scheduled_at, settled_at, dead)"
        db.execute(f"INSERT INTO runs {columns} VALUES ('1', 't', 't', 'succeeded', 1, 0, 'request', 1, 2, NULL)")
        if left:
            settled, dead = (2, "failed") if left == "dead letter" else (None, None)
            values = ("2", "t", "t", "ready", 1, 0, "request", 1, settled, dead)
            db.execute(f"INSERT INTO runs {columns} VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", values)
        db.execute("PRAGMA user_version = 99")


def test_a_file_of_another_format_is_moved_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """If it holds only history; a line says so, and the old file is complete."""
    path = tmp_path / "tasks.db"
    old(path)
    prepare(path)
    (aside,) = tmp_path.glob("tasks.db-format99.*")
    with contextlib.closing(sqlite3.connect(aside)) as db:
        assert db.execute("SELECT count(*) FROM runs").fetchone() == (1,)
    with contextlib.closing(connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone()[0] == FORMAT
        assert not db.execute("SELECT * FROM runs").fetchall()
    assert caplog.records[0].message.startswith("journal.moved_aside")


@pytest.mark.parametrize("left", ["unsettled", "dead letter"])
def test_a_file_of_another_format_with_durable_runs_stays(tmp_path: Path, left: str) -> None:
    """The app does not start; the message says why and what to do."""
    path = tmp_path / "tasks.db"
    old(path, left=left)
    with pytest.raises(JournalError, match=f"has format 99, .* reads format {FORMAT}; 1 durable runs in it"):
        AftertaskMiddleware(print, settings=Settings(journal=path, registry=CollectorRegistry()))  # type: ignore[arg-type]
    assert path.exists()


def test_what_is_no_journal_stays(tmp_path: Path) -> None:
    """Another application's database, a file that is none, a folder that is missing."""
    other, text = tmp_path / "app.db", tmp_path / "text.db"
    with contextlib.closing(sqlite3.connect(other)) as db:
        db.execute("CREATE TABLE users (name)")
    text.write_text("not a database" * 100)
    for path, message in (
        (other, "is a database of another application"),
        (text, "file is not a database; whether it holds durable runs is unknown"),
        (tmp_path / "missing" / "tasks.db", "there is no folder.*; create it first"),
        (Path("~") / "tasks.db", "~ is not expanded: write the whole path"),
        (tmp_path, f"is a folder; name a file in it, such as {tmp_path}/tasks.db"),
    ):
        with pytest.raises(JournalError, match=message):
            prepare(path)
    assert text.read_text().startswith("not a database")


def test_a_damaged_journal_is_not_used(tmp_path: Path) -> None:
    """It may hold durable runs, so it stays where it is."""
    path = tmp_path / "tasks.db"
    prepare(path)
    content = path.read_bytes()
    path.write_bytes(content[:100] + b"\xff" * (len(content) - 100))
    with pytest.raises(JournalError, match="cannot be opened"):
        prepare(path)
    assert path.exists()


def test_a_network_file_system_is_refused(tmp_path: Path) -> None:
    """Its type is found in the mounts, by the longest mount point that holds the folder."""
    mounts = tmp_path / "mountinfo"
    folder = tmp_path / "shared" / "deep"
    folder.mkdir(parents=True)
    mounts.write_text(
        "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
        f"30 22 0:40 / {tmp_path}/shared rw,relatime shared:1 - nfs4 server:/x rw\n"
        f"31 22 0:41 / {tmp_path}/sha rw - cifs //x rw\n"
    )
    assert remote_file_system(folder, mounts) == "nfs4"
    assert remote_file_system(tmp_path, mounts) is None
    assert remote_file_system(tmp_path, tmp_path / "no mounts here") is None


def test_four_workers_may_create_the_file_at_once(tmp_path: Path) -> None:
    """None of them fails."""
    failed: list[Exception] = []

    def start() -> None:
        try:
            prepare(tmp_path / "tasks.db")
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


# --- what happens when it cannot be written


def test_a_worker_that_starts_waits_while_another_has_the_file(tmp_path: Path) -> None:
    """As one has that starts or ends at the same moment; else its first durable requests would fail."""
    prepare(tmp_path / "tasks.db")
    other = connect(tmp_path / "tasks.db")
    other.execute("PRAGMA locking_mode = EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    release = threading.Timer(0.3, other.close)
    release.start()
    metrics = Metrics(CollectorRegistry()).for_journal()
    writer = Writer(tmp_path / "tasks.db", metrics, lambda: None, lambda: None)
    writer.close(lambda db: None)
    release.join()


def test_a_deleted_file_fails_durable_requests_and_drops_history(shop: Journaled) -> None:
    """With an error that says so; requests without durable tasks go on."""
    kind = "durable"

    def add(tasks: Any) -> None:
        tasks.add_task(quick) if kind == "plain" else tasks.add_task(quick, 1)

    with shop.client(add, policies=DURABLE) as client:
        assert client.post("/").status_code == 200
        shop.path.unlink()
        with pytest.raises(JournalError, match="was deleted or replaced while it was in use"):
            shop_raises(client)
    assert (shop.metric("journal_errors_total", op="intent") or 0) >= 1

    with shop.client(lambda tasks: tasks.add_task(quick)) as client:  # the restart that the message asks for
        assert client.post("/").status_code == 200
        shop.path.unlink()
        assert client.post("/").status_code == 200
        eventually(lambda: shop.metric("journal_dropped_total"))


def test_what_was_accepted_runs_after_the_file_was_deleted(shop: Journaled) -> None:
    """Beside requests that fail for that reason, one after another."""
    ran: list[str] = []

    async def runs() -> None:
        ran.append("it")

    task(name="runs", durable=True)(runs)
    app = shop.app(lambda tasks: tasks.add_task(runs))

    async def deletes(scope: Any, receive: Any, send: Any) -> None:
        async def watched(message: Any) -> None:
            await send(message)
            if scope["type"] == "http":
                shop.path.unlink(missing_ok=True)  # the response has started, so the run is accepted

        await app(scope, receive, watched)

    client = TestClient(deletes, raise_server_exceptions=False, backend=shop.backend)  # type: ignore[arg-type]
    with client, ThreadPoolExecutor(8) as pool:
        answers = [answer.status_code for answer in pool.map(lambda _: client.post("/"), range(80))]
    assert 200 in answers and 500 in answers
    assert len(ran) == answers.count(200) and not shop.metric("journal_errors_total", op="durable")


def test_history_that_is_dropped_is_counted_once(shop: Journaled) -> None:
    """And not again when the next one is dropped; a run whose start and end are written apart counts twice."""
    with shop.client(lambda tasks: tasks.add_task(quick)) as client:
        assert client.post("/").status_code == 200
        eventually(lambda: shop.rows() and shop.row()["settled_at"])
        shop.path.rename(shop.path.with_suffix(".gone"))
        for number in range(1, 7):
            assert client.post("/").status_code == 200
            eventually(lambda number=number: (shop.metric("journal_dropped_total") or 0) >= number)  # type: ignore[misc]
    assert 6 <= (shop.metric("journal_dropped_total") or 0) <= 12


def shop_raises(client: Any) -> None:
    """The same request, and what the app raises."""
    client._transport.raise_server_exceptions = True
    client.post("/")


@pytest.mark.long
@pytest.mark.timeout(120)
def test_a_locked_file_fails_durable_requests_and_nothing_is_lost(shop: Journaled) -> None:
    """Another process holds the file for longer than SQLite waits; afterwards everything goes on."""
    with shop.client(lambda tasks: tasks.add_task(quick), policies=DURABLE) as client:
        assert client.post("/").status_code == 200
        with locked(shop.path):
            began = time.monotonic()
            with pytest.raises(JournalError, match="database is locked"):
                shop_raises(client)
            assert time.monotonic() - began >= BUSY - 1
        client._transport.raise_server_exceptions = False  # type: ignore[attr-defined]
        assert client.post("/").status_code == 200
    assert [row["state"] for row in shop.rows() if row["settled_at"]].count("succeeded") == 2


@pytest.mark.long
@pytest.mark.timeout(120)
def test_the_end_of_a_durable_run_waits_for_a_locked_file(shop: Journaled) -> None:
    """It is written when that is possible again, and until then nothing is dropped."""

    async def locks(path: str) -> None:
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        db.execute("BEGIN IMMEDIATE")
        threading.Timer(BUSY + 2, lambda: (db.execute("ROLLBACK"), db.close())).start()

    task(name="locks", durable=True)(locks)
    with shop.client(lambda tasks: tasks.add_task(locks, str(shop.path))) as client:
        assert client.post("/").status_code == 200
        eventually(lambda: shop.row()["state"] == "succeeded", seconds=60)
    assert (shop.metric("journal_errors_total", op="durable") or 0) >= 1


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Another connection has the only right to write."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            db.execute("ROLLBACK")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        word = f"no tmpfs can be mounted here: {mounted.stderr.strip()}"
        if os.environ.get("AFTERTASK_TEST_REQUIRE_SERVERS"):
            pytest.fail(word)
        pytest.skip(word)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.long
@pytest.mark.timeout(120)
def test_an_app_that_starts_on_a_full_disk_opens_the_journal_later(small_disk: Path, anyio_backend: str) -> None:
    """Its number as a worker, which was not written, hinders neither itself nor others."""
    shop = Journaled(small_disk, anyio_backend)
    client = shop.client(lambda tasks: tasks.add_task(quick), policies=DURABLE)
    client.app.build_middleware_stack()  # type: ignore[attr-defined]  # the file is created
    with contextlib.closing(connect(shop.path)) as another:
        another.execute("INSERT INTO workers (pid, started_at) VALUES (0, 0)")
        filler = small_disk / "filler"
        fill(filler)
        with client:
            assert client.post("/").status_code == 500
            filler.unlink()
            eventually(lambda: client.post("/").status_code == 200)


def fill(filler: Path) -> None:
    """Leave no byte free."""
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)


@pytest.mark.long
@pytest.mark.timeout(120)
def test_a_full_disk_fails_durable_requests_and_nothing_is_lost(small_disk: Path, anyio_backend: str) -> None:
    """Every request that was answered with success has run; history is dropped and counted; then it goes on."""
    shop, ran = Journaled(small_disk, anyio_backend), list[int]()

    async def runs(number: int) -> None:
        ran.append(number)

    task(name="runs", durable=True)(runs)
    number, accepted, refused = 0, list[int](), 0
    with shop.client(lambda tasks: tasks.add_task(runs, number)) as client:
        assert client.post("/").status_code == 200
        filler = small_disk / "filler"
        fill(filler)
        while refused < 3 and number < 3000:
            number += 1
            if client.post("/").status_code == 200:
                accepted.append(number)
            else:
                refused += 1
        assert refused == 3, "the disk never was full"
        assert (shop.metric("journal_errors_total", op="intent") or 0) >= 3
        filler.unlink()
        number += 1
        assert client.post("/").status_code == 200
        accepted.append(number)
    assert sorted(ran[1:]) == accepted
    kept = [row for row in shop.rows() if row["state"] == "succeeded"]
    assert len(kept) == len(accepted) + 1
    assert not [row for row in shop.rows() if row["settled_at"] is None]


# --- history


def test_a_run_that_outlives_the_app_is_left_to_the_next_worker(shop: Journaled) -> None:
    """A server may end the lifespan while a run goes on: its row, written last, has an owner that is known."""
    started: list[anyio.Event] = []

    async def goes_on() -> None:
        started[0].set()
        await anyio.sleep_forever()

    app = shop.app(lambda tasks: tasks.add_task(goes_on))

    async def serve() -> None:
        started.append(anyio.Event())
        to_app, receive = anyio.create_memory_object_stream[Any](5)
        send, from_app = anyio.create_memory_object_stream[Any](5)
        with to_app, receive, send, from_app:
            async with anyio.create_task_group() as group:
                group.start_soon(app, {"type": "lifespan"}, receive.receive, send.send)
                await to_app.send({"type": "lifespan.startup"})
                await from_app.receive()
                async with anyio.create_task_group() as requests:
                    requests.start_soon(lambda: drive(app, method="POST"))
                    await started[0].wait()
                    await to_app.send({"type": "lifespan.shutdown"})
                    await from_app.receive()
                    owners = {row["owner"] for row in shop.rows() if row["settled_at"] is None}
                    assert owners == {row["number"] for row in shop.execute("SELECT number FROM workers")} != set()
                    requests.cancel_scope.cancel()

    anyio.run(serve, backend=shop.backend)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
def test_the_lifespan_ends_with_its_shutdown(shop: Journaled) -> None:
    """A server ends its event loop right after the shutdown: nothing of ours is left that would fail the lifespan."""
    app, left = shop.app(lambda tasks: None), list[str]()
    asked: Any = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]

    async def receive() -> Any:
        await anyio.lowlevel.checkpoint()
        return asked.pop(0)

    async def send(message: Any) -> None:
        if message["type"] == "lifespan.shutdown.complete":
            others = asyncio.all_tasks() - {asyncio.current_task()}
            left.extend(str(task) for task in others)

    async def serve() -> None:
        await app({"type": "lifespan"}, receive, send)

    asyncio.run(serve())
    assert asked == left == []


def test_history_has_every_run(shop: Journaled) -> None:
    """With its times, route, error and progress; written behind, off the loop."""

    async def reports() -> None:
        progress(1, 3, "pages")

    def add(tasks: Any) -> None:
        tasks.add_task(reports)
        tasks.add_task(fails)
        tasks.add_task(quick)

    with shop.client(add) as client:
        client.post("/")
    first, second, third = shop.rows()
    assert (first["state"], second["state"], third["state"]) == ("succeeded", "failed", "skipped")
    assert first["progress"].startswith('[1, 3, "pages"') and first["duration_s"] is not None
    assert (second["error_type"], second["error_message"], second["dead"]) == ("LookupError", "no order", None)
    assert "in fails" in second["stack"] and third["reason"] == "sibling_failed"
    assert {row["http_route"] for row in (first, second, third)} == {"/"}


def test_a_running_task_and_its_progress_are_seen_from_outside(shop: Journaled) -> None:
    """Within seconds, while it runs."""
    go_on = threading.Event()

    def waits() -> None:
        progress(4, 9, "files")
        go_on.wait(30)

    with shop.client(lambda tasks: tasks.add_task(waits)) as client:
        posting = threading.Thread(target=lambda: client.post("/"))
        posting.start()
        try:
            row = eventually(lambda: [row for row in shop.rows() if row["progress"]])[0]
            assert row["state"] == "started" and '"files"' in row["progress"]
        finally:
            go_on.set()
            posting.join()
    assert shop.row()["state"] == "succeeded"


@pytest.mark.parametrize("durable", [False, True])
def test_text_that_is_none_is_kept_with_escapes(shop: Journaled, durable: bool) -> None:
    """A lone surrogate cannot be stored, and names of files have them; the end of the run is written all the same."""
    with shop.client(lambda tasks: tasks.add_task(options(reads_a_file, durable=durable))) as client:
        client.post("/")
    row = shop.row()
    assert (row["state"], row["dead"]) == ("failed", "failed" if durable else None)
    assert row["error_message"] == "no picture: \\udcff.png" and "\\udcff.png" in row["stack"]
    assert not shop.metric("journal_dropped_total")


def test_old_rows_are_pruned_but_no_dead_letters(tmp_path: Path) -> None:
    """Failures are kept longer than successes; beyond a number, the oldest go."""
    path, now = tmp_path / "tasks.db", time.time()
    prepare(path)
    day = 86400.0
    with contextlib.closing(connect(path)) as db:
        for id, state, age, dead in (
            ("s8", "succeeded", 8, None),
            ("s1", "succeeded", 1, None),
            ("s2", "succeeded", 2, None),
            ("f8", "failed", 8, None),
            ("f31", "failed", 31, None),
            ("d99", "failed", 99, "failed"),
        ):
            ended = now - age * day
            row = {"id": id, "task": "t", "code": "t", "state": state, "durable": 0, "idempotent": 0, "dead": dead}
            rows.upsert(db, {**row, "origin": "request", "owner": 1, "scheduled_at": ended, "settled_at": ended})
        assert prune(db)
        assert not prune(db)
        left = [row["id"] for row in db.execute("SELECT id FROM runs ORDER BY id")]
        assert left == ["d99", "f8", "s1", "s2"]
        assert prune(db, most_rows=1)
        left = [row["id"] for row in db.execute("SELECT id FROM runs ORDER BY id")]
        assert left == ["d99", "f8", "s1"]


def test_history_makes_room_in_a_file_that_is_too_large(tmp_path: Path) -> None:
    """The oldest successes go first, then the oldest of the others, 500 at a time; dead letters stay."""
    path, now = tmp_path / "tasks.db", time.time()
    prepare(path)
    with contextlib.closing(connect(path)) as db:
        db.execute("BEGIN")
        for at in range(600):
            for state, dead in (("succeeded", None), ("failed", None), ("failed", "failed")):
                row = {"id": f"{state} {dead} {at}", "task": "t", "code": "t", "state": state, "dead": dead}
                row |= {"durable": 0, "idempotent": 0, "origin": "request", "stack": "x" * 10_000 if not dead else ""}
                rows.upsert(db, {**row, "owner": 1, "scheduled_at": now, "settled_at": now - 600 + at})
        db.execute("COMMIT")

        def left() -> list[tuple[str, int, int]]:
            found = "SELECT state, count(*), max(settled_at - ?) FROM runs WHERE dead IS NULL GROUP BY state"
            return [(state, number, round(last)) for state, number, last in db.execute(found, (now,))]

        for most_bytes, expected in (
            (20e6, [("failed", 600, -1), ("succeeded", 600, -1)]),
            (10e6, [("failed", 600, -1), ("succeeded", 100, -1)]),
            (6e6, [("failed", 100, -1)]),
            (0, []),
        ):
            while prune(db, most_bytes=int(most_bytes)):
                pass
            assert left() == expected
        assert db.execute("SELECT count(*) FROM runs WHERE dead IS NOT NULL").fetchone()[0] == 600


@pytest.mark.long
@pytest.mark.timeout(120)  # it writes 400 MB
def test_the_write_ahead_log_stays_small_under_steady_load(tmp_path: Path) -> None:
    """Something is written at every moment, also while it is copied into the file."""
    path = tmp_path / "tasks.db"
    prepare(path)
    janitor, written, largest = Janitor(path, Locks(beside(path, "workers"))), 0, 0
    with contextlib.closing(connect(path)) as db:
        db.execute("CREATE TABLE load (data)")
        db.execute("PRAGMA synchronous = OFF")
        while written < 400_000_000:
            with contextlib.suppress(sqlite3.OperationalError):
                db.execute("INSERT INTO load VALUES (zeroblob(40000))")
                written += 40_000
            if not written % 40_000_000:
                db.execute("DELETE FROM load")
            time.sleep(0.0005)
            largest = max(largest, beside(path, "wal").stat().st_size)
    janitor.close()
    assert largest < written / 2


def test_two_apps_of_one_process_share_a_file(shop: Journaled) -> None:
    """Neither takes the other for dead."""
    registry = CollectorRegistry()
    with (
        shop.client(lambda tasks: tasks.add_task(quick), policies=DURABLE) as one,
        shop.client(lambda tasks: tasks.add_task(quick), policies=DURABLE, registry=registry) as two,
    ):
        for client in (one, two, one):
            assert client.post("/").status_code == 200
        eventually(lambda: registry.get_sample_value("aftertask_journal_entries", {"state": "ready"}) == 0)
        assert len(shop.execute("SELECT * FROM workers")) == 2
    assert [row["state"] for row in shop.rows()] == ["succeeded"] * 3


def serve_in_child(app: Any) -> int:
    """The status that the app answers with in a forked process."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            result = anyio.run(lambda: drive(app, method="POST"))
            os.write(write, str(result.status).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read) as answer:
        return int(answer.read() or 0)


def test_a_worker_that_is_forked_before_the_start_joins_on_its_own(shop: Journaled) -> None:
    """As under a server that loads the app first and forks its workers then."""
    app = shop.app(lambda tasks: tasks.add_task(quick), policies=DURABLE)
    app.middleware_stack = app.build_middleware_stack()
    assert serve_in_child(app) == 200
    with TestClient(app, backend=shop.backend) as client:  # type: ignore[arg-type]
        assert client.post("/").status_code == 200
    assert len(shop.rows()) == 2


def test_a_journal_that_was_open_over_a_fork_is_refused(shop: Journaled) -> None:
    """SQLite's locks do not survive it: the child's durable requests fail, and the parent's go on."""
    app = shop.app(lambda tasks: tasks.add_task(quick), policies=DURABLE)
    with TestClient(app, backend=shop.backend) as client:  # type: ignore[arg-type]
        assert client.post("/").status_code == 200
        assert serve_in_child(app) in (0, 500)
        assert client.post("/").status_code == 200
    assert [row["state"] for row in shop.rows()] == ["succeeded"] * 2


# Forks in a process of its own: that of the tests has threads.
_RACE = """
import multiprocessing, sys
from pathlib import Path
from aftertask.journal.file import prepare

def create(folder, barrier, failures):
    for number in range(200):
        barrier.wait()
        try:
            prepare(Path(folder, f"{number}.db"))
        except Exception as error:
            failures.put(str(error))

context = multiprocessing.get_context("fork")
barrier, failures = context.Barrier(4), context.SimpleQueue()
workers = [context.Process(target=create, args=(sys.argv[1], barrier, failures)) for _ in range(4)]
for worker in workers: worker.start()
for worker in workers: worker.join()
sys.exit(0 if failures.empty() else failures.get())
"""


@pytest.mark.long
@pytest.mark.timeout(90)
def test_workers_create_one_file_at_once(tmp_path: Path) -> None:
    """As those of a server do at the first start of all."""
    done = subprocess.run([sys.executable, "-c", _RACE, str(tmp_path)], capture_output=True, text=True, timeout=80)
    assert done.returncode == 0, done.stderr


_WINDOWS = """
import sys
import multiprocessing.reduction, concurrent.futures.process, sqlite3
import fastapi, jinja2, opentelemetry.sdk.trace, prometheus_client, pydantic, starlette.testclient, structlog
sys.platform, sys.modules["fcntl"] = "win32", None
from aftertask import AftertaskMiddleware, JournalError, Settings
from aftertask.board import Board
app = fastapi.FastAPI()
app.mount("/board", Board(insecure=True))
app.add_middleware(AftertaskMiddleware, settings=Settings(journal=sys.argv[1]))
try:
    app.build_middleware_stack()
except JournalError as error:
    print(error)
"""


def test_windows_has_a_board_but_no_journal(tmp_path: Path) -> None:
    """Which says so, where the app is built."""
    done = subprocess.run([sys.executable, "-c", _WINDOWS, str(tmp_path / "tasks.db")], capture_output=True, text=True)
    assert done.returncode == 0 and "needs file locks, which Windows lacks" in done.stdout, done.stderr
