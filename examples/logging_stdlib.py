"""
An app that uses stdlib logging. Run it, send one request, and look:

    uvicorn logging_stdlib:app --app-dir examples
    curl -X POST http://127.0.0.1:8000/orders

You will see the task's own line and aftertask's `task.succeeded`, both with the same `run=` id.
"""

import logging

from fastapi import BackgroundTasks, FastAPI

from aftertask import AftertaskMiddleware
from aftertask.signals import RunFilter

handler = logging.StreamHandler()
handler.setFormatter(logging.Formatter("%(levelname)s %(name)s %(message)s task=%(task)s run=%(run_id)s"))
handler.addFilter(RunFilter())
logging.basicConfig(level=logging.INFO, handlers=[handler])

app = FastAPI()
app.add_middleware(AftertaskMiddleware)


def ship() -> None:
    """A sync task: its line is logged from a thread, and still has the run's id."""
    logging.getLogger("shop").info("shipping")


@app.post("/orders")
async def order(tasks: BackgroundTasks) -> dict[str, str]:
    """Respond at once."""
    tasks.add_task(ship)
    return {"status": "ok"}
