"""
What a journal costs, and whether the gates hold: history on the loop, durable runs accepted per second, over HTTP, and
with a million runs in the file.

    python tests/bench/journal.py               # the figures and the gates; exit code 1 if a gate fails
    python tests/bench/journal.py --rows 0      # without the million runs

In process, apps are driven without sockets. History: CPU time of the loop's own thread per task, with and without a
journal, in turns. Durable: requests with one durable task each, 64 at a time. Over HTTP: uvicorn with two workers and
wrk with 32 connections, each as often as the other. The file is on the disk of the folder that TMPDIR names.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastapi import BackgroundTasks, FastAPI
from prometheus_client import CollectorRegistry

from aftertask import AftertaskMiddleware, Settings, task
from aftertask.journal.file import connect

#: Tasks of a request when history is measured, requests of a turn, and turns.
TASKS, REQUESTS, TURNS = 10, 100, 15

#: Requests in flight, and in all, when durable runs are counted.
AT_ONCE, ACCEPTED = 64, 6_000


@task(name="bench.durable", durable=True)
async def durable(number: int) -> None:
    """A durable task that does nothing."""


@task(name="bench.plain")
async def plain(number: int) -> None:
    """A task that does nothing."""


def app_for(journal: Path | None, *, signals: Any = ()) -> FastAPI:
    """`/plain`, `/many` and `/durable`; without a journal the last one is as plain."""
    app = FastAPI()
    settings = Settings(registry=CollectorRegistry(), journal=journal, success_log_rate=0)
    app.add_middleware(AftertaskMiddleware, settings=settings, signals=signals)
    kept = plain if journal is None else durable

    @app.get("/plain")
    async def one(tasks: BackgroundTasks) -> None:
        tasks.add_task(plain, 1)

    @app.get("/many")
    async def many(tasks: BackgroundTasks) -> None:
        for number in range(TASKS):
            tasks.add_task(plain, number)

    @app.get("/durable")
    async def promised(tasks: BackgroundTasks) -> None:
        tasks.add_task(kept, 1)

    return app


async def serve(app: Any, path: str) -> None:
    """One request."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [],
        "root_path": "",
        "scheme": "http",
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        assert message.get("status", 200) == 200

    await app(scope, receive, send)


async def on_the_loop(folder: Path) -> float:
    """Microseconds of the loop's thread that history costs a task: the median of the differences in each turn."""
    without, with_journal = app_for(None), app_for(folder / "history.db")

    async def turn(app: FastAPI) -> float:
        began = time.thread_time()
        for _ in range(REQUESTS):
            await serve(app, "/many")
        used = time.thread_time() - began
        await asyncio.sleep(0.3)  # the thread writes, outside of what is measured
        return used / REQUESTS / TASKS * 1e6

    await turn(without), await turn(with_journal)
    return statistics.median([-await turn(without) + await turn(with_journal) for _ in range(TURNS)])


async def accepted(journal: Path | None) -> tuple[float, float, float]:
    """
    Requests per second in process with one run each, the median of a request's seconds, and a request's CPU seconds.

    The runs are durable; without a journal they are plain.
    """
    app = app_for(journal)
    left, took = iter(range(ACCEPTED)), list[float]()

    async def client() -> None:
        for _ in left:
            began = time.perf_counter()
            await serve(app, "/durable")
            took.append(time.perf_counter() - began)

    await asyncio.gather(*(client() for _ in range(AT_ONCE)))  # warm
    left, began, used = iter(range(ACCEPTED)), time.perf_counter(), time.process_time()
    await asyncio.gather(*(client() for _ in range(AT_ONCE)))
    cpu = (time.process_time() - used) / ACCEPTED
    return ACCEPTED / (time.perf_counter() - began), statistics.median(took[-ACCEPTED:]), cpu


@contextlib.contextmanager
def served(journal: Path | None) -> Iterator[str]:
    """The app under uvicorn with two workers; its address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "uvicorn",
        "journal:served_app",
        "--factory",
        "--workers",
        "2",
        "--port",
        str(port),
    ]
    env = {**os.environ, "BENCH_JOURNAL": "" if journal is None else str(journal)}
    options = ["--app-dir", str(Path(__file__).parent), "--log-level", "error", "--no-access-log"]
    child = subprocess.Popen([*command, *options], env=env, start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        time.sleep(3)  # until both workers serve
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(child.pid, signal.SIGTERM)
        child.wait(30)


def served_app() -> FastAPI:
    """For uvicorn."""
    path = os.environ["BENCH_JOURNAL"]
    return app_for(Path(path) if path else None)


def requests_per_second(url: str) -> float:
    """What wrk counts."""
    done = subprocess.run(["wrk", "-c", "32", "-t", "1", "-d", "6s", url], capture_output=True, text=True, check=True)
    assert "Non-2xx" not in done.stdout, done.stdout
    return float(next(line.split()[1] for line in done.stdout.splitlines() if line.startswith("Requests/sec")))


def over_http(folder: Path, turns: int = 3) -> list[float]:
    """Requests per second with a durable task, divided by those of the same app without a journal, in each turn."""
    ratios = []
    for turn in range(turns):
        with served(None) as url:
            without = requests_per_second(f"{url}/durable")
        with served(folder / f"http{turn}.db") as url:
            kept = requests_per_second(f"{url}/durable")
        print(f"  {without:.0f} requests a second without a journal, {kept:.0f} with a durable task")
        ratios.append(kept / without)
    return ratios


def fill(journal: Path, rows: int) -> None:
    """Put this many runs that have ended into a journal."""
    with contextlib.closing(connect(journal)) as db:
        db.execute("PRAGMA synchronous = OFF")
        db.execute("BEGIN")
        db.execute(
            "INSERT INTO runs "
            "(id, task, code, state, owner, durable, idempotent, origin, scheduled_at, settled_at, stack) "
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?) "
            "SELECT printf('00000000-%08d', i), 'old', 'old', iif(i % 10, 'succeeded', 'failed'), 1, 0, 0, 'request', "
            "unixepoch() - 1000, unixepoch() - 1000 + i / 1e6, iif(i % 10, NULL, 'Traceback') FROM n",
            (rows,),
        )
        db.execute("COMMIT")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def main(arguments: list[str] | None = None) -> int:
    """Print the figures; 1 if a gate fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="runs in the file; 0: do not measure that")
    asked = parser.parse_args(arguments)
    failed = 0

    def gate(what: str, figure: str, holds: bool) -> None:
        nonlocal failed
        failed += not holds
        print(f"{'holds' if holds else 'FAILS':6} {what}: {figure}")

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        print(f"SQLite {sqlite3.sqlite_version}")
        history = asyncio.run(on_the_loop(folder))
        gate("history, CPU of the loop's thread a task, at most 15 us", f"{history:.1f} us", history <= 15)
        figures = [asyncio.run(accepted(folder / f"durable{number}.db")) for number in range(3)]
        rate, wait, cpu = map(statistics.median, zip(*figures, strict=True))
        gate(
            "durable runs accepted and run in process, at least 5 000/s",
            f"{rate:.0f}/s, p50 {wait * 1e3:.1f} ms, {cpu * 1e6:.0f} us CPU each",
            rate >= 5000,
        )
        bare = statistics.median(asyncio.run(accepted(None))[0] for _ in range(3))
        print(f"       the same requests without a journal: {bare:.0f}/s")
        if asked.rows:
            full = folder / "durable0.db"
            fill(full, asked.rows)
            pairs = [
                (asyncio.run(accepted(folder / f"empty{turn}.db"))[0], asyncio.run(accepted(full))[0])
                for turn in range(3)
            ]
            slower = statistics.median(empty / filled for empty, filled in pairs)
            gate(f"the same with {asked.rows:,} runs in the file, at most 1.1 x", f"{slower:.2f} x", slower <= 1.1)
        if shutil.which("wrk") is None:
            print("no wrk here (Debian's package wrk): HTTP is not measured")
        else:
            ratio = statistics.median(over_http(folder))
            gate("over HTTP with 2 workers, at least 0.6 x without a journal", f"{ratio:.2f} x", ratio >= 0.6)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
