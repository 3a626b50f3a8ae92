"""The dashboards as files: current, complete, of the right shape, and about what aftertask really emits."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.dashboard import Dashboard
from typer.testing import CliRunner

from aftertask.cli._promql import EMITTED
from aftertask.cli.app import app
from aftertask.events import OUTCOMES
from aftertask.signals import families
from live.grafana import BOARDS, ROOT, panels, properties

FOLDER = ROOT / "dashboards"
#: Of panels and of columns: what a person reads at once, so no operations per second.
PANEL_UNITS = {units.Short, units.PercentUnit, units.Seconds, units.BytesIEC, "suffix:/min"}
COLUMN_UNITS = {units.LocaleFormat, units.PercentUnit, units.Seconds, units.DateTimeFromNow}

#: Emitted by others: prometheus-client of the process, Prometheus of its alerts.
FOREIGN = {"process_resident_memory_bytes", "process_cpu_seconds_total", "up", "ALERTS", "ALERTS_FOR_STATE"}
ALERT_LABELS = {"alertname", "alertstate", "severity", "task"}
TARGET_LABELS = {"job", "instance"}

each_board = pytest.mark.parametrize("name", list(BOARDS))


def of_prometheus(board: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Title, query and target, of every panel on Prometheus."""
    for panel in panels(board):
        if panel["datasource"]["type"] == "prometheus":
            for target in panel["targets"]:
                yield panel["title"], target["expr"], target


def parsed(query: str) -> promql.Expr:
    """A query with something in the place of Grafana's variables."""
    for name, value in (("$__rate_interval", "1m"), ("$__interval", "1m"), ("$__range", "1h"), ("$slo", "0.99")):
        query = query.replace(name, value)
    return promql.parse(query)


def nodes(node: Any) -> Iterator[Any]:
    """A parsed query's parts, from the top down."""
    yield node
    for name in ("lhs", "rhs", "expr", "param", "vector_selector"):
        inner = getattr(node, name, None)
        if inner is not None and not isinstance(inner, str):
            yield from nodes(inner)
    for inner in getattr(node, "args", None) or ():
        yield from nodes(inner)


def selectors(query: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The metrics that a query asks for, with their matchers; of two for one label the first, a variable's."""
    for node in nodes(parsed(query)):
        if isinstance(node, promql.VectorSelector):
            yield str(node.name), {matcher.name: matcher.value for matcher in reversed(node.matchers.matchers)}


def labels_of(metric: str) -> set[str]:
    """The labels that a sample of a metric has."""
    if metric in FOREIGN:
        return TARGET_LABELS | (ALERT_LABELS if metric.startswith("ALERTS") else set())
    return {*EMITTED[metric].labels, *TARGET_LABELS, *(("le",) if metric.endswith("_bucket") else ())}


def test_the_committed_files_are_current(tmp_path: Path) -> None:
    """What is in the repository is what the generator writes; a new metric brings its panels with it."""
    subprocess.run([sys.executable, FOLDER / "generate", tmp_path], check=True, timeout=20)
    fresh = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(fresh) == len(BOARDS) + 2
    for path, text in fresh.items():
        assert (FOLDER / path).read_text() == text, f"dashboards/{path} is not current; run `make dashboards`"


def test_there_are_the_four() -> None:
    """Under uids that never change, since links name them."""
    assert set(BOARDS) == {"aftertask-overview", "aftertask-task", "aftertask-capacity", "aftertask-engine"}
    assert {name: board["uid"] for name, board in BOARDS.items()} == {name: name for name in BOARDS}


@each_board
def test_the_models_of_grafana_know_every_key(name: str) -> None:
    """Nothing is lost through Grafana's own models and back; a key that they do not have would be."""
    register_default_plugins()
    again = json.loads(JSONEncoder().encode(Dashboard.from_json(BOARDS[name])))

    def kept(ours: Any, theirs: Any, path: str) -> None:
        if isinstance(ours, dict):
            assert isinstance(theirs, dict) and set(ours) <= set(theirs), f"{path}: {set(ours) - set(theirs)}"
            for key in ours:
                kept(ours[key], theirs[key], f"{path}.{key}")
        elif isinstance(ours, list):
            assert len(ours) == len(theirs), path
            for number, pair in enumerate(zip(ours, theirs, strict=True)):
                kept(*pair, path=f"{path}[{number}]")
        else:
            assert ours == theirs, path

    kept(BOARDS[name], again, name)


def test_a_key_that_grafana_does_not_know_is_found() -> None:
    """The check above can fail."""
    register_default_plugins()
    board = json.loads(json.dumps(BOARDS["aftertask-overview"]))
    board["panels"][1]["fieldConfig"]["defaults"]["unitt"] = "s"
    again = json.loads(JSONEncoder().encode(Dashboard.from_json(board)))
    assert "unitt" not in again["panels"][1]["fieldConfig"]["defaults"]


@each_board
def test_each_panel_says_what_it_shows_and_what_to_do(name: str) -> None:
    """Title, description of some length, a unit of the list, a query, and words for where there is no value."""
    for panel in panels(BOARDS[name]):
        assert panel["title"] and len(panel["description"]) > 40, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"] in PANEL_UNITS, panel["title"]
        assert set(properties(panel, "unit").values()) <= COLUMN_UNITS, panel["title"]
        assert panel["targets"], panel["title"]
        empty = panel["fieldConfig"]["defaults"]["noValue"]
        assert empty[0].isupper() and len(empty) > 3, panel["title"]
    titles = [panel["title"] for panel in panels(BOARDS[name])]
    assert len(titles) == len(set(titles))


@each_board
def test_panels_are_on_the_grid_and_do_not_overlap(name: str) -> None:
    """24 columns; what is in a folded row is placed below its heading; ids are unique."""
    board = BOARDS[name]
    every = [*board["panels"], *(inner for row in board["panels"] if row["type"] == "row" for inner in row["panels"])]
    assert len({panel["id"] for panel in every}) == len(every)
    taken: dict[tuple[int, int], str] = {}
    for panel in every:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24 and place["w"] > 0 and place["h"] > 0
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, f"{panel['title']} lies over {taken[x, y]}"
                taken[x, y] = panel["title"]


@each_board
def test_no_data_source_is_wired_in(name: str) -> None:
    """Each is a variable without a value, so that the same file can be provisioned, imported and posted."""
    board = BOARDS[name]
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert {each["query"] for each in variables.values() if each["type"] == "datasource"} == {
        "prometheus",
        "tempo",
        "loki",
    }
    assert not any("current" in each for each in variables.values() if each["type"] == "datasource")
    uids = re.findall(r'"datasource": \{[^}]*"uid": "([^"]*)"', (FOLDER / f"{name}.json").read_text())
    assert set(uids) <= {"${datasource}", "${tempo}", "${loki}"} and len(uids) > 20
    assert "__inputs" not in board and "id" not in board


@each_board
def test_variables_come_from_our_own_metrics(name: str) -> None:
    """And are asked for anew with another time range; one task is one task."""
    for variable in BOARDS[name]["templating"]["list"]:
        if variable["type"] == "query":
            metric, label = re.fullmatch(r"label_values\((\w+)(?:\{.*\})?, (\w+)\)", variable["definition"]).groups()  # type: ignore[union-attr]
            assert label in labels_of(metric)
            several = (name, label) != ("aftertask-task", "task")
            assert variable["refresh"] == 2 and variable["multi"] == variable["includeAll"] == several


@each_board
def test_the_boards_lead_to_each_other_with_what_is_selected(name: str) -> None:
    """Variables and time are kept; nothing hides in a menu."""
    (link,) = BOARDS[name]["links"]
    assert link["type"] == "dashboards" and link["includeVars"] and link["keepTime"]
    assert set(link["tags"]) <= set(BOARDS[name]["tags"])
    text = (FOLDER / f"{name}.json").read_text()
    assert "inControlsMenu" not in text
    for uid in re.findall(r'"url": "/d/([^?]+)\?', text):
        assert uid in BOARDS


@each_board
def test_every_query_asks_for_what_we_emit(name: str) -> None:
    """Metrics, matchers and grouping labels exist; the variables restrict each metric that has labels for them."""
    queries = [(title, query) for title, query, _ in of_prometheus(BOARDS[name])]
    queries += [(mark["name"], mark["expr"]) for mark in BOARDS[name]["annotations"]["list"]]
    assert len(queries) > 5
    for title, query in queries:
        available = set()
        for metric, matchers in selectors(query):
            assert metric in EMITTED or metric in FOREIGN, f"{title}: no metric is called {metric}"
            labels = labels_of(metric)
            assert set(matchers) <= labels, f"{title}: {metric} has no label {set(matchers) - labels}"
            shown = {"job"} if metric.startswith("ALERTS") else {"job", "instance", "engine", "task"} & labels
            if metric.startswith("aftertask_offload_"):  # their engine is not the one that the variable chooses
                shown -= {"engine"}
            assert {label: f"${label}" for label in shown}.items() <= matchers.items(), f"{title}: {metric}"
            if metric.startswith("ALERTS"):  # those about all instances or tasks, too
                assert {"instance": "|$instance", "task": "|$task"}.items() <= matchers.items(), title
            available |= labels
        for node in nodes(parsed(query)):
            if isinstance(node, promql.AggregateExpr) and node.modifier is not None:
                assert set(node.modifier.labels) <= available, f"{title}: {node.modifier.labels}"


@each_board
def test_rates_are_taken_of_counters_over_the_right_time(name: str) -> None:
    """`rate` directly of a counter, over `$__rate_interval`; a whole-range increase only for one value."""
    for title, query, target in of_prometheus(BOARDS[name]):
        windows = re.findall(r"\b(rate|increase|resets)\((\w+)\{[^}]*\}\[([^\]]+)\]( @ end\(\))?", query)
        for function, metric, window, at_end in windows:
            family = EMITTED.get(metric)
            assert metric in FOREIGN or (family and family.kind in ("counter", "histogram")), f"{title}: {metric}"
            if window == "$__range":
                assert function == "increase" and (target["instant"] or at_end), title
            elif window != "$__rate_interval":
                assert window in ("5m", "30m", "1h", "6h"), f"{title}: {window}"
        counters = set(re.findall(r"aftertask_\w+_total(?=\{)", query)) - set(
            re.findall(r"(?:rate|increase|resets)\((aftertask_\w+_total)\{", query)
        )
        assert not counters or title == "Accounting drift", f"{title}: {counters} without a rate"
        assert target["range"] != target["instant"]


@each_board
def test_the_legends_show_the_culprit_first(name: str) -> None:
    """Sorted by the last value, with the maximum, in a panel of some height; what was always 0 is not listed."""
    for panel in panels(BOARDS[name]):
        if panel["type"] != "timeseries":
            continue
        options, drawn = panel["options"], panel["fieldConfig"]["defaults"]
        legend = {"calcs": ["lastNotNull", "max"], "sortBy": "Last *", "sortDesc": True, "displayMode": "table"}
        assert legend.items() <= options["legend"].items(), panel["title"]
        assert options["tooltip"] == {"mode": "multi", "sort": "desc", "hideZeros": True}, panel["title"]
        assert drawn["color"] == {"mode": "palette-classic-by-name"}, panel["title"]
        assert 0 < drawn["custom"]["axisSoftMax"] <= 1, panel["title"]
        assert panel["gridPos"]["h"] >= 10, panel["title"]
        for target in panel["targets"]:
            of_many = re.fullmatch(
                r".*\{\{(task|outcome|reason|error_type|channel|status|state)\}\}", target["legendFormat"]
            )
            shown = r" and (topk\(10, )?(sum|max) by \(.*\[\$__range\] @ end\(\)\)\) > 0\)?$"
            assert not of_many or re.search(shown, target["expr"]), panel["title"]
            # A quantile of nothing is no number, which would be listed and drawn as nothing.
            assert "histogram_quantile(" not in target["expr"] or target["expr"].endswith(" >= 0"), panel["title"]


@each_board
def test_a_stack_has_no_lines(name: str) -> None:
    """The line on top would have the colour of the last series, even where that is 0."""
    for panel in panels(BOARDS[name]):
        drawn = panel["fieldConfig"]["defaults"].get("custom", {})
        assert "stacking" not in drawn or drawn["lineWidth"] == 0, panel["title"]


@each_board
def test_a_tile_is_neutral_where_nothing_runs(name: str) -> None:
    """An idle app is not broken; figures are large on wide screens, too; a trend starts at 0."""
    for panel in panels(BOARDS[name]):
        if panel["type"] != "stat":
            continue
        defaults = panel["fieldConfig"]["defaults"]
        special = [each["options"] for each in defaults["mappings"] if each["type"] == "special"]
        neutral = {"match": "null+nan", "result": {"text": defaults["noValue"], "color": "text"}}
        assert special == ([] if panel["options"]["colorMode"] == "background" else [neutral]), panel["title"]
        assert panel["options"]["wideLayout"] is False and defaults["min"] == 0, panel["title"]


@each_board
def test_what_every_job_has_is_asked_of_our_apps_only(name: str) -> None:
    """With all jobs chosen, too: Prometheus scrapes more than ours."""
    for title, query, _ in of_prometheus(BOARDS[name]):
        foreign = {metric for metric, _ in selectors(query)} & (FOREIGN - {"ALERTS", "ALERTS_FOR_STATE"})
        assert not foreign or re.search(r" and on \(job, instance\) .*aftertask_build_info", query), title


@each_board
def test_colours_mean_the_same_everywhere(name: str) -> None:
    """Outcomes, states, quantiles and limits have theirs; what is in flight is neither good nor bad."""
    found: dict[str, set[str]] = {}
    for panel in panels(BOARDS[name]):
        if panel["type"] != "timeseries":
            continue
        colours = {key: value["fixedColor"] for key, value in properties(panel, "color").items()}
        for target in panel["targets"]:
            legend = target["legendFormat"]
            if legend == "{{outcome}}":
                assert set(colours) >= set(OUTCOMES), panel["title"]
                assert len(set(colours.values())) == len(colours), panel["title"]
                assert colours["succeeded"] == "green" and colours["failed"] == "red"
            elif legend == "{{state}}":
                assert set(colours) >= set(families.STATES), panel["title"]
                assert not {"green", "red", "orange"} & set(colours.values()), panel["title"]
            elif legend.startswith("p") or legend in ("SLO", "timeout"):
                found.setdefault(legend, set()).add(colours[legend])
            if legend in ("SLO", "timeout"):
                assert properties(panel, "custom.lineStyle")[legend]["fill"] == "dash"
                assert properties(panel, "custom.fillOpacity")[legend] == 0
            if legend == "{{task}}":
                assert properties(panel, "displayName") == {"__none__": "no task"}, panel["title"]
    assert all(len(colours) == 1 for colours in found.values()), found


@each_board
def test_titles_are_plain_and_short(name: str) -> None:
    """A tile's fits at 1600 pixels, six in a row; no title has a code word."""
    for panel in panels(BOARDS[name]):
        assert len(panel["title"]) <= (20 if panel["type"] == "stat" else 32), panel["title"]
        assert ("__" not in panel["title"] and panel["title"][0].isupper()) or panel["title"].startswith("aftertask")
    top = [panel for panel in BOARDS["aftertask-overview"]["panels"] if panel["gridPos"]["y"] == 1]
    assert [panel["type"] for panel in top] == ["stat"] * 6
    assert all(target["range"] for panel in top for target in panel["targets"])


def test_alerts_have_the_colour_of_their_severity() -> None:
    """Red is for what cannot wait: a warning alone is orange."""
    (tile,) = [panel for panel in panels(BOARDS["aftertask-overview"]) if panel["title"] == "Alerts firing"]
    assert [target["legendFormat"] for target in tile["targets"]] == ["critical", "warning"]
    for target in tile["targets"]:
        severity = target["legendFormat"]
        assert {matchers["severity"] for _, matchers in selectors(target["expr"])} == {severity}
        steps = properties(tile, "thresholds")[severity]["steps"]
        wanted = {"critical": "red", "warning": "orange"}[severity]
        assert [(step["value"], step["color"]) for step in steps] == [(None, "green"), (1, wanted)]


@each_board
def test_marks_are_moments_of_what_their_query_has(name: str) -> None:
    """Only where a thing begins, since a region covers every graph; each label of a mark's text is in its query."""
    marks = {mark["name"]: mark for mark in BOARDS[name]["annotations"]["list"]}
    assert set(marks) == {"Process starts", "Alerts"}
    for mark in marks.values():
        assert " unless " in mark["expr"] and "offset $__interval" in mark["expr"], mark["name"]
        named = {*re.findall(r"\{\{(\w+)\}\}", mark["titleFormat"]), *mark["tagKeys"].split(",")}
        metrics = {metric for metric, _ in selectors(mark["expr"])}
        groups = [
            set(node.modifier.labels)
            for node in nodes(parsed(mark["expr"]))
            if isinstance(node, promql.AggregateExpr) and node.modifier is not None
        ]
        available = set.intersection(*(groups or [labels_of(metric) for metric in metrics]))
        assert named <= available, mark["name"]
    assert {"alertname", "task", "instance", "severity"} <= {
        *re.findall(r"\w+", marks["Alerts"]["titleFormat"] + "," + marks["Alerts"]["tagKeys"])
    }


@each_board
def test_a_table_has_whole_names_and_no_filters(name: str) -> None:
    """Counts have no decimals, an empty cell says so, and rows of several jobs are not merged."""
    for panel in panels(BOARDS[name]):
        if panel["type"] != "table" or panel["datasource"]["type"] != "prometheus":
            continue
        assert panel["fieldConfig"]["defaults"]["custom"]["filterable"] is False
        renamed = panel["transformations"][1]["options"]["renameByName"]
        assert set(properties(panel, "noValue")) == set(renamed.values()), panel["title"]
        assert renamed["job"] == "Job", panel["title"]
        assert all("job" in target["expr"].split("by (")[1].split(")")[0] for target in panel["targets"]), panel[
            "title"
        ]
        # On a screen of 1280 pixels, without its margins.
        widths, rest = properties(panel, "custom.width"), panel["fieldConfig"]["defaults"]["custom"]["minWidth"]
        assert rest >= 95, f"{panel['title']}: an owner or a job would be cut"
        needed = sum(widths.get(column, rest) for column in renamed.values())
        assert needed <= 1232 * panel["gridPos"]["w"] / 24, f"{panel['title']}: {needed} pixels"
        for column, unit in properties(panel, "unit").items():
            assert unit != units.LocaleFormat or properties(panel, "decimals")[column] == 0, column


@each_board
def test_what_is_rarely_set_is_hidden(name: str) -> None:
    """SLO, traces, logs, and the engine as long as there is one; the SLO has a value also without a choice."""
    variables = {variable["name"]: variable for variable in BOARDS[name]["templating"]["list"]}
    hidden = {key for key, variable in variables.items() if variable.get("hide") == 2}
    assert hidden == {"slo", "tempo", "loki", "engine"}
    assert variables["slo"]["current"] == variables["slo"]["options"][0]
    assert variables["slo"]["current"]["value"] == variables["slo"]["query"] == "0.99"


def test_runbooks_name_panels_that_exist() -> None:
    """What stands in italics is the title of a panel, or what Prometheus calls a page."""
    titles = {panel["title"] for board in BOARDS.values() for panel in panels(board)} | {"Status → Targets"}
    for page in sorted((FOLDER / "runbooks").glob("*.md")):
        named = set(re.findall(r"(?<!\*)\*([A-Z][^*]*)\*(?!\*)", page.read_text()))
        assert {" ".join(each.split()) for each in named} <= titles, page.name


def test_every_metric_that_we_tell_is_shown() -> None:
    """On some panel of some dashboard."""
    asked = {
        metric for board in BOARDS.values() for _, query, _ in of_prometheus(board) for metric, _ in selectors(query)
    }
    shown = {EMITTED[metric] for metric in asked if metric in EMITTED}
    assert not [family.name for family in families.FAMILIES if family not in shown]


def test_the_histograms_with_exemplars_show_them() -> None:
    """On every panel of their quantiles, and on the heat map."""
    carriers = "queue_wait_seconds|attempt_duration_seconds|end_to_end_seconds"
    found = set()
    for board in BOARDS.values():
        for panel in panels(board):
            if panel["type"] not in ("timeseries", "heatmap") or panel["title"] == "Waited longer than":
                continue
            targets = [each for each in panel["targets"] if re.search(rf"aftertask_({carriers})_bucket", each["expr"])]
            if targets:
                assert any(each["exemplar"] for each in targets), panel["title"]
                found |= set(re.findall(carriers, targets[0]["expr"]))
    assert found == set(carriers.split("|"))


def test_they_are_exported(tmp_path: Path) -> None:
    """Byte for byte."""
    done = CliRunner().invoke(app, ["dashboards", "export", str(tmp_path / "new")])
    assert done.exit_code == 0, done.output
    for name in BOARDS:
        assert (tmp_path / "new" / f"{name}.json").read_bytes() == (FOLDER / f"{name}.json").read_bytes()
    assert done.output.splitlines() == [str(tmp_path / "new" / f"{name}.json") for name in sorted(BOARDS)]


@pytest.mark.timeout(60)
def test_a_wheel_carries_them_and_its_command_finds_them(tmp_path: Path) -> None:
    """All that the checkout has, and the command works from the unpacked wheel alone."""
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    assert (unpacked / "aftertask_pytest.py").exists()  # pytest loads it in every environment with the wheel
    code = f"import sys; sys.path.insert(0, {str(unpacked)!r}); from aftertask.cli import main; main()"
    for kind in ("dashboards", "rules"):
        target = tmp_path / kind
        done = subprocess.run([sys.executable, "-c", code, kind, "export", target], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "dashboards").iterdir()} == {f"{name}.json" for name in BOARDS}
    pages = {path.name for path in (FOLDER / "runbooks").iterdir()}
    assert {path.name for path in (tmp_path / "rules" / "runbooks").iterdir()} == pages
    carried = {path.relative_to(unpacked / "aftertask" / "_dashboards") for path in unpacked.rglob("_dashboards/**/*")}
    assert not [path for path in carried if path.suffix == ".py"]
