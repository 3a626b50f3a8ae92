"""Tasks and the transaction of their request, under real servers, with one database connection for all."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest

from kit import tasks_come_first
from live.servers import Server, eventually, free_port, process, uvicorn

pytestmark = [pytest.mark.long, pytest.mark.timeout(90), tasks_come_first]

APPS = Path(__file__).parent / "apps"


def pipelined(server: Server, *paths: str) -> list[bytes]:
    """The statuses of requests that are all sent at once on one connection."""
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
        connection.sendall(
            b"".join(f"POST {path} HTTP/1.1\r\nHost: t\r\nContent-Length: 0\r\n\r\n".encode() for path in paths)
        )
        answer = connection.makefile("rb")
        statuses = []
        for _ in paths:
            statuses.append(answer.readline().split()[1])
            headers = dict(line.lower().split(b": ") for line in iter(answer.readline, b"\r\n"))
            answer.read(int(headers[b"content-length"]))
        return statuses


def seen(server: Server, tasks: int, rows: int) -> dict[str, Any]:
    """What this many tasks saw, once they have ended and this many rows are committed, which may be afterwards."""

    def all_of_them() -> Any:
        found = httpx2.get(f"{server.url}/seen", timeout=10).json()
        return found if (len(found["tasks"]), len(found["rows"])) == (tasks, rows) else None

    return eventually(all_of_them, what="the tasks ending, and the commits")  # type: ignore[no-any-return]  # JSON


@pytest.mark.parametrize("http", ["h11", "httptools"])
def test_two_requests_in_flight_on_one_connection(tmp_path: Path, http: str) -> None:
    """The second is served while the task of the first runs, with the database connection that the first gave back."""
    env = {"SESSIONS_FILE": str(tmp_path / "shop.db"), "AFTERTASK_RUN_AFTER": "request"}
    with uvicorn("sessions:app", APPS, tmp_path / "log", "--http", http, **env) as server:
        assert pipelined(server, "/orders/1", "/orders/2") == [b"200", b"200"]
        assert seen(server, 2, 2) == {
            "tasks": {number: {"alone": False, "rows": [1, 2], "held": 0} for number in ("1", "2")},
            "rows": [1, 2],
        }
        assert "task.hazard" not in server.log.read_text()


@pytest.mark.parametrize("http", ["h11", "httptools"])
def test_by_default_the_second_waits_for_the_connection_in_vain(tmp_path: Path, http: str) -> None:
    """The control: the task of the first request holds the only connection, sees no row, and is reported."""
    env = {"SESSIONS_FILE": str(tmp_path / "shop.db")}
    with uvicorn("sessions:app", APPS, tmp_path / "log", "--http", http, **env) as server:
        assert pipelined(server, "/orders/1", "/orders/2") == [b"200", b"500"]
        assert seen(server, 1, 1) == {"tasks": {"1": {"alone": True, "rows": [], "held": 1}}, "rows": [1]}
        eventually(lambda: '"kind": "runs_before_commit"' in server.log.read_text(), what="the hazard")


SERVERS = [
    pytest.param(("uvicorn", "sessions:app", "--host", "127.0.0.1", "--port"), id="uvicorn"),
    pytest.param(("uvicorn", "sessions:app", "--loop", "uvloop", "--host", "127.0.0.1", "--port"), id="uvicorn-uvloop"),
    pytest.param(("hypercorn", "sessions:app", "--bind"), id="hypercorn-asyncio"),
    pytest.param(("hypercorn", "sessions:app", "-k", "trio", "--bind"), id="hypercorn-trio"),
    pytest.param(("granian", "--interface", "asgi", "sessions:app", "--host", "127.0.0.1", "--port"), id="granian"),
]


@pytest.mark.parametrize("command", SERVERS)
@pytest.mark.parametrize("run_after", ["response", "request"])
def test_every_server(tmp_path: Path, command: tuple[str, ...], run_after: str) -> None:
    """After the request two tasks see their rows at once, and a failing one loses none; by default it loses its own."""
    port = free_port()
    env = {"SESSIONS_FILE": str(tmp_path / "shop.db"), "AFTERTASK_RUN_AFTER": run_after, "PYTHONPATH": str(APPS)}
    where = f"127.0.0.1:{port}" if command[-1] == "--bind" else str(port)
    with process(sys.executable, "-m", *command, where, log=tmp_path / "log", env=env) as child:
        server = Server(f"http://127.0.0.1:{port}", child, tmp_path / "log")
        eventually(lambda: server.answers("/seen"), what="the server answering")
        assert httpx2.post(f"{server.url}/orders/3?fail=true", timeout=20).status_code == 200
        eventually(lambda: '"event": "task.failed"' in server.log.read_text(), what="the failure")
        if run_after == "response":
            eventually(lambda: '"kind": "undoes_request"' in server.log.read_text(), what="the hazard")
            assert httpx2.get(f"{server.url}/seen", timeout=20).json()["rows"] == []
            return
        for number in (1, 2):
            assert httpx2.post(f"{server.url}/orders/{number}", timeout=20).status_code == 200
        found = seen(server, 2, 3)
        assert found["rows"] == [1, 2, 3]
        assert [(task["alone"], task["rows"], task["held"]) for task in found["tasks"].values()] == [
            (False, [1, 2, 3], 0)
        ] * 2
        assert "task.hazard" not in server.log.read_text()
