"""Durable runs on Celery, and workers that die: a real broker, web process and worker each fail; nothing is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx2
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

from live.brokers import APPS, found, hanging, port_of, rabbitmq, redis, worker
from live.servers import Server, eventually, uvicorn, value

pytestmark = [pytest.mark.long, pytest.mark.timeout(400)]

APP = "offloading.celery"
QUEUES = ("-Q", "celery,bulk", "--concurrency", "2")
#: Seconds after which Redis may deliver again what was not acknowledged. A worker looks for that when it starts, and
#: every RESTORE x RESTORE seconds: 100 by default, here each second.
VISIBILITY, RESTORE, REDELIVERED = "3", "1", 60
#: Seconds that a hand-over may take, far more than a request takes on a busy machine.
DEADLINE = "5"

both = pytest.mark.parametrize("kind", [redis, rabbitmq])


@contextlib.contextmanager
def web(folder: Path, broker: Server) -> Iterator[Server]:
    """The web process, with a journal."""
    env = {"FOLDER": str(folder), "JOURNAL": str(folder / "tasks.db"), "DEADLINE": DEADLINE, **found(broker.url)}
    with uvicorn("offloading:app", APPS, folder / "web.log", **env) as server:
        yield server


def order(server: Server, number: int) -> str:
    """Place an order; the id of its run."""
    return httpx2.get(f"{server.url}/order/{number}", timeout=30).raise_for_status().headers["x-run-ids"]


def executed(folder: Path) -> Counter[str]:
    """How often each run of an order was executed, by id."""
    file = folder / "order"
    return Counter(line.split()[1] for line in file.read_text().splitlines()) if file.exists() else Counter()


def lines(folder: Path, name: str) -> list[str]:
    """What a task has noted."""
    file = folder / name
    return file.read_text().splitlines() if file.exists() else []


def states(folder: Path) -> Counter[tuple[str, str | None]]:
    """The runs in the journal by state and reason of death."""
    with closing(sqlite3.connect(folder / "tasks.db", timeout=20)) as db:
        return Counter(db.execute("SELECT state, dead FROM runs"))


def succeeded_at(folder: Path, name: str) -> float:
    """What a worker has counted, by its files: Celery's may end, by an error of its own, when it loses a Redis."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(folder / f"{name}-metrics"))  # type: ignore[no-untyped-call]  # the library's
    samples = [sample for metric in registry.collect() for sample in metric.samples]
    finished = [sample for sample in samples if sample.name == "aftertask_tasks_finished_total"]
    return sum(sample.value for sample in finished if sample.labels["outcome"] == "succeeded")


def kill(server: Server) -> None:
    """No server process of its own survives, and none of its children."""
    os.killpg(server.child.pid, signal.SIGKILL)
    server.child.wait(20)


@contextlib.contextmanager
def stopped(broker: Server) -> Iterator[None]:
    """The broker has ended."""
    broker.child.send_signal(signal.SIGTERM)
    broker.child.wait(60)
    yield


@both
@pytest.mark.parametrize("out_of_order", [stopped, hanging])
def test_a_web_process_killed_before_the_hand_over_loses_no_durable_run(
    out_of_order: Any, kind: Any, tmp_path: Path
) -> None:
    """The client has its answer, the broker has nothing: the next web process hands the run over, under its id."""
    with kind(tmp_path) as broker, contextlib.ExitStack() as rest:
        with web(tmp_path, broker) as server:
            ids = [order(server, 0)]
            eventually(lambda: states(tmp_path) == {("offloaded", None): 1})
            with out_of_order(broker):
                ids += [order(server, number) for number in range(1, 11)]
                eventually(lambda: states(tmp_path) == {("offloaded", None): 1, ("ready", None): 10})
                kill(server)
        if broker.child.poll() is not None:
            broker = rest.enter_context(kind(tmp_path, port_of(broker)))
        with web(tmp_path, broker), worker(APP, tmp_path, broker.url, *QUEUES, FOLDER=str(tmp_path)):
            eventually(lambda: states(tmp_path) == {("offloaded", None): 11}, seconds=60)
            eventually(lambda: executed(tmp_path).keys() == set(ids), seconds=60)


@both
def test_a_broker_stopped_and_started_under_load_loses_no_durable_run(kind: Any, tmp_path: Path) -> None:
    """Every accepted order is executed; no request waits for the broker."""
    done, ids, seconds = threading.Event(), list[str](), list[float]()

    def load(first: int) -> None:
        number = first
        while not done.is_set():
            began = time.monotonic()
            ids.append(order(server, number))
            seconds.append(time.monotonic() - began)
            number += 10
            done.wait(0.02)

    with contextlib.ExitStack() as stack:
        broker = stack.enter_context(kind(tmp_path))
        server = stack.enter_context(web(tmp_path, broker))
        env = {"FOLDER": str(tmp_path), "VISIBILITY": VISIBILITY, "RESTORE": RESTORE}
        stack.enter_context(worker(APP, tmp_path, broker.url, *QUEUES, **env))
        clients = [threading.Thread(target=load, args=(first,)) for first in range(4)]
        for client in clients:
            client.start()
        try:
            eventually(lambda: len(executed(tmp_path)) >= 20, seconds=60)
            stack.enter_context(stopped(broker))
            before = len(ids)
            eventually(lambda: len(ids) >= before + 50, seconds=60)
            stack.enter_context(kind(tmp_path, port_of(broker)))
            # Celery's worker sometimes takes no more messages after it has lost a Redis: what restarts workers that
            # do not answer a ping starts another one.
            stack.enter_context(worker(APP, tmp_path, broker.url, *QUEUES, name="next", **env))
            eventually(lambda: value(server, "offload_total", status="ok") > before, seconds=60)
        finally:
            done.set()
            for client in clients:
                client.join(60)
        eventually(lambda: states(tmp_path) == {("offloaded", None): len(ids)}, seconds=60)
        eventually(lambda: executed(tmp_path).keys() == set(ids), seconds=REDELIVERED)
        assert value(server, "offload_total", status="error") >= 1
        eventually(lambda: succeeded_at(tmp_path, "worker") + succeeded_at(tmp_path, "next") >= len(ids))
    assert sorted(seconds)[int(0.99 * len(seconds))] < float(DEADLINE)


@both
def test_a_worker_killed_in_the_middle_of_its_runs(kind: Any, tmp_path: Path) -> None:
    """The idempotent one is executed again by another worker, the other one is not: as the docs say."""
    env = {"FOLDER": str(tmp_path), "VISIBILITY": VISIBILITY, "RESTORE": RESTORE}
    with kind(tmp_path) as broker, web(tmp_path, broker) as server:
        with worker(APP, tmp_path, broker.url, *QUEUES, name="first", **env) as first:
            for name in ("once", "again"):
                httpx2.get(f"{server.url}/run/{name}", timeout=30).raise_for_status()
            eventually(lambda: lines(tmp_path, "once") == lines(tmp_path, "again") == ["started"], seconds=40)
            kill(first)
        (tmp_path / "go on").touch()
        with worker(APP, tmp_path, broker.url, *QUEUES, name="second", **env) as second:
            eventually(lambda: lines(tmp_path, "again") == ["started", "started", "ended"], seconds=REDELIVERED)
            eventually(lambda: value(second, "hazards_total", kind="redelivered") == 1)
            assert lines(tmp_path, "once") == ["started"]
