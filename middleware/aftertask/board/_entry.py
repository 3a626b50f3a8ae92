"""The board's record of a run: text and numbers, without references to the run, its arguments or its result."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from .. import _clock
from .._stored import Row, StoredRun
from .._taskrun import Progress, TaskInfo, TaskRun
from ..journal.rows import Place

#: Longer names of tasks are cut to this many characters.
LONGEST_NAME = 200


@dataclass(slots=True, eq=False)
class Origin:
    """The request that scheduled a run; siblings are the runs that share it."""

    method: str | None
    route: str | None
    request_id: str | None


@dataclass(slots=True, eq=False)
class Attempt:
    """One attempt, what it raised (redacted; None if nothing, or no longer kept), and the delay until the next."""

    number: int
    started: float
    duration_s: float | None = None
    error_type: str | None = None
    message: str | None = None
    stack: str | None = None
    hint: str | None = None
    delay_s: float | None = None


@dataclass(slots=True)
class Note:
    """Something that was noticed about a run: it is slow or stuck, or has a hazard."""

    at: float
    kind: str
    text: str
    stack: str | None


class Step(NamedTuple):
    """A part of a run's time: `response`, `wait`, `attempt`, `failed`, `backoff` or `end`; None while it lasts."""

    kind: str
    label: str
    started: float
    took_s: float | None
    detail: str | None = None


@dataclass(slots=True, eq=False)
class Entry:
    """
    A run, in flight or ended; moments are seconds since the Unix epoch, None where they are still to come.

    `number` counts the ended runs of the process, `raised` is the class of the exception that ended its request, and
    `caused_by` the id and task of the run because of which it was skipped; `whose` is what `note()` attached.
    `stored` is what the journal says of it, `first` the first run of the same request there, and `is_here` whether
    this process runs or ran it.
    """

    id: str
    task: str
    info: TaskInfo
    origin: Origin
    parent: str | None
    scheduled: float
    queued: float | None
    queue_wait_s: float | None
    thread_wait_s: float | None
    blocked_s: float
    progress: Progress | None
    trace_id: str | None
    whose: dict[str, str | int | float | bool]
    state: str
    attempts: list[Attempt]
    notes: list[Note] = field(default_factory=list)
    number: int = 0
    bad: bool = False
    ended: float | None = None
    reason: str | None = None
    raised: str = ""
    caused_by: tuple[str, str] | None = None
    stored: StoredRun | None = None
    first: str | None = None
    is_here: bool = True

    @property
    def place(self) -> Place:
        """Where a page of ended runs continues after this one; a run in flight comes before all of them."""
        return (_clock.timestamp(), "~") if self.ended is None else (self.ended, self.id)

    @property
    def last(self) -> Attempt | None:
        """The current or last attempt; None before the first."""
        return self.attempts[-1] if self.attempts else None

    @property
    def changed(self) -> float:
        """When its state last changed."""
        if self.ended is not None or self.last is None:
            return self.ended or self.queued or self.scheduled
        return self.last.started + (self.last.duration_s or 0.0)

    def took_s(self, now: float) -> float | None:
        """Seconds that the last attempt took or has taken so far; None before the first."""
        if self.last is None:
            return None
        return max(0.0, now - self.last.started) if self.last.duration_s is None else self.last.duration_s

    def waited_s(self, now: float) -> float | None:
        """Seconds that it waited for its turn, or has waited so far; None if the response is not sent yet."""
        if self.queue_wait_s is not None or self.queued is None or self.ended is not None:
            return self.queue_wait_s
        return max(0.0, now - self.queued)

    def drop_stacks(self) -> None:
        """Keep no stack: this run may be one of thousands."""
        for attempt in self.attempts:
            attempt.stack = None
        for note in self.notes:
            note.stack = None

    def steps(self) -> Iterator[Step]:
        """The parts of its time, in order."""
        first = self.attempts[0].started if self.attempts else self.ended
        sent = first if self.queued is None else self.queued
        yield Step("response", "Response", self.scheduled, None if sent is None else max(0.0, sent - self.scheduled))
        if self.queued is not None:
            yield Step("wait", "Queue", self.queued, None if first is None else max(0.0, first - self.queued))
        for attempt in self.attempts:
            kind, detail = "attempt", None
            if attempt.error_type is not None:
                kind, detail = "failed", f"{attempt.error_type}: {attempt.message}"
            yield Step(kind, f"Attempt {attempt.number}", attempt.started, attempt.duration_s, detail)
            if attempt.delay_s is not None:
                yield Step("backoff", "Back-off", attempt.started + (attempt.duration_s or 0.0), attempt.delay_s)
        if self.ended is not None:
            reason = None if self.reason is None else words(self.reason)
            yield Step("end", words(self.state).capitalize(), self.ended, 0.0, reason)


class Trail(NamedTuple):
    """What was noticed about a run that has not ended."""

    attempts: list[Attempt]
    notes: list[Note]


def entry_of(run: TaskRun, origin: Origin, trail: Trail | None) -> Entry:
    """A run as it is now; if it has ended, the caller adds the outcome."""
    attempts = [] if trail is None else list(trail.attempts)
    if run.started_s is not None and (not attempts or attempts[-1].number < run.attempt):
        attempts.append(Attempt(run.attempt, _unix(run, run.started_s)))
    return Entry(
        id=run.id,
        task=short(run.task),
        info=run.info,
        origin=origin,
        parent=None if run.parent is None else run.parent.id,
        scheduled=run.timestamp,
        queued=None if run.queued_s is None else _unix(run, run.queued_s),
        queue_wait_s=run.queue_wait_s,
        thread_wait_s=run.thread_wait_s,
        blocked_s=run.blocked_s,
        progress=run.progress,
        trace_id=run.trace_ids["trace_id"],
        whose=run.notes,
        state=run.state,
        attempts=attempts,
        notes=[] if trail is None else list(trail.notes),
    )


def entry_of_row(row: Row, info: TaskInfo | None) -> Entry:
    """A run of any worker; `info` is what this process knows of its task, None if it does not know the task."""
    stored, more = StoredRun.of(row), json.loads(row["more"] or "{}")
    attempts = [
        Attempt(number, started, took_s, short(error), message, hint=hint, delay_s=delay_s)
        for number, started, took_s, error, message, hint, delay_s in more.get("attempts", ())
    ]
    state = stored.state
    if stored.attempt > (attempts[-1].number if attempts else 0) and stored.started_timestamp is not None:
        started = more.get("began_at") or stored.started_timestamp
        attempts.append(Attempt(stored.attempt, started, _took_s(stored, started)))
        if stored.outcome in ("failed", "timed_out"):
            attempts[-1].error_type, attempts[-1].message = short(stored.error_type or ""), stored.error_message
    elif attempts and stored.outcome is None:
        state = "backoff"
    if attempts and attempts[-1].error_type is not None:
        attempts[-1].stack, attempts[-1].hint = stored.stack, more.get("hint")
    waited, started_at = stored.queue_wait_s, stored.started_timestamp
    cause = more.get("caused_by")
    return Entry(
        id=stored.id,
        task=short(stored.task),
        info=info or TaskInfo(stored.task, row["code"], executor=""),
        origin=Origin(stored.http_method, stored.http_route, stored.request_id),
        parent=more.get("parent"),
        scheduled=stored.timestamp,
        queued=more.get("queued_at", row["ready_at"]) if waited is None or started_at is None else started_at - waited,
        queue_wait_s=waited,
        thread_wait_s=more.get("thread_wait_s"),
        blocked_s=more.get("blocked_s", 0.0),
        progress=stored.progress,
        trace_id=stored.trace_id,
        whose=more.get("notes", {}),
        state=state,
        attempts=attempts,
        bad=bool(row["bad"]),
        ended=stored.settled_timestamp,
        reason=stored.reason,
        raised=short(stored.error_type or "") if state == "dropped" else "",
        caused_by=None if cause is None else (cause[0], short(cause[1])),
        stored=stored,
        first=row["first"],
        is_here=False,
    )


def _took_s(stored: StoredRun, started: float) -> float | None:
    """Seconds that an attempt took; in a dead worker, at most until its death was noticed."""
    if stored.duration_s is not None or stored.settled_timestamp is None:
        return stored.duration_s
    return max(0.0, stored.settled_timestamp - started)


def short(name: str) -> str:
    """A name that can be part of an address: cut if it is very long, without lone surrogates."""
    name = name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
    return name if name.isascii() else name.encode("utf-8", "replace").decode()


def words(name: str) -> str:
    """An identifier as words."""
    return name.replace("_", " ")


def _unix(run: TaskRun, seconds: float) -> float:
    """A monotonic time of a run as seconds since the Unix epoch."""
    return run.timestamp + (seconds - run.scheduled_s)
