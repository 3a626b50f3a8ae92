"""Each hazard, caused on purpose under uvicorn, is found by name in logs and metrics; a healthy app has none."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from live.servers import Server, eventually, uvicorn

pytestmark = pytest.mark.long

FOLDER = Path(__file__).parent / "apps"
UPLOAD = {"file": b"abc"}


@pytest.fixture(params=["uvloop", "asyncio"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    """The app under uvicorn, on both of its loops."""
    with uvicorn("hazards:app", FOLDER, tmp_path / "log", "--loop", request.param) as server:
        yield server


def lines(server: Server, event: str) -> list[dict[str, Any]]:
    """The log lines of an event so far."""
    found = []
    for line in server.log.read_text().splitlines():
        if line.startswith("{"):
            keys = json.loads(line)
            if keys["event"] == event:
                found.append(keys)
    return found


def metrics(server: Server, family: str) -> dict[tuple[str, ...], float]:
    """The values of a counter or histogram, by label values."""
    text = httpx2.get(f"{server.url}/metrics", timeout=10).text
    return {
        tuple(sample.labels[name] for name in sorted(sample.labels)): sample.value
        for metric in text_string_to_metric_families(text)
        for sample in metric.samples
        if sample.name == family
    }


def post(server: Server, path: str, **keys: Any) -> httpx2.Response:
    """A request that is answered with 200."""
    response = httpx2.post(f"{server.url}{path}", timeout=15, **keys)
    assert response.status_code == 200, response.text
    return response


def line_of(text: str) -> str:
    """The file and line of the app that hold this text."""
    file = FOLDER / "hazards.py"
    number = next(number for number, line in enumerate(file.read_text().splitlines(), 1) if text in line)
    return f"{file}:{number}"


def test_each_hazard_is_found_by_name(server: Server) -> None:
    """The task, the argument, what to do; in the log and in the metrics."""
    caused = {
        ("generator", "hazards.generates", None),
        ("response_returned", "hazards.answers", None),
        ("mutated_tasks", "hazards.adds", None),
        ("closed_upload", "hazards.reads", "file"),
        ("request_scoped", "hazards.takes", "value"),
        ("db_session", "hazards.takes", "value"),
        ("response_stream", "hazards.takes", "value"),
        ("large_argument", "hazards.takes", "value"),
        ("websocket", "hazards.takes", None),
        ("blocked_loop", "hazards.blocks", None),
        ("starved_threads", "hazards.holds", None),
    }
    for kind in sorted(kind for kind, _, _ in caused - {("websocket", "hazards.takes", None)}):
        if kind == "starved_threads":
            with ThreadPoolExecutor(40) as pool:
                list(pool.map(lambda _: post(server, "/starved_threads"), range(40)))
        else:
            post(server, f"/{kind}", **({"files": UPLOAD} if kind == "closed_upload" else {}))
    _websocket(server)
    logged = caused - {("blocked_loop", "hazards.blocks", None)}  # its line is loop.blocked
    eventually(lambda: {one["kind"] for one in lines(server, "task.hazard")} >= {kind for kind, _, _ in logged})
    eventually(lambda: "hazards.blocks" in {one["task"] for one in lines(server, "loop.blocked")})
    post(server, "/let_go")
    found = lines(server, "task.hazard")
    assert {(one["kind"], one["task"], one.get("argument")) for one in found} == logged
    assert all(one["advice"] for one in found)
    counted = metrics(server, "aftertask_hazards_total")
    assert {(kind, task) for kind, task in counted} == {(kind, task) for kind, task, _ in caused}
    (failed,) = lines(server, "task.failed")
    assert failed["task"] == "hazards.reads" and failed["hint"].startswith("argument 'file': ")


def _websocket(server: Server) -> None:
    from websockets.sync.client import connect

    with connect(server.url.replace("http", "ws") + "/websocket") as socket:
        for _ in socket:
            pass


def test_a_blocked_loop_is_logged_with_its_line(server: Server) -> None:
    """The line and stack of the task, or of the endpoint, under the name of no task."""
    post(server, "/blocked_loop")
    post(server, "/endpoint_blocks")
    eventually(lambda: len(lines(server, "loop.blocked")) == 2)
    blocked = {one["task"]: one for one in lines(server, "loop.blocked")}
    task, none = blocked["hazards.blocks"], blocked["__none__"]
    assert task["where"] == f"{line_of('time.sleep(0.5)')} in blocks"
    assert "time.sleep(0.5)" in task["stack"] and "lifecycle.py" not in task["stack"]
    assert 0.35 < task["blocked_s"] < 1.5 and task["http_route"] == "/blocked_loop"
    assert " in endpoint_blocks" in none["where"] and "run_id" not in none
    seconds = metrics(server, "aftertask_event_loop_blocked_seconds_total")
    assert seconds[("hazards.blocks",)] > 0.3 and seconds[("__none__",)] > 0.3
    eventually(lambda: metrics(server, "aftertask_event_loop_lag_seconds_count")[()] > 10)


@pytest.mark.timeout(90)
def test_one_of_fifty_is_named_under_uvicorn(server: Server) -> None:
    """Fifty runs at once, one of which blocks for 0.4 s: the line has that one's id, each time."""
    _name_the_culprit(server, 3)


@pytest.mark.alone
@pytest.mark.timeout(300)
def test_one_of_fifty_is_named_in_fifty_of_fifty_trials_under_uvicorn(server: Server) -> None:
    """The same, fifty times."""
    _name_the_culprit(server, 50)


def _name_the_culprit(server: Server, trials: int) -> None:
    guilty: list[str] = []
    with ThreadPoolExecutor(50) as pool:
        for trial in range(trials):
            post(server, "/again")

            def start(number: int, culprit: int = trial * 7 % 50) -> str:
                asked = f"/crowd?size=50&culprit={str(number == culprit).lower()}"
                return post(server, asked).headers["x-runs"]

            guilty.append(list(pool.map(start, range(50)))[trial * 7 % 50])
            eventually(lambda count=trial + 1: len(lines(server, "found")) >= count)
    found = [(one["kind"], one["run_id"]) for one in lines(server, "found")]
    assert found == [("blocked_loop", run) for run in guilty]
    # A busy machine may hold the loop up between runs, too: such a line names none of them.
    assert {one.get("run_id") for one in lines(server, "loop.blocked")} - {None} <= set(guilty)
    assert metrics(server, "aftertask_hazards_total") == {("blocked_loop", "crowd"): trials}


def load(server: Server, seconds: float) -> int:
    """Eight clients send one request after the other; returns how many were answered."""
    end, served = time.monotonic() + seconds, 0
    lock = threading.Lock()

    def client() -> None:
        nonlocal served
        with httpx2.Client(base_url=server.url, timeout=15) as http:
            while time.monotonic() < end:
                assert http.post("/healthy", files=UPLOAD).status_code == 200
                with lock:
                    served += 1

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(client) for _ in range(8)]:
            done.result()
    return served


def _is_healthy(server: Server, seconds: float) -> None:
    served = load(server, seconds)
    assert served > 20 * seconds
    ended = lambda: sum(metrics(server, "aftertask_tasks_finished_total").values()) >= 3 * served
    eventually(ended)
    assert lines(server, "found") == []
    assert [one for one in lines(server, "loop.blocked") if one["task"] != "__none__"] == []
    assert metrics(server, "aftertask_hazards_total") == {}


def test_a_healthy_app_under_load_has_none(server: Server) -> None:
    """No false alarm in four seconds."""
    _is_healthy(server, 4)


@pytest.mark.timeout(150)
def test_a_healthy_app_under_load_for_a_minute_has_none(server: Server) -> None:
    """No false alarm in a minute."""
    _is_healthy(server, 60)


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no such signal here")
def test_a_process_that_was_stopped_did_not_block(server: Server) -> None:
    """A debugger from outside, a suspended laptop, a frozen container: no run is to blame."""
    for _ in range(5):
        post(server, "/healthy", files=UPLOAD)
        os.kill(server.child.pid, signal.SIGSTOP)
        time.sleep(0.6)  # it is really stopped for that long
        os.kill(server.child.pid, signal.SIGCONT)
        post(server, "/healthy", files=UPLOAD)
    time.sleep(0.5)  # longer than the watching thread needs to report
    assert lines(server, "loop.blocked") == [] == lines(server, "task.hazard")


def test_the_smallest_threshold_serves_all_the_same(tmp_path: Path) -> None:
    """`block_threshold=0.01`: more blocks are reported, and every run succeeds."""
    env = {"AFTERTASK_BLOCK_THRESHOLD": "0.01"}
    with uvicorn("hazards:app", FOLDER, tmp_path / "log", **env) as server:
        post(server, "/blocked_loop")
        served = load(server, 2)
        eventually(lambda: sum(metrics(server, "aftertask_tasks_finished_total").values()) >= 3 * served + 1)
        outcomes = metrics(server, "aftertask_tasks_finished_total")
        assert sum(value for (_, outcome, _), value in outcomes.items() if outcome != "succeeded") == 0
        assert "hazards.blocks" in {one["task"] for one in lines(server, "loop.blocked")}
        assert lines(server, "signal.failed") == []
