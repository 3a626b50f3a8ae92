"""Overview, for the on-call engineer: is it broken now, which task, since when, which trace."""

from __future__ import annotations

from aftertask.cli._rules import Limits, counted
from panels import COUNT, GREEN, ORANGE, RATE, RED, SECONDS, SHARE, Ask, Board, Panel, Row, quantiles

BAD = "failed|timed_out|lost|rejected|skipped|dropped"
LIMITS = Limits()


def bad_share(window: str, by: str = "") -> str:
    """PromQL: the share of the counted runs that ended badly."""
    bad = f"sum by ({by}) (increase(aftertask_tasks_bad_total[{window}]))"
    return f"{bad} / ({counted(by, 'increase', window)} > 0)"


NOW = Row(
    title="Is it broken now?",
    panels=[
        Panel(
            kind="stat",
            height=4,
            title="Runs that ended well",
            unit=SHARE,
            description="Share of the runs in the shown time that did not end badly; 100 % if none ran. "
            "Below the service level: look at the table for the task.",
            asks=[Ask(query=f"1 - {bad_share('$__range')} or vector(1)", now=True)],
            first=RED,
            steps=[(LIMITS.objective - 0.04, ORANGE), (LIMITS.objective, GREEN)],
        ),
        Panel(
            kind="stat",
            height=4,
            title="Error budget left",
            unit=SHARE,
            description="How much is left of what the service level allows in the shown time; show 30 days for the "
            "month's. Negative: the level is missed, so fix before you build.",
            asks=[Ask(query=f"1 - ({bad_share('$__range')}) / (1 - $slo) or vector(1)", now=True)],
            first=RED,
            steps=[(0, ORANGE), (0.25, GREEN)],
        ),
        Panel(
            kind="stat",
            height=4,
            title="Bad runs",
            description="About how many runs in the shown time ended badly. Their users had a success response: find "
            "out which work has to be done again.",
            asks=[Ask(query="sum(increase(aftertask_tasks_bad_total[$__range])) or vector(0)", now=True)],
            steps=[(0.5, ORANGE), (LIMITS.min_bad, RED)],
        ),
        Panel(
            kind="stat",
            height=4,
            title="In flight",
            description="Runs that are scheduled, queued, running or waiting for a retry. Growing without end: see "
            "Capacity.",
            asks=[Ask(query="sum(aftertask_tasks_inflight) or vector(0)", now=True)],
        ),
        Panel(
            kind="stat",
            height=4,
            title="Oldest waiting",
            unit=SECONDS,
            description="How long the oldest queued run has waited to start; 0 if none waits. High: see Capacity.",
            asks=[Ask(query="max(aftertask_oldest_queued_age_seconds) or vector(0)", now=True)],
            steps=[(60, ORANGE), (LIMITS.queued_seconds, RED)],
        ),
        Panel(
            kind="stat",
            height=4,
            title="Oldest running",
            unit=SECONDS,
            description="How long the oldest running run has been running; 0 if none runs. Growing by one second per "
            "second: it may be stuck; its task is in the table.",
            asks=[Ask(query="max(aftertask_oldest_running_age_seconds) or vector(0)", now=True)],
            steps=[(300, ORANGE), (LIMITS.stuck_seconds, RED)],
        ),
        Panel(
            kind="stat",
            height=4,
            title="Threads left behind",
            description="Threads that continue past their task's timeout. A thread cannot be stopped: give the call in "
            "it a timeout of its own.",
            asks=[Ask(query="sum(aftertask_abandoned_threads) or vector(0)", now=True)],
            steps=[(1, ORANGE), (5, RED)],
        ),
        Panel(
            kind="stat",
            height=4,
            title="Alerts firing",
            description="Alerts of aftertask's rules that fire now; 0 also if Prometheus has not loaded the rules. "
            "Each names its runbook.",
            asks=[Ask(query='count(ALERTS{alertname=~"Aftertask.+",alertstate="firing"}) or vector(0)', now=True)],
            steps=[(1, RED)],
        ),
    ],
)

WHICH = Row(
    title="Which task?",
    panels=[
        Panel(
            kind="table",
            width=24,
            height=10,
            title="Tasks",
            description="One line per task for the shown time, the worst first. Click a name for its own dashboard. A "
            "task that runs, but whose last success was long ago, is broken.",
            asks=[
                Ask(query="sum by (task) (increase(aftertask_tasks_bad_total[$__range]))", now=True),
                Ask(query=bad_share("$__range", "task"), now=True),
                Ask(query="sum by (task) (increase(aftertask_tasks_finished_total[$__range]))", now=True),
                Ask(
                    query="histogram_quantile(0.95, sum by (le, task) "
                    "(increase(aftertask_queue_wait_seconds_bucket[$__range]))) >= 0",
                    now=True,
                ),
                Ask(
                    query="histogram_quantile(0.95, sum by (le, task) "
                    "(increase(aftertask_attempt_duration_seconds_bucket[$__range]))) >= 0",
                    now=True,
                ),
                Ask(
                    query="sum by (task) (increase(aftertask_retries_total[$__range])) / "
                    "(sum by (task) (increase(aftertask_tasks_finished_total[$__range])) > 0)",
                    now=True,
                ),
                Ask(query="time() - max by (task) (aftertask_last_success_timestamp_seconds)", now=True),
                Ask(query="time() - max by (task) (aftertask_last_failure_timestamp_seconds)", now=True),
                Ask(query="max by (task, owner, executor) (aftertask_task_info)", now=True),
            ],
            columns={
                "task": "Task",
                "Value #A": "Bad runs",
                "Value #B": "Bad share",
                "Value #C": "Runs",
                "Value #D": "Wait (p95)",
                "Value #E": "Run time (p95)",
                "Value #F": "Retries a run",
                "Value #G": "Last success ago",
                "Value #H": "Last failure ago",
                "owner": "Owner",
                "executor": "Executor",
                "Value #I": None,
                "Time": None,
            },
            column_units={
                "Bad share": SHARE,
                "Wait (p95)": SECONDS,
                "Run time (p95)": SECONDS,
                "Last success ago": SECONDS,
                "Last failure ago": SECONDS,
            },
            sort_by="Bad runs",
            to_task=True,
        )
    ],
)

SINCE = Row(
    title="Since when?",
    panels=[
        Panel(
            title="Bad runs by task and outcome",
            unit=RATE,
            stacked=True,
            to_task=True,
            description="The ten worst. If it begins at a mark of process starts, the deploy is the cause: roll it "
            "back. Skipped runs follow a sibling that failed: look for that one.",
            asks=[
                Ask(
                    query="topk(10, sum by (task, outcome) "
                    f'(rate(aftertask_tasks_finished_total{{outcome=~"{BAD}"}}[$__rate_interval])))',
                    legend="{{task}} {{outcome}}",
                )
            ],
        ),
        Panel(
            title="Errors by type",
            unit=RATE,
            stacked=True,
            description="One type over many tasks is a dependency; one type in one task is its code or its input. "
            "Expected errors are here too.",
            asks=[
                Ask(
                    query="topk(10, sum by (task, error_type) "
                    "(rate(aftertask_attempt_errors_total[$__rate_interval])))",
                    legend="{{error_type}} in {{task}}",
                )
            ],
        ),
        Panel(
            title="Ended well, and the service level",
            unit=SHARE,
            high=1,
            description="Share of runs that did not end badly, and the service level. In a gap nothing ran.",
            asks=[
                Ask(query=f"1 - {bad_share('$__rate_interval')}", legend="ended well"),
                Ask(query="vector($slo)", legend="service level"),
            ],
        ),
        Panel(
            title="How fast the error budget burns",
            unit=COUNT,
            lines=True,
            steps=[(1, ORANGE), (14.4, RED)],
            description="1 uses up the month's budget in exactly a month; above 14.4 the first alert fires. Both high: "
            "it continues; only the longer one: it is over.",
            asks=[
                Ask(query=f"({bad_share('1h')}) / (1 - $slo) or vector(0)", legend="over 1h"),
                Ask(query=f"({bad_share('6h')}) / (1 - $slo) or vector(0)", legend="over 6h"),
            ],
        ),
        Panel(
            title="Never ran, by reason",
            unit=RATE,
            stacked=True,
            to_task=True,
            description="Runs that ended without having started. A client causes http_exception and validation; the "
            "others are for the app to fix.",
            asks=[
                Ask(
                    query="topk(10, sum by (task, reason) (rate(aftertask_tasks_not_run_total[$__rate_interval])))",
                    legend="{{task}} {{reason}}",
                )
            ],
        ),
        Panel(
            title="Runs by outcome",
            unit=RATE,
            stacked=True,
            description="All runs that ended. 0 while requests come in: nothing is added, or nothing ends; see "
            "Capacity.",
            asks=[
                Ask(
                    query="sum by (outcome) (rate(aftertask_tasks_finished_total[$__rate_interval]))",
                    legend="{{outcome}}",
                )
            ],
        ),
    ],
)

TRACE = Row(
    title="Which trace?",
    panels=[
        Panel(
            title="Attempt duration",
            unit=SECONDS,
            description="Time in one call of a function. Each dot is an attempt with a trace: click it. No dots: "
            "see docs/dashboards.md for what exemplars need.",
            asks=quantiles("aftertask_attempt_duration_seconds"),
        ),
        Panel(
            title="Queue wait",
            unit=SECONDS,
            description="From the end of the response to the first attempt; a slow sibling counts. High: see Capacity.",
            asks=quantiles("aftertask_queue_wait_seconds"),
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
            height=10,
            title="What went wrong",
            unit=COUNT,
            description="aftertask's own log lines of level error and warning. The stream's label service_name must be "
            "the name of the job in Prometheus.",
            asks=[
                Ask(
                    query='{service_name=~"${job:pipe}"} | json | event=~"(task|loop|lifecycle|alert|signal)[.].+" '
                    '| level=~"error|warning" | task=~"${task:pipe}"'
                )
            ],
        ),
        Panel(
            kind="traces",
            width=24,
            height=10,
            title="Runs that did not succeed",
            unit=SECONDS,
            description="Spans of attempts that did not succeed. Open one to see what its request did.",
            asks=[
                Ask(
                    query='{ span.aftertask.outcome != "succeeded" && span.aftertask.outcome != nil '
                    '&& span.aftertask.task.name =~ "${task:pipe}" }'
                )
            ],
        ),
    ],
)

BOARD = Board(
    uid="aftertask-overview",
    title="Background tasks: overview",
    description="For the on-call engineer: is it broken now, which task, since when, which trace.",
    rows=[NOW, WHICH, SINCE, TRACE, ELSEWHERE],
)
