"""
The shop under uvicorn with its own traffic: what to look at, live log lines, and a table from the real /metrics.

    python examples/shop/demo.py                 # until Ctrl-C
    python examples/shop/demo.py --seconds 20
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import FrameType

import httpx2
from prometheus_client.parser import text_string_to_metric_families

HERE = Path(__file__).parent
TABLE_EVERY = 5.0
LINE_EVERY = 1.0
FOREVER = 10.0**6
INCIDENT_AFTER = 20.0
COLUMNS = ("scheduled", "succeeded", "failed", "skipped", "dropped", "cancelled", "in flight")
LOOK = """\
Open {url}/aftertask/ in a browser: what is happening, what failed, and why.

The shop is at {url}, its metrics at {url}/metrics. All is well for a while; then, for a minute every eight
minutes, its mail server and its carrier are down; the parcels that failed then wait on the page of dead letters. In
another terminal:
  curl -s {url}/metrics | grep ^aftertask_tasks_
  curl -s -H 'Accept: application/openmetrics-text' {url}/metrics | grep trace_id   # the traces behind the figures
  curl -i -X POST '{url}/orders/7?fault=mail'   # a 200, and a mail that never went: see task.failed below
"""


def open_port(port: int) -> int:
    """This port, or a free one for 0; ends the demo if the port is taken."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError as error:
            raise SystemExit(f"cannot listen on 127.0.0.1:{port}: {error.strerror}; choose another --port") from None
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def running(*command: str, **kwargs: object) -> Iterator[subprocess.Popen[str]]:
    """A child process that Ctrl-C does not reach; it is ended by its own pid."""
    child = subprocess.Popen(command, text=True, start_new_session=True, **kwargs)  # type: ignore[call-overload]  # Popen's
    try:
        yield child
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


class Lines:
    """The shop's log: the first line of each kind at once, of the others about one per second."""

    def __init__(self, child: subprocess.Popen[str]) -> None:
        self.rest: deque[str] = deque(maxlen=20)
        self._seen: set[tuple[object, ...]] = set()
        self._next = time.monotonic()
        self._child = child
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._child.stderr is not None
        for line in self._child.stderr:
            if line.startswith('{"event"'):
                self._show(json.loads(line))
            else:
                self.rest.append(line)  # the server's own lines, and the tracebacks of failed tasks

    def _show(self, line: Mapping[str, object]) -> None:
        kind = (line["event"], line.get("task"), line.get("reason"), line.get("error_type"))
        if kind in self._seen and time.monotonic() < self._next:
            return
        self._seen.add(kind)
        self._next = time.monotonic() + LINE_EVERY
        print(f"  {pretty(line)}", flush=True)

    def join(self) -> None:
        """Wait for the shop's last line; two seconds at most."""
        self._thread.join(2)


class Receiver:
    """A webhook server of the demo's own, which prints the alerts that arrive."""

    def __init__(self) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                print(f"  {alarm(json.loads(self.rfile.read(int(self.headers['content-length']))))}", flush=True)
                self.send_response(204)
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/"

    def __enter__(self) -> Receiver:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def alarm(alert: Mapping[str, object]) -> str:
    """One alert as a line for people; the whole one has the stack, the trace and more."""
    parts = [f"{str(alert['last_seen'])[11:19]} ALERT  {alert['title']}"]
    parts += [f"owner {alert['owner']}"] if alert["owner"] else []
    not_run = alert["not_run"]
    if isinstance(not_run, Mapping) and not_run:
        parts.append(f"not run because of it: {', '.join(not_run)}")
    return "  ".join(parts)


def pretty(line: Mapping[str, object]) -> str:
    """One log line for people."""
    route = f"{line.get('http_method', '')} {line.get('http_route', '')}"
    parts = [f"{line['event']:15} {line.get('task', '')!s:19} {route:23}"]
    parts += [str(line[key]) for key in ("reason", "error_type", "error_message") if key in line]
    for key, word in (("queue_wait_s", "waited"), ("duration_s", "took")):
        seconds = line.get(key)
        if isinstance(seconds, float):
            parts.append(f"{word} {milliseconds(seconds)}")
    if "trace_id" in line:
        parts.append(f"trace {str(line['trace_id'])[:8]}…")
    return f"{str(line['timestamp'])[11:19]} " + "  ".join(parts)


def milliseconds(seconds: float) -> str:
    """A time for people."""
    return f"{seconds * 1000:.1f} ms"


def quantile(q: float, buckets: Mapping[float, float]) -> float | None:
    """`histogram_quantile` of Prometheus for cumulative buckets; None if nothing was observed."""
    edges = sorted(buckets.items())
    if not edges or not edges[-1][1]:
        return None
    rank = q * edges[-1][1]
    for (low, below), (high, upto) in itertools.pairwise([(0.0, 0.0), *edges]):
        if upto >= rank:
            return low if high == float("inf") else low + (high - low) * (rank - below) / (upto - below)
    return None


def table(text: str) -> str:
    """The metrics of each task as a table."""
    rows: dict[str, Counter[str]] = {}
    waits: dict[str, dict[float, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            task = sample.labels.get("task", "")
            row = rows.setdefault(task, Counter())
            if sample.name == "aftertask_tasks_scheduled_total":
                row["scheduled"] += int(sample.value)
            elif sample.name == "aftertask_tasks_finished_total":
                row[sample.labels["outcome"]] += int(sample.value)
            elif sample.name == "aftertask_tasks_inflight":
                row["in flight"] += int(sample.value)
            elif sample.name == "aftertask_queue_wait_seconds_bucket":
                waits.setdefault(task, {})[float(sample.labels["le"])] = sample.value
    lines = [f"  {'task':20}" + "".join(f"{column:>11}" for column in (*COLUMNS, "p95 wait"))]
    for name, row in sorted(rows.items()):
        if row["scheduled"]:
            wait = quantile(0.95, waits.get(name, {}))
            cells = [str(row[column]) for column in COLUMNS] + ["-" if wait is None else milliseconds(wait)]
            lines.append(f"  {name:20}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)


def wait_until_it_answers(url: str, client: httpx2.Client, shop: subprocess.Popen[str], lines: Lines) -> None:
    """Wait for /metrics, twenty seconds at most."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if shop.poll() is not None:
            lines.join()
            raise SystemExit(f"the shop ended with code {shop.returncode}:\n{''.join(lines.rest)}")
        with contextlib.suppress(httpx2.HTTPError):
            if client.get(f"{url}/metrics").status_code == 200:
                return
        time.sleep(0.1)
    raise SystemExit("the shop did not respond within twenty seconds")


def alerting(receiver: str) -> dict[str, str]:
    """The variables that make the shop send alerts to our receiver, besides the channels that the user named."""
    urls = [receiver, *filter(None, [os.environ.get("AFTERTASK_ALERTS")])]
    past_proxies = ",".join(["127.0.0.1", *filter(None, [os.environ.get("no_proxy")])])
    return {"AFTERTASK_ALERTS": ",".join(urls), "no_proxy": past_proxies, "NO_PROXY": past_proxies}


def show(url: str, seconds: float, client: httpx2.Client) -> None:
    """Start the shop and its customers, and show what happens for this many seconds."""
    server = [sys.executable, "-m", "uvicorn", "app:app", "--app-dir", str(HERE), "--host", "127.0.0.1"]
    server += ["--port", url.rpartition(":")[2], "--log-level", "error", "--no-access-log"]
    traffic = [sys.executable, str(HERE / "traffic.py"), "--url", url, "--seconds", str(seconds)]
    traffic += ["--incident", str(min(INCIDENT_AFTER, seconds / 3))]
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with (
        tempfile.TemporaryDirectory() as folder,
        Receiver() as receiver,
        running(
            *server,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={"AFTERTASK_JOURNAL": f"{folder}/tasks.db", **env, **alerting(receiver.url)},
        ) as shop,
    ):
        lines = Lines(shop)
        wait_until_it_answers(url, client, shop, lines)
        print(LOOK.format(url=url))
        print(
            "Its log, the first line of each kind and then about one per second; ALERT is an alert that was sent:",
            flush=True,
        )
        with running(*traffic, stdout=subprocess.DEVNULL) as customers:
            end = time.monotonic() + seconds
            while customers.poll() is None and (left := end - time.monotonic()) > 0:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    customers.wait(min(TABLE_EVERY, left))
                if shop.poll() is not None:
                    raise SystemExit(f"the shop ended with code {shop.returncode}:\n{''.join(lines.rest)}")
                rows = table(client.get(f"{url}/metrics").text)
                print(f"\nFrom {url}/metrics:\n{rows}\n", flush=True)
            if customers.poll():
                raise SystemExit(f"the traffic ended with code {customers.returncode}")
    lines.join()


def asked_to_end(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends the demo as Ctrl-C does, children first."""
    raise KeyboardInterrupt


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=FOREVER, help="end after this many seconds; default: Ctrl-C")
    parser.add_argument("--port", type=int, default=0, help="the shop's port; default: a free one")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, asked_to_end)
    try:
        # Nothing here leaves this machine: a proxy from the environment is not used.
        with httpx2.Client(trust_env=False, timeout=10) as client:
            show(f"http://127.0.0.1:{open_port(options.port)}", options.seconds, client)
    except KeyboardInterrupt:
        print("\nGood-bye.")


if __name__ == "__main__":
    main()
