"""Dead letters of a worker: messages that failed for good, in a separate queue, counted by reason."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from queue import SimpleQueue
from typing import Any, NamedTuple

from celery import Celery

from .._core.emit import Emitter
from .._core.process import hold_for_fork, on_fork, start_thread
from .._log import log
from ..signals import Metrics
from ..signals.families import NO_TASK
from .header import NAME, VERSION
from .publishing import DEAD, REDACTED, connect

#: The name of this package in lines and counts of errors of ours.
COMPONENT = "aftertask.celery"

#: Why a message of a task that this worker knows is a dead letter, in the journal's words where it has one.
REASONS = ("failed", "timed_out", "interrupted", "unknown_message")

#: The reason for one of a task that it does not know; counted for no task, so that its series can exist before.
UNKNOWN_TASK = "unknown_task"

#: Seconds that each exchange with the broker may take: a fork waits for a letter that is being sent, and with it the
#: worker's main loop.
DEADLINE = 2.0

#: Seconds until a letter that the broker did not take is sent again.
AGAIN = 5.0


class Letter(NamedTuple):
    """
    A message that failed for good: the name of its Celery task, its id, its arguments as JSON, its header of aftertask.

    Attributes:
        task: The task's name in the metrics.
        reason: One of `REASONS`, or `UNKNOWN_TASK`.
        error: Class of the error.
    """

    name: str
    id: str
    args: object
    kwargs: object
    header: object
    task: str
    reason: str
    error: str


class Letters:
    """
    Sends the dead letters of one process, and counts them.

    Args:
        app: The Celery app.
        system: The broker's name.
        emit: Its metrics count them; logs what could not be sent.
    """

    _thread: threading.Thread | None

    def __init__(self, app: Celery, system: str, emit: Emitter) -> None:
        self._app, self._system, self._emit = app, system, emit
        # A process forked while a letter is sent would inherit the locks of Celery, and of structlog, that the sending
        # thread holds, and wait for them for ever.
        self.after_fork()
        hold_for_fork(self)
        on_fork(self)

    def count(self, task: str, reason: str, count: int) -> None:
        """Count them in the metrics of this process, if it has any; a count of 0 creates the series."""
        for signal in self._emit.signals:
            if isinstance(signal, Metrics):
                signal.count_dead_letters(task, reason, count)

    def send(self, letter: Letter, *, later: bool) -> None:
        """Put a letter into the queue of dead letters; `later` means in a thread: a main process must not wait."""
        if later or not self._try(letter):
            self._pending.put(letter)
            if self._thread is None:
                self._thread = start_thread("dead-letters", self._work)

    def close(self, timeout: float) -> None:
        """The process ends: send what is pending, for at most this many seconds."""
        if self._thread is not None:
            self._pending.put(None)
            self._thread.join(timeout)
            self._thread = None

    def _work(self) -> None:
        while (letter := self._pending.get()) is not None:
            if not self._try(letter):
                self._pending.put(letter)
                time.sleep(AGAIN)

    def _try(self, letter: Letter) -> bool:
        """Send a letter, and return whether the broker took it; if not, that is logged."""
        header = {**(letter.header if isinstance(letter.header, Mapping) else {"v": VERSION}), "dead": letter.error}
        options: dict[str, Any] = {"queue": DEAD, "headers": {NAME: header}, "ignore_result": True, **REDACTED}
        why: dict[str, Any] = {"task": letter.task, "run_id": letter.id, "reason": letter.reason}
        with self._sending:
            try:
                with connect(self._app, self._system, DEADLINE) as connection:
                    options |= {"connection": connection, "retry": False, "confirm_timeout": DEADLINE}
                    self._app.send_task(letter.name, letter.args, letter.kwargs, task_id=letter.id, **options)
            except Exception as error:
                self._emit.broken(COMPONENT, "dead letter", error, **why, queue=DEAD)
                return False
            log("error", "task.dead_lettered", **why, error_type=letter.error, engine="celery", queue=DEAD)
        self.count(NO_TASK if letter.reason == UNKNOWN_TASK else letter.task, letter.reason, 1)
        return True

    def hold(self) -> None:
        """Wait for the letter that is being sent: this process forks."""
        self._sending.acquire()

    def let_go(self) -> None:
        """The process has forked; this is the parent."""
        self._sending.release()

    def after_fork(self) -> None:
        """This is the child: the letters belong to its parent."""
        self._sending = threading.RLock()
        self._pending = SimpleQueue[Letter | None]()
        self._thread = None
