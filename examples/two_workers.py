"""
Two worker processes, one /metrics. Run it with a directory that both share, send a few requests, and look:

    PROMETHEUS_MULTIPROC_DIR=$(mktemp -d) uvicorn two_workers:app --app-dir examples --workers 2
    for order in 1 2 3 4 5 6 7 8; do curl -X POST http://127.0.0.1:8000/orders; done
    curl -s http://127.0.0.1:8000/metrics | grep finished_total

You will see responses from two processes, and `tasks_finished_total` counting the tasks of both in every scrape.
Without the directory each scrape shows one worker only; aftertask logs a warning about it once, at startup.
"""

import os

from fastapi import BackgroundTasks, FastAPI

from aftertask import AftertaskMiddleware

app = FastAPI()
app.add_middleware(AftertaskMiddleware)


async def ship() -> None:
    """Pretend to ship an order."""


@app.post("/orders")
async def order(tasks: BackgroundTasks) -> dict[str, int]:
    """Return the process that responds."""
    tasks.add_task(ship)
    return {"process": os.getpid()}
