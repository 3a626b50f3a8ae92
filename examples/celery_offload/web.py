"""
A web app whose heavy task runs on Celery: the call site is that of any background task, and both sides emit the same.

    python examples/celery_offload/run.py      # web app, two workers and Redis, with traffic; or: make demo-celery
"""

import asyncio
import os
import random

import structlog
from celery import Celery
from fastapi import BackgroundTasks, FastAPI
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from aftertask import AftertaskMiddleware, Retry, Settings, task
from aftertask.board import Board
from aftertask.celery import CeleryEngine, instrument_worker

# Ids of traces for the log lines; add an exporter to see the spans themselves.
trace.set_tracer_provider(TracerProvider())
structlog.configure(processors=[structlog.contextvars.merge_contextvars, structlog.processors.JSONRenderer()])

celery = Celery("shop", broker=os.environ.get("BROKER", "redis://127.0.0.1:6379/0"))
celery.conf.update(broker_transport_options={"socket_timeout": 30}, worker_prefetch_multiplier=1)
port = os.environ.get("METRICS_PORT")
instrument_worker(celery, metrics_port=None if port is None else int(port))

app = FastAPI()
engine = CeleryEngine(celery, on_unavailable="local")
app.mount("/aftertask", Board(insecure=True))  # for this machine only
app.add_middleware(AftertaskMiddleware, settings=Settings(engines={"celery": engine}, run_after="request"))


@task(name="invoices.render", executor="celery", timeout=10, retry=Retry(attempts=3, wait_initial=0.2), idempotent=True)
async def render_invoice(order: int) -> None:
    """On a worker; now and then the printer does not answer, and the worker tries again."""
    await asyncio.sleep(0.05)
    if random.random() < 0.2:
        raise ConnectionError("the printer does not answer")


@task(name="mail.receipt")
async def send_receipt(order: int) -> None:
    """In this process, as ever."""
    await asyncio.sleep(0.01)


@app.post("/orders/{order}")
async def place(order: int, tasks: BackgroundTasks) -> dict[str, str]:
    """Both tasks are added in the same way."""
    tasks.add_task(send_receipt, order)
    tasks.add_task(render_invoice, order)
    return {"status": "ok"}
