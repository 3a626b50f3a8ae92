"""The parameters of a request to the board: each is known, bounded and checked."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from urllib.parse import urlencode

from starlette.exceptions import HTTPException

from ..events import OUTCOMES
from ..policies import is_pattern
from ._entry import LONGEST_NAME, Entry

IN_FLIGHT = ("scheduled", "queued", "running", "backoff")

#: What `state` may be, besides nothing.
STATES = ("in_flight", "bad", *IN_FLIGHT, *OUTCOMES)
_CURSOR = re.compile(r"[0-9a-f]{1,32}\.[0-9]{1,15}\.[0-9a-f]{1,32}")


@dataclass(frozen=True, slots=True)
class RunQuery:
    """
    Which runs to show; what is empty or 0 is not asked for.

    Attributes:
        task: The task's name, or a pattern (`mail.*`).
        state: One of `STATES`.
        q: Text in the request, the error, the reason or an id, in any case.
        before: Runs that ended before the one with this number.
        limit: At most this many runs, from 1 to 200.
    """

    task: str = ""
    state: str = ""
    q: str = ""
    before: int = 0
    limit: int = 50

    @classmethod
    def of(cls, given: Mapping[str, str]) -> RunQuery:
        """The query that parameters ask for; raises HTTPException."""
        known(given, *cls.__dataclass_fields__)
        for name in ("task", "q"):
            if len(given.get(name, "")) > LONGEST_NAME:
                raise HTTPException(400, f"{name} must be at most {LONGEST_NAME} characters, got {len(given[name])}")
        state = given.get("state", "")
        if state and state not in STATES:
            raise HTTPException(400, f"state must be one of {', '.join(STATES)}, got {_shown(state)}")
        before, limit = _whole(given, "before", 10**15), _whole(given, "limit", 200)
        return cls(given.get("task", "").strip(), state, given.get("q", "").strip(), before, limit or cls().limit)

    def matches(self, entry: Entry) -> bool:
        """Whether a run is one of them; `limit` is for the caller."""
        if self.before and not 0 < entry.number < self.before:
            return False
        if self.state and self.state not in (entry.state, entry.ended is None and "in_flight", entry.bad and "bad"):
            return False
        is_exact = not is_pattern(self.task) or self.task == entry.task
        if self.task and not (self.task == entry.task if is_exact else fnmatch.fnmatchcase(entry.task, self.task)):
            return False
        return not self.q or self.q.lower() in " ".join(filter(None, _texts(entry))).lower()

    def link(self, **changes: str | int) -> str:
        """The query string of this query with these changes, with its question mark."""
        usual, given = asdict(RunQuery()), asdict(replace(self, **changes))  # type: ignore[arg-type]  # each of its type
        return f"?{urlencode({name: value for name, value in given.items() if value != usual[name]})}"


def known(given: Mapping[str, str], *names: str) -> None:
    """Refuse a parameter that is none of these."""
    for name in given:
        if name not in names:
            raise HTTPException(400, f"unknown parameter {_shown(name)}; known are: {', '.join(names) or 'none'}")


def cursor(given: Mapping[str, str], name: str) -> str | None:
    """The cursor that an earlier answer gave; None without one; raises HTTPException."""
    text = given.get(name)
    if text and not _CURSOR.fullmatch(text):
        raise HTTPException(400, f"{name} must be the cursor of an earlier answer, got {_shown(text)}")
    return text or None


def _texts(entry: Entry) -> Iterator[str | None]:
    origin = entry.origin
    yield from (entry.id, entry.reason, entry.trace_id, origin.request_id, origin.method, origin.route)
    yield from map(str, entry.whose.values())
    for attempt in entry.attempts:
        yield from (attempt.error_type, attempt.message)


def _whole(given: Mapping[str, str], name: str, most: int) -> int:
    text = given.get(name, "")
    if not re.fullmatch(r"[0-9]{0,16}", text) or (text and not 1 <= int(text) <= most):
        raise HTTPException(400, f"{name} must be a whole number from 1 to {most}, got {_shown(text)}")
    return int(text or 0)


def _shown(value: str) -> str:
    return repr(value if len(value) <= 50 else f"{value[:49]}…")
