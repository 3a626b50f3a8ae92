"""Who may see and do what: the rights of a request, its origin, and the headers of every response."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias
from urllib.parse import parse_qs

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from .._log import log

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
_FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")
_LOOPBACK_NAME = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:[0-9]+)?")
#: Maximum number of bytes and of fields of a form.
_LARGEST_FORM, _MOST_FIELDS = 65_536, 1_000


@dataclass(frozen=True, slots=True)
class Visit:
    """A request to the board: its rights, its path below the board's own, its query, and the state of its page."""

    request: Request
    rights: frozenset[str]
    path: str
    parameters: Mapping[str, str]
    cursor: str = ""

    @property
    def base(self) -> str:
        """The relative path to the board's first page, so that links work behind any proxy."""
        return "../" * (self.path.count("/") - 1) or "./"

    @property
    def user(self) -> str | None:
        """The user named in the log, by `authorize` or else by the app's authentication; None if unknown."""
        user = self.request.scope.get("user")
        named = getattr(self.request.state, "board_user", None) or getattr(user, "display_name", None)
        return None if named is None else str(named)[:200]

    def require_act(self, action: str, **about: str) -> None:
        """Refuse an action, and log that, if it comes from another site or the right `act` is missing."""
        reason = "no_right" if "act" not in self.rights else None if _is_same_origin(self.request) else "cross_site"
        if reason is not None:
            self.log_action(action, **about, reason=reason)
            raise HTTPException(403, "You may not do this: it needs the right to act, and to come from this page.")

    def log_action(self, action: str, *, reason: str | None = None, **about: Any) -> None:
        """Log an action, or the reason why it is refused."""
        log("info", "board.action", action=action, allowed=reason is None, user=self.user, reason=reason, **about)

    async def form(self) -> dict[str, list[str]]:
        """The fields of the form that was sent."""
        body = b""
        async for chunk in self.request.stream():
            body += chunk
            if len(body) > _LARGEST_FORM:
                raise HTTPException(413, f"a form must be at most {_LARGEST_FORM} bytes")
        try:
            return parse_qs(body.decode("ascii"), keep_blank_values=False, max_num_fields=_MOST_FIELDS)
        except ValueError:
            raise HTTPException(400, "this is not a form of the board") from None


def checked(granted: object) -> frozenset[str]:
    """The rights that `authorize` returned; raises an error that says why they are invalid."""
    granted = () if granted is None else granted
    if isinstance(granted, str) or not isinstance(granted, Collection):
        raise TypeError(f"Board.authorize must return a set of rights such as {{'view', 'act'}}, got {granted!r}")
    if unknown := set(granted) - set(RIGHTS):
        raise ValueError(f"Board.authorize returned unknown rights {unknown!r}; rights are {', '.join(RIGHTS)}")
    return frozenset(granted)


def _is_same_origin(request: Request) -> bool:
    """Whether a POST comes from a page of this app, by Fetch Metadata or else by its origin."""
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return site == "same-origin"
    origin, host = request.headers.get("origin"), request.headers.get("host")
    return bool(host) and origin is not None and origin.partition("://")[2] == host


def loopback_only(request: Request) -> Collection[str]:
    """All rights for a client on this machine, unless it came through a proxy or under another host's name."""
    is_forwarded = any(name in request.headers for name in _FORWARDED)
    is_own_name = _LOOPBACK_NAME.fullmatch(request.headers.get("host", "")) is not None
    try:
        is_here = request.client is not None and ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        is_here = False
    return RIGHTS if is_here and is_own_name and not is_forwarded else ()
