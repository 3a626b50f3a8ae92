"""
The smallest app. Run it, ask it once, and look:

    uvicorn minimal:app --app-dir examples
    curl -X POST 'http://127.0.0.1:8000/signup?email=ada@example.org'

You will see one JSON line on stderr, `task.succeeded` for `minimal.send_welcome_email`, and at
http://127.0.0.1:8000/metrics the numbers of that task.
"""

from fastapi import BackgroundTasks, FastAPI

from aftertask import AftertaskMiddleware

app = FastAPI()
app.add_middleware(AftertaskMiddleware)


async def send_welcome_email(email: str) -> None:
    """Pretends to."""


@app.post("/signup")
async def signup(email: str, tasks: BackgroundTasks) -> dict[str, str]:
    """Answers at once."""
    tasks.add_task(send_welcome_email, email)
    return {"status": "ok"}
