"""What the dashboards are made of: queries in panels, in rows, on boards; how each is drawn is in `drawing`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import units

from aftertask.cli._promql import EMITTED

SECONDS, SHARE, COUNT, BYTES = units.Seconds, units.PercentUnit, units.Short, units.BytesIEC
PER_MINUTE = "suffix:/min"
#: Whole numbers, with thousands set apart.
WHOLE = units.LocaleFormat
AGO = units.DateTimeFromNow

GREEN, ORANGE, RED = "green", "orange", "red"

#: The shown time as one window for all of a graph: what was 0 throughout is left out, what is 0 by now is drawn as 0,
#: so that the last value in a legend is the newest.
SHOWN = "[$__range] @ end()"

#: Metrics of others that a panel may ask for: prometheus-client's of the process, Prometheus's of targets and alerts.
FOREIGN = ("process_resident_memory_bytes", "process_cpu_seconds_total", "up", "ALERTS", "ALERTS_FOR_STATE")

_METRIC = re.compile(rf"(?<![\w:])({'|'.join((*EMITTED, *FOREIGN))})(?![\w:])(?:\{{([^}}]*)\}})?")


def asked(query: str) -> str:
    """A query for what the variables select: each metric gets those that it has labels for."""

    def matchers(found: re.Match[str]) -> str:
        name, own = found[1], found[2]
        labels = ["job"] if name.startswith("ALERTS") else ["job", "instance"]
        if name in EMITTED:
            # The variable is about where runs are executed; a hand-over has the engine that it goes to.
            narrow = ("task",) if name.startswith("aftertask_offload_") else ("engine", "task")
            labels += [label for label in narrow if label in EMITTED[name].labels]
        chosen = [f'{label}=~"${label}"' for label in labels]
        if name.startswith("ALERTS"):  # many are of no instance or no task, and then about all
            chosen += [f'{label}=~"|${label}"' for label in ("instance", "task")]
        return f"{name}{{{','.join([*chosen, *([own] if own else [])])}}}"

    return _METRIC.sub(matchers, query)


@dataclass(frozen=True, kw_only=True)
class Ask:
    """
    One query of a panel.

    Attributes:
        query: PromQL without the variables' matchers; TraceQL or LogQL in panels of those.
        legend: What a series is called.
        exemplars: Whether its histogram's traces are shown as dots.
        now: Whether only its newest value counts.
        steps: From which value on a stat has which colour, if it has several values.
    """

    query: str
    legend: str = ""
    exemplars: bool = False
    now: bool = False
    steps: list[tuple[float, str]] = field(default_factory=list)


def quantiles(histogram: str, by: str = "", matchers: str = "", word: str = "") -> list[Ask]:
    """Median, 95th and 99th percentile of a histogram; the dots of its exemplars come with the last."""
    inner = f"sum by ({', '.join(filter(None, ('le', by)))}) (rate({histogram}_bucket{matchers}[$__rate_interval]))"
    legends = [f"p{q:g}" + (f" {word}" if word else "") + (f" {{{{{by}}}}}" if by else "") for q in (50, 95, 99)]
    return [
        # Without runs a quantile is no number, which Grafana lists in the legend.
        Ask(query=f"histogram_quantile({q / 100:g}, {inner}) >= 0", legend=legend, exemplars=q == 99)
        for q, legend in zip((50, 95, 99), legends, strict=True)
    ]


def rising(counter: str, by: str, matchers: str = "", most: int = 0) -> str:
    """PromQL: rates by these labels, of what rose in the shown time; only the highest if `most` is above 0."""
    rose = f"sum by ({by}) (increase({counter}{matchers}{SHOWN})) > 0"
    return f"sum by ({by}) (rate({counter}{matchers}[$__rate_interval])) and {_highest(rose, most)}"


def per_minute(counter: str, by: str, matchers: str = "", most: int = 0) -> str:
    """PromQL: how often a minute, of what happened in the shown time; only the most frequent if `most` is above 0."""
    return f"60 * {rising(counter, by, matchers, most)}"


def used(gauge: str, by: str, most: int = 0) -> str:
    """PromQL: a gauge by these labels, if above 0 in the shown time; only the highest if `most` is above 0."""
    peaks = f"sum by ({by}) (max_over_time({gauge}{SHOWN})) > 0"
    return f"sum by ({by}) ({gauge}) and {_highest(peaks, most)}"


def _highest(series: str, most: int) -> str:
    return f"topk({most}, {series})" if most else series


@dataclass(frozen=True, kw_only=True)
class Column:
    """
    One column of a table.

    Attributes:
        of: The label or value (`Value #A` for the first query) it shows.
        name: Its heading.
        empty: What stands in a cell without a value.
        zero: What stands in a cell for 0, if not 0.
        width: In pixels; None shares what is left.
        steps: The colours of its cells, from which value on; none below the first.
        words: The colours of certain texts.
        cell: Whether the whole cell is coloured, or its text.
    """

    of: str
    name: str
    unit: str = ""
    empty: str = "-"
    zero: str = ""
    width: int | None = None
    steps: list[tuple[float, str]] = field(default_factory=list)
    words: dict[str, str] = field(default_factory=dict)
    cell: bool = False


@dataclass(frozen=True, kw_only=True)
class Panel:
    """
    One panel; it is left out while aftertask emits nothing that it asks for.

    Attributes:
        description: What it shows, and what to do about it.
        empty: What it says where no series has a value.
        bars: Whether each interval is a bar.
        steps: From which value on which colour; the first colour is for everything below.
        lines: Whether the steps are drawn as dashed lines.
        high: The end of the axis, if it has one; that of a stat's trend, too.
        low: Where the axis begins if nothing is below; None for 0, and never more.
        texts: What a stat says instead of a value: from, to, text and colour.
        filled: Whether a stat's colour fills it.
        to_task: Whether a series or a row leads to the task's own dashboard.
        columns: For tables: the columns, in order; every other one is hidden.
        sort_by: The columns that sort the rows: the highest first, texts from A on.
    """

    title: str
    description: str
    asks: list[Ask]
    unit: str = COUNT
    empty: str = "No runs"
    kind: Literal["series", "stat", "table", "heatmap", "logs", "traces"] = "series"
    width: int = 12
    height: int = 10
    stacked: bool = False
    bars: bool = False
    steps: list[tuple[float, str]] = field(default_factory=list)
    first: str = GREEN
    lines: bool = False
    high: float | None = None
    low: float | None = None
    texts: list[tuple[float | None, float | None, str, str]] = field(default_factory=list)
    filled: bool = False
    decimals: int | None = None
    to_task: bool = False
    columns: list[Column] = field(default_factory=list)
    sort_by: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Row:
    """Panels under a heading; stats share its width where there is nothing else."""

    title: str
    panels: list[Panel]
    collapsed: bool = False


@dataclass(frozen=True, kw_only=True)
class Board:
    """One dashboard. Its uid is part of the product: links name it."""

    uid: str
    title: str
    description: str
    rows: list[Row]
    one_task: bool = False


def placed(rows: list[Row]) -> Iterator[tuple[Row, int, list[tuple[Panel, models.GridPos]]]]:
    """Each row with its height on the page, and its panels' places."""
    top = 0
    for row in rows:
        places, x, y, tallest = [], 0, top + 1, 0
        for panel in row.panels:
            width = 24 // len(row.panels) if all(each.kind == "stat" for each in row.panels) else panel.width
            if x + width > 24:
                x, y, tallest = 0, y + tallest, 0
            places.append((panel, models.GridPos(x=x, y=y, w=width, h=panel.height)))
            x, tallest = x + width, max(tallest, panel.height)
        yield row, top, places
        top = top + 1 if row.collapsed else y + tallest
