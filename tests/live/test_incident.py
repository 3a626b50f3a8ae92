"""A staged incident, read as a person on call reads the dashboards: what is wrong, which task, since when, over."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from aftertask.cli._rules import BURNS, Limits, Options, duration, groups, to_yaml
from live.grafana import BOARDS, ROOT, Grafana, colour, panels, properties
from live.monitoring import People, alertmanager, instant, prometheus
from live.servers import Server, eventually, uvicorn

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

APPS = Path(__file__).parent / "apps"

#: Every window of the rules and of the first row is a fortieth, so that minutes are enough.
SCALE = 1 / 40
#: Scaled, a run that waits or runs for a minute is too old.
LIMITS = Limits(queued_seconds=60 / SCALE, stuck_seconds=60 / SCALE)
#: Alerts that may come from a busy machine, and the windows of the error budget that look back for hours by design.
LEFT_OUT = ("AftertaskEventLoopLag", "AftertaskEventLoopBlockedByTask")
QUICK = {long for long, *_ in BURNS[:2]}


class Screen:
    """The overview and the internals over what happened in the last minutes."""

    def __init__(self, server: Server) -> None:
        self.overview = Grafana(server, BOARDS["aftertask-overview"], shown=280)
        self.internals = Grafana(server, BOARDS["aftertask-engine"], shown=280)

    def first_row(self) -> dict[str, str]:
        """The colour of each tile, and of each value of one that has several."""
        tiles = [each for each in panels(BOARDS["aftertask-overview"]) if each["gridPos"]["y"] == 1]
        shown = {}
        for tile in tiles:
            usual = tile["fieldConfig"]["defaults"]["thresholds"]
            for target in tile["targets"]:
                query = target["expr"].replace("[5m]", f"[{duration(300 * SCALE)}]")
                (value,) = self.overview.values_of(query).values()
                legend = target["legendFormat"]
                name = tile["title"] if legend == "__auto" else f"{tile['title']}: {legend}"
                shown[name] = colour(properties(tile, "thresholds").get(legend, usual)["steps"], value)
        return shown

    def table(self, title: str, board: str = "aftertask-overview") -> dict[str, dict[tuple[str, ...], float]]:
        """A table's columns of values, by their headings."""
        panel = next(each for each in panels(BOARDS[board]) if each["title"] == title)
        grafana = self.overview if board == "aftertask-overview" else self.internals
        names = panel["transformations"][1]["options"]["renameByName"]
        several = len(panel["targets"]) > 1
        fields = {f"Value #{target['refId']}" if several else "Value": target["expr"] for target in panel["targets"]}
        return {names[key]: grafana.values_of(query) for key, query in fields.items() if key in names}

    def bad_per_minute(self) -> dict[str, list[tuple[float, float]]]:
        """The bars of *Bad runs per minute*: times and values, by task."""
        panel = next(each for each in panels(BOARDS["aftertask-overview"]) if each["title"] == "Bad runs per minute")
        return self.overview.bars(panel["targets"][0])


@contextlib.contextmanager
def again_and_again(every: float, act: Callable[[], object]) -> Iterator[None]:
    """Do this all the time, beside the test."""
    over = threading.Event()

    def work() -> None:
        while not over.wait(every):
            with contextlib.suppress(httpx2.HTTPError):
                act()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def customers(shop: Server) -> Iterator[None]:
    """A good day's customers."""
    traffic = [sys.executable, str(ROOT / "examples" / "shop" / "traffic.py"), "--url", shop.url, "--rate", "10"]
    running = subprocess.Popen([*traffic, "--seconds", "300", "--incident", "1000"], stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        running.kill()
        running.wait()


def rules(folder: Path) -> list[Path]:
    """All rule files, with shorter windows."""
    options = Options(scale=SCALE, limits=LIMITS)
    paths = [folder / "default.rules.yml", folder / "more.rules.yml"]
    for path, default in zip(paths, (True, False), strict=True):
        written: dict[str, Any] = groups(options, default=default)
        for group in written["groups"]:
            group["rules"] = [
                rule
                for rule in group["rules"]
                if rule.get("alert") not in LEFT_OUT and rule.get("labels", {}).get("window", "1h") in QUICK
            ]
        path.write_text(to_yaml(written))
    return paths


def test_the_dashboards_say_what_is_wrong_and_when_it_is_over(tmp_path: Path) -> None:
    """Green on a good day; red with the culprit on top under an incident; green again after it; red for a dead app."""
    with contextlib.ExitStack() as stack:
        shop = stack.enter_context(uvicorn("monitored:app", APPS, tmp_path / "shop.log"))
        manager = stack.enter_context(alertmanager(tmp_path, stack.enter_context(People())))
        server = stack.enter_context(prometheus(tmp_path, shop, every="1s", rules=rules(tmp_path), alerts_to=manager))
        stack.enter_context(customers(shop))
        eventually(lambda: instant(server, "count_over_time(aftertask_build_info[5m]) > 10"), what="scrapes")
        screen = Screen(server)

        def fault(name: str) -> None:
            httpx2.post(f"{shop.url}/faults/{name}", timeout=30)

        def green() -> bool:
            row = screen.first_row()
            assert set(row.values()) == {"green"}, row
            return True

        eventually(green, seconds=60, what="a green first row on a good day")
        quiet_until = time.time()

        def failing() -> None:
            for name in ("fail", "fail", "fail", "retry"):
                fault(name)

        # A dependency is down, a limit and the threads are full, the loop is blocked, a run waits behind a stuck one.
        began = time.time()
        for name in ("hold", "behind", "limited", "limited", "hang", "thread", "thread", "thread", "block", "block"):
            fault(name)
        with again_and_again(0.25, failing):

            def red() -> bool:
                row = screen.first_row()
                wanted = {"Instances up": "green", "Success rate": "red", "Bad runs/min": "red"}
                wanted |= {"Alerts firing: critical": "red", "Alerts firing: warning": "orange"}
                assert wanted.items() <= row.items() and row["Oldest waiting"] == "orange", row
                return True

            eventually(red, seconds=120 - (time.time() - began), what="a first row that says what is wrong")
            read_tables(screen)

        httpx2.delete(f"{shop.url}/faults", timeout=30)
        cured = time.time()
        eventually(green, seconds=120, what="a green first row after the cure")
        read_bars(screen, quiet_until, began, cured)

        shop.child.kill()

        def down() -> bool:
            row = screen.first_row()
            alerts = [dict(each["metric"]) for each in instant(server, 'ALERTS{alertstate="firing"}')]
            assert row["Instances up"] == row["Alerts firing: critical"] == "red", row
            assert "AftertaskTargetDown" in {alert["alertname"] for alert in alerts}, alerts
            return True

        eventually(down, seconds=60, what="a red first row for a dead app")


def read_tables(screen: Screen) -> None:
    """The culprit is on top; what is stuck, what blocks the loop and what channel is dead are seen."""
    tasks = screen.table("Tasks")
    worst = max(tasks["Bad runs"], key=tasks["Bad runs"].__getitem__)
    assert worst == ("shop", "faults.fail"), tasks["Bad runs"]
    table = next(each for each in panels(BOARDS["aftertask-overview"]) if each["title"] == "Tasks")
    shares = next(each for each in table["fieldConfig"]["overrides"] if each["matcher"]["options"] == "Bad share")
    steps = next(each["value"]["steps"] for each in shares["properties"] if each["id"] == "thresholds")
    assert colour(steps, tasks["Bad share"][worst]) == "red"
    assert tasks["Running for"]["shop", "faults.hold"] > 30
    assert tasks["Blocked loop"]["shop", "faults.block"] > 0
    assert tasks["Retries"]["shop", "faults.retry"] > 0.5

    alerts = screen.table("Alerts")["Since"]
    about = {labels for labels in alerts if "AftertaskTaskFailing" in labels}
    assert any("faults.fail" in labels and "warning" in labels for labels in about), alerts

    channels = screen.table("Alert channels", "aftertask-engine")
    dead = {labels for labels, failed in channels["Failed"].items() if failed > 0.5}
    assert len(dead) == 1 and not dead & set(channels["Last delivered"]), channels
    assert set(channels["Last delivered"]) == {labels for labels, sent in channels["Delivered"].items() if sent > 0.5}


def read_bars(screen: Screen, quiet_until: float, began: float, cured: float) -> None:
    """A step when it began, nothing any more when it was over, and marks of moments that cover no graph."""
    bars = screen.bad_per_minute()
    worst = [(at, value) for at, value in bars["faults.fail"] if value > 60]
    assert not [at for at, value in bars["faults.fail"] if value and at < quiet_until]
    assert bars["faults.fail"][-1][1] == 0, "the legend's last value is that of now"
    assert began <= worst[0][0] <= began + 15, (began, worst[:3])
    assert cured - 15 <= worst[-1][0] <= cured + 15, (cured, worst[-3:])
    marks = {mark["name"]: mark["expr"] for mark in BOARDS["aftertask-overview"]["annotations"]["list"]}
    started, fired = (screen.overview.ask({"expr": marks[name], "instant": False}) for name in marks)
    assert sum(map(len, started)) <= 2 and fired and all(len(moments) <= 5 for moments in fired), (started, fired)
