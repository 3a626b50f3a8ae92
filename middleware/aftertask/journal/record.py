"""The journal's record of a run in flight, and the row that it becomes."""

from __future__ import annotations

import json

from .._core.run import Run
from .._encoding import encode_result
from .._log import log
from .._taskrun import JOURNAL, Progress, TaskRun
from ..errors import NotSerializable
from ..events import Cancelled, Dropped, Ended, Failed, Failure, Offloaded, Retrying, Skipped, Started, Succeeded
from .rows import Value

#: At most this many attempts that another followed, the last ones, are kept of a run.
_ATTEMPTS = 20


class Record:
    """
    A run in flight, and its end until that is written.

    Args:
        run: The run.
        is_kept: Whether its row is there, and changes of it must not be dropped.
        first: Id of the first run of the same request.
    """

    __slots__ = (
        *("arguments", "attempts", "began_at", "end", "failure", "first", "is_kept", "is_waiting", "progress"),
        *("result", "run", "started_at"),
    )

    def __init__(self, run: TaskRun, *, is_kept: bool, first: str) -> None:
        self.run, self.is_kept, self.first = run, is_kept, first
        self.is_waiting = False
        self.arguments: str | None = None
        self.started_at: float | None = None
        self.began_at: float | None = None
        self.attempts: list[tuple[object, ...]] = []
        self.progress: Progress | None = None
        self.failure: Failure | None = None
        self.end: Ended | None = None
        self.result: str | None = None

    def begin(self, event: Started) -> None:
        """An attempt begins."""
        self.began_at = event.timestamp
        self.started_at = self.started_at or event.timestamp

    def retry(self, event: Retrying) -> None:
        """An attempt raised, and another follows."""
        self.failure = failure = event.failure
        attempt = (event.attempt, event.timestamp - event.duration_s, event.duration_s, failure.type, failure.message)
        self.attempts = [*self.attempts, (*attempt, failure.hint, event.delay_s)][-_ATTEMPTS:]

    @property
    def is_intent(self) -> bool:
        """Whether it must be kept and is not yet; then it has no history."""
        return not self.is_kept and isinstance(self.run, Run) and self.run.is_kept

    def intent(self, owner: int | None) -> dict[str, Value]:
        """The row of a run that must be kept."""
        run = self.run
        key = run.key if isinstance(run, Run) else None
        state = "accepted" if run.info.durable else "scheduled"
        return {**self.row(owner), "state": state, "key": key, "arguments": self.arguments}

    def row(self, owner: int | None) -> dict[str, Value]:
        """The row of any run."""
        run, request = self.run, self.run.request
        return {
            "id": run.id,
            "task": run.task,
            "code": run.info.code,
            "origin": run.origin,
            "owner": owner,
            "durable": run.info.durable and isinstance(run, Run) and run.is_kept,
            "idempotent": run.info.idempotent,
            "scheduled_at": run.timestamp,
            "http_method": request.http_method,
            "http_route": request.http_route,
            "request_id": request.request_id,
            **run.trace_ids,
            "first": self.first,
            "state": "started" if run.attempt else "scheduled",
            # The end of a run that is kept is a change of its own, which is never dropped.
            **(self.changing() if self.is_kept else self.ended()),
        }

    def changing(self) -> dict[str, Value]:
        """The columns that change while a run is in flight."""
        run = self.run
        self.progress = reported = run.progress
        row: dict[str, Value] = {
            "attempts": run.attempt,
            "started_at": self.started_at,
            "queue_wait_s": run.queue_wait_s,
            "progress": None if reported is None else _progress(reported),
            "more": self._more(),
        }
        failure = self.failure
        if failure is not None:
            row |= {"error_type": failure.type, "error_message": failure.message}
            row |= {"stack": failure.stack, "fingerprint": failure.fingerprint}
        return row

    def ended(self) -> dict[str, Value]:
        """The same columns, with the run's end if it has ended."""
        row, end = self.changing(), self.end
        if end is not None:
            row |= {"state": end.outcome, "settled_at": end.timestamp, "duration_s": getattr(end, "duration_s", None)}
            row |= {"reason": getattr(end, "reason", None), "result": self.result, "bad": end.bad}
        if isinstance(end, Dropped):
            row["error_type"] = end.error_type
        return row

    def finish(self, end: Ended) -> None:
        """The run has ended; a result is encoded now, because the app may change it at any moment."""
        self.end, self.failure = end, getattr(end, "failure", None) or self.failure
        if isinstance(end, Succeeded) and self.run.info.keep_result:
            try:
                self.result = encode_result(end.result)
            except NotSerializable as error:
                log("warning", "journal.result_dropped", task=end.run.task, run_id=end.run.id, error_message=str(error))

    def _more(self) -> str | None:
        """The fields that few runs have and only people read, as a JSON object; None if there are none."""
        run, end, failure = self.run, self.end, self.failure
        cause = end.caused_by if isinstance(end, Skipped) else None
        is_queued = not run.attempt and run.queued_s is not None
        found = {
            "attempts": self.attempts,
            "queued_at": run.timestamp + (run.queued_s or 0.0) - run.scheduled_s if is_queued else None,
            "began_at": self.began_at if run.attempt > 1 else None,
            "hint": None if failure is None else failure.hint,
            "notes": run.notes,
            "parent": None if run.parent is None else run.parent.id,
            "caused_by": None if cause is None else (cause.id, cause.task),
            "thread_wait_s": run.thread_wait_s,
            "blocked_s": run.blocked_s,
        }
        found = {name: value for name, value in found.items() if value}
        return json.dumps(found, default=str) if found else None


def _progress(reported: Progress) -> str | None:
    try:  # numbers of any type, such as numpy's
        numbers = [n if n is None or isinstance(n, int) else float(n) for n in (reported.done, reported.total)]
        return json.dumps([*numbers, reported.note, reported.timestamp])
    except (TypeError, ValueError, OverflowError):
        return None


def goes_on(event: Ended) -> bool:
    """Whether any worker may run a durable run again after it ended like this here."""
    if isinstance(event, Offloaded):
        return event.engine == JOURNAL
    run = event.run
    may_repeat = run.info.idempotent or (isinstance(run, Run) and run.is_handed_over)
    return isinstance(event, Cancelled) and event.reason != "cancel_run" and may_repeat


def dead(event: Ended) -> str | None:
    """Why a durable run that ended like this is a dead letter; None if it is not one."""
    match event.outcome:
        case "failed" if isinstance(event, Failed) and not event.expected:
            return "failed"
        case "timed_out" | "skipped" as outcome:
            return outcome
        case "cancelled" if isinstance(event, Cancelled) and event.reason != "cancel_run":
            return "interrupted"
        case "lost":
            return "unconfirmed"
    return None
