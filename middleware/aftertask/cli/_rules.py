"""The alert and recording rules: their limits in one place, and how they become Prometheus's YAML."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from string import Template
from typing import Any, Literal

import yaml

from ..signals import families
from ._output import dump
from ._promql import check, select

_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_DURATION = re.compile(r"(?<=\[)(\d+)([smhd])(?=[\]:])")


#: Long window, short window, how many times faster than allowed the budget burns, `for`, severity.
#: Source: Google, "The Site Reliability Workbook", 2018, chapter 5, table 5-8, with the 3d page split in two.
BURNS: tuple[tuple[str, str, float, float, Literal["critical", "warning"]], ...] = (
    ("1h", "5m", 14.4, 120, "critical"),
    ("6h", "30m", 6, 900, "critical"),
    ("1d", "2h", 3, 3600, "warning"),
    ("3d", "6h", 1, 10800, "warning"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """
    The service level, and the thresholds of the alerts.

    Args:
        objective: Share of runs that must not end badly, over 30 days; between 0 and 1.
        min_bad: Bad runs below which the error budget does not alert: one failure of two runs is no emergency.
        failing_runs: Bad runs of one task in 30 minutes.
        failing_share: Share of the task's runs that ended badly in 30 minutes.
        stuck_timeouts: Multiple of its task's timeout after which a run is stuck.
        stuck_seconds: Seconds after which a run is stuck if its task has no timeout.
        queued_seconds: How long a run may wait to start.
        wait_seconds: A longer wait than this is a slow start; an edge of the histogram's buckets.
        wait_share: Share of starts that may be slow.
        threads_share: Share of a pool's threads that may be busy.
        lag_seconds: Delay that at most 1 % of the event loop's turns may exceed.
        blocked_share: Share of its time for which a task may block the event loop.
        retry_share: Share of attempts that may be followed by another.
        retries: Retries in 15 minutes below which there is no alert.
    """

    objective: float = 0.99
    min_bad: float = 5
    failing_runs: float = 3
    failing_share: float = 0.25
    stuck_timeouts: float = 2
    stuck_seconds: float = 1800
    queued_seconds: float = 300
    wait_seconds: float = 10
    wait_share: float = 0.05
    threads_share: float = 0.9
    lag_seconds: float = 0.25
    blocked_share: float = 0.05
    retry_share: float = 0.5
    retries: float = 10

    def __post_init__(self) -> None:
        for name in [field.name for field in fields(self)]:
            value = getattr(self, name)
            share = name == "objective" or name.endswith("_share")
            if not value > 0 or (share and not value < 1):
                allowed = "between 0 and 1" if share else "above 0"
                raise ValueError(f"{name} must be {allowed}, got {value:g}")
        if BURNS[0][2] * (1 - self.objective) >= 1:
            lowest = 1 - 1 / BURNS[0][2]
            raise ValueError(
                f"objective must be above {lowest:.4f}, got {self.objective:g}: below that even an app whose every run "
                "is bad would not burn its budget fast enough for the first alert"
            )
        if self.wait_seconds not in families.WAIT_BUCKETS:
            edges = ", ".join(f"{edge:g}" for edge in families.WAIT_BUCKETS)
            raise ValueError(f"wait_seconds must be an edge of the histogram ({edges}), got {self.wait_seconds:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """
    How the rules are written.

    Args:
        limits: The service level and the thresholds.
        selector: Label matchers for each metric, such as `job="api"`; empty for everything that is scraped.
        runbooks: Where the runbooks are read; the alert's name and `.md` are added.
        dashboards: Where Grafana is.
        scale: Multiplies every window, wait and age, for tests that have no three days.
    """

    limits: Limits = Limits()
    selector: str = ""
    runbooks: str = "runbooks"
    dashboards: str = "http://localhost:3000"
    scale: float = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """
    One alert.

    Attributes:
        name: Without `Aftertask`.
        expr: PromQL; `${name}` is one of the limits, `[10m]` is scaled with the options.
        wait: The `for` of the rule, in seconds.
        description: With the numbers; `${name}` as in the query, `${count}` and `${share}` for its value.
        board: The dashboard that explains it, without `aftertask-`.
        keeps: The labels that select what that dashboard shows.
        labels: More labels of its own.
        default: Whether it is exported without `--all`.
    """

    name: str
    expr: str
    wait: float
    severity: Literal["critical", "warning", "info"]
    summary: str
    description: str
    board: Literal["overview", "task", "capacity", "engine"]
    keeps: Sequence[str]
    labels: tuple[tuple[str, str], ...] = ()
    default: bool = True


WINDOWS = ("5m", "30m", "1h", "2h", "6h", "1d", "3d")

_CLIENT = 'outcome="dropped",reason=~"http_exception|validation|revoked|cancel_run"'
_BASE = 'outcome!~"cancelled|offloaded|expired"'


def counted(by: str, function: str, window: str) -> str:
    """PromQL: the runs that service levels count, without those that a client can cause to be dropped at will."""
    return (
        f"(sum by ({by}) ({function}(aftertask_tasks_finished_total{{{_BASE}}}[{window}]))\n"
        f"  - sum by ({by}) ({function}(aftertask_tasks_not_run_total{{{_CLIENT}}}[{window}])))"
    )


def _bad(by: str, function: str, window: str) -> str:
    return f"sum by ({by}) ({function}(aftertask_tasks_bad_total[{window}]))"


def _burns() -> Iterator[Alert]:
    for long, short, factor, wait, severity in BURNS:
        yield Alert(
            name="ErrorBudgetBurn",
            expr=(
                f"job:aftertask_tasks_bad:ratio_rate{long} > {factor:g} * ${{budget}}\n"
                f"and on (job)\njob:aftertask_tasks_bad:ratio_rate{short} > {factor:g} * ${{budget}}\n"
                f"and on (job)\n{_bad('job', 'increase', long)} > ${{min_bad}} - 0.5"
            ),
            wait=wait,
            severity=severity,
            summary="Background tasks use up their error budget",
            description=(
                "{{ $labels.job }}: ${share} of the runs of the last " + long + " ended badly; "
                f"the service level allows ${{budget_percent}} %, and this alerts from {factor:g} times that on."
            ),
            board="overview",
            keeps=("job",),
            labels=(("window", long),),
        )


def alerts() -> tuple[Alert, ...]:
    """
    Every alert.

    Raises:
        ValueError: A query has a metric that aftertask does not emit.
    """
    read: dict[str, list[dict[str, Any]]] = yaml.safe_load(Path(__file__).with_name("alerts.yml").read_text("utf-8"))
    written = [Alert(**each, default=kind == "default") for kind, found in read.items() for each in found]
    every = (*_burns(), *written)
    for alert in every:
        check(alert.expr)
    return every


def duration(seconds: float) -> str:
    """Seconds as Prometheus writes them: in the largest unit that holds them evenly, down to milliseconds."""
    for unit, size in _UNITS.items():
        if seconds >= size and seconds % size == 0:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds * 1000:.0f}ms" if seconds else "0s"


def _numbers(options: Options) -> dict[str, str]:
    limits = options.limits
    numbers = {field.name: f"{getattr(limits, field.name):g}" for field in fields(limits)}
    for name in ("stuck_seconds", "queued_seconds"):
        numbers[name] = f"{getattr(limits, name) * options.scale:g}"
    whole, _, rest = f"{limits.wait_seconds:g}".partition(".")
    return numbers | {
        "count": '{{ $value | printf "%.0f" }}',
        "share": "{{ $value | humanizePercentage }}",
        "budget": f"{1 - limits.objective:g}",
        "budget_percent": f"{(1 - limits.objective) * 100:g}",
        "failing_share_percent": f"{limits.failing_share * 100:g}",
        # The Python client writes le="10.0", Prometheus 3 and others 10.
        "wait_edge": f"{whole}\\\\.{rest}" if rest else f"{whole}(\\\\.0)?",
    }


def _write(query: str, options: Options) -> str:
    """A query with its limits, windows and selector filled in."""
    scaled = _DURATION.sub(lambda found: duration(int(found[1]) * _UNITS[found[2]] * options.scale), query)
    return select(Template(scaled).substitute(_numbers(options)), options.selector)


def _alert(alert: Alert, options: Options) -> dict[str, object]:
    name = f"Aftertask{alert.name}"
    shown = "&".join(f"var-{label}={{{{ $labels.{label} | urlquery }}}}" for label in alert.keeps)
    return {
        "alert": name,
        "expr": _write(alert.expr, options),
        "for": duration(alert.wait * options.scale),
        "labels": {"severity": alert.severity, **dict(alert.labels)},
        "annotations": {
            "summary": alert.summary,
            "description": Template(alert.description).safe_substitute(_numbers(options)),
            "runbook_url": f"{options.runbooks.rstrip('/')}/{alert.name}.md",
            "dashboard_url": f"{options.dashboards.rstrip('/')}/d/aftertask-{alert.board}?{shown}",
        },
    }


def groups(options: Options, *, default: bool) -> dict[str, list[dict[str, object]]]:
    """One file of rules: those that are on by default with what they record, or those behind the switch."""
    written = [_alert(alert, options) for alert in alerts() if alert.default == default]
    if not default:
        return {"groups": [{"name": "aftertask.more", "rules": written}]}
    recorded: list[dict[str, object]] = [
        {
            "record": f"job:aftertask_tasks_bad:ratio_rate{window}",
            "expr": _write(f"{_bad('job', 'rate', window)}\n/\n({counted('job', 'rate', window)} > 0)", options),
        }
        for window in WINDOWS
    ]
    recording: dict[str, object] = {
        "name": "aftertask.recording",
        "interval": duration(30 * options.scale),
        "rules": recorded,
    }
    return {"groups": [recording, {"name": "aftertask.alerts", "rules": written}]}


def to_yaml(document: Mapping[str, object]) -> str:
    """A file of rules as text."""
    head = "Written by `aftertask rules export`, which sets selector, service level, limits and addresses."
    return dump(head, document)
