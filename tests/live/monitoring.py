"""Prometheus and Alertmanager with the configuration that is shipped, and somebody who is told."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from live.servers import Server, eventually, free_port, process

STACK = Path(__file__).parents[2] / "grafana"


def program(name: str) -> str:
    """A server's program; its absence is a failure where servers are required, else a skip."""
    if (path := shutil.which(name)) is None:
        word = f"no {name} here; Debian's packages are called prometheus and prometheus-alertmanager"
        if os.environ.get("AFTERTASK_TEST_REQUIRE_SERVERS"):
            pytest.fail(word)
        pytest.skip(word)
    return path


class People:
    """Who Alertmanager tells: keeps each alert's last status, by its labels."""

    def __init__(self) -> None:
        self.told: dict[frozenset[tuple[str, str]], str] = {}
        self.alerts: list[dict[str, Any]] = []
        people = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                for alert in json.loads(self.rfile.read(int(self.headers["content-length"])))["alerts"]:
                    people.alerts.append(alert)
                    people.told[frozenset(alert["labels"].items())] = alert["status"]
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/"

    def statuses(self, alert: str, **labels: str) -> set[str]:
        """The last statuses of the alerts of this name with these labels."""
        wanted = {("alertname", f"Aftertask{alert}"), *labels.items()}
        return {status for known, status in list(self.told.items()) if wanted <= known}

    def __enter__(self) -> People:
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextlib.contextmanager
def alertmanager(folder: Path, people: People) -> Iterator[Server]:
    """Alertmanager as shipped, but for who is told and how soon."""
    config = yaml.safe_load((STACK / "alertmanager" / "alertmanager.yml").read_text())
    config["route"] |= {"group_wait": "1s", "group_interval": "1s"}
    for receiver in config["receivers"]:
        receiver["webhook_configs"] = [{"url": people.url, "send_resolved": True}]
    path = folder / "alertmanager.yml"
    path.write_text(yaml.safe_dump(config))
    port = free_port()
    command = [
        *(program("prometheus-alertmanager"), f"--config.file={path}", f"--storage.path={folder / 'alertmanager'}"),
        *(f"--web.listen-address=127.0.0.1:{port}", "--cluster.listen-address=", "--log.level=warn"),
    ]
    log = folder / "alertmanager.log"
    with process(*command, log=log) as child:
        server = Server(f"http://127.0.0.1:{port}", child, log)
        eventually(lambda: server.answers("/-/ready"), what="Alertmanager being ready")
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
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    port = free_port()
    command = [
        *(program("prometheus"), f"--config.file={path}", f"--storage.tsdb.path={folder / 'tsdb'}"),
        *(f"--web.listen-address=127.0.0.1:{port}", "--enable-feature=exemplar-storage", "--log.level=warn"),
    ]
    log = folder / "prometheus.log"
    with process(*command, log=log) as child:
        server = Server(f"http://127.0.0.1:{port}", child, log)
        eventually(lambda: server.answers("/-/ready"), what="Prometheus being ready")
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
