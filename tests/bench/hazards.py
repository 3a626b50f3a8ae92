"""
What watching the event loop costs a process that serves nothing, as a share of one core.

    python tests/bench/hazards.py                # the figures and the gate; exit code 1 if it fails

Under uvicorn, on asyncio and on uvloop, with and without a run in flight: the CPU time of an idle process with
aftertask, less that of one without, at the same time; the median of several spans of some seconds.
"""

from __future__ import annotations

import argparse
import atexit
import socket
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from multiprocessing import get_context

import anyio
import overhead
import subjects
from fastapi import BackgroundTasks

LIMIT = 0.005


def subject(*, observed: bool) -> subjects.Subject:
    """An app with a task that does not end."""
    made = subjects.ours() if observed else subjects.bare()

    @made.app.get("/hold")
    async def hold(tasks: BackgroundTasks) -> int:
        tasks.add_task(anyio.sleep_forever)
        return 0

    return made


def served(loop: str, *, observed: bool, in_flight: bool) -> socket.socket:
    """Where a server listens that has served one request; it lives as long as this process."""
    listener = socket.create_server(("127.0.0.1", 0))
    make = partial(subject, observed=observed)
    process = get_context("fork").Process(target=overhead.serve, args=(make, listener, loop), daemon=True)
    process.start()
    # SIGTERM, which multiprocessing sends at exit, would wait for the run that does not end.
    atexit.register(process.kill)
    overhead.Client(listener).get("/hold" if in_flight else "/0")
    return listener


def cpu_ns(listener: socket.socket) -> int:
    """Nanoseconds of CPU time of a server so far, by a new connection: idle ones are closed by the server."""
    return int(overhead.Client(listener).get("/cpu"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, compare with the limit."""
    parser = argparse.ArgumentParser(description="What watching the event loop costs an idle process.")
    parser.add_argument("--seconds", type=float, default=10, help="length of a span (default 10)")
    parser.add_argument("--times", type=int, default=5, help="number of spans (default 5)")
    options = parser.parse_args(arguments)
    cases = [(loop, in_flight) for loop in ("asyncio", "uvloop") for in_flight in (False, True)]
    servers = [
        served(loop, observed=observed, in_flight=in_flight) for loop, in_flight in cases for observed in (False, True)
    ]
    used: list[list[float]] = [[] for _ in servers]
    for _ in range(options.times):
        before = [cpu_ns(server) for server in servers]
        time.sleep(options.seconds)
        for server, start, measured in zip(servers, before, used, strict=True):
            measured.append((cpu_ns(server) - start) / options.seconds / 1e9)
    kept = True
    for number, (loop, in_flight) in enumerate(cases):
        without, with_it = used[2 * number], used[2 * number + 1]
        more = statistics.median(b - a for a, b in zip(without, with_it, strict=True))
        kept = kept and more <= LIMIT
        name = f"{loop}, {'a run in flight' if in_flight else 'no runs'}"
        print(f"{'pass' if more <= LIMIT else 'FAIL'}  {name:26}{more:8.3%} of a core  limit {LIMIT:.1%}")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
