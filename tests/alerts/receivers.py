"""Receivers of alerts on loopback: a web hook that behaves as a test says, and a mail server."""

from __future__ import annotations

import contextlib
import email
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, Envelope, Session

from aftertask.alerts import Alert


class Got:
    """What arrived, and a way to wait for it."""

    def __init__(self) -> None:
        self.all: list[Any] = []
        self._changed = threading.Condition()

    def __call__(self, item: Any) -> None:
        """Something arrives; so this is a channel too."""
        with self._changed:
            self.all.append(item)
            self._changed.notify_all()

    def wait(self, number: int = 1, seconds: float = 10) -> list[Any]:
        """Everything, as soon as there are so many."""
        return self.until(lambda all: len(all) >= number, f"{number} of them", seconds)

    def until(self, enough: Callable[[list[Any]], object], what: str, seconds: float = 10) -> list[Any]:
        """Everything, as soon as that is enough."""
        with self._changed:
            if not self._changed.wait_for(lambda: enough(self.all), seconds):
                raise AssertionError(f"{what} did not arrive in {seconds} s; there are {len(self.all)}: {self.all}")
            return list(self.all)

    @property
    def alerts(self) -> list[Alert]:
        """The same, where they are alerts."""
        return list(self.all)


class Hook:
    """
    A web hook on a free port.

    Attributes:
        answer: How it answers from now on: a status, with headers; `hang` (until `release`), or `reset`.
        got: The requests it took and answered from 200 to 299: path, headers, body.
        tries: Every request, however it was answered.
    """

    def __init__(self) -> None:
        self.answer: int | str | tuple[int, dict[str, str]] = 200
        self.got, self.tries = Got(), Got()
        self.release = threading.Event()
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                answer = hook.answer
                hook.tries(answer)
                if answer == "hang":
                    hook.release.wait(30)
                    self.close_connection = True
                    return
                if answer == "reset":
                    # A linger time of 0 makes the close a reset.
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.close_connection = True
                    return
                status, headers = answer if isinstance(answer, tuple) else (int(answer), {})
                if 200 <= status < 300:
                    hook.got({"path": self.path, "headers": dict(self.headers.items()), "body": body})
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a client that gave up

        self._server = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook/s3cret"

    def alerts(self, number: int = 1) -> list[dict[str, Any]]:
        """The alerts that arrived, once there are so many."""
        return [json.loads(item["body"]) for item in self.got.wait(number)]

    def __enter__(self) -> Hook:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextlib.contextmanager
def mail_server() -> Iterator[tuple[str, Got]]:
    """An SMTP server: its address, and the mails it got."""
    got = Got()

    class Handler:
        async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:
            content = envelope.content
            assert isinstance(content, bytes)
            mail: Message = email.message_from_bytes(content)
            got(mail)
            return "250 OK"

    controller = Controller(Handler(), hostname="127.0.0.1", port=0)
    # It asks its own port whether it is up, and so wants to know it beforehand.
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        controller.port = listener.getsockname()[1]
    controller.start()
    try:
        yield f"127.0.0.1:{controller.port}", got
    finally:
        controller.stop()
