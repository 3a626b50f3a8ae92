"""Engine and safety: what never ran, how aftertask itself is doing, and whether its counts add up."""

from __future__ import annotations

from panels import COUNT, RATE, RED, SECONDS, Ask, Board, Panel, Row

SAFETY = Row(
    title="What never ran, and what will fail",
    panels=[
        Panel(
            title="Never ran, by reason",
            unit=RATE,
            stacked=True,
            description="own_background: the response has a background of its own, so FastAPI leaves injected tasks "
            "out. client_gone: the client left while the response was sent. shutdown: let the server wait longer.",
            asks=[
                Ask(
                    query="sum by (outcome, reason) (rate(aftertask_tasks_not_run_total[$__rate_interval]))",
                    legend="{{outcome}} {{reason}}",
                )
            ],
        ),
        Panel(
            title="Hazards",
            kind="stat",
            height=8,
            description="Findings of what makes background tasks fail, in the shown time; the log line task.hazard "
            "has the remedy for each. 0: none was found.",
            asks=[
                Ask(
                    query="sum by (task, kind) (increase(aftertask_hazards_total[$__range])) > 0 "
                    "or vector(0) unless on () (sum(increase(aftertask_hazards_total[$__range])) > 0)",
                    legend="{{task}} {{kind}}",
                    now=True,
                )
            ],
            steps=[(0.5, RED)],
        ),
    ],
)

OWN = Row(
    title="aftertask's own alerts",
    panels=[
        Panel(
            title="Own alerts by channel and status",
            unit=RATE,
            stacked=True,
            description="What became of each alert. failed: check the channel's address and token. deduplicated, "
            "rate_limited: merged into another message. dropped: the app ended first.",
            asks=[
                Ask(
                    query="sum by (channel, status) (rate(aftertask_alerts_total[$__rate_interval]))",
                    legend="{{channel}} {{status}}",
                )
            ],
        ),
        Panel(
            title="Time to deliver an alert",
            kind="stat",
            height=8,
            unit=SECONDS,
            description="95th percentile in the shown time, of the attempt that delivered it; 0 if none was delivered. "
            "Seconds: the channel is slow, and other alerts wait for it.",
            asks=[
                Ask(
                    query="histogram_quantile(0.95, sum by (le, channel) "
                    "(increase(aftertask_alert_delivery_seconds_bucket[$__range]))) >= 0 "
                    "or sum by (channel) (aftertask_alert_queue_length) * 0",
                    legend="{{channel}}",
                    now=True,
                )
            ],
            steps=[(5, RED)],
        ),
        Panel(
            title="Alerts waiting for delivery",
            unit=COUNT,
            description="Growing: the channel cannot be reached. Tasks do not wait for it.",
            asks=[Ask(query="sum by (channel) (aftertask_alert_queue_length)", legend="{{channel}}")],
        ),
    ],
)

ITSELF = Row(
    title="aftertask itself",
    panels=[
        Panel(
            title="Accounting drift",
            unit=COUNT,
            lines=True,
            description="Scheduled - finished - in flight, by instance: always 0. Anything else is a bug in aftertask: "
            "please report it.",
            asks=[
                Ask(
                    query="sum by (job, instance) (aftertask_tasks_scheduled_total) - "
                    "sum by (job, instance) (aftertask_tasks_finished_total) - "
                    "sum by (job, instance) (aftertask_tasks_inflight)",
                    legend="{{instance}}",
                )
            ],
        ),
        Panel(
            title="Errors inside aftertask",
            unit=RATE,
            description="All contained: tasks are not affected, but a signal may be missing. The log line "
            "signal.failed has the exception; file a bug with it.",
            asks=[
                Ask(
                    query="sum by (component) (rate(aftertask_self_errors_total[$__rate_interval]))",
                    legend="{{component}}",
                )
            ],
        ),
        Panel(
            title="Events left out",
            unit=RATE,
            description="Events that did not fit into a full queue, so that they are missing in a signal.",
            asks=[
                Ask(query="sum by (sink) (rate(aftertask_events_dropped_total[$__rate_interval]))", legend="{{sink}}")
            ],
        ),
        Panel(
            title="Values folded into __other__",
            unit=RATE,
            description="Label values beyond the limits. Register the tasks that matter; do not create exception "
            "classes at run time.",
            asks=[
                Ask(query="sum by (label) (rate(aftertask_label_overflow_total[$__rate_interval]))", legend="{{label}}")
            ],
        ),
        Panel(
            title="Versions",
            kind="table",
            description="Which version runs where. Two versions for long: a deploy has stopped halfway.",
            asks=[
                Ask(query="max by (job, instance, version, python, starlette) (aftertask_build_info)", now=True),
            ],
            columns={
                "job": "Job",
                "instance": "Instance",
                "version": "aftertask",
                "python": "Python",
                "starlette": "Starlette",
                "Value": None,
                "Value #A": None,
                "Time": None,
            },
        ),
        Panel(
            title="Tasks known",
            kind="table",
            to_task=True,
            description="Every task that has a series of its own, its owner, engine and executor.",
            asks=[Ask(query="max by (task, engine, owner, executor) (aftertask_task_info)", now=True)],
            columns={
                "task": "Task",
                "engine": "Engine",
                "owner": "Owner",
                "executor": "Executor",
                "Value": None,
                "Value #A": None,
                "Time": None,
            },
        ),
    ],
)

BOARD = Board(
    uid="aftertask-engine",
    title="Background tasks: engine and safety",
    description="What never ran, how aftertask itself is doing, and whether its counts add up.",
    rows=[SAFETY, OWN, ITSELF],
)
