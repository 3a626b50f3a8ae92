"""
Timeouts, retries and a bounded queue, declared at the task. Run it, send a request, and look:

    uvicorn examples.policies:app
    curl -X POST localhost:8000/signup/ada@example.org

You will see `task.retrying`, then `task.succeeded` with attempt 2: the mail server of this example refuses every second
mail. If more than three mails wait, the endpoint responds with 503.
"""

from __future__ import annotations

import itertools

import anyio
from fastapi import BackgroundTasks, FastAPI, HTTPException

from aftertask import AftertaskMiddleware, Limit, QueueFull, Retry, Settings, task

app = FastAPI()
app.add_middleware(AftertaskMiddleware, settings=Settings(on_failure="contain"))

smtp = Limit("smtp", 1, max_waiting=3)
mails = itertools.count(1)


@task(name="mail.welcome", timeout=5, retry=Retry(attempts=3, wait_initial=0.2), limit=smtp)
async def send_welcome_mail(address: str) -> None:
    """Send a mail, through a server that refuses every second one."""
    await anyio.sleep(0.05)
    if next(mails) % 2:
        raise ConnectionError("421 try again later")


@app.post("/signup/{address}", status_code=202)
async def signup(address: str, tasks: BackgroundTasks) -> dict[str, str]:
    """Sign a user up, and send the mail after the response."""
    try:
        tasks.add_task(send_welcome_mail, address)
    except QueueFull as full:
        raise HTTPException(503, str(full)) from None
    return {"status": "ok"}
