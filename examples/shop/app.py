"""
A small shop, for the demo and the tests: orders, mails, reports, thumbnails, some of them faulty.

Every request is responded to at once; aftertask shows what happens then. Run it with `make demo`, or by hand:

    uvicorn app:app --app-dir examples/shop
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncIterator

from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, Response
from fastapi.responses import JSONResponse, StreamingResponse
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from starlette.background import BackgroundTask

from aftertask import AftertaskMiddleware, task
from aftertask.board import Board


class CardDeclined(Exception):
    """A normal event in a shop."""


class MailServerDown(Exception):
    """An outage."""


class CarrierDown(Exception):
    """Another one."""


@task(name="orders.charge_card", owner="payments", expected=CardDeclined)
async def charge_card(order: int, fault: str | None) -> None:
    """Take 20 ms. A declined card is expected; a payment client that gives up cancels the whole call."""
    await asyncio.sleep(0.02)
    if fault == "cancelled" and (call := asyncio.current_task()):
        call.cancel()
        await asyncio.sleep(0)
    if fault == "declined":
        raise CardDeclined(f"order {order}: card 4111 1111 1111 1111 was declined")


@task(name="mail.receipt", owner="growth")
async def send_receipt(order: int, fault: str | None) -> None:
    """Take 10 ms. With a broken mail server it fails, and the tasks after it are skipped."""
    await asyncio.sleep(0.01)
    if fault == "mail":
        raise MailServerDown("smtp://shop:hunter2@mail.internal refused ada@example.org")


@task(name="stock.reserve", owner="logistics")
def reserve_stock(order: int) -> None:
    """A sync task: runs in a thread."""
    time.sleep(0.005)


@task(name="media.thumbnail", owner="media")
def make_thumbnail(image: int) -> None:
    """Keep a processor busy for a moment."""
    hashlib.pbkdf2_hmac("sha256", b"image %d" % image, b"salt", 20_000)


@task(name="reports.build", owner="finance")
async def build_report(seconds: float) -> None:
    """Take this many seconds, so that something is always in flight."""
    await asyncio.sleep(seconds)


#: Whether the parcel service answers; `POST /carrier` changes it.
carrier = {"up": True}


# Durable needs a journal: `make demo` sets AFTERTASK_JOURNAL.
@task(name="parcels.book", owner="logistics", durable="AFTERTASK_JOURNAL" in os.environ)
async def book_parcel(order: int, to: str) -> None:
    """Fail while the carrier is down: the run is a dead letter then, and a replay succeeds once it is up again."""
    await asyncio.sleep(0.01)
    if not carrier["up"]:
        raise CarrierDown("https://carrier.internal/parcels did not respond")


async def audit(what: str) -> None:
    """A task that is not registered."""


async def notify(order: int) -> None:
    """Another one that is not registered."""


def tracing() -> TracerProvider:
    """Spans go to OTEL_EXPORTER_OTLP_ENDPOINT; without it they only give logs and exemplars their ids."""
    provider = TracerProvider(resource=Resource.create({"service.name": "shop"}))
    if os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(), schedule_delay_millis=500))
    return provider


trace.set_tracer_provider(tracing())
app = FastAPI(title="shop")
app.add_middleware(AftertaskMiddleware)


@app.post("/orders/{order}")
async def place_order(order: int, tasks: BackgroundTasks, fault: str | None = None) -> dict[str, str]:
    """Reserve, send the receipt, charge, notify: one after another, and the first failure skips the rest."""
    tasks.add_task(reserve_stock, order)
    tasks.add_task(send_receipt, order, fault)
    tasks.add_task(charge_card, order, fault)
    tasks.add_task(notify, order)
    if fault == "sold_out":
        raise HTTPException(409, "sold out")
    if fault == "bug":
        raise KeyError("price")
    return {"status": "ok"}


@app.post("/parcels/{order}")
async def send_parcel(order: int, tasks: BackgroundTasks) -> dict[str, str]:
    """A task that no crash may lose."""
    tasks.add_task(book_parcel, order, f"customer {order}")
    return {"status": "ok"}


@app.post("/carrier")
async def change_carrier(up: bool) -> dict[str, bool]:
    """The carrier goes down, or comes back."""
    carrier["up"] = up
    return carrier


def audited(tasks: BackgroundTasks) -> None:
    """A dependency that adds a task, before the request turns out to be invalid."""
    tasks.add_task(audit, "search")


@app.get("/search")
async def search(limit: int, _: None = Depends(audited)) -> list[str]:
    """`limit` must be a number."""
    return ["hat", "scarf"][:limit]


@app.post("/images/{image}")
def upload(image: int, tasks: BackgroundTasks, sizes: int = 3) -> dict[str, int]:
    """A sync endpoint with sync tasks."""
    for _ in range(sizes):
        tasks.add_task(make_thumbnail, image)
    return {"sizes": sizes}


@app.post("/reports")
async def report(seconds: float = 0.2) -> Response:
    """A task on the response itself."""
    return JSONResponse({"status": "building"}, background=BackgroundTask(build_report, seconds))


@app.get("/export")
async def export(tasks: BackgroundTasks) -> StreamingResponse:
    """A stream; its task waits until the last byte has been sent, which is not queue wait."""

    async def rows() -> AsyncIterator[str]:
        for number in range(5):
            await asyncio.sleep(0.01)
            yield f"{number}\n"

    tasks.add_task(audit, "export")
    return StreamingResponse(rows())


@app.get("/invoices/{order}")
async def invoice(order: int) -> StreamingResponse:
    """A stream that carries a task itself."""

    async def pages() -> AsyncIterator[str]:
        yield f"invoice for order {order}\n"

    return StreamingResponse(pages(), background=BackgroundTask(audit, "invoice"))


@app.delete("/orders/{order}")
async def cancel_order(order: int, tasks: BackgroundTasks) -> Response:
    """The trap: a response with a background of its own, so that the injected task is dropped."""
    tasks.add_task(notify, order)
    return JSONResponse({"status": "cancelled"}, background=BackgroundTask(audit, "cancel"))


admin = FastAPI(title="shop admin")


@admin.post("/reindex")
async def reindex(tasks: BackgroundTasks) -> dict[str, str]:
    """A mounted app is observed, too."""
    tasks.add_task(audit, "reindex")
    return {"status": "ok"}


app.mount("/admin", admin)
# For the demo: open to this machine only. An app of yours says who may: Board(authorize=…).
app.mount("/aftertask", Board(insecure=True))
