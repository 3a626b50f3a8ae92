"""The alert rules: valid, silent for a healthy and an idle app, firing for each fault, and over when it is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from aftertask.cli import _promql, _rules
from aftertask.cli.app import app
from aftertask.cli.rules import FILES
from aftertask.signals import families

#: promtool counts through days of samples.
pytestmark = pytest.mark.timeout(180)

ROOT = Path(__file__).parents[2]
RUNBOOKS = ROOT / "dashboards" / "runbooks"
T = 'job="api",instance="a",task="mail",engine="local"'
I = 'job="api",instance="a"'  # noqa: E741 - as short as T
OUTCOMES = ("succeeded", "failed", "timed_out", "cancelled", "skipped", "dropped", "rejected", "expired", "lost")


def program(name: str) -> str:
    """Prometheus's own tool; its absence is a failure where servers are required, else a skip."""
    if (path := shutil.which(name)) is None:
        word = f"no {name} here; it comes with Debian's packages prometheus and prometheus-alertmanager"
        if os.environ.get("AFTERTASK_TEST_REQUIRE_SERVERS"):
            pytest.fail(word)
        pytest.skip(word)
    return path


def aftertask(*arguments: str | Path) -> Result:
    """The command, in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def life(minutes: int, **over: str) -> dict[str, str]:
    """
    A task's series for a number of minutes: ten good runs a minute, none in flight for longer.

    Args:
        over: Other values for the series whose key is the given word.
    """
    flow = f"0+10x{minutes}"
    flat = f"0x{minutes}"
    series = {f'aftertask_tasks_finished_total{{{T},outcome="{outcome}"}}': (outcome, flat) for outcome in OUTCOMES}
    series[f'aftertask_tasks_finished_total{{{T},outcome="succeeded"}}'] = ("succeeded", flow)
    for outcome, reason in families.NOT_RUN_REASONS:
        name = f'aftertask_tasks_not_run_total{{{I},task="mail",outcome="{outcome}",reason="{reason}"}}'
        series[name] = (f"not_run_{reason}", flat)
    series |= {
        f"aftertask_tasks_bad_total{{{T}}}": ("bad", flat),
        f"aftertask_retries_total{{{T}}}": ("retries", flat),
        f'aftertask_attempt_duration_seconds_count{{{T},result="ok"}}': ("attempts", flow),
        f'aftertask_tasks_inflight{{{T},state="queued"}}': ("queued", flat),
        f"aftertask_queue_wait_seconds_count{{{T}}}": ("starts", flow),
        f'aftertask_queue_wait_seconds_bucket{{{T},le="10.0"}}': ("quick_starts", flow),
        f"aftertask_oldest_queued_age_seconds{{{T}}}": ("queued_age", "_"),
        f"aftertask_oldest_running_age_seconds{{{T}}}": ("running_age", "_"),
        f'aftertask_task_timeout_seconds{{{I},task="mail"}}': ("timeout", "_"),
        f'aftertask_abandoned_threads{{{I},task="mail"}}': ("abandoned", flat),
        f'aftertask_self_errors_total{{{I},component="logs"}}': ("self_errors", flat),
        f'aftertask_label_overflow_total{{{I},label="task"}}': ("overflow", flat),
        f'aftertask_threadpool_busy{{{I},pool="anyio"}}': ("busy", flat),
        f'aftertask_threadpool_limit{{{I},pool="anyio"}}': ("threads", f"40x{minutes}"),
        f'aftertask_threadpool_waiting{{{I},pool="anyio"}}': ("waiting", flat),
        f'aftertask_event_loop_lag_seconds_bucket{{{I},le="0.01"}}': ("prompt", f"0+60x{minutes}"),
        f'aftertask_event_loop_lag_seconds_bucket{{{I},le="5.0"}}': ("late", f"0+60x{minutes}"),
        f'aftertask_event_loop_lag_seconds_bucket{{{I},le="+Inf"}}': ("late", f"0+60x{minutes}"),
        f'aftertask_event_loop_blocked_seconds_total{{{I},task="mail"}}': ("blocked", flat),
        f'aftertask_event_loop_blocked_seconds_total{{{I},task="__none__"}}': ("blocked_by_none", flat),
        f'aftertask_alerts_total{{{I},channel="hook",status="failed"}}': ("alerts_failed", flat),
        f'aftertask_alerts_total{{{I},channel="hook",status="sent"}}': ("alerts_sent", flat),
        f'aftertask_dead_letters_total{{{I},task="mail",reason="interrupted"}}': ("dead", flat),
        f"aftertask_journal_dead_letters{{{I}}}": ("letters", flat),
        f'aftertask_journal_errors_total{{{I},op="intent"}}': ("journal_errors", flat),
        f'aftertask_offload_total{{{I},engine="celery",status="ok"}}': ("handed_over", flow),
        f'aftertask_offload_total{{{I},engine="celery",status="error"}}': ("offload_errors", flat),
    }
    series |= {f"up{{{I}}}": ("up", f"1x{minutes}"), f"aftertask_build_info{{{I}}}": ("built", f"1x{minutes}")}
    keys = {key for key, _ in series.values()}
    assert set(over) <= keys, f"no series is called {set(over) - keys}"
    return {name: over.get(key, values) for name, (key, values) in series.items()}


@dataclass(frozen=True)
class Case:
    """A fault: the series, and which alerts fire when (minutes); at no other time looked at may any fire."""

    series: dict[str, str]
    firing: dict[int, set[str]]


def outage(before: int, during: int, after: int, bad: int) -> dict[str, str]:
    """A number of ten runs a minute fail, for a while."""
    good, end = 10 * before, 10 * before + (10 - bad) * during
    return life(
        before + during + after + 2,
        succeeded=f"0+10x{before} {good}+{10 - bad}x{during} {end}+10x{after}",
        failed=f"0x{before} 0+{bad}x{during} {bad * during}x{after}",
        bad=f"0x{before} 0+{bad}x{during} {bad * during}x{after}",
    )


HEALTHY = Case(life(240), {30: set(), 120: set(), 239: set()})

CASES: dict[str, Case] = {
    "healthy": HEALTHY,
    "idle": Case(
        {name: "0x240" if "+" in values else values for name, values in life(240).items()},
        {30: set(), 239: set()},
    ),
    "nothing scraped": Case({}, {30: set()}),
    "a client's mistakes": Case(
        life(120, dropped="0+50x120", not_run_http_exception="0+25x120", not_run_validation="0+25x120"),
        {60: set(), 119: set()},
    ),
    "one failure of two runs": Case(life(120, succeeded="0x30 1x90", failed="0x40 1x80", bad="0x40 1x80"), {60: set()}),
    "a loss in a series that does not begin at 0": Case(life(60, lost="_x30 1x30"), {45: set()}),
    "TargetDown": Case(
        life(90, up="1x10 0x30 1x50", built="1x10 stale _x29 1x50"), {11: set(), 15: {"TargetDown"}, 45: set()}
    ),
    "TargetDown not for the targets of others": Case({f"up{{{I}}}": "0x60"}, {30: set()}),
    "ErrorBudgetBurn": Case(
        outage(60, 120, 600, bad=3),
        {59: set(), 100: {"ErrorBudgetBurn", "TaskFailing"}, 250: {"ErrorBudgetBurn"}, 779: set()},
    ),
    "TaskFailing": Case(
        life(120, succeeded="0x60 1x60", failed="0x60 3x60", bad="0x60 3x60", starts="0x60 4x60"),
        {59: set(), 65: {"TaskFailing"}, 92: set()},
    ),
    "TaskFailing not for two": Case(life(120, succeeded="0x120", failed="0x60 2x60", bad="0x60 2x60"), {65: set()}),
    "TaskFailing not for a task that is only skipped": Case(
        life(
            120,
            succeeded="0x120",
            skipped="0x60 0+1x59",
            not_run_sibling_failed="0x60 0+1x59",
            bad="0x60 0+1x59",
            starts="0x120",
        ),
        {59: set(), 90: {"ErrorBudgetBurn"}},
    ),
    "TasksLost": Case(life(90, lost="0x30 1x60"), {29: set(), 35: {"TasksLost"}, 50: set()}),
    "TasksCutOff": Case(life(90, cancelled="0x30 1x60"), {29: set(), 35: {"TasksCutOff"}, 50: set()}),
    "TasksDropped": Case(
        life(90, dropped="0x30 1x60", not_run_own_background="0x30 1x60"), {29: set(), 35: {"TasksDropped"}, 50: set()}
    ),
    "TaskStuck without a timeout": Case(
        life(120, running_age="0x10 0+60x60 _x50"), {39: set(), 60: {"TaskStuck"}, 80: set()}
    ),
    "TaskStuck after twice its timeout": Case(
        life(120, running_age="0x10 0+60x30 _x80", timeout="120x120"), {13: set(), 25: {"TaskStuck"}, 60: set()}
    ),
    "TaskStuck not within a long timeout": Case(
        life(120, running_age="0x10 0+60x100", timeout="7200x120"), {100: set()}
    ),
    "TaskStuck as an abandoned thread": Case(
        life(120, abandoned="0x10 1x30 0x80"), {10: set(), 20: {"TaskStuck"}, 45: set()}
    ),
    "QueueNotDraining": Case(
        life(120, queued="0x10 4x30 0x80", starts="0+10x10 110x30 110+10x80", quick_starts="0+10x10 110x30 110+10x80"),
        {9: set(), 36: {"QueueNotDraining"}, 60: set()},
    ),
    "QueueNotDraining while others go on": Case(life(120, queued="0x10 4x100"), {60: set()}),
    "OldestQueuedTooOld": Case(
        life(120, queued_age="0x10 0+60x20 _x90"), {14: set(), 25: {"OldestQueuedTooOld"}, 50: set()}
    ),
    "QueueWaitHigh": Case(
        life(120, quick_starts="0+10x20 210+8x60 690+10x40"), {19: set(), 60: {"QueueWaitHigh"}, 110: set()}
    ),
    "ThreadPoolSaturated": Case(
        life(90, busy="0x10 40x30 0x50", waiting="0x10 3x30 0x50"), {10: set(), 30: {"ThreadPoolSaturated"}, 60: set()}
    ),
    "EventLoopLag": Case(life(90, prompt="0+60x10 660+50x30 2160+60x50"), {10: set(), 30: {"EventLoopLag"}, 60: set()}),
    "EventLoopBlockedByTask": Case(
        life(90, blocked="0x10 0+6x30 180x50"), {10: set(), 30: {"EventLoopBlockedByTask"}, 60: set()}
    ),
    "EventLoopBlockedByTask not by others": Case(life(90, blocked_by_none="0+30x90"), {60: set()}),
    "RetryStorm": Case(life(120, retries="0x10 0+8x40 320x70"), {10: set(), 45: {"RetryStorm"}, 80: set()}),
    "AlertDeliveryFailing": Case(
        life(90, alerts_failed="0x10 0+1x20 20x60"), {10: set(), 25: {"AlertDeliveryFailing"}, 60: set()}
    ),
    "AlertDeliveryFailing not with one delivered": Case(
        life(90, alerts_failed="0x10 0+1x20 20x60", alerts_sent="0x10 0+1x20 20x60"), {25: set()}
    ),
    "DeadLettersGrowing": Case(life(90, dead="0x30 2x60"), {29: set(), 35: {"DeadLettersGrowing"}, 65: set()}),
    "DeadLettersUnattended": Case(
        life(1700, letters="0x20 3x1600 0x80"), {1400: set(), 1600: {"DeadLettersUnattended"}, 1690: set()}
    ),
    "DeadLettersUnattended not if there is a day's end": Case(life(1700, letters="3x700 0x20 3x980"), {1690: set()}),
    "JournalErrors": Case(life(90, journal_errors="0x10 0+1x20 20x60"), {10: set(), 20: {"JournalErrors"}, 45: set()}),
    "OffloadFailing": Case(
        life(90, offload_errors="0x10 0+1x20 20x60"), {10: set(), 20: {"OffloadFailing"}, 45: set()}
    ),
    "OffloadFailing not for two": Case(life(60, offload_errors="0x10 2x50"), {14: set(), 30: set()}),
    "SelfDegraded": Case(life(90, self_errors="0x10 1x80"), {9: set(), 23: {"SelfDegraded"}, 40: set()}),
    "LabelOverflow": Case(life(120, overflow="0x10 3x110"), {9: set(), 30: {"LabelOverflow"}, 80: set()}),
}

ALERTS = {alert.name for alert in _rules.alerts()}


def promtool(folder: Path, rules: Iterable[Path], cases: dict[str, Case]) -> subprocess.CompletedProcess[str]:
    """Run the cases over the rules by `promtool test rules`."""
    tests: list[dict[str, Any]] = [
        {
            "name": name,
            "interval": "1m",
            "input_series": [{"series": series, "values": values} for series, values in case.series.items()],
            "promql_expr_test": [
                {
                    "expr": 'count by (alertname) (ALERTS{alertstate="firing"}) * 0',
                    "eval_time": f"{minute}m",
                    "exp_samples": [
                        {"labels": f'{{alertname="Aftertask{alert}"}}', "value": 0} for alert in sorted(firing)
                    ],
                }
                for minute, firing in case.firing.items()
            ],
        }
        for name, case in cases.items()
    ]
    path = folder / "test.yml"
    path.write_text(
        yaml.safe_dump({"rule_files": [str(rule) for rule in rules], "evaluation_interval": "1m", "tests": tests})
    )
    return subprocess.run([program("promtool"), "test", "rules", path], capture_output=True, text=True)


@pytest.fixture
def exported(tmp_path: Path) -> list[Path]:
    """All rule files as they are written unless asked otherwise."""
    assert aftertask("rules", "export", tmp_path, "--all").exit_code == 0
    return [tmp_path / name for name in FILES]


def test_promtool_takes_them(exported: list[Path], tmp_path: Path) -> None:
    """As they are, and with every option in use."""
    options = ["--selector", 'env=~"prod|live", team="a"', "--slo", "0.999", "--limit", "wait_seconds=2.5"]
    other = tmp_path / "other"
    assert aftertask("rules", "export", other, "--all", *options).exit_code == 0
    for path in (*exported, *(other / name for name in FILES)):
        done = subprocess.run([program("promtool"), "check", "rules", path], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def named(name: str, case: Case) -> Any:
    """The case as a parameter; one of about a day takes long."""
    return pytest.param(name, marks=pytest.mark.long if max(case.firing) > 1_000 else ())


@pytest.mark.parametrize("name", [named(name, case) for name, case in CASES.items()])
def test_each_fault_fires_its_alert_and_no_other(name: str, exported: list[Path], tmp_path: Path) -> None:
    """An alert fires under its fault, none else does, and it ends when the fault does."""
    done = promtool(tmp_path, exported, {name: CASES[name]})
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_has_a_case_in_which_it_fires_and_ends() -> None:
    """And each slow window of the error budget is looked at."""
    for alert in ALERTS:
        cases = [case for case in CASES.values() if any(alert in firing for firing in case.firing.values())]
        assert cases, f"no case for {alert}"
        assert any(alert not in list(case.firing.values())[-1] for case in cases), f"{alert} never ends"


LONGEST = pytest.param("3d", 4320, marks=pytest.mark.long)


@pytest.mark.parametrize(("window", "minutes"), [("1h", 60), ("6h", 360), ("1d", 1440), LONGEST])
def test_each_window_of_the_error_budget_has_its_factor(window: str, minutes: int, tmp_path: Path) -> None:
    """A burn just above a window's factor fires that window's alert, and one just below it does not."""
    factor = next(factor for long, _, factor, _, _ in _rules.BURNS if long == window)
    options = _rules.Options()
    rules = tmp_path / "rules.yml"
    rules.write_text(_rules.to_yaml(_rules.groups(options, default=True)))
    step = 1 if minutes <= 360 else 10  # fewer samples are enough for the slow windows, and faster
    total = minutes + minutes // 6
    for above, bad in ((True, factor * 1.1), (False, factor * 0.9)):
        good, fails = f"0+{100 - bad:.2f}x{total // step}", f"0+{bad:.2f}x{total // step}"
        series = life(total // step, succeeded=good, failed=fails, bad=fails)
        test = {
            "rule_files": [str(rules)],
            "evaluation_interval": "5m",
            "tests": [
                {
                    "interval": f"{step}m",
                    "input_series": [{"series": name, "values": values} for name, values in series.items()],
                    "promql_expr_test": [
                        {
                            "expr": f'count(ALERTS{{alertstate="firing",window="{window}"}})',
                            "eval_time": f"{total - 5}m",
                            "exp_samples": [{"labels": "{}", "value": 1}] if above else [],
                        }
                    ],
                }
            ],
        }
        path = tmp_path / "test.yml"
        path.write_text(yaml.safe_dump(test))
        done = subprocess.run([program("promtool"), "test", "rules", path], capture_output=True, text=True)
        assert done.returncode == 0, f"{factor=} {bad=} {done.stdout}{done.stderr}"


def test_the_number_of_bad_runs_is_that_of_the_words(exported: list[Path], tmp_path: Path) -> None:
    """Three bad runs are reported as three, though `increase()` estimates a fraction more."""
    rule = next(rule for rule in written(exported[0]) if rule.get("alert") == "AftertaskTaskFailing")
    expected = {
        "exp_labels": {"job": "api", "task": "mail", "severity": "warning"},
        "exp_annotations": {
            **rule["annotations"],
            "description": "mail of api: about 3 runs failed in 30m, more than 25 % of those that started.",
            "dashboard_url": "http://localhost:3000/d/aftertask-task?var-job=api&var-task=mail",
        },
    }
    series = CASES["TaskFailing"].series
    test = {
        "rule_files": [str(exported[0])],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                "alert_rule_test": [
                    {"alertname": "AftertaskTaskFailing", "eval_time": "65m", "exp_alerts": [expected]}
                ],
            }
        ],
    }
    path = tmp_path / "test.yml"
    path.write_text(yaml.safe_dump(test))
    done = subprocess.run([program("promtool"), "test", "rules", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def written(path: Path) -> list[dict[str, Any]]:
    """The rules of a file."""
    return [rule for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]


def test_each_alert_has_its_summary_numbers_and_links(exported: list[Path]) -> None:
    """`for`, severity, summary, numbers, runbook, dashboard; nothing left to be filled in."""
    for rule in [rule for path in exported for rule in written(path) if "alert" in rule]:
        notes = rule["annotations"]
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert "for" in rule and notes["summary"] and "$value" in notes["description"]
        assert notes["runbook_url"] == f"runbooks/{rule['alert'].removeprefix('Aftertask')}.md"
        assert re.match(r"http://localhost:3000/d/aftertask-\w+\?var-job=\{\{ \$labels.job", notes["dashboard_url"])
        assert "${" not in str(rule)
        assert not re.search(r"sum by|max by", rule["expr"]) or re.search(r"by \(job\b", rule["expr"])


def test_alerts_that_are_about_a_task_carry_it(exported: list[Path]) -> None:
    """The message then names the task."""
    for rule in [rule for path in exported for rule in written(path) if "alert" in rule]:
        about = {
            "TaskFailing",
            "TasksLost",
            "TasksCutOff",
            "TasksDropped",
            "TaskStuck",
            "RetryStorm",
            "DeadLettersGrowing",
            "EventLoopBlockedByTask",
        }
        if rule["alert"].removeprefix("Aftertask") in about:
            assert "var-task={{ $labels.task | urlquery }}" in rule["annotations"]["dashboard_url"], rule["alert"]


def test_each_alert_has_a_runbook_and_each_runbook_an_alert() -> None:
    """With what it means, where to look, and what to do; links between them lead somewhere."""
    assert {page.stem for page in RUNBOOKS.glob("*.md")} == ALERTS
    for page in RUNBOOKS.glob("*.md"):
        text = page.read_text()
        assert text.startswith(f"# {page.stem}\n")
        assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["What it means", "Look", "Do"]
        for link in re.findall(r"\]\(([^)]*)\)", text):
            assert (RUNBOOKS / link).is_file(), f"{page.name}: {link}"


def test_each_alert_and_option_is_documented(exported: list[Path]) -> None:
    """With its severities and whether it is on; and every option of the command."""
    page = (ROOT / "docs" / "dashboards.md").read_text()
    rows = {
        row[0]: row[1:] for row in re.findall(r"^\| `(Aftertask\w+)` \| (.*?) \| .* \| (.*?) \|$", page, re.MULTILINE)
    }
    alerts: dict[str, tuple[set[str], str]] = {}
    for path, word in zip(exported, ("default", "`--all`"), strict=True):
        for rule in [rule for rule in written(path) if "alert" in rule]:
            alerts.setdefault(rule["alert"], (set(), word))[0].add(rule["labels"]["severity"])
    assert {name: (set(severities.split(", ")), word) for name, (severities, word) in rows.items()} == alerts
    help_ = re.sub(r"\x1b\[[0-9;]*m", "", CliRunner().invoke(app, ["rules", "export", "--help"]).output)
    options = set(re.findall(r"--[a-z-]+", help_)) - {"--help", "--no-all"}
    assert options and all(f"`{option}" in page for option in options)


def test_the_committed_files_are_current(exported: list[Path]) -> None:
    """What is in the repository is what the command writes."""
    for path in exported:
        assert (ROOT / "dashboards" / "rules" / path.name).read_text() == path.read_text(), "run `make dashboards`"


def test_the_default_file_alone_is_written_unless_asked(tmp_path: Path) -> None:
    """With the runbooks that it names."""
    done = aftertask("rules", "export", tmp_path / "new")
    assert done.exit_code == 0
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"aftertask.rules.yml", "runbooks"}
    assert len(list((tmp_path / "new" / "runbooks").iterdir())) == len(list(RUNBOOKS.iterdir()))
    assert done.output.splitlines()[0] == str(tmp_path / "new" / "aftertask.rules.yml")


def test_options_reach_the_rules(tmp_path: Path) -> None:
    """Selector, service level, thresholds, addresses."""
    options = [
        "--selector",
        'env="prod"',
        "--slo",
        "0.999",
        "--limit",
        "failing_runs=7",
        "--limit",
        "queued_seconds=60",
    ]
    urls = ["--runbook-url", "https://wiki.example.org/runbooks/", "--dashboard-url", "https://grafana.example.org/"]
    assert aftertask("rules", "export", tmp_path, *options, *urls).exit_code == 0
    rules = written(tmp_path / "aftertask.rules.yml")
    for rule in rules:
        for name in re.finditer(r"(?<![\w:])aftertask_\w+(?![\w:])", rule["expr"]):
            assert rule["expr"][name.end() :].startswith('{env="prod"'), rule["expr"]
    alerts = {rule["alert"]: rule for rule in rules if "alert" in rule}
    assert "> 14.4 * 0.001" in next(rule["expr"] for rule in rules if rule.get("alert") == "AftertaskErrorBudgetBurn")
    assert "> 7 - 0.5" in alerts["AftertaskTaskFailing"]["expr"]
    assert alerts["AftertaskOldestQueuedTooOld"]["expr"].endswith("> 60")
    notes = alerts["AftertaskTasksLost"]["annotations"]
    assert notes["runbook_url"] == "https://wiki.example.org/runbooks/TasksLost.md"
    assert notes["dashboard_url"].startswith("https://grafana.example.org/d/aftertask-task?")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--slo", "99"], "--slo must be between 0 and 1, got 99"),
        (["--slo", "0.9"], "--slo must be above 0.9306, got 0.9: below that even an app whose every run is bad"),
        (["--limit", "speed=1"], "unknown --limit 'speed'; one of: min_bad,"),
        (["--limit", "min_bad=many"], "--limit min_bad must be a number, got 'many'"),
        (["--limit", "min_bad=0"], "min_bad must be above 0, got 0"),
        (["--limit", "wait_seconds=7"], "wait_seconds must be an edge of the histogram (0.005, "),
        (["--selector", '{job="api"}'], '--selector must be label matchers without braces, such as job="api"'),
        (["--runbook-url", "wiki"], "--runbook-url must begin with http:// or https://, got 'wiki'"),
    ],
)
def test_a_wrong_option_is_refused_with_the_way_out(options: list[str], word: str, tmp_path: Path) -> None:
    """And nothing is written."""
    done = aftertask("rules", "export", tmp_path / "out", *options)
    assert done.exit_code == 2 and done.stderr.startswith(f"aftertask: {word}")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    """With its name."""
    (tmp_path / "file").write_text("")
    done = aftertask("rules", "export", tmp_path / "file")
    assert done.exit_code == 2 and str(tmp_path / "file") in done.stderr and "Traceback" not in done.output


def test_a_name_that_is_not_emitted_is_an_error() -> None:
    """A typing mistake does not become an alert that never fires."""
    with pytest.raises(ValueError, match="no metric is called aftertask_task_finished_total"):
        _promql.check("sum(aftertask_task_finished_total)")


def test_limits_are_scaled_for_tests() -> None:
    """Windows, waits and ages; not numbers of runs."""
    options = _rules.Options(scale=1 / 60, limits=replace(_rules.Limits(), failing_runs=4))
    rules = yaml.safe_load(_rules.to_yaml(_rules.groups(options, default=True)))["groups"][1]["rules"]
    failing = next(rule for rule in rules if rule["alert"] == "AftertaskTaskFailing")
    assert "[30s]" in failing["expr"] and "> 4 - 0.5" in failing["expr"]
    oldest = next(rule for rule in rules if rule["alert"] == "AftertaskOldestQueuedTooOld")
    assert oldest["expr"].endswith("> 5") and oldest["for"] == "5s"


def test_placeholder_addresses_are_one_warning(tmp_path: Path) -> None:
    """The links would lead nowhere; with both options there is nothing to say."""
    done = aftertask("rules", "export", tmp_path)
    (line,) = done.stderr.splitlines()
    assert "--runbook-url" in line and "--dashboard-url" in line and "placeholders" in line
    done = aftertask("rules", "export", tmp_path, "--runbook-url", "https://wiki.example.org")
    assert "--runbook-url" not in done.stderr and "--dashboard-url (the URL of your Grafana)" in done.stderr
    given = ("--runbook-url", "https://wiki.example.org", "--dashboard-url", "https://grafana.example.org")
    assert aftertask("rules", "export", tmp_path, *given).stderr == ""
