"""Every metric family that aftertask exposes: names, types, labels, buckets and HELP texts in one place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PREFIX = "aftertask_"

_TO_TEN_MINUTES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
# Waits are near zero, but a backlog reaches minutes.
WAIT_BUCKETS = (*_TO_TEN_MINUTES, 1800.0)
ATTEMPT_BUCKETS = (*_TO_TEN_MINUTES, 900.0)
# With retries a run may take hours.
END_TO_END_BUCKETS = (0.05, 0.25, 1.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 900.0, 3600.0, 21600.0)
LAG_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
# From a function in the same process to a channel that responds just before its timeout of 10 s.
DELIVERY_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """
    One metric family.

    Attributes:
        name: Without the prefix, and for a counter without `_total`.
        kind: Its type in Prometheus.
        help: The HELP text of the exposition.
        labels: Label names, in the order in which values are given.
        buckets: Upper bounds of a histogram's buckets in seconds, without `+Inf`; empty for other types.
        mode: How prometheus-client merges a gauge over processes; ignored for other types.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    mode: Literal["livesum", "livemax", "max", "sum"] = "livesum"

    @property
    def full_name(self) -> str:
        """The name with the prefix; the samples of a counter add `_total`."""
        return PREFIX + self.name


_TASK = ("task", "engine")

SCHEDULED = Family("tasks_scheduled", "counter", "Runs scheduled.", _TASK)
FINISHED = Family("tasks_finished", "counter", "Runs finished, by outcome.", (*_TASK, "outcome"))
NOT_RUN = Family(
    "tasks_not_run", "counter", "Runs that never started, by outcome and reason.", ("task", "outcome", "reason")
)
BAD = Family("tasks_bad", "counter", "Runs that count against the service level.", _TASK)
INFLIGHT = Family("tasks_inflight", "gauge", "Runs not finished yet, by state.", (*_TASK, "state"))
WAIT = Family(
    "queue_wait_seconds", "histogram", "Time from the response to the first attempt.", _TASK, buckets=WAIT_BUCKETS
)
ATTEMPT = Family(
    "attempt_duration_seconds",
    "histogram",
    "Duration of one attempt.",
    (*_TASK, "result"),
    buckets=ATTEMPT_BUCKETS,
)
END_TO_END = Family(
    "end_to_end_seconds",
    "histogram",
    "Time from scheduling to the end of the last attempt.",
    _TASK,
    buckets=END_TO_END_BUCKETS,
)
RETRIES = Family("retries", "counter", "Attempts that were followed by another.", _TASK)
ABANDONED = Family("abandoned_threads", "gauge", "Threads still running after their task timed out.", ("task",))
ERRORS = Family("attempt_errors", "counter", "Attempts that raised, by exception class.", (*_TASK, "error_type"))
OLDEST_QUEUED = Family("oldest_queued_age_seconds", "gauge", "Age of the oldest queued run.", _TASK, mode="livemax")
OLDEST_RUNNING = Family("oldest_running_age_seconds", "gauge", "Age of the oldest running run.", _TASK, mode="livemax")
LAST_SUCCESS = Family("last_success_timestamp_seconds", "gauge", "Time of the last success.", _TASK, mode="max")
LAST_FAILURE = Family("last_failure_timestamp_seconds", "gauge", "Time of the last failure.", _TASK, mode="max")
HAZARDS = Family("hazards", "counter", "Hazards found, by kind.", ("task", "kind"))
LOOP_LAG = Family("event_loop_lag_seconds", "histogram", "Event loop lag, sampled.", buckets=LAG_BUCKETS)
LOOP_BLOCKED = Family("event_loop_blocked_seconds", "counter", "Time the event loop was blocked, by task.", ("task",))
THREADPOOL_LIMIT = Family("threadpool_limit", "gauge", "Threads of a pool: limit.", ("pool",))
THREADPOOL_BUSY = Family("threadpool_busy", "gauge", "Threads of a pool: in use.", ("pool",))
THREADPOOL_WAITING = Family("threadpool_waiting", "gauge", "Threads of a pool: callers waiting.", ("pool",))
CONCURRENCY_LIMIT = Family("concurrency_limit", "gauge", "Slots of a limit: total.", ("limiter",))
CONCURRENCY_IN_USE = Family("concurrency_in_use", "gauge", "Slots of a limit: in use.", ("limiter",))
CONCURRENCY_WAITING = Family("concurrency_waiting", "gauge", "Slots of a limit: runs waiting.", ("limiter",))
JOURNAL_ENTRIES = Family(
    "journal_entries", "gauge", "Runs in the journal that have not ended, by state.", ("state",), mode="livemax"
)
JOURNAL_RECOVERED = Family(
    "journal_recovered", "counter", "Runs of dead workers, by what became of them.", ("task", "action")
)
JOURNAL_ERRORS = Family("journal_errors", "counter", "Writes to the journal that failed.", ("op",))
JOURNAL_DROPPED = Family("journal_dropped", "counter", "Runs whose history could not be written.")
JOURNAL_WRITE = Family(
    "journal_write_seconds", "histogram", "Time until a change is on disk.", ("op",), buckets=DELIVERY_BUCKETS
)
DEAD_LETTERED = Family("dead_letters", "counter", "Runs that became dead letters.", ("task", "reason"))
# In OpenMetrics a gauge must not have the name of a counter's family.
DEAD_LETTERS = Family("journal_dead_letters", "gauge", "Dead letters in the journal.", mode="livemax")
OFFLOAD = Family("offload", "counter", "Runs handed to an engine, by status.", ("engine", "status"))
OFFLOAD_SECONDS = Family(
    "offload_seconds", "histogram", "Time to hand a run to an engine.", ("engine",), buckets=DELIVERY_BUCKETS
)
ALERTS = Family("alerts", "counter", "Runs to be alerted, by channel and what became of them.", ("channel", "status"))
ALERT_DELIVERY = Family(
    "alert_delivery_seconds",
    "histogram",
    "Duration of the attempt that delivered an alert.",
    ("channel",),
    buckets=DELIVERY_BUCKETS,
)
ALERT_QUEUE = Family("alert_queue_length", "gauge", "Alerts waiting for delivery.", ("channel",))
SELF_ERRORS = Family("self_errors", "counter", "Errors inside aftertask, contained.", ("component",))
LABEL_OVERFLOW = Family("label_overflow", "counter", "Label values folded into __other__.", ("label",))
BUILD_INFO = Family("build_info", "gauge", "Versions in use.", ("version", "python", "starlette"), mode="max")
TASK_INFO = Family("task_info", "gauge", "Owner and executor of a task.", (*_TASK, "owner", "executor"), mode="max")
TASK_TIMEOUT = Family("task_timeout_seconds", "gauge", "Timeout of one attempt.", ("task",), mode="max")

#: Exposed only where an app has a journal; `DEAD_LETTERED` also where a Celery worker has dead letters.
_WORK = (JOURNAL_ENTRIES, JOURNAL_RECOVERED, JOURNAL_ERRORS, JOURNAL_DROPPED, JOURNAL_WRITE)
JOURNAL = (*_WORK, DEAD_LETTERED, DEAD_LETTERS)

#: Limit, in use, waiting.
THREADPOOL = (THREADPOOL_LIMIT, THREADPOOL_BUSY, THREADPOOL_WAITING)
CONCURRENCY = (CONCURRENCY_LIMIT, CONCURRENCY_IN_USE, CONCURRENCY_WAITING)

FAMILIES = tuple(value for value in list(globals().values()) if isinstance(value, Family))

#: Only in the files of several workers, never exposed: if the worker dies, the journal has these runs.
KEPT = Family("tasks_kept", "gauge", "Durable runs in flight that the journal has.", _TASK, mode="sum")

#: States of a run in flight, as in `TaskRun.state`.
STATES = ("scheduled", "queued", "running", "backoff")

#: The ways in which a run never starts; each has a series at 0 for every task.
NOT_RUN_REASONS = (
    ("skipped", "sibling_failed"),
    *(("dropped", reason) for reason in ("http_exception", "validation", "handler_error", "own_background")),
    *(("dropped", reason) for reason in ("client_gone", "request_cancelled", "request_failed", "added_too_late")),
    *(("dropped", reason) for reason in ("websocket", "cancel_run", "revoked", "other")),
    *(("rejected", reason) for reason in ("queue_full", "not_serializable", "duplicate_key", "no_journal")),
    ("expired", "deadline"),
    *(("lost", reason) for reason in ("shutdown", "crash")),
)

#: The `task` of a blocked event loop when no run is to blame.
NO_TASK = "__none__"

#: The value that replaces label values beyond a bound.
OTHER = "__other__"
