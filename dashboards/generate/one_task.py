"""Task, for its developer: why is it slow, why does it fail."""

from __future__ import annotations

from overview import BAD, LIMITS, bad_share
from panels import COUNT, PER_MINUTE, RED, SECONDS, SHARE, Ask, Board, Panel, Row, per_minute, quantiles, used

FAILS = Row(
    title="$task",
    panels=[
        Panel(
            title="Runs by outcome",
            unit=PER_MINUTE,
            stacked=True,
            description="All of this task's runs that ended. skipped: an earlier sibling failed; dropped: the request "
            "ended without running it.",
            asks=[Ask(query=per_minute("aftertask_tasks_finished_total", "outcome"), legend="{{outcome}}")],
        ),
        Panel(
            title="Errors by type",
            unit=PER_MINUTE,
            empty="No errors",
            stacked=True,
            description="Attempts that raised, by exception class. A timeout is a dependency, a TypeError is code. "
            "The traces of failed attempts are the dots of the durations below.",
            asks=[Ask(query=per_minute("aftertask_attempt_errors_total", "error_type"), legend="{{error_type}}")],
        ),
        Panel(
            title="Failure rate",
            unit=SHARE,
            high=1,
            lines=True,
            steps=[(LIMITS.failing_share, RED)],
            description=f"Share of the runs that ended badly ({BAD.replace('|', ', ')}), without expected failures "
            "and a client's mistakes. Its alert: over 25 % and three runs in 30 minutes.",
            asks=[Ask(query=bad_share(window), legend=f"over {window}") for window in ("5m", "30m")],
        ),
        Panel(
            title="Runs never started, by reason",
            unit=PER_MINUTE,
            empty="Every run started",
            stacked=True,
            description="Runs that ended without having started. A client causes http_exception and validation, "
            "cancel_run and revoked are on purpose; the others are for the app to fix.",
            asks=[
                Ask(
                    query=per_minute("aftertask_tasks_not_run_total", "outcome, reason"),
                    legend="{{outcome}} {{reason}}",
                )
            ],
        ),
        Panel(
            title="Attempt duration distribution",
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
            title="Attempt duration by result",
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
            title="End-to-end time",
            unit=SECONDS,
            description="How long a user waits for the work, retries and back-off included. Far above the attempt's "
            "duration: waits or retries. Dots are traces.",
            asks=quantiles("aftertask_end_to_end_seconds"),
        ),
        Panel(
            title="Retries per attempt",
            unit=SHARE,
            high=1,
            lines=True,
            steps=[(LIMITS.retry_share, RED)],
            description="Share of the attempts that are followed by another; the line is its alert's. High: retries do "
            "not help, so look at the errors.",
            asks=[
                Ask(
                    query="sum(rate(aftertask_retries_total[$__rate_interval])) / "
                    "(sum(rate(aftertask_attempt_duration_seconds_count[$__rate_interval])) > 0)",
                    legend="retries",
                )
            ],
        ),
        Panel(
            title="Oldest run vs. timeout",
            unit=SECONDS,
            empty="None in flight",
            description="Falls to 0 when the run ends. Growing without end: the run is stuck; the log line "
            "task.stuck has its stack.",
            asks=[
                Ask(query="max(aftertask_oldest_running_age_seconds) or vector(0)", legend="oldest running"),
                Ask(query="max(aftertask_oldest_queued_age_seconds) or vector(0)", legend="oldest waiting"),
                Ask(query="max(aftertask_task_timeout_seconds > 0)", legend="timeout"),
            ],
        ),
        Panel(
            title="In flight",
            unit=COUNT,
            empty="None in flight",
            stacked=True,
            description="backoff: runs that wait for their next attempt. Abandoned threads continue past the timeout "
            "and cannot be stopped.",
            asks=[
                Ask(query=used("aftertask_tasks_inflight", "state"), legend="{{state}}"),
                Ask(query=used("aftertask_abandoned_threads", ""), legend="abandoned threads"),
            ],
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
            title="Log lines of the task",
            empty="No log lines",
            description="aftertask's and the task's own, which carry the same keys. The stream's label service_name "
            "must be the name of the job in Prometheus.",
            asks=[Ask(query='{service_name=~"${job:pipe}"} | json | task=~"${task:pipe}"')],
        ),
        Panel(
            kind="traces",
            width=24,
            title="Slow attempts",
            empty="No traces",
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
    one_task=True,
    rows=[FAILS, ELSEWHERE],
)
