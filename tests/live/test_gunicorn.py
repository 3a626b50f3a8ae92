"""The worker class of the page about several workers: under gunicorn a run that is cut off has an outcome."""

from __future__ import annotations

import json
import re
import signal
import sys
from pathlib import Path

import httpx2
import pytest

from live.servers import Server, eventually, free_port, process

pytestmark = [pytest.mark.long, pytest.mark.timeout(120)]

PAGE = (Path(__file__).parents[2] / "docs" / "howto" / "workers.md").read_text()

APP = """
import asyncio

from aftertask import AftertaskMiddleware
from fastapi import BackgroundTasks, FastAPI

app = FastAPI()
app.add_middleware(AftertaskMiddleware)


async def endless() -> None:
    await asyncio.sleep(600)


async def after_it() -> None: ...


@app.post("/orders")
async def order(tasks: BackgroundTasks) -> dict[str, str]:
    tasks.add_task(endless)
    tasks.add_task(after_it)
    return {"status": "ok"}
"""


def tasks(log: str, event: str) -> list[str]:
    """The tasks of the log lines of an event."""
    found = (json.loads(line) for line in log.splitlines() if line.startswith("{"))
    return [line["task"] for line in found if line["event"] == event]


def end(folder: Path, worker: str, graceful_timeout: int) -> str:
    """What gunicorn logs when it gets SIGTERM while a task runs."""
    port, log = free_port(), folder / "log"
    gunicorn = [sys.executable, "-m", "gunicorn", "main:app", "-k", worker, "-w", "1", "--chdir", str(folder)]
    options = ["-b", f"127.0.0.1:{port}", "--graceful-timeout", str(graceful_timeout)]
    with process(*gunicorn, *options, log=log, env={"PYTHONPATH": str(folder)}) as child:
        server = Server(f"http://127.0.0.1:{port}", child, log)
        eventually(lambda: server.answers("/metrics"), what="gunicorn answering")
        httpx2.post(f"{server.url}/orders", timeout=30)
        running = 'aftertask_tasks_inflight{engine="local",state="running",task="main.endless"} 1.0'
        eventually(lambda: running in httpx2.get(f"{server.url}/metrics").text, what="the run")
        child.send_signal(signal.SIGTERM)
        child.wait(60)
    return log.read_text()


def test_a_worker_with_a_limit_gives_every_run_an_outcome(tmp_path: Path) -> None:
    """What has started is cancelled, what has not is lost; with a shorter limit than the page's, for the test."""
    code = re.search(r'```python title="worker.py"\n(.*?)```', PAGE, re.DOTALL)
    assert code and 'shutdown": 20' in code[1]
    (tmp_path / "worker.py").write_text(code[1].replace('shutdown": 20', 'shutdown": 2'))
    (tmp_path / "main.py").write_text(APP)
    log = end(tmp_path, "worker.Worker", graceful_timeout=30)
    assert tasks(log, "task.cancelled") == ["main.endless"]
    assert tasks(log, "task.lost") == ["main.after_it"]


def test_without_one_the_runs_end_without_a_trace(tmp_path: Path) -> None:
    """The control: gunicorn kills the worker."""
    (tmp_path / "main.py").write_text(APP)
    log = end(tmp_path, "uvicorn_worker.UvicornWorker", graceful_timeout=2)
    assert '"event": "task.' not in log
