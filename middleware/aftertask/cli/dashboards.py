"""`aftertask dashboards`: the Grafana dashboards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._kubernetes import Labels, Name, Namespace, Wanted, config_map, meta
from ._output import write
from ._shipped import folder

#: The label that the sidecar of Grafana's chart looks for, unless it is set up otherwise.
SIDECAR = {"grafana_dashboard": "1"}

app = typer.Typer(help="Dashboards for Grafana.", no_args_is_help=True)


@app.command()
def export(
    folder_: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for the files; created if it does not exist.")],
    kubernetes: Wanted = False,
    name: Name = "aftertask",
    namespace: Namespace = "",
    label: Labels = None,
) -> None:
    """Write the dashboards as JSON into a folder, for Grafana's import or its provisioning."""
    about = meta(kubernetes, name, namespace, label, SIDECAR)
    boards = {path.name: path.read_text("utf-8") for path in sorted(folder().glob("*.json"))}
    if about is not None:
        boards = {Path(file).stem + ".yaml": config_map(about, file, text) for file, text in boards.items()}
    write(folder_, boards)
