"""Each example runs as its opening comment says, and shows what it promises."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from live.servers import Server, eventually, uvicorn

pytestmark = pytest.mark.timeout(60)

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def wait_for(server: Server, text: str) -> str:
    """The server's output, as soon as this is in it."""
    return (
        eventually(lambda: text in server.log.read_text() and server.log.read_text(), what=f"{text!r} in the output")
        or ""
    )


def test_minimal(tmp_path: Path) -> None:
    """One JSON line, and the task's numbers at /metrics."""
    with uvicorn("minimal:app", EXAMPLES, tmp_path / "log") as server:
        assert httpx2.post(f"{server.url}/signup", params={"email": "ada@example.org"}).json() == {"status": "ok"}
        (line,) = wait_for(server, "task.succeeded").splitlines()
        assert json.loads(line)["task"] == "minimal.send_welcome_email"
        text = httpx2.get(f"{server.url}/metrics").text
        assert (
            'aftertask_tasks_finished_total{engine="local",outcome="succeeded",task="minimal.send_welcome_email"} 1.0'
            in text
        )


def test_the_app_of_the_readme_is_the_minimal_example() -> None:
    """What people copy first is what is run here."""
    readme = (ROOT / "README.md").read_text()
    app = re.search(r"```python\n(from aftertask import AftertaskMiddleware\n.*?)```", readme, re.DOTALL)
    assert app is not None

    def code(text: str) -> list[str]:
        lines = (line.partition("#")[0].rstrip() for line in text.splitlines())
        return sorted(line for line in lines if line and '"""' not in line and line != "    ...")

    minimal = code((EXAMPLES / "minimal.py").read_text().split('"""', 2)[2])
    for line in code(app[1]):
        assert line in minimal or line.endswith("...") or line in ("from fastapi import BackgroundTasks, FastAPI",), (
            line
        )


def test_logging_stdlib(tmp_path: Path) -> None:
    """The task's own line and ours carry the same run id."""
    with uvicorn("logging_stdlib:app", EXAMPLES, tmp_path / "log") as server:
        httpx2.post(f"{server.url}/orders")
        text = wait_for(server, "task.succeeded")
    runs = re.findall(r"INFO (\S+) (\S+) task=logging_stdlib.ship run=(\S+)", text)
    assert [(name, message) for name, message, _ in runs] == [("shop", "shipping"), ("aftertask", "task.succeeded")]
    assert len({run for _, _, run in runs}) == 1


def test_logging_structlog(tmp_path: Path) -> None:
    """Four lines in the app's own format, all of one run."""
    with uvicorn("logging_structlog:app", EXAMPLES, tmp_path / "log") as server:
        httpx2.post(f"{server.url}/orders")
        text = wait_for(server, "task.succeeded")
    lines = [line for line in text.splitlines() if "event=" in line]
    events = [re.search(r"event=(\S+)", line)[1] for line in lines]  # type: ignore[index]  # it is there
    assert events == ["task.scheduled", "task.started", "shipping", "task.succeeded"]
    assert len({re.search(r"run_id=(\S+)", line)[1] for line in lines}) == 1  # type: ignore[index]  # same


def test_the_demo_ends_by_itself_and_shows_every_outcome() -> None:
    """`make demo SECONDS=…`: where to look, live lines, and a table from the real /metrics."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "shop" / "demo.py"), "--seconds", "7"],
        capture_output=True,
        text=True,
        timeout=40,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"its metrics at http://127\.0\.0\.1:\d+/metrics", done.stdout)
    for event in ("task.succeeded", "task.failed", "task.skipped", "task.dropped"):
        assert event in done.stdout, done.stdout
    table = done.stdout.rpartition("says:")[2]
    rows = {row.split()[0]: row.split()[1:] for row in table.strip().splitlines()[1:]}
    scheduled, *ended_or_not = map(int, rows["orders.charge_card"])
    assert scheduled == sum(ended_or_not) > 0
    assert "hunter2" not in done.stdout
