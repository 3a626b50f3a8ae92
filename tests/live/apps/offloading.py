"""A web app and its worker in one module: tasks that run on Celery."""

import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
from datetime import datetime
from pathlib import Path

from celery import Celery, signals
from fastapi import BackgroundTasks, FastAPI
from kombu.utils.objects import cached_property
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from aftertask import AftertaskMiddleware, Retry, Settings, current_run, task
from aftertask.celery import CeleryEngine, instrument_worker

if "OTLP" in os.environ:
    provider = TracerProvider()
    exporter = OTLPSpanExporter(os.environ["OTLP"], timeout=5)
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=200))
    trace.set_tracer_provider(provider)


class SlowCelery(Celery):
    """At its first message it holds a lock of its own for a while, in which the second process of the pool starts."""

    held = threading.Event()
    started = 0

    @cached_property
    def AsyncResult(self) -> object:
        """What `send_task` returns."""
        self.held.set()
        time.sleep(0.5)
        return super().AsyncResult

    @classmethod
    def before_create_process(cls, **_: object) -> None:
        """The first process starts at once."""
        cls.started += 1
        assert cls.started == 1 or cls.held.wait(10)


if "SLOW" in os.environ:
    signals.worker_before_create_process.connect(SlowCelery.before_create_process, weak=False)
celery = (SlowCelery if "SLOW" in os.environ else Celery)("tasks", broker=os.environ["BROKER"])
celery.conf.broker_connection_retry_on_startup = True
celery.conf.worker_soft_shutdown_timeout = 1
if "VISIBILITY" in os.environ:
    celery.conf.broker_transport_options = {
        "visibility_timeout": int(os.environ["VISIBILITY"]),
        **dict.fromkeys(("unacked_restore_interval", "unacked_restore_throttle"), int(os.environ.get("RESTORE", "10"))),
    }
port = os.environ.get("METRICS_PORT")
instrument_worker(celery, metrics_port=None if port is None else int(port))

engine = CeleryEngine(
    celery,
    queues={0: "celery", 10: "bulk"},
    on_unavailable=os.environ.get("ON_UNAVAILABLE", "raise"),  # type: ignore[arg-type]
    deadline=float(os.environ.get("DEADLINE", 1.0)),
)
app = FastAPI()
app.add_middleware(
    AftertaskMiddleware,
    settings=Settings(
        engines={"celery": engine},
        on_failure="contain",
        journal=os.environ.get("JOURNAL"),
        run_ids_header="x-run-ids",
    ),
)
FastAPIInstrumentor.instrument_app(app)

FOLDER = Path(os.environ["FOLDER"])


def note(name: str, text: str) -> None:
    """Append a line to a file that the test reads."""
    with (FOLDER / name).open("a") as file:
        file.write(f"{text}\n")


@task(name="off.mail", executor="celery")
async def mail(address: str, when: datetime) -> None:
    """Succeeds."""
    run = current_run()
    await asyncio.sleep(0)
    note("mail", f"{address} {when.isoformat()} {'' if run is None else run.id} {os.getpid()}")


@task(name="off.bulk", executor="celery", priority=20)
def bulk() -> None:
    """Goes to another queue."""
    note("bulk", "")


@task(name="off.recovering", executor="celery", retry=Retry(attempts=3, wait_initial=0.1))
def recovering() -> None:
    """Succeeds at the third attempt."""
    run = current_run()
    note("recovering", "")
    if run is not None and run.attempt < 3:
        raise ConnectionError("not yet")


@task(name="off.broken", executor="celery", retry=Retry(attempts=2, wait_initial=0.1))
def broken(secret: str) -> None:
    """Fails for good."""
    raise LookupError("for good")


@task(name="off.mended", executor="celery")
def mended() -> None:
    """Fails until the test says so."""
    if not (FOLDER / "go on").exists():
        raise LookupError("not yet")
    note("mended", "")


@task(name="off.slow", executor="celery", timeout=0.5)
async def slow() -> None:
    """Passes its timeout."""
    try:
        await asyncio.sleep(60)
    finally:
        note("slow", "cleaned up")


@task(name="off.stubborn", executor="celery", timeout=0.1)
def stubborn() -> None:
    """Goes on after its timeout, until its process is killed."""
    while True:
        with contextlib.suppress(Exception):
            time.sleep(60)


@task(name="off.killed", executor="celery")
def killed() -> None:
    """Kills its process; not idempotent."""
    note("killed", "")
    os.kill(os.getpid(), signal.SIGKILL)


@task(name="off.killed_once", executor="celery", idempotent=True)
def killed_once() -> None:
    """Kills its process once."""
    first = not (FOLDER / "killed_once").exists()
    note("killed_once", "")
    if first:
        os.kill(os.getpid(), signal.SIGKILL)


@task(name="off.expired", executor="celery", expires=0.001)
def expired() -> None:
    """Never starts in time."""


@task(name="off.order", executor="celery", durable=True, idempotent=True)
def order(number: int) -> None:
    """Durable: on a worker in any case."""
    run = current_run()
    note("order", f"{number} {'' if run is None else run.id}")


def waits_for_word(name: str) -> None:
    """Note the start, and end when the test says so."""
    note(name, "started")
    while not (FOLDER / "go on").exists():
        time.sleep(0.05)
    note(name, "ended")


@task(name="off.once", executor="celery")
def once() -> None:
    """Must not be executed twice."""
    waits_for_word("once")


@task(name="off.again", executor="celery", idempotent=True)
def again() -> None:
    """May be executed twice."""
    waits_for_word("again")


@task(name="off.doomed", executor="celery")
def doomed() -> None:
    """Kills its process when the test says so; not idempotent."""
    waits_for_word("doomed")
    os.kill(os.getpid(), signal.SIGKILL)


class Denied(Exception):
    """Cannot be unpickled: it takes other arguments than it passes on."""

    def __init__(self, order: int, why: str) -> None:
        super().__init__(f"{order}: {why}")


@task(name="off.denied", executor="celery", expected=Denied)
def denied() -> None:
    """Fails as expected."""
    raise Denied(1, "no")


@task(name="off.denied_twice", executor="celery", retry=Retry(attempts=2, wait_initial=0.1))
def denied_twice() -> None:
    """Fails for good, after a retry."""
    raise Denied(2, "no")


@task(name="off.exits", executor="celery", idempotent=True, retry=Retry(attempts=3))
def exits() -> None:
    """Raises what ends a process elsewhere."""
    note("exits", str(os.getpid()))
    sys.exit("enough")


@task(name="off.exits_async", executor="celery")
async def exits_async() -> None:
    """The same, on a loop."""
    note("exits_async", str(os.getpid()))
    sys.exit(3)


@task(name="off.cancels", executor="celery", idempotent=True)
async def cancels() -> None:
    """Raises a `CancelledError` of its own."""
    note("cancels", str(os.getpid()))
    raise asyncio.CancelledError


@task(name="off.named", executor="celery", retry=Retry(attempts=2, wait_initial=0.1))
def named(self: int, args: str, kwargs: dict[str, object], task_id: str) -> None:
    """Has parameters with names of Celery's own; succeeds at the second attempt."""
    run = current_run()
    note("named", f"{self} {args} {kwargs} {task_id}")
    if run is not None and run.attempt == 1:
        raise ConnectionError("not yet")


TASKS = {
    each.__name__: each
    for each in (bulk, mended, recovering, slow, stubborn, killed, killed_once, expired, once, again, doomed)
}


@app.get("/mail/{address}")
async def send_mail(address: str, tasks: BackgroundTasks) -> dict[str, str]:
    """Hand a task over."""
    tasks.add_task(mail, address, when=datetime(2026, 1, 2))
    return {"status": "ok"}


@app.get("/broken")
async def send_broken(tasks: BackgroundTasks) -> dict[str, str]:
    """Hand over a task with a secret."""
    tasks.add_task(broken, "s3cr3t")
    return {"status": "ok"}


@app.get("/order/{number}")
async def place_order(number: int, tasks: BackgroundTasks) -> dict[str, str]:
    """Hand over a durable task."""
    tasks.add_task(order, number)
    return {"status": "ok"}


@app.get("/named")
async def send_named(tasks: BackgroundTasks) -> dict[str, str]:
    """Hand over a task with parameters of any name."""
    tasks.add_task(named, 1, "a", {"__type__": "datetime"}, "t")
    return {"status": "ok"}


@app.get("/run/{name}")
async def send(name: str, tasks: BackgroundTasks) -> dict[str, str]:
    """Hand over a task without arguments."""
    tasks.add_task(TASKS[name])
    return {"status": "ok"}


@app.get("/health/engine")
def health() -> str:
    """The engine's own word."""
    return engine.health().detail
