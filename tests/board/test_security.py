"""Who may see and do what: each route, each method, each set of rights; and what every answer carries."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.authentication import AuthCredentials, AuthenticationBackend, SimpleUser
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import RedirectResponse
from starlette.routing import Mount
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect

from aftertask import AftertaskMiddleware, Settings
from aftertask.alerts import Alert
from aftertask.board import Board
from aftertask.journal import letters, rows
from aftertask.journal.file import connect
from board.conftest import SAME, BoardFor

#: Each path of the board, the method that it takes if any, the right that this needs, and the status with that right.
ROUTES = [
    ("/", "GET", "view", 200),
    ("/runs", "GET", "view", 200),
    ("/runs/{id}", "GET", "view", 200),
    ("/runs/nothing", "GET", "view", 404),
    ("/static/board.css", "GET", "view", 200),
    ("/static/board.js", "GET", "view", 200),
    ("/static/icon.svg", "GET", "view", 200),
    ("/static/..%2F_app.py", None, "view", 404),
    ("/api/runs", "GET", "view", 200),
    ("/api/runs/{id}", "GET", "view", 200),
    ("/api/runs/nothing", "GET", "view", 404),
    ("/api/tasks", "GET", "view", 200),
    ("/api/changes", "GET", "view", 200),
    ("/dead", "GET", "view", 200),
    ("/api/dead", "GET", "view", 200),
    ("/dead/replay", "POST", "act", 303),
    ("/dead/delete", "POST", "act", 303),
    ("/dead/nothing", None, "view", 404),
    ("/runs/{id}/cancel", "POST", "act", 303),
    ("/runs/nothing/cancel", "POST", "act", 404),
    ("/runs/{id}/nothing", None, "view", 404),
    ("/channels/page/test", "POST", "act", 303),
    ("/channels/nothing/test", "POST", "act", 404),
    ("/nothing", None, "view", 404),
    ("/api/nothing", None, "view", 404),
]
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
RIGHTS: list[tuple[str, ...]] = [(), ("view",), ("args",), ("act",), ("view", "args"), ("view", "act")]

sent: list[Alert] = []


def page(alert: Alert) -> None:
    """A channel."""
    sent.append(alert)


async def works() -> None:
    """A task."""


@pytest.fixture(autouse=True)
def nothing_sent() -> None:
    """Each test begins with no alert sent."""
    sent.clear()


@pytest.mark.parametrize("rights", RIGHTS, ids="+".join)
def test_each_route_and_method_needs_its_right(board_for: BoardFor, tmp_path: Path, rights: tuple[str, ...]) -> None:
    """Without `view` nothing is served; without `act` nothing is done; any other method is refused."""
    path = tmp_path / "tasks.db"
    client = board_for(works, rights=rights, alerts=[page], journal=path)
    for at, (route, takes, right, status) in enumerate(ROUTES):
        for method in METHODS:
            sent.clear()
            id = f"letter-{at}-{method}"
            add_letter(path, id)
            where = f"/board{route.format(id=id)}"
            response = client.request(method, where, headers=SAME, data={"id": id}, follow_redirects=False)
            if "view" not in rights:
                expected = 403
            elif takes is None:
                expected = 404
            elif method != takes and (method, takes) != ("HEAD", "GET"):
                expected = 405
            else:
                expected = status if right in rights else 403
            assert response.status_code == expected, (method, route, rights)
            assert len(sent) == (expected == 303 and route.startswith("/channels")), (method, route, rights)
            assert is_letter(path, id) == (expected != 303 or not route.startswith("/dead")), (method, route, rights)


def add_letter(path: Path, id: str) -> None:
    """A dead letter in the journal."""
    now = time.time()
    row: dict[str, Any] = {"id": id, "task": "t", "code": "t", "state": "failed", "dead": "failed", "durable": 1}
    row |= {"idempotent": 0, "origin": "request", "scheduled_at": now, "settled_at": now, "arguments": "{}"}
    with closing(connect(path)) as db:
        rows.upsert(db, row)


def is_letter(path: Path, id: str) -> bool:
    """Whether it is still one."""
    with closing(connect(path)) as db:
        return bool(letters.named(db, [id]))


def board_of(client: TestClient) -> Board:
    """The board of a client's app."""
    return next(route.app for route in client.app.routes if isinstance(route, Mount))  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", [path for path, *_ in ROUTES])
def test_every_answer_keeps_the_page_to_itself(board_for: BoardFor, path: str) -> None:
    """No cache, no frame, no script, style or request of another origin; also of errors."""
    client = board_for(works)
    response = client.get(f"/board{path}")
    assert response.headers["cache-control"] == "private, no-store"
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'") and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["x-frame-options"] == "DENY"
    assert "<script>" not in response.text and " style=" not in response.text and "<style" not in response.text


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({"sec-fetch-site": "same-origin"}, True),
        ({"sec-fetch-site": "same-site", "origin": "http://testserver"}, False),
        ({"sec-fetch-site": "cross-site", "origin": "http://testserver"}, False),
        ({"sec-fetch-site": "none"}, False),
        ({"sec-fetch-site": ""}, False),
        ({"origin": "http://testserver"}, True),
        ({"origin": "http://testserver:8000"}, False),
        ({"origin": "http://evil.example"}, False),
        ({"origin": "http://testserver.evil.example"}, False),
        ({"origin": "http://evil.example/http://testserver"}, False),
        ({"origin": "null"}, False),
        ({"origin": "http://["}, False),
        ({"origin": ""}, False),
        ({}, False),
    ],
)
@pytest.mark.parametrize("action", ["/channels/page/test", "/dead/replay", "/dead/delete", "/runs/letter/cancel"])
def test_a_post_must_come_from_the_page(
    board_for: BoardFor, tmp_path: Path, headers: dict[str, str], allowed: bool, action: str
) -> None:
    """By Fetch Metadata; only where a browser sends none, by the origin."""
    client = board_for(works, alerts=[page], journal=tmp_path / "tasks.db")
    add_letter(tmp_path / "tasks.db", "letter")
    response = client.post(f"/board{action}", headers=headers, data={"id": "letter"}, follow_redirects=False)
    assert response.status_code == (303 if allowed else 403)
    assert len(sent) == (allowed and action.startswith("/channels"))
    assert is_letter(tmp_path / "tasks.db", "letter") == (not allowed or not action.startswith("/dead"))


def test_every_action_is_logged(board_for: BoardFor, caplog: pytest.LogCaptureFixture) -> None:
    """Who, what, and whether it was allowed."""
    caplog.set_level("INFO")
    rights = ["view"]

    def authorize(request: Request) -> list[str]:
        request.state.board_user = "ada"
        return rights

    client = board_for(works, board=Board(authorize=authorize), alerts=[page])
    client.post("/board/channels/page/test", headers=SAME)
    rights.append("act")
    client.post("/board/channels/page/test")
    client.post("/board/channels/page/test", headers=SAME)
    found = [record for record in caplog.records if record.message.startswith("board.action")]
    assert [(line.action, line.channel, line.user, line.allowed) for line in found] == [  # type: ignore[attr-defined]
        ("alert_test", "page", "ada", False),
        ("alert_test", "page", "ada", False),
        ("alert_test", "page", "ada", True),
    ]
    assert [getattr(line, "reason", None) for line in found] == ["no_right", "cross_site", None]


def test_each_action_on_runs_is_logged(board_for: BoardFor, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With the run, or the number of letters."""
    caplog.set_level("INFO")
    client = board_for(works, journal=tmp_path / "tasks.db")
    for id in ("letter-1", "letter-2", "letter-3"):
        add_letter(tmp_path / "tasks.db", id)
    client.post("/board/runs/letter-1/cancel", headers=SAME, follow_redirects=False)
    client.post("/board/dead/replay", headers=SAME, data={"id": "letter-1"}, follow_redirects=False)
    client.post("/board/dead/delete?all=1&task=t", headers=SAME, follow_redirects=False)
    client.post("/board/dead/delete?all=1&task=t", follow_redirects=False)
    found = [record for record in caplog.records if record.message.startswith("board.action")]
    names = ("action", "run_id", "letters", "allowed", "reason")
    assert [tuple(getattr(line, name, None) for name in names) for line in found] == [
        ("cancel_run", "letter-1", None, True, None),
        ("dead_replay", "letter-1", 1, True, None),
        ("dead_delete", None, 2, True, None),
        ("dead_delete", None, None, False, "cross_site"),
    ]


def test_a_sent_test_shows_its_result(board_for: BoardFor) -> None:
    """Accepted, or why not; without the right to act there is no button."""

    def down(alert: Alert) -> None:
        raise ConnectionError("refused by pager.internal")

    client = board_for(works, alerts=[page, down])
    for name in ("page", "down"):
        response = client.post(f"/board/channels/{name}/test", headers=SAME, follow_redirects=False)
        assert response.headers["location"] == "../../#channels"
    html = client.get("/board/").text
    assert "accepted" in html and "refused by pager.internal" in html and html.count("Send test") == 2
    assert [alert.kind for alert in sent] == ["test"]
    assert "Send test" not in board_for(works, rights=("view",), alerts=[page]).get("/board/").text


# --- authorize


def test_authorize_sees_the_user_of_the_app(board_for: BoardFor) -> None:
    """The board is behind the app's own authentication, and may be async."""

    class Backend(AuthenticationBackend):
        async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, SimpleUser] | None:
            name = conn.headers.get("x-user")
            return None if name is None else (AuthCredentials(["authenticated"]), SimpleUser(name))

    async def authorize(request: Request) -> set[str]:
        return {"view"} if request.user.is_authenticated else set()

    app = Starlette(
        routes=[Mount("/board", Board(authorize=authorize))],
        middleware=[
            Middleware(AftertaskMiddleware, settings=Settings(metrics_path=None)),
            Middleware(AuthenticationMiddleware, backend=Backend()),
        ],
    )
    client = TestClient(app)
    assert client.get("/board/").status_code == 403
    assert client.get("/board/", headers={"x-user": "ada"}).status_code == 200


def test_authorize_may_raise_or_redirect(board_for: BoardFor) -> None:
    """To the app's own error page, or to its login."""

    def raises(request: Request) -> set[str]:
        raise HTTPException(418, "short and stout")

    def redirects(request: Request) -> RedirectResponse:
        return RedirectResponse("/login")

    assert board_for(board=Board(authorize=raises)).get("/board/api/runs").status_code == 418
    response = board_for(board=Board(authorize=redirects)).get("/board/static/board.js", follow_redirects=False)
    assert (response.status_code, response.headers["location"]) == (307, "/login")


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (True, "must return a set of rights such as {'view', 'act'}, got True"),
        ("view", "must return a set of rights"),
        ({"view", "delete"}, "unknown rights {'delete'}; rights are view, args, act"),
    ],
)
def test_a_wrong_answer_of_authorize_is_an_error(returned: Any, message: str) -> None:
    """It grants nothing, and names what it got."""
    app = Starlette(
        routes=[Mount("/board", Board(authorize=lambda request: returned))],
        middleware=[Middleware(AftertaskMiddleware, settings=Settings(metrics_path=None))],
    )
    with pytest.raises((TypeError, ValueError), match=message.replace("{", r"\{")):
        TestClient(app).get("/board/")


def test_a_board_needs_one_way_to_authorize() -> None:
    """There is no default."""
    for arguments in ({}, {"authorize": lambda request: {"view"}, "insecure": True}, {"authorize": None}):
        with pytest.raises(TypeError, match="Board needs authorize"):
            Board(**arguments)
    with pytest.raises(TypeError, match="opens the board to this machine only; got"):
        Board(authorize={"view"})  # type: ignore[arg-type]  # on purpose
    with pytest.raises(TypeError, match=r"is called with the request, but .*<lambda> does not take one argument"):
        Board(authorize=lambda: {"view"})  # type: ignore[misc, arg-type]  # on purpose


@pytest.mark.parametrize(
    ("client", "headers", "status"),
    [
        ("127.0.0.1", {"host": "localhost:8000"}, 200),
        ("127.0.0.1", {"host": "127.0.0.1"}, 200),
        ("::1", {"host": "[::1]:8000"}, 200),
        ("10.0.0.7", {"host": "localhost"}, 403),
        ("127.0.0.1", {"host": "evil.example"}, 403),
        ("127.0.0.1", {"host": "localhost", "x-forwarded-for": "10.0.0.7"}, 403),
        ("127.0.0.1", {"host": "localhost", "forwarded": "for=10.0.0.7"}, 403),
        ("127.0.0.1", {"host": "localhost", "x-real-ip": "127.0.0.1"}, 403),
        ("unknown", {"host": "localhost"}, 403),
    ],
)
def test_insecure_is_for_this_machine_only(client: str, headers: dict[str, str], status: int) -> None:
    """Not for what a proxy passes on, nor for a page of another site whose name leads here."""
    app = Starlette(
        routes=[Mount("/board", Board(insecure=True))],
        middleware=[Middleware(AftertaskMiddleware, settings=Settings(metrics_path=None))],
    )

    async def from_there(scope: Scope, receive: Receive, send: Send) -> None:
        scope["client"] = (client, 50000)
        await app(scope, receive, send)

    assert TestClient(from_there).get("/board/", headers=headers).status_code == status


def test_a_websocket_is_refused(board_for: BoardFor) -> None:
    """The board has none."""
    with pytest.raises(WebSocketDisconnect) as refused, board_for().websocket_connect("/board/"):
        pass
    assert refused.value.code == 1008


def test_the_boards_own_requests_are_not_observed(board_for: BoardFor) -> None:
    """A task that `authorize` adds to its response is not one of the app's runs."""
    ran: list[int] = []

    def authorize(request: Request) -> RedirectResponse:
        return RedirectResponse("/login", background=BackgroundTask(ran.append, 1))

    board = Board(authorize=authorize)
    board_for(board=board).get("/board/", follow_redirects=False)
    assert ran == [1] and board.signal.ended() == []


# --- what the API takes


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=201",
        "limit=-1",
        "limit=1e3",
        "limit=99999999999999999999",
        "limit=%D9%A1",  # an Arabic digit
        "before=0",
        "before=x",
        "before=1.0~",
        "before=1e9~x",
        "before=1.0~" + "x" * 65,
        "state=alive",
        "task=" + "x" * 201,
        "q=" + "x" * 201,
        "nonsense=1",
        "q=" + "x" * 2100,
    ],
)
@pytest.mark.parametrize("path", ["/runs", "/api/runs"])
def test_every_parameter_is_bounded(board_for: BoardFor, path: str, query: str) -> None:
    """A clear error names the parameter, what is allowed and what it got."""
    response = board_for(works).get(f"/board{path}?{query}")
    assert response.status_code == 400
    name = query.partition("=")[0]
    assert (name in response.text or "the query must be" in response.text) and len(response.text) < 4000


@pytest.mark.parametrize("after", ["x", "a.b.c", "1.2", "1.2.3.4", "f" * 33 + ".1.1", "a.9999999999999999.a"])
def test_a_cursor_is_checked(board_for: BoardFor, after: str) -> None:
    """In the API and in the header of the pages."""
    client = board_for(works)
    assert client.get("/board/api/changes", params={"after": after}).status_code == 400
    assert client.get("/board/", headers={"x-aftertask-after": after}).status_code == 400


def test_errors_of_the_api_are_json(board_for: BoardFor) -> None:
    """With one key."""
    response = board_for(works).get("/board/api/runs?limit=0")
    assert json.loads(response.text) == {"error": "limit must be a whole number from 1 to 200, got '0'"}


def test_without_jinja_the_way_out_is_named() -> None:
    """It is an extra."""
    code = "import sys; sys.modules['jinja2'] = None\nimport aftertask.board"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "aftertask.board needs Jinja2: pip install 'aftertask[board]'" in done.stderr


def test_the_board_needs_nothing_of_what_a_journal_needs() -> None:
    """It reads one without pydantic, which encodes arguments."""
    code = "import sys; sys.modules['pydantic'] = None\nimport aftertask.board"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
