"""The tutorial, step by step, as a reader does it: the files it shows, the commands it shows, what they print."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from live.servers import Server, eventually, free_port, process, uvicorn

pytestmark = [pytest.mark.long, pytest.mark.timeout(180)]

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tutorial.md").read_text()

#: The four states of the app, in the order of the page.
APPS: list[str] = re.findall(r'```python title="main.py"\n(.*?)```', PAGE, re.DOTALL)


def command(start: str) -> tuple[str, str]:
    """The command of the page that begins like this, and the output that is printed below it."""
    found = re.search(rf"^\$ ({re.escape(start)}.*)\n((?:(?!\$|```).*\n)*)", PAGE, re.MULTILINE)
    assert found, start
    return found[1], found[2]


@pytest.fixture
def shell(tmp_path: Path) -> Callable[[str, Server | None, int | None], str]:
    """Run a command of the page in the reader's folder; its ports are those of the test."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def run(line: str, server: Server | None = None, code: int | None = 0) -> str:
        if server is not None:
            line = line.replace("http://127.0.0.1:8000", server.url)
        env = {**os.environ, "PATH": path}
        done = subprocess.run(line, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
        assert code is None or done.returncode == code, done.stdout + done.stderr
        return done.stdout

    return run


def lines(server: Server, event: str) -> list[dict[str, str]]:
    """The log lines of an event so far."""
    found = (line for line in server.log.read_text().splitlines() if line.startswith("{"))
    return [line for line in map(json.loads, found) if line["event"] == event]


def test_the_tutorial(tmp_path: Path, shell: Callable[..., str]) -> None:
    """Each step shows what the page promises; a port of the test stands for that of the mail server."""
    assert len(APPS) == 4
    smtp = free_port()
    log, main = tmp_path / "log", tmp_path / "main.py"
    sign_up, answer = command("curl -X POST")

    # 2. An app that says "ok": nothing but a traceback.
    main.write_text(APPS[0].replace("1025", str(smtp)))
    with uvicorn("main:app", tmp_path, log, ready="/docs") as server:
        assert shell(sign_up, server) == answer.strip()
        text = eventually(lambda: "ConnectionRefusedError" in log.read_text() and log.read_text(), what="a traceback")
        assert "/signup" not in text and "update_statistics" not in text

    # 3. One line: both tasks are named, with the route, and counted.
    main.write_text(APPS[1].replace("1025", str(smtp)))
    with uvicorn("main:app", tmp_path, log) as server:
        assert shell(sign_up, server) == answer.strip()
        eventually(lambda: lines(server, "task.skipped"), what="the second line")
        shown = re.search(r"```json\n(.*?)```", PAGE, re.DOTALL)
        assert shown
        for text in re.split(r"\n(?=\{)", shown[1].strip()):
            promised = json.loads(text)
            (written,) = lines(server, promised["event"])
            assert promised.items() <= written.items()
        scrape, counts = command("curl -s http://127.0.0.1:8000/metrics")
        assert shell(scrape, server) == counts

    # 4. An alert, with the owner and what did not run.
    main.write_text(APPS[2].replace("1025", str(smtp)))
    title = re.search(r"^ALERT .*$", PAGE, re.MULTILINE)
    assert title
    with uvicorn("main:app", tmp_path, log) as server:
        shell(sign_up, server)
        text = eventually(lambda: title[0] in log.read_text() and log.read_text(), what="the alert")
        for part in ("Route: POST /signup", "Owner: growth", "main.update_statistics", "in send_welcome_mail"):
            eventually(lambda part=part: part in log.read_text(), what=part)

    # 5. A task that survives: it is retried until the mail server is there.
    main.write_text(APPS[3].replace("1025", str(smtp)))
    with uvicorn("main:app", tmp_path, log) as server:
        shell(sign_up, server)
        eventually(lambda: lines(server, "task.retrying"), what="a retry")
        first = eventually(lambda: lines(server, "task.succeeded"), what="the task after it")
        assert [line["task"] for line in first] == ["main.update_statistics"]
        listen = command("python -m aiosmtpd")[0].replace("1025", str(smtp)).replace("python", sys.executable, 1)
        with process(*listen.split(), log=tmp_path / "mails", env={"PYTHONUNBUFFERED": "1"}):
            eventually(lambda: len(lines(server, "task.succeeded")) == 2, seconds=60, what="the mail's success")
            assert "Subject: Welcome" in (tmp_path / "mails").read_text()
        assert int(lines(server, "task.succeeded")[1]["attempt"]) > 1
        assert "ALERT" not in log.read_text()

    # 6. The check finds nothing worse than notes.
    assert "0 errors, 0 warnings" in shell(command("aftertask check main:app")[0])
