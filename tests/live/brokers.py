"""Real brokers and real Celery workers: Redis and RabbitMQ on loopback, ended by their own pid."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from live.servers import Server, eventually, free_port, process, program

APPS = Path(__file__).parent / "apps"


def listens(port: int) -> bool:
    """Whether a server accepts connections."""
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def redis(folder: Path, port: int | None = None) -> Iterator[Server]:
    """A Redis that keeps what it gets in the folder, so that it can be stopped and started again."""
    port = port or free_port()
    options = ("--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--appendonly", "yes")
    log = folder / "redis.log"
    with process(program("redis-server"), *options, "--save", "", log=log) as child:
        eventually(lambda: listens(port), what="Redis listening")
        yield Server(f"redis://127.0.0.1:{port}/0", child, log)


@contextlib.contextmanager
def rabbitmq(folder: Path, port: int | None = None) -> Iterator[Server]:
    """A RabbitMQ as `redis`, with a port mapper of its own, because the usual one would outlive the test."""
    program("rabbitmq-server")
    port, mapper, internal = port or free_port(), free_port(), free_port()
    (folder / "enabled_plugins").write_text("[].")
    env = {
        "ERL_EPMD_PORT": str(mapper),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "HOME": str(folder),
        "RABBITMQ_NODENAME": f"test{port}@localhost",
        "RABBITMQ_NODE_PORT": str(port),
        "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
        "RABBITMQ_DIST_PORT": str(internal),
        "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
        "RABBITMQ_LOG_BASE": str(folder / "logs"),
        "RABBITMQ_PID_FILE": str(folder / "pid"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 1:1 +sbwt none",
    }
    log = folder / "rabbitmq.log"
    with process(program("epmd"), "-address", "127.0.0.1", log=folder / "epmd.log", env=env):
        eventually(lambda: listens(mapper), what="Erlang's port mapper listening")
        with process("/usr/lib/rabbitmq/bin/rabbitmq-server", log=log, env=env) as child:
            eventually(lambda: listens(port), seconds=60, what="RabbitMQ listening")
            yield Server(f"amqp://guest:guest@127.0.0.1:{port}//", child, log)


def port_of(broker: Server) -> int:
    """The port of a broker, to start it there again."""
    return urlsplit(broker.url).port or 0


@contextlib.contextmanager
def hanging(broker: Server) -> Iterator[None]:
    """The broker accepts connections, and answers none: all of its processes are stopped."""
    os.killpg(broker.child.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.killpg(broker.child.pid, signal.SIGCONT)


def found(broker: str) -> dict[str, str]:
    """The environment in which the tests' apps find the broker, and are found."""
    return {"BROKER": broker, "PYTHONPATH": str(APPS)}


def send(app: str, broker: str, code: str, **env: str) -> str:
    """Run code of a process that sends messages, where `tasks` is the module of the app; returns what it prints."""
    command, env = [sys.executable, "-c", f"import {app} as tasks\n{code}"], {**os.environ, **found(broker), **env}
    return subprocess.run(command, check=True, env=env, timeout=60, stdout=subprocess.PIPE, text=True).stdout


@contextlib.contextmanager
def worker(app: str, folder: Path, broker: str, *options: str, name: str = "worker", **env: str) -> Iterator[Server]:
    """
    A Celery worker that executes the tasks of `app`, a module beside the tests' apps; ready when it serves its metrics.

    Its metrics are shared in `folder/{name}-metrics`.
    """
    port, shared, log = free_port(), folder / f"{name}-metrics", folder / f"{name}.log"
    shared.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "celery", "-A", app, "worker", "--hostname", f"{name}-{port}@localhost"]
    variables = {"METRICS_PORT": str(port), "PROMETHEUS_MULTIPROC_DIR": str(shared), **found(broker), **env}
    with process(*command, "--loglevel", "INFO", *options, log=log, env=variables) as child:
        server = Server(f"http://127.0.0.1:{port}", child, log)
        eventually(lambda: server.answers("/metrics"), seconds=60, what="the worker being ready")
        yield server
