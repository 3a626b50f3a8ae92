"""The alert rules on real servers: silent on a good day, delivered under each fault, resolved after it."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx2
import pytest

from aftertask.cli._rules import Limits, Options, groups, to_yaml
from live.monitoring import People, alertmanager, instant, prometheus
from live.servers import Server, eventually, uvicorn

pytestmark = [pytest.mark.long, pytest.mark.timeout(360)]

ROOT = Path(__file__).parents[2]
APPS = Path(__file__).parent / "apps"


class World:
    """Two instances of a shop, Prometheus, Alertmanager, and who receives the alerts."""

    def __init__(self, busy: Server, calm: Server, server: Server, people: People) -> None:
        self.busy, self.calm, self.server, self.people = busy, calm, server, people

    def fault(self, name: str, instance: Server | None = None) -> None:
        """One run of a fault."""
        httpx2.post(f"{(instance or self.busy).url}/faults/{name}", timeout=5)

    def good(self) -> None:
        """What customers do on a good day."""
        for instance in (self.busy, self.calm):
            for path in ("/orders/1", "/images/1", "/reports?seconds=0.05"):
                assert httpx2.post(instance.url + path, timeout=5).status_code == 200
        httpx2.get(f"{self.busy.url}/search?limit=many")  # a client's mistake is no fault of the app

    def firing(self) -> set[str]:
        """What Prometheus holds for firing now."""
        return {each["metric"]["alertname"] for each in instant(self.server, 'ALERTS{alertstate="firing"}')}


@contextmanager
def world(folder: Path, scale: float, leave_out: str) -> Iterator[World]:
    """The rules, without some, with everything that takes time made shorter by a factor, limits of ages too."""
    options = Options(scale=scale, limits=Limits(stuck_seconds=600))
    rules = [folder / "aftertask.rules.yml", folder / "aftertask-more.rules.yml"]
    for path, default in zip(rules, (True, False), strict=True):
        written = groups(options, default=default)
        for group in written["groups"]:
            group["rules"] = [rule for rule in group["rules"] if not re.search(leave_out, str(rule))]
        path.write_text(to_yaml(written))
    with ExitStack() as stack:
        busy = stack.enter_context(uvicorn("monitored:app", APPS, folder / "busy.log"))
        calm = stack.enter_context(uvicorn("monitored:app", APPS, folder / "calm.log"))
        people = stack.enter_context(People())
        to = stack.enter_context(alertmanager(folder, people))
        server = stack.enter_context(prometheus(folder, busy, calm, every="500ms", rules=rules, alerts_to=to))
        yield World(busy, calm, server, people)


def for_a_while(world: World, seconds: float, faults: tuple[str, ...] = ()) -> None:
    """Customers on a good day, and these faults among them, for that many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        world.good()
        for name in faults:
            if name == "own_background":
                httpx2.delete(f"{world.busy.url}/orders/1")
            else:
                world.fault(name)


#: A machine that is busy with other tests is late itself; promtool proves these.
MACHINE = "alert': 'Aftertask(EventLoop|TargetDown)"
#: Two windows of the error budget look back for minutes even when shortened; `make long` waits for them.
SLOW = "'window': '[13]d'"

#: Alerts, and by which labels people know what it is about.
EXPECTED: dict[str, dict[str, str]] = {
    "TaskFailing": {"task": "faults.fail"},
    "TasksDropped": {"task": "app.notify", "reason": "own_background"},
    "TaskStuck": {"task": "faults.hang"},
    "QueueNotDraining": {},
    "OldestQueuedTooOld": {"task": "app.audit", "engine": "local"},
    "RetryStorm": {"task": "faults.retry"},
    "ThreadPoolSaturated": {"pool": "aftertask"},
}


def test_each_fault_is_delivered_and_resolved(tmp_path: Path) -> None:
    """Nothing on a good day; each alert, with its task, through Alertmanager to people; resolved after the fault."""
    with world(tmp_path, 1 / 120, f"{MACHINE}|{SLOW}") as shops:
        # Longer than most windows.
        for_a_while(shops, 20)
        assert not shops.firing() and not shops.people.received

        # One instance stands still: a run behind one that does not end. The other goes on, with a run as old.
        shops.fault("behind", shops.calm)
        for name in ("behind", "hold", "hang", "thread", "thread", "thread"):
            shops.fault(name)

        def all_fire() -> bool:
            shops.fault("retry")
            for name in ("fail", "fail", "fail"):
                shops.fault(name)
            httpx2.delete(f"{shops.busy.url}/orders/1")
            httpx2.post(f"{shops.busy.url}/orders/1")
            missing = {
                name for name, labels in EXPECTED.items() if "firing" not in shops.people.statuses(name, **labels)
            }
            burns = {window for window in ("1h", "6h") if shops.people.statuses("ErrorBudgetBurn", window=window)}
            assert not missing and burns == {"1h", "6h"}, f"missing {missing}, burns {burns}, fires {shops.firing()}"
            return True

        eventually(all_fire, seconds=120, what="every alert")
        for alert in shops.people.alerts:
            assert alert["labels"]["job"] == "shop" and alert["annotations"]["runbook_url"].endswith(".md")
            assert "{{" not in str(alert["annotations"]) and "<no value>" not in str(alert["annotations"])

        for instance in (shops.busy, shops.calm):
            httpx2.delete(f"{instance.url}/faults")

        def over() -> bool:
            shops.good()
            open_ = {
                dict(labels)["alertname"] for labels, status in shops.people.received.items() if status == "firing"
            }
            assert not open_ and not shops.firing(), f"delivered and not resolved {open_}, fires {shops.firing()}"
            return True

        eventually(over, seconds=90, what="the end of every alert")


@pytest.mark.timeout(900)
def test_the_slow_windows_of_the_error_budget_fire_and_end(tmp_path: Path) -> None:
    """A day's and three days' windows, at a 240th of their length, each as a warning; and they end."""
    with world(tmp_path, 1 / 240, MACHINE) as shops:
        for_a_while(shops, 10)
        assert not shops.firing()

        def all_fire() -> bool:
            for_a_while(shops, 1, ("fail",) * 8)
            return len(windows()) == 4

        def windows() -> set[str]:
            burns = instant(shops.server, 'ALERTS{alertname="AftertaskErrorBudgetBurn",alertstate="firing"}')
            return {each["metric"]["window"] for each in burns}

        eventually(all_fire, seconds=200, what="all four windows")
        # Only the critical ones are delivered.
        assert not shops.people.statuses("ErrorBudgetBurn", severity="warning")

        def over() -> bool:
            for_a_while(shops, 1)
            return not windows()

        eventually(over, seconds=400, what="all four windows ended")
