"""The command's root; each sub-command has a file of its own and is added here by one line."""

from __future__ import annotations

from importlib.metadata import version as installed

import typer

from . import dashboards, dead, rules
from .check import check
from .runs import runs

app = typer.Typer(
    name="aftertask",
    help="Check an app, export dashboards and alert rules, and look after the journal.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(dashboards.app, name="dashboards")
app.add_typer(rules.app, name="rules")
app.add_typer(dead.app, name="dead")
app.command()(check)
app.command()(runs)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"aftertask {installed('aftertask')}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Check an app, export dashboards and alert rules, and look after the journal."""
