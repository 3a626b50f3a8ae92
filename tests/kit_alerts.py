"""Receivers of alerts, an inbox that is a channel and servers on loopback, and the types of the fixtures for alerts."""

from __future__ import annotations

import contextlib
import email
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, Envelope, Session
from prometheus_client import CollectorRegistry
from starlette.testclient import TestClient

from aftertask.alerts import Alert, Alerts
from aftertask.testing import VirtualClock

ClientFor = Callable[..., TestClient]
AlertsFor = Callable[..., Alerts]


class Inbox:
    """What arrived, and a way to wait for it. An inbox is a channel, too."""

    def __init__(self) -> None:
        self.all: list[Any] = []
        self._changed = threading.Condition()

    def __call__(self, item: Any) -> None:
        """Receive an item."""
        with self._changed:
            self.all.append(item)
            self._changed.notify_all()

    def wait(self, count: int = 1, seconds: float = 10) -> list[Any]:
        """Everything that arrived, as soon as there are `count` items."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self.all) >= count, seconds):
                raise AssertionError(f"{len(self.all)} of {count} items arrived in {seconds} s: {self.all}")
            return list(self.all)

    @property
    def alerts(self) -> list[Alert]:
        """The items of an inbox that is a channel."""
        return list(self.all)


class WebhookServer:
    """
    A web server on a free port that receives alerts.

    Attributes:
        answer: What it answers from now on: a status, perhaps with headers; `hang` (until `release` is set); `reset`.
        accepted: The requests that it answered with 200 to 299: path, headers, body.
        attempts: Every request, however it was answered.
    """

    def __init__(self) -> None:
        self.answer: int | str | tuple[int, dict[str, str]] = 200
        self.accepted, self.attempts = Inbox(), Inbox()
        self.release = threading.Event()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                answer = receiver.answer
                receiver.attempts(answer)
                if answer == "hang":
                    receiver.release.wait(30)
                    self.close_connection = True
                    return
                if answer == "reset":
                    # A linger time of 0 makes the close a reset.
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.close_connection = True
                    return
                status, headers = answer if isinstance(answer, tuple) else (int(answer), {})
                if 200 <= status < 300:
                    receiver.accepted({"path": self.path, "headers": dict(self.headers.items()), "body": body})
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a client that gave up

        self._server = Server(("127.0.0.1", 0), Handler, bind_and_activate=False)
        self._server.server_bind()
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook/s3cret"

    def alerts(self, count: int = 1) -> list[dict[str, Any]]:
        """The alerts that arrived, once there are `count`."""
        return [json.loads(item["body"]) for item in self.accepted.wait(count)]

    def __enter__(self) -> WebhookServer:
        # Until here the port is bound, but refuses connections.
        self._server.server_activate()
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextlib.contextmanager
def mail_server() -> Iterator[tuple[str, Inbox]]:
    """An SMTP server: its address, and the mails it received."""
    inbox = Inbox()

    class Handler:
        async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:
            content = envelope.content
            assert isinstance(content, bytes)
            mail: Message = email.message_from_bytes(content)
            inbox(mail)
            return "250 OK"

    controller = Controller(Handler(), hostname="127.0.0.1", port=0)
    # It connects to its own port to see whether it is up, so it needs the number beforehand.
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        controller.port = listener.getsockname()[1]
    controller.start()
    try:
        yield f"127.0.0.1:{controller.port}", inbox
    finally:
        controller.stop()


def counts(registry: CollectorRegistry, channel: str) -> dict[str, float]:
    """`aftertask_alerts_total` of one channel, by status."""
    return {
        sample.labels["status"]: sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "aftertask_alerts_total" and sample.labels["channel"] == channel
    }


def queue_length(registry: CollectorRegistry, channel: str) -> float | None:
    """`aftertask_alert_queue_length` of one channel."""
    return registry.get_sample_value("aftertask_alert_queue_length", {"channel": channel})


def advance_until(clock: VirtualClock, condition: Callable[[], object], what: str, step: float = 1.0) -> None:
    """Advance the clock in steps until a condition holds that other threads bring about."""
    end = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < end, f"{what}: not within 15 s"
        clock.advance(step)
        time.sleep(0.005)  # real time for the other threads
