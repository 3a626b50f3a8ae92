"""`aftertask rules`: the alert and recording rules for Prometheus."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

from ._kubernetes import Labels, Name, Namespace, Wanted, meta, prometheus_rule
from ._output import refusal, write
from ._rules import Limits, Options, groups, to_yaml
from ._shipped import folder

app = typer.Typer(help="Alert and recording rules for Prometheus.", no_args_is_help=True)

#: The files, and whether their alerts are on by default.
FILES = {"aftertask.rules.yml": True, "aftertask-more.rules.yml": False}

LOCAL_GRAFANA = "http://localhost:3000"

_MATCHERS = re.compile(r'\w+(=|!=|=~|!~)"(?:[^"\\]|\\.)*"(?:\s*,\s*\w+(=|!=|=~|!~)"(?:[^"\\]|\\.)*")*')
_LIMITS = tuple(field.name for field in fields(Limits) if field.name != "objective")


@app.command()
def export(
    folder_: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for the files; created if it does not exist.")],
    every: Annotated[bool, typer.Option("--all", help="Also write the alerts that are not on by default.")] = False,
    selector: Annotated[str, typer.Option(help='Label matchers for each metric, such as job="api".')] = "",
    slo: Annotated[float, typer.Option(help="Share of runs that must not end badly, over 30 days.")] = 0.99,
    limit: Annotated[
        list[str] | None, typer.Option(help=f"Set a threshold, NAME=VALUE: {', '.join(_LIMITS)}. May be repeated.")
    ] = None,
    runbook_url: Annotated[
        str, typer.Option(help="URL under which you serve the runbooks, which are written next to the rules.")
    ] = "runbooks",
    dashboard_url: Annotated[str, typer.Option(help="URL of your Grafana.")] = LOCAL_GRAFANA,
    kubernetes: Wanted = False,
    name: Name = "aftertask",
    namespace: Namespace = "",
    label: Labels = None,
) -> None:
    """Write the rule files, and the runbooks that the alerts link to, into a folder."""
    about = meta(kubernetes, name, namespace, label, {})
    if selector and not _MATCHERS.fullmatch(selector):
        raise refusal(f'--selector must be label matchers without braces, such as job="api", got {selector!r}')
    for option, url in (("--runbook-url", runbook_url), ("--dashboard-url", dashboard_url)):
        if url != "runbooks" and urlsplit(url).scheme not in ("http", "https"):
            raise refusal(f"{option} must begin with http:// or https://, got {url!r}")
    options = Options(
        limits=_limits(slo, limit or []), selector=selector, runbooks=runbook_url, dashboards=dashboard_url
    )
    wanted = {name: default for name, default in FILES.items() if default or every}
    documents = {file: groups(options, default=default) for file, default in wanted.items()}
    if about is None:
        write(folder_, {file: to_yaml(document) for file, document in documents.items()})
    else:
        every_group = [group for document in documents.values() for group in document["groups"]]
        write(folder_, {"aftertask-rules.yaml": prometheus_rule(about, every_group)})
    placeholders = {
        "--runbook-url": "the URL of your runbooks" if runbook_url == "runbooks" else None,
        "--dashboard-url": "the URL of your Grafana" if dashboard_url == LOCAL_GRAFANA else None,
    }
    missing = [f"{option} ({what})" for option, what in placeholders.items() if what]
    if missing:
        typer.echo(f"aftertask: the links in the alerts are placeholders; set {' and '.join(missing)}", err=True)
    pages = sorted(folder("runbooks").glob("*.md"))
    write(folder_ / "runbooks", {page.name: page.read_text("utf-8") for page in pages})


def _limits(slo: float, given: list[str]) -> Limits:
    values = {"objective": slo}
    for each in given:
        name, _, value = each.partition("=")
        if name not in _LIMITS:
            raise refusal(f"unknown --limit {name!r}; one of: {', '.join(_LIMITS)}")
        try:
            values[name] = float(value)
        except ValueError:
            raise refusal(f"--limit {name} must be a number, got {value!r}") from None
    try:
        return Limits(**values)
    except ValueError as error:
        raise refusal(str(error).replace("objective", "--slo", 1)) from None
