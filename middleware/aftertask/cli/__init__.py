"""The `aftertask` command. What it needs comes with the extra `aftertask[cli]`; nothing else imports it."""

from __future__ import annotations

import sys
from importlib.util import find_spec


def main() -> None:
    """Run the command; without its extra, print how to install it and exit with code 1."""
    for package, module in (("Typer", "typer"), ("PyYAML", "yaml")):
        if find_spec(module) is None:
            sys.exit(f"the aftertask command needs {package}; install it with: pip install 'aftertask[cli]'")
    from .app import app

    app()
