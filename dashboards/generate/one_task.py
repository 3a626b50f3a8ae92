"""Task, for its developer: why is it slow, why does it fail."""

from __future__ import annotations

from overview import BAD, bad_share
from panels import COUNT, RATE, SECONDS, SHARE, Ask, Board, Panel, Row, quantiles

FAILS = Row(
    title="$task",
    repeat="task",
    panels=[
        Panel(
            title="Runs by outcome",
            unit=RATE,
            stacked=True,
            description="All of this task's runs that ended. skipped: an earlier sibling failed; dropped: the request "
            "ended without running it.",
            asks=[
                Ask(
                    query="sum by (outcome) (rate(aftertask_tasks_finished_total[$__rate_interval]))",
                    legend="{{outcome}}",
                )
            ],
        ),
        Panel(
            title="Errors by type",
            unit=RATE,
            stacked=True,
            description="Attempts that raised, by exception class; each dot leads to the trace of one. A timeout is a "
            "dependency, a TypeError is code.",
            asks=[
                Ask(
                    query="sum by (error_type) (rate(aftertask_attempt_errors_total[$__rate_interval]))",
                    legend="{{error_type}}",
                    exemplars=True,
                )
            ],
        ),
        Panel(
            title="Attempt duration, where and how often",
            kind="heatmap",
            unit=SECONDS,
            description="Each column is a moment, each cell a duration, darker where more attempts took that long. Two "
            "bands are two kinds of input or a cache. Dots are traces.",
            asks=[
                Ask(
                    query="sum by (le) (increase(aftertask_attempt_duration_seconds_bucket[$__rate_interval]))",
                    legend="{{le}}",
                    exemplars=True,
                )
            ],
        ),
        Panel(
            title="Attempt duration of good and bad attempts",
            unit=SECONDS,
            description="Errors that take as long as the timeout of a client are that client's; errors at once are "
            "code. Dots are traces.",
            asks=[
                *quantiles("aftertask_attempt_duration_seconds", matchers='{result="ok"}', word="ok"),
                *quantiles("aftertask_attempt_duration_seconds", matchers='{result="error"}', word="error"),
            ],
        ),
        Panel(
            title="Waiting and running",
            unit=SECONDS,
            stacked=True,
            description="Mean wait and mean run time, stacked. Mostly waiting: the task is not slow, but starts late; "
            "see Capacity.",
            asks=[
                Ask(
                    query=f"sum(rate(aftertask_{name}_sum[$__rate_interval])) / "
                    f"(sum(rate(aftertask_{name}_count[$__rate_interval])) > 0)",
                    legend=word,
                )
                for name, word in (("queue_wait_seconds", "waiting"), ("attempt_duration_seconds", "running"))
            ],
        ),
        Panel(
            title="Queue wait",
            unit=SECONDS,
            description="From the end of the response to the first attempt; a slow sibling counts. Order siblings by "
            "priority, or give the slow one a response of its own. Dots are traces.",
            asks=quantiles("aftertask_queue_wait_seconds"),
        ),
        Panel(
            title="From scheduled to ended",
            unit=SECONDS,
            description="How long a user waits for the work, retries and back-off included. Far above the attempt's "
            "duration: waits or retries. Dots are traces.",
            asks=quantiles("aftertask_end_to_end_seconds"),
        ),
        Panel(
            title="Attempts per run",
            unit=COUNT,
            description="1: none is retried. Close to the maximum number of attempts: retries do not help, so look at "
            "the errors.",
            asks=[
                Ask(
                    query="sum(rate(aftertask_attempt_duration_seconds_count[$__rate_interval])) / "
                    "(sum(rate(aftertask_end_to_end_seconds_count[$__rate_interval])) > 0)",
                    legend="attempts",
                )
            ],
        ),
        Panel(
            title="Oldest running, and the timeout",
            unit=SECONDS,
            description="Falls to 0 when the run ends. Growing without end: the run is stuck; the log line "
            "task.stuck has its stack.",
            asks=[
                Ask(query="max(aftertask_oldest_running_age_seconds) or vector(0)", legend="oldest running"),
                Ask(query="max(aftertask_oldest_queued_age_seconds) or vector(0)", legend="oldest waiting"),
                Ask(query="max(aftertask_task_timeout_seconds)", legend="timeout"),
            ],
        ),
        Panel(
            title="In flight",
            unit=COUNT,
            stacked=True,
            description="backoff: runs that wait for their next attempt. Threads left behind continue past the timeout "
            "and cannot be stopped.",
            asks=[
                Ask(query="sum by (state) (aftertask_tasks_inflight)", legend="{{state}}"),
                Ask(query="sum(aftertask_abandoned_threads)", legend="threads left behind"),
            ],
        ),
        Panel(
            title="Never ran, and ended badly",
            unit=RATE,
            description="Runs that never started, by reason, and all runs that count as bad for the service level.",
            asks=[
                Ask(
                    query="sum by (outcome, reason) (rate(aftertask_tasks_not_run_total[$__rate_interval]))",
                    legend="{{outcome}} {{reason}}",
                ),
                Ask(query="sum(rate(aftertask_tasks_bad_total[$__rate_interval]))", legend="bad"),
            ],
        ),
        Panel(
            title="Bad share",
            unit=SHARE,
            high=1,
            description=f"Share of the runs that ended badly ({BAD.replace('|', ', ')}), without expected failures "
            "and a client's mistakes. Its alert: over 25 % and three runs in 30 minutes.",
            asks=[Ask(query=f"{bad_share('30m')} or vector(0)", legend="over 30m")],
        ),
    ],
)

ELSEWHERE = Row(
    title="Logs and traces (need Loki and Tempo)",
    collapsed=True,
    panels=[
        Panel(
            kind="logs",
            width=24,
            height=12,
            title="Log lines of the task",
            description="aftertask's and the task's own, which carry the same keys. The stream's label service_name "
            "must be the name of the job in Prometheus.",
            asks=[Ask(query='{service_name=~"${job:pipe}"} | json | task=~"${task:pipe}"')],
        ),
        Panel(
            kind="traces",
            width=24,
            height=12,
            title="Slow attempts",
            unit=SECONDS,
            description="Attempts that took over a second. Open one to see in which call.",
            asks=[Ask(query='{ span.aftertask.task.name =~ "${task:pipe}" && span:duration > 1s }')],
        ),
    ],
)

BOARD = Board(
    uid="aftertask-task",
    title="Background tasks: one task",
    description="For a task's developer: why is it slow, why does it fail. Choose the task above.",
    rows=[FAILS, ELSEWHERE],
)
