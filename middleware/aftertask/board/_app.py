"""`Board`: an ASGI app to mount; it decides who may do what, for each route, before anything is read."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Literal, cast

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Match, Route
from starlette.types import Receive, Scope, Send

from .. import _clock
from .._core.emit import Emitter
from .._core.hooks import KEY
from .._core.process import start_thread
from .._core.route import route_path
from .._signatures import takes
from .._stored import cancel_run
from ..alerts import Alerts, Tested, send_test
from ..alerts import Route as Channel
from ..errors import JournalError
from ..journal.letters import LetterAction
from ..journal.settle import DEAD
from ..journal.store import Journaling, in_thread
from ..middleware import Companion
from ..settings import Settings
from ..tasks import code_name
from ._access import HEADERS, Authorize, Visit, checked, loopback_only
from ._entry import Entry
from ._query import STATES, DeadQuery, RunQuery, chosen, cursor, known, place_text
from ._record import Record
from ._render import TASK, plain, run_json, templates, whole_run_json
from ._source import Source

_STATIC = {"board.css": "text/css", "board.js": "text/javascript", "icon.svg": "image/svg+xml"}
_LONGEST_QUERY = 2_000
#: Seconds for which a rendered page is shared, and how many are.
_FRESH, _MOST_RENDERED = 0.5, 32

#: The result of an action.
NOTICES = {
    "dropped": "It had not started, and never will.",
    "cancelled": "It is cancelled: its coroutine has been asked to stop.",
    "requested": "Another worker has it, and cancels it within seconds.",
    "impossible": "It cannot be cancelled: a sync function is running, and a thread or a process cannot be stopped.",
    "ended": "It had already ended.",
    "replayed": "It will run again with its stored arguments, as a new run.",
    "gone": "It is no longer a dead letter: it was replayed or deleted in the meantime.",
}

_NOT_ATTACHED = (
    "No AftertaskMiddleware serves this page. Add it to the app that the board is mounted in; if it is there, see "
    "whether Settings.exclude has the board's path, or AFTERTASK_DISABLED is set."
)


class Board(Companion):
    """
    A live page about an app's background tasks: `app.mount("/aftertask", Board(authorize=…))`.

    As a mounted app it is behind the app's own session and authentication middleware. The app needs
    `AftertaskMiddleware`. The board's own requests are not observed.

    Args:
        authorize: Returns the rights of a request: `view`, `args` (a run's arguments) and `act` (actions); no rights at
            all means 403. It may return a response instead, or raise `HTTPException`. It may be sync or async; a sync
            function runs on the event loop and must not block. `request.state.board_user` names the user in the log.
        insecure: Grant everything to clients on this machine, and nothing to others; instead of `authorize`.

    Raises:
        TypeError: Neither or both are given, or `authorize` does not take the request.
    """

    def __init__(self, *, authorize: Authorize | None = None, insecure: bool = False) -> None:
        if insecure == callable(authorize):
            raise TypeError(
                "Board needs authorize=…, a function that returns the rights of a request; insecure=True, instead of "
                f"it, opens the board to this machine only; got {authorize!r}"
            )
        if authorize is not None and not takes(authorize, 1):
            raise TypeError(
                f"Board.authorize is called with the request, but {code_name(authorize)} does not take one argument"
            )
        self._authorize: Authorize = loopback_only if authorize is None else authorize
        self.signal = record = Record()
        self._source = Source(record)
        self._trace_url: str | None = None
        self._tested: dict[str, tuple[Tested, float]] = {}
        self._letter_action: LetterAction | None = None
        self._render = templates()
        self._rendered: dict[tuple[str, frozenset[str]], tuple[float, str, str]] = {}
        self._files = {name: (Path(__file__).parent / "static" / name).read_bytes() for name in _STATIC}
        self._version = hashlib.sha256(b"".join(self._files.values())).hexdigest()[:8]
        self._routes = [  # They match only: what they lead to is called with the visit.
            Route("/", self._now),
            Route("/runs", self._runs),
            Route("/runs/{id}", self._run),
            Route("/runs/{id}/cancel", self._cancel, methods=["POST"]),
            Route("/dead", self._dead),
            Route("/dead/replay", partial(self._act, action="replay"), methods=["POST"]),
            Route("/dead/delete", partial(self._act, action="delete"), methods=["POST"]),
            Route("/channels/{name}/test", self._test_channel, methods=["POST"]),
            Route("/static/{name}", self._static),
            Route("/api/runs", self._api_runs),
            Route("/api/runs/{id}", self._api_run),
            Route("/api/tasks", self._api_tasks),
            Route("/api/changes", self._api_changes),
            Route("/api/dead", self._api_dead),
        ]

    def attach(self, emit: Emitter, settings: Settings | None) -> None:
        """The middleware has been built around the app that this board is mounted in."""
        self._source.app = emit
        self._source.journal = next((signal for signal in emit.signals if isinstance(signal, Journaling)), None)
        self._trace_url = None if settings is None else settings.trace_url

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; a WebSocket is refused."""
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        record = scope.pop(KEY, None)  # what is served here is not observed
        try:
            if self._source.app is None and isinstance(emit := getattr(record, "app", None), Emitter):
                emit.add(self.signal)  # the middleware did not find this board: it was mounted later, or is hidden
                self.attach(emit, None)
            response = await self._respond(Request(scope, receive))
            await response(scope, receive, send)
        finally:
            if record is not None:
                scope[KEY] = record

    async def _respond(self, request: Request) -> Response:
        granted = self._authorize(request)
        if inspect.isawaitable(granted):
            granted = await granted
        if isinstance(granted, Response):
            return granted
        visit = Visit(request, checked(granted), route_path(request.scope), request.query_params)
        try:
            response = await self._handle(visit)
        except HTTPException as error:
            response = await self._error(visit, error.status_code, error.detail)
        response.headers.update(HEADERS)
        return response

    async def _handle(self, visit: Visit) -> Response:
        if "view" not in visit.rights:
            raise HTTPException(403, "You may not see this page. The app's owner decides who may.")
        if self._source.app is None:
            raise HTTPException(503, _NOT_ATTACHED)
        if len(visit.request.url.query) > _LONGEST_QUERY:
            raise HTTPException(400, f"the query must be at most {_LONGEST_QUERY} characters")
        if not visit.path.startswith(("/api/", "/static/")) and visit.request.method == "GET":
            visit = replace(visit, cursor=await self._source.page_cursor())
            if (unchanged := self._unchanged(visit)) is not None:
                return unchanged
        status, message = 404, "There is no such page."
        for route in self._routes:
            match, child = route.matches(visit.request.scope)
            if match is Match.FULL:
                return cast(Response, await route.endpoint(visit, **child["path_params"]))
            if match is Match.PARTIAL:
                status, message = 405, "This method is not allowed here."
        raise HTTPException(status, message)

    async def _error(self, visit: Visit, status: int, message: str) -> Response:
        if visit.path.startswith("/api/"):
            return _json({"error": message}, status)
        return await self._page(visit, "error.html", {"message": message}, status)

    def _unchanged(self, visit: Visit) -> Response | None:
        """The response to a page's script: empty if nothing has changed, or the one just sent to another such page."""
        seen = cursor(visit.request.headers, "x-aftertask-after")
        if seen is None:
            return None
        if seen == visit.cursor:
            return Response(status_code=204)
        made, was, html = self._rendered.get((str(visit.request.url), visit.rights), (0.0, "", ""))
        is_fresh = monotonic() - made < _FRESH and was != seen
        return Response(html, media_type="text/html") if is_fresh else None

    async def _page(self, visit: Visit, template: str, values: dict[str, object], status: int = 200) -> Response:
        at, current = monotonic(), visit.cursor if status == 200 else ""  # of before what is shown was read
        values |= {"cursor": current, "status": status, "now": _clock.timestamp(), "process": os.getpid()}
        values |= {"base": visit.base, "rights": visit.rights, "here": visit.path, "version": self._version}
        values |= {"has_journal": self._source.journal is not None, "trouble": self._source.trouble}
        html = await self._render(template, values)
        if len(self._rendered) >= _MOST_RENDERED:
            self._rendered.clear()
        if current:
            self._rendered[str(visit.request.url), visit.rights] = at, current, html
        return Response(html, status, media_type="text/html")

    async def _now(self, visit: Visit) -> Response:
        known(visit.parameters)
        values = {"channels": self._channels(), "tested": self._tested, "journal": await self._source.journal_state()}
        return await self._page(visit, "now.html", values | self._source.overview())

    async def _runs(self, visit: Visit) -> Response:
        query = RunQuery.of(visit.parameters)
        runs, place = await self._source.runs(query)
        values = {"query": query, "runs": runs, "before": place_text(place), "back_to": place and place[0]}
        return await self._page(visit, "runs.html", values | {"tasks": self._source.tasks(), "states": STATES})

    async def _run(self, visit: Visit, id: str) -> Response:
        known(visit.parameters, "notice")
        notice = visit.parameters.get("notice")
        if notice is not None and notice not in NOTICES:
            raise HTTPException(400, f"notice must be one of {', '.join(NOTICES)}")
        run = await self._known(id)
        trace = self._trace_url and run.trace_id and self._trace_url.replace("{trace_id}", run.trace_id)
        values: dict[str, object] = {"run": run, "trace": trace, "notice": notice and NOTICES[notice], "reasons": DEAD}
        values |= {"siblings": await self._source.siblings(run), "stack": self._source.stack(id)}
        values["arguments"] = await self._source.arguments(id) if "args" in visit.rights else None
        return await self._page(visit, "run.html", values)

    async def _dead(self, visit: Visit) -> Response:
        query = DeadQuery.of(visit.parameters)
        found = await self._source.dead(query)
        values = {"query": query, "dead": found, "before": place_text(found.place)}
        return await self._page(visit, "dead.html", values | {"reasons": DEAD, "acting": self._letter_action})

    async def _known(self, id: str) -> Entry:
        run = await self._source.run(id)
        if run is None:
            raise HTTPException(404, "This run is unknown, or no longer kept.")
        return run

    async def _static(self, visit: Visit, name: str) -> Response:
        if name not in self._files:
            raise HTTPException(404, "There is no such file.")
        return Response(self._files[name], media_type=_STATIC[name])

    async def _api_runs(self, visit: Visit) -> Response:
        runs, place = await self._source.runs(RunQuery.of(visit.parameters))
        return _json({"runs": [run_json(run) for run in runs], "next_before": place_text(place)})

    async def _api_run(self, visit: Visit, id: str) -> Response:
        known(visit.parameters)
        run = await self._known(id)
        found = whole_run_json(run, await self._source.siblings(run), self._source.stack(id))
        if "args" in visit.rights:
            arguments = await self._source.arguments(id)
            found |= {"arguments": arguments and json.loads(arguments), "result": run.stored and run.stored.result}
        return _json(found)

    async def _api_dead(self, visit: Visit) -> Response:
        found = await self._source.dead(DeadQuery.of(visit.parameters))
        groups = [
            {**asdict(group.match), "letters": group.number, "newest": run_json(run)} for group, run in found.groups
        ]
        runs = [run_json(run) for run in found.letters]
        return _json({"letters": found.number, "groups": groups, "runs": runs, "next_before": place_text(found.place)})

    async def _api_tasks(self, visit: Visit) -> Response:
        known(visit.parameters)
        return _json({"tasks": [plain(line, TASK) for line in self._source.tasks()]})

    async def _api_changes(self, visit: Visit) -> Response:
        known(visit.parameters, "after")
        after, current = cursor(visit.parameters, "after"), self._source.cursor()
        if after == current:
            return Response(status_code=204)
        runs, gap = self._source.changes(after)
        return _json({"cursor": current, "gap": gap, "runs": [run_json(run) for run in runs]})

    def _channels(self) -> list[Channel]:
        signals = self._source.app.signals if self._source.app else ()
        return [route for signal in signals if isinstance(signal, Alerts) for route in signal.routes]

    async def _test_channel(self, visit: Visit, name: str) -> Response:
        visit.require_act("alert_test", channel=name[:200])
        visit.log_action("alert_test", channel=name[:200])
        channel = next((each for each in self._channels() if each.name == name), None)
        if channel is None:
            raise HTTPException(404, "There is no such channel.")
        (tested,) = await in_thread(lambda: send_test([channel]))
        self._tested[name] = tested, _clock.timestamp()
        return RedirectResponse(f"{visit.base}#channels", 303)

    async def _cancel(self, visit: Visit, id: str) -> Response:
        visit.require_act("cancel_run", run_id=id[:200])
        visit.log_action("cancel_run", run_id=id[:200])
        run = await self._known(id)
        try:
            done = await cancel_run(run.id) if run.ended is None else None
        except JournalError as error:
            raise HTTPException(503, str(error)) from None
        return RedirectResponse(f"{visit.base}runs/{run.id}?notice={done or 'ended'}", 303)

    async def _act(self, visit: Visit, action: Literal["replay", "delete"]) -> Response:
        """Replay or delete dead letters: one at once, several while the page shows the progress."""
        visit.require_act(f"dead_{action}")
        if (journal := self._source.journal) is None:
            raise HTTPException(404, "There is no journal, so there are no dead letters.")
        asked = dict(visit.parameters)
        if asked.pop("all", None) is not None:
            ids = await self._source.dead_ids(DeadQuery.of(asked).match)
        else:
            known(asked)
            ids = chosen(await visit.form())
        if self._letter_action is not None and self._letter_action.ended_at is None:
            raise HTTPException(409, "Other letters are being replayed or deleted; try again when that is done.")
        visit.log_action(f"dead_{action}", letters=len(ids), run_id=ids[0] if len(ids) == 1 else None)
        self._letter_action = acting = LetterAction(journal.store.path, action, ids)
        if len(ids) > 1:
            start_thread("board-letters", acting.run)
            return RedirectResponse(f"{visit.base}dead", 303)
        await in_thread(acting.run)
        if acting.error is not None:
            raise HTTPException(503, acting.error)
        notice = "gone" if not acting.done else "replayed" if action == "replay" else None
        return RedirectResponse(
            f"{visit.base}runs/{ids[0]}?notice={notice}" if ids and notice else f"{visit.base}dead", 303
        )


def _json(content: dict[str, object], status: int = 200) -> Response:
    """JSON in ASCII: Starlette's own response cannot encode lone surrogates."""
    return Response(json.dumps(content), status, media_type="application/json")
