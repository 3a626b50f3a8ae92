"""How each kind of panel is drawn: built with Grafana's SDK."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

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
from grafana_foundation_sdk.models.prometheus import PromQueryFormat as FORMAT

from colours import by_name, endings, overrides
from panels import BYTES, COUNT, PER_MINUTE, SECONDS, SHARE, WHOLE, Column, Panel, asked

PROMETHEUS = kinds.DataSourceRef(type_val="prometheus", uid="${datasource}")
TEMPO = kinds.DataSourceRef(type_val="tempo", uid="${tempo}")
LOKI = kinds.DataSourceRef(type_val="loki", uid="${loki}")

LETTERS = "ABCDEFGHIJKLMNOP"

#: Where the axis ends at least, so that nothing but zeros is not drawn on a scale to 100.
SOFT_MAX = {COUNT: 1, PER_MINUTE: 1, SECONDS: 0.01, SHARE: 0.1, BYTES: 1}


def draw(panel: Panel) -> Any:
    """The panel's builder, with its queries."""
    make: dict[str, Callable[[Panel], Any]] = {
        "series": _series,
        "stat": _stat,
        "table": _table,
        "heatmap": _heatmap,
        "logs": _logs,
        "traces": _traces,
    }
    built = make[panel.kind](panel).title(panel.title).description(panel.description).unit(panel.unit)
    built = built.no_value(panel.empty)
    if panel.kind in ("logs", "traces"):
        return built
    for letter, ask in zip(LETTERS, panel.asks, strict=False):
        target = prometheus.Dataquery().ref_id(letter).datasource(PROMETHEUS).expr(asked(ask.query))
        target = target.legend_format(ask.legend or "__auto").exemplar(ask.exemplars)
        target = target.instant() if ask.now else target.range()
        if panel.kind == "table":
            target = target.format(FORMAT.TABLE)
        elif panel.kind == "heatmap":
            target = target.format(FORMAT.HEATMAP)
        built = built.with_target(target)
    return built.datasource(PROMETHEUS)


def _thresholds(panel: Panel, own: Sequence[tuple[float, str]] = ()) -> dashboard.ThresholdsConfig:
    steps = [models.Threshold(value=None, color=panel.first)]
    steps += [models.Threshold(value=value, color=colour) for value, colour in own or panel.steps]
    return dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps)


def _series(panel: Panel) -> timeseries.Panel:
    built = (
        timeseries.Panel()
        .color_scheme(by_name())
        .draw_style(kinds.GraphDrawStyle.BARS if panel.bars else kinds.GraphDrawStyle.LINE)
        # A line on a stack would be that of its topmost series, also where this is 0.
        .line_width(0 if panel.bars or panel.stacked else 1)
        .fill_opacity(80 if panel.bars else 60 if panel.stacked else 8)
        .show_points(kinds.VisibilityMode.AUTO)
        .axis_soft_max(SOFT_MAX[panel.unit])
        .thresholds(_thresholds(panel))
        .legend(
            common.VizLegendOptions()
            .display_mode(kinds.LegendDisplayMode.TABLE)
            .placement(kinds.LegendPlacement.BOTTOM)
            .calcs(["lastNotNull", "max"])
            .sort_by("Last *")
            .sort_desc(True)
            .show_legend(True)
        )
        .tooltip(
            common.VizTooltipOptions()
            .mode(kinds.TooltipDisplayMode.MULTI)
            .sort(kinds.SortOrder.DESCENDING)
            .hide_zeros(True)
        )
    )
    if panel.stacked:
        built = built.stacking(common.StackingConfig().mode(kinds.StackingMode.NORMAL).group("A"))
    if panel.lines:
        built = built.thresholds_style(common.GraphThresholdsStyleConfig().mode(kinds.GraphThresholdsStyleMode.DASHED))
    if panel.high is not None:
        built = built.max(panel.high)
    built = built.min(0) if panel.low is None else built.axis_soft_min(panel.low)
    if panel.to_task:
        built = built.data_links([_to_task("${job:queryparam}", "${__field.labels.task}")])
    for name, properties in overrides([ask.legend for ask in panel.asks]):
        built = built.override_by_name(name, properties)
    for pattern, properties in endings([ask.legend for ask in panel.asks]):
        built = built.override_by_regexp(pattern, properties)
    return built


def _to_task(job: str, name: str) -> dashboard.DashboardLink:
    link = dashboard.DashboardLink("The task's own dashboard").type(models.DashboardLinkType.LINK)
    shown = f"${{datasource:queryparam}}&{job}&${{instance:queryparam}}&${{engine:queryparam}}"
    return link.url(f"/d/aftertask-task?{shown}&var-task={name}&${{__url_time_range}}").target_blank(False)


def _stat(panel: Panel) -> stat.Panel:
    built = (
        stat.Panel()
        .thresholds(_thresholds(panel))
        .color_mode(kinds.BigValueColorMode.BACKGROUND if panel.filled else kinds.BigValueColorMode.VALUE)
        .graph_mode(kinds.BigValueGraphMode.NONE if panel.asks[0].now else kinds.BigValueGraphMode.AREA)
        # The wide layout, which Grafana takes for tiles of a wide screen, has small figures.
        .wide_layout(False)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
        .min(0)
    )
    if panel.decimals is not None:
        built = built.decimals(panel.decimals)
    if panel.high is not None:
        built = built.max(panel.high)
    for ask in panel.asks:
        if ask.steps:
            steps = models.DynamicConfigValue(id_val="thresholds", value=_thresholds(panel, ask.steps).build())
            built = built.override_by_name(ask.legend, [steps])
    mappings: list[Any] = [_text(*each) for each in panel.texts]
    if not panel.filled:
        # Nothing to measure is neither good nor bad.
        neutral = models.ValueMappingResult(text=panel.empty, color="text")
        nothing = models.DashboardSpecialValueMapOptions(match=models.SpecialValueMatch.NULL_AND_NAN, result=neutral)
        mappings.append(models.SpecialValueMap(options=nothing))
    return built.mappings(mappings)


def _text(low: float | None, high: float | None, text: str, colour: str) -> models.RangeMap:
    result = models.ValueMappingResult(text=text, color=colour)
    return models.RangeMap(options=models.DashboardRangeMapOptions(from_val=low, to=high, result=result))


def _table(panel: Panel) -> table.Panel:
    hidden = ["Time", *(f"Value #{letter}" for letter, _ in zip(LETTERS, panel.asks, strict=False))]
    hidden += ["Value"] * (len(panel.asks) == 1)
    built = (
        table.Panel()
        .show_header(True)
        .filterable(False)
        .min_width(95)
        .thresholds(_thresholds(panel))
        .with_transformation(models.DataTransformerConfig(id_val="merge", options={}))
        .with_transformation(
            models.DataTransformerConfig(
                id_val="organize",
                options={
                    "excludeByName": {
                        name: True for name in hidden if name not in {column.of for column in panel.columns}
                    },
                    "indexByName": {column.of: place for place, column in enumerate(panel.columns)},
                    "renameByName": {column.of: column.name for column in panel.columns},
                },
            )
        )
    )
    for column in panel.columns:
        properties = {name: value for name, value in _column(column).items() if value is not None}
        if panel.to_task and column.name == "Task":
            link = json.loads(
                JSONEncoder().encode(_to_task("var-job=${__data.fields.Job}", "${__data.fields.Task}").build())
            )
            properties["links"] = [{"title": link["title"], "url": link["url"]}]
        values = [models.DynamicConfigValue(id_val=name, value=value) for name, value in properties.items()]
        built = built.override_by_name(column.name, values)
    if panel.sort_by:
        texts = {column.name for column in panel.columns if not column.unit}
        built = built.sort_by(
            [common.TableSortByFieldState().display_name(name).desc(name not in texts) for name in panel.sort_by]
        )
    return built


def _column(column: Column) -> dict[str, Any]:
    """The properties of a column."""
    found: dict[str, Any] = {
        "noValue": column.empty,
        "unit": column.unit or None,
        "decimals": {WHOLE: 0, SHARE: 1, SECONDS: 1}.get(column.unit),
        "custom.width": column.width,
        "custom.wrapHeaderText": True if column.width and " " in column.name else None,
    }
    if column.steps or column.words:
        style = {"type": "color-background", "mode": "basic"} if column.cell else {"type": "color-text"}
        found["custom.cellOptions"] = style
    if column.steps:
        steps: list[dict[str, Any]] = [{"color": "transparent" if column.cell else "text", "value": None}]
        steps += [{"color": colour, "value": value} for value, colour in column.steps]
        found["thresholds"] = {"mode": "absolute", "steps": steps}
    if column.zero:
        found["mappings"] = [{"type": "value", "options": {"0": {"text": column.zero, "index": 0}}}]
    if column.words:
        options = {word: {"color": colour, "index": at} for at, (word, colour) in enumerate(column.words.items())}
        found["mappings"] = [{"type": "value", "options": options}]
    return found


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
        .cell_values(heatmap.CellValues().unit(COUNT).decimals(0))
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
