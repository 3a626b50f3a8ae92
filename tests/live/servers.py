"""Real servers for the tests: uvicorn, Prometheus, a receiver of OTLP spans; on loopback, ended by their own pid."""

from __future__ import annotations

import contextlib
import gzip
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx2
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

T = TypeVar("T")


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def eventually(look: Callable[[], T], *, seconds: float = 20, what: str = "it") -> T:
    """What `look` returns as soon as that is true; fails with the last answer or error after these seconds."""
    end, last = time.monotonic() + seconds, None
    while time.monotonic() < end:
        try:
            last = look()
            if last:
                return last
        except (httpx2.HTTPError, AssertionError, LookupError) as error:
            last = error  # type: ignore[assignment]  # for the message
        time.sleep(0.05)  # between two looks at a real condition
    raise AssertionError(f"{what} did not happen in {seconds} s; the last look gave {last!r}")


@contextlib.contextmanager
def process(
    *command: str, log: Path, env: dict[str, str] | None = None, user: str | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A child whose output goes to `log`; ended by SIGTERM, and if that does not help in ten seconds, killed."""
    with log.open("wb") as output:
        child = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            start_new_session=True,
            user=user,
            cwd=log.parent if user else None,
        )
    try:
        yield child
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        # Its workers would outlive it. The group is the child's own: it was started in a session of its own.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


class Server:
    """A running server: its address, its process and what it wrote."""

    def __init__(self, url: str, child: subprocess.Popen[bytes], log: Path) -> None:
        self.url, self.child, self.log = url, child, log

    def answers(self, path: str) -> bool:
        """Whether it answers; fails at once where it has ended."""
        if self.child.poll() is not None:
            pytest.fail(f"the server ended with code {self.child.returncode}:\n{self.log.read_text()}")
        return httpx2.get(self.url + path, timeout=2).status_code < 500


@contextlib.contextmanager
def uvicorn(
    app: str, folder: Path, log: Path, *options: str, ready: str = "/metrics", seconds: float = 20, **env: str
) -> Iterator[Server]:
    """A uvicorn in a process of its own, which serves `module:app` from a folder, and answers within these seconds."""
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", app, "--app-dir", str(folder), "--host", "127.0.0.1"]
    with process(*command, "--port", str(port), "--log-level", "warning", *options, log=log, env=env) as child:
        server = Server(f"http://127.0.0.1:{port}", child, log)
        eventually(lambda: server.answers(ready), seconds=seconds, what="uvicorn answering")
        yield server


def scrape(server: Server) -> list[Metric]:
    """The families of aftertask that a server shows; a response may come from a worker that has yet to start."""
    text = httpx2.get(f"{server.url}/metrics", timeout=40).text
    return [family for family in text_string_to_metric_families(text) if family.name.startswith("aftertask_")]


def values(server: Server, name: str, **labels: str) -> list[float]:
    """The values of all samples with these labels."""
    return [
        sample.value
        for family in scrape(server)
        for sample in family.samples
        if sample.name == f"aftertask_{name}" and labels.items() <= sample.labels.items()
    ]


def value(server: Server, name: str, **labels: str) -> float:
    """The sum of these values; fails if there is none."""
    found = values(server, name, **labels)
    assert found, f"no sample aftertask_{name} with {labels}"
    return sum(found)


def program(name: str, path: str | None = None) -> str:
    """A server's program, also on another path; its absence is a failure where servers are required, else a skip."""
    if (path := shutil.which(name, path=path)) is None:
        word = f"no {name} here; .ci/run names Debian's packages"
        if os.environ.get("AFTERTASK_TEST_REQUIRE_SERVERS"):
            pytest.fail(word)
        pytest.skip(word)
    return path


@contextlib.contextmanager
def daemon(name: str, folder: Path, *options: str) -> Iterator[Server]:
    """A server of Prometheus's kind on a port of its own, its log in the folder."""
    port, log = free_port(), folder / f"{name}.log"
    command = [program(name), *options, f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
    with process(*command, log=log) as child:
        server = Server(f"http://127.0.0.1:{port}", child, log)
        eventually(lambda: server.answers("/-/ready"), what=f"{name} being ready")
        yield server


@contextlib.contextmanager
def prometheus_with(folder: Path, config: str) -> Iterator[Server]:
    """A Prometheus with this configuration, which keeps exemplars."""
    path = folder / "prometheus.yml"
    path.write_text(config)
    options = (f"--config.file={path}", f"--storage.tsdb.path={folder / 'tsdb'}", "--enable-feature=exemplar-storage")
    with daemon("prometheus", folder, *options) as server:
        yield server


@contextlib.contextmanager
def prometheus(folder: Path, *targets: str) -> Iterator[Server]:
    """A Prometheus that scrapes these addresses every second."""
    addresses = ", ".join(f"'{target.removeprefix('http://')}'" for target in targets)
    config = (
        "global: {scrape_interval: 1s, scrape_timeout: 1s}\n"
        f"scrape_configs:\n  - job_name: shop\n    static_configs: [{{targets: [{addresses}]}}]\n"
    )
    with prometheus_with(folder, config) as server:
        yield server


class Receiver:
    """Takes what is posted to it; `url` says where."""

    def __init__(self) -> None:
        take = self.take

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                take(gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body)
                self.send_response(200)
                self.send_header("content-type", self.headers.get("content-type", "text/plain"))
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def take(self, body: bytes) -> None:
        """What was posted."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Spans(Receiver):
    """A receiver of OTLP over HTTP that keeps the spans it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.spans: list[Any] = []

    def take(self, body: bytes) -> None:
        """Spans, of however many resources and scopes."""
        request = ExportTraceServiceRequest.FromString(body)
        self.spans.extend(span for r in request.resource_spans for s in r.scope_spans for span in s.spans)

    def trace_ids(self) -> set[str]:
        """The traces that were seen."""
        return {span.trace_id.hex() for span in self.spans}
