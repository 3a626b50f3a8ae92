"""Under uvicorn an exception of a task closes the connection, also for other requests on it."""

from __future__ import annotations

from pathlib import Path

import httpx2
import pytest

from live.servers import uvicorn

pytestmark = pytest.mark.long

APPS = Path(__file__).parent / "apps"


@pytest.mark.parametrize("http", ["h11", "httptools"])
@pytest.mark.parametrize("on_failure", ["stop", "continue", "contain"])
@pytest.mark.parametrize("run_after", ["response", "request"])
def test_a_failing_task_kills_another_request_on_its_connection(
    tmp_path: Path, run_after: str, on_failure: str, http: str
) -> None:
    """`contain` saves it; without, the client of the second request gets no answer."""
    log = tmp_path / "log"
    with (
        uvicorn("keepalive:app", APPS, log, "--http", http, ready="/ready", AFTERTASK_RUN_AFTER=run_after) as server,
        httpx2.Client(base_url=server.url, limits=httpx2.Limits(max_connections=1)) as client,
    ):
        assert client.get(f"/first/{on_failure}").status_code == 200
        if on_failure == "contain":
            assert client.get("/second").json() == "ok"
        else:
            with pytest.raises(httpx2.RemoteProtocolError, match="disconnected"):
                client.get("/second")
        assert '"event": "task.failed"' in log.read_text()
