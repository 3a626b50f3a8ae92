"""`GET /metrics` over real HTTP: formats, encodings, HEAD, root paths, and apps with a /metrics of their own."""

from __future__ import annotations

import gzip
import http.client
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families as text_families

from live.servers import Server, eventually, uvicorn

pytestmark = [pytest.mark.long, pytest.mark.timeout(60)]

HERE = Path(__file__).parent
SHOP = HERE.parents[1] / "examples" / "shop"

#: What Prometheus 2.42 sends.
PROMETHEUS = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)
#: What Prometheus 3 sends.
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A shop that has served three orders, whose tasks have all finished."""
    log = tmp_path_factory.mktemp("shop") / "log"
    # It makes spans and sends them nowhere, even if the environment of the test run has an endpoint.
    with uvicorn("app:app", SHOP, log, OTEL_EXPORTER_OTLP_ENDPOINT="") as server:
        for number in range(3):
            assert httpx2.post(f"{server.url}/orders/{number}").status_code == 200
        eventually(lambda: len(lines(server)) == 12, what="all tasks' log lines")
        yield server


def lines(server: Server) -> list[dict[str, Any]]:
    """The log lines of runs."""
    found = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    return [line for line in found if line["event"].startswith("task.")]


def succeeded(families: Any) -> float:
    """Number of runs that succeeded, by a scrape."""
    return sum(
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == "aftertask_tasks_finished_total" and sample.labels["outcome"] == "succeeded"
    )


@pytest.mark.parametrize("accept", [None, "*/*", "text/plain", "text/html,application/xhtml+xml,*/*;q=0.8"])
def test_text_by_default(shop: Server, accept: str | None) -> None:
    """Text is the default, also for a browser."""
    answer = httpx2.get(f"{shop.url}/metrics", headers={"accept": accept} if accept else None)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert " # {" not in answer.text
    assert succeeded(text_families(answer.text)) == 12


@pytest.mark.parametrize("accept", [PROMETHEUS, PROMETHEUS_3, "application/openmetrics-text"])
def test_openmetrics_on_request_with_exemplars(shop: Server, accept: str) -> None:
    """A strict parser accepts it; each exemplar's ids are those of a run that was logged."""
    answer = httpx2.get(f"{shop.url}/metrics", headers={"accept": accept})
    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=")
    assert "Accept" in answer.headers["vary"]
    families = list(openmetrics_families(answer.text))
    assert succeeded(families) == 12
    exemplars: dict[str, set[tuple[str, str]]] = {}
    for family in families:
        for sample in family.samples:
            if sample.exemplar is not None:
                ids = sample.exemplar.labels["trace_id"], sample.exemplar.labels["span_id"]
                exemplars.setdefault(family.name, set()).add(ids)
    logged = {(line["trace_id"], line["span_id"]) for line in lines(shop)}
    assert set(exemplars) == {
        "aftertask_queue_wait_seconds",
        "aftertask_attempt_duration_seconds",
        "aftertask_end_to_end_seconds",
    }
    assert all(found <= logged for found in exemplars.values())


@pytest.mark.parametrize(
    ("encoding", "zipped"),
    [(None, False), ("gzip", True), ("deflate, gzip;q=1.0", True), ("gzip;q=0", False), ("identity", False)],
)
def test_gzip_on_request(shop: Server, encoding: str | None, zipped: bool) -> None:
    """The bytes on the wire are compressed, and the length is theirs."""
    raw = request(shop, "GET", "/metrics", {"accept-encoding": encoding} if encoding else {})
    assert (raw.headers.get("content-encoding") == "gzip") is zipped
    assert int(raw.headers["content-length"]) == len(raw.body)
    text = (gzip.decompress(raw.body) if zipped else raw.body).decode()
    assert succeeded(text_families(text)) == 12


class Raw:
    """A response as it was on the wire."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status, self.headers, self.body = response.status, response.headers, response.read()


def request(server: Server, method: str, path: str, headers: dict[str, str] | None = None) -> Raw:
    """One request on a connection of its own, with these headers only."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=10)
    try:
        connection.putrequest(method, path, skip_accept_encoding=True)
        for name, value in (headers or {}).items():
            connection.putheader(name, value)
        connection.endheaders()
        return Raw(connection.getresponse())
    finally:
        connection.close()


@pytest.mark.parametrize("implementation", ["h11", "httptools"])
def test_head_has_no_body_and_leaves_the_connection_usable(tmp_path: Path, implementation: str) -> None:
    """Under both of uvicorn's HTTP implementations: GET, HEAD, GET on one connection."""
    if implementation == "httptools":
        pytest.importorskip("httptools")
    with uvicorn("own:catch_all", HERE / "apps", tmp_path / "log", "--http", implementation) as server:
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=10)
        connection.connect()
        sock = connection.sock
        for method in ("GET", "HEAD", "GET"):
            connection.request(method, "/metrics")
            response = connection.getresponse()
            body = response.read()
            assert response.status == 200
            assert response.headers["content-type"].startswith("text/plain")
            assert (body == b"") is (method == "HEAD")
            assert int(response.headers["content-length"]) > 0
            assert connection.sock is sock, "the connection was closed"
        connection.close()
        assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_other_methods_belong_to_the_app(shop: Server, method: str) -> None:
    """The app has no such route, so it responds 404."""
    assert httpx2.request(method, f"{shop.url}/metrics").status_code == 404


def test_an_app_keeps_its_own(tmp_path: Path) -> None:
    """A route of that very path is the app's."""
    with uvicorn("own:own", HERE / "apps", tmp_path / "log") as server:
        assert httpx2.get(f"{server.url}/metrics").json() == "theirs"


def test_an_app_inside_keeps_its_own(tmp_path: Path) -> None:
    """Also if the middleware is around the app rather than part of it."""
    with uvicorn("own:wrapped", HERE / "apps", tmp_path / "log") as server:
        assert httpx2.get(f"{server.url}/metrics").json() == "theirs"


def test_a_catch_all_does_not_take_the_path(tmp_path: Path) -> None:
    """An app that serves every path still has metrics; all other paths are its own."""
    with uvicorn("own:catch_all", HERE / "apps", tmp_path / "log") as server:
        assert "aftertask_build_info" in httpx2.get(f"{server.url}/metrics").text
        assert httpx2.get(f"{server.url}/metrics/more").json() == "page metrics/more"
        assert httpx2.get(f"{server.url}/sub/metrics").json() == "page sub/metrics"


def test_under_a_root_path(tmp_path: Path) -> None:
    """Behind a proxy that strips the prefix, the path is relative to it."""
    with uvicorn("own:own", HERE / "apps", tmp_path / "own", "--root-path", "/api") as server:
        assert httpx2.get(f"{server.url}/metrics").json() == "theirs"
    with uvicorn("own:catch_all", HERE / "apps", tmp_path / "log", "--root-path", "/api") as server:
        assert "aftertask_build_info" in httpx2.get(f"{server.url}/metrics").text
        assert httpx2.get(f"{server.url}/api/metrics").json() == "page api/metrics"


def test_inside_a_middleware_that_compresses(tmp_path: Path) -> None:
    """A compressed scrape is not compressed again, and one without `Accept-Encoding` stays as it is."""
    with uvicorn("own:compressed", HERE / "apps", tmp_path / "log") as server:
        zipped = request(server, "GET", "/metrics", {"accept-encoding": "gzip"})
        assert zipped.headers.get_all("content-encoding") == ["gzip"]
        assert b"aftertask_build_info" in gzip.decompress(zipped.body)
        assert b"aftertask_build_info" in request(server, "GET", "/metrics").body


def test_many_scrapes_at_once(shop: Server) -> None:
    """Each is complete and has the same values in either format, and the app responds meanwhile."""

    def scrape(number: int) -> float:
        if number % 2:
            answer = httpx2.get(f"{shop.url}/metrics", headers={"accept": PROMETHEUS}, timeout=20)
            return succeeded(openmetrics_families(answer.text))
        return succeeded(text_families(httpx2.get(f"{shop.url}/metrics", timeout=20).text))

    with ThreadPoolExecutor(20) as pool:
        scrapes = pool.map(scrape, range(60))
        # This page has no task, so that the metrics do not change.
        pages = list(pool.map(lambda _: httpx2.get(f"{shop.url}/openapi.json", timeout=20).status_code, range(10)))
        assert list(scrapes) == [12] * 60
    assert pages == [200] * 10


def test_a_scrape_is_not_a_request_to_the_app(shop: Server) -> None:
    """The middleware responds to it: no task, no log line, no route."""
    before = len(lines(shop))
    for _ in range(5):
        assert httpx2.get(f"{shop.url}/metrics").status_code == 200
    assert len(lines(shop)) == before
