"""Several processes, one scrape: which numbers add up, which are the newest, what stays of a process that has ended."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx2
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from aftertask.signals._multiprocess import SAMPLE_EVERY
from live.servers import Server, eventually, uvicorn

pytestmark = [pytest.mark.live, pytest.mark.timeout(90)]

APPS = Path(__file__).parent / "apps"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty directory for the shared numbers."""
    made = tmp_path / "metrics"
    made.mkdir()
    return made


@pytest.fixture
def workers(folder: Path, tmp_path: Path) -> Iterator[Server]:
    """Three workers that share their numbers."""
    env = {"PROMETHEUS_MULTIPROC_DIR": str(folder)}
    with uvicorn("workers:app", APPS, tmp_path / "log", "--workers", "3", **env) as server:
        yield server


def scrape(server: Server) -> list[Metric]:
    """Our families."""
    text = httpx2.get(f"{server.url}/metrics").text
    return [family for family in text_string_to_metric_families(text) if family.name.startswith("aftertask_")]


def values(server: Server, name: str, **labels: str) -> list[float]:
    """Of all samples with these labels."""
    return [
        sample.value
        for family in scrape(server)
        for sample in family.samples
        if sample.name == f"aftertask_{name}" and labels.items() <= sample.labels.items()
    ]


def value(server: Server, name: str, **labels: str) -> float:
    """The sum of them; fails where there is none."""
    found = values(server, name, **labels)
    assert found, f"no sample aftertask_{name} with {labels}"
    return sum(found)


def lines(server: Server, event: str) -> list[dict[str, Any]]:
    """The log lines of one event, of all workers."""
    told = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith('{"event"')]
    return [line for line in told if line["event"] == event]


def test_registered_tasks_are_there_at_zero(workers: Server) -> None:
    """Before any worker ran one: the first failure is seen by `increase()`."""
    for name in ("workers.ok", "workers.broken", "workers.endless"):
        for outcome in ("succeeded", "failed", "cancelled", "dropped"):
            assert value(workers, "tasks_finished_total", task=name, outcome=outcome) == 0
        assert value(workers, "task_info", task=name) == 1


def test_no_series_names_a_process(workers: Server) -> None:
    """Each gauge says how processes are put together: one series for a task, whoever ran it."""
    pids = {httpx2.get(f"{workers.url}/ok").json() for _ in range(60)}
    assert len(pids) > 1, "one worker got everything: nothing to put together"
    eventually(lambda: value(workers, "tasks_finished_total", task="workers.ok", outcome="succeeded") == 60)
    families = scrape(workers)
    assert families
    for family in families:
        keys = [(sample.name, *sorted(sample.labels.items())) for sample in family.samples]
        assert len(keys) == len(set(keys)), f"{family.name} has a series twice"
        assert not [sample for sample in family.samples if "pid" in sample.labels]
    assert value(workers, "build_info") == 1


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("unregistered", "ages.unregistered"),
        pytest.param(
            *("registered", "ages.registered"),
        ),
    ],
)
def test_states_and_ages_are_written(folder: Path, tmp_path: Path, path: str, name: str) -> None:
    """Every few seconds: that runs are running, and for how long the oldest has been; none survives its process."""
    env = {"PROMETHEUS_MULTIPROC_DIR": str(folder)}
    with uvicorn("ages:app", APPS, tmp_path / "log", "--workers", "2", **env) as server:
        pids: list[int] = []

        def both_hold() -> bool:
            pids.append(httpx2.get(f"{server.url}/{path}").json())
            return len(set(pids)) == 2

        try:
            eventually(both_hold, what="a request to each worker")
            eventually(lambda: value(server, "tasks_inflight", task=name) == len(pids), what="all in flight")
            patience = SAMPLE_EVERY + 3
            eventually(
                lambda: value(server, "tasks_inflight", task=name, state="running") == len(pids),
                seconds=patience,
                what="the states being written",
            )
            age = eventually(
                lambda: value(server, "oldest_running_age_seconds", task=name), seconds=patience, what="the ages"
            )
            assert 0 < age < 60
        finally:
            for pid in set(pids):
                os.kill(pid, signal.SIGKILL)
        # Their successors have no series of a task that nobody registered, before they run it.
        eventually(lambda: sum(values(server, "tasks_inflight", task=name)) == 0, what="the dead swept")
        assert value(server, "tasks_scheduled_total", task=name) == len(pids)
        assert sum(values(server, "oldest_running_age_seconds", task=name)) == 0


def test_gauges_add_up_or_are_the_newest(workers: Server) -> None:
    """What is in flight is a sum, the last success the newest of all workers, also of a dead one."""
    for _ in range(30):
        httpx2.get(f"{workers.url}/ok")
    eventually(lambda: value(workers, "tasks_finished_total", task="workers.ok", outcome="succeeded") == 30)
    told = value(workers, "last_success_timestamp_seconds", task="workers.ok")
    logged = eventually(lambda: len(done := lines(workers, "task.succeeded")) == 30 and done, what="all log lines")
    newest = max(datetime.fromisoformat(line["timestamp"]).timestamp() for line in logged)
    assert told == pytest.approx(newest, abs=0.01)

    pids: list[int] = []

    def two_workers_hold() -> bool:
        pids.append(httpx2.get(f"{workers.url}/endless").json())
        return len(set(pids)) > 1

    eventually(two_workers_hold, what="a second worker getting a request")
    eventually(lambda: value(workers, "tasks_inflight", task="workers.endless") == len(pids), what="all in flight")
    for pid in set(pids):
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: value(workers, "tasks_inflight", task="workers.endless") == 0, what="the dead swept")
    assert value(workers, "last_success_timestamp_seconds", task="workers.ok") == told


def test_a_worker_that_was_replaced_goes_on_counting(workers: Server) -> None:
    """Counters never fall: what the dead one counted stays, what its successor counts comes on top."""
    first = {httpx2.get(f"{workers.url}/ok").json() for _ in range(30)}
    eventually(lambda: value(workers, "tasks_finished_total", task="workers.ok", outcome="succeeded") == 30)
    os.kill(min(first), signal.SIGKILL)
    answered: set[int] = set()
    sent = 0

    def another_answers() -> bool:
        nonlocal sent
        answered.add(httpx2.get(f"{workers.url}/ok").json())
        sent += 1
        return bool(answered - first)

    eventually(another_answers, seconds=30, what="an answer of a worker that was not there before")
    eventually(lambda: value(workers, "tasks_finished_total", task="workers.ok", outcome="succeeded") >= 30 + sent)
    # A request that was cut off with its worker may have been counted before nobody got its answer.
    lost = value(workers, "tasks_scheduled_total", task="workers.ok") - 30 - sent
    assert 0 <= lost <= 1


def test_what_a_stopped_server_told_is_scraped_from_the_next(folder: Path, tmp_path: Path) -> None:
    """Runs that the shutdown cut off are counted cancelled, which nobody could have scraped any more."""
    env = {"PROMETHEUS_MULTIPROC_DIR": str(folder)}
    limit = ("--timeout-graceful-shutdown", "1")
    with uvicorn("workers:app", APPS, tmp_path / "first", *limit, **env) as server:
        for _ in range(2):
            httpx2.get(f"{server.url}/endless")
        eventually(lambda: value(server, "tasks_inflight", task="workers.endless") == 2)
        server.child.send_signal(signal.SIGTERM)
        assert server.child.wait(20) in (0, -signal.SIGTERM)
        assert [line["task"] for line in lines(server, "task.cancelled")] == ["workers.endless"] * 2
    with uvicorn("workers:app", APPS, tmp_path / "second", **env) as server:
        assert value(server, "tasks_finished_total", task="workers.endless", outcome="cancelled") == 2
        assert value(server, "tasks_scheduled_total", task="workers.endless") == 2
        assert value(server, "tasks_inflight", task="workers.endless") == 0
        assert value(server, "tasks_bad_total", task="workers.endless") == 0


@pytest.mark.parametrize(
    ("options", "variables", "warnings"),
    [
        (("--workers", "1"), {}, 0),
        ((), {"WEB_CONCURRENCY": "2"}, 1),
        (("--workers", "2"), {"PROMETHEUS_MULTIPROC_DIR": "shared"}, 0),
    ],
    ids=["one worker", "several by the environment", "several with a directory"],
)
def test_who_is_warned(
    tmp_path: Path, folder: Path, options: tuple[str, ...], variables: dict[str, str], warnings: int
) -> None:
    """Only several workers without a shared directory, and these once."""
    env = {name: str(folder) if said == "shared" else said for name, said in variables.items()}
    with uvicorn("workers:app", APPS, tmp_path / "log", *options, **env) as server:
        workers = int(options[1]) if options else int(env["WEB_CONCURRENCY"])
        pids: set[int] = set()

        def all_answered() -> bool:
            pids.add(httpx2.get(f"{server.url}/ok").json())
            return len(pids) == workers

        eventually(all_answered, what="an answer of each worker")
        told = eventually(lambda: lines(server, "task.succeeded"), what="a log line")
        assert {line["task"] for line in told} == {"workers.ok"}
    assert len(lines(server, "metrics.several_workers")) == warnings


def test_only_named_families_where_asked(folder: Path, tmp_path: Path) -> None:
    """`name[]` narrows a scrape here too."""
    with uvicorn("workers:app", APPS, tmp_path / "log", PROMETHEUS_MULTIPROC_DIR=str(folder)) as server:
        text = httpx2.get(f"{server.url}/metrics", params={"name[]": "aftertask_build_info"}).text
        assert "aftertask_build_info" in text
        assert "aftertask_tasks_scheduled" not in text
