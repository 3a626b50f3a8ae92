"""Every metric family that aftertask emits: one place for names, labels, buckets and help texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PREFIX = "aftertask_"

# Waits sit near zero but a backlog reaches minutes; attempts are told up to 15 minutes, whole lives up to six hours.
WAIT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
ATTEMPT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0)
# From a function in the same process to a channel that answers just before it is given up.
DELIVERY_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)
LAG_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
END_TO_END_BUCKETS = (0.05, 0.25, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0, 21600.0)


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """
    One metric family.

    Attributes:
        name: Without the prefix, and for a counter without `_total`.
        kind: As Prometheus calls it.
        help: What it says, for people.
        labels: In the order in which values are given.
        buckets: A histogram's upper bounds, in seconds.
        mode: A gauge's way to be put together over processes, as prometheus-client calls it.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    mode: Literal["", "livesum", "livemax", "max"] = ""

    @property
    def full_name(self) -> str:
        """With the prefix; a counter's samples have `_total` behind it."""
        return PREFIX + self.name


_TASK = ("task", "engine")

#: The ways in which a run is never started, told from 0 on for each task.
NOT_RUN_REASONS = (
    ("skipped", "sibling_failed"),
    *(("dropped", reason) for reason in ("http_exception", "validation", "handler_error")),
    *(("dropped", reason) for reason in ("own_background", "client_gone", "other")),
    *(("rejected", reason) for reason in ("queue_full", "not_serializable")),
    ("expired", "deadline"),
    ("lost", "shutdown"),
)

#: Under what an error of our own in the interception is counted; told from 0 on, so that the first one is seen.
INTERCEPTION = "aftertask.interception"

#: The `task` of a blocked event loop that no background task was on.
NO_TASK = "__none__"

SCHEDULED = Family("tasks_scheduled", "counter", "Runs that came into being.", _TASK)
FINISHED = Family("tasks_finished", "counter", "Runs that ended, by how.", (*_TASK, "outcome"))
NOT_RUN = Family(
    "tasks_not_run", "counter", "Runs that ended without having been started, by why.", ("task", "outcome", "reason")
)
BAD = Family("tasks_bad", "counter", "Runs that service levels count as bad.", _TASK)
INFLIGHT = Family("tasks_inflight", "gauge", "Runs that have not ended.", (*_TASK, "state"), mode="livesum")
WAIT = Family(
    "queue_wait_seconds", "histogram", "From the end of the response to the first attempt.", _TASK, WAIT_BUCKETS
)
ATTEMPT = Family(
    "attempt_duration_seconds", "histogram", "Time in one call of the function.", (*_TASK, "result"), ATTEMPT_BUCKETS
)
END_TO_END = Family(
    "end_to_end_seconds", "histogram", "From being scheduled to the end of the last attempt.", _TASK, END_TO_END_BUCKETS
)
RETRIES = Family("retries", "counter", "Attempts that will be followed by another.", _TASK)
ERRORS = Family("attempt_errors", "counter", "Attempts that raised, by exception class.", (*_TASK, "error_type"))
OLDEST_QUEUED = Family(
    "oldest_queued_age_seconds", "gauge", "How long the oldest queued run has waited.", _TASK, mode="livemax"
)
OLDEST_RUNNING = Family(
    "oldest_running_age_seconds", "gauge", "How long the oldest running run has run.", _TASK, mode="livemax"
)
LAST_SUCCESS = Family("last_success_timestamp_seconds", "gauge", "When a run last succeeded.", _TASK, mode="max")
LAST_FAILURE = Family("last_failure_timestamp_seconds", "gauge", "When a run last failed.", _TASK, mode="max")
HAZARDS = Family("hazards", "counter", "Findings of what makes background tasks fail.", ("task", "kind"))
ABANDONED = Family(
    "abandoned_threads", "gauge", "Threads that went past their task's time limit and go on.", ("task",), mode="livesum"
)
TASK_TIMEOUT = Family("task_timeout_seconds", "gauge", "A task's time limit for each attempt.", ("task",), mode="max")
CONCURRENCY_LIMIT = Family(
    "concurrency_limit", "gauge", "Runs that a limit lets run at once.", ("limiter",), mode="livesum"
)
CONCURRENCY_IN_USE = Family(
    "concurrency_in_use", "gauge", "Slots of a limit that are taken.", ("limiter",), mode="livesum"
)
CONCURRENCY_WAITING = Family(
    "concurrency_waiting", "gauge", "Runs that wait for a slot of a limit.", ("limiter",), mode="livesum"
)
THREADPOOL_LIMIT = Family("threadpool_limit", "gauge", "Threads that a pool may use.", ("pool",), mode="livesum")
THREADPOOL_BUSY = Family("threadpool_busy", "gauge", "Threads of a pool in use.", ("pool",), mode="livesum")
THREADPOOL_WAITING = Family(
    "threadpool_waiting", "gauge", "Calls that wait for a thread of a pool.", ("pool",), mode="livesum"
)
ALERTS = Family(
    "alerts", "counter", "Bad runs that a channel was to be told of, by what became of it.", ("channel", "status")
)
ALERT_DELIVERY = Family(
    "alert_delivery_seconds",
    "histogram",
    "Time in the attempt that delivered an alert.",
    ("channel",),
    DELIVERY_BUCKETS,
)
ALERT_QUEUE = Family(
    "alert_queue_length", "gauge", "Kinds of failure that wait to be told.", ("channel",), mode="livesum"
)
LOOP_LAG = Family(
    "event_loop_lag_seconds", "histogram", "How late the event loop was, sampled some times a second.", (), LAG_BUCKETS
)
LOOP_BLOCKED = Family(
    "event_loop_blocked_seconds", "counter", "Time in which the event loop did not answer, by who was on it.", ("task",)
)
SELF_ERRORS = Family("self_errors", "counter", "Errors inside aftertask, all contained.", ("component",))
LABEL_OVERFLOW = Family("label_overflow", "counter", "Label values folded into __other__.", ("label",))
BUILD_INFO = Family("build_info", "gauge", "Versions in use.", ("version", "python", "starlette"), mode="max")
TASK_INFO = Family("task_info", "gauge", "What is known of a task.", (*_TASK, "owner", "executor"), mode="max")

#: Read from whoever keeps them, when Prometheus asks: limit, in use, waiting.
CONCURRENCY = (CONCURRENCY_LIMIT, CONCURRENCY_IN_USE, CONCURRENCY_WAITING)
THREADPOOL = (THREADPOOL_LIMIT, THREADPOOL_BUSY, THREADPOOL_WAITING)

FAMILIES = tuple(value for value in list(globals().values()) if isinstance(value, Family))
