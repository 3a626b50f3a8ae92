"""
Clean up if the handler raises. Run it, make an order that fails, and look:

    uvicorn compensation:app --app-dir examples
    curl -X POST 'http://127.0.0.1:8000/orders?article=hat&stock=0'

The client gets 409. You will see `task.dropped` for `orders.confirm`, as FastAPI leaves out the tasks of a handler that
raises, and `task.succeeded` for `payments.release`, which is declared with `run_on_error`: it runs after the error
response. With `stock=1` both run.
"""

from fastapi import BackgroundTasks, FastAPI, HTTPException

from aftertask import AftertaskMiddleware, task

app = FastAPI()
app.add_middleware(AftertaskMiddleware)

orders: dict[str, str] = {}


@task(name="payments.release", run_on_error=True)
async def release_payment(payment: str) -> None:
    """Give the reserved money back, unless the order was made."""
    if payment not in orders:
        print(f"released {payment}", flush=True)


@task(name="orders.confirm")
async def confirm(payment: str) -> None:
    """Pretend to confirm the order by mail."""


@app.post("/orders")
async def order(article: str, stock: int, tasks: BackgroundTasks) -> dict[str, str]:
    """Reserve the money first; then it turns out whether the article is there."""
    payment = f"payment-for-{article}"
    tasks.add_task(release_payment, payment)
    tasks.add_task(confirm, payment)
    if stock < 1:
        raise HTTPException(409, f"{article} is sold out")
    orders[payment] = article
    return {"status": "ok"}
