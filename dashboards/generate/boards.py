"""A whole dashboard: its panels on the grid, with the same variables, links and marks on each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as models

from aftertask.cli._rules import Limits
from drawing import PROMETHEUS, draw
from panels import RED, Board, asked, placed

SLO = f"{Limits().objective:g}"
#: For what one rarely sets: it stays in the dashboard's settings, and in its address as `var-NAME`.
HIDDEN = models.VariableHide.HIDE_VARIABLE


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
    for variable in _variables(board):
        built = built.with_variable(variable)
    number = 0
    for row, top, places in placed(board.rows):
        number += 1
        heading = dashboard.Row(row.title).id(number).grid_pos(models.GridPos(x=0, y=top, w=24, h=1))
        heading = heading.collapsed(row.collapsed)
        panels = []
        for panel, place in places:
            number += 1
            panels.append(draw(panel).id(number).grid_pos(place))
        if row.collapsed:
            for each in panels:
                heading = heading.with_panel(each)
        built = built.with_row(heading)
        if not row.collapsed:
            for each in panels:
                built = built.with_panel(each)
    return json.dumps(_tidy(json.loads(JSONEncoder().encode(built.build()))), indent=1, sort_keys=True) + "\n"


def _variables(board: Board) -> Iterator[Any]:
    where = 'job=~"$job",instance=~"$instance"'
    yield _source("datasource", "Data source", "prometheus")
    yield _labels("job", "Job", "aftertask_build_info")
    yield _labels("instance", "Instance", 'aftertask_build_info{job=~"$job"}')
    # Most apps have one engine, and Grafana cannot hide a variable only while it has one value.
    yield _labels("engine", "Engine", f"aftertask_task_info{{{where}}}").hide(HIDDEN)
    tasks = f'aftertask_task_info{{{where},engine=~"$engine"}}'
    yield _labels("task", "Task", tasks, several=not board.one_task)
    slo = models.VariableOption(selected=True, text=SLO, value=SLO)
    yield dashboard.TextBoxVariable("slo").label("SLO").default_value(SLO).current(slo).options([slo]).hide(HIDDEN)
    yield _source("tempo", "Traces", "tempo").hide(HIDDEN)
    yield _source("loki", "Logs", "loki").hide(HIDDEN)


def _source(name: str, label: str, kind: str) -> dashboard.DatasourceVariable:
    return dashboard.DatasourceVariable(name).label(label).type(kind).regex("").multi(False)


def _labels(name: str, label: str, series: str, *, several: bool = True) -> dashboard.QueryVariable:
    query = f"label_values({series}, {name})"
    built = (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(PROMETHEUS)
        .query({"qryType": 1, "query": query, "refId": "PrometheusVariableQueryEditor-VariableQuery"})
        .definition(query)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(several)
        .include_all(several)
    )
    if several:
        every = models.VariableOption(selected=True, text="All", value="$__all")
        built = built.all_value(".+").current(every)
    return built


def _marks() -> Iterator[dashboard.AnnotationQuery]:
    """When processes began, and when alerts began to fire: moments, since a region would cover every graph."""
    # A process that restarts under the same address has counted back to 0; one under a new address is a new series.
    resets = "sum by (job, instance) (resets(aftertask_tasks_scheduled_total[$__rate_interval]{})) > 0"
    new = "count by (job, instance) (aftertask_build_info unless aftertask_build_info offset $__interval)"
    began = f"({resets.format('')} unless {resets.format(' offset $__interval')}) or {new}"
    firing = 'ALERTS{alertname=~"Aftertask.+",alertstate="firing"}'
    fired = f"{firing} unless {firing} offset $__interval"
    for name, query, colour, title, tags in (
        ("Process starts", began, "purple", "Process start: {{instance}}", "job"),
        ("Alerts", fired, RED, "{{alertname}} {{task}}", "job,instance,task,severity"),
    ):
        mark = dashboard.AnnotationQuery().name(name).datasource(PROMETHEUS).enable(True).icon_color(colour)
        yield mark.expr(asked(query)).step("60s").title_format(title).tag_keys(tags)


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
