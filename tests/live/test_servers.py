"""What only a real server shows: several workers, busy threads, a kept-alive connection, a collector that is down."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from live.servers import Server, eventually, free_port, uvicorn

pytestmark = [pytest.mark.long, pytest.mark.timeout(90)]

APPS = Path(__file__).parent / "apps"


def samples(server: Server, accept: str = "text/plain") -> dict[tuple[str, ...], float]:
    """Everything /metrics says: name and label values, in the order of the labels' names, to value."""
    text = httpx2.get(f"{server.url}/metrics", headers={"accept": accept}).text
    return {
        (sample.name.removeprefix("aftertask_"), *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_several_workers_are_one_scrape(tmp_path: Path) -> None:
    """Their numbers add up; a dead worker's gauges are swept; its counters stay; no exemplars there."""
    folder = tmp_path / "metrics"
    folder.mkdir()
    options = ("--workers", "3")
    with uvicorn("workers:app", APPS, tmp_path / "log", *options, PROMETHEUS_MULTIPROC_DIR=str(folder)) as server:
        pids = {httpx2.get(f"{server.url}/ok").json() for _ in range(60)}
        failing = {httpx2.get(f"{server.url}/broken").json() for _ in range(20)}
        assert len(pids | failing) > 1, "one worker got everything: nothing to add up"

        def done() -> bool:
            counts = samples(server)
            return (
                counts["tasks_finished_total", "local", "succeeded", "workers.ok"] == 60
                and counts["tasks_finished_total", "local", "failed", "workers.broken"] == 20
            )

        eventually(done, what="the counts of all workers")
        counts = samples(server)
        assert counts["tasks_scheduled_total", "local", "workers.ok"] == 60
        assert counts["attempt_duration_seconds_count", "local", "ok", "workers.ok"] == 60
        assert counts["queue_wait_seconds_count", "local", "workers.broken"] == 20
        assert counts["attempt_errors_total", "local", "LookupError", "workers.broken"] == 20
        assert counts["tasks_finished_total", "local", "failed", "workers.ok"] == 0
        openmetrics = httpx2.get(f"{server.url}/metrics", headers={"accept": "application/openmetrics-text"}).text
        assert " # {" not in openmetrics

        holder = httpx2.get(f"{server.url}/endless").json()

        def inflight() -> float:
            counts = samples(server)
            return sum(
                value for key, value in counts.items() if key[0] == "tasks_inflight" and key[-1] == "workers.endless"
            )

        eventually(lambda: inflight() == 1, what="the endless run in flight")
        assert samples(server)["tasks_scheduled_total", "local", "workers.endless"] == 1
        os.kill(holder, signal.SIGKILL)
        eventually(lambda: inflight() == 0, what="the dead worker's gauges swept")
        assert samples(server)["tasks_scheduled_total", "local", "workers.ok"] == 60


def test_workers_without_a_shared_directory_are_warned_of_once(tmp_path: Path) -> None:
    """A scrape would see one of them at a time."""
    with uvicorn("workers:app", APPS, tmp_path / "log", "--workers", "3") as server:
        for _ in range(20):
            httpx2.get(f"{server.url}/ok")
        eventually(lambda: "metrics.several_workers" in server.log.read_text(), what="the warning")
    warnings = [line for line in server.log.read_text().splitlines() if "metrics.several_workers" in line]
    assert [json.loads(line)["workers"] for line in warnings] == [3]


def test_a_scrape_does_not_wait_for_busy_threads(tmp_path: Path) -> None:
    """Forty sync endpoints hold all the threads of the shared pool; /metrics answers all the same."""
    with uvicorn("busy:app", APPS, tmp_path / "log") as server, ThreadPoolExecutor(45) as pool:
        held = [pool.submit(httpx2.get, f"{server.url}/hold", timeout=60) for _ in range(45)]
        eventually(lambda: httpx2.get(f"{server.url}/started").json() == 40, what="forty threads taken")
        assert "aftertask_build_info" in httpx2.get(f"{server.url}/metrics", timeout=5).text
        assert httpx2.get(f"{server.url}/started").json() == 40
        httpx2.get(f"{server.url}/release")
        assert {each.result().status_code for each in held} == {200}


def test_tasks_of_an_app_without_the_middleware_are_never_taken(tmp_path: Path) -> None:
    """On one kept-alive connection, where uvicorn leaks a request's context into the next."""
    with uvicorn("two:app", APPS, tmp_path / "log", ready="/seen") as server:
        with httpx2.Client(base_url=server.url) as client:
            for _ in range(3):
                assert client.post("/ours", content=b"x" * 200_000).json() == 200_000
            for _ in range(10):
                client.get("/plain")
        eventually(lambda: len(httpx2.get(f"{server.url}/seen").json()) >= 3, what="our tasks")
        assert httpx2.get(f"{server.url}/seen").json() == [["ours_task", "succeeded"]] * 3


def test_a_collector_that_is_down_harms_no_task(tmp_path: Path) -> None:
    """Spans cannot be sent; tasks run, requests are answered, metrics are served."""
    nowhere = f"http://127.0.0.1:{free_port()}"
    shop = Path(__file__).parents[2] / "examples" / "shop"
    with uvicorn("app:app", shop, tmp_path / "log", OTEL_EXPORTER_OTLP_ENDPOINT=nowhere) as server:
        for number in range(20):
            assert httpx2.post(f"{server.url}/orders/{number}").status_code == 200
        eventually(
            lambda: samples(server)["tasks_finished_total", "local", "succeeded", "app.notify"] == 20, what="all tasks"
        )


def test_a_failing_task_is_known_though_its_client_saw_success(tmp_path: Path) -> None:
    """The client has its 200; the log names the task."""
    with uvicorn("workers:app", APPS, tmp_path / "log") as server:
        assert httpx2.get(f"{server.url}/broken").status_code == 200
        eventually(lambda: '"event": "task.failed"' in server.log.read_text(), what="the log line")
        lines = [line for line in server.log.read_text().splitlines() if line.startswith('{"event": "task.failed"')]
        assert [json.loads(line)["task"] for line in lines] == ["workers.broken"]
