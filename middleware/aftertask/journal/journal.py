"""The journal of one app: a signal that writes history, and the keeper of durable runs."""

from __future__ import annotations

import contextlib
import functools
import sqlite3
import threading
import weakref
from collections import deque
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import MethodType

from .. import _clock
from .._core.emit import Emitter
from .._core.keeper import Start
from .._core.process import on_exit
from .._core.run import Run
from .._encoding import LARGEST_ARGUMENTS, encode
from .._log import log
from .._stored import StoredRun, stores
from .._taskrun import RequestInfo, TaskInfo, TaskRun
from ..errors import DuplicateKey, JournalError, NotSerializable
from ..events import Ended, Retrying, Scheduled, Started
from ..signals.journal_metrics import JournalMetrics
from ..tasks import find_function, unwrap
from . import rows
from .record import Record, dead, goes_on
from .recovery import Recovery, bury
from .rows import Value
from .settle import DEAD
from .store import Journaling, Store
from .writer import Change

#: At most this many runs wait to be written as history; one more is dropped.
_WAITING = 20_000

_NO_LIFESPAN = (
    "the journal is used without a lifespan (a mounted app has none), so what a killed process leaves is not run "
    "again: add AftertaskMiddleware to the outermost app, and have the server run the lifespan"
)


class Journal(Journaling):
    """Keeps runs in a SQLite file, `Settings(journal="tasks.db")`; raises JournalError if the file cannot be used."""

    def __init__(self, path: str | Path, meter: JournalMetrics) -> None:
        self.meter = meter
        self.store = Store(Path(path).absolute(), meter, self._gather, self._note_history_lost)
        self._recovery = Recovery(self.store, meter)
        self._records: dict[TaskRun, Record] = {}
        self._firsts: weakref.WeakKeyDictionary[RequestInfo, str] = weakref.WeakKeyDictionary()
        self._keys: dict[str, str] = {}
        self._keys_lock = threading.Lock()
        self._history: deque[Record] = deque()
        self._lost_history = False
        self._warns_of_no_lifespan = True  # until the app starts, or once
        on_exit(self)
        stores.add(self)

    def attach(self, emit: Emitter) -> None:
        """Emit lost runs here."""
        self._recovery.emit = emit

    def open(self) -> None:
        """The app starts."""
        self._warns_of_no_lifespan = False
        self._records = {run: record for run, record in self._records.items() if run.outcome is None}
        self.store.open()

    def close(self) -> None:
        """The app has stopped."""
        self.store.close()

    at_exit = close

    def task_known(self, info: TaskInfo) -> None:
        """A task was resolved."""
        if info.durable:
            self.meter.know(info.task, DEAD)

    # --- the keeper

    def accept(self, run: Run) -> None:
        """Check a run that must be kept: its arguments, whether its task can be found again, and its key."""
        number = self.store.open().number
        record, work = self._records.get(run), run.work
        if record is None or work is None:
            raise JournalError(f"{run.task}: the journal {self.store.path} was not open when the run was scheduled")
        if run.info.durable:
            if work.whole or not _is_found_again(unwrap(work.func)[0], run.task, run.info.code):
                why = f"{run.info.code} names no function of a module; move it there, or register it with @task"
                if isinstance(unwrap(work.func)[0], MethodType):
                    why = "a method needs its object; write a function of a module, and give it what it needs"
                raise NotSerializable(
                    f"{run.task} cannot be durable: after a crash it is found by its name alone, and {why}"
                )
            record.arguments = encode(work.func, work.args, work.kwargs, largest=LARGEST_ARGUMENTS)
            if self._warns_of_no_lifespan:
                self._warns_of_no_lifespan = False
                log("warning", "setup.mistake", kind="no_lifespan", subject=str(self.store.path), advice=_NO_LIFESPAN)
        key = run.key
        if key is not None:
            with self._keys_lock:
                # Of this worker's own runs the file may not have the end yet.
                other = self._keys.get(key) or self.store.read_now(lambda db: rows.id_with_key(db, key, number))
                if other is not None:
                    raise DuplicateKey(key, other)
                self._keys[key] = run.id

    async def admit(self, runs: Sequence[TaskRun]) -> None:
        """Write the runs that must be kept to disk; raises if that fails."""
        kept = [record for run in runs if (record := self._records.get(run)) is not None and record.is_intent]
        if not kept:
            return
        for record in kept:
            self.meter.keep(record.run)
        intents = [record.intent(self.store.open().number) for record in kept]
        taken = await self.store.write("intent", lambda db: rows.insert(db, intents))
        if taken is not None:
            raise DuplicateKey(*taken)
        for record in kept:
            record.is_kept = True

    def confirm(self, runs: Sequence[Run]) -> None:
        """Their request has succeeded."""
        for run in runs:
            record = self._records.get(run)
            if record is not None and record.is_kept:
                run.confirmed = True
                self._submit(record, {"state": "ready", "ready_at": _clock.timestamp()})

    async def claim(self, run: Run) -> bool:
        """Record that the run starts; False if it no longer belongs to this worker."""
        record, number = self._records.get(run), self.store.number
        if record is None or number is None:
            return False
        # What an engine may not have yet is ready until it has it: handed over at least once.
        row: dict[str, Value] = {"state": "ready"}
        if not run.is_handed_over:
            row = {"state": "started", "attempts": 1, "started_at": _clock.timestamp()}
        if record.is_kept:
            try:
                return bool(await self.store.write("durable", lambda db: rows.update(db, run.id, number, row)))
            except JournalError:  # the app has ended meanwhile
                return False
        # After a handler that failed: nothing was promised, but from here on it is kept.
        self.meter.keep(run)
        intent = {**record.intent(number), **row}
        taken = await self.store.write("intent", lambda db: rows.insert(db, [intent]))
        if taken is not None:
            raise DuplicateKey(*taken)
        record.is_kept = True
        return True

    async def watch(self, start: Start, waiting: Callable[[], Collection[str]]) -> None:
        """Find the runs that other workers have left, and start those that are ready."""
        await self._recovery.watch(start, waiting, self._mark_progress)

    # --- the events

    def scheduled(self, event: Scheduled) -> None:
        """A run was scheduled."""
        run = event.run
        try:
            self.store.open()
        except JournalError:
            self.meter.count_journal_dropped(1)
            return
        first = self._firsts.setdefault(run.request, run.id)
        record = self._records[run] = Record(run, is_kept=run.id in self._recovery.taken, first=first)
        if record.is_kept:
            self.meter.keep(run)
            if isinstance(run, Run) and run.key is not None:
                self._keys[run.key] = run.id
        elif not record.is_intent:
            self._mark(record)

    def started(self, event: Started) -> None:
        """An attempt begins."""
        record = self._records.get(event.run)
        if record is not None:
            record.begin(event)
            if not event.run.info.durable:
                self._mark(record)

    def retrying(self, event: Retrying) -> None:
        """An attempt raised, and another follows."""
        record = self._records.get(event.run)
        if record is not None:
            record.retry(event)
            self._mark(record)

    def ended(self, event: Ended) -> None:
        """A run has ended here: a durable one that cannot continue becomes a dead letter, or runs again."""
        run, record = event.run, self._records.pop(event.run, None)
        self._recovery.taken.discard(run.id)
        if isinstance(run, Run) and run.key is not None and self._keys.get(run.key) == run.id:
            del self._keys[run.key]
        if record is None:
            return
        is_durable = run.info.durable and record.is_kept
        if is_durable and goes_on(event):
            self._submit(record, {"state": "ready", "ready_at": event.timestamp, "owner": None})
            return
        record.finish(event)
        if not record.is_kept:
            self._mark(record)
            return
        reason = dead(event) if is_durable else None
        self._submit(record, {"dead": reason}, at_end=True)
        if reason is not None:
            bury(self.meter, run.task, run.id, reason, event.timestamp - run.timestamp)

    succeeded = failed = timed_out = cancelled = skipped = dropped = rejected = expired = lost = offloaded = ended

    def _submit(self, record: Record, row: dict[str, Value], *, at_end: bool = False) -> None:
        number, id = self.store.number, record.run.id

        def apply(db: sqlite3.Connection) -> None:
            # A change before the end does not write it, even if the run has ended when its turn comes.
            ended = record.ended() if at_end else {}
            if not rows.update(db, id, number, {**ended, **row}):
                log("warning", "journal.taken", task=record.run.task, run_id=id)

        self.store.submit(apply)

    # --- history, written by the thread

    def _mark(self, record: Record) -> None:
        opened = self.store.opened
        if record.is_waiting or opened is None:
            return
        if len(self._history) >= _WAITING:
            self._lost_history = True
            self.meter.count_journal_dropped(1)
            return
        record.is_waiting = True
        self._history.append(record)
        opened.writer.mark()

    def _mark_progress(self) -> None:
        """Write the progress that tasks have reported since the last time."""
        for record in list(self._records.values()):
            if record.run.progress is not record.progress and not record.is_intent:
                self._mark(record)

    def _gather(self) -> Change | None:
        """The waiting history as one change; None if there is none."""
        waiting: list[Record] = []
        with contextlib.suppress(IndexError):
            while True:
                waiting.append(self._history.popleft())
        if not waiting:
            return None
        for record in waiting:
            record.is_waiting = False
        lost_some, self._lost_history = self._lost_history, False
        return Change("history", lambda db: self._write_history(db, waiting, lost_some), len(waiting))

    def _note_history_lost(self) -> None:
        """Mark rows of runs whose end was not written, so that they do not look unfinished."""
        self._lost_history = True

    def _write_history(self, db: sqlite3.Connection, waiting: Sequence[Record], lost_some: bool) -> None:
        number = self.store.number
        for record in waiting:
            if record.is_kept and record.run.info.durable:
                rows.update(db, record.run.id, number, record.changing())
            else:
                rows.upsert(db, record.row(number))
        if lost_some:
            rows.forget_history(db, number, [run.id for run in list(self._records)])

    # --- for users

    async def get_run(self, id: str) -> StoredRun | None:
        """A run of any worker, in its current state."""
        opened = self.store.opened
        if opened is None:
            return None
        with contextlib.suppress(JournalError):  # counted; the file can be read all the same
            await opened.writer.write(self._gather() or Change("history", lambda db: None, 0))
        row = await self.store.read(lambda db: db.execute("SELECT * FROM runs WHERE id = ?", (id,)).fetchone())
        return None if row is None else StoredRun.of(row)

    async def request_cancel(self, id: str) -> bool:
        """Ask the worker that has the run to cancel it; False if no run of this id is in flight."""
        now = _clock.timestamp()
        return self.store.opened is not None and bool(
            await self.store.write("recovery", lambda db: rows.request_cancel(db, id, now))
        )


@functools.lru_cache(1000)
def _is_found_again(func: object, task: str, code: str) -> bool:
    return find_function(task, code) == func
