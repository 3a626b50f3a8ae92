"""
Alerts: the first failure is sent at once, the others together. Run it, make a task fail five times, and look:

    uvicorn alerts:app --app-dir examples
    for n in 1 2 3 4 5; do curl -X POST "http://127.0.0.1:8000/orders/$n"; sleep 1; done

The customer sees {"status": "ok"} each time. The server's terminal shows one ALERT with the stack, the route, the
owner, and the task that did not run because of the failure. Stop the server with Ctrl+C: a second ALERT counts the
others.
For a webhook, Slack or mail you need no code: AFTERTASK_ALERTS='https://example.org/hook'
"""

from fastapi import BackgroundTasks, FastAPI

from aftertask import AftertaskMiddleware, Settings, task
from aftertask.alerts import Alert, Route


async def show(alert: Alert) -> None:
    """A channel is any function, sync or async."""
    print(f"\nALERT {alert.title}\n{alert.text}\n", flush=True)


app = FastAPI()
app.add_middleware(
    AftertaskMiddleware,
    settings=Settings(alerts=[Route(show, name="terminal", severity="warning")]),
)


@task(name="mail.receipt", owner="growth")
async def send_receipt(order: int) -> None:
    """Fail: the mail server is down."""
    raise ConnectionRefusedError(f"mail.internal refused order {order}")


@task(name="orders.charge_card", owner="payments")
async def charge_card(order: int) -> None:
    """Skipped, because the task before it fails."""


@app.post("/orders/{order}")
async def place_order(order: int, tasks: BackgroundTasks) -> dict[str, str]:
    """Respond at once."""
    tasks.add_task(send_receipt, order)
    tasks.add_task(charge_card, order)
    return {"status": "ok"}
