"""Durable runs for an engine: the journal keeps each until the engine has confirmed that it has it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from aftertask import Policy, cancel_run
from aftertask.events import Offloaded, OffloadFailed, Scheduled, Started
from kit_engines import Memory
from live.servers import eventually

from .conftest import Journaled

pytestmark = pytest.mark.timeout(60)

DID: list[str] = []


@pytest.fixture
def memory() -> Iterator[Memory]:
    """The engine of the app, which runs nothing here although it may."""
    DID.clear()
    engine = Memory(on_unavailable="local")
    yield engine
    engine.goes_on.set()
    assert DID == []


def mail(to: str) -> None:
    """A task that must not execute here."""
    DID.append(to)


def settings(memory: Memory) -> dict[str, Any]:
    """The task is durable, and runs on the engine."""
    return {"policies": {"*": Policy(durable=True, executor="memory")}, "engines": {"memory": memory}}


def taken(memory: Memory) -> list[str]:
    """Ids of the runs that the engine has."""
    return [handover.run.id for handover in memory.taken]


def test_a_durable_run_is_handed_over_from_the_journal(shop: Journaled, memory: Memory) -> None:
    """After the commit, with its arguments, and its row ends when the engine has it."""
    with shop.client(lambda tasks: tasks.add_task(mail, "a@b"), **settings(memory)) as client:
        response = client.post("/")
        eventually(lambda: shop.row()["state"] == "offloaded")
    row = shop.row()
    assert taken(memory) == [row["id"]] == [response.headers["x-run-ids"]]
    assert memory.taken[0].arguments == ("a@b",)
    assert (row["settled_at"] is None, row["dead"], shop.committed) == (False, None, 1)
    assert [type(event) for event in shop.seen.events] == [Scheduled, Started, Offloaded]


def test_a_run_whose_request_failed_is_never_handed_over(shop: Journaled, memory: Memory) -> None:
    """It is dropped, as any durable run is."""
    shop.commit_fails = True
    with shop.client(lambda tasks: tasks.add_task(mail, "a@b"), **settings(memory)) as client:
        client.post("/")
        eventually(lambda: [row["state"] for row in shop.rows()] == ["dropped"])
    assert memory.taken == []


@pytest.mark.long
def test_runs_wait_in_the_journal_while_the_engine_takes_none(shop: Journaled, memory: Memory) -> None:
    """Requests succeed, one run at a time tries again, and all arrive under their ids once it works."""
    memory.is_closed = True
    with shop.client(lambda tasks: tasks.add_task(mail, "a@b"), **settings(memory)) as client:
        ids = [client.post("/").headers["x-run-ids"] for _ in range(20)]
        eventually(lambda: {(row["state"], row["settled_at"]) for row in shop.rows()} == {("ready", None)})
        eventually(lambda: len(shop.seen.of(OffloadFailed)) >= 3, seconds=30)
        assert not any(event.falls_back for event in shop.seen.of(OffloadFailed))
        memory.is_closed = False
        eventually(lambda: {row["state"] for row in shop.rows()} == {"offloaded"}, seconds=40)
        assert sorted(taken(memory)) == sorted(ids)
        eventually(lambda: shop.metric("offload_total", engine="memory", status="ok") == 20)
        assert shop.metric("offload_total", engine="memory", status="fallback") == 0
        assert {event.run.origin for event in shop.seen.of(Offloaded)} == {"request", "journal"}
        scheduled = shop.metric("tasks_scheduled_total", task=f"{__name__}.mail", engine="local")
        assert scheduled == len(shop.seen.of(Offloaded))  # handed over, or back to the journal: each ends


def test_a_waiting_run_can_be_cancelled(shop: Journaled, memory: Memory) -> None:
    """It is then dropped and never handed over."""
    memory.is_closed = True
    with shop.client(lambda tasks: tasks.add_task(mail, "a@b"), **settings(memory)) as client:
        run_id = client.post("/").headers["x-run-ids"]
        eventually(lambda: shop.row()["owner"] is None and shop.row()["state"] == "ready")
        assert (shop.row()["attempts"], shop.row()["started_at"]) == (0, None)  # the engine never had it
        assert client.portal is not None
        assert client.portal.call(cancel_run, run_id) is not None
        eventually(lambda: shop.row()["state"] == "dropped")
    assert memory.taken == [] and shop.row()["bad"] == 0  # it was cancelled on purpose


@pytest.mark.long
def test_a_shutdown_in_the_middle_of_a_hand_over_leaves_the_run_for_the_next_worker(
    shop: Journaled, memory: Memory
) -> None:
    """Whether the engine has it is unknown, so it gets it again: at least once, under the same id."""
    memory.goes_on.clear()
    given = {**settings(memory), "drain_timeout": 0.1}
    with shop.client(lambda tasks: tasks.add_task(mail, "a@b"), **given) as client:
        run_id = client.post("/").headers["x-run-ids"]
        eventually(lambda: bool(memory.threads))
    assert (shop.row()["state"], shop.row()["owner"], shop.row()["dead"]) == ("ready", None, None)
    memory.goes_on.set()
    with shop.client(lambda tasks: None, **settings(memory)):
        eventually(lambda: shop.row()["state"] == "offloaded", seconds=30)
    assert set(taken(memory)) == {run_id}
