"""The main job, on real input: the shop under uvicorn, scraped by Prometheus, its spans received."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2
import pytest

from live.servers import Server, Spans, eventually, prometheus, uvicorn

pytestmark = [pytest.mark.long, pytest.mark.timeout(120)]

SHOP = Path(__file__).parents[2] / "examples" / "shop"

#: Requests, and how each task ends for one of them.
REQUESTS: list[tuple[int, str, str, dict[str, dict[str, int]]]] = [
    (
        *(5, "POST", "/orders/1"),
        {name: {"succeeded": 1} for name in ("stock.reserve", "mail.receipt", "orders.charge_card", "app.notify")},
    ),
    (
        *(3, "POST", "/orders/2?fault=declined"),
        {
            "stock.reserve": {"succeeded": 1},
            "mail.receipt": {"succeeded": 1},
            "orders.charge_card": {"failed": 1},
            "app.notify": {"skipped sibling_failed": 1},
        },
    ),
    (
        *(2, "POST", "/orders/3?fault=mail"),
        {
            "stock.reserve": {"succeeded": 1},
            "mail.receipt": {"failed": 1},
            "orders.charge_card": {"skipped sibling_failed": 1},
            "app.notify": {"skipped sibling_failed": 1},
        },
    ),
    (
        *(4, "POST", "/orders/4?fault=sold_out"),
        {
            name: {"dropped http_exception": 1}
            for name in ("stock.reserve", "mail.receipt", "orders.charge_card", "app.notify")
        },
    ),
    (
        *(1, "POST", "/orders/5?fault=bug"),
        {
            name: {"dropped handler_error": 1}
            for name in ("stock.reserve", "mail.receipt", "orders.charge_card", "app.notify")
        },
    ),
    (
        *(2, "POST", "/orders/6?fault=cancelled"),
        {
            "stock.reserve": {"succeeded": 1},
            "mail.receipt": {"succeeded": 1},
            "orders.charge_card": {"cancelled": 1},
            "app.notify": {"dropped request_cancelled": 1},
        },
    ),
    (2, "GET", "/search?limit=2", {"app.audit": {"succeeded": 1}}),
    (3, "GET", "/search?limit=many", {"app.audit": {"dropped validation": 1}}),
    (2, "POST", "/images/1?sizes=3", {"media.thumbnail": {"succeeded": 3}}),
    (2, "POST", "/reports?seconds=0.6", {"reports.build": {"succeeded": 1}}),
    (2, "GET", "/export", {"app.audit": {"succeeded": 1}}),
    (2, "DELETE", "/orders/6", {"app.audit": {"succeeded": 1}, "app.notify": {"dropped own_background": 1}}),
    (1, "POST", "/admin/reindex", {"app.audit": {"succeeded": 1}}),
]


def expected() -> Counter[tuple[str, str]]:
    """How many runs of each task end how."""
    counts: Counter[tuple[str, str]] = Counter()
    for times, _, _, tasks in REQUESTS:
        for task, ends in tasks.items():
            for end, count in ends.items():
                counts[task, end] += times * count
    return counts


def ask(server: Server, query: str) -> dict[tuple[str, ...], float]:
    """An instant query: the values, by the labels that are left, in the order of their names."""
    answer = httpx2.get(f"{server.url}/api/v1/query", params={"query": query}).json()
    assert answer["status"] == "success", answer
    return {
        tuple(value for _, value in sorted(result["metric"].items())): float(result["value"][1])
        for result in answer["data"]["result"]
    }


def log_lines(server: Server) -> list[dict[str, Any]]:
    """The lines of runs on the stderr of the shop."""
    return [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith('{"event": "task.')]


def test_prometheus_knows_what_became_of_every_task(tmp_path: Path) -> None:
    """Each outcome is counted as the traffic implies; times are plausible; the exemplars' traces were received."""
    env = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "", "PYTHONUNBUFFERED": "1"}
    with Spans() as spans:
        env |= {
            "OTEL_EXPORTER_OTLP_ENDPOINT": spans.url,
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{spans.url}/v1/traces",
        }
        with (
            uvicorn("app:app", SHOP, tmp_path / "shop.log", **env) as shop,
            prometheus(tmp_path, shop.url) as metrics,
        ):
            eventually(lambda: ask(metrics, "up") and sum(ask(metrics, "up").values()) == 1, what="a scrape")
            for times, method, path, _ in REQUESTS:
                for _ in range(times):
                    # A connection each: uvicorn closes the one on which a task has failed.
                    httpx2.request(method, shop.url + path)
            want = expected()

            def counted() -> bool:
                total = ask(metrics, "sum(aftertask_tasks_finished_total)")
                return bool(total) and total[()] == want.total()

            eventually(counted, seconds=30, what="every run finished, in Prometheus")
            check_counts(metrics, want)
            check_times(metrics)
            check_traces(metrics, spans)
            check_logs(shop, spans, want)


def check_counts(metrics: Server, want: Counter[tuple[str, str]]) -> None:
    """Outcomes and reasons, the bad ones, and the accounting rule."""
    finished = ask(metrics, "sum by (task, outcome) (aftertask_tasks_finished_total) > 0")
    outcomes: Counter[tuple[str, str]] = Counter()
    for (task, end), count in want.items():
        outcomes[end.split()[0], task] += count
    assert finished == {labels: float(count) for labels, count in outcomes.items()}

    not_run = ask(metrics, "sum by (task, outcome, reason) (aftertask_tasks_not_run_total) > 0")
    assert not_run == {(*end.split(), task): float(count) for (task, end), count in want.items() if " " in end}

    bad = {task for (task, end) in want if end in ("failed", "skipped sibling_failed", "dropped handler_error")}
    told_bad = ask(metrics, "sum by (task) (aftertask_tasks_bad_total)")
    # A declined card is expected: of that task only the skipped and dropped runs are bad.
    assert told_bad["orders.charge_card",] == 2 + 1
    assert {task for (task,), count in told_bad.items() if count} <= bad | {"app.notify"}

    drift = "sum(aftertask_tasks_scheduled_total) - sum(aftertask_tasks_finished_total) - sum(aftertask_tasks_inflight)"
    assert ask(metrics, drift) == {(): 0.0}
    assert ask(metrics, "aftertask_hazards_total > 0") == {}  # its faults are no traps


def check_times(metrics: Server) -> None:
    """Durations are those of the tasks; a sibling's run time is in the wait, a stream is not."""
    mean = "sum by (task) (aftertask_{0}_sum) / (sum by (task) (aftertask_{0}_count) > 0)"
    durations = ask(metrics, mean.format("attempt_duration_seconds"))
    # uvloop counts in milliseconds, and may wake a sleeper up to one of them early.
    assert 0.599 <= durations["reports.build",] < 0.9
    assert 0.019 <= durations["orders.charge_card",] < 0.2
    waits = ask(metrics, mean.format("queue_wait_seconds"))
    assert 0 <= waits["reports.build",] < 0.1
    assert 0.01 <= waits["orders.charge_card",] < 0.3  # behind the reservation and the receipt
    assert 0 <= waits["app.audit",] < 0.1  # the export streams for 50 ms first
    whole = ask(metrics, mean.format("end_to_end_seconds"))
    assert whole["reports.build",] >= durations["reports.build",]


def check_traces(metrics: Server, spans: Spans) -> None:
    """Every exemplar's trace was exported."""

    def exemplars() -> set[str]:
        answer = httpx2.get(
            f"{metrics.url}/api/v1/query_exemplars",
            params={"query": "aftertask_attempt_duration_seconds_bucket", "start": "0", "end": "4000000000"},
        ).json()
        return {each["labels"]["trace_id"] for series in answer["data"] for each in series["exemplars"]}

    found = eventually(exemplars, what="exemplars in Prometheus")
    eventually(lambda: found <= spans.trace_ids(), what="the spans of every exemplar")
    names = Counter(span.name for span in spans.spans)
    assert names["background_task orders.charge_card"] == 10
    assert not [name for name in names if name.startswith("fastapi.background_task")]


def check_logs(shop: Server, spans: Spans, want: Counter[tuple[str, str]]) -> None:
    """One line for each end, with the ids of its span."""
    lines = log_lines(shop)
    logged = Counter((line["task"], line["event"]) for line in lines)
    for (task, end), count in want.items():
        assert logged[task, f"task.{end.split()[0]}"] >= count
    assert len(lines) == want.total()
    of_spans = {span.span_id.hex() for span in spans.spans}
    assert {line["span_id"] for line in lines if line["event"] == "task.succeeded"} <= of_spans
    assert all("hunter2" not in json.dumps(line) for line in lines)
