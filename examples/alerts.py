"""
Alerts: the first failure of a kind reaches a person at once, the rest together. Run it, make a task fail, and look:

    uvicorn alerts:app --app-dir examples
    for n in 1 2 3 4 5; do curl -X POST "http://127.0.0.1:8000/orders/$n"; sleep 1; done

The customer sees {"status": "ok"} each time. In the terminal of the server you will see one ALERT, with the stack, the
route, the owner, and the task that did not run because of it. Stop the server by Ctrl-C: a second ALERT counts the
others. A web hook, Slack or mail are as short, without a line of code: AFTERTASK_ALERTS='https://example.org/hook'
"""

from fastapi import BackgroundTasks, FastAPI

from aftertask import AftertaskMiddleware, Settings, task
from aftertask.alerts import Alert, Route


async def tell(alert: Alert) -> None:
    """A channel is any function, sync or async."""
    print(f"\nALERT {alert.title}\n{alert.text}\n", flush=True)


app = FastAPI()
app.add_middleware(
    AftertaskMiddleware,
    settings=Settings(alerts=[Route(tell, name="terminal", severity="warning")]),
)


@task(name="mail.receipt", owner="growth")
async def send_receipt(order: int) -> None:
    """The mail server is down."""
    raise ConnectionRefusedError(f"mail.internal refused order {order}")


@task(name="orders.charge_card", owner="payments")
async def charge_card(order: int) -> None:
    """Skipped, since it comes after one that failed."""


@app.post("/orders/{order}")
async def place_order(order: int, tasks: BackgroundTasks) -> dict[str, str]:
    """Answers at once."""
    tasks.add_task(send_receipt, order)
    tasks.add_task(charge_card, order)
    return {"status": "ok"}
