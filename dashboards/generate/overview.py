"""Overview, for the on-call engineer: is it broken now, which task, since when, which trace."""

from __future__ import annotations

from aftertask.cli._rules import BURNS, Limits, counted
from panels import (
    AGO,
    COUNT,
    GREEN,
    ORANGE,
    PER_MINUTE,
    RED,
    SECONDS,
    SHARE,
    WHOLE,
    Ask,
    Board,
    Column,
    Panel,
    Row,
    per_minute,
    quantiles,
)

BAD = "failed|timed_out|lost|rejected|skipped|dropped"
#: What neither a client causes at will nor anyone cancels on purpose.
OURS = '{reason!~"http_exception|validation|revoked|cancel_run"}'
LIMITS = Limits()
FIRING = 'ALERTS{alertname=~"Aftertask.+",alertstate="firing"}'


def bad_share(window: str, by: str = "") -> str:
    """PromQL: the share of the counted runs that ended badly."""
    bad = f"sum by ({by}) (increase(aftertask_tasks_bad_total[{window}]))"
    return f"{bad} / ({counted(by, 'increase', window)} > 0)"


def firing(severity: str) -> str:
    """PromQL: how many alerts of this severity fire."""
    return f'count({FIRING[:-1]},severity="{severity}"}}) or vector(0)'


NOW = Row(
    title="Is it broken now?",
    panels=[
        Panel(
            kind="stat",
            height=4,
            title="Instances up",
            unit=SHARE,
            decimals=0,
            high=1,
            filled=True,
            empty="No instance",
            description="Share of the processes of the last day that Prometheus can scrape now. Below 100 %: see which "
            "is down in Alerts, and why it ended in its own logs.",
            asks=[Ask(query="avg(up and on (job, instance) last_over_time(aftertask_build_info[1d]))")],
            first=RED,
            steps=[(1, GREEN)],
        ),
        Panel(
            kind="stat",
            height=4,
            title="Success rate",
            unit=SHARE,
            high=1,
            description="Share of the runs of the last 5 minutes that did not end badly. Below the SLO: look at the "
            "table for the task.",
            asks=[Ask(query=f"1 - {bad_share('5m')}")],
            first=RED,
            steps=[(LIMITS.objective - 0.04, ORANGE), (LIMITS.objective, GREEN)],
        ),
        Panel(
            kind="stat",
            height=4,
            title="Bad runs/min",
            decimals=1,
            description="Runs per minute that ended badly, over the last 5 minutes. Their users had a success "
            "response: find out which work has to be done again.",
            asks=[Ask(query="60 * sum(rate(aftertask_tasks_bad_total[5m])) or vector(0)")],
            steps=[(1, ORANGE), (10, RED)],
        ),
        Panel(
            kind="stat",
            height=4,
            title="Oldest waiting",
            unit=SECONDS,
            empty="None waits",
            description="How long the oldest queued run has waited to start; 0 if none waits. High: see Capacity.",
            asks=[Ask(query="max(aftertask_oldest_queued_age_seconds) or vector(0)")],
            steps=[(60, ORANGE), (LIMITS.queued_seconds, RED)],
        ),
        Panel(
            kind="stat",
            height=4,
            title="Oldest running",
            unit=SECONDS,
            empty="None runs",
            description="How long the oldest running run has been running; 0 if none runs. Growing by one second per "
            "second: it may be stuck; its task is in the table.",
            asks=[Ask(query="max(aftertask_oldest_running_age_seconds) or vector(0)")],
            steps=[(300, ORANGE), (LIMITS.stuck_seconds, RED)],
        ),
        Panel(
            kind="stat",
            height=4,
            title="Alerts firing",
            filled=True,
            empty="No alerts",
            description="Alerts of aftertask's rules that fire now; 0 also if Prometheus has not loaded the rules. "
            "The next row names them, with those of severity info, which are not counted.",
            asks=[
                Ask(query=firing("critical"), legend="critical", steps=[(1, RED)]),
                Ask(query=firing("warning"), legend="warning", steps=[(1, ORANGE)]),
            ],
        ),
    ],
)

TASKS = Panel(
    kind="table",
    width=24,
    height=9,
    title="Tasks",
    description="One line per task for the shown time, the worst first. Click a name for its own dashboard. A "
    "task that runs, but whose last success was long ago, is broken; one that is running for long may be stuck.",
    asks=[
        Ask(query=query, now=True)
        for query in (
            "sum by (job, task) (increase(aftertask_tasks_bad_total[$__range]))",
            bad_share("$__range", "job, task"),
            "sum by (job, task) (increase(aftertask_tasks_finished_total[$__range]))",
            "histogram_quantile(0.95, sum by (le, job, task) "
            "(increase(aftertask_queue_wait_seconds_bucket[$__range]))) >= 0",
            "histogram_quantile(0.95, sum by (le, job, task) "
            "(increase(aftertask_attempt_duration_seconds_bucket[$__range]))) >= 0",
            "sum by (job, task) (increase(aftertask_retries_total[$__range])) / "
            "(sum by (job, task) (increase(aftertask_attempt_duration_seconds_count[$__range])) > 0)",
            # 0 for a task that does not run, so that the column does not come and go.
            "max by (job, task) (aftertask_oldest_running_age_seconds) or 0 * max by (job, task) (aftertask_task_info)",
            'sum by (job, task) (increase(aftertask_event_loop_blocked_seconds_total{task!="__none__"}[$__range]))',
            "time() - max by (job, task) (aftertask_last_success_timestamp_seconds > 0)",
            "time() - max by (job, task) (aftertask_last_failure_timestamp_seconds > 0)",
            "max by (job, task, owner) (aftertask_task_info)",
        )
    ],
    # As wide as a word of their headings and the longest values, so that on a screen of 1280 pixels the rest is enough
    # for owner and job.
    columns=[
        Column(of="task", name="Task", width=290),
        Column(of="Value #A", name="Bad runs", unit=WHOLE, width=65),
        Column(
            of="Value #B",
            name="Bad share",
            unit=SHARE,
            width=65,
            steps=[(1 - LIMITS.objective, ORANGE), (LIMITS.failing_share, RED)],
            cell=True,
        ),
        Column(of="Value #C", name="Runs", unit=WHOLE, width=62),
        Column(of="Value #D", name="Wait p95", unit=SECONDS, width=76),
        Column(of="Value #E", name="Run p95", unit=SECONDS, width=76),
        Column(of="Value #F", name="Retries", unit=SHARE, width=62, steps=[(LIMITS.retry_share, RED)]),
        Column(
            of="Value #G",
            name="Running for",
            unit=SECONDS,
            zero="-",
            width=80,
            steps=[(300, ORANGE), (LIMITS.stuck_seconds, RED)],
        ),
        Column(of="Value #H", name="Blocked loop", unit=SECONDS, zero="-", width=75),
        Column(of="Value #I", name="Last success", unit=SECONDS, empty="never", width=80),
        Column(of="Value #J", name="Last failure", unit=SECONDS, width=80),
        Column(of="owner", name="Owner"),
        Column(of="job", name="Job"),
    ],
    sort_by=["Bad runs", "Running for"],
    to_task=True,
)

WHICH = Row(
    title="Which task?",
    panels=[
        TASKS,
        Panel(
            kind="table",
            width=24,
            height=6,
            title="Alerts",
            empty="No alert fires",
            description="Alerts of aftertask's rules that fire now, critical ones first, then the newest, and since "
            "when their condition has held. The notification of each links its runbook.",
            asks=[
                Ask(
                    query="1000 * max by (alertname, severity, job, task, instance) "
                    f"(ALERTS_FOR_STATE and ignoring (alertstate) {FIRING})",
                    now=True,
                )
            ],
            columns=[
                Column(of="alertname", name="Alert", width=290),
                Column(
                    of="severity",
                    name="Severity",
                    words={"critical": RED, "warning": ORANGE, "info": "blue"},
                    width=90,
                ),
                Column(of="task", name="Task"),
                Column(of="instance", name="Instance"),
                Column(of="job", name="Job"),
                Column(of="Value", name="Since", unit=AGO),
            ],
            sort_by=["Severity", "Since"],
        ),
    ],
)

SINCE = Row(
    title="Since when?",
    panels=[
        Panel(
            title="Bad runs per minute",
            unit=PER_MINUTE,
            empty="No bad runs",
            bars=True,
            stacked=True,
            to_task=True,
            description="The ten worst tasks. If it begins at a mark of process starts, the deploy is the cause: roll "
            "it back. Skipped runs follow a sibling that failed: look for that one.",
            asks=[Ask(query=per_minute("aftertask_tasks_bad_total", "task", most=10), legend="{{task}}")],
        ),
        Panel(
            title="Errors by type",
            unit=PER_MINUTE,
            empty="No errors",
            stacked=True,
            description="One type over many tasks is a dependency; one type in one task is its code or its input. "
            "Expected errors are here too.",
            asks=[
                Ask(
                    query=per_minute("aftertask_attempt_errors_total", "task, error_type", most=10),
                    legend="{{error_type}} in {{task}}",
                )
            ],
        ),
        Panel(
            title="Runs never started, by reason",
            unit=PER_MINUTE,
            empty="Every run started",
            stacked=True,
            to_task=True,
            description="Runs that ended without having started, for the app to fix. Those that a client causes "
            "(http_exception, validation), and those cancelled or revoked on purpose, are in Internals.",
            asks=[
                Ask(
                    query=per_minute("aftertask_tasks_not_run_total", "task, reason", OURS, most=10),
                    legend="{{reason}} of {{task}}",
                )
            ],
        ),
        Panel(
            title="Runs by outcome",
            unit=PER_MINUTE,
            stacked=True,
            description="All runs that ended. None while requests come in: nothing is added, or nothing ends; see "
            "Capacity.",
            asks=[Ask(query=per_minute("aftertask_tasks_finished_total", "outcome"), legend="{{outcome}}")],
        ),
    ],
)

BUDGET = Row(
    title="Error budget",
    panels=[
        Panel(
            kind="stat",
            width=4,
            title="Error budget left",
            unit=SHARE,
            description="How much is left of the bad runs that the SLO allows in the shown time; show 30 days for the "
            "month's. Used up: fix before you build.",
            asks=[Ask(query=f"1 - ({bad_share('$__range')}) / (1 - $slo)", now=True)],
            first=RED,
            steps=[(0, ORANGE), (0.25, GREEN)],
            texts=[(None, -1e-9, "used up", RED)],
        ),
        Panel(
            title="Success rate vs. SLO",
            width=10,
            unit=SHARE,
            low=0.95,
            high=1,
            description="Share of runs that did not end badly, beside the SLO. In a gap nothing ran. The SLO is the "
            "variable slo, in the dashboard's settings or its address (var-slo=0.999).",
            asks=[
                Ask(query=f"1 - {bad_share('$__rate_interval')}", legend="success rate"),
                Ask(query="vector($slo)", legend="SLO"),
            ],
        ),
        Panel(
            title="Error budget burn rate",
            width=10,
            unit=COUNT,
            lines=True,
            steps=[(1, ORANGE), (BURNS[0][2], RED)],
            description="1 uses up the month's budget in exactly a month; above 14.4 the first alert fires. All high: "
            "it continues; only the longer ones: it is over.",
            asks=[
                Ask(query=f"({bad_share(window)}) / (1 - $slo)", legend=f"over {window}")
                for window in ("5m", "1h", "6h")
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
            title="What went wrong",
            unit=COUNT,
            empty="No warnings",
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
            title="Runs that did not succeed",
            unit=SECONDS,
            empty="No traces",
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
    rows=[NOW, WHICH, SINCE, BUDGET, TRACE, ELSEWHERE],
)
