"""`Route`: which alerts a channel gets, how many, and how persistently."""

from __future__ import annotations

import copy
import fnmatch
import re
from collections import Counter
from collections.abc import Iterable

from .._signatures import takes
from ..policies import SEVERITIES, Severity, check_seconds, check_whole
from ..tasks import attribute, code_name
from .alert import Channel
from .apprise import Apprise
from .webhook import Webhook

_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]*"


class Route:
    """
    A channel, and which alerts go to it. A channel without a route gets every alert.

    Args:
        channel: `Webhook`, `Apprise`, a function, or a URL as in `AFTERTASK_ALERTS`.
        severity: The lowest severity that is sent.
        owner: Only alerts of tasks with this owner, or one of these. A burst concerns no task and no owner, so it goes
            only to routes that set neither `owner` nor `task`.
        task: Only alerts of tasks with this name or pattern (`mail.*`, as `fnmatch`), or one of these.
        name: The channel's name in metrics and logs: at most 50 letters, digits, dots and dashes. None means its kind:
            `webhook`, `slack`, the function's name.
        timeout: Seconds for one attempt, more than 0.
        attempts: Maximum number of attempts to deliver one message, at least 1, with waits of up to 2, 4, … 30 s (full
            jitter). A message that fails is kept and sent again after 1, 2, 4, 8 and then every 10 minutes.
        rate, per: At most `rate` messages in `per` seconds. If more are due, the last one summarises the others.

    Raises:
        TypeError, ValueError: A value is not allowed.

    Source: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """

    def __init__(
        self,
        channel: Channel | str,
        *,
        severity: Severity = "info",
        owner: str | Iterable[str] = (),
        task: str | Iterable[str] = (),
        name: str | None = None,
        timeout: float = 10.0,
        attempts: int = 4,
        rate: int = 10,
        per: float = 300.0,
    ) -> None:
        if severity not in SEVERITIES:
            raise ValueError(f"Route.severity must be one of {', '.join(map(repr, SEVERITIES))}, got {severity!r}")
        if name is not None and (not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,50}", name)):
            raise ValueError(f"Route.name must be letters, digits, dots and dashes, at most 50, got {name!r}")
        check_seconds("Route.timeout", timeout)
        check_whole("Route.attempts", attempts, least=1)
        check_whole("Route.rate", rate, least=1)
        check_seconds("Route.per", per)
        self.channel = _channel(channel)
        self.severity: Severity = severity
        self.owners, self.tasks = _names("owner", owner), _names("task", task)
        self.has_own_name = name is not None
        self.name = name or _default_name(self.channel)
        self.timeout, self.attempts, self.rate, self.per = float(timeout), attempts, rate, float(per)

    def accepts(self, severity: Severity, owner: str | None, task: str | None) -> bool:
        """Whether an alert with this severity, owner and task goes to this channel."""
        return (
            SEVERITIES.index(severity) >= SEVERITIES.index(self.severity)
            and (not self.owners or owner in self.owners)
            and (not self.tasks or (task is not None and any(fnmatch.fnmatchcase(task, each) for each in self.tasks)))
        )

    def __repr__(self) -> str:
        # The repr of a partial, or of a channel of the user's own, may hold a token.
        safe = isinstance(self.channel, (Webhook, Apprise))
        return f"Route({repr(self.channel) if safe else code_name(self.channel)}, name={self.name!r})"


def routes(channels: Iterable[Channel | Route | str]) -> list[Route]:
    """Channels as routes with unique names: a second `webhook` is called `webhook-2`."""
    if isinstance(channels, (str, bytes)) or not isinstance(channels, Iterable):
        raise TypeError(
            f"alerts must be a list of channels, got {type(channels).__name__}; write alerts=[Webhook('https://…')]"
        )
    found = [copy.copy(each) if isinstance(each, Route) else Route(each) for each in channels]
    taken = Counter(route.name for route in found if route.has_own_name)
    for name, count in taken.items():
        if count > 1:
            raise ValueError(f"two alert channels are named {name!r}; give each Route its own name")
    for route in found:
        if not route.has_own_name:
            name, number = route.name, 1
            while taken[route.name]:
                number += 1
                route.name = f"{name}-{number}"
            taken[route.name] = 1
    return found


def channel_from_url(url: str) -> Channel:
    """The channel for a URL: `Webhook` for `https://` and `http://`, `Apprise` for any other scheme."""
    scheme, separator, _ = url.strip().partition("://")
    if not separator or not re.fullmatch(_SCHEME, scheme):
        raise ValueError(
            "an alert channel must be a URL such as https://example.org/hook or slack://…, got one without a scheme: a "
            "webhook's address begins with https://, and a chat or mail has a scheme of its own"
        )
    return Webhook(url) if scheme.lower() in ("http", "https") else Apprise(url)


def urls_in(text: str) -> list[str]:
    """
    The URLs in a comma-separated list; a comma that no new URL follows is part of the URL.

    Raises:
        ValueError: They are separated by something else, or one has no scheme; the message shows no secret.
    """
    if re.search(rf"[;|\s]\s*{_SCHEME}://", re.sub(r",\s+", ",", text.strip())):
        raise ValueError("the URLs must be separated by commas: https://…,slack://…")
    if re.search(r",\s+\S", re.sub(rf",\s+(?={_SCHEME}://)", ",", text)):
        raise ValueError(
            "after a comma comes an entry without a scheme: begin each with https://, slack:// and the like"
        )
    return [part.strip() for part in re.split(rf",(?=\s*{_SCHEME}://)", text) if part.strip()]


def _channel(channel: object) -> Channel:
    if isinstance(channel, str):
        return channel_from_url(channel)
    if isinstance(channel, Route):
        raise TypeError("a Route takes a channel, not another Route")
    if isinstance(channel, type):
        raise TypeError(
            f"a channel must be an instance, got the class {channel.__qualname__}; write {channel.__name__}(…)"
        )
    if not isinstance(channel, Channel):
        raise TypeError(f"a channel must be a URL, Webhook(…), Apprise(…) or a function, got {type(channel).__name__}")
    if not takes(channel, 1):
        raise TypeError(f"a channel takes one argument, the alert; {code_name(channel)} does not")
    return channel


def _default_name(channel: Channel) -> str:
    """The channel's `name`, else the name of the function or class."""
    name = attribute(channel, "name")
    if not isinstance(name, str) or not name:
        name = code_name(channel).rpartition(".")[2]
    return re.sub(r"[^\w.-]", "_", name)[:50]


def _names(field: str, value: str | Iterable[str]) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) or not isinstance(value, Iterable) else tuple(value)
    if not all(isinstance(name, str) and name for name in names):
        raise TypeError(f"Route.{field} must be one name or several, got {value!r}; write {field}=['…', '…']")
    return names
