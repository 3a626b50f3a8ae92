"""Spans that cannot be delivered: a collector that is down, hangs or refuses; a sampler that drops; no provider."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from live.servers import Server, Spans, eventually, free_port, uvicorn

pytestmark = [pytest.mark.long, pytest.mark.timeout(90)]

HERE = Path(__file__).parent
SHOP = HERE.parents[1] / "examples" / "shop"
ORDERS = 20
#: An order's tasks: reserve, receipt, charge, notify.
TASKS = 4


@contextlib.contextmanager
def collector(kind: str) -> Iterator[tuple[str, list[str]]]:
    """The address of a collector that does not do its job, and the paths it was asked."""
    asked: list[str] = []
    if kind == "refuses connections":
        yield f"http://127.0.0.1:{free_port()}", asked
        return
    let_go = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            self.rfile.read(int(self.headers["content-length"]))
            if kind == "hangs":
                let_go.wait(60)
            with contextlib.suppress(OSError):  # the client may have gone
                self.send_response(503)
                self.send_header("content-length", "0")
                self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        let_go.set()
        server.shutdown()
        server.server_close()
        thread.join()


def to(url: str) -> dict[str, str]:
    """The variables that send spans there, and log every run."""
    return {
        "OTEL_EXPORTER_OTLP_ENDPOINT": url,
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{url}/v1/traces",
        "OTEL_EXPORTER_OTLP_TIMEOUT": "1",
        # By default lines of successes are left out above a rate; here each one is looked for.
        "AFTERTASK_SUCCESS_LOG_RATE": "none",
    }


def order(server: Server, count: int) -> None:
    """So many orders, each answered at once."""
    with httpx2.Client(base_url=server.url, timeout=5) as client:
        for number in range(count):
            assert client.post(f"/orders/{number}").status_code == 200


def value(server: Server, name: str, **labels: str) -> float:
    """The sum of all samples with these labels."""
    families = text_string_to_metric_families(httpx2.get(f"{server.url}/metrics").text)
    return sum(
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == f"aftertask_{name}" and labels.items() <= sample.labels.items()
    )


def all_succeeded(server: Server, count: int) -> None:
    """Every task of these orders ran, and was counted."""
    eventually(
        lambda: value(server, "tasks_finished_total", outcome="succeeded") == count * TASKS, what="all tasks done"
    )
    assert value(server, "tasks_scheduled_total") == count * TASKS
    assert value(server, "tasks_inflight") == 0
    assert value(server, "self_errors_total") == 0


def lines(server: Server) -> list[dict[str, Any]]:
    """The log lines of runs."""
    return [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith('{"event": "task.')]


def exemplars(server: Server) -> bool:
    """Whether there are any."""
    return " # {" in httpx2.get(f"{server.url}/metrics", headers={"accept": "application/openmetrics-text"}).text


def stop(server: Server) -> None:
    """Ends it as an operator would; what it still holds of spans is sent, or tried to be."""
    server.child.send_signal(signal.SIGTERM)
    assert server.child.wait(20) in (0, -signal.SIGTERM)


@pytest.mark.parametrize("kind", ["refuses connections", "hangs", "answers 503"])
def test_a_collector_that_does_not_take_spans_harms_no_task(tmp_path: Path, kind: str) -> None:
    """Requests are answered, tasks run without waiting for it, are counted and logged; the server can be stopped."""
    with collector(kind) as (url, asked), uvicorn("app:app", SHOP, tmp_path / "log", **to(url)) as server:
        order(server, ORDERS)
        if kind != "refuses connections":
            eventually(lambda: asked, what="the collector being asked")
            order(server, ORDERS)  # while the exporter waits for it, or before its next try
        done = ORDERS if kind == "refuses connections" else 2 * ORDERS
        all_succeeded(server, done)
        # The wait of a task is that for its siblings, some tens of milliseconds: none waited for an export.
        assert value(server, "queue_wait_seconds_bucket", task="stock.reserve", le="0.5") == done
        assert value(server, "queue_wait_seconds_bucket", task="app.notify", le="1.0") == done
        assert len(lines(server)) == done * TASKS
        stop(server)


def test_a_sampler_that_keeps_all(tmp_path: Path) -> None:
    """Each log line is one span, by run, trace and span id: what the other samplers are measured against."""
    with Spans() as spans, uvicorn("app:app", SHOP, tmp_path / "log", **to(spans.url)) as server:
        order(server, ORDERS)
        all_succeeded(server, ORDERS)
        assert exemplars(server)
        stop(server)
        assert of_tasks(spans) == {(line["run_id"], line["trace_id"], line["span_id"]) for line in lines(server)}
        assert len(of_tasks(spans)) == ORDERS * TASKS


def test_a_sampler_that_drops_all(tmp_path: Path) -> None:
    """No span and no exemplar; counted and logged as ever, with the request's trace id."""
    with (
        Spans() as spans,
        uvicorn("app:app", SHOP, tmp_path / "log", OTEL_TRACES_SAMPLER="always_off", **to(spans.url)) as server,
    ):
        order(server, ORDERS)
        all_succeeded(server, ORDERS)
        assert not exemplars(server)
        stop(server)
        assert spans.spans == []
        logged = lines(server)
        assert len(logged) == ORDERS * TASKS
        assert len({line["trace_id"] for line in logged}) == ORDERS


def test_a_sampler_that_drops_some(tmp_path: Path) -> None:
    """A task is traced where its request is: with all its siblings, or with none."""
    sampler = {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.5"}
    with Spans() as spans, uvicorn("app:app", SHOP, tmp_path / "log", **sampler, **to(spans.url)) as server:
        order(server, 2 * ORDERS)
        all_succeeded(server, 2 * ORDERS)
        stop(server)
        logged = {(line["run_id"], line["trace_id"], line["span_id"]) for line in lines(server)}
        requests = {
            span.trace_id.hex() for span in spans.spans if span.name.startswith("POST") and not span.parent_span_id
        }
        # By chance all or none, once in 2 ** 39 times.
        assert 0 < len(requests) < 2 * ORDERS
        assert of_tasks(spans) == {ids for ids in logged if ids[1] in requests}
        assert len(of_tasks(spans)) == len(requests) * TASKS


def test_without_a_provider_there_are_no_ids(tmp_path: Path) -> None:
    """Nothing that looks like a trace: not in the log, not in the metrics."""
    with uvicorn("workers:app", HERE / "apps", tmp_path / "log") as server:
        assert httpx2.get(f"{server.url}/ok").status_code == 200
        assert httpx2.get(f"{server.url}/broken").status_code == 200
        logged = eventually(lambda: len(found := lines(server)) == 2 and found, what="the log lines")
        assert [line["task"] for line in logged] == ["workers.ok", "workers.broken"]
        assert not [line for line in logged if "trace_id" in line or "span_id" in line]
        eventually(lambda: value(server, "tasks_finished_total") == 2)
        assert not exemplars(server)


def of_tasks(spans: Spans) -> set[tuple[str, str, str]]:
    """Run, trace and span id of each attempt's span."""
    found = set()
    for span in spans.spans:
        if span.name.startswith("background_task "):
            attributes = {each.key: each.value.string_value for each in span.attributes}
            found.add((attributes["aftertask.run.id"], span.trace_id.hex(), span.span_id.hex()))
    return found
