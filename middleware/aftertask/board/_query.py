"""The parameters of a request to the board: each is known, bounded and checked."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Self
from urllib.parse import urlencode

from starlette.exceptions import HTTPException

from ..events import OUTCOMES
from ..journal.letters import Match
from ..journal.rows import Place
from ..journal.settle import DEAD
from ..policies import is_pattern
from ..signals import families
from ._entry import LONGEST_NAME, Entry

#: What `state` may be, besides nothing.
STATES = ("in_flight", "bad", *families.STATES, *OUTCOMES)
#: At most this many dead letters are chosen one by one.
MOST_CHOSEN = 200


@dataclass(frozen=True)
class Query:
    """
    What both kinds of queries have in common; what is empty is not asked for.

    Attributes:
        task: The task's name; of runs also a pattern (`mail.*`).
        before: Those that ended before this place.
        limit: At most this many, from 1 to 200.
    """

    task: str = ""
    before: str = ""
    limit: int = 50

    @classmethod
    def of(cls, given: Mapping[str, str]) -> Self:
        """Parse the parameters into a query; raises HTTPException."""
        known(given, *cls.__dataclass_fields__)
        return cls(**{name: _CHECKS[name](name, text) for name, text in given.items()})

    @property
    def place(self) -> Place | None:
        """Where the page begins; None for the first one."""
        at, _, id = self.before.partition("~")
        return (float(at), id) if self.before else None

    def link(self, **changes: str) -> str:
        """The query string of this query with these changes, with its question mark."""
        asked, usual = {**vars(self), **changes}, vars(type(self)())
        return f"?{urlencode({name: value for name, value in asked.items() if value != usual[name]})}"


@dataclass(frozen=True)
class RunQuery(Query):
    """
    Which runs to show.

    Attributes:
        state: One of `STATES`.
        q: Text in the request, the error, the reason or an id, in any case.
    """

    state: str = ""
    q: str = ""

    def matches(self, entry: Entry) -> bool:
        """Whether a run is one of them; `limit` is for the caller."""
        if self.place is not None and (entry.ended is None or entry.place >= self.place):
            return False
        if self.state and self.state not in (entry.state, entry.ended is None and "in_flight", entry.bad and "bad"):
            return False
        if self.task not in ("", entry.task) and not (is_pattern(self.task) and fnmatchcase(entry.task, self.task)):
            return False
        return not self.q or self.q.lower() in " ".join(filter(None, _texts(entry))).lower()


@dataclass(frozen=True)
class DeadQuery(Query):
    """
    Which dead letters to show or to act on.

    Attributes:
        reason: A key of `DEAD`.
        fingerprint: Of the error, or `NO_ERROR`.
    """

    reason: str = ""
    fingerprint: str = ""

    @property
    def match(self) -> Match:
        """The same for the journal."""
        return Match(self.task or None, self.reason or None, self.fingerprint or None)


def chosen(form: Mapping[str, Sequence[str]]) -> list[str]:
    """The ids of the dead letters that a form names; raises HTTPException."""
    ids = form.get("id", ())
    if form.keys() - {"id"} or not 1 <= len(ids) <= MOST_CHOSEN or any(len(id) > LONGEST_NAME for id in ids):
        raise HTTPException(400, f"choose 1 to {MOST_CHOSEN} dead letters, or all that match")
    return list(ids)


def place_text(place: Place | None) -> str | None:
    """A position in the form that `before` takes."""
    return None if place is None else f"{place[0]!r}~{place[1]}"


def known(given: Mapping[str, str], *names: str) -> None:
    """Refuse a parameter that is not one of these."""
    for name in given:
        if name not in names:
            raise HTTPException(400, f"unknown parameter {_shown(name)}; known are: {', '.join(names) or 'none'}")


def cursor(given: Mapping[str, str], name: str) -> str | None:
    """The cursor from an earlier response; None if there is none; raises HTTPException."""
    return _cursor(name, given.get(name, "")) or None


def _texts(entry: Entry) -> Iterator[str | None]:
    origin = entry.origin
    yield from (entry.id, entry.reason, entry.trace_id, origin.request_id, origin.method, origin.route)
    yield from map(str, entry.whose.values())
    yield None if entry.stored is None else entry.stored.dead
    for attempt in entry.attempts:
        yield from (attempt.error_type, attempt.message)


def _text(name: str, text: str) -> str:
    text = text.strip()
    if len(text) > LONGEST_NAME:
        raise HTTPException(400, f"{name} must be at most {LONGEST_NAME} characters, got {len(text)}")
    return text


def _one_of(values: Collection[str]) -> Callable[[str, str], str]:
    def check(name: str, text: str) -> str:
        if text and text not in values:
            raise HTTPException(400, f"{name} must be one of {', '.join(values)}, got {_shown(text)}")
        return text

    return check


def _given_by_us(pattern: str, what: str) -> Callable[[str, str], str]:
    def check(name: str, text: str) -> str:
        if text and not re.fullmatch(pattern, text):
            raise HTTPException(400, f"{name} must be the {what} of an earlier response, got {_shown(text)}")
        return text

    return check


def _limit(name: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,3}", text) or not 1 <= int(text) <= 200:
        raise HTTPException(400, f"{name} must be a whole number from 1 to 200, got {_shown(text)}")
    return int(text)


def _shown(value: str) -> str:
    return repr(value if len(value) <= 50 else f"{value[:49]}…")


_cursor = _given_by_us(r"[0-9a-f]{1,32}\.[0-9]{1,15}\.[0-9a-f]{1,32}", "cursor")
_CHECKS: dict[str, Callable[[str, str], Any]] = {
    **dict.fromkeys(("task", "q", "fingerprint"), _text),
    "state": _one_of(STATES),
    "reason": _one_of(DEAD),
    "before": _given_by_us(r"[0-9]{1,12}\.[0-9]{1,9}~[0-9A-Za-z~-]{1,64}", "next_before"),
    "limit": _limit,
}
