"""What the dashboards are made of: panels over queries, in rows, with the same variables, links and marks on each."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from grafana_foundation_sdk.builders import (
    common,
    dashboard,
    heatmap,
    logs,
    loki,
    prometheus,
    stat,
    table,
    tempo,
    timeseries,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as kinds
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import heatmap as heat
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.prometheus import PromQueryFormat as FORMAT

from aftertask.cli._promql import EMITTED, is_emitted
from aftertask.cli._rules import Limits

PROMETHEUS = kinds.DataSourceRef(type_val="prometheus", uid="${datasource}")
TEMPO = kinds.DataSourceRef(type_val="tempo", uid="${tempo}")
LOKI = kinds.DataSourceRef(type_val="loki", uid="${loki}")

SECONDS, SHARE, COUNT, RATE, BYTES = units.Seconds, units.PercentUnit, units.Short, units.OpsPerSecond, units.BytesIEC
GREEN, ORANGE, RED = "green", "orange", "red"

#: Metrics of others that a panel may ask for: prometheus-client's own of the process, and Prometheus's of its alerts.
FOREIGN = ("process_resident_memory_bytes", "process_cpu_seconds_total", "ALERTS")

SLO = Limits().objective
_SHOWN = "&".join(("${datasource:queryparam}", "${job:queryparam}", "${instance:queryparam}", "${engine:queryparam}"))
_METRIC = re.compile(rf"(?<![\w:])({'|'.join((*EMITTED, *FOREIGN))})(?![\w:])(?:\{{([^}}]*)\}})?")


def asked(query: str) -> str:
    """A query for what the variables select: each metric gets those that it has labels for."""

    def matchers(found: re.Match[str]) -> str:
        name, own = found[1], found[2]
        labels = ["job"] if name == "ALERTS" else ["job", "instance"]
        if name in EMITTED:
            labels += [label for label in ("engine", "task") if label in EMITTED[name].labels]
        chosen = [f'{label}=~"${label}"' for label in labels]
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
    """

    query: str
    legend: str = ""
    exemplars: bool = False
    now: bool = False


def quantiles(histogram: str, by: str = "", matchers: str = "", word: str = "") -> list[Ask]:
    """Median, 95th and 99th percentile of a histogram; the dots of its exemplars come with the last."""
    inner = f"sum by ({', '.join(filter(None, ('le', by)))}) (rate({histogram}_bucket{matchers}[$__rate_interval]))"
    legends = [f"p{q:g}" + (f" {word}" if word else "") + (f" {{{{{by}}}}}" if by else "") for q in (50, 95, 99)]
    return [
        Ask(query=f"histogram_quantile({q / 100:g}, {inner})", legend=legend, exemplars=q == 99)
        for q, legend in zip((50, 95, 99), legends, strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """
    One panel; it is left out while aftertask emits nothing that it asks for.

    Attributes:
        description: What it shows, and what to do about it.
        steps: From which value on which colour; the first colour is for everything below.
        lines: Whether the steps are drawn as dashed lines.
        to_task: Whether a click on a series leads to the task's own dashboard.
        columns: For tables: what becomes of each column, in order; None hides it, a text names it anew.
        column_units: For tables: a column's unit, by its new name.
    """

    title: str
    description: str
    asks: list[Ask]
    unit: str = COUNT
    kind: Literal["series", "stat", "table", "heatmap", "logs", "traces"] = "series"
    width: int = 12
    height: int = 8
    stacked: bool = False
    steps: list[tuple[float, str]] = field(default_factory=list)
    first: str = GREEN
    lines: bool = False
    high: float | None = None
    to_task: bool = False
    columns: dict[str, str | None] = field(default_factory=dict)
    column_units: dict[str, str] = field(default_factory=dict)
    sort_by: str = ""

    @property
    def answerable(self) -> list[Ask]:
        """The queries that can have an answer."""
        return self.asks if self.kind in ("logs", "traces") else [ask for ask in self.asks if is_emitted(ask.query)]


@dataclass(frozen=True, kw_only=True)
class Row:
    """Panels under a heading; stats share its width."""

    title: str
    panels: list[Panel]
    collapsed: bool = False
    repeat: str = ""


@dataclass(frozen=True, kw_only=True)
class Board:
    """One dashboard. Its uid is part of the product: links name it."""

    uid: str
    title: str
    description: str
    rows: list[Row]


def placed(rows: list[Row]) -> Iterator[tuple[Row, int, list[tuple[Panel, models.GridPos]]]]:
    """Each row with its height on the page, and its panels' places."""
    top = 0
    for row in rows:
        panels = [panel for panel in row.panels if panel.answerable]
        if not panels:
            continue
        places, x, y, tallest = [], 0, top + 1, 0
        for panel in panels:
            width = 24 // len(panels) if all(each.kind == "stat" for each in panels) else panel.width
            if x + width > 24:
                x, y, tallest = 0, y + tallest, 0
            places.append((panel, models.GridPos(x=x, y=y, w=width, h=panel.height)))
            x, tallest = x + width, max(tallest, panel.height)
        yield row, top, places
        top = top + 1 if row.collapsed else y + tallest


def build(board: Board) -> str:
    """The dashboard as Grafana reads it."""
    built = (
        dashboard.Dashboard(board.title)
        .uid(board.uid)
        .tags(["aftertask"])
        .description(f"{board.description} Generated: `make dashboards`.")
        .editable()
        .timezone("browser")
        .time("now-1h", "now")
        .refresh("30s")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .link(
            dashboard.DashboardLink("aftertask")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags(["aftertask"])
            .include_vars(True)
            .keep_time(True)
        )
    )
    for mark in _marks():
        built = built.annotation(mark)
    for variable in _variables():
        built = built.with_variable(variable)
    number = 0
    for row, top, places in placed(board.rows):
        number += 1
        heading = dashboard.Row(row.title).id(number).grid_pos(models.GridPos(x=0, y=top, w=24, h=1))
        heading = heading.collapsed(row.collapsed)
        if row.repeat:
            heading = heading.repeat(row.repeat)
        panels = []
        for panel, place in places:
            number += 1
            panels.append(_panel(panel).id(number).grid_pos(place))
        if row.collapsed:
            for each in panels:
                heading = heading.with_panel(each)
        built = built.with_row(heading)
        if not row.collapsed:
            for each in panels:
                built = built.with_panel(each)
    return json.dumps(_tidy(json.loads(JSONEncoder().encode(built.build()))), indent=1, sort_keys=True) + "\n"


def _variables() -> Iterator[Any]:
    def source(name: str, label: str, kind: str) -> dashboard.DatasourceVariable:
        return dashboard.DatasourceVariable(name).label(label).type(kind).regex("").multi(False)

    def labels(name: str, label: str, query: str) -> dashboard.QueryVariable:
        query = f"label_values({query}, {name})"
        return (
            dashboard.QueryVariable(name)
            .label(label)
            .datasource(PROMETHEUS)
            .query({"qryType": 1, "query": query, "refId": "PrometheusVariableQueryEditor-VariableQuery"})
            .definition(query)
            .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(models.VariableSort.ALPHABETICAL_ASC)
            .multi(True)
            .include_all(True)
            .all_value(".+")
            .current(models.VariableOption(selected=True, text="All", value="$__all"))
        )

    where = 'job=~"$job",instance=~"$instance"'
    yield source("datasource", "Data source", "prometheus")
    yield labels("job", "Job", "aftertask_build_info")
    yield labels("instance", "Instance", 'aftertask_build_info{job=~"$job"}')
    yield labels("engine", "Engine", f"aftertask_task_info{{{where}}}")
    yield labels("task", "Task", f'aftertask_task_info{{{where},engine=~"$engine"}}')
    yield dashboard.TextBoxVariable("slo").label("Service level").default_value(f"{SLO:g}")
    yield source("tempo", "Traces", "tempo")
    yield source("loki", "Logs", "loki")


def _marks() -> Iterator[dashboard.AnnotationQuery]:
    """Where processes began, and where alerts fired."""
    # A process that restarts under the same address has counted back to 0; one under a new address is a new series.
    began = asked(
        "sum by (job, instance) (resets(aftertask_tasks_scheduled_total[2m])) > 0 or "
        "count by (job, instance) (aftertask_build_info unless aftertask_build_info offset 2m)"
    )
    fired = asked('ALERTS{alertname=~"Aftertask.+",alertstate="firing"}')
    for name, query, colour, title in (
        ("Process starts", began, "purple", "started: {{instance}}"),
        ("Alerts", fired, RED, "{{alertname}} {{task}}"),
    ):
        mark = dashboard.AnnotationQuery().name(name).datasource(PROMETHEUS).enable(True).icon_color(colour)
        yield mark.expr(query).step("60s").title_format(title)


def _panel(panel: Panel) -> Any:
    make: dict[str, Callable[[Panel], Any]] = {
        "series": _series,
        "stat": _stat,
        "table": _table,
        "heatmap": _heatmap,
        "logs": _logs,
        "traces": _traces,
    }
    built = make[panel.kind](panel).title(panel.title).description(panel.description).unit(panel.unit)
    if panel.kind in ("logs", "traces"):
        return built
    for letter, ask in zip("ABCDEFGHIJKLMNOP", panel.answerable, strict=False):
        target = prometheus.Dataquery().ref_id(letter).datasource(PROMETHEUS).expr(asked(ask.query))
        target = target.legend_format(ask.legend or "__auto").exemplar(ask.exemplars)
        target = target.instant() if ask.now else target.range()
        if panel.kind == "table":
            target = target.format(FORMAT.TABLE)
        elif panel.kind == "heatmap":
            target = target.format(FORMAT.HEATMAP)
        built = built.with_target(target)
    return built.datasource(PROMETHEUS)


def _thresholds(panel: Panel) -> dashboard.ThresholdsConfig:
    steps = [models.Threshold(value=None, color=panel.first)]
    steps += [models.Threshold(value=value, color=colour) for value, colour in panel.steps]
    return dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps)


def _series(panel: Panel) -> timeseries.Panel:
    built = (
        timeseries.Panel()
        .draw_style(kinds.GraphDrawStyle.LINE)
        .line_width(1)
        .fill_opacity(30 if panel.stacked else 8)
        .show_points(kinds.VisibilityMode.NEVER)
        .min(0)
        .thresholds(_thresholds(panel))
        .legend(
            common.VizLegendOptions()
            .display_mode(kinds.LegendDisplayMode.TABLE)
            .placement(kinds.LegendPlacement.BOTTOM)
            .calcs(["mean", "max", "lastNotNull"])
            .show_legend(True)
        )
        .tooltip(common.VizTooltipOptions().mode(kinds.TooltipDisplayMode.MULTI).sort(kinds.SortOrder.DESCENDING))
    )
    if panel.stacked:
        built = built.stacking(common.StackingConfig().mode(kinds.StackingMode.NORMAL).group("A"))
    if panel.lines:
        built = built.thresholds_style(common.GraphThresholdsStyleConfig().mode(kinds.GraphThresholdsStyleMode.DASHED))
    if panel.high is not None:
        built = built.max(panel.high)
    if panel.to_task:
        built = built.data_links([_to_task("${__field.labels.task}")])
    return built


def _to_task(name: str) -> dashboard.DashboardLink:
    link = dashboard.DashboardLink("The task's own dashboard").type(models.DashboardLinkType.LINK)
    return link.url(f"/d/aftertask-task?{_SHOWN}&var-task={name}&${{__url_time_range}}").target_blank(False)


def _stat(panel: Panel) -> stat.Panel:
    return (
        stat.Panel()
        .thresholds(_thresholds(panel))
        .color_mode(kinds.BigValueColorMode.VALUE)
        .graph_mode(kinds.BigValueGraphMode.AREA)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
    )


def _table(panel: Panel) -> table.Panel:
    built = (
        table.Panel()
        .show_header(True)
        .filterable(True)
        .thresholds(_thresholds(panel))
        .with_transformation(models.DataTransformerConfig(id_val="merge", options={}))
        .with_transformation(
            models.DataTransformerConfig(
                id_val="organize",
                options={
                    "excludeByName": {name: True for name, new in panel.columns.items() if new is None},
                    "indexByName": {name: place for place, name in enumerate(panel.columns)},
                    "renameByName": {name: new for name, new in panel.columns.items() if new},
                },
            )
        )
    )
    for name, unit in panel.column_units.items():
        built = built.override_by_name(name, [models.DynamicConfigValue(id_val="unit", value=unit)])
    if panel.to_task:
        link = json.loads(JSONEncoder().encode(_to_task("${__data.fields.Task}").build()))
        links = [{"title": link["title"], "url": link["url"]}]
        built = built.override_by_name("Task", [models.DynamicConfigValue(id_val="links", value=links)])
    if panel.sort_by:
        built = built.sort_by([common.TableSortByFieldState().display_name(panel.sort_by).desc(True)])
    return built


def _heatmap(panel: Panel) -> heatmap.Panel:
    return (
        heatmap.Panel()
        .calculate(False)
        .thresholds(_thresholds(panel))
        .color(
            heatmap.HeatmapColorOptions()
            .mode(heat.HeatmapColorMode.SCHEME)
            .scheme("Oranges")
            .fill("dark-orange")
            .exponent(0.5)
            .steps(64)
            .reverse(False)
        )
        .y_axis(heatmap.YAxisConfig().unit(panel.unit).axis_placement(kinds.AxisPlacement.LEFT))
        .exemplars_color("rgba(255,255,255,0.9)")
        .show_legend()
    )


def _logs(panel: Panel) -> logs.Panel:
    return (
        logs.Panel()
        .datasource(LOKI)
        .show_time(True)
        .wrap_log_message(True)
        .enable_log_details(True)
        .sort_order(kinds.LogsSortOrder.DESCENDING)
        .with_target(loki.Dataquery().ref_id("A").datasource(LOKI).expr(panel.asks[0].query).query_type("range"))
    )


def _traces(panel: Panel) -> table.Panel:
    target = tempo.Dataquery().ref_id("A").datasource(TEMPO).query(panel.asks[0].query).query_type("traceql")
    return table.Panel().datasource(TEMPO).show_header(True).with_target(target.limit(20))


def _tidy(node: Any) -> Any:
    """
    Undo what the classic models of the SDK 0.0.21 write and we do not want.

    Every link and annotation gets `placement: inControlsMenu`, which hides it in a menu, and a link to dashboards
    wholly; every variable the keys of an interval; every panel the direction of a repetition.
    """
    if isinstance(node, list):
        return [_tidy(item) for item in node]
    if not isinstance(node, dict):
        return node
    drop = set()
    if node.get("placement") == "inControlsMenu":
        drop.add("placement")
    if "skipUrlSync" in node and node.get("type") != "interval":
        drop |= {"auto", "auto_count", "auto_min"}
    if "repeatDirection" in node and "repeat" not in node:
        drop.add("repeatDirection")
    return {key: _tidy(value) for key, value in node.items() if key not in drop}
