"""The `aftertask` command. What it needs comes with the extra `aftertask[cli]`; nothing else imports it."""

from __future__ import annotations

import sys
from importlib.util import find_spec


def main() -> None:
    """Run the command; without its extra, say how to install it and end with code 1."""
    if find_spec("typer") is None:
        sys.exit("the aftertask command needs Typer; install it with: pip install 'aftertask[cli]'")
    from .app import app

    app()
