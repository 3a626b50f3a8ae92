"""
The smallest app. Run it, send one request, and look:

    uvicorn quickstart:app --app-dir examples
    curl -X POST 'http://127.0.0.1:8000/signup?email=ada@example.org'

You will see one JSON line on stderr, `task.succeeded` for `quickstart.send_welcome_email`, and the metrics of that task
at http://127.0.0.1:8000/metrics.
"""

from fastapi import BackgroundTasks, FastAPI

from aftertask import AftertaskMiddleware

app = FastAPI()
app.add_middleware(AftertaskMiddleware)


async def send_welcome_email(email: str) -> None:
    """Pretend to send a mail."""


@app.post("/signup")
async def signup(email: str, tasks: BackgroundTasks) -> dict[str, str]:
    """Respond at once."""
    tasks.add_task(send_welcome_email, email)
    return {"status": "ok"}
