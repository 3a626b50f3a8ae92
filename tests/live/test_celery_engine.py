"""`CeleryEngine`: a real web process, a real broker and real prefork workers, and what may go wrong between them."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import pytest
from kombu import Connection

from docs_blocks import blocks
from live.brokers import APPS, found, hanging, listens, port_of, rabbitmq, redis, send, worker
from live.grafana import BOARDS, Grafana, panels
from live.monitoring import instant, prometheus
from live.servers import Server, Spans, eventually, program, scrape, uvicorn, value, values

pytestmark = [pytest.mark.long, pytest.mark.timeout(150)]

APP = "offloading.celery"
ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "celery_offload"
QUEUES = ("-Q", "celery,bulk")
#: Seconds that the engine has where its broker hangs: far more than a request takes on a busy machine.
DEADLINE = 5.0


class Both(NamedTuple):
    """A web process and a worker."""

    web: Server
    worker: Server
    folder: Path


@contextlib.contextmanager
def web(folder: Path, broker: str, **env: str) -> Iterator[Server]:
    """The web process."""
    with uvicorn("offloading:app", APPS, folder / "web.log", FOLDER=str(folder), **found(broker), **env) as server:
        yield server


@contextlib.contextmanager
def both(folder: Path, broker: str, **env: str) -> Iterator[Both]:
    """The web process, and a worker with two processes."""
    options = ("--concurrency", "2", *QUEUES)
    with (
        web(folder, broker, **env) as server,
        worker(APP, folder, broker, *options, FOLDER=str(folder), **env) as other,
    ):
        yield Both(server, other, folder)


@pytest.fixture(scope="module", params=[redis, rabbitmq])
def broker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One broker for the tests that leave it alone."""
    with request.param(tmp_path_factory.mktemp("broker")) as server:
        yield server


def get(server: Server, path: str) -> float:
    """Ask for a path; returns the seconds that it took."""
    began = time.monotonic()
    httpx2.get(f"{server.url}/{path}", timeout=60).raise_for_status()
    return time.monotonic() - began


def lines(folder: Path, name: str) -> list[str]:
    """What a task has noted."""
    file = folder / name
    return file.read_text().splitlines() if file.exists() else []


def outcomes(server: Server, engine: str) -> dict[tuple[str, str], float]:
    """The runs by task and outcome."""
    return {
        (sample.labels["task"].removeprefix("off."), sample.labels["outcome"]): sample.value
        for family in scrape(server)
        for sample in family.samples
        if sample.name == "aftertask_tasks_finished_total" and sample.labels["engine"] == engine and sample.value
    }


def buried(server: Server) -> dict[tuple[str, str], float]:
    """The dead letters by task and reason, as the worker counts them; those that are not 0."""
    return {
        (sample.labels["task"].removeprefix("off."), sample.labels["reason"]): sample.value
        for family in scrape(server)
        for sample in family.samples
        if sample.name == "aftertask_dead_letters_total" and sample.value
    }


def dead_letters(broker: Server) -> list[tuple[str, str]]:
    """Task and reason of each dead letter; they are taken out of their queue."""
    with Connection(broker.url) as connection, connection.SimpleQueue("aftertask.dead") as queue:
        letters = []
        with contextlib.suppress(queue.Empty):
            while True:
                message = queue.get(timeout=1)
                message.ack()
                letters.append((message.headers["task"], message.headers["aftertask"]["dead"]))
        return sorted(letters)


def test_runs_go_on_at_the_worker(broker: Server, tmp_path: Path) -> None:
    """Each run ends `offloaded` here and once on the worker, whatever becomes of it there; none is left over."""
    with Spans() as spans, both(tmp_path, broker.url, OTLP=f"{spans.url}/v1/traces") as (server, other, folder):
        assert len(values(other, "dead_letters_total", task="off.broken")) == 4  # the series exist from the start
        for path in ("mail/a@b", "broken", "run/bulk", "run/recovering", "run/slow", "run/expired"):
            get(server, path)
        first = {("mail", "succeeded"), ("broken", "failed"), ("bulk", "succeeded"), ("recovering", "succeeded")}
        first |= {("slow", "timed_out")}
        eventually(lambda: outcomes(other, "celery").keys() >= first, seconds=40)
        get(server, "run/killed")
        eventually(lambda: ("killed", "lost") in outcomes(other, "celery"), seconds=40)
        get(server, "run/killed_once")
        eventually(lambda: ("killed_once", "succeeded") in outcomes(other, "celery"), seconds=40)

        expired = {("expired", "expired")}  # here or there, whatever comes first
        eventually(lambda: expired <= {*outcomes(server, "local"), *outcomes(other, "celery")})
        assert set(outcomes(other, "celery").values()) == {1}
        handed_over = {(task, "offloaded") for task, _ in outcomes(other, "celery")}
        assert outcomes(server, "local").keys() - expired == handed_over
        assert value(server, "offload_total", status="ok") == len(handed_over)
        assert value(server, "offload_seconds_count") == len(handed_over)
        assert value(other, "tasks_scheduled_total", engine="celery") == len(handed_over)
        assert value(other, "retries_total", engine="celery") == 3
        assert value(other, "attempt_errors_total", error_type="aftertask.TaskTimeout") == 1
        assert not [each for server in (server, other) for each in values(server, "self_errors_total") if each]
        named = {("broken", "failed"): 1, ("killed", "interrupted"): 1, ("slow", "timed_out"): 1}
        eventually(lambda: buried(other) == named)
        assert "workers: worker-" in httpx2.get(f"{server.url}/health/engine", timeout=60).text
    address, when, run_id, _ = lines(folder, "mail")[0].split()
    assert (address, when) == ("a@b", "2026-01-02T00:00:00")
    assert lines(folder, "slow") == ["cleaned up"]
    assert len(lines(folder, "killed")) == 1 and len(lines(folder, "killed_once")) == 2
    assert dead_letters(broker) == [
        ("off.broken", "LookupError"),
        ("off.killed", "billiard.exceptions.WorkerLostError"),
        ("off.slow", "aftertask.TaskTimeout"),
    ]

    log = other.log.read_text()
    assert "task.lost off.killed: crash (GET /run/{name})" in log  # from the message: the process is gone
    assert re.search(r"task.dead_lettered task=off.killed run_id=\S+ reason=interrupted error_type=billiard\S+", log)
    assert "s3cr3t" not in log and "task.failed off.broken: LookupError: for good (GET /broken, attempt 2 of 2)" in log
    trace = next(span.trace_id for span in spans.spans if span.name == "background_task off.mail")
    in_order = ["GET /mail/{address}", "background_task off.mail", "send celery", "process celery"]
    chain = {span.name: span for span in spans.spans if span.trace_id == trace and span.name in in_order}
    for parent, child in itertools.pairwise(in_order):
        assert chain[child].parent_span_id == chain[parent].span_id, (parent, child)
    attributes = {each.key: each.value.string_value for each in chain["process celery"].attributes}
    assert attributes["aftertask.run.id"] == attributes["messaging.message.id"] == run_id
    assert attributes["http.route"] == "/mail/{address}"


def test_a_message_of_another_version_is_refused(broker: Server, tmp_path: Path) -> None:
    """It fails without being executed, and is put to the dead letters; so is one whose arguments do not fit."""
    code = """
from aftertask.celery.header import NAME
good = {"address": "a", "when": "2026-01-02T00:00:00"}
for name, header, kwargs in (("v2", {"v": 2}, good), ("args", {"v": 1}, {"gone": 1}), ("fine", {"v": 1}, good)):
    tasks.celery.send_task("off.mail", kwargs=kwargs, task_id=name, headers={NAME: header})
"""
    env = {"FOLDER": str(tmp_path)}
    with worker(APP, tmp_path, broker.url, "--concurrency", "1", *QUEUES, **env) as other:
        send("offloading", broker.url, code, **env)
        eventually(lambda: sum(outcomes(other, "celery").values()) == 3)
        assert outcomes(other, "celery") == {("mail", "failed"): 2, ("mail", "succeeded"): 1}
        eventually(lambda: buried(other) == {("mail", "unknown_message"): 2})
    assert len(lines(tmp_path, "mail")) == 1
    assert dead_letters(broker) == [("off.mail", "aftertask.errors.UnknownMessage")] * 2


def test_an_exception_that_cannot_be_unpickled_keeps_its_class(broker: Server, tmp_path: Path) -> None:
    """Under `expected` it makes no bad run and no letter; each retry, and the letter of another task, have its name."""
    env = {"FOLDER": str(tmp_path)}
    with worker(APP, tmp_path, broker.url, "--concurrency", "1", *QUEUES, **env) as other:
        code = "for id in ('denied', 'denied_twice'): tasks.celery.send_task(f'off.{id}', task_id=id, kwargs={})"
        send("offloading", broker.url, code, **env)
        eventually(lambda: outcomes(other, "celery") == {("denied", "failed"): 1, ("denied_twice", "failed"): 1})
        assert sum(values(other, "tasks_bad_total", task="off.denied")) == 0
        assert value(other, "tasks_bad_total", task="off.denied_twice") == 1
        assert value(other, "attempt_errors_total", error_type="offloading.Denied") == 3
        assert value(other, "attempt_errors_total") == 3
        eventually(lambda: buried(other) == {("denied_twice", "failed"): 1})
    assert dead_letters(broker) == [("off.denied_twice", "offloading.Denied")]
    assert "task.failed off.denied_twice: offloading.Denied: 2: no" in other.log.read_text()


def test_a_task_that_exits_or_cancels_itself_has_failed(broker: Server, tmp_path: Path) -> None:
    """Once, with its class and stack and one letter, also if it is idempotent; its process goes on."""
    env, names = {"FOLDER": str(tmp_path)}, ("exits", "exits_async", "cancels")
    with worker(APP, tmp_path, broker.url, "--concurrency", "1", *QUEUES, **env) as other:
        code = f"for id in {(*names, 'bulk')}: tasks.celery.send_task(f'off.{{id}}', task_id=id, kwargs={{}})"
        send("offloading", broker.url, code, **env)
        failed = {(name, "failed"): 1 for name in names}
        eventually(lambda: outcomes(other, "celery") == {**failed, ("bulk", "succeeded"): 1}, seconds=40)
        eventually(lambda: buried(other) == failed)
        assert sum(values(other, "hazards_total", kind="redelivered")) == 0
    assert len({pid for name in names for pid in lines(tmp_path, name)}) == 1
    assert [len(lines(tmp_path, name)) for name in names] == [1, 1, 1]
    log = other.log.read_text()
    assert "task.failed off.exits: SystemExit: enough" in log and 'sys.exit("enough")' in log
    assert dead_letters(broker) == [
        ("off.cancels", "asyncio.exceptions.CancelledError"),
        ("off.exits", "SystemExit"),
        ("off.exits_async", "SystemExit"),
    ]


def test_a_run_that_is_revoked_while_it_runs_is_cancelled(broker: Server, tmp_path: Path) -> None:
    """Celery ends its process by a signal, which raises `SystemExit` in the task: that is not the task's own."""
    env = {"FOLDER": str(tmp_path)}
    with worker(APP, tmp_path, broker.url, "--concurrency", "1", *QUEUES, **env) as other:
        send("offloading", broker.url, "tasks.celery.send_task('off.once', task_id='once', kwargs={})", **env)
        eventually(lambda: lines(tmp_path, "once") == ["started"], seconds=40)
        send("offloading", broker.url, "tasks.celery.control.revoke('once', terminate=True)", **env)
        eventually(lambda: outcomes(other, "celery") == {("once", "cancelled"): 1})
        assert buried(other) == {}
    assert lines(tmp_path, "once") == ["started"] and "task.failed" not in other.log.read_text()


def test_parameters_may_have_any_name(broker: Server, tmp_path: Path) -> None:
    """Also one that Celery uses itself, and also on a retry."""
    with both(tmp_path, broker.url) as (server, other, folder):
        get(server, "named")
        eventually(lambda: outcomes(other, "celery") == {("named", "succeeded"): 1}, seconds=40)
    assert lines(folder, "named") == ["1 a {'__type__': 'datetime'} t"] * 2


def test_dead_letters_are_looked_at_and_replayed(broker: Server, tmp_path: Path) -> None:
    """By the code of the docs: a look changes nothing, a replay is a new run, and has its task's timeout again."""
    (recipe,) = (code for code in blocks(ROOT / "docs" / "celery.md") if "def dead_letters" in code)
    env = {"FOLDER": str(tmp_path)}

    def letters(arguments: str = "") -> list[list[str]]:
        code = f"from celery import Celery\n{recipe}\ndead_letters(tasks.celery{arguments})"
        return sorted(line.split() for line in send("offloading", broker.url, code, **env).splitlines())

    with worker(APP, tmp_path, broker.url, "--concurrency", "1", *QUEUES, **env) as other:
        code = "for id in ('mended', 'slow', 'killed'): tasks.celery.send_task(f'off.{id}', task_id=id, kwargs={})"
        send("offloading", broker.url, code, **env)
        first = {("mended", "failed"): 1, ("slow", "timed_out"): 1, ("killed", "interrupted"): 1}
        eventually(lambda: buried(other) == first, seconds=40)
        found = [
            ["killed", "off.killed", "billiard.exceptions.WorkerLostError"],
            ["mended", "off.mended", "LookupError"],
            ["slow", "off.slow", "aftertask.TaskTimeout"],
        ]
        assert letters() == letters() == found
        (tmp_path / "go on").touch()
        assert letters(", again=lambda task, error: task != 'off.killed'") == found
        eventually(lambda: ("mended", "succeeded") in outcomes(other, "celery"))
        eventually(lambda: buried(other) == {**first, ("slow", "timed_out"): 2})  # the look did not make it redelivered
        assert value(other, "tasks_scheduled_total", engine="celery") == 5
        assert sum(values(other, "hazards_total", kind="redelivered")) == 0
        assert letters() == [found[0], found[2]]
    assert len(lines(tmp_path, "mended")) == 1 and lines(tmp_path, "slow") == ["cleaned up"] * 2
    assert len(dead_letters(broker)) == 2


def test_a_process_forked_while_a_letter_is_sent_sends_its_own(broker: Server, tmp_path: Path) -> None:
    """The lock of Celery's that the sending thread holds is not copied: the new process would wait for it for ever."""
    env = {"FOLDER": str(tmp_path), "SLOW": "1"}
    with worker(APP, tmp_path, broker.url, "--concurrency", "1", *QUEUES, **env) as other:
        code = "for id in ('killed', 'mended'): tasks.celery.send_task(f'off.{id}', task_id=id, kwargs={})"
        send("offloading", broker.url, code, **env)
        eventually(lambda: buried(other) == {("killed", "interrupted"): 1, ("mended", "failed"): 1})
    assert len(dead_letters(broker)) == 2


def test_a_letter_that_the_broker_refuses_is_named_and_sent_again(broker: Server, tmp_path: Path) -> None:
    """By the process of the pool, too: the queue is of another kind at first."""
    env = {"FOLDER": str(tmp_path)}
    with (
        Connection(broker.url) as connection,
        worker(APP, tmp_path, broker.url, "--concurrency", "1", *QUEUES, **env) as other,
    ):
        channel: Any = connection.default_channel
        if broker.url.startswith("redis"):
            channel.client.set("aftertask.dead", "no list")
        else:
            channel.queue_delete("aftertask.dead")
            channel.queue_declare("aftertask.dead", durable=False, auto_delete=False)
        send(
            "offloading", broker.url, "tasks.celery.send_task('off.broken', task_id='b', kwargs={'secret': 'x'})", **env
        )
        failed = r"signal.failed .* error_type=\S+ .*task=off.broken run_id=b reason=failed queue=aftertask.dead"
        eventually(lambda: re.search(failed, other.log.read_text()), seconds=40)
        assert outcomes(other, "celery") == {("broken", "failed"): 1} and buried(other) == {}
        if broker.url.startswith("redis"):
            channel.client.delete("aftertask.dead")
        else:
            channel.queue_delete("aftertask.dead")
        eventually(lambda: buried(other) == {("broken", "failed"): 1})
    assert dead_letters(broker) == [("off.broken", "LookupError")]


def test_a_cold_shutdown_accounts_for_the_runs_that_it_ends(broker: Server, tmp_path: Path) -> None:
    """Celery calls it a retry and sends none: a run that is not idempotent is cancelled, and a dead letter."""
    env = {"FOLDER": str(tmp_path)}
    with worker(APP, tmp_path, broker.url, "--concurrency", "2", *QUEUES, name="first", **env) as first:
        code = "for id in ('once', 'again'): tasks.celery.send_task(f'off.{id}', task_id=id, kwargs={})"
        send("offloading", broker.url, code, **env)
        eventually(lambda: lines(tmp_path, "once") == lines(tmp_path, "again") == ["started"], seconds=40)
        first.child.send_signal(signal.SIGQUIT)
        first.child.wait(40)
    log = first.log.read_text()
    assert "task.cancelled off.once: cancelled" in log and "signal.failed" not in log
    assert re.search(r"task.dead_lettered task=off.once run_id=once reason=interrupted", log)
    (tmp_path / "go on").touch()
    with worker(APP, tmp_path, broker.url, *QUEUES, name="second", **env) as second:
        eventually(lambda: lines(tmp_path, "again") == ["started", "started", "ended"], seconds=40)
        eventually(lambda: outcomes(second, "celery") == {("again", "succeeded"): 1})
    assert lines(tmp_path, "once") == ["started"]
    assert dead_letters(broker) == [("off.once", "celery.exceptions.WorkerShutdown")]


def test_a_run_beyond_its_hard_time_limit_is_named_with_its_request(broker: Server, tmp_path: Path) -> None:
    """The process that executed it is killed: the main one still has the message."""
    with both(tmp_path, broker.url) as (server, other, _):
        get(server, "run/stubborn")
        eventually(lambda: buried(other) == {("stubborn", "timed_out"): 1}, seconds=60)
        assert re.search(r"task.timed_out off.stubborn: .*\(GET /run/\{name\}\)", other.log.read_text())
    assert dead_letters(broker) == [("off.stubborn", "billiard.exceptions.TimeLimitExceeded")]


def test_a_message_for_a_task_that_the_worker_does_not_know_becomes_a_dead_letter(
    broker: Server, tmp_path: Path
) -> None:
    """Celery would drop it with a log line: a web process that is newer than its workers loses nothing."""
    code = """
from aftertask.celery.header import NAME
header = {NAME: {"v": 1, "signature": "01234567", "http_route": "/new"}}
for name, headers in (("off.new", header), ("foreign", {})):
    tasks.celery.send_task(name, kwargs={"secret": "s3cr3t"}, task_id=name, headers=headers)
tasks.celery.send_task("off.mail", kwargs={"address": "a", "when": "2026-01-02T00:00:00"}, headers=header)
"""
    env = {"FOLDER": str(tmp_path)}
    with worker(APP, tmp_path, broker.url, "--concurrency", "1", *QUEUES, **env) as other:
        assert values(other, "dead_letters_total", reason="unknown_task") == [0]
        send("offloading", broker.url, code, **env)
        eventually(lambda: buried(other) == {("__none__", "unknown_task"): 1})
        eventually(lambda: ("mail", "succeeded") in outcomes(other, "celery"))
        line = r"task.dead_lettered task=off.new run_id=off.new reason=unknown_task error_type=celery\S+NotRegistered"
        assert re.search(line, other.log.read_text())
        (recipe,) = (code for code in blocks(ROOT / "docs" / "celery.md") if "def dead_letters" in code)
        code = f"from celery import Celery\n{recipe}\ndead_letters(tasks.celery, again=lambda task, error: True)"
        send("offloading", broker.url, code, **env)
        eventually(lambda: buried(other) == {("__none__", "unknown_task"): 2})  # the worker still does not know it
    assert dead_letters(broker) == [("off.new", "celery.exceptions.NotRegistered")]


def test_the_shipped_alert_and_panel_show_the_dead_letters_of_a_worker(broker: Server, tmp_path: Path) -> None:
    """Counted by a process of the pool, from a series at 0: Prometheus sees the first one, and its reason."""
    rules, env = ROOT / "dashboards" / "rules" / "aftertask.rules.yml", {"FOLDER": str(tmp_path)}
    board = BOARDS["aftertask-engine"]
    (panel,) = (panel for panel in panels(board) if panel["title"] == "New dead letters")
    with (
        worker(APP, tmp_path, broker.url, "--concurrency", "1", *QUEUES, **env) as other,
        prometheus(tmp_path, other, every="1s", rules=[rules]) as server,
    ):
        eventually(lambda: instant(server, "aftertask_dead_letters_total"), what="a scrape")
        send("offloading", broker.url, "tasks.celery.send_task('off.broken', kwargs={'secret': 'x'})", **env)
        firing = 'ALERTS{alertname="AftertaskDeadLettersGrowing",alertstate="firing"}'
        (alert,) = eventually(lambda: instant(server, firing), seconds=60)
        assert (alert["metric"]["task"], alert["metric"]["reason"]) == ("off.broken", "failed")
        eventually(lambda: any(sum(series) for series in Grafana(server, board).ask(panel["targets"][0])))
    assert dead_letters(broker) == [("off.broken", "LookupError")]


def test_a_message_delivered_twice_is_counted_and_named(broker: Server, tmp_path: Path) -> None:
    """Without acknowledgement Redis delivers it again, RabbitMQ after the connection has gone: a hazard says so."""
    env = {"FOLDER": str(tmp_path)}
    with worker(APP, tmp_path, broker.url, "--concurrency", "1", *QUEUES, **env) as other:
        send("offloading", broker.url, "tasks.celery.send_task('off.killed_once', kwargs={})", **env)
        eventually(lambda: outcomes(other, "celery") == {("killed_once", "succeeded"): 1}, seconds=40)
        assert value(other, "hazards_total", kind="redelivered") == 1
    assert len(lines(tmp_path, "killed_once")) == 2


def test_settings_that_lose_runs_are_named_when_a_worker_starts(broker: Server, tmp_path: Path) -> None:
    """With the value that was found."""
    with worker(APP, tmp_path, broker.url, "--concurrency", "1", FOLDER=str(tmp_path)) as other:
        log = eventually(lambda: "worker.setting" in other.log.read_text() and other.log.read_text())
    assert "worker.setting worker_prefetch_multiplier is 4: a process reserves messages" in log
    named = "socket_timeout is None" if broker.url.startswith("redis") else "confirm_publish is False"
    assert f"worker.setting broker_transport_options.{named}" in log


# --- the broker fails


@pytest.fixture(params=[redis, rabbitmq])
def kind(request: pytest.FixtureRequest) -> Any:
    """What starts a broker."""
    return request.param


@pytest.fixture
def own(kind: Any, tmp_path: Path) -> Iterator[Server]:
    """A broker that a test may stop."""
    with kind(tmp_path) as server:
        yield server


def test_a_stopped_broker_holds_no_request_and_loses_no_run(kind: Any, own: Server, tmp_path: Path) -> None:
    """Runs that cannot be handed over run here; after its start they are handed over again, on new connections."""
    with web(tmp_path, own.url, ON_UNAVAILABLE="local") as server:
        get(server, "run/bulk")
        eventually(lambda: outcomes(server, "local") == {("bulk", "offloaded"): 1})
        own.child.send_signal(signal.SIGTERM)
        own.child.wait(60)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: get(server, "run/bulk"), range(40)))
        eventually(lambda: outcomes(server, "local") == {("bulk", "offloaded"): 1, ("bulk", "succeeded"): 40})
        assert value(server, "offload_total", status="fallback") == 40
        with kind(tmp_path, port_of(own)):
            get(server, "run/bulk")
            eventually(lambda: outcomes(server, "local")["bulk", "offloaded"] == 2)
            with worker(APP, tmp_path, own.url, *QUEUES, FOLDER=str(tmp_path)) as other:
                eventually(lambda: outcomes(other, "celery") == {("bulk", "succeeded"): 2}, seconds=40)
    assert len(lines(tmp_path, "bulk")) == 42


def test_a_hanging_broker_holds_no_request_beyond_the_deadline(own: Server, tmp_path: Path) -> None:
    """Under SIGSTOP each response comes at once, and each run has failed soon after the deadline; others start."""
    with web(tmp_path, own.url, DEADLINE=str(DEADLINE)) as server:
        get(server, "run/bulk")
        eventually(lambda: outcomes(server, "local") == {("bulk", "offloaded"): 1})
        with hanging(own):
            with ThreadPoolExecutor(8) as pool:
                seconds = sorted(pool.map(lambda _: get(server, "run/bulk"), range(64)))
            # httpx2 returns with the body, before the tasks have run; a kept-alive connection would wait for them.
            eventually(lambda: outcomes(server, "local").get(("bulk", "failed")) == 64, seconds=40)
        assert seconds[-1] < DEADLINE, seconds
        errors = [json.loads(line) for line in server.log.read_text().splitlines() if '"offload.failed"' in line]
        assert len(errors) == 64 and max(error["duration_s"] for error in errors) < 3 * DEADLINE
        assert eventually(lambda: listens(port_of(own)))
        get(server, "run/bulk")
        eventually(lambda: outcomes(server, "local")["bulk", "offloaded"] == 2)


def test_a_hanging_broker_holds_no_new_process_and_loses_no_letter(tmp_path: Path) -> None:
    """The main process cannot send the letter of a killed one, names it, and sends it once the broker answers."""
    env = {"FOLDER": str(tmp_path)}
    # On Redis Celery's main process waits by itself: it sends its heartbeat there.
    with (
        rabbitmq(tmp_path) as broker,
        worker(APP, tmp_path, broker.url, "--concurrency", "1", *QUEUES, **env) as other,
    ):
        code = "for id in ('doomed', 'mended'): tasks.celery.send_task(f'off.{id}', task_id=id, kwargs={})"
        send("offloading", broker.url, code, **env)
        eventually(lambda: lines(tmp_path, "doomed") == ["started"] and "mended" in other.log.read_text(), seconds=40)
        with hanging(broker):
            (tmp_path / "go on").touch()
            eventually(lambda: lines(tmp_path, "mended"), seconds=40, what="a new process executing what is received")
            failed = "signal.failed .* on=dead letter .* task=off.doomed run_id=doomed reason=interrupted"
            eventually(lambda: re.search(failed, other.log.read_text()))
            assert buried(other) == {}
        eventually(lambda: buried(other) == {("doomed", "interrupted"): 1}, seconds=40)
        eventually(lambda: outcomes(other, "celery") == {("doomed", "lost"): 1, ("mended", "succeeded"): 1})
        assert dead_letters(broker) == [("off.doomed", "billiard.exceptions.WorkerLostError")]


def test_the_example_shows_both_sides_and_one_trace() -> None:
    """`make demo-celery` ends by itself: every run that the web app handed over has ended on a worker."""
    program("redis-server")
    command = [sys.executable, str(EXAMPLE / "run.py"), "--seconds", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    handed_over = re.findall(r"invoices.render +engine=local +offloaded +(\d+)", done.stdout)
    on_workers = re.findall(r"invoices.render +engine=celery +\w+ +(\d+)", done.stdout)
    assert sum(map(int, on_workers)) == int(handed_over[0]) > 0
    assert re.search(r"web +offload.sent +invoices.render", done.stdout)
    assert re.search(r"worker-\d +task.succeeded +invoices.render", done.stdout)
