"""Capacity: is the app saturated, and which task takes the capacity."""

from __future__ import annotations

from aftertask.cli._rules import Limits
from panels import (
    BYTES,
    COUNT,
    ORANGE,
    PER_MINUTE,
    RED,
    SECONDS,
    SHARE,
    SHOWN,
    Ask,
    Board,
    Panel,
    Row,
    quantiles,
    rising,
    used,
)

LIMITS = Limits()
#: Every job has these metrics, and Prometheus scrapes more than our apps.
OF_APPS = "and on (job, instance) aftertask_build_info"


def late(seconds: int) -> str:
    """PromQL: the share of the runs that waited longer than this; clients write its edge as 10 or 10.0."""
    return (
        f'1 - sum(rate(aftertask_queue_wait_seconds_bucket{{le=~"{seconds}(\\\\.0)?"}}[$__rate_interval])) / '
        "(sum(rate(aftertask_queue_wait_seconds_count[$__rate_interval])) > 0)"
    )


LOAD = Row(
    title="Load",
    panels=[
        Panel(
            title="Busy seconds by task",
            unit=COUNT,
            stacked=True,
            to_task=True,
            description="Seconds of work per second: the average number of busy runs. The task with the largest share "
            "is the one to speed up, limit or move elsewhere. A run counts as it ends: a long one is a spike.",
            asks=[
                Ask(query=rising("aftertask_attempt_duration_seconds_sum", "task", most=10), legend="{{task}}"),
            ],
        ),
        Panel(
            title="Scheduled vs. finished",
            unit=PER_MINUTE,
            description="If scheduled stays above finished, more comes in than goes out, and waits grow. Add "
            "instances, or reduce the work.",
            asks=[
                Ask(query=f"60 * sum(rate(aftertask_tasks_{word}_total[$__rate_interval])) or vector(0)", legend=word)
                for word in ("scheduled", "finished")
            ],
        ),
        Panel(
            title="In flight by state",
            unit=COUNT,
            empty="None in flight",
            stacked=True,
            description="queued grows: too little capacity, or one run holds up its siblings. backoff grows: a "
            "dependency is down. scheduled: responses that are still being sent.",
            asks=[Ask(query=used("aftertask_tasks_inflight", "state"), legend="{{state}}")],
        ),
        Panel(
            title="Oldest waiting, by instance",
            empty="None waits",
            unit=SECONDS,
            lines=True,
            steps=[(60, ORANGE), (LIMITS.queued_seconds, RED)],
            description="How long the oldest queued run has waited; has a value even while nothing starts. One "
            "instance only: restart it, after a look at its stacks.",
            asks=[
                Ask(
                    # No value, not 0, where none waits; a legend would keep the last wait as its last value.
                    query="(max by (instance) (aftertask_oldest_queued_age_seconds) "
                    "or 0 * max by (instance) (aftertask_build_info)) "
                    f"and max by (instance) (max_over_time(aftertask_oldest_queued_age_seconds{SHOWN})) > 0",
                    legend="{{instance}}",
                ),
            ],
        ),
        Panel(
            title="Queue wait",
            unit=SECONDS,
            description="From the end of the response to the first attempt. No values while nothing starts: then look "
            "at the oldest waiting. Dots are traces.",
            asks=quantiles("aftertask_queue_wait_seconds"),
        ),
        Panel(
            title="Waited longer than",
            unit=SHARE,
            high=1,
            lines=True,
            steps=[(LIMITS.wait_share, RED)],
            description="Share of the runs that started late. Its alert: over 5 % waited more than 10 s.",
            asks=[Ask(query=late(seconds), legend=f"{seconds} s") for seconds in (1, 10, 60)],
        ),
    ],
)

LIMITED = Row(
    title="Limits and threads",
    panels=[
        Panel(
            title="Limits in use",
            empty="No limits configured",
            unit=SHARE,
            high=1,
            description="Slots in use of each limit. 100 % and runs waiting: the limit holds the work up; raise it if "
            "what it protects can take more.",
            asks=[
                Ask(
                    query="sum by (limiter) (aftertask_concurrency_in_use) / "
                    "(sum by (limiter) (aftertask_concurrency_limit) > 0)",
                    legend="{{limiter}}",
                )
            ],
        ),
        Panel(
            title="Runs waiting for a limit",
            unit=COUNT,
            empty="No run waits for a limit",
            stacked=True,
            description="Runs that are accepted and have no slot. Growing without end: runs that hold a slot do not "
            "finish, or the limit is too low.",
            asks=[Ask(query=used("aftertask_concurrency_waiting", "limiter"), legend="{{limiter}}")],
        ),
        Panel(
            title="Thread pool usage",
            empty="No thread pool used",
            unit=SHARE,
            high=1,
            lines=True,
            steps=[(LIMITS.threads_share, RED)],
            description="Busy threads of each pool. Sync endpoints share anyio's with sync tasks: at 100 % requests "
            'are slow, too. Give sync tasks threads of their own: executor="thread".',
            asks=[
                Ask(
                    query="max by (instance, pool) (aftertask_threadpool_busy / (aftertask_threadpool_limit > 0))",
                    legend="{{pool}} {{instance}}",
                )
            ],
        ),
        Panel(
            title="Calls waiting for a thread",
            empty="No call waits for a thread",
            unit=COUNT,
            stacked=True,
            description="Above 0 for long: the pool is exhausted. For the task see busy seconds.",
            asks=[Ask(query=used("aftertask_threadpool_waiting", "pool"), legend="{{pool}}")],
        ),
        Panel(
            title="Abandoned threads",
            unit=COUNT,
            empty="No abandoned threads",
            stacked=True,
            to_task=True,
            description="Threads that continue past their task's timeout. A thread cannot be stopped: give the call in "
            "it a timeout of its own.",
            asks=[Ask(query=used("aftertask_abandoned_threads", "task", most=10), legend="{{task}}")],
        ),
    ],
)

LOOP = Row(
    title="Event loop and process",
    panels=[
        Panel(
            title="Event loop lag (p99)",
            empty="No loop is watched",
            unit=SECONDS,
            lines=True,
            steps=[(LIMITS.lag_seconds, RED)],
            description="99th percentile, by instance. High: something computes or blocks on the loop, and every "
            "request waits; the next panel and the log line loop.blocked show what.",
            asks=[
                Ask(
                    query="histogram_quantile(0.99, "
                    "sum by (le, instance) (rate(aftertask_event_loop_lag_seconds_bucket[$__rate_interval]))) >= 0",
                    legend="{{instance}}",
                )
            ],
        ),
        Panel(
            title="Event loop blocked by",
            empty="Never blocked",
            unit=SHARE,
            to_task=True,
            description="Share of the time in which the loop was blocked, by the task to blame. "
            "Make that task a plain def, or use an async client.",
            asks=[
                Ask(query=rising("aftertask_event_loop_blocked_seconds_total", "task", most=10), legend="{{task}}"),
            ],
        ),
        Panel(
            title="Memory",
            empty="Not measured",
            unit=BYTES,
            description="Resident memory, by instance, from prometheus-client (one process only). A sawtooth that ends "
            "at the limit: the process is killed, and its runs with it.",
            asks=[Ask(query=f"sum by (instance) (process_resident_memory_bytes {OF_APPS})", legend="{{instance}}")],
        ),
        Panel(
            title="CPU",
            empty="Not measured",
            unit=COUNT,
            description="Processors in use, by instance, from prometheus-client (one process only). At 1, a Python "
            "process can do no more: add processes.",
            asks=[
                Ask(
                    query=f"sum by (instance) (rate(process_cpu_seconds_total[$__rate_interval]) {OF_APPS})",
                    legend="{{instance}}",
                )
            ],
        ),
    ],
)

BOARD = Board(
    uid="aftertask-capacity",
    title="Background tasks: capacity",
    description="Is the app saturated, by what, and which task takes the capacity.",
    rows=[LOAD, LIMITED, LOOP],
)
