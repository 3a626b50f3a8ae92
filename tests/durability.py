"""
What survives a kill -9, and how many requests with a task are accepted: the journal beside other tools in one process.

    python tests/durability.py                 # makes an environment in .cache/durability first

Each tool gets the same app under uvicorn with one worker. Crash: requests that are answered 200, each with a task that
takes two seconds, and requests that fail after they added one; then kill -9, and a new start. A task writes its number
to a file when it ends. Load: `wrk` (Debian's package) with 32 connections on a route whose task does nothing.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx2

from comparison import ROOT
from live.servers import Server, eventually, free_port, process

CACHE = ROOT / ".cache" / "durability"
NEEDS = ("fastapi", "uvicorn", "fastapi-taskflow", "letitloop", "dbos")
TOOLS = {
    "bare": "FastAPI alone",
    "aftertask": "aftertask, `durable`, `idempotent`",
    "taskflow": "fastapi-taskflow, SQLite, requeued when pending or interrupted",
    "letitloop": "letitloop, `DurableBackgroundTasks`",
    "dbos": "DBOS, SQLite, one workflow a request",
}

#: Requests that are answered 200, and that fail; seconds a task takes, seconds of load, and turns of load.
ACCEPTED, REFUSED, TAKES, LOAD, TURNS = 100, 20, 2.0, 5, 3

#: Seconds without another effect after which no more are expected.
QUIET = 15.0

APP = """
import asyncio, os, sys
from fastapi import BackgroundTasks, FastAPI, HTTPException

tool, folder, takes = os.environ["TOOL"], os.environ["FOLDER"], float(os.environ["TAKES"])
app = FastAPI()

async def work(number: int) -> None:
    if number:
        await asyncio.sleep(takes)
        with open(f"{folder}/effects", "a") as file:
            print(number, file=file)

Tasks = BackgroundTasks
if tool == "aftertask":
    from aftertask import AftertaskMiddleware, Settings, task
    task(name="work", durable=True, idempotent=True)(work)
    app.add_middleware(AftertaskMiddleware, settings=Settings(journal=f"{folder}/tasks.db"))
elif tool == "taskflow":
    from fastapi_taskflow import TaskAdmin, TaskManager
    manager = TaskManager(snapshot_db=f"{folder}/tasks.db", snapshot_interval=1.0, requeue_pending=True)
    TaskAdmin(app, manager, auto_install=True)
    work = manager.task(persist=True, requeue_on_interrupt=True)(work)
elif tool == "letitloop":
    from letitloop.adapters.fastapi import DurableBackgroundTasks as Tasks
    from letitloop.adapters.fastapi import durable_task, install_durable_background_tasks
    install_durable_background_tasks(app, wal_dir=f"{folder}/wal")
    work = durable_task("work")(work)
elif tool == "dbos":
    from dbos import DBOS
    DBOS(config={"name": "work", "system_database_url": f"sqlite:///{folder}/dbos.sqlite"})
    work = DBOS.workflow(name="work")(work)

@app.get("/ready")
async def ready() -> None: ...

if tool == "dbos":
    @app.get("/take/{number}")
    async def take(number: int) -> None:
        await DBOS.start_workflow_async(work, number)

    @app.get("/refuse/{number}")
    async def refuse(number: int) -> None:
        await DBOS.start_workflow_async(work, number)
        raise HTTPException(409)

    DBOS.launch()
else:
    @app.get("/take/{number}")
    async def take(number: int, tasks: Tasks) -> None:
        tasks.add_task(work, number)

    @app.get("/refuse/{number}")
    async def refuse(number: int, tasks: Tasks) -> None:
        tasks.add_task(work, number)
        raise HTTPException(409)
"""


def python() -> str:
    """The interpreter of an environment with all tools; made once."""
    made = CACHE / "made"
    if not made.exists():
        subprocess.run([sys.executable, "-m", "venv", CACHE], check=True)
        install = [CACHE / "bin" / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*install, "-e", f"{ROOT}[journal,fastapi]", *NEEDS], check=True)
        made.touch()
    return str(CACHE / "bin" / "python")


@contextmanager
def served(tool: str, folder: Path) -> Iterator[Server]:
    """The app with this tool."""
    (folder / "work.py").write_text(APP)
    port, log = free_port(), folder / "log"
    options = ("--app-dir", str(folder), "--port", str(port), "--log-level", "warning", "--no-access-log")
    env = {"TOOL": tool, "FOLDER": str(folder), "TAKES": str(TAKES), "AFTERTASK_SUCCESS_LOG_RATE": "0"}
    with process(python(), "-m", "uvicorn", "work:app", *options, log=log, env=env) as child:
        server = Server(f"http://127.0.0.1:{port}", child, log)
        # letitloop runs what was left, one after another, before it serves.
        eventually(lambda: server.answers("/ready"), seconds=60 + ACCEPTED * TAKES * 2, what=f"{tool} answering")
        yield server


def crash(tool: str, folder: Path) -> str:
    """Kill the server while tasks run, start it again, and count what was executed."""
    with served(tool, folder) as server, ThreadPoolExecutor(16) as pool, httpx2.Client(timeout=60) as client:
        taken = list(pool.map(lambda n: client.get(f"{server.url}/take/{n}").status_code, range(1, ACCEPTED + 1)))
        refused = range(ACCEPTED + 1, ACCEPTED + REFUSED + 1)
        list(pool.map(lambda n: client.get(f"{server.url}/refuse/{n}"), refused))
        os.killpg(server.child.pid, signal.SIGKILL)
        server.child.wait()
    assert taken == [200] * ACCEPTED, taken
    before = sum(effects(folder).values())
    with served(tool, folder):
        last, since = -1, time.monotonic()
        while time.monotonic() - since < QUIET:
            count = sum(effects(folder).values())
            if count != last:
                last, since = count, time.monotonic()
            time.sleep(0.1)  # between two looks
    found = effects(folder)
    done = sum(number <= ACCEPTED for number in found)
    wrong, twice = len(found) - done, sum(count > 1 for count in found.values())
    return f"{done} of {ACCEPTED} ({before} before the kill) | {twice} | {wrong} of {REFUSED}"


def effects(folder: Path) -> Counter[int]:
    """How often which task has ended."""
    path = folder / "effects"
    return Counter(map(int, path.read_text().split())) if path.exists() else Counter()


def load(tool: str) -> float:
    """Requests a second; with a fresh file."""
    with tempfile.TemporaryDirectory() as folder, served(tool, Path(folder)) as server:
        command = ["wrk", "-c", "32", "-t", "1", "-d", f"{LOAD}s", f"{server.url}/take/0"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "Non-2xx" not in done.stdout, done.stdout
        return float(next(line.split()[1] for line in done.stdout.splitlines() if line.startswith("Requests/sec")))


def main() -> None:
    """Print the table."""
    if shutil.which("wrk") is None:
        raise SystemExit("the load needs wrk: install Debian's package of that name")
    rates: dict[str, list[float]] = {tool: [] for tool in TOOLS}
    for _ in range(TURNS):  # by turns, so that a slow minute of the machine meets all
        for tool, seen in rates.items():
            seen.append(load(tool))
    print("| | executed of those answered 200 | executed twice | of failed requests, executed | requests a second |")
    print("| --- | --- | --- | --- | --- |")
    for tool, title in TOOLS.items():
        with tempfile.TemporaryDirectory() as folder:
            print(f"| {title} | {crash(tool, Path(folder))} | {sorted(rates[tool])[TURNS // 2]:.0f} |", flush=True)
    shown = subprocess.run([python(), "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True).stdout
    print("\n" + ", ".join(line for line in shown.splitlines() if line.split("=")[0] in NEEDS))


if __name__ == "__main__":
    main()
