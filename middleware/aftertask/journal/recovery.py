"""While the app runs: settles the runs of dead workers, and starts those that are ready."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable, Collection, Sequence

import anyio

from .. import _clock
from .._core.emit import Emitter
from .._core.keeper import Start, StoredCall
from .._encoding import DoesNotFit, decode
from .._log import log
from .._stored import TraceIds
from .._taskrun import Progress, RequestInfo, TaskInfo, TaskRun, in_flight
from ..errors import JournalError
from ..events import Lost
from ..signals.journal_metrics import JournalMetrics
from ..tasks import find_function, options, registered_tasks
from . import rows
from .rows import Value
from .settle import DEAD
from .store import Store

#: Seconds between two looks for workers that are gone, runs that are ready, and cancellations; and until the next look
#: if more runs were ready than one reads: handing a run over takes milliseconds.
LOOK_EVERY, _BEHIND = 1.0, 0.05

#: Seconds for which a run whose task is unknown here waits for a worker that knows it.
UNKNOWN_FOR = 600.0

#: At most this many stored runs at a time in one worker, so that replays do not crowd out the requests.
AT_ONCE = 8

#: Number of runs that are read at each look.
_PAGE = 100

#: Seconds after which it is looked again whether a task has become known here, and between two counts of the file.
_LOOK_AGAIN, _COUNT_EVERY = 10.0, 5.0


def bury(meter: JournalMetrics, task: str, id: str, reason: str, age_s: float) -> None:
    """Count and log a dead letter."""
    meter.count_dead_letter(task, reason)
    log("error", "task.dead_lettered", task=task, run_id=id, reason=reason, action="dead_lettered", age_s=age_s)


class Recovery:
    """
    The loop of one worker.

    Attributes:
        emit: Gets the runs that are lost.
        taken: Ids of the stored runs that this worker runs now.
    """

    def __init__(self, store: Store, meter: JournalMetrics) -> None:
        self.emit: Emitter  # set before the app starts
        self.taken: set[str] = set()
        self._store, self._meter = store, meter
        self._unknown: set[str] = set()
        self._look_again_s = self._count_s = 0.0

    async def watch(self, start: Start, waiting: Callable[[], Collection[str]], also: Callable[[], None]) -> None:
        """Look for work, and call `also`, until cancelled."""
        while True:
            is_behind = False
            try:
                also()
                is_behind = await self._look(start, waiting())
            except JournalError:  # counted and logged already
                pass
            except Exception as error:
                self.emit.broken("aftertask.journal", "watch", error)
            await anyio.sleep(_BEHIND if is_behind else LOOK_EVERY)

    async def _look(self, start: Start, waiting: Collection[str]) -> bool:
        """Look once; returns whether there may be more to start at once."""
        store, opened = self._store, self._store.open()
        for (worker,) in await store.read(lambda db: db.execute("SELECT number FROM workers").fetchall()):
            if worker != opened.number and opened.locks.acquire(worker):
                try:
                    await self._settle(worker)
                finally:
                    opened.locks.release(worker)
        await self._cancel()
        is_behind = await self._start_ready(start, waiting)
        if _clock.monotonic() >= self._count_s:
            self._count_s = _clock.monotonic() + _COUNT_EVERY
            self._meter.set_journal_entries(*await store.read(rows.count))
        return is_behind

    # --- a worker that is gone

    async def _settle(self, worker: int) -> None:
        now = _clock.timestamp()
        for verdict, row in await self._store.write("recovery", lambda db: rows.settle_worker(db, worker, now)):
            self._meter.count_recovered(row["task"], verdict.action)
            if verdict.action == "rerun":
                age_s = max(0.0, now - row["scheduled_at"])
                log("warning", "task.recovered", task=row["task"], run_id=row["id"], action="rerun", age_s=age_s)
            else:
                self._lose(row, verdict.dead, now)

    def _lose(self, row: sqlite3.Row, dead: str | None, now: float) -> None:
        """A run will never run or finish; a durable one becomes a dead letter."""
        age_s = max(0.0, now - row["scheduled_at"])
        if dead is not None:
            bury(self._meter, row["task"], row["id"], dead, age_s)
        self.emit(Lost(_lost(row, self.emit, age_s), now, "crash", age_s, None if dead is None else DEAD[dead]))

    # --- what is ready

    async def _start_ready(self, start: Start, waiting: Collection[str]) -> bool:
        """Start as many runs as there is room for; returns whether there may be more."""
        room, calls = AT_ONCE - len(self.taken), dict[str, StoredCall]()
        if room <= 0:
            return False
        found: Sequence[sqlite3.Row] = await self._store.read(lambda db: rows.free(db, self._unknown, waiting, _PAGE))
        for row in found:
            call = await self._call(row) if len(calls) < room else None
            if call is not None:
                calls[call.id] = call
        if len(found) < _PAGE and _clock.monotonic() >= self._look_again_s:  # any number of unknown ones may be first
            self._look_again_s = _clock.monotonic() + _LOOK_AGAIN
            self._unknown.clear()
        number = self._store.number
        if not calls or number is None:
            return False
        mine: list[str] = await self._store.write(
            "recovery", lambda db: [id for id in calls if rows.update(db, id, None, {"owner": number})]
        )
        refused: list[str] = []
        for id in mine:
            self.taken.add(id)
            try:
                start(calls[id])
            except Exception as error:  # such as a task whose engine this app does not have: another worker may have it
                refused.append(id)
                self.emit.broken("aftertask.journal", "start of a stored run", error)
        if refused:
            self.taken.difference_update(refused)
            self._unknown.update(refused)
            await self._store.write(
                "recovery", lambda db: [rows.update(db, id, number, {"owner": None}) for id in refused]
            )
        return len(calls) == room

    async def _call(self, row: sqlite3.Row) -> StoredCall | None:
        """The stored call; None if its task is unknown here, and a dead letter if that has lasted too long."""
        func = find_function(row["task"], row["code"])
        reason, detail = "unknown_task", ""
        if func is not None:
            try:
                args, kwargs = decode(func, row["arguments"])
            except DoesNotFit as error:
                reason, detail = "arguments", f": {error}"
            else:
                # What was promised when it was scheduled, whatever the task's policy says now.
                promised = options(func, durable=True, idempotent=bool(row["idempotent"]))
                return StoredCall(
                    id=row["id"],
                    origin="journal" if row["replay_of"] is None else "dead_letter",
                    timestamp=row["scheduled_at"],
                    func=promised if row["key"] is None else options(promised, key=row["key"]),
                    args=args,
                    kwargs=kwargs,
                    request=_request(row, self.emit),
                )
        self._unknown.add(row["id"])
        now = _clock.timestamp()
        if now - row["ready_at"] > UNKNOWN_FOR:
            change: dict[str, Value] = {"state": "lost", "dead": reason, "reason": reason, "settled_at": now}
            change |= {"error_message": DEAD[reason] + detail, "bad": 1}
            if await self._store.write("recovery", lambda db: rows.update(db, row["id"], None, change)):
                self._lose(row, reason, now)
        return None

    async def _cancel(self) -> None:
        """Cancel the runs of this worker for which another one was asked to."""
        ids = await self._store.read(lambda db: rows.to_cancel(db, self._store.number))
        for run in [run for run in list(in_flight) if run.id in ids]:
            run.cancel_by_id()


def _request(row: sqlite3.Row, app: Emitter) -> RequestInfo:
    """The request of a stored run, as far as it is known."""
    request = RequestInfo()
    request.http_method, request.http_route = row["http_method"], row["http_route"]
    request.request_id, request.app, request.thread = row["request_id"], app, threading.get_ident()
    request.redact = app.redact
    if row["trace_id"] is not None:
        request.span_context = TraceIds(int(row["trace_id"], 16), int(row["span_id"], 16))
    return request


def _lost(row: sqlite3.Row, app: Emitter, age_s: float) -> TaskRun:
    """A run of a worker that is gone, as the signals get it."""
    is_registered = any(entry.name == row["task"] for entry in registered_tasks())
    run = TaskRun(TaskInfo(row["task"], row["code"], registered=is_registered), _request(row, app))
    run.id, run.origin, run.timestamp, run.attempt = row["id"], row["origin"], row["scheduled_at"], row["attempts"]
    run.scheduled_s -= age_s
    run.outcome = "lost"
    run.progress = None if row["progress"] is None else Progress(*json.loads(row["progress"]))
    return run
