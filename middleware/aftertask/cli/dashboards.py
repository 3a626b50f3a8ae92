"""`aftertask dashboards`: the Grafana dashboards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._output import write
from ._shipped import folder

app = typer.Typer(help="Dashboards for Grafana.", no_args_is_help=True)


@app.callback()
def root() -> None:
    """Dashboards for Grafana."""


@app.command()
def export(
    folder_: Annotated[Path, typer.Argument(metavar="DIR", help="Where the files go; made if it is missing.")],
) -> None:
    """Write the dashboards' JSON into a folder, for provisioning or for Grafana's import."""
    write(folder_, {path.name: path.read_text("utf-8") for path in sorted(folder().glob("*.json"))})
