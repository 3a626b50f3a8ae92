"""Internals: what will make tasks fail, aftertask's own alerts, how it is doing, and whether its counts add up."""

from __future__ import annotations

from panels import COUNT, PER_MINUTE, RED, SECONDS, SHOWN, WHOLE, Ask, Board, Column, Panel, Row, per_minute, used

SAFETY = Row(
    title="What never started, and what will fail",
    panels=[
        Panel(
            title="Runs never started, by reason",
            unit=PER_MINUTE,
            empty="Every run started",
            stacked=True,
            description="own_background: the response has a background of its own, so FastAPI leaves injected tasks "
            "out. client_gone: the client left while the response was sent. shutdown: let the server wait longer.",
            asks=[
                Ask(
                    query=per_minute("aftertask_tasks_not_run_total", "outcome, reason"),
                    legend="{{outcome}} {{reason}}",
                )
            ],
        ),
        Panel(
            title="Hazards",
            kind="table",
            empty="No hazards found",
            to_task=True,
            description="Findings in the shown time of what makes background tasks fail; the log line task.hazard "
            "has the remedy for each.",
            asks=[Ask(query="sum by (job, task, kind) (increase(aftertask_hazards_total[$__range])) > 0", now=True)],
            columns=[
                Column(of="task", name="Task", width=290),
                Column(of="kind", name="Hazard"),
                Column(of="Value", name="Found", unit=WHOLE, steps=[(0.5, RED)]),
                Column(of="job", name="Job"),
            ],
            sort_by=["Found"],
        ),
    ],
)

OWN = Row(
    title="aftertask's own alerts",
    panels=[
        Panel(
            title="Alert channels",
            kind="table",
            width=24,
            height=6,
            empty="No channel configured",
            description="What each channel delivered in the shown time, and when last. failed: check its address and "
            "token. Slow: other alerts wait for it.",
            asks=[
                Ask(query=query, now=True)
                for query in (
                    'sum by (job, channel) (increase(aftertask_alerts_total{status="sent"}[$__range]))',
                    'sum by (job, channel) (increase(aftertask_alerts_total{status="failed"}[$__range]))',
                    # The newest interval of the shown time in which the channel delivered.
                    "time() - max_over_time(timestamp(sum by (job, channel) "
                    '(increase(aftertask_alerts_total{status="sent"}[$__rate_interval])) > 0)[$__range:$__interval])',
                    "histogram_quantile(0.95, sum by (le, job, channel) "
                    "(increase(aftertask_alert_delivery_seconds_bucket[$__range]))) >= 0",
                    "sum by (job, channel) (aftertask_alert_queue_length)",
                )
            ],
            columns=[
                Column(of="channel", name="Channel"),
                Column(of="Value #A", name="Delivered", unit=WHOLE),
                Column(of="Value #B", name="Failed", unit=WHOLE, steps=[(0.5, RED)], cell=True),
                Column(of="Value #C", name="Last delivered", unit=SECONDS, empty="none delivered"),
                Column(of="Value #D", name="Time p95", unit=SECONDS, empty="none delivered"),
                Column(of="Value #E", name="Waiting", unit=WHOLE),
                Column(of="job", name="Job"),
            ],
            sort_by=["Failed"],
        ),
        Panel(
            title="Alerts by channel and status",
            width=8,
            unit=PER_MINUTE,
            empty="No alerts",
            stacked=True,
            bars=True,
            description="What became of each alert. failed: check the channel's address and token. rate_limited: over "
            "the channel's rate. dropped: the app ended first.",
            asks=[
                Ask(
                    query=per_minute("aftertask_alerts_total", "channel, status", '{status!="deduplicated"}'),
                    legend="{{channel}} {{status}}",
                )
            ],
        ),
        Panel(
            title="Deduplicated alerts",
            width=8,
            unit=PER_MINUTE,
            empty="None deduplicated",
            stacked=True,
            bars=True,
            description="Alerts that repeat one that was sent a short while ago, and are counted in the next message. "
            "Many: one cause; nothing is lost.",
            asks=[
                Ask(
                    query=per_minute("aftertask_alerts_total", "channel", '{status="deduplicated"}'),
                    legend="{{channel}}",
                )
            ],
        ),
        Panel(
            title="Alerts awaiting delivery",
            width=8,
            unit=COUNT,
            empty="No alert waits",
            description="With those that wait to be sent with their repetitions as one. Growing on and on: the channel "
            "cannot be reached. Tasks do not wait for it.",
            asks=[Ask(query=used("aftertask_alert_queue_length", "channel"), legend="{{channel}}")],
        ),
    ],
)

JOURNAL = Row(
    title="The journal",
    panels=[
        Panel(
            title="New dead letters",
            unit=PER_MINUTE,
            empty="No dead letter, or neither a journal nor a worker",
            stacked=True,
            description="Durable runs, and runs on Celery, that did not succeed. interrupted: the worker died while it "
            "ran; unconfirmed: before its request had ended. aftertask dead list names those of a journal.",
            asks=[Ask(query=per_minute("aftertask_dead_letters_total", "task, reason"), legend="{{task}} {{reason}}")],
        ),
        Panel(
            title="Dead letters kept",
            unit=COUNT,
            empty="No journal",
            description="They stay until they are replayed or deleted.",
            asks=[Ask(query="max by (job) (aftertask_journal_dead_letters)", legend="{{job}}")],
        ),
        Panel(
            title="Runs in the journal, by state",
            unit=COUNT,
            empty="Every run has ended",
            stacked=True,
            description="Runs that have not ended. accepted: its request has not ended. ready for long: no worker "
            "knows the task, or all are busy.",
            asks=[
                Ask(
                    # Every worker of a job exposes the same file.
                    query="sum by (state) (max by (job, state) (aftertask_journal_entries)) "
                    f"and sum by (state) (max_over_time(aftertask_journal_entries{SHOWN})) > 0",
                    legend="{{state}}",
                )
            ],
        ),
        Panel(
            title="Runs of dead workers",
            unit=PER_MINUTE,
            empty="No worker died with runs",
            stacked=True,
            description="What became of them. lost: make the task durable. rerun: the journal ran it again.",
            asks=[
                Ask(query=per_minute("aftertask_journal_recovered_total", "task, action"), legend="{{task}} {{action}}")
            ],
        ),
        Panel(
            title="Time until a change is on disk",
            unit=SECONDS,
            empty="No journal",
            description="95th percentile. intent: a request with a durable task waits for it before it responds.",
            asks=[
                Ask(
                    query="histogram_quantile(0.95, sum by (le, op) "
                    "(rate(aftertask_journal_write_seconds_bucket[$__rate_interval]))) >= 0",
                    legend="{{op}}",
                )
            ],
        ),
        Panel(
            title="Errors of the journal",
            unit=PER_MINUTE,
            empty="No errors",
            description="Disk full, file locked or deleted: the log line journal.failed says which. intent: requests "
            "with durable tasks fail. Accepted runs are not lost.",
            asks=[
                Ask(query=per_minute("aftertask_journal_errors_total", "op"), legend="{{op}}"),
                Ask(query=per_minute("aftertask_journal_dropped_total", "job"), legend="not recorded"),
            ],
        ),
    ],
)

OFFLOAD = Row(
    title="Hand-over to engines",
    panels=[
        Panel(
            title="Hand-overs by engine and status",
            unit=PER_MINUTE,
            empty="No engine",
            stacked=True,
            description="error: the broker did not take the run within the deadline; it failed, or waits in the "
            "journal. fallback: it ran here. The log lines offload.failed and offload.fallback have the cause.",
            asks=[Ask(query=per_minute("aftertask_offload_total", "engine, status"), legend="{{engine}} {{status}}")],
        ),
        Panel(
            title="Time to hand a run over",
            unit=SECONDS,
            empty="No engine",
            description="95th percentile. Near the deadline: the broker is slow, or does not answer.",
            asks=[
                Ask(
                    query="histogram_quantile(0.95, sum by (le, engine) "
                    "(rate(aftertask_offload_seconds_bucket[$__rate_interval]))) >= 0",
                    legend="{{engine}}",
                )
            ],
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
            description="Scheduled - finished - in flight, by instance: always 0, or on a worker what waits in the "
            "broker for its next attempt. Anything else is a bug in aftertask: please report it.",
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
            unit=PER_MINUTE,
            empty="No errors",
            description="All contained: tasks are not affected, but a signal may be missing. The log line "
            "signal.failed has the exception; file a bug with it.",
            asks=[Ask(query=per_minute("aftertask_self_errors_total", "component"), legend="{{component}}")],
        ),
        Panel(
            title="Label overflow",
            unit=PER_MINUTE,
            empty="Every label fits",
            description="Label values beyond the limits, folded into __other__. Register the tasks that matter; do not "
            "create exception classes at run time.",
            asks=[Ask(query=per_minute("aftertask_label_overflow_total", "label"), legend="{{label}}")],
        ),
        Panel(
            title="Versions",
            kind="table",
            empty="No instance",
            description="Which version runs where. Two versions for long: a deploy has stopped halfway.",
            asks=[
                Ask(query="max by (job, instance, version, python, starlette) (aftertask_build_info)", now=True),
            ],
            columns=[
                Column(of="instance", name="Instance"),
                Column(of="version", name="aftertask"),
                Column(of="python", name="Python"),
                Column(of="starlette", name="Starlette"),
                Column(of="job", name="Job"),
            ],
        ),
        Panel(
            title="Known tasks",
            kind="table",
            width=24,
            empty="No tasks",
            to_task=True,
            description="Every task that has a series of its own, its owner, engine and executor.",
            asks=[Ask(query="max by (job, task, engine, owner, executor) (aftertask_task_info)", now=True)],
            columns=[
                Column(of="task", name="Task", width=290),
                Column(of="owner", name="Owner"),
                Column(of="executor", name="Executor"),
                Column(of="engine", name="Engine"),
                Column(of="job", name="Job"),
            ],
            sort_by=["Task"],
        ),
    ],
)

BOARD = Board(
    uid="aftertask-engine",
    title="Background tasks: internals",
    description="What will fail, aftertask's own alerts, how it is doing, and whether its counts add up.",
    rows=[SAFETY, OWN, ITSELF, JOURNAL, OFFLOAD],
)
