"""The board of an app with a journal: all workers, history, dead letters, cancellation."""

from __future__ import annotations

import functools
import json
import os
import re
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from starlette.testclient import TestClient

from aftertask import Retry, current_run, get_run, note, options, progress, task
from aftertask.journal import rows
from aftertask.journal.file import connect
from board.conftest import SAME, BoardFor, page
from live.servers import eventually

#: What the carrier does to parcels: an error, or None if it takes them.
carrier: list[Exception | None] = [None]


async def book(number: int = 7, note: str = "fragile") -> None:
    """Fails as long as the carrier does."""
    if carrier[0] is not None:
        raise carrier[0]


@task(name="totals.sum")
async def total() -> dict[str, int]:
    """A task with a result that is kept."""
    return {"sum": 42}


async def works() -> None:
    """A task that succeeds."""


@pytest.fixture(autouse=True)
def carrier_is_down() -> None:
    """Each test begins with a carrier that refuses; `book` is a task here alone, as other tests have no journal."""
    task(name="parcels.book", durable=True)(book)
    carrier[0] = ConnectionError("carrier.internal refused")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the journal is."""
    return tmp_path / "tasks.db"


def runs_of(client: TestClient, **query: Any) -> list[dict[str, Any]]:
    """What the API lists."""
    return client.get("/board/api/runs", params=query).json()["runs"]  # type: ignore[no-any-return]  # JSON


def dead_of(client: TestClient, **query: Any) -> dict[str, Any]:
    """What the API says of dead letters."""
    return client.get("/board/api/dead", params=query).json()  # type: ignore[no-any-return]  # JSON


def letters_in(client: TestClient, number: int) -> list[str]:
    """The ids of this many dead letters, as soon as they are there."""
    for _ in range(number):
        client.get("/")
    eventually(lambda: dead_of(client)["letters"] == number)
    return [run["id"] for run in dead_of(client)["runs"]]


def post(client: TestClient, path: str, **form: Any) -> Any:
    """An action of the page."""
    return client.post(f"/board{path}", data=form, headers=SAME, follow_redirects=False)


# --- all workers


def test_runs_of_all_workers_are_shown(board_for: BoardFor, path: Path) -> None:
    """Each once, with the filters of the page, on the board of any worker."""
    one = board_for(works, book, journal=path)
    other = board_for(works, journal=path, registry=CollectorRegistry())
    one.get("/"), other.get("/")
    for client in (one, other):
        found = eventually(lambda: len(runs := runs_of(client, state="succeeded")) == 2 and runs)  # noqa: B023
        assert len({run["id"] for run in found}) == 2
        assert [run["task"] for run in eventually(lambda: runs_of(client, state="bad"))] == ["parcels.book"]  # noqa: B023
        assert len(runs_of(client, task="parcels.*")) == len(runs_of(client, q="CARRIER.INTERNAL")) == 1
        assert "parcels.book" in page(client, "/runs") and "All workers of this machine" in page(client, "/runs")


def test_a_run_of_another_worker_is_shown_as_completely(board_for: BoardFor, path: Path) -> None:
    """Attempts, back-offs, error, hint, notes, siblings, request, cause: as on the board of its own process."""

    async def breaks() -> None:
        note(customer="c-4711")
        progress(3, 10, "pages")
        raise ConnectionError("mail.internal refused")

    async def flaky() -> None:
        run = current_run()
        if run is not None and run.attempt < 3:
            raise ValueError(f"attempt {run.attempt}")

    retry = Retry(attempts=3, wait_initial=0.001, wait_max=0.002)
    functions = options(flaky, retry=retry), options(breaks, retry=retry), works
    own = board_for(*functions, journal=path, on_failure="stop")
    other = board_for(journal=path, registry=CollectorRegistry())
    own.get("/")
    eventually(lambda: len(runs_of(other)) == 3 and not runs_of(other, state="in_flight"))
    for run in runs_of(own):
        here, there = (client.get(f"/board/api/runs/{run['id']}").json() for client in (own, other))
        assert len(here["siblings"]) == 2 and len(here["attempts"]) == (0 if here["caused_by"] else 3)
        for attempt in here["attempts"][:-1]:
            attempt["stack"] = None  # that of the last one is shown
        for each in (here, there, *here["siblings"], *there["siblings"]):
            each.pop("max_attempts")  # of a policy that the other worker does not know
        assert approximately(here) == approximately(there)
    text = page(other, f"/runs/{run_with(other, 'failed')}")
    assert "Attempt 2" in text and "Back-off" in text and "customer c-4711" in text and "3/10 pages" in text
    assert 'raise ConnectionError("mail.internal refused")' in text and "not of this process" in text


def approximately(value: Any) -> Any:
    """With moments and durations to the hundredth of a second: the journal keeps a wait, and not when it began."""
    if isinstance(value, dict):
        return {key: approximately(each) for key, each in value.items()}
    if isinstance(value, list):
        return [approximately(each) for each in value]
    if isinstance(value, str) and re.fullmatch(r"\d{4}-.*T.*\+00:00", value):
        return value[:19]
    return pytest.approx(value, abs=0.02) if isinstance(value, float) else value


def run_with(client: TestClient, state: str) -> str:
    """The id of the newest run in a state."""
    return str(runs_of(client, state=state)[0]["id"])


def test_history_is_paged_and_outlives_the_process(board_for: BoardFor, path: Path) -> None:
    """A new process shows what earlier ones did, each run once, on pages that follow each other."""
    earlier = board_for(works, journal=path)
    for _ in range(7):
        earlier.get("/")
    earlier.__exit__(None, None, None)
    client = board_for(works, journal=path, registry=CollectorRegistry())
    client.get("/"), client.get("/")
    seen, before = list[dict[str, Any]](), ""
    while before is not None:
        answer = client.get("/board/api/runs", params={"limit": 2, "before": before}).json()
        assert len(answer["runs"]) == 2 or answer["next_before"] is None
        seen, before = seen + answer["runs"], answer["next_before"]
    assert len(seen) == len({run["id"] for run in seen}) == 9
    ends = [run["ended"] for run in seen]  # to the millisecond
    assert ends == sorted(ends, reverse=True)


def test_a_run_in_flight_elsewhere_is_followed(board_for: BoardFor, path: Path) -> None:
    """And the page notices each change, although nothing has happened in its own process."""
    go, begun = threading.Event(), threading.Event()

    def long() -> None:
        begun.set()
        go.wait(20)

    own = board_for(long, journal=path)
    other = board_for(journal=path, registry=CollectorRegistry())
    thread = threading.Thread(target=own.get, args=("/",))
    thread.start()
    try:
        assert begun.wait(20)
        (run,) = eventually(lambda: runs_of(other, state="running"))
        html = other.get(f"/board/runs/{run['id']}").text
        assert "running" in html and "Where it is now" not in html
        cursor = re.search(r'data-cursor="(.*?)"', html)
        assert cursor is not None
    finally:
        go.set()
        thread.join()
    seen = {"x-aftertask-after": cursor[1]}
    eventually(lambda: "succeeded" in other.get(f"/board/runs/{run['id']}", headers=seen).text)


def test_the_journal_is_opened_by_the_first_look(board_for: BoardFor, path: Path) -> None:
    """A board that is not looked at costs the journal nothing."""

    def opened() -> int:
        found = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
        return found.count(str(path))

    client = board_for(works, journal=path)
    client.get("/")
    assert client.portal is not None and client.portal.call(get_run, "none") is None  # what runs read is open now
    before = opened()
    client.get("/board/"), client.get("/board/runs")
    assert opened() == before + 1


def test_a_journal_that_cannot_be_read_is_said(board_for: BoardFor, path: Path) -> None:
    """What the process knows itself is shown all the same."""
    client = board_for(works, journal=path)
    client.get("/")
    with closing(connect(path)) as db:
        db.execute("ALTER TABLE runs RENAME TO walks")
    text = page(client, "/runs")
    assert "The journal cannot be read" in text and "no such table" in text and "test_journal.works" in text
    with closing(connect(path)) as db:
        db.execute("ALTER TABLE walks RENAME TO runs")
    assert "cannot be read" not in page(client, "/runs")


# --- Now


def test_now_shows_the_journal(board_for: BoardFor, path: Path) -> None:
    """Dead letters, what has not ended, errors and lost history; nothing of it without one."""
    client = board_for(book, journal=path)
    assert "Dead letters none" in page(client) and "none in this process" in page(client)
    letters_in(client, 2)
    text = page(client)
    assert "2 dead letters wait to be replayed or deleted" in text and "tasks.db, of all workers" in text
    assert "Journal" not in page(board_for(works, registry=CollectorRegistry()))


def test_without_a_journal_the_page_says_what_to_do(board_for: BoardFor) -> None:
    """And there is nothing to act on."""
    client = board_for(works)
    assert "No journal is set" in page(client, "/dead") and "Settings(journal=" in page(client, "/dead")
    assert dead_of(client) == {"letters": 0, "groups": [], "runs": [], "next_before": None}
    assert post(client, "/dead/replay", id="x").status_code == 404


# --- dead letters


def test_dead_letters_are_grouped_and_filtered(board_for: BoardFor, path: Path) -> None:
    """By task, reason and error; the groups lead to their letters."""
    client = board_for(book, journal=path)
    letters_in(client, 3)
    carrier[0] = TimeoutError("carrier.internal is slow")
    client.get("/")
    eventually(lambda: dead_of(client)["letters"] == 4)
    found = dead_of(client)
    assert [(group["letters"], group["newest"]["error_type"]) for group in found["groups"]] == [
        (3, "ConnectionError"),
        (1, "TimeoutError"),
    ]
    group = {name: found["groups"][1][name] for name in ("task", "reason", "fingerprint")}
    assert [run["error_type"] for run in dead_of(client, **group)["runs"]] == ["TimeoutError"]
    text = page(client, "/dead?reason=failed&task=parcels.book")
    assert "Letters 4 of this kind" in text and "Replay all 4" in text
    assert "No dead letter matches" in page(client, "/dead?task=other")
    first = dead_of(client, limit=3)
    rest = dead_of(client, limit=3, before=first["next_before"])
    assert len({run["id"] for run in first["runs"] + rest["runs"]}) == 4 and rest["next_before"] is None


def test_a_letter_is_replayed_to_success(board_for: BoardFor, path: Path) -> None:
    """From its page, with its stored arguments; each of the two leads to the other."""
    client = board_for(book, journal=path)
    (letter,) = letters_in(client, 1)
    assert "Dead letter because it failed" in page(client, f"/runs/{letter}")
    carrier[0] = None
    response = post(client, "/dead/replay", id=letter)
    assert (response.status_code, response.headers["location"]) == (303, f"../runs/{letter}?notice=replayed")
    assert "It will run again" in page(client, f"/runs/{letter}?notice=replayed")
    replay = client.get(f"/board/api/runs/{letter}").json()["replayed_by"]
    eventually(lambda: client.get(f"/board/api/runs/{replay}").json()["state"] == "succeeded")
    assert f'href="{letter}"' in client.get(f"/board/runs/{replay}").text
    assert f'href="{replay}"' in client.get(f"/board/runs/{letter}").text
    assert dead_of(client)["letters"] == 0
    assert post(client, "/dead/replay", id=letter).headers["location"] == f"../runs/{letter}?notice=gone"


def test_many_letters_are_replayed_while_the_page_shows_how_far(board_for: BoardFor, path: Path) -> None:
    """Chosen ones, or all that match; then the page says how many there were."""
    client = board_for(book, journal=path)
    letters = letters_in(client, 5)
    carrier[0] = None
    assert post(client, "/dead/replay", id=letters[:2]).headers["location"] == "../dead"
    eventually(lambda: "2 of 2 are run again" in page(client, "/dead"))
    assert post(client, "/dead/replay?all=1&task=parcels.book&reason=failed").status_code == 303
    eventually(lambda: "3 of 3 are run again" in page(client, "/dead"))
    eventually(lambda: len(runs_of(client, state="succeeded", task="parcels.book")) == 5)


def test_replays_are_throttled(board_for: BoardFor, path: Path) -> None:
    """Fifty per second, as by the command; a second request meanwhile is refused."""
    client = board_for(book, journal=path)
    letters = letters_in(client, 20)
    began = time.monotonic()
    assert post(client, "/dead/replay", id=letters).status_code == 303
    assert post(client, "/dead/delete", id=letters[0]).status_code == 409
    eventually(lambda: "20 of 20 are run again" in page(client, "/dead"))
    assert time.monotonic() - began >= 19 / 50


def test_letters_are_deleted_for_good(board_for: BoardFor, path: Path) -> None:
    """One, or all that match; others stay."""
    client = board_for(book, journal=path)
    letters = letters_in(client, 3)
    assert post(client, "/dead/delete", id=letters[0]).headers["location"] == "../dead"
    assert client.get(f"/board/api/runs/{letters[0]}").status_code in (200, 404)  # the process may remember it
    assert {run["id"] for run in dead_of(client)["runs"]} == set(letters[1:])
    assert post(client, "/dead/delete?all=1&reason=timed_out").headers["location"] == "../dead"
    assert dead_of(client)["letters"] == 2
    assert post(client, "/dead/delete?all=1").headers["location"] == "../dead"
    eventually(lambda: dead_of(client)["letters"] == 0)


@pytest.mark.parametrize(
    ("query", "form"),
    [
        ("", {}),
        ("", {"id": ["x"] * 201}),
        ("", {"id": "x" * 201}),
        ("", {"id": "x", "task": "y"}),
        ("?task=parcels.book", {"id": "x"}),
        ("?all=1&reason=nonsense", {}),
        ("?all=1&task=" + "x" * 201, {}),
        ("?all=1&fingerprint=" + "x" * 201, {}),
        ("?all=1&nonsense=1", {}),
    ],
)
def test_what_to_act_on_is_checked(board_for: BoardFor, path: Path, query: str, form: dict[str, Any]) -> None:
    """Nothing is done; the error says why."""
    client = board_for(book, journal=path)
    letters_in(client, 1)
    for action in ("replay", "delete"):
        response = post(client, f"/dead/{action}{query}", **form)
        assert response.status_code == 400
        assert any(word in response.text for word in ("dead letters", "must be", "unknown parameter"))
    assert dead_of(client)["letters"] == 1


def test_a_form_is_bounded(board_for: BoardFor, path: Path) -> None:
    """In bytes, fields, and what they are."""
    client = board_for(book, journal=path)
    for content, status in ((b"id=" + b"x" * 70_000, 413), (b"id=x&" * 1_001, 400), ("id=é".encode(), 400)):
        assert client.post("/board/dead/replay", content=content, headers=SAME).status_code == status


@pytest.mark.parametrize(
    "query", ["reason=nonsense", "limit=201", "limit=0", "before=x", "before=1~", "task=" + "x" * 201, "nonsense=1"]
)
def test_every_parameter_of_dead_letters_is_bounded(board_for: BoardFor, path: Path, query: str) -> None:
    """On the page and in the API."""
    client = board_for(book, journal=path)
    for place in ("/dead", "/api/dead"):
        assert client.get(f"/board{place}?{query}").status_code == 400


# --- arguments and results


@pytest.mark.parametrize("rights", [("view",), ("view", "act"), ("view", "args")])
def test_arguments_and_results_need_their_right(board_for: BoardFor, path: Path, rights: tuple[str, ...]) -> None:
    """On no page and in no answer without it."""
    client = board_for(
        functools.partial(book, 7, "fragile"), options(total, keep_result=True), journal=path, rights=rights
    )
    (letter,) = letters_in(client, 1)
    with closing(connect(path)) as db:
        eventually(lambda: db.execute("SELECT 1 FROM runs WHERE result IS NOT NULL").fetchone())
    result = runs_of(client, task="totals.sum")[0]["id"]
    places = ("/dead", "/runs", f"/runs/{letter}", f"/runs/{result}", f"/api/runs/{letter}", f"/api/runs/{result}")
    texts = [client.get(f"/board{place}").text.replace("&#34;", '"') for place in (*places, "/api/dead", "/api/runs")]
    has_right = "args" in rights
    assert any('"fragile"' in text for text in texts) == has_right
    assert any('{"sum": 42}' in text for text in texts) == has_right
    assert ("arguments" in json.loads(texts[4])) == has_right


# --- cancellation


def test_a_cancellation_says_what_it_did(board_for: BoardFor, path: Path) -> None:
    """What had ended, what cannot be stopped, what another worker has, what never started."""
    go, begun = threading.Event(), threading.Event()

    def long() -> None:
        begun.set()
        go.wait(20)

    client = board_for(long, works, journal=path)
    row: dict[str, Any] = {"id": "elsewhere", "task": "t", "code": "t", "state": "started", "owner": 99, "durable": 0}
    row |= {"idempotent": 0, "origin": "request", "scheduled_at": time.time(), "started_at": time.time(), "attempts": 1}
    with closing(connect(path)) as db:
        rows.upsert(db, row)
    assert notice_of(client, "elsewhere") == "requested"
    thread = threading.Thread(target=client.get, args=("/",))
    thread.start()
    try:
        assert begun.wait(20)
        (running,) = runs_of(client, state="running", task="*long")
        (queued,) = runs_of(client, state="queued")
        assert notice_of(client, running["id"]) == "impossible"
        assert "cannot be stopped" in page(client, f"/runs/{running['id']}?notice=impossible")
        assert notice_of(client, queued["id"]) == "dropped"
    finally:
        go.set()
        thread.join()
    assert notice_of(client, queued["id"]) == "ended"
    assert post(client, "/runs/nothing/cancel").status_code == 404
    assert client.get(f"/board/runs/{queued['id']}?notice=nonsense").status_code == 400


def notice_of(client: TestClient, id: str) -> str:
    """What the page is to say about a cancellation."""
    location = post(client, f"/runs/{id}/cancel").headers["location"]
    assert location.startswith(f"../../runs/{id}?notice=")
    return str(location.partition("=")[2])


# --- hostile text


def test_hostile_letters_are_text(board_for: BoardFor, path: Path) -> None:
    """A name, an error, a reason and arguments that are markup, or would turn the text around."""
    text = "<script>alert(1)</script>\"'&\u202e\x00"
    client = board_for(book, journal=path, rights=("view", "args", "act"))
    now = time.time()
    with closing(connect(path)) as db:
        row: dict[str, Any] = {"id": "hostile-1", "task": text, "code": text, "state": "failed", "dead": text}
        row |= {"durable": 1, "idempotent": 0, "origin": "request", "scheduled_at": now, "settled_at": now, "bad": 1}
        row |= {"arguments": json.dumps({"to": text}), "error_type": text, "error_message": text, "stack": text}
        row |= {"attempts": 1, "started_at": now, "fingerprint": text, "http_route": text, "reason": text, "key": text}
        rows.upsert(db, {**row, "more": json.dumps({"notes": {text: text}, "hint": text})})
    for place in ("/dead", "/runs", "/runs/hostile-1", "/"):
        html = client.get(f"/board{place}").text
        assert "<script>" not in html and "\u202e" not in html and "\x00" not in html
    group = dead_of(client)["groups"][0]
    link = re.search(r'action="(dead/replay\?all=1&amp;[^"]+)"', client.get("/board/dead").text)
    assert link is not None and group["task"] == text
    assert post(client, "/" + link[1].replace("&amp;", "&")).status_code == 400  # no such reason
