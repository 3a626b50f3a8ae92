"""
The shop under uvicorn with its own traffic: what to look at, live log lines, and a table from the real /metrics.

    python examples/shop/demo.py                 # until Ctrl-C
    python examples/shop/demo.py --seconds 20
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx2
from prometheus_client.parser import text_string_to_metric_families

HERE = Path(__file__).parent
TABLE_EVERY = 5.0


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def running(*command: str, **kwargs: object) -> Iterator[subprocess.Popen[str]]:
    """A child process; ended by its own pid."""
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
    """The shop's log lines as they come: the first of each kind in full, the others counted."""

    def __init__(self, child: subprocess.Popen[str]) -> None:
        self.seen: Counter[str] = Counter()
        self._child = child
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._child.stderr is not None
        for line in self._child.stderr:
            if not line.startswith("{"):
                continue
            told = json.loads(line)
            kind = f"{told['event']} {told.get('task', '')} {told.get('reason') or told.get('error_type') or ''}"
            self.seen[kind] += 1
            if self.seen[kind] == 1:
                print(f"  {pretty(told)}", flush=True)


def pretty(told: dict[str, object]) -> str:
    """One line of JSON for people."""
    keys = (
        "http_method",
        "http_route",
        "reason",
        "error_type",
        "error_message",
        "duration_s",
        "queue_wait_s",
        "trace_id",
    )
    more = " ".join(f"{key}={told[key]}" for key in keys if key in told)
    return f"{str(told['timestamp'])[11:19]} {told['level']:7} {told['event']:15} {told.get('task', ''):20} {more}"


def table(url: str) -> str:
    """What /metrics says of each task."""
    rows: dict[str, Counter[str]] = {}
    for family in text_string_to_metric_families(httpx2.get(f"{url}/metrics").text):
        for sample in family.samples:
            row = rows.setdefault(sample.labels.get("task", ""), Counter())
            if sample.name == "aftertask_tasks_scheduled_total":
                row["scheduled"] += int(sample.value)
            elif sample.name == "aftertask_tasks_finished_total":
                row[sample.labels["outcome"]] += int(sample.value)
            elif sample.name == "aftertask_tasks_inflight":
                row["in flight"] += int(sample.value)
    columns = ("scheduled", "succeeded", "failed", "skipped", "dropped", "cancelled", "in flight")
    lines = [f"  {'task':22}" + "".join(f"{column:>11}" for column in columns)]
    for name, row in sorted(rows.items()):
        if row["scheduled"]:
            lines.append(f"  {name:22}" + "".join(f"{row[column]:>11}" for column in columns))
    return "\n".join(lines)


def wait_until_it_answers(url: str, child: subprocess.Popen[str]) -> None:
    """Until /metrics answers, ten seconds at most."""
    for _ in range(100):
        with contextlib.suppress(httpx2.HTTPError):
            if httpx2.get(f"{url}/metrics").status_code == 200:
                return
        if child.poll() is not None:
            raise SystemExit(f"the shop ended with code {child.returncode}: {child.stderr and child.stderr.read()}")
        time.sleep(0.1)
    raise SystemExit("the shop did not answer in ten seconds")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help="end after so long; default: at Ctrl-C")
    parser.add_argument("--port", type=int, default=None)
    options = parser.parse_args()
    port = options.port or free_port()
    url = f"http://127.0.0.1:{port}"
    python = sys.executable
    server = [
        python,
        "-m",
        "uvicorn",
        "app:app",
        "--app-dir",
        str(HERE),
        "--port",
        str(port),
        "--log-level",
        "critical",
    ]
    seconds = options.seconds or 10**6
    traffic = [python, str(HERE / "traffic.py"), "--url", url, "--seconds", str(seconds)]
    quiet = {"stdout": subprocess.DEVNULL}
    try:
        with running(*server, stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"}, **quiet) as shop:
            wait_until_it_answers(url, shop)
            print(f"The shop answers at {url}, its metrics at {url}/metrics (try: curl {url}/metrics)")
            print("Its log, the first line of each kind:", flush=True)
            Lines(shop)
            with running(*traffic, **quiet) as customers:
                end = time.monotonic() + seconds
                while customers.poll() is None and (left := end - time.monotonic()) > 0:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        customers.wait(min(TABLE_EVERY, left))
                    print(f"\nWhat {url}/metrics says:\n{table(url)}\n", flush=True)
    except KeyboardInterrupt:
        print("\nGood-bye.")


if __name__ == "__main__":
    main()
