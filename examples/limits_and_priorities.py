"""
One slot, two kinds of tasks, and the urgent one goes first. Run it, send ten requests at once, and look:

    uvicorn limits_and_priorities:app --app-dir examples
    seq 10 | xargs -P 10 -I{} curl -sX POST http://127.0.0.1:8000/users/{}
    curl http://127.0.0.1:8000/order

You will see that the password mails overtook the newsletters: after the first task, which had the slot for itself, all
mails that were waiting come before the newsletters. `aftertask_concurrency_waiting` in /metrics shows the queue.
"""

import anyio
from fastapi import BackgroundTasks, FastAPI

from aftertask import AftertaskMiddleware, Limit, task

app = FastAPI()
app.add_middleware(AftertaskMiddleware)

smtp = Limit("smtp", 1, max_waiting=100)
sent: list[str] = []


@task(name="mail.newsletter", limit=smtp, priority=100)
async def send_newsletter(user: int) -> None:
    """Can wait: a larger number is less urgent."""
    await anyio.sleep(0.3)
    sent.append(f"newsletter {user}")


@task(name="mail.password", limit=smtp, priority=0)
async def send_password_link(user: int) -> None:
    """Someone waits for it."""
    await anyio.sleep(0.3)
    sent.append(f"password {user}")


@app.post("/users/{user}")
async def contact(user: int, tasks: BackgroundTasks) -> dict[str, str]:
    """Even users want a password link, odd ones get a newsletter."""
    tasks.add_task(send_newsletter if user % 2 else send_password_link, user)
    return {"status": "ok"}


@app.get("/order")
async def order() -> list[str]:
    """What was sent, in order."""
    return sent
