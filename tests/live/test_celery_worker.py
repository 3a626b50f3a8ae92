"""`instrument_worker` on real prefork workers, with tasks that were never aftertask's, on Redis and on RabbitMQ."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from live.brokers import rabbitmq, redis, send, worker
from live.servers import Server, Spans, eventually, scrape, value, values

pytestmark = [pytest.mark.long, pytest.mark.timeout(150)]

CONSUMER, PRODUCER = 5, 4
APP = "celery_tasks"


@pytest.fixture(scope="module", params=[redis, rabbitmq])
def broker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One broker for all tests of this module."""
    with request.param(tmp_path_factory.mktemp("broker")) as server:
        yield server


@pytest.fixture
def spans() -> Iterator[Spans]:
    """A receiver of OTLP."""
    with Spans() as receiver:
        yield receiver


def outcomes(server: Server, task: str) -> dict[str, float]:
    """The runs of a task by outcome, as the worker counts them."""
    return {
        sample.labels["outcome"]: sample.value
        for family in scrape(server)
        for sample in family.samples
        if sample.name == "aftertask_tasks_finished_total" and sample.labels["task"] == f"{APP}.{task}" and sample.value
    }


def test_every_run_of_a_worker_ends_once(broker: Server, tmp_path: Path) -> None:
    """Success, failure, retry, both time limits, a killed process and a redelivered message are each counted once."""
    folder = str(tmp_path)
    code = f"""
for number in range(10): tasks.add.delay(number, 1)
for task in (tasks.broken, tasks.recovering, tasks.slow, tasks.stubborn, tasks.killed, tasks.calling): task.delay()
for task in (tasks.killed_once, tasks.stubborn_once): task.delay({folder!r} + "/" + task.name)
"""
    with worker(APP, tmp_path, broker.url, "--concurrency", "2") as server:
        assert value(server, "tasks_finished_total", engine="celery") == 0  # the series exist from the start
        send(APP, broker.url, code)
        eventually(lambda: value(server, "tasks_finished_total", engine="celery") >= 18, seconds=60)
        assert outcomes(server, "add") == {"succeeded": 10}
        assert outcomes(server, "broken") == {"failed": 1}  # and not the call within another task
        assert outcomes(server, "calling") == {"succeeded": 1}
        assert outcomes(server, "recovering") == {"succeeded": 1}
        assert outcomes(server, "slow") == outcomes(server, "stubborn") == {"timed_out": 1}
        assert outcomes(server, "killed") == {"lost": 1}
        assert outcomes(server, "killed_once") == outcomes(server, "stubborn_once") == {"succeeded": 1}
        assert value(server, "retries_total", task=f"{APP}.recovering") == 2
        for name in ("killed_once", "stubborn_once"):
            assert value(server, "hazards_total", task=f"{APP}.{name}", kind="redelivered") == 1
        assert value(server, "queue_wait_seconds_count", task=f"{APP}.add") == 10
        assert value(server, "attempt_duration_seconds_count", task=f"{APP}.recovering", result="error") == 2
        assert value(server, "tasks_scheduled_total", engine="celery") == 18
        assert eventually(lambda: value(server, "tasks_inflight", engine="celery") == 0)
        assert not values(server, "tasks_scheduled_total", engine="local")
        assert not [each for each in values(server, "self_errors_total") if each]
    log = server.log.read_text()
    assert f"task.failed {APP}.broken: LookupError" in log
    assert f"task.timed_out {APP}.stubborn" in log and log.count(f"task.timed_out {APP}.stubborn") == 1
    assert f"task.lost {APP}.killed: crash" in log
    assert f"task.retrying {APP}.recovering: ConnectionError: not yet; next attempt in 0 s (attempt 2 of 3)" in log


def test_each_run_beyond_its_hard_time_limit_has_its_own_account(broker: Server, tmp_path: Path) -> None:
    """Also a second one under the same id, as of a replay; and the time is the run's, however late it is noticed."""
    with worker(APP, tmp_path, broker.url, "--concurrency", "1") as server:
        send(APP, broker.url, "tasks.stubborn.apply_async(task_id='same')")
        eventually(lambda: outcomes(server, "stubborn") == {"timed_out": 1}, seconds=60)
        send(APP, broker.url, "tasks.stubborn.apply_async(task_id='same')")
        eventually(lambda: value(server, "tasks_scheduled_total", task=f"{APP}.stubborn") == 2)
        os.kill(server.child.pid, signal.SIGSTOP)
        time.sleep(4)  # the main process is busy meanwhile
        os.kill(server.child.pid, signal.SIGCONT)
        eventually(lambda: outcomes(server, "stubborn") == {"timed_out": 2})
        assert value(server, "attempt_duration_seconds_sum", task=f"{APP}.stubborn") > 1 + 4
        assert eventually(lambda: value(server, "tasks_inflight", engine="celery") == 0)


def test_an_exception_that_cannot_be_unpickled_has_its_own_class(broker: Server, tmp_path: Path) -> None:
    """Also where it is retried: Celery puts one of its own in its place."""
    with worker(APP, tmp_path, broker.url, "--concurrency", "1") as server:
        send(APP, broker.url, "tasks.denied.delay()")
        eventually(lambda: outcomes(server, "denied") == {"failed": 1}, seconds=60)
        assert value(server, "attempt_errors_total", task=f"{APP}.denied", error_type=f"{APP}.Denied") == 2
        assert value(server, "attempt_errors_total", task=f"{APP}.denied") == 2
    log = server.log.read_text()
    assert f"task.failed {APP}.denied: {APP}.Denied: " in log
    assert f"task.retrying {APP}.denied: {APP}.Denied: " in log


def test_what_a_task_notes_is_redacted(broker: Server, tmp_path: Path) -> None:
    """By the rule that the worker was given."""
    with worker(APP, tmp_path, broker.url, "--concurrency", "1") as server:
        send(APP, broker.url, "tasks.noting.delay()")
        eventually(lambda: outcomes(server, "noting") == {"succeeded": 1}, seconds=60)
    assert "{'customer': 'c-[id]'}" in server.log.read_text()


def test_spans_and_counts_of_recycled_processes_arrive(broker: Server, tmp_path: Path, spans: Spans) -> None:
    """A process that ends after one task has exported its span; its counts stay, its files do not."""
    otlp = {"OTLP": f"{spans.url}/v1/traces"}
    options = ("--concurrency", "2", "--max-tasks-per-child", "1")
    with worker(APP, tmp_path, broker.url, *options, **otlp) as server:
        send(APP, broker.url, "for number in range(10): tasks.add.delay(number, 1)", **otlp)
        eventually(lambda: outcomes(server, "add") == {"succeeded": 10}, seconds=60)
        eventually(lambda: len([span for span in spans.spans if span.kind == CONSUMER]) == 10)
        folder = tmp_path / "worker-metrics"
        eventually(lambda: len(os.listdir(folder)) < 20, what="the files being folded")
        assert outcomes(server, "add") == {"succeeded": 10}
    assert len([span for span in spans.spans if span.kind == PRODUCER]) == 10


def test_one_trace_leads_from_the_sender_through_every_attempt(broker: Server, tmp_path: Path, spans: Spans) -> None:
    """CONSUMER spans are children of the PRODUCER's and linked to it; a later attempt is linked to the first, too."""
    otlp = {"OTLP": f"{spans.url}/v1/traces"}
    with worker(APP, tmp_path, broker.url, "--concurrency", "1", **otlp) as server:
        send(APP, broker.url, "tasks.recovering.delay()", **otlp)
        eventually(lambda: outcomes(server, "recovering") == {"succeeded": 1})
    first, second, third = sorted(
        (span for span in spans.spans if span.kind == CONSUMER), key=lambda span: span.start_time_unix_nano
    )
    (sent,) = [span for span in spans.spans if span.kind == PRODUCER and not span.parent_span_id]
    assert {span.trace_id for span in spans.spans} == {sent.trace_id}
    assert first.parent_span_id == sent.span_id
    assert [link.span_id for link in first.links] == [sent.span_id]
    for later in (second, third):
        assert first.span_id in [link.span_id for link in later.links]
    found = {each.key: each.value.string_value or each.value.int_value for each in third.attributes}
    assert found["messaging.system"] == ("redis" if broker.url.startswith("redis") else "rabbitmq")
    assert found["messaging.destination.name"] == "celery" and third.name == "process celery"
    assert (found["aftertask.attempt"], found["aftertask.engine"]) == (3, "celery")
    assert found["aftertask.outcome"] == "succeeded"
    assert sent.name == "send celery"
