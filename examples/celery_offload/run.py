"""
The app, two workers and a Redis of its own, with traffic: the same metrics from both sides, and one trace over both.

    python examples/celery_offload/run.py --seconds 15      # needs redis-server (Debian: apt-get install redis-server)
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx2
from prometheus_client.parser import text_string_to_metric_families

HERE = Path(__file__).parent


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def running(log: Path, *command: str, **env: str) -> Iterator[None]:
    """A child process that writes to a file, ended by its own pid."""
    with log.open("wb") as output:
        child = subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, **env}, cwd=HERE, start_new_session=True
        )
    try:
        yield
    finally:
        child.terminate()
        try:
            child.wait(15)
        except subprocess.TimeoutExpired:
            child.kill()


def outcomes(url: str) -> Counter[tuple[str, str, str]]:
    """Runs by task, engine and outcome, as a process shows them."""
    found: Counter[tuple[str, str, str]] = Counter()
    for family in text_string_to_metric_families(httpx2.get(f"{url}/metrics", timeout=10).text):
        for sample in family.samples:
            if sample.name == "aftertask_tasks_finished_total" and sample.value:
                labels = sample.labels
                found[labels["task"], labels["engine"], labels["outcome"]] += int(sample.value)
    return found


def wait_for(url: str, log: Path) -> None:
    """Wait until a process serves its metrics."""
    for _ in range(300):
        with contextlib.suppress(httpx2.HTTPError):
            httpx2.get(f"{url}/metrics", timeout=2)
            return
        time.sleep(0.1)
    raise SystemExit(f"{url} did not start:\n{log.read_text()}")


def main() -> None:
    """Start everything, make traffic, print both sides, end everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15, help="how long there is traffic")
    seconds = parser.parse_args().seconds
    if shutil.which("redis-server") is None:
        raise SystemExit("redis-server is not installed; on Debian: apt-get install redis-server")
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder, redis, web = Path(name), free_port(), free_port()
        env, urls = {"BROKER": f"redis://127.0.0.1:{redis}/0"}, [f"http://127.0.0.1:{web}"]
        options = ("--port", str(redis), "--bind", "127.0.0.1", "--save", "", "--dir", name)
        stack.enter_context(running(folder / "redis.log", "redis-server", *options))
        for number in (1, 2):
            shared, port = folder / f"metrics-{number}", free_port()
            shared.mkdir()
            own = {"PROMETHEUS_MULTIPROC_DIR": str(shared), "METRICS_PORT": str(port), **env}
            command = [sys.executable, "-m", "celery", "-A", "web.celery", "worker", "--concurrency", "2"]
            log = folder / f"worker-{number}.log"
            stack.enter_context(running(log, *command, "--hostname", f"worker{number}@localhost", **own))
            urls.append(f"http://127.0.0.1:{port}")
        server = [sys.executable, "-m", "uvicorn", "web:app", "--port", str(web), "--log-level", "warning"]
        stack.enter_context(running(folder / "web.log", *server, **env))
        for url, log_name in zip(urls, ("web.log", "worker-1.log", "worker-2.log"), strict=True):
            wait_for(url, folder / log_name)
        print(f"web app {urls[0]}, workers {urls[1]} and {urls[2]}: each has /metrics; traffic for {seconds:g} s")
        print(f"the web app's runs, live: {urls[0]}/aftertask/")
        end, order = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            order += 1
            httpx2.post(f"{urls[0]}/orders/{order}", timeout=10).raise_for_status()
            time.sleep(0.05)
        rest = time.monotonic() + 20
        while time.monotonic() < rest and ended(urls) < order:
            time.sleep(0.2)
        for title, url in zip(("web app", "worker 1", "worker 2"), urls, strict=True):
            print(f"\n{title}")
            for (task, engine, outcome), count in sorted(outcomes(url).items()):
                print(f"  {task:18} engine={engine:7} {outcome:10} {count:6}")
        show_one_trace(folder)


def ended(urls: list[str]) -> int:
    """Runs that ended on the workers."""
    return sum(outcomes(urls[1]).values()) + sum(outcomes(urls[2]).values())


def show_one_trace(folder: Path) -> None:
    """The log lines of one request, from the web app to a worker."""
    lines = [
        {"from": file.stem, **json.loads(text[text.index("{") :])}
        for file in sorted(folder.glob("w*.log"))
        for text in file.read_text().splitlines()
        if '"trace_id"' in text and text.rstrip().endswith("}")
    ]
    last = next(line for line in reversed(lines) if line["from"] != "web" and line["event"] == "task.succeeded")
    print(f"\none trace, {last['trace_id']}")
    for line in lines:
        if line["trace_id"] == last["trace_id"]:
            print(f"  {line['from']:9} {line['event']:15} {line['task']:18} attempt {line['attempt']}")


if __name__ == "__main__":
    main()
