"""How a command writes its files, and reports why it cannot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import typer
import yaml


def write(folder: Path, files: dict[str, str]) -> None:
    """Write these files under a folder, created if it is missing; overwrite older ones, and print each path."""
    for name, text in files.items():
        path = folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise refusal(f"cannot write {path}: {error.strerror}; name a folder that can be written") from None
        typer.echo(path)


def refusal(reason: str) -> typer.Exit:
    """Print why a command cannot run; returns what ends it with code 2."""
    typer.echo(f"aftertask: {reason}", err=True)
    return typer.Exit(2)


class _Dumper(yaml.SafeDumper):
    """With a text of several lines as a block."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def dump(head: str, document: Mapping[str, object]) -> str:
    """A document as text, below a comment."""
    return f"# {head}\n" + yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=1000, allow_unicode=True)
