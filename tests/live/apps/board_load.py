"""An app whose tasks are timed, with a board; `/take` responds with what has been measured since the last time."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from starlette.applications import Starlette
from starlette.background import BackgroundTask, BackgroundTasks
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

from aftertask import AftertaskMiddleware, Settings
from aftertask.board import Board
from aftertask.events import Signal, Succeeded
from aftertask.signals import usual


class Timed(Signal):
    """Keeps how long each run took."""

    def __init__(self) -> None:
        self.took: list[float] = []
        self.cpu_s = 0.0

    def succeeded(self, event: Succeeded) -> None:
        """A run ended."""
        self.took.append(event.duration_s)


async def work() -> None:
    """Take 20 ms."""
    await asyncio.sleep(0.02)


async def add(request: Request) -> JSONResponse:
    """Add ten tasks."""
    return JSONResponse({}, background=BackgroundTasks([BackgroundTask(work) for _ in range(10)]))


async def take(request: Request) -> JSONResponse:
    """The 99th percentile, the number of runs, the seconds of a processor, and the resident memory in megabytes."""
    took, timed.took = sorted(timed.took), []
    before, timed.cpu_s = timed.cpu_s, time.process_time()
    p99 = took[int(len(took) * 0.99)] if took else 0
    return JSONResponse({"p99": p99, "runs": len(took), "cpu_s": timed.cpu_s - before, "resident": resident_mb()})


def resident_mb() -> float:
    """The resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


timed = Timed()
settings = Settings(success_log_rate=0, journal=os.environ.get("BENCH_JOURNAL") or None)
app = Starlette(routes=[Route("/add", add), Route("/take", take), Mount("/aftertask", Board(insecure=True))])
app.add_middleware(AftertaskMiddleware, settings=settings, signals=[*usual(settings), timed])
