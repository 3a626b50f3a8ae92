"""The metrics of the journal; they exist only where an app has one."""

from __future__ import annotations

from collections.abc import Mapping

from .._taskrun import TaskRun
from . import families as f
from ._metric_set import MetricSet

_OPS = ("intent", "durable", "history", "recovery")
ACTIONS = ("rerun", "dead_lettered", "lost")


class JournalMetrics:
    """
    Counts the work of a journal.

    Args:
        metrics: Where its families are.

    Attributes:
        errors, dropped: The counts of this process so far, for the board.
    """

    def __init__(self, metrics: MetricSet) -> None:
        self.errors = self.dropped = 0
        self._set, self._of = metrics, metrics.of
        metrics.hidden.clear()
        for op in _OPS:
            self._of.counters[f.JOURNAL_ERRORS].labels(op)
        self._write = {op: self._of.histograms[f.JOURNAL_WRITE].labels(op) for op in _OPS}

    def know(self, task: str, reasons: Mapping[str, str]) -> None:
        """Create the series of a durable task at 0, or `increase()` would not see its first dead letter."""
        for action in ACTIONS:
            self._of.counters[f.JOURNAL_RECOVERED].labels(task, action)
        for reason in reasons:
            self._of.counters[f.DEAD_LETTERED].labels(task, reason)

    def count_journal_errors(self, op: str) -> None:
        """Count a transaction that failed, once for each kind of change in it."""
        self.errors += 1
        self._of.counters[f.JOURNAL_ERRORS].labels(op).inc()

    def count_journal_dropped(self, count: int) -> None:
        """Count runs whose history is not kept."""
        self.dropped += count
        self._of.counters[f.JOURNAL_DROPPED].inc(count)

    def observe_journal_write(self, op: str, seconds: float) -> None:
        """A change waited this many seconds until it was on disk."""
        self._write[op].observe(seconds)

    def count_recovered(self, task: str, action: str) -> None:
        """Count a run that a dead worker left."""
        self._of.counters[f.JOURNAL_RECOVERED].labels(task, action).inc()

    def keep(self, run: TaskRun) -> None:
        """The journal is about to have a run: if this worker dies, a durable one goes back there."""
        if run.info.durable and self._set.workers is not None:
            with self._set.lock:
                self._set.series(run).keep(run)

    def count_dead_letter(self, task: str, reason: str) -> None:
        """Count a run that became a dead letter."""
        self._of.counters[f.DEAD_LETTERED].labels(task, reason).inc()

    def set_journal_entries(self, states: Mapping[str, int], dead_letters: int) -> None:
        """What is in the file now."""
        for state, count in states.items():
            self._of.gauges[f.JOURNAL_ENTRIES].labels(state).set(count)
        self._of.gauges[f.DEAD_LETTERS].set(dead_letters)
