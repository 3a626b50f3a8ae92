"""What a line about a failure says, and which failures are logged in full: identical ones once a minute."""

from __future__ import annotations

import threading

from ..events import TaskRun

#: Seconds after which an identical failure of a task is logged in full again.
FULL_EVERY = 60.0

#: At most this many kinds of failures are remembered; those beyond are logged in full.
_MOST_KINDS = 1000


class Repetitions:
    """Which failures are like one that was logged in full within the last minute."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Task, outcome and fingerprint to the time of the last full line, and the number of short ones since.
        self._seen: dict[tuple[str, ...], tuple[float, int]] = {}

    def number(self, failure: tuple[str, ...], timestamp: float) -> int:
        """How many times a failure was repeated since its last full line, this time included; 0: log it in full."""
        with self._lock:
            at, number = self._seen.get(failure, (-FULL_EVERY, 0))
            if timestamp - at < FULL_EVERY:
                self._seen[failure] = at, number + 1
                return number + 1
            if len(self._seen) >= _MOST_KINDS:
                self._seen = {key: seen for key, seen in self._seen.items() if timestamp - seen[0] < FULL_EVERY}
            if len(self._seen) < _MOST_KINDS:
                self._seen[failure] = timestamp, 0
            return 0


def sentence(name: str, run: TaskRun, what: str) -> str:
    """
    The message of a stdlib record, which has to be readable where only the message is printed:
    `task.failed mail.welcome: ConnectionError: refused (POST /signup, attempt 2 of 4)`.
    """
    request = run.request
    where = [" ".join(part for part in (request.http_method, request.http_route) if part)]
    if run.info.max_attempts > 1 and run.attempt:
        where.append(f"attempt {run.attempt} of {run.info.max_attempts}")
    where += [f"{key}={value}" for key, value in run.notes.items()]
    place = ", ".join(part for part in where if part)
    said = f"{name} {run.task}: {what}" if what else f"{name} {run.task}"
    return f"{said} ({place})" if place else said
