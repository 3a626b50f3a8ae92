"""
The smallest app, with a task that fails. Run it, send one request, and look:

    uvicorn quickstart:app --app-dir examples
    curl -X POST 'http://127.0.0.1:8000/signup?email=ada@example.org'

The client sees success. On stderr you will see two JSON lines before the traceback, `task.failed` for the mail and
`task.skipped` for the statistics that never ran because of it; the same is counted at http://127.0.0.1:8000/metrics.
"""

from fastapi import BackgroundTasks, FastAPI

from aftertask import AftertaskMiddleware

app = FastAPI()
app.add_middleware(AftertaskMiddleware)


async def send_welcome_mail(address: str) -> None:
    """Fail as if the mail server were down."""
    raise ConnectionRefusedError(111, "Connection refused")


async def update_statistics() -> None:
    """Pretend to count the signup."""


@app.post("/signup")
async def signup(email: str, tasks: BackgroundTasks) -> dict[str, str]:
    """Respond at once."""
    tasks.add_task(send_welcome_mail, email)
    tasks.add_task(update_statistics)
    return {"status": "ok"}
