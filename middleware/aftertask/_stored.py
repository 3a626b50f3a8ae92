"""A run as the journal knows it, and how `get_run` and `cancel_run` find runs; public through `aftertask`."""

from __future__ import annotations

import json
import weakref
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any, Literal, Protocol, TypeAlias

from ._taskrun import Progress, TaskRun, in_flight

#: What `cancel_run` did; None if the run is unknown or has ended.
Cancellation: TypeAlias = Literal["dropped", "cancelled", "requested", "impossible"]


@dataclass(frozen=True, slots=True)
class TraceIds:
    """The span of the request of a stored run: a `SpanContext` of another process."""

    trace_id: int
    span_id: int
    trace_flags: int = 1


class Row(Protocol):
    """A row of the journal, as sqlite3 returns it."""

    def __getitem__(self, name: str, /) -> Any: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRun:
    """
    A run in the journal, from any worker, even after the run or its worker has ended.

    Attributes:
        id, task, origin: As in `TaskRun`.
        state: `scheduled`, `queued` or `running`, then the outcome.
        outcome: How it ended; None if it has not.
        reason: Why it never ran; None if it did, or has not ended.
        attempt: Number of the current or last attempt; 0 before the first.
        timestamp, started_timestamp, settled_timestamp: When it was scheduled, when its first attempt started, when it
            ended, in seconds since the Unix epoch; None before that.
        queue_wait_s, duration_s: As in the events; None if unknown.
        http_method, http_route, request_id, trace_id: From the request that scheduled it; None if unknown.
        error_type, error_message, stack: The last error, redacted; None if there is none.
        progress: What the task last reported with `progress()`; None if it reported nothing.
        result: What the function returned, as JSON values, if its policy has `keep_result`; otherwise None.
        durable: Whether it survives its process.
        key: The key set by `options(…, key=…)`; None if none was set.
        dead: Why it is a dead letter; None if it is not one.
        replay_of, replayed_by: Id of the dead letter that it replays, and of the run that replays it; or None.
        recoveries: How often it was started again because its worker had died.
    """

    id: str
    task: str
    origin: str
    state: str
    outcome: str | None
    reason: str | None
    attempt: int
    timestamp: float
    started_timestamp: float | None
    settled_timestamp: float | None
    queue_wait_s: float | None
    duration_s: float | None
    http_method: str | None
    http_route: str | None
    request_id: str | None
    trace_id: str | None
    error_type: str | None
    error_message: str | None
    stack: str | None
    progress: Progress | None
    result: object
    durable: bool
    key: str | None
    dead: str | None
    replay_of: str | None
    replayed_by: str | None
    recoveries: int

    @property
    def at(self) -> datetime:
        """When the run was scheduled; aware, UTC."""
        return datetime.fromtimestamp(self.timestamp, UTC)

    @classmethod
    def of(cls, row: Row) -> StoredRun:
        """A row of the journal."""
        otherwise: dict[str, Any] = {
            "state": READABLE_STATES.get(row["state"], row["state"]),
            "outcome": None if row["settled_at"] is None else row["state"],
            "attempt": row["attempts"],
            "timestamp": row["scheduled_at"],
            "started_timestamp": row["started_at"],
            "settled_timestamp": row["settled_at"],
            "progress": None if row["progress"] is None else Progress(*json.loads(row["progress"])),
            "result": None if row["result"] is None else json.loads(row["result"]),
            "durable": bool(row["durable"]),
        }
        as_stored = {each.name: row[each.name] for each in fields(cls) if each.name not in otherwise}
        return cls(**as_stored, **otherwise)


#: States in the file as readers know them, where they differ.
READABLE_STATES = {"accepted": "scheduled", "ready": "queued", "started": "running"}


class RunStore(Protocol):
    """Something that can look up runs beyond those in flight in this process."""

    async def get_run(self, id: str) -> StoredRun | None: ...
    async def request_cancel(self, id: str) -> bool: ...


#: The journals of this process; one that is not open finds no runs.
stores: weakref.WeakSet[RunStore] = weakref.WeakSet()


async def get_run(id: str) -> TaskRun | StoredRun | None:
    """
    Return the run with this id, in flight in this process or in a journal that is open here; None if it is unknown.

    It searches all runs in flight, so it is meant for a status page or an endpoint.

    Raises:
        JournalError: The journal cannot be read.
    """
    found = _in_flight(id)
    if found is not None:
        return found
    for store in list(stores):
        stored = await store.get_run(id)
        if stored is not None:
            return stored
    return None


async def cancel_run(id: str) -> Cancellation | None:
    """
    Cancel a run; call it on the event loop that runs the app.

    Returns:
        `dropped`: the run had not started, and never will. `cancelled`: its coroutine was cancelled. `requested`: the
        run belongs to another worker, which does the same within seconds. `impossible`: a sync function is running,
        and neither a thread nor a worker process can be stopped. None: no run with this id is in flight.
    """
    found = _in_flight(id)
    if found is not None:
        return found.cancel_by_id()
    for store in list(stores):
        if await store.request_cancel(id):
            return "requested"
    return None


def _in_flight(id: str) -> TaskRun | None:
    return next((run for run in list(in_flight) if run.id == id), None)
