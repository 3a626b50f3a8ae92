"""Every query of every panel, asked of a real Prometheus about a shop under load with faults."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from live.grafana import BOARDS, Grafana, panels
from live.monitoring import api, instant, prometheus
from live.servers import Server, Spans, eventually, uvicorn

pytestmark = [pytest.mark.long, pytest.mark.timeout(180)]

ROOT = Path(__file__).parents[2]
APPS = Path(__file__).parent / "apps"

#: What is 0 in a run in which nothing of the kind happens, and says so by a series; everything else has to be above it.
ZERO = {"Accounting drift", "Alerts firing"}
#: Their series exist at 0 until something happens that this traffic does not do.
MAY_BE_ZERO = {"Hazards", "Waited longer than", "Oldest waiting", "Alert channels", "Retries per attempt"}
#: Without a series, and with words instead, as long as nothing of the kind happens.
EMPTY = {
    *("Errors inside aftertask", "Label overflow", "Events left out", "Alerts", "Event loop blocked by"),
    *("Alerts awaiting delivery", "Calls waiting for a thread", "Hazards", "Deduplicated alerts"),
    *("Runs of dead workers", "Errors of the journal"),
}


def check(grafana: Grafana, panel: dict[str, Any], spans: Spans) -> list[str]:
    """What is wrong with a panel's answers."""
    wrong = []
    nonzero = False
    for target in panel["targets"]:
        series = [values for values in grafana.ask(target) if values]
        if not series and panel["title"] not in EMPTY:
            wrong.append(f"no data for {target['expr']}")
        nonzero |= any(value != 0 for values in series for value in values)
        if panel["title"] in ZERO and any(value != 0 for values in series for value in values):
            wrong.append(f"not 0: {target['expr']}: {series}")
        if target["exemplar"] and panel["type"] in ("timeseries", "heatmap") and carries(target):
            traces = grafana.exemplars(target)
            if not traces:
                wrong.append(f"no exemplars for {target['expr']}")
            elif not traces & spans.trace_ids():
                wrong.append(f"the exemplars' traces were never received: {target['expr']}")
    if not nonzero and panel["title"] not in ZERO | MAY_BE_ZERO | EMPTY:
        wrong.append("nothing but 0")
    return wrong


def carries(target: dict[str, Any]) -> bool:
    """Whether a target's metric has exemplars: three histograms and the errors."""
    names = "queue_wait_seconds|attempt_duration_seconds|end_to_end_seconds|attempt_errors"
    return re.search(rf"aftertask_({names})_(bucket|total)", target["expr"]) is not None


@pytest.fixture
def load(tmp_path: Path) -> Iterator[tuple[Server, Spans]]:
    """A Prometheus that watches a shop with customers, faults and everything that has a limit in use."""
    with Spans() as spans:
        env = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": spans.url,
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{spans.url}/v1/traces",
            "PYTHONUNBUFFERED": "1",
            "JOURNAL": str(tmp_path / "tasks.db"),
        }
        with (
            uvicorn("monitored:app", APPS, tmp_path / "shop.log", **env) as shop,
            prometheus(tmp_path, shop, every="1s") as server,
        ):
            # What is counted before the first scrape is no increase.
            eventually(lambda: instant(server, "aftertask_build_info"), what="a scrape")
            for name in ("hold", "behind", "hang", "limited", "limited", "thread", "thread", "thread", "kept"):
                fire_and_forget(shop, name)
            traffic = [sys.executable, str(ROOT / "examples" / "shop" / "traffic.py"), "--url", shop.url]
            customers = subprocess.Popen(
                [*traffic, "--faults", "all", "--seconds", "60", "--rate", "30"], stdout=subprocess.DEVNULL
            )
            try:

                def all_there() -> bool:
                    for name in ("retry", "fail", "letter", "remote"):
                        fire_and_forget(shop, name)
                    done = instant(server, "sum by (outcome) (aftertask_tasks_finished_total) > 3")
                    outcomes = {each["metric"]["outcome"] for each in done}
                    return outcomes >= {"succeeded", "failed", "skipped", "dropped", "cancelled"} and bool(
                        instant(server, "count_over_time(aftertask_build_info[5m]) > 12")
                    )

                eventually(all_there, seconds=60, what="every outcome, seen for some time")
                yield server, spans
            finally:
                customers.kill()
                customers.wait()
                httpx2.delete(f"{shop.url}/faults")


def fire_and_forget(shop: Server, name: str) -> None:
    """Ask for a fault. The answer comes before its task ends; the connection is closed at once."""
    httpx2.post(f"{shop.url}/faults/{name}", timeout=5)


def test_every_panel_shows_what_happens(load: tuple[Server, Spans]) -> None:
    """Data of the right shape for every query, the stated zeros at zero, exemplars whose traces arrived."""
    server, spans = load
    wrong = {}
    for name, board in BOARDS.items():
        grafana = Grafana(server, board)
        for panel in panels(board):
            if panel["datasource"]["type"] == "prometheus":
                eventually_right(lambda: check(grafana, panel, spans), wrong, f"{name}: {panel['title']}")  # noqa: B023
        for mark in board["annotations"]["list"]:
            api(server, "query", query=grafana.filled(mark["expr"]))
    assert not wrong, json.dumps(wrong, indent=1)

    one = Grafana(server, BOARDS["aftertask-task"], task="mail.receipt")
    for panel in panels(BOARDS["aftertask-task"]):
        if panel["title"] in (
            "Runs by outcome",
            "Errors by type",
            "Attempt duration distribution",
            "Failure rate",
        ):
            assert not check(one, panel, spans), panel["title"]
    overview = BOARDS["aftertask-overview"]
    started = next(mark["expr"] for mark in overview["annotations"]["list"] if mark["name"] == "Process starts")
    grafana = Grafana(server, overview, shown=900)  # the panels above were waited for
    marked = [value for values in grafana.ask({"expr": started, "instant": False}) for value in values]
    assert 1 <= len(marked) <= 2, f"the start is marked once, not as a region: {marked}"


def eventually_right(look: Callable[[], list[str]], wrong: dict[str, list[str]], name: str) -> None:
    """Look again for a while: a scrape and a batch of spans may be on their way."""
    try:
        eventually(lambda: not look(), seconds=6, what=name)
    except AssertionError:
        wrong[name] = look()
