"""Adds to every message that this process sends when it was scheduled, and the span that sent it."""

from __future__ import annotations

from typing import Any

from celery import Celery, signals
from kombu.connection import Connection
from opentelemetry.trace import TracerProvider

from .. import _clock
from .._taskrun import running
from ..signals.messaging import Sending, current_carrier
from .header import NAME, VERSION

#: The queue for messages that no worker will execute: failed for good, or not understood.
DEAD = "aftertask.dead"

#: Options of a message: what Celery shows in place of its arguments.
REDACTED = dict.fromkeys(("argsrepr", "kwargsrepr"), "<redacted>")

#: What kombu calls a transport, as `messaging.system` names the broker.
_SYSTEMS = {"amqp": "rabbitmq", "sqs": "aws_sqs", "gcpubsub": "gcp_pubsub", "azureservicebus": "servicebus"}


def system_of(app: Celery) -> str:
    """The broker's name, such as `redis` or `rabbitmq`; does not connect."""
    kind = str(app.connection_for_write().transport.driver_type)
    return _SYSTEMS.get(kind, kind)


def connect(app: Celery, system: str, deadline: float) -> Connection:
    """A connection that gives up after this many seconds, whatever the app's settings are."""
    limits = dict.fromkeys(("socket_timeout", "socket_connect_timeout"), deadline)
    if system == "rabbitmq":
        limits = dict.fromkeys(("read_timeout", "write_timeout"), deadline)
        limits["confirm_publish"] = True  # or a message that RabbitMQ did not take would count as sent
    connection: Connection = app.connection_for_write(connect_timeout=deadline, transport_options=limits)
    connection.ensure_connection(max_retries=1, interval_start=0, timeout=deadline)  # type: ignore[no-untyped-call]
    return connection


Headers = dict[str, Any]


class Publishing:
    """
    Listens to what one process sends through Celery.

    Args:
        app: The Celery app; names the broker.
        tracer_provider: Where PRODUCER spans go; None means the global provider.
        spans: Whether to make them.
    """

    def __init__(self, app: Celery, tracer_provider: TracerProvider | None, *, spans: bool) -> None:
        self.sending = Sending(tracer_provider)
        self.system, self._spans = system_of(app), spans
        signals.before_task_publish.connect(self._before, weak=False)
        signals.after_task_publish.connect(self._after, weak=False)

    def _before(
        self, sender: object, headers: Headers, properties: Headers, routing_key: str, exchange: str, **_: object
    ) -> None:
        queue = routing_key or exchange
        if "id" not in headers or queue == DEAD:  # protocol 1 has no headers
            return
        header = dict(headers.get(NAME) or {"v": VERSION, "scheduled_at": _clock.timestamp()})
        run = running.get()
        if run is not None and run.id == headers["id"] and run.engine != "local" and "first" not in header:
            header["first"] = current_carrier()  # it is sent again by its own attempt: a retry
        if self._spans and (carrier := self.sending.begin(queue, self.system, str(sender), headers["id"])):
            header["carrier"] = carrier
        headers[NAME] = header
        if "signature" in header:
            properties.pop("expiration", None)  # RabbitMQ would drop an expired run before a worker can count it

    def _after(self, **_: object) -> None:
        self.sending.end()


_installed: list[Publishing] = []


def observe_publishing(app: Celery, tracer_provider: TracerProvider | None, *, spans: bool = True) -> Publishing:
    """The listener to this process's messages; the first call decides its options."""
    if not _installed:
        _installed.append(Publishing(app, tracer_provider, spans=spans))
    return _installed[0]
