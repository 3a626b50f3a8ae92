"""Prometheus and Alertmanager with the configuration that is shipped, and a receiver of alerts."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import yaml

from live.servers import Receiver, Server, daemon, prometheus_with

STACK = Path(__file__).parents[2] / "grafana"


class People(Receiver):
    """Receives what Alertmanager sends: keeps each alert's last status, by its labels."""

    def __init__(self) -> None:
        super().__init__()
        self.received: dict[frozenset[tuple[str, str]], str] = {}
        self.alerts: list[dict[str, Any]] = []

    def take(self, body: bytes) -> None:
        """One message, with some alerts."""
        for alert in json.loads(body)["alerts"]:
            self.alerts.append(alert)
            self.received[frozenset(alert["labels"].items())] = alert["status"]

    def statuses(self, alert: str, **labels: str) -> set[str]:
        """The last statuses of the alerts of this name with these labels."""
        wanted = {("alertname", f"Aftertask{alert}"), *labels.items()}
        return {status for known, status in list(self.received.items()) if wanted <= known}


@contextlib.contextmanager
def alertmanager(folder: Path, people: People) -> Iterator[Server]:
    """Alertmanager as shipped, but for the receiver and the intervals."""
    config = yaml.safe_load((STACK / "alertmanager" / "alertmanager.yml").read_text())
    config["route"] |= {"group_wait": "1s", "group_interval": "1s"}
    for receiver in config["receivers"]:
        receiver["webhook_configs"] = [{"url": people.url, "send_resolved": True}]
    path = folder / "alertmanager.yml"
    path.write_text(yaml.safe_dump(config))
    options = (f"--config.file={path}", f"--storage.path={folder / 'alertmanager'}", "--cluster.listen-address=")
    with daemon("prometheus-alertmanager", folder, *options) as server:
        yield server


@contextlib.contextmanager
def prometheus(
    folder: Path, *targets: Server, every: str, rules: list[Path] | None = None, alerts_to: Server | None = None
) -> Iterator[Server]:
    """Prometheus as shipped, but for addresses and intervals."""
    config = yaml.safe_load((STACK / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": every, "evaluation_interval": every, "scrape_timeout": every}
    config["rule_files"] = [str(path) for path in rules or ()]
    to = [alerts_to.url.removeprefix("http://")] if alerts_to else []
    config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = to
    (job,) = config["scrape_configs"]
    job |= {"scrape_interval": every, "scrape_timeout": every}
    job["static_configs"][0]["targets"] = [target.url.removeprefix("http://") for target in targets]
    with prometheus_with(folder, yaml.safe_dump(config)) as server:
        yield server


def api(server: Server, path: str, **parameters: str) -> Any:
    """The data that Prometheus answers, without an error, a warning or a note."""
    answer = httpx2.get(f"{server.url}/api/v1/{path}", params=parameters, timeout=10).json()
    assert answer["status"] == "success", f"{parameters}: {answer}"
    assert not answer.get("warnings") and not answer.get("infos"), f"{parameters}: {answer}"
    return answer["data"]


def instant(server: Server, query: str) -> list[dict[str, Any]]:
    """The series that a query has now."""
    return api(server, "query", query=query, time=str(time.time()))["result"]  # type: ignore[no-any-return]
