"""What is kept: bounded in every respect, text only, and shown as text whatever it holds."""

from __future__ import annotations

import gc
import json
import re
import weakref
from collections.abc import Callable

import pytest
from starlette.testclient import TestClient

from aftertask import progress, task
from aftertask.testing import VirtualClock
from board.conftest import BoardFor


async def works() -> None:
    """A task that succeeds."""


def api(client: TestClient, path: str, **query: str | int) -> dict[str, list[dict[str, object]]]:
    """An answer of the API."""
    response = client.get(f"/board/api/{path}", params=query)
    assert response.status_code == 200, response.text
    answer: dict[str, list[dict[str, object]]] = response.json()
    return answer


def tasks(count: int) -> list[object]:
    """The same task, this many times."""
    return [works] * count


def test_successes_never_push_failures_out(board_for: BoardFor) -> None:
    """The last 2 000 runs, and 500 failures besides."""

    async def breaks() -> None:
        raise ValueError("first of all")

    first = [True]

    async def once() -> None:
        if first:
            first.clear()
            await breaks()

    client = board_for(once, *tasks(99))
    for _ in range(25):
        client.get("/")
    client.get("/board/")
    (failed,) = api(client, "runs", state="failed")["runs"]
    assert failed["error_message"] == "first of all"
    whole = api(client, f"runs/{failed['id']}")
    assert "raise ValueError" in str(whole["attempts"][0]["stack"])
    board = client.app.routes[1].app  # type: ignore[attr-defined]  # a Mount
    assert len(board.signal.ended()) == 2001


def test_failures_are_bounded_too(board_for: BoardFor) -> None:
    """Of those that are no longer among them, but among the last runs, the stack is no longer kept."""

    async def breaks() -> None:
        raise ValueError

    client = board_for(*[breaks] * 100)
    for _ in range(6):
        client.get("/")
    board = client.app.routes[1].app  # type: ignore[attr-defined]  # a Mount
    stacks = [entry.last.stack is not None for entry in board.signal.ended()]
    assert stacks == [True] * 500 + [False] * 100
    last = board.signal.ended()[-1].id
    assert "no longer kept" in client.get(f"/board/runs/{last}").text


def test_tasks_and_hazards_are_bounded(board_for: BoardFor) -> None:
    """Names beyond the first 200 are counted together."""

    def named(number: int) -> Callable[[], None]:
        @task(name=f"task.{number}")
        def numbered() -> None: ...

        return numbered

    client = board_for(*map(named, range(250)))
    client.get("/")
    lines = api(client, "tasks")["tasks"]
    assert len(lines) == 201
    assert next(line["runs"] for line in lines if line["task"] == "__other__") >= 50


def test_nothing_of_a_run_is_kept_alive(board_for: BoardFor) -> None:
    """Neither what it was given nor what it returned, nor the frames of its exception."""

    class Thing:
        pass

    kept = []

    def breaks(thing: Thing) -> object:
        kept.append(weakref.ref(thing))
        if len(kept) % 2:
            raise ValueError(1)
        return thing

    class Call:
        def __init__(self) -> None:
            self.thing = Thing()

        async def __call__(self) -> object:
            return breaks(Thing())

    client = board_for(Call(), Call(), signals=[])  # caplog would keep the exception
    client.get("/")
    gc.collect()
    assert len(kept) == 2 and [ref() for ref in kept] == [None, None]


def test_ten_minutes_are_counted(board_for: BoardFor, clock: VirtualClock) -> None:
    """Older runs are listed, but no longer counted."""
    client = board_for(works)
    client.get("/")
    clock.advance(300)
    client.get("/")
    assert api(client, "tasks")["tasks"][0]["runs"] == 2
    clock.advance(301)
    assert api(client, "tasks")["tasks"][0]["runs"] == 1
    clock.advance(100_000)
    assert api(client, "tasks")["tasks"][0]["runs"] == 0
    assert len(api(client, "runs")["runs"]) == 2


def test_changes_since_a_cursor(board_for: BoardFor, clock: VirtualClock) -> None:
    """The runs that ended since; nothing if nothing has happened; a gap if the cursor is another process's."""
    client = board_for(works)
    client.get("/")
    first = client.get("/board/api/changes").json()
    assert len(first["runs"]) == 1 and first["gap"] is False
    assert client.get("/board/api/changes", params={"after": first["cursor"]}).status_code == 204
    client.get("/")
    client.get("/")
    second = client.get("/board/api/changes", params={"after": first["cursor"]}).json()
    assert len(second["runs"]) == 2 and second["gap"] is False
    other = client.get("/board/api/changes", params={"after": "0.12345.0"}).json()
    assert len(other["runs"]) == 3


def test_more_changes_than_an_answer_holds(board_for: BoardFor) -> None:
    """The answer says that some are left out."""
    client = board_for(*tasks(300))
    cursor = client.get("/board/api/changes").json()["cursor"]
    client.get("/")
    client.get("/")
    answer = client.get("/board/api/changes", params={"after": cursor}).json()
    assert len(answer["runs"]) == 200 and answer["gap"] is True


# --- hostile text

HOSTILE = {
    "markup": "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&",
    "right-to-left": "invoice_\u202egpj.exe \u2066\u05e9\u05dc\u05d5\u05dd",
    "nul": "a\x00b\x1b[31m\x07",
    "surrogate": "half \ud800 of a character",
    "template": "{{ 7*7 }} {% include 'x' %} ${x}",
    "long": "x" * 1_000_000,
    "lines": "one\r\ntwo\u2028three",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_text_is_shown_as_text(board_for: BoardFor, text: str) -> None:
    """In a task's name, its error, its stack, its progress and its owner: on every page and in the API."""

    @task(name=text, owner=text)
    async def hostile() -> None:
        progress(1, 2, text)
        error = type("E", (Exception,), {"__qualname__": text})
        raise error(text)

    client = board_for(hostile, redact=lambda text: text)
    client.get("/")
    (run,) = api(client, "runs")["runs"]
    for path in ("/", "/runs", f"/runs/{run['id']}"):
        response = client.get(f"/board{path}")
        assert response.status_code == 200
        html = response.content.decode()
        assert "<script>alert" not in html and "<img" not in html
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", html), path
        assert len(html) < 100_000
    whole = client.get(f"/board/api/runs/{run['id']}")
    assert whole.headers["content-type"] == "application/json"
    assert json.loads(whole.content)["task"][:4] == text[:4]
    assert len(whole.content) < 100_000
