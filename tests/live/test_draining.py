"""The end of a process, with real servers and a real SIGTERM: what holds it up is logged, and may get time."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from kit_alerts import WebhookServer
from live.servers import Server, eventually, free_port, process

pytestmark = [pytest.mark.long, pytest.mark.timeout(60)]

APPS = Path(__file__).parent / "apps"

UVICORN = (sys.executable, "-m", "uvicorn", "draining:app", "--log-level", "warning", "--app-dir", str(APPS))
HYPERCORN = (sys.executable, "-m", "hypercorn", "draining:app")
GRANIAN = (sys.executable, "-m", "granian", "--interface", "asgi", "--working-dir", str(APPS), "draining:app")


class Served(Server):
    """A server of the app whose tasks run until a file says stop, and the files that they leave."""

    folder: Path

    def begin(self, kind: str = "async") -> None:
        """Start a run that does not end by itself."""
        assert httpx2.get(f"{self.url}/work/{kind}").status_code == 200
        eventually(lambda: self.has("begun"), what="the task beginning")

    def has(self, name: str) -> bool:
        """Whether a task left this file."""
        return (self.folder / name).exists()

    def go(self) -> None:
        """Let the tasks end."""
        (self.folder / "go").touch()

    def term(self) -> None:
        """What an orchestrator sends."""
        self.child.send_signal(signal.SIGTERM)

    def lines(self, event: str) -> list[dict[str, Any]]:
        """Our log lines of this event."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith('{"event"')]
        return [line for line in lines if line["event"] == event]

    def ends(self) -> set[str]:
        """The events of runs in the log, each with the last part of its task's name."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith('{"event": "task.')]
        return {f"{line['task'].rpartition('.')[2]} {line['event'].removeprefix('task.')}" for line in lines}


@pytest.fixture
def serve(tmp_path: Path) -> Any:
    """Start a server of that app."""

    @contextlib.contextmanager
    def start(*command: str, **env: str) -> Iterator[Served]:
        port = free_port()
        where = (
            ("--bind", f"127.0.0.1:{port}") if "hypercorn" in command else ("--host", "127.0.0.1", "--port", str(port))
        )
        log = tmp_path / "server.log"
        env = {"DRAINING_FOLDER": str(tmp_path), "PYTHONPATH": str(APPS), **env}
        with process(*command, *where, log=log, env=env) as child:
            served = Served(f"http://127.0.0.1:{port}", child, log)
            served.folder = tmp_path
            eventually(lambda: served.answers("/ready"), what="the server answering")
            yield served

    return start


def test_what_holds_up_the_shutdown_is_reported_until_all_is_done(serve: Any) -> None:
    """uvicorn without a limit waits silently; with `shutdown_report` we log what runs, every five seconds."""
    with serve(*UVICORN, AFTERTASK_SHUTDOWN_REPORT="1") as server:
        server.begin()
        server.term()
        (first,) = eventually(lambda: server.lines("lifecycle.draining"), what="the first report")
        assert (first["reason"], first["inflight"], first["waited_s"]) == ("SIGTERM", 2, 0)
        run, waiting = first["runs"]
        assert run["task"] == "draining.work"
        assert run["http_route"] == "/work/{kind}"
        assert (run["state"], waiting["state"]) == ("running", "queued")
        assert run["progress"] == "1/2 half way"
        assert run["age_s"] >= 0
        again = eventually(lambda: server.lines("lifecycle.draining")[1:], what="the second report")
        assert 4.9 <= again[0]["waited_s"] < 8
        assert again[0]["runs"][0]["run_id"] == run["run_id"]
        assert not server.has("lifespan-ended")
        server.go()
        server.child.wait(10)
        (drained,) = server.lines("lifecycle.drained")
        assert drained["waited_s"] >= 4.9
        assert server.ends() == {"work succeeded", "after succeeded"}
        assert server.has("lifespan-ended")


def test_a_server_with_nothing_to_do_reports_nothing(serve: Any) -> None:
    """No report if no run holds the shutdown up."""
    with serve(*UVICORN, AFTERTASK_SHUTDOWN_REPORT="1") as server:
        server.term()
        server.child.wait(10)
        assert server.lines("lifecycle.draining") == server.lines("lifecycle.drained") == []


@pytest.mark.parametrize("run_after", ["response", "request"])
def test_cut_off_is_cancelled_and_never_started_is_lost(serve: Any, run_after: str) -> None:
    """uvicorn with a limit of its own, and no drain_timeout: runs have their true outcomes, nothing is reported."""
    with serve(*UVICORN, "--timeout-graceful-shutdown", "1", AFTERTASK_RUN_AFTER=run_after) as server:
        server.begin()
        server.term()
        server.child.wait(15)
        assert server.ends() == {"work cancelled", "after lost"}
        assert server.lines("task.lost")[0]["reason"] == "shutdown"
        assert server.lines("lifecycle.draining") == []


SERVERS = [
    pytest.param((*UVICORN, "--timeout-graceful-shutdown", "1"), id="uvicorn"),
    pytest.param((*UVICORN, "--timeout-graceful-shutdown", "1", "--loop", "uvloop"), id="uvicorn-uvloop"),
    pytest.param((*HYPERCORN, "--graceful-timeout", "1"), id="hypercorn-asyncio"),
    pytest.param((*HYPERCORN, "--graceful-timeout", "1", "-k", "trio"), id="hypercorn-trio"),
    pytest.param(GRANIAN, id="granian"),
]


@pytest.mark.parametrize(("kind", "run_after"), [("async", "response"), ("sync", "response"), ("async", "request")])
@pytest.mark.parametrize("command", SERVERS)
def test_runs_outlive_the_servers_cancellation(serve: Any, command: tuple[str, ...], kind: str, run_after: str) -> None:
    """With a drain_timeout the run and its sibling finish, and then the lifespan does."""
    with serve(*command, AFTERTASK_DRAIN_TIMEOUT="30", AFTERTASK_RUN_AFTER=run_after) as server:
        server.begin(kind)
        server.term()
        eventually(lambda: server.lines("lifecycle.draining"), what="the report")
        # Past the server's own limit, the second report shows that the run continues.
        again = eventually(lambda: server.lines("lifecycle.draining")[1:], what="the second report")
        assert again[0]["inflight"] == 2
        assert not server.has("cancelled")
        assert not server.has("lifespan-ended")
        server.go()
        server.child.wait(15)
        assert server.has("done")
        assert server.has("after")
        assert server.has("lifespan-ended")
        name = "sync_work" if kind == "sync" else "work"
        assert server.ends() == {f"{name} succeeded", "after succeeded"}
        assert server.lines("lifecycle.drained")


@pytest.mark.parametrize("run_after", ["response", "request"])
@pytest.mark.parametrize("command", SERVERS)
def test_at_the_end_of_its_time_a_run_is_cut_off(serve: Any, command: tuple[str, ...], run_after: str) -> None:
    """Told with what was still going; its cleanup runs, and what had not started is lost."""
    with serve(*command, AFTERTASK_DRAIN_TIMEOUT="2", AFTERTASK_RUN_AFTER=run_after) as server:
        server.begin()
        server.term()
        server.child.wait(30)
        (over,) = server.lines("lifecycle.drain_timeout")
        assert (over["limit_s"], over["inflight"]) == (2, 2)
        assert over["runs"][0]["task"] == "draining.work"
        assert server.ends() == {"work cancelled", "after lost"}
        assert server.has("cancelled")
        assert not server.has("done")


@pytest.mark.parametrize("command", [SERVERS[0], SERVERS[2]])
@pytest.mark.parametrize("drain_timeout", ["", "2"])
def test_a_run_that_a_deploy_cuts_off_reaches_a_person(
    serve: Any, command: tuple[str, ...], drain_timeout: str
) -> None:
    """Counted as cancelled, which is not bad, and an alert of its own kind arrives before the process has ended."""
    with WebhookServer() as webhook:
        env = {"AFTERTASK_ALERTS": webhook.url, "AFTERTASK_DRAIN_TIMEOUT": drain_timeout, "no_proxy": "127.0.0.1"}
        with serve(*command, **env) as server:
            server.begin()
            server.term()
            server.child.wait(30)
            assert server.ends() == {"work cancelled", "after lost"}
        alerts = {alert["kind"]: alert for alert in webhook.alerts(2)}
        assert alerts.keys() == {"cut_off", "lost"}
        cut_off = alerts["cut_off"]
        assert (cut_off["task"], cut_off["outcome"], cut_off["count"]) == ("draining.work", "cancelled", 1)
        assert cut_off["http_route"] == "/work/{kind}"


def test_granian_without_us_loses_an_async_task_silently(serve: Any) -> None:
    """The control: no end, no cancellation, no line; with us (above) the task finishes."""
    with serve(*GRANIAN, DRAINING_BARE="1") as server:
        server.begin()
        server.term()
        server.child.wait(15)
        assert not server.has("cancelled")
        assert not server.has("done")
        assert "draining.work" not in server.log.read_text()
