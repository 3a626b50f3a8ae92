"""A Celery app with tasks of the usual kind, none of which knows of aftertask; spans go to `OTLP`."""

import logging
import os
import signal
import time
from dataclasses import replace

from celery import Celery
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from aftertask import Settings, current_run, note
from aftertask.celery import instrument_worker

if "OTLP" in os.environ:
    provider = TracerProvider()
    # Longer than a test: only a flush brings a span here.
    exporter = OTLPSpanExporter(os.environ["OTLP"], timeout=5)
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=600_000))
    trace.set_tracer_provider(provider)

app = Celery("tasks", broker=os.environ["BROKER"])
app.conf.task_ignore_result = True
app.conf.worker_soft_shutdown_timeout = 1
app.conf.broker_connection_retry_on_startup = True
port = os.environ.get("METRICS_PORT")
settings = replace(Settings.from_env(), redact=lambda text: text.replace("4711", "[id]"))
instrument_worker(app, metrics_port=None if port is None else int(port), settings=settings)


@app.task
def add(x, y):
    """Succeeds."""
    return x + y


@app.task
def noting():
    """Notes whose work it is."""
    note(customer="c-4711")
    logging.warning("noted %s", current_run().notes)


@app.task
def broken():
    """Fails."""
    raise LookupError("secret=42")


class Denied(Exception):
    """Cannot be unpickled: it takes other arguments than it passes on."""

    def __init__(self, order, why):
        super().__init__(f"{order}: {why}")


@app.task(bind=True, max_retries=1)
def denied(self):
    """Fails twice."""
    try:
        raise Denied(1, "no")
    except Denied as error:
        raise self.retry(exc=error, countdown=0) if not self.request.retries else error from None


@app.task(bind=True, max_retries=2)
def recovering(self):
    """Succeeds at the third attempt."""
    if self.request.retries < 2:
        raise self.retry(exc=ConnectionError("not yet"), countdown=0)


@app.task(soft_time_limit=1)
def slow():
    """Passes its soft limit."""
    time.sleep(60)


@app.task(time_limit=1)
def stubborn():
    """Passes its hard limit."""
    time.sleep(60)


@app.task
def killed():
    """Kills its process."""
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(acks_late=True, reject_on_worker_lost=True)
def killed_once(path):
    """Kills its process once, and succeeds when it is delivered again."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(acks_late=True, acks_on_failure_or_timeout=False, time_limit=1)
def stubborn_once(path):
    """Passes its hard limit once, and succeeds when it is delivered again."""
    if not os.path.exists(path):
        open(path, "w").close()
        time.sleep(60)


@app.task
def calling():
    """Calls another task in its own process, which fails there."""
    broken.apply()
