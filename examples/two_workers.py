"""
Two worker processes, one truth at /metrics. Run it with a directory that both share, ask it a few times, and look:

    PROMETHEUS_MULTIPROC_DIR=$(mktemp -d) uvicorn two_workers:app --app-dir examples --workers 2
    for order in 1 2 3 4 5 6 7 8; do curl -X POST http://127.0.0.1:8000/orders; done
    curl -s http://127.0.0.1:8000/metrics | grep finished_total

You will see answers from two processes, and `tasks_finished_total` counting the tasks of both, whichever worker answers
the scrape. Without the directory each scrape tells of one worker only; aftertask warns of it once, at start.
"""

import os

from fastapi import BackgroundTasks, FastAPI

from aftertask import AftertaskMiddleware

app = FastAPI()
app.add_middleware(AftertaskMiddleware)


async def ship() -> None:
    """Pretends to."""


@app.post("/orders")
async def order(tasks: BackgroundTasks) -> dict[str, int]:
    """Says which process answered."""
    tasks.add_task(ship)
    return {"process": os.getpid()}
