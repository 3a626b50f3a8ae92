"""`Board`: an ASGI app to mount; who may do what is decided here, for each route, before anything is read."""

from __future__ import annotations

import hashlib
import inspect
import ipaddress
import json
import os
import re
from collections.abc import Awaitable, Callable, Collection, Mapping
from pathlib import Path
from time import monotonic
from typing import NamedTuple, TypeAlias, cast

import anyio.to_thread
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Match, Route
from starlette.types import Receive, Scope, Send

from .. import _clock
from .._core.emit import Emitter
from .._core.hooks import KEY
from .._core.route import route_path
from .._log import log
from ..alerts import Alerts, Tested, send_test
from ..alerts import Route as Channel
from ..middleware import Companion
from ..settings import Settings
from ._entry import Entry
from ._query import STATES, RunQuery, cursor, known
from ._record import Record
from ._render import TASK, plain, run_json, templates, whole_run_json
from ._source import Source

RIGHTS = ("view", "args", "act")

Granted: TypeAlias = Collection[str] | Response | None
Authorize: TypeAlias = Callable[[Request], Granted | Awaitable[Granted]]

HEADERS = {
    "cache-control": "private, no-store",
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # With `no-referrer`, browsers send `Origin: null`, and without HTTPS nothing else tells where a POST comes from.
    "referrer-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
_STATIC = {"board.css": "text/css", "board.js": "text/javascript", "icon.svg": "image/svg+xml"}
_FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")
_LOOPBACK_NAME = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:[0-9]+)?")
_LONGEST_QUERY = 2_000
#: Seconds for which a rendered page is shared, and how many are.
_FRESH, _MOST_RENDERED = 0.5, 32

_NOT_ATTACHED = (
    "No AftertaskMiddleware serves this page. Add it to the app that the board is mounted in; if it is there, see "
    "whether Settings.exclude has the board's path, or AFTERTASK_DISABLED is set."
)


class Visit(NamedTuple):
    """A request to the board, the rights that it has, its path below the board's own, and its query."""

    request: Request
    rights: frozenset[str]
    path: str
    parameters: Mapping[str, str]

    @property
    def base(self) -> str:
        """The relative way from the path to the board's first page: links work behind any proxy."""
        return "../" * (self.path.count("/") - 1) or "./"

    @property
    def user(self) -> str | None:
        """Who is named in the log: by `authorize`, else by the app's authentication; None if unknown."""
        user = self.request.scope.get("user")
        named = getattr(self.request.state, "board_user", None) or getattr(user, "display_name", None)
        return None if named is None else str(named)[:200]


class Board(Companion):
    """
    A live page about an app's background tasks: `app.mount("/aftertask", Board(authorize=…))`.

    Mounted, it is behind the app's own session and authentication middleware. The app needs `AftertaskMiddleware`. The
    board's own requests are not observed.

    Args:
        authorize: Returns the rights that a request has: `view`, `args` (a run's arguments) and `act` (actions); none
            at all is a 403. It may return a response instead, or raise `HTTPException`. Sync or async; a sync function
            is called on the event loop and must not block. `request.state.board_user` may name the user for the log.
        insecure: Grant everything to clients on this machine, and nothing to others; instead of `authorize`.

    Raises:
        TypeError, ImportError: Neither or both are given; Jinja2 is not installed.
    """

    def __init__(self, *, authorize: Authorize | None = None, insecure: bool = False) -> None:
        if insecure == callable(authorize):
            raise TypeError(
                "Board needs authorize=…, a function that returns the rights of a request; insecure=True, instead of "
                f"it, opens the board to this machine only; got {authorize!r}"
            )
        self._authorize: Authorize = _loopback_only if authorize is None else authorize
        self.signal = record = Record()
        self._source = Source(record)
        self._emit: Emitter | None = None
        self._trace_url: str | None = None
        self._tested: dict[str, tuple[Tested, float]] = {}
        self._render = templates()
        self._files = {name: (Path(__file__).parent / "static" / name).read_bytes() for name in _STATIC}
        self._version = hashlib.sha256(b"".join(self._files.values())).hexdigest()[:8]
        paths: dict[str, Callable[..., Awaitable[Response]]] = {
            "/": self._now,
            "/runs": self._runs,
            "/runs/{id}": self._run,
            "/static/{name}": self._static,
            "/api/runs": self._api_runs,
            "/api/runs/{id}": self._api_run,
            "/api/tasks": self._api_tasks,
            "/api/changes": self._api_changes,
        }
        # They match only: what they lead to is called with the visit.
        self._routes = [Route(path, handler, methods=["GET"]) for path, handler in paths.items()]
        self._routes.append(Route("/channels/{name}/test", self._test_channel, methods=["POST"]))
        self._rendered: dict[tuple[str, frozenset[str]], tuple[float, str, str]] = {}

    def attach(self, emit: Emitter, settings: Settings | None) -> None:
        """The middleware has been built around the app that this board is mounted in."""
        self._emit = self._source.app = emit
        self._source.redact = emit.redact
        self._trace_url = None if settings is None else settings.trace_url

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; a WebSocket is refused."""
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        record = scope.pop(KEY, None)  # what is served here is not observed
        try:
            if self._emit is None and isinstance(emit := getattr(record, "app", None), Emitter):
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
        visit = Visit(request, _checked(granted), route_path(request.scope), request.query_params)
        try:
            response = await self._handle(visit)
        except HTTPException as error:
            response = await self._error(visit, error.status_code, error.detail)
        response.headers.update(HEADERS)
        return response

    async def _handle(self, visit: Visit) -> Response:
        if "view" not in visit.rights:
            raise HTTPException(403, "You may not see this page. The app's owner decides who may.")
        if self._emit is None:
            raise HTTPException(503, _NOT_ATTACHED)
        if len(visit.request.url.query) > _LONGEST_QUERY:
            raise HTTPException(400, f"the query must be at most {_LONGEST_QUERY} characters")
        if not visit.path.startswith(("/api/", "/static/")) and (unchanged := self._unchanged(visit)) is not None:
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
        """To the script of a page: nothing if nothing has changed, or what has just been sent to another such page."""
        seen = cursor(visit.request.headers, "x-aftertask-after")
        if seen is None or visit.request.method != "GET":
            return None
        if seen == self._source.cursor():
            return Response(status_code=204)
        made, was, html = self._rendered.get((str(visit.request.url), visit.rights), (0.0, "", ""))
        is_fresh = monotonic() - made < _FRESH and was != seen
        return Response(html, media_type="text/html") if is_fresh else None

    async def _page(self, visit: Visit, template: str, values: dict[str, object], status: int = 200) -> Response:
        at, current = monotonic(), self._source.cursor() if status == 200 else ""
        values |= {"cursor": current, "status": status, "now": _clock.timestamp(), "process": os.getpid()}
        values |= {"base": visit.base, "rights": visit.rights, "here": visit.path, "version": self._version}
        html = await self._render(template, values)
        if len(self._rendered) >= _MOST_RENDERED:
            self._rendered.clear()
        if status == 200:
            self._rendered[str(visit.request.url), visit.rights] = at, current, html
        return Response(html, status, media_type="text/html")

    async def _now(self, visit: Visit) -> Response:
        known(visit.parameters)
        values = {"tasks": await self._source.tasks(), "channels": self._channels(), "tested": self._tested}
        return await self._page(visit, "now.html", values | await self._source.overview())

    async def _runs(self, visit: Visit) -> Response:
        query = RunQuery.of(visit.parameters)
        runs, before = await self._source.runs(query)
        values = {"tasks": await self._source.tasks(), "query": query, "runs": runs, "before": before, "states": STATES}
        return await self._page(visit, "runs.html", values)

    async def _run(self, visit: Visit, id: str) -> Response:
        known(visit.parameters)
        run = await self._known(id)
        trace = self._trace_url and run.trace_id and self._trace_url.replace("{trace_id}", run.trace_id)
        siblings, stack = await self._source.siblings(run), await self._source.stack(id)
        return await self._page(visit, "run.html", {"run": run, "siblings": siblings, "stack": stack, "trace": trace})

    async def _known(self, id: str) -> Entry:
        run = await self._source.run(id)
        if run is None:
            raise HTTPException(404, "This run is not known, or no longer kept: only the last ones are.")
        return run

    async def _static(self, visit: Visit, name: str) -> Response:
        if name not in self._files:
            raise HTTPException(404, "There is no such file.")
        return Response(self._files[name], media_type=_STATIC[name])

    async def _api_runs(self, visit: Visit) -> Response:
        runs, before = await self._source.runs(RunQuery.of(visit.parameters))
        return _json({"runs": [run_json(run) for run in runs], "next_before": before})

    async def _api_run(self, visit: Visit, id: str) -> Response:
        known(visit.parameters)
        run = await self._known(id)
        return _json(whole_run_json(run, await self._source.siblings(run), await self._source.stack(id)))

    async def _api_tasks(self, visit: Visit) -> Response:
        known(visit.parameters)
        return _json({"tasks": [plain(line, TASK) for line in await self._source.tasks()]})

    async def _api_changes(self, visit: Visit) -> Response:
        known(visit.parameters, "after")
        after, current = cursor(visit.parameters, "after"), self._source.cursor()
        if after == current:
            return Response(status_code=204)
        runs, gap = await self._source.changes(after)
        return _json({"cursor": current, "gap": gap, "runs": [run_json(run) for run in runs]})

    def _channels(self) -> list[Channel]:
        signals = self._emit.signals if self._emit else ()
        return [route for signal in signals if isinstance(signal, Alerts) for route in signal.routes]

    async def _test_channel(self, visit: Visit, name: str) -> Response:
        _allow(visit, "alert_test", name[:200])
        channel = next((each for each in self._channels() if each.name == name), None)
        if channel is None:
            raise HTTPException(404, "There is no such channel.")
        # Not a thread of the pool that endpoints share: it may be full when this page is needed.
        (tested,) = await anyio.to_thread.run_sync(send_test, [channel], limiter=anyio.CapacityLimiter(1))
        self._tested[name] = tested, _clock.timestamp()
        return RedirectResponse(f"{visit.base}#channels", 303)


def _allow(visit: Visit, action: str, channel: str) -> None:
    """Log an action, and refuse it if it comes from another site, or the right to it is missing."""
    reason = "no_right" if "act" not in visit.rights else None if _is_same_origin(visit.request) else "cross_site"
    log("info", "board.action", action=action, channel=channel, allowed=not reason, reason=reason, user=visit.user)
    if reason is not None:
        raise HTTPException(403, "You may not do this: it needs the right to act, and to come from this page.")


def _json(content: dict[str, object], status: int = 200) -> Response:
    """JSON in ASCII: Starlette's own response cannot encode halves of characters."""
    return Response(json.dumps(content), status, media_type="application/json")


def _checked(granted: object) -> frozenset[str]:
    """The rights that `authorize` has returned; raises what says why they are none."""
    granted = () if granted is None else granted
    if isinstance(granted, str) or not isinstance(granted, Collection):
        raise TypeError(f"Board.authorize must return a set of rights such as {{'view', 'act'}}, got {granted!r}")
    if unknown := set(granted) - set(RIGHTS):
        raise ValueError(f"Board.authorize returned unknown rights {unknown!r}; rights are {', '.join(RIGHTS)}")
    return frozenset(granted)


def _is_same_origin(request: Request) -> bool:
    """Whether a POST comes from a page of this app: by Fetch Metadata, else by its origin."""
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return site == "same-origin"
    origin, host = request.headers.get("origin"), request.headers.get("host")
    return bool(host) and origin is not None and origin.partition("://")[2] == host


def _loopback_only(request: Request) -> Collection[str]:
    """All rights for a client on this machine, unless a proxy or the name of another site has led it here."""
    is_forwarded = any(name in request.headers for name in _FORWARDED)
    is_own_name = _LOOPBACK_NAME.fullmatch(request.headers.get("host", "")) is not None
    try:
        is_here = request.client is not None and ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        is_here = False
    return RIGHTS if is_here and is_own_name and not is_forwarded else ()
