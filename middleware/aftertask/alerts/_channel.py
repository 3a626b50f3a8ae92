"""What a channel is: anything that takes an alert and delivers it; `Route` says which alerts, and how many."""

from __future__ import annotations

import copy
import fnmatch
import inspect
import math
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol, TypeAlias, runtime_checkable

from ..errors import AftertaskError
from ..policies import SEVERITIES, Severity, code_name
from ._alert import Alert

#: `Webhook`, `Apprise`, or a plain function.
Deliver: TypeAlias = Callable[[Alert], Awaitable[None] | None]


@runtime_checkable
class Channel(Protocol):
    """
    Takes an alert and delivers it; an exception means that it could not. A plain function will do, sync or async.

    It is called in a thread of its own, never on a task's path and never on the app's event loop; an async one with
    an asyncio loop that lasts for the call. It may raise `DeliveryFailed` to say when, or that it makes no sense, to
    try again.
    """

    def __call__(self, alert: Alert, /) -> Awaitable[None] | None: ...


class DeliveryFailed(AftertaskError):
    """
    An alert could not be delivered.

    Args:
        message: Why; it is logged, so without secrets.
        retry_after: The receiver asked to be left alone for so many seconds; None: it said nothing.
        permanent: Trying again at once makes no sense, such as for a wrong address.

    Raises:
        ValueError: `retry_after` is no number of seconds.
    """

    __module__ = "aftertask.alerts"  # the name that the log tells it by

    def __init__(self, message: str, *, retry_after: float | None = None, permanent: bool = False) -> None:
        super().__init__(message)
        if retry_after is not None and not 0 <= retry_after < math.inf:
            raise ValueError(f"DeliveryFailed.retry_after must be a number of seconds or None, got {retry_after!r}")
        self.retry_after = retry_after
        self.permanent = permanent


class Route:
    """
    A channel, and which alerts go to it, how many, and how hard to try. A channel without one gets every alert.

    Args:
        channel: `Webhook`, `Apprise`, a function, or a URL as in `AFTERTASK_ALERTS`.
        severity: The least that it is told.
        owner: Only alerts of tasks that have this owner, or one of these.
        task: Only alerts of tasks with this name or pattern (`mail.*`, as `fnmatch`), or one of these. A burst
            belongs to no task and no owner, so it goes to channels that name neither.
        name: How it is called in metrics and logs; by default after its kind: `webhook`, `slack`.
        timeout: Seconds for one attempt to deliver, in all.
        attempts: How often one delivery is tried, with waits of up to 2, 4, … 30 s, by full jitter. What
            could not be delivered then is kept, and told again a minute later and, at last, every ten minutes.
        rate, per: At most so many messages in so many seconds; what is left out is told as a number in the next.

    Raises:
        TypeError, ValueError: A value is not one of those allowed.

    Source: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """

    def __init__(
        self,
        channel: Deliver | str,
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
        self.channel: Deliver = _checked(channel)
        if severity not in SEVERITIES:
            raise ValueError(f"Route.severity must be one of {', '.join(map(repr, SEVERITIES))}, got {severity!r}")
        self.severity: Severity = severity
        self.owners = _names("owner", owner)
        self.tasks = _names("task", task)
        if name is not None and (not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,50}", name)):
            raise ValueError(f"Route.name must be letters, digits, dots and dashes, at most 50, got {name!r}")
        self.name, self.named = name or name_of(self.channel), name is not None
        for field, value in (("timeout", timeout), ("per", per)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"Route.{field} must be more than 0 seconds, got {value!r}")
        for field, value in (("attempts", attempts), ("rate", rate)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"Route.{field} must be a whole number, at least 1, got {value!r}")
        self.timeout, self.attempts, self.rate, self.per = float(timeout), attempts, rate, float(per)

    def wants(self, severity: Severity, owner: str | None, task: str | None) -> bool:
        """Whether an alert of this severity, owner and task goes here."""
        return (
            SEVERITIES.index(severity) >= SEVERITIES.index(self.severity)
            and (not self.owners or owner in self.owners)
            and (not self.tasks or (task is not None and any(fnmatch.fnmatchcase(task, each) for each in self.tasks)))
        )

    def __repr__(self) -> str:
        return f"Route({self.channel!r}, name={self.name!r})"


def name_of(channel: object) -> str:
    """What a channel is called where nobody said: a function by its own name."""
    said = getattr(channel, "name", None)
    name = said if isinstance(said, str) and said else code_name(channel).rpartition(".")[2]
    return re.sub(r"[^\w.-]", "_", name)[:50]


def routes(channels: Iterable[object]) -> list[Route]:
    """
    Channels as routes, each under a name of its own: a second `webhook` is `webhook-2`.

    Raises:
        TypeError: One of them is no channel.
        ValueError: A URL is malformed, or two routes were given the same name.
    """
    if isinstance(channels, (str, bytes)) or not isinstance(channels, Iterable):
        raise TypeError(
            f"alerts must be a list of channels, got {type(channels).__name__}; write alerts=[Webhook('https://…')]"
        )
    found = [copy.copy(each) if isinstance(each, Route) else Route(each) for each in channels]  # type: ignore[arg-type]  # checked there
    said = Counter(route.name for route in found if route.named)
    twice = [name for name, count in said.items() if count > 1]
    if twice:
        raise ValueError(f"two alert channels are called {twice[0]!r}; give each Route a name of its own")
    for route in found:
        if not route.named:
            name, number = route.name, 1
            while said[route.name]:
                number += 1
                route.name = f"{name}-{number}"
            said[route.name] = 1
    return found


def channel_of(url: str) -> Deliver:
    """
    The channel that a URL means: `https://` and `http://` a `Webhook`, any other scheme `Apprise`.

    Raises:
        ValueError: It is no URL, or of a scheme that nobody knows.
    """
    from .apprise import Apprise
    from .webhook import Webhook

    scheme, found, _ = url.strip().partition("://")
    if not found or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        raise ValueError(
            "an alert channel must be a URL such as https://example.org/hook or slack://…, got one without a scheme"
        )
    return Webhook(url.strip()) if scheme.lower() in ("http", "https") else Apprise(url.strip())


def urls_in(text: str) -> list[str]:
    """The URLs of a list; a comma belongs to a URL unless another one begins after it."""
    return [part.strip() for part in re.split(r",(?=\s*[A-Za-z][A-Za-z0-9+.-]*://)", text) if part.strip()]


def _checked(channel: object) -> Deliver:
    if isinstance(channel, str):
        return channel_of(channel)
    if isinstance(channel, Route):
        raise TypeError("a Route takes a channel, not another Route")
    if isinstance(channel, type):
        raise TypeError(
            f"a channel must be an instance, got the class {channel.__qualname__}; write {channel.__name__}(…)"
        )
    if not callable(channel):
        raise TypeError(f"a channel must be a URL, Webhook(…), Apprise(…) or a function, got {type(channel).__name__}")
    try:
        inspect.signature(channel).bind(None)
    except TypeError:
        raise TypeError(f"a channel takes one argument, the alert, and {code_name(channel)} does not") from None
    except ValueError:  # a builtin that does not tell its signature
        pass
    return channel


def _names(field: str, value: str | Iterable[str]) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(name, str) and name for name in names):
        raise TypeError(f"Route.{field} must be a name or several, got {value!r}")
    return names
