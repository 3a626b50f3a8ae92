"""
What `run_after="request"` does to the time until a response, under load.

    python tests/bench/run_after.py              # the figures and the gate; exit code 1 if it fails
    python tests/bench/run_after.py --turns 4    # a short run

Two uvicorns serve the same app, with a dependency that has code after its `yield` and one task per request: one with
`run_after="response"`, one with `"request"`. They take turns, in an order that changes: 200 connections that each send
one request after another. A turn's figure is the 99th percentile of the time from a request to the end of its response;
the gate is about the median of the quotients of neighbouring turns.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import random
import socket
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from multiprocessing import get_context
from typing import Any

import overhead
import subjects
from fastapi import BackgroundTasks, Depends, FastAPI
from prometheus_client import CollectorRegistry

from aftertask import AftertaskMiddleware, Settings

LIMIT = 1.05
REQUEST = b"GET / HTTP/1.1\r\nHost: t\r\n\r\n"


async def dependency() -> AsyncIterator[None]:
    """Has code after its `yield`, as a session has."""
    yield
    await asyncio.sleep(0)


def subject(run_after: Any) -> subjects.Subject:
    """An app with one task per request."""
    app = FastAPI()

    @app.get("/")
    async def endpoint(tasks: BackgroundTasks, given: None = Depends(dependency)) -> dict[str, str]:
        tasks.add_task(subjects.nothing, 1)
        return {}

    settings = Settings(registry=CollectorRegistry(), run_after=run_after, success_log_rate=0)
    app.add_middleware(AftertaskMiddleware, settings=settings)
    return subjects.Subject(app)


def served(run_after: str) -> Any:
    """The address of a server that lives as long as this process."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    make = partial(subject, run_after)
    process = get_context("fork").Process(target=overhead.serve, args=(make, listener, "asyncio"), daemon=True)
    process.start()
    atexit.register(process.kill)
    return listener.getsockname()


async def connection(address: Any, requests: int, start: asyncio.Event) -> list[float]:
    """Seconds until the response of each request of one connection."""
    reader, writer = await asyncio.open_connection(*address)
    await start.wait()
    took = []
    for _ in range(requests):
        began = time.perf_counter()
        writer.write(REQUEST)
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"the server answered {head.splitlines()[0]!r}")
        await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split(b"\r")[0]))
        took.append(time.perf_counter() - began)
    writer.close()
    await writer.wait_closed()
    return took


async def turn(address: Any, connections: int, requests: int) -> float:
    """The 99th percentile of one turn, in seconds."""
    start = asyncio.Event()
    all_of_them = [asyncio.create_task(connection(address, requests, start)) for _ in range(connections)]
    await asyncio.sleep(0.2)  # they connect
    start.set()
    took = [seconds for each in all_of_them for seconds in await each]
    return statistics.quantiles(took, n=100)[98]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, compare with the limit."""
    parser = argparse.ArgumentParser(description='What run_after="request" does to the time until a response.')
    parser.add_argument("--turns", type=int, default=20, help="turns of each, one after the other (default 20)")
    parser.add_argument("--connections", type=int, default=200, help="requests at once (default 200)")
    parser.add_argument("--requests", type=int, default=20, help="requests of a connection in a turn (default 20)")
    options = parser.parse_args(arguments)
    servers = {run_after: served(run_after) for run_after in ("response", "request")}
    for address in servers.values():
        asyncio.run(turn(address, options.connections, 2))  # warm
    figures: dict[str, list[float]] = {run_after: [] for run_after in servers}
    for _ in range(options.turns):
        for run_after in random.sample(list(servers), k=2):
            figures[run_after].append(asyncio.run(turn(servers[run_after], options.connections, options.requests)))
    quotients = [b / a for a, b in zip(figures["response"], figures["request"], strict=True)]
    ratio = statistics.median(quotients)
    for run_after, seconds in figures.items():
        print(
            f"{run_after:9} p99 {statistics.median(seconds) * 1000:.1f} ms ({min(seconds):.3f}..{max(seconds):.3f} s)"
        )
    print(f"{'pass' if ratio <= LIMIT else 'FAIL'}  p99, request / response {ratio:.3f}  limit {LIMIT:.2f}")
    return 0 if ratio <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
