"""A mistake in the settings, under servers that start all the same."""

from __future__ import annotations

import sys
from pathlib import Path

import httpx2
import pytest

from live.servers import eventually, free_port, process

pytestmark = [pytest.mark.long, pytest.mark.timeout(90)]

APP = """
from fastapi import FastAPI
from aftertask import AftertaskMiddleware

app = FastAPI()
app.add_middleware(AftertaskMiddleware)
"""
STRICT = """
from uvicorn_worker import UvicornWorker


class Strict(UvicornWorker):
    CONFIG_KWARGS = {**UvicornWorker.CONFIG_KWARGS, "lifespan": "on"}
"""
LINE = "aftertask: the app cannot serve requests: ValueError: AFTERTASK_THREAD_LIMIT='some'"


def commands(folder: Path, port: int) -> dict[str, list[str]]:
    """How each server is started; a strict one ends with the mistake."""
    uvicorn = [sys.executable, "-m", "uvicorn", "main:app", "--app-dir", str(folder), "--port", str(port)]
    gunicorn = [sys.executable, "-m", "gunicorn", "main:app", "--chdir", str(folder), "--bind", f"127.0.0.1:{port}"]
    return {
        "uvicorn": uvicorn,
        "uvicorn strict": [*uvicorn, "--lifespan", "on"],
        "gunicorn": [*gunicorn, "-k", "uvicorn_worker.UvicornWorker"],
        "gunicorn strict": [*gunicorn, "-k", "worker.Strict"],
    }


@pytest.mark.parametrize("server", ["uvicorn", "gunicorn"])
def test_a_server_that_hides_a_mistake_does_not_hide_its_line(server: str, tmp_path: Path) -> None:
    """It answers with 500; the mistake is one line in its output, however often it is asked."""
    (tmp_path / "main.py").write_text(APP)
    port, log = free_port(), tmp_path / "log"
    url = f"http://127.0.0.1:{port}/docs"
    with process(*commands(tmp_path, port)[server], log=log, env={"AFTERTASK_THREAD_LIMIT": "some"}):
        eventually(lambda: httpx2.get(url, timeout=10).status_code == 500, seconds=40, what="an answer")
        assert httpx2.get(url, timeout=10).status_code == 500
    assert log.read_text().count(LINE) == 1


@pytest.mark.parametrize("server", ["uvicorn strict", "gunicorn strict"])
def test_a_strict_server_refuses_to_start(server: str, tmp_path: Path) -> None:
    """The two ways that the line and docs/settings.md name."""
    (tmp_path / "main.py").write_text(APP)
    (tmp_path / "worker.py").write_text(STRICT)
    log = tmp_path / "log"
    command = commands(tmp_path, free_port())[server]
    with process(*command, log=log, env={"AFTERTASK_THREAD_LIMIT": "some"}) as child:
        assert child.wait(40) == 3
    assert log.read_text().count(LINE) == 1
