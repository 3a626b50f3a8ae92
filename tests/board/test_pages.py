"""The pages as they are served: what is happening, what failed, why."""

from __future__ import annotations

import re
import threading

import pytest
from opentelemetry.sdk.trace import TracerProvider
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.testclient import TestClient

from aftertask import AftertaskMiddleware, Limit, Policy, Retry, Settings, note, options, progress, task
from aftertask.alerts import Alert
from aftertask.board import Board
from aftertask.testing import VirtualClock
from board.conftest import BoardFor, page, text_of


async def works() -> None:
    """A task that succeeds."""


async def breaks() -> None:
    """A task that fails."""
    raise ConnectionError("mail.internal refused")


def run_id(client: TestClient, **query: str) -> str:
    """The id of the newest run that a query finds."""
    return str(client.get("/board/api/runs", params=query).json()["runs"][0]["id"])


def test_an_empty_board_says_what_to_do(board_for: BoardFor) -> None:
    """Each page has a sentence for the time before the first run."""
    client = board_for()
    assert "Nothing has run yet" in page(client) and "Send a request" in page(client)
    assert "Nothing has run yet" in page(client, "/runs")
    assert "No run that is kept matches" in page(client, "/runs?state=failed")


def test_the_first_page_says_which_task_fails_since_when(board_for: BoardFor) -> None:
    """The failing task comes first, with its share, its error and the time of the first failure."""
    client = board_for(works, breaks)
    for _ in range(3):
        client.get("/")
    text = page(client)
    since = r"1 task failing \S+test_pages\.breaks since \d\d:\d\d:\d\d : "
    assert re.search(since + r"ConnectionError: mail\.internal refused 3 of 6 runs", text)
    assert re.search(r"breaks 3 3 100\.0 %", text) and re.search(r"works 3 0", text)


def test_a_task_that_works_again_fails_no_longer(board_for: BoardFor, clock: VirtualClock) -> None:
    """A success, and five minutes without a failure."""
    broken = [True]

    async def flaky() -> None:
        if broken:
            raise ValueError

    client = board_for(flaky)
    client.get("/")
    broken.clear()
    client.get("/")
    assert "1 task failing" in page(client)
    clock.advance(301)
    client.get("/")
    assert "No task fails now But 1 of 3 runs in the last 10 minutes ended badly" in page(client)
    clock.advance(601)
    client.get("/")
    assert "All tasks work 1 run in the last 10 minutes, none of which ended badly" in page(client)


def test_a_run_shows_its_stack_its_siblings_and_its_request(board_for: BoardFor) -> None:
    """All that is needed to see why it failed."""
    client = board_for(works, breaks)
    client.get("/")
    text = page(client, f"/runs/{run_id(client, state='failed')}")
    assert 'raise ConnectionError("mail.internal refused")' in text
    assert "Same response" in text and "test_pages.works" in text
    assert "GET /" in text and "Attempt 1" in text
    assert text_of(client.get(f"/board/runs/{run_id(client)}").text)


def test_a_run_that_is_tried_again_shows_each_attempt(board_for: BoardFor) -> None:
    """With what it raised, and the back-off between."""
    client = board_for(options(breaks, retry=Retry(attempts=3, wait_initial=0.001, wait_max=0.002)))
    client.get("/")
    text = page(client, f"/runs/{run_id(client)}")
    assert all(f"Attempt {number}" in text for number in (1, 2, 3))
    assert text.count("Back-off") == 2 and "at most 3 attempts" in text


def test_skipped_runs_name_their_cause(board_for: BoardFor) -> None:
    """And lead to the run that failed."""
    client = board_for(breaks, works, on_failure="stop")
    client.get("/")
    response = client.get(f"/board/runs/{run_id(client, state='skipped')}")
    assert "it never started because" in text_of(response.text)
    assert f'href="{run_id(client, state="failed")}"' in response.text


def test_a_run_in_flight_shows_where_it_is_and_how_far(board_for: BoardFor) -> None:
    """Its stack at this moment, its progress, and that it runs."""
    go, begun = threading.Event(), threading.Event()

    def long() -> None:
        progress(3, 10, "thumbnails")
        begun.set()
        go.wait(10)

    client = board_for(long)
    other = threading.Thread(target=client.get, args=("/",))
    other.start()
    try:
        assert begun.wait(10)
        now = page(client)
        assert "Running 1" in now and "3/10 thumbnails" in now
        text = page(client, f"/runs/{run_id(client, state='running')}")
        assert "Where it is now" in text and "go.wait(10)" in text
        assert "3/10 thumbnails" in text
    finally:
        go.set()
        other.join()
    assert run_id(client, state="succeeded")


def test_limits_and_threads_are_listed(board_for: BoardFor) -> None:
    """With their size."""
    client = board_for(options(works, limit=Limit("smtp", 5)))
    client.get("/")
    assert re.search(r"smtp limit 0 5 0", page(client)) and re.search(r"default threads \d+ \d+ 0", page(client))


def test_registered_tasks_are_listed_before_their_first_run(board_for: BoardFor) -> None:
    """A task that never ran can be seen not to run."""

    @task(name="mail.welcome", owner="growth")
    async def welcome() -> None: ...

    assert "mail.welcome growth 0" in page(board_for(works))


def test_hazards_are_shown_with_their_remedy(board_for: BoardFor) -> None:
    """And at the run that has it."""

    def trap() -> object:
        yield 1

    client = board_for(trap)
    client.get("/")
    assert "generator" in page(client) and "loop over it in a function" in page(client)
    assert "loop over it in a function" in page(client, f"/runs/{run_id(client)}")


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("", 4),
        ("?state=failed", 2),
        ("?state=bad", 2),
        ("?state=in_flight", 0),
        ("?q=REFUSED", 2),
        ("?q=nothing", 0),
        ("?limit=3", 3),
        ("?task=*breaks", 2),
        ("?task=breaks", 0),
        ("?task=*breaks&state=succeeded", 0),
    ],
)
def test_filters_are_in_the_address(board_for: BoardFor, query: str, found: int) -> None:
    """A link shows the same to a colleague."""
    client = board_for(works, breaks)
    client.get("/")
    client.get("/")
    assert len(re.findall(r'<tr id="r', client.get(f"/board/runs{query}").text)) == found


def test_pages_of_runs_follow_each_other(board_for: BoardFor) -> None:
    """`Older` leads through all runs, each once."""
    client = board_for(works)
    for _ in range(7):
        client.get("/")
    seen, link = [], "?limit=3"
    while link:
        html = client.get(f"/board/runs{link}").text
        seen += re.findall(r'<tr id="r(.*?)"', html)
        older = re.search(r'href="runs(\?[^"]*before=[^"]*)">Older', html)
        link = older[1].replace("&amp;", "&") if older else ""
    assert len(seen) == len(set(seen)) == 7


def test_nothing_is_sent_if_nothing_has_changed(board_for: BoardFor, clock: VirtualClock) -> None:
    """The script names the state of its page; the answer is empty, or the page."""
    client = board_for(works)
    cursor = re.search(r'data-cursor="(.*?)"', client.get("/board/").text)
    assert cursor is not None
    seen = {"x-aftertask-after": cursor[1]}
    same = client.get("/board/", headers=seen)
    assert (same.status_code, same.content) == (204, b"")
    client.get("/")
    assert "All tasks work" in client.get("/board/", headers=seen).text


def test_links_stay_within_the_mount(board_for: BoardFor) -> None:
    """All are relative: a proxy may serve the app under any path."""
    client = board_for(breaks)
    client.get("/")
    for path in ("/", "/runs", f"/runs/{run_id(client)}", "/nothing/here"):
        links = re.findall(r'(?:href|src|action)="(.*?)"', client.get(f"/board{path}").text)
        assert links and not [link for link in links if link.startswith("/") or "://" in link], path


def test_a_trace_is_a_link_where_there_is_a_template() -> None:
    """`Settings.trace_url`, as in alerts."""

    async def endpoint(request: Request) -> PlainTextResponse:
        return PlainTextResponse("ok", background=BackgroundTask(works))

    settings = Settings(
        registry=CollectorRegistry(), tracer_provider=TracerProvider(), trace_url="https://tempo.example.org/{trace_id}"
    )
    app = Starlette(
        routes=[Route("/", endpoint), Mount("/board", Board(authorize=lambda request: {"view"}))],
        middleware=[Middleware(AftertaskMiddleware, settings=settings)],
    )
    client = TestClient(app)
    client.get("/")
    html = client.get(f"/board/runs/{run_id(client)}").text
    assert re.search(r'href="https://tempo\.example\.org/[0-9a-f]{32}"', html)


def test_runs_of_another_app_are_not_shown(board_for: BoardFor) -> None:
    """A board shows the app that it is mounted in."""
    one, other = board_for(works), board_for(breaks, registry=CollectorRegistry())
    one.get("/"), other.get("/")
    assert "breaks" not in page(one, "/runs") and "works" not in page(other, "/runs")


def test_a_board_mounted_late_records_from_its_first_request(board_for: BoardFor) -> None:
    """The middleware was built without it."""
    client = board_for(works)
    client.get("/")
    late = Board(authorize=lambda request: {"view"})
    client.app.mount("/late", late)  # type: ignore[attr-defined]  # a Starlette app
    assert "Nothing has run yet" in text_of(client.get("/late/").text)
    client.get("/")
    assert "All tasks work" in text_of(client.get("/late/").text)


def test_a_board_without_the_middleware_says_so() -> None:
    """And what to do."""
    client = TestClient(Starlette(routes=[Mount("/board", Board(authorize=lambda request: {"view"}))]))
    response = client.get("/board/")
    assert response.status_code == 503 and "Add it to the app" in response.text


def test_a_policy_is_shown(board_for: BoardFor) -> None:
    """What is in force for the task."""
    client = board_for(works, policies={"*works": Policy(timeout=20, priority=3)})
    client.get("/")
    assert "timeout 20.0 s, priority 3" in page(client, f"/runs/{run_id(client)}")


def test_what_was_noted_is_shown_and_found(board_for: BoardFor) -> None:
    """Whose work a run is."""

    async def noting() -> None:
        note(customer="c-4711")

    client = board_for(noting, works)
    client.get("/")
    assert "customer c-4711" in page(client, f"/runs/{run_id(client, q='C-4711')}")


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_the_board_works_on_either_event_loop(board_for: BoardFor, backend: str) -> None:
    """Its pages, the API and an action."""

    def channel(alert: Alert) -> None: ...

    client = board_for(works, breaks, backend=backend, alerts=[channel])
    client.get("/")
    assert "1 task failing" in page(client) and "breaks" in page(client, "/runs")
    assert "Attempt 1" in page(client, f"/runs/{run_id(client, state='failed')}")
    client.post("/board/channels/channel/test", headers={"sec-fetch-site": "same-origin"}, follow_redirects=False)
    assert "accepted" in page(client)
