"""How a command writes its files, and says no."""

from __future__ import annotations

from pathlib import Path

import typer


def write(folder: Path, files: dict[str, str]) -> None:
    """Write these files under a folder, made where it is missing, over older ones of the same names; tell each."""
    for name, text in files.items():
        path = folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise refusal(f"cannot write {path}: {error.strerror}; name a folder that can be written") from None
        typer.echo(path)


def refusal(word: str) -> typer.Exit:
    """What ends a command with code 2, after it has said why."""
    typer.echo(f"aftertask: {word}", err=True)
    return typer.Exit(2)
