"""The documentation against the code: every Python block runs, every page is reachable, and tables name what exists."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import typer.main
import yaml
from fastapi import BackgroundTasks
from prometheus_client import CollectorRegistry
from starlette.testclient import TestClient

import aftertask
from aftertask import Settings
from aftertask.alerts import Alert
from aftertask.cli.app import app as command
from aftertask.policies import PolicyOptions
from aftertask.testing import recorded
from docs_blocks import blocks, given

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")])
PACKAGE = Path(aftertask.__file__).parent


def name_of(page: Path) -> str:
    """A page's path in the repository."""
    return str(page.relative_to(ROOT))


# --- every block of code runs


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """What went wrong in each page; None where every block ran. Nothing is left in the folder for temporary files."""
    temporary = tmp_path_factory.mktemp("blocks")
    done = subprocess.run(
        [sys.executable, "tests/docs_blocks.py", *map(name_of, PAGES)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    assert done.returncode == 0, done.stderr
    assert list(temporary.iterdir()) == []
    found: dict[str, str | None] = json.loads(done.stdout)
    return found


@pytest.mark.timeout(300)
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_python_block_runs(page: Path, ran: dict[str, str | None]) -> None:
    """As it is printed; an app that gets the middleware in a block is started, and the tests of a page pass."""
    assert ran[name_of(page)] is None, ran[name_of(page)]


def page(name: str) -> dict[str, Any]:
    """The names that the blocks of a page define."""
    space = given() | {"__name__": "page"}
    for code in blocks(DOCS / name):
        exec(compile(code, name, "exec"), space)
    return space


def test_the_page_about_status_shows_a_run_until_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its header has the id; the run is found in flight and afterwards, by polling and by events."""
    monkeypatch.chdir(tmp_path)
    space = page("howto/status.md")
    seen: list[dict[str, object]] = []

    @space["task"](name="reports.watched", keep_result=True)  # type: ignore[untyped-decorator]  # of the page
    async def watched(pages: int) -> dict[str, int]:
        space["progress"](3, pages, "pages")
        run = aftertask.current_run()
        assert run is not None
        seen.append(await space["status"](run.id))
        return {"pages": pages}

    space["build_report"] = watched
    with TestClient(space["app"]) as client:
        answer = client.post("/reports", params={"pages": 10})
        assert seen == [{"state": "running", "progress": "3/10 pages", "result": None}]
        run = f"/runs/{answer.headers['x-run-id']}"
        end = {"state": "succeeded", "progress": "3/10 pages", "result": {"pages": 10}}
        assert client.get(run).json() == end
        assert client.get(f"{run}/events").text == f"data: {json.dumps(end)}\n\n"
        assert client.get("/runs/unknown/events").status_code == 404


def test_the_page_without_grafana_lists_the_last_problems() -> None:
    """A failed run and the one that was skipped because of it."""
    space = page("howto/without-grafana.md")

    def broken() -> None:
        raise ConnectionError("refused")

    @space["app"].post("/orders")
    async def order(tasks: BackgroundTasks) -> None:
        tasks.add_task(broken)
        tasks.add_task(print)

    space["app"].user_middleware[0].kwargs["settings"] = Settings(registry=CollectorRegistry())
    space["app"].user_middleware[0].kwargs["signals"] = [space["problems"]]
    client = TestClient(space["app"], raise_server_exceptions=False)
    client.post("/orders")
    skipped, failed = client.get("/internal/tasks").json()
    assert failed.endswith("broken failed: ConnectionError: refused")
    assert skipped.endswith("print was skipped: sibling_failed")


def test_the_page_about_noise_does_what_it_says() -> None:
    """`expected` is failed and not bad, `observe=False` is no run, `exclude` leaves a path out."""
    space = page("howto/noise.md")

    @space["task"](name="orders.declined", expected=space["CardDeclined"], on_failure="contain")
    async def declined() -> None:
        raise space["CardDeclined"]

    @space["app"].post("/orders")
    @space["app"].post("/internal/orders")
    async def order(tasks: BackgroundTasks) -> None:
        tasks.add_task(declined)
        tasks.add_task(space["ping"])

    with recorded(space["app"]) as events:
        client = TestClient(space["app"], raise_server_exceptions=False)
        client.post("/orders")
        client.post("/internal/orders")
    assert events.outcomes() == [("orders.declined", "failed")]
    assert not any(getattr(event, "bad", False) for event in events.events)


def test_the_manifests_are_yaml_and_their_query_is_promql() -> None:
    """Each block is one object of Kubernetes; the query names a metric of ours."""
    found = re.findall(r"```yaml\n(.*?)```", (DOCS / "howto" / "kubernetes.md").read_text(), re.DOTALL)
    objects = {found["kind"]: found for found in map(yaml.safe_load, found)}
    assert objects.keys() == {"Deployment", "Ingress", "ScaledObject", "StatefulSet"}
    kept = objects["StatefulSet"]["spec"]
    (container,) = kept["template"]["spec"]["containers"]
    (mount,) = container["volumeMounts"]
    assert container["env"][0]["value"].startswith(f"{mount['mountPath']}/")
    assert mount["name"] == kept["volumeClaimTemplates"][0]["metadata"]["name"]
    (trigger,) = objects["ScaledObject"]["spec"]["triggers"]
    assert "aftertask_tasks_inflight" in promql_parser.parse(trigger["metadata"]["query"]).prettify()
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    limit = int(container["command"][container["command"].index("--timeout-graceful-shutdown") + 1])
    variables = {each["name"]: each["value"] for each in container["env"]}
    assert pod["terminationGracePeriodSeconds"] > 5 + limit + int(variables["AFTERTASK_DRAIN_TIMEOUT"])


def test_the_lines_in_the_readme_are_those_of_the_tutorial() -> None:
    """Those are compared with what a real server writes."""
    shown = re.search(r"```json\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert shown and shown[1] in (DOCS / "tutorial.md").read_text()


# --- pages and links


def navigation(entries: list[Any]) -> Iterator[str]:
    """The pages of the website's navigation."""
    for entry in entries:
        for target in entry.values():
            yield from navigation(target) if isinstance(target, list) else [target]


def test_every_page_is_in_the_navigation() -> None:
    """Each page of docs/ once, and nothing else."""
    listed = list(navigation(tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]))
    assert sorted(listed) == sorted(str(each.relative_to(DOCS)) for each in DOCS.rglob("*.md"))


@pytest.mark.parametrize("page", [*PAGES, ROOT / "SECURITY.md", *ROOT.glob("examples/**/README.md")], ids=name_of)
def test_no_link_to_a_file_is_broken(page: Path) -> None:
    """`make docs` checks the website; this also checks the pages outside of docs/, and links out of it."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), target


@pytest.mark.long
@pytest.mark.timeout(120)
def test_the_website_builds_strictly(tmp_path: Path) -> None:
    """Every page of docs/ becomes a page, and a broken link fails the build."""
    for name in ("docs", "zensical.toml"):
        source = ROOT / name
        shutil.copytree(source, tmp_path / name) if source.is_dir() else shutil.copy(source, tmp_path)
    build = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "site").rglob("index.html"))) == len(list(DOCS.rglob("*.md")))
    (tmp_path / "docs" / "index.md").write_text("# Start\n\n[gone](tutorial.md#no-such-part)\n")
    assert subprocess.run(build, cwd=tmp_path, capture_output=True, timeout=100).returncode != 0


# --- names that pages mention exist


def options_of(*names: str) -> set[str]:
    """The options of a subcommand of `aftertask`."""
    current: Any = typer.main.get_command(command)
    for name in names:
        current = current.commands[name]
    return {option for parameter in current.params for option in parameter.opts if option.startswith("--")}


def subcommand(words: list[str]) -> list[str]:
    """The words of a command line that name a subcommand."""
    current: Any = typer.main.get_command(command)
    found: list[str] = []
    for word in words:
        if word not in getattr(current, "commands", {}):
            break
        found.append(word)
        current = current.commands[word]
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist(page: Path) -> None:
    """Targets of make, subcommands of `aftertask` and their options."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = page.read_text()
    for target in re.findall(r"(?:^\$ |`)make ([a-z]+)", text, re.MULTILINE):
        assert target in targets, f"make {target}"
    for line in re.findall(r"(?:^\$ |`)aftertask ([^`\n#]+)", text, re.MULTILINE):
        words = line.split()
        named = subcommand(words)
        for option in re.findall(r"--[a-z-]+", line):
            assert option in options_of(*named), f"aftertask {line}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_variables_exist(page: Path) -> None:
    """Every `AFTERTASK_…` that a page mentions is one that is read."""
    known = {f"AFTERTASK_{field.name.upper()}" for field in fields(Settings)} | {"AFTERTASK_DISABLED"}
    known |= {"AFTERTASK_TEST_REQUIRE_SERVERS", "AFTERTASK_SERVICE_HOST"}  # the tests' own; not read, and ignored
    assert set(re.findall(r"AFTERTASK_[A-Z_]*[A-Z]", page.read_text())) - known == set()


def rows(name: str, heading: str = "") -> dict[str, list[str]]:
    """The rows of the tables below a heading, by the names in their first cell."""
    text = (DOCS / name).read_text()
    if heading:
        text = re.split(r"^#+ ", text.partition(heading)[2].partition("\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    found = {}
    for line in text.splitlines():
        if line.startswith("| "):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
            for each in re.findall(r"`([^`]+)`", cells[0]):
                found[each] = cells[1:]
    return found


def test_the_table_of_settings_has_the_defaults_and_variables_of_the_code() -> None:
    """One row for each field: its default as it is written in Python, and its variable if it has one."""
    table = rows("settings.md", "# Settings")
    for field in fields(Settings):
        default, variable, _ = table[field.name]
        if default.startswith("`") and field.name != "redact":
            written = ast.literal_eval(default.strip("`"))
            value = getattr(Settings(), field.name)
            assert written == (dict(value) if isinstance(written, dict) else value), field.name
        assert variable in ("", f"`AFTERTASK_{field.name.upper()}`"), field.name


def test_the_table_of_policies_has_each_keyword_and_no_other() -> None:
    """As `PolicyOptions` lists them, and `name`, `owner` for `@task`."""
    table = rows("settings.md", "## Policies").keys()
    assert set(PolicyOptions.__annotations__) <= table
    assert table <= set(PolicyOptions.__annotations__) | {"name", "owner"}


def test_the_table_of_options_of_check_is_complete() -> None:
    """Each option of `aftertask check` but `--help`."""
    listed = {option for row in rows("hazards.md", "## `aftertask check`") for option in re.findall(r"--[a-z-]+", row)}
    assert listed == options_of("check") - {"--help"}


def test_the_table_of_what_check_finds_is_complete() -> None:
    """One row for each kind, and none for another: the literals of `_findings.py` and `_mistakes.py`."""
    kinds: set[str] = set()
    for name in ("cli/_findings.py", "_mistakes.py"):
        for node in ast.walk(ast.parse((PACKAGE / name).read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("Finding", "Mistake"):
                kinds |= {node.args[0].value} if isinstance(node.args[0], ast.Constant) else set()
    text = (DOCS / "hazards.md").read_text().partition("## `aftertask check`")[2].partition("| Option")[0]
    first_cells = re.findall(r"^\| (`[^|]+) \|", text, re.MULTILINE)
    assert {kind for cell in first_cells for kind in re.findall(r"`([a-z_]+)`", cell)} - {"kind"} == kinds


def test_the_hazards_page_lists_every_kind() -> None:
    """Each kind that the code can report has a row."""
    source = "\n".join(path.read_text() for path in (PACKAGE / "hazards").glob("*.py"))
    listed = set(rows("hazards.md"))
    for kind in ("closed_upload", "request_scoped", "db_session", "blocked_loop", "starved_threads"):
        assert kind in source and kind in listed


def test_the_alerts_page_lists_every_field_of_an_alert() -> None:
    """What an alert has is listed."""
    text = (DOCS / "alerts.md").read_text()
    assert {field.name for field in fields(Alert)} - set(re.findall(r"`([a-z_]+)`", text)) == set()


def test_the_words_page_lists_every_outcome() -> None:
    """Each outcome has a row, or is explained below the table."""
    text = (DOCS / "telemetry.md").read_text()
    for outcome in aftertask.events.OUTCOMES:
        assert f"`{outcome}`" in text, outcome


def test_every_reason_is_documented() -> None:
    """The table of reasons has those of the code, and each that it has is in the code."""
    core = "\n".join(path.read_text() for path in (PACKAGE / "_core").rglob("*.py"))
    text = (DOCS / "telemetry.md").read_text().partition("### When is a task")[2].partition("## Metrics")[0]
    listed = set(re.findall(r"^\| `([a-z_]+)` \|", text, re.MULTILINE))
    assert "own_background" in listed
    for reason in listed:
        assert f'"{reason}"' in core, reason
    tree = ast.parse((PACKAGE / "_core" / "reasons.py").read_text())
    returned = {
        node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }
    assert returned and all(f"`{reason}`" in text for reason in returned)
