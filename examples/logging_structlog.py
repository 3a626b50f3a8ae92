"""
An app that has configured structlog. Run it, send one request, and look:

    uvicorn logging_structlog:app --app-dir examples
    curl -X POST http://127.0.0.1:8000/orders

You will see four lines in the app's own format: `task.scheduled`, `task.started`, the task's own `shipping`, and
`task.succeeded`; all but the first with the same `run_id`, which is bound while the task runs.
"""

import structlog
from fastapi import BackgroundTasks, FastAPI

from aftertask import AftertaskMiddleware

structlog.configure(
    processors=[
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.LogfmtRenderer(sort_keys=True),
    ]
)

app = FastAPI()
app.add_middleware(AftertaskMiddleware)


async def ship() -> None:
    """Its line has the run's keys without naming any."""
    structlog.get_logger().info("shipping")


@app.post("/orders")
async def order(tasks: BackgroundTasks) -> dict[str, str]:
    """Respond at once."""
    tasks.add_task(ship)
    return {"status": "ok"}
