"""
What the hand-over to Celery costs beside a bare `apply_async`, in one run, on a Redis of its own.

    python tests/bench/offload.py
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import anyio
from celery import Celery
from fastapi import BackgroundTasks, FastAPI
from prometheus_client import CollectorRegistry

from aftertask import AftertaskMiddleware, Settings, task
from aftertask.celery import CeleryEngine
from kit import drive
from live.brokers import redis

MESSAGES, TASKS = 2000, 20


@task(name="bench.work", executor="celery")
def work(number: int, text: str) -> None:
    """Never executed here."""


def nothing(number: int, text: str) -> None:
    """Never executed here."""


def bare(app: Celery) -> float:
    """Messages a second, one after another on one connection, as `apply_async` sends them."""
    celery_task = app.task(name="bench.bare", ignore_result=True)(nothing)
    celery_task.apply_async((0, "x"))
    began = time.perf_counter()
    for number in range(MESSAGES):
        celery_task.apply_async(kwargs={"number": number, "text": "some text"})
    return MESSAGES / (time.perf_counter() - began)


async def handed_over(celery: Celery) -> float:
    """Runs a second through requests with 20 tasks each, signals included."""
    app = FastAPI()
    settings = Settings(registry=CollectorRegistry(), engines={"celery": CeleryEngine(celery)}, success_log_rate=0)
    app.add_middleware(AftertaskMiddleware, settings=settings)

    @app.get("/")
    async def endpoint(tasks: BackgroundTasks) -> str:
        for number in range(TASKS):
            tasks.add_task(work, number, text="some text")
        return "ok"

    await drive(app)
    began = time.perf_counter()
    async with anyio.create_task_group() as group:
        for _ in range(8):
            group.start_soon(requests, app)
    return MESSAGES // TASKS // 8 * 8 * TASKS / (time.perf_counter() - began)


async def requests(app: FastAPI) -> None:
    """One client's requests."""
    for _ in range(MESSAGES // TASKS // 8):
        await drive(app)


def cpu(measure: Callable[[], float]) -> tuple[float, float]:
    """What it measures, and microseconds of this process's CPU for each message."""
    began = time.process_time()
    return measure(), (time.process_time() - began) / MESSAGES * 1e6


def main() -> None:
    """Five rounds of both, in turns; the best of each: a busy machine slows the threads of a hand-over down first."""
    with tempfile.TemporaryDirectory() as folder, redis(Path(folder)) as broker:
        celery = Celery("bench", broker=broker.url)
        rounds = [(cpu(lambda: bare(celery)), cpu(lambda: anyio.run(handed_over, celery))) for _ in range(5)]
    alone, ours = (max(each)[0] for each in zip(*rounds, strict=True))
    alone_us, ours_us = (min(us for _, us in each) for each in zip(*rounds, strict=True))
    print(f"apply_async {alone:.0f}/s, hand-over {ours:.0f}/s: {ours / alone:.2f} x (gate 0.8)")
    print(f"CPU a message: apply_async {alone_us:.0f} us, hand-over with its request and signals {ours_us:.0f} us")
    sys.exit(0 if ours >= 0.8 * alone else 1)


if __name__ == "__main__":
    main()
