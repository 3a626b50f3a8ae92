"""Several processes, one scrape: what adds up, what is the newest, and what remains of a worker that has ended."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aftertask.signals._metric_set import SAMPLE_EVERY
from live.servers import Server, eventually, free_port, process, scrape, uvicorn, value, values

pytestmark = [pytest.mark.long, pytest.mark.timeout(90)]

APPS = Path(__file__).parent / "apps"
#: Endless runs must not hold up the end of a test.
THREE = ("--workers", "3", "--timeout-graceful-shutdown", "1")
#: Seconds for a response: when all workers have been killed, it comes from one that has yet to start.
PATIENCE = 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty directory for the shared files."""
    made = tmp_path / "metrics"
    made.mkdir()
    return made


@pytest.fixture
def workers(folder: Path, tmp_path: Path) -> Iterator[Server]:
    """Three workers that share their metrics."""
    env = {"PROMETHEUS_MULTIPROC_DIR": str(folder)}
    with uvicorn("workers:app", APPS, tmp_path / "log", *THREE, **env) as server:
        yield server


def start(server: Server, name: str) -> int:
    """Have a worker add a task, and return the worker's pid; 0 if the worker was killed at that moment."""
    try:
        return int(httpx2.get(f"{server.url}/{name}", timeout=PATIENCE).json())
    except httpx2.TransportError:
        return 0


def lines(server: Server, event: str) -> list[dict[str, Any]]:
    """The log lines of one event, of all workers."""
    found = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    return [line for line in found if line["event"] == event]


def test_registered_tasks_have_series_at_zero(workers: Server) -> None:
    """Before any worker has run one, so that `increase()` sees the first failure."""
    for name in ("workers.ok", "workers.broken", "workers.endless"):
        for outcome in ("succeeded", "failed", "cancelled", "dropped"):
            assert value(workers, "tasks_finished_total", task=name, outcome=outcome) == 0
        assert value(workers, "task_info", task=name) == 1


def test_no_series_names_a_process(workers: Server) -> None:
    """Each gauge is merged over processes: a task has one series, whichever worker ran it."""
    pids = {start(workers, "ok") for _ in range(60)}
    assert len(pids) > 1, "one worker got every request, so nothing had to be merged"
    eventually(lambda: value(workers, "tasks_finished_total", task="workers.ok", outcome="succeeded") == 60)
    families = scrape(workers)
    assert families
    for family in families:
        keys = [(sample.name, *sorted(sample.labels.items())) for sample in family.samples]
        assert len(keys) == len(set(keys)), f"{family.name} has a series twice"
        assert not [sample for sample in family.samples if "pid" in sample.labels]
    assert value(workers, "build_info") == 1


@pytest.mark.parametrize(("path", "name"), [("unregistered", "ages.unregistered"), ("registered", "ages.registered")])
def test_states_and_ages_are_written(folder: Path, tmp_path: Path, path: str, name: str) -> None:
    """Every few seconds: which state runs are in, and the age of the oldest; they end with their process."""
    env = {"PROMETHEUS_MULTIPROC_DIR": str(folder)}
    with uvicorn("ages:app", APPS, tmp_path / "log", "--workers", "2", **env) as server:
        pids: list[int] = []

        def each_has_a_run() -> bool:
            pids.append(start(server, path))
            return len(set(pids)) == 2

        try:
            eventually(each_has_a_run, what="a request to each worker")
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
        # Their successors have no series of an unregistered task before they run it.
        eventually(lambda: sum(values(server, "tasks_inflight", task=name)) == 0, what="the sweep")
        assert value(server, "tasks_scheduled_total", task=name) == len(pids)
        assert sum(values(server, "oldest_running_age_seconds", task=name)) == 0


def test_the_unfinished_runs_of_a_killed_worker_are_lost(workers: Server) -> None:
    """They are lost, bad, and have the reason `crash`; each is counted once, whichever worker is scraped."""
    pids: list[int] = []

    def two_workers_have_runs() -> bool:
        pids.append(start(workers, "endless"))
        return len(set(pids)) > 1

    eventually(two_workers_have_runs, what="a second worker getting a request")
    eventually(lambda: value(workers, "tasks_inflight", task="workers.endless") == len(pids), what="all in flight")
    killed = pids[0]
    lost = pids.count(killed)
    os.kill(killed, signal.SIGKILL)

    def is_swept() -> bool:
        return value(workers, "tasks_inflight", task="workers.endless") == len(pids) - lost

    eventually(is_swept, what="the sweep")
    for _ in range(10):
        assert value(workers, "tasks_finished_total", task="workers.endless", outcome="lost") == lost
        assert value(workers, "tasks_not_run_total", task="workers.endless", reason="crash") == lost
        assert value(workers, "tasks_bad_total", task="workers.endless") == lost
        assert value(workers, "tasks_scheduled_total", task="workers.endless") == len(pids)
        assert is_swept()


def test_gauges_add_up_or_are_the_newest(workers: Server) -> None:
    """The last success is the newest of all workers, dead ones included."""
    for _ in range(30):
        start(workers, "ok")
    eventually(lambda: value(workers, "tasks_finished_total", task="workers.ok", outcome="succeeded") == 30)
    exposed = value(workers, "last_success_timestamp_seconds", task="workers.ok")
    logged = eventually(lambda: len(done := lines(workers, "task.succeeded")) == 30 and done, what="all log lines")
    newest = max(datetime.fromisoformat(line["timestamp"]).timestamp() for line in logged)
    assert exposed == pytest.approx(newest, abs=0.01)

    pids: set[int] = set()

    def two_workers_have_runs() -> bool:
        pids.add(start(workers, "endless"))
        return len(pids) > 1

    eventually(two_workers_have_runs, what="a second worker getting a request")
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: value(workers, "tasks_inflight", task="workers.endless") == 0, what="the sweep")
    assert value(workers, "last_success_timestamp_seconds", task="workers.ok") == exposed


ACTIONS = ("ok", "broken", "recovering", "abandoned", "endless", "kill")


class Watched:
    """A server whose counters are compared with those of the scrape before, at every scrape."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.before: dict[tuple[str, ...], float] = {}

    def scrape(self) -> dict[str, float]:
        """The sums of scheduled, finished and in flight; fails if a counter, bucket or sum fell."""
        now: dict[tuple[str, ...], float] = {}
        sums: dict[str, float] = {}
        for family in scrape(self.server):
            for sample in family.samples:
                sums[sample.name] = sums.get(sample.name, 0) + sample.value
                if family.type != "gauge":
                    now[sample.name, *(f"{name}={text}" for name, text in sorted(sample.labels.items()))] = sample.value
        fallen = {key: (before, now.get(key)) for key, before in self.before.items() if now.get(key, -1) < before}
        assert not fallen
        self.before = now
        return {name: sums[f"aftertask_tasks_{name}"] for name in ("scheduled_total", "finished_total", "inflight")}

    def act(self, action: str) -> None:
        """Start a run, or kill the worker that gets a request."""
        pid = start(self.server, "ok" if action == "kill" else action)
        self.scrape()
        if action == "kill" and pid:
            os.kill(pid, signal.SIGKILL)

    def is_accounted_for(self) -> bool:
        """Whether scheduled = finished + in flight."""
        sums = self.scrape()
        return sums["scheduled_total"] == sums["finished_total"] + sums["inflight"]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Three workers, some of which will be killed."""
    path = tmp_path_factory.mktemp("watched")
    (path / "metrics").mkdir()
    env = {"PROMETHEUS_MULTIPROC_DIR": str(path / "metrics")}
    with uvicorn("workers:app", APPS, path / "log", *THREE, **env) as server:
        yield Watched(server)


@pytest.mark.timeout(300)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=st.lists(st.sampled_from(ACTIONS), max_size=8))
def test_no_counter_falls_whatever_happens_to_the_workers(watched: Watched, actions: list[str]) -> None:
    """Through retries, abandoned threads and kill -9: counters only rise, and in the end every run is accounted for."""
    for action in actions:
        watched.act(action)
        watched.scrape()
    eventually(watched.is_accounted_for, what="scheduled = finished + in flight")


def test_a_replaced_worker_leaves_its_counts(workers: Server) -> None:
    """What a dead worker counted stays, and its successor adds to it."""
    first = {start(workers, "ok") for _ in range(30)}
    eventually(lambda: value(workers, "tasks_finished_total", task="workers.ok", outcome="succeeded") == 30)
    os.kill(min(first), signal.SIGKILL)
    responded: set[int] = set()
    sent = 0

    def another_responds() -> bool:
        nonlocal sent
        pid = start(workers, "ok")
        responded.add(pid)
        sent += bool(pid)
        return bool(responded - first - {0})

    eventually(another_responds, seconds=30, what="a response of a new worker")
    eventually(lambda: value(workers, "tasks_finished_total", task="workers.ok", outcome="succeeded") >= 30 + sent)
    # A request that was cut off with its worker may have been counted although it got no response.
    assert 0 <= value(workers, "tasks_scheduled_total", task="workers.ok") - 30 - sent <= 1


def test_the_counts_of_a_stopped_server_are_scraped_from_the_next(folder: Path, tmp_path: Path) -> None:
    """Runs that the shutdown cut off are counted as cancelled, after the last scrape of that server."""
    env = {"PROMETHEUS_MULTIPROC_DIR": str(folder)}
    limit = ("--timeout-graceful-shutdown", "1")
    with uvicorn("workers:app", APPS, tmp_path / "first", *limit, **env) as server:
        for _ in range(2):
            start(server, "endless")
        eventually(lambda: value(server, "tasks_inflight", task="workers.endless") == 2)
        server.child.send_signal(signal.SIGTERM)
        assert server.child.wait(20) in (0, -signal.SIGTERM)
        assert [line["task"] for line in lines(server, "task.cancelled")] == ["workers.endless"] * 2
    with uvicorn("workers:app", APPS, tmp_path / "second", **env) as server:
        assert value(server, "tasks_finished_total", task="workers.endless", outcome="cancelled") == 2
        assert value(server, "tasks_scheduled_total", task="workers.endless") == 2
        assert value(server, "tasks_inflight", task="workers.endless") == 0
        assert value(server, "tasks_bad_total", task="workers.endless") == 0


#: Takes over the files of a process that was killed, as a process with the same pid would, and serves requests.
SAME_PID = """
import importlib, os, pathlib, sys

dead, module, path, awaited = sys.argv[1:]
folder = pathlib.Path(os.environ["PROMETHEUS_MULTIPROC_DIR"])
for file in folder.glob(f"*_{dead}.*"):
    file.rename(file.with_name(file.name.replace(f"_{dead}.", f"_{os.getpid()}.")))

from starlette.testclient import TestClient

with TestClient(importlib.import_module(module).app) as client:
    client.get(path)
    while awaited not in (text := client.get("/metrics").text):
        pass
print(text)
"""


def with_the_pid_of(dead: int, module: str, path: str, awaited: str, **env: str) -> set[str]:
    """What a process with the pid of a dead one exposes, after a request, as soon as this is part of it."""
    done = subprocess.run(
        [sys.executable, "-c", SAME_PID, str(dead), module, path, awaited],
        env={**os.environ, **env, "PYTHONPATH": os.pathsep.join([str(APPS), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines())


def test_a_process_with_the_pid_of_a_killed_one_continues_its_counts(folder: Path, tmp_path: Path) -> None:
    """As after the restart of a container: the old runs are lost, once, and no longer in flight."""
    env = {"PROMETHEUS_MULTIPROC_DIR": str(folder)}
    with uvicorn("workers:app", APPS, tmp_path / "log", **env) as server:
        for _ in range(2):
            start(server, "endless")
        start(server, "ok")
        eventually(lambda: value(server, "tasks_inflight", task="workers.endless", state="running") == 2)
        eventually(lambda: value(server, "tasks_finished_total", task="workers.ok", outcome="succeeded") == 1)
        server.child.kill()
        server.child.wait()
    of = 'engine="local",{}task="workers.{}"'
    ok = f"aftertask_tasks_scheduled_total{{{of.format('', 'ok')}}} 2.0"
    exposed = with_the_pid_of(server.child.pid, "workers", "/ok", ok, **env)
    assert ok in exposed
    assert "aftertask_tasks_finished_total{" + of.format('outcome="lost",', "endless") + "} 2.0" in exposed
    assert "aftertask_tasks_inflight{" + of.format('state="running",', "endless") + "} 0.0" in exposed
    assert f"aftertask_tasks_bad_total{{{of.format('', 'endless')}}} 2.0" in exposed


# --- with a journal


def journaled(path: Path) -> dict[str, str]:
    """The environment of the app of durable tasks; makes the directory of metrics if it is not there."""
    env = {name: str(path / name.lower()) for name in ("JOURNAL", "RELEASE", "PROMETHEUS_MULTIPROC_DIR")}
    Path(env["PROMETHEUS_MULTIPROC_DIR"]).mkdir(exist_ok=True)
    return env


def surviving(path: Path, *more: str) -> AbstractContextManager[Server]:
    """A server of that app."""
    return uvicorn("surviving:app", APPS, path / "log", *more, **journaled(path))


def leave_runs(path: Path) -> int:
    """A server that is killed with a run of each task, and two of `again`; its pid."""
    with surviving(path) as server:
        for name in ("again", "once", "plain"):
            start(server, name)
        eventually(lambda: value(server, "tasks_inflight") == 4, what="all in flight")
        server.child.kill()
        server.child.wait()
    (path / "release").touch()
    return server.child.pid


def finished(server: Server, name: str) -> dict[str, float]:
    """How many runs of a task have ended, by outcome; those of which there are some."""
    samples = [sample for family in scrape(server) for sample in family.samples]
    ended = [sample for sample in samples if sample.name == "aftertask_tasks_finished_total"]
    return {s.labels["outcome"]: s.value for s in ended if s.labels["task"] == f"surviving.{name}" and s.value}


@pytest.mark.timeout(180)
def test_durable_runs_of_a_killed_worker_go_back_to_the_journal_and_only_the_others_are_lost(tmp_path: Path) -> None:
    """Also if the worker that runs them again is killed; an interrupted run is lost once, where it is settled."""
    with surviving(tmp_path, "--workers", "2") as server:
        watched = Watched(server)
        pids = {name: set[int]() for name in ("again", "once", "plain")}

        def two_workers_have_all() -> bool:
            for name, found in pids.items():
                found.add(start(server, name))
            return all(len(found - {0}) == 2 for found in pids.values())

        eventually(two_workers_have_all, what="two workers with a run of each task")
        eventually(lambda: watched.scrape()["inflight"] == 8, what="all in flight")
        first, second = pids["plain"] - {0}
        os.kill(first, signal.SIGKILL)
        eventually(lambda: value(server, "tasks_scheduled_total", task="surviving.once") == 3, what="the dead letter")
        eventually(lambda: value(server, "tasks_scheduled_total", task="surviving.again") == 6, what="the runs again")
        eventually(watched.is_accounted_for, what="scheduled = finished + in flight")
        assert finished(server, "again") == {"offloaded": 2}
        assert finished(server, "once") == {"offloaded": 1, "lost": 1}
        assert finished(server, "plain") == {"lost": 1}
        for name, bad in (("again", 0), ("once", 1), ("plain", 1)):
            assert value(server, "tasks_bad_total", task=f"surviving.{name}") == bad
            assert value(server, "tasks_not_run_total", task=f"surviving.{name}", reason="crash") == bad
            assert value(server, "tasks_inflight", task=f"surviving.{name}") == {"again": 4}.get(name, 1)

        os.kill(second, signal.SIGKILL)
        eventually(lambda: finished(server, "plain") == {"lost": 2}, what="the sweep")
        eventually(
            lambda: value(server, "tasks_inflight", task="surviving.again") == 4, seconds=40, what="all of them again"
        )
        (tmp_path / "release").touch()
        eventually(lambda: finished(server, "again").get("succeeded") == 4, seconds=40, what="their success")
        eventually(lambda: finished(server, "once") == {"offloaded": 2, "lost": 2}, what="the second dead letter")
        eventually(watched.is_accounted_for, what="scheduled = finished + in flight")
        assert set(finished(server, "again")) == {"succeeded", "offloaded"}
        assert finished(server, "plain") == {"lost": 2}
        alerted = lambda: {(alert["kind"], alert["task"]) for alert in lines(server, "shown")}
        eventually(lambda: alerted() == {("lost", "surviving.plain"), ("lost", "surviving.once")}, what="the alerts")


def test_durable_runs_of_a_killed_server_go_on_without_the_directory_of_metrics(tmp_path: Path) -> None:
    """It may be emptied at each start: the accounts begin anew with what the journal has."""
    leave_runs(tmp_path)
    shutil.rmtree(tmp_path / "prometheus_multiproc_dir")
    with surviving(tmp_path) as server:
        eventually(lambda: finished(server, "again") == {"succeeded": 2}, seconds=40, what="the runs")
        eventually(lambda: finished(server, "once") == {"lost": 1}, what="the dead letter")
        assert finished(server, "plain") == {}
        assert Watched(server).is_accounted_for()


def test_a_process_with_the_pid_of_a_killed_one_gets_its_durable_runs_from_the_journal(tmp_path: Path) -> None:
    """As after the restart of a container that keeps the directory."""
    dead = leave_runs(tmp_path)
    of = 'aftertask_tasks_finished_total{{engine="local",outcome="{}",task="surviving.{}"}} {:.1f}'
    done = of.format("succeeded", "again", 2)
    exposed = with_the_pid_of(dead, "surviving", "/metrics", done, **journaled(tmp_path))
    for outcome, name, number in (
        *(("offloaded", "again", 2), ("lost", "again", 0), ("succeeded", "again", 2)),
        *(("offloaded", "once", 1), ("lost", "once", 1), ("lost", "plain", 1), ("offloaded", "plain", 0)),
    ):
        assert of.format(outcome, name, number) in exposed
    for name, scheduled in (("again", 4), ("once", 2), ("plain", 1)):
        labels = f'engine="local",task="surviving.{name}"'
        assert f"aftertask_tasks_scheduled_total{{{labels}}} {scheduled:.1f}" in exposed


# --- the warning


def warnings(command: tuple[str, ...], port: int, count: int, log: Path, env: dict[str, str]) -> list[dict[str, Any]]:
    """The warnings that a server logs until each of its workers has responded."""
    with process(
        *command, log=log, env={"PYTHONPATH": f"{APPS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", **env}
    ) as child:
        server = Server(f"http://127.0.0.1:{port}", child, log)
        eventually(lambda: server.answers("/metrics"), what="the server responding")
        pids: set[int] = set()

        def all_responded() -> bool:
            pids.add(start(server, "ok"))
            return len(pids - {0}) == count

        eventually(all_responded, what="a response of each worker")
        found = eventually(lambda: lines(server, "task.succeeded"), what="a log line")
        assert {line["task"] for line in found} == {"workers.ok"}
        child.kill()  # some servers take ten seconds to stop
        return lines(server, "metrics.several_workers")


UVICORN = (sys.executable, "-m", "uvicorn", "workers:app", "--log-level", "warning", "--port", "{port}")
HYPERCORN = (sys.executable, "-m", "hypercorn", "workers:app", "--bind", "127.0.0.1:{port}")
GUNICORN = (sys.executable, "-m", "gunicorn", "workers:app", "--bind", "127.0.0.1:{port}")


@pytest.mark.parametrize(
    ("command", "env", "count", "expected"),
    [
        pytest.param((*UVICORN, "--workers", "1"), {}, 1, 0, id="uvicorn with one worker"),
        pytest.param((*UVICORN, "--reload"), {}, 1, 0, id="uvicorn that reloads"),
        pytest.param((*UVICORN, "--workers", "2"), {}, 2, 1, id="uvicorn by command line"),
        pytest.param(UVICORN, {"WEB_CONCURRENCY": "2"}, 2, 1, id="uvicorn by environment"),
        pytest.param((sys.executable, str(APPS / "serve_workers.py"), "{port}", "2"), {}, 2, 1, id="uvicorn.run"),
        pytest.param((*UVICORN, "--workers", "2"), {"PROMETHEUS_MULTIPROC_DIR": "shared"}, 2, 0, id="with a directory"),
        pytest.param((*HYPERCORN, "--workers", "2"), {}, 2, 1, id="hypercorn by command line"),
    ],
)
def test_several_workers_without_a_directory_log_one_warning(
    tmp_path: Path, folder: Path, command: tuple[str, ...], env: dict[str, str], count: int, expected: int
) -> None:
    """However their number was set; one worker, or several with a directory, log none."""
    port = free_port()
    command = tuple(part.format(port=port) for part in command)
    env = {name: str(folder) if text == "shared" else text for name, text in env.items()}
    assert len(warnings(command, port, count, tmp_path / "log", env)) == expected


@pytest.mark.parametrize("how", ["command line", "file", "environment"])
@pytest.mark.parametrize("worker", ["uvicorn_worker.UvicornWorker", "asgi"])
@pytest.mark.parametrize("preload", [False, True], ids=["", "preload"])
def test_several_workers_of_gunicorn_log_one_warning(tmp_path: Path, how: str, worker: str, preload: bool) -> None:
    """Also if only gunicorn's configuration file says so."""
    pytest.importorskip("gunicorn")
    pytest.importorskip("uvicorn_worker")
    file, port = tmp_path / "gunicorn.conf.py", free_port()
    file.write_text(
        f"worker_class = {worker!r}\npreload_app = {preload}\n" + ("workers = 2\n" if how == "file" else "")
    )
    command = [part.format(port=port) for part in (*GUNICORN, "--config", str(file))]
    if how == "command line":
        command += ["--workers", "2"]
    env = {"WEB_CONCURRENCY": "2"} if how == "environment" else {}
    assert len(warnings(tuple(command), port, 2, tmp_path / "log", env)) == 1


def test_a_query_selects_families(folder: Path, tmp_path: Path) -> None:
    """`name[]` narrows a scrape in multi-process mode, too."""
    with uvicorn("workers:app", APPS, tmp_path / "log", PROMETHEUS_MULTIPROC_DIR=str(folder)) as server:
        text = httpx2.get(f"{server.url}/metrics", params={"name[]": "aftertask_build_info"}, timeout=PATIENCE).text
        assert "aftertask_build_info" in text
        assert "aftertask_tasks_scheduled" not in text
