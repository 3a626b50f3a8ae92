"""The versions of the libraries that an app has imported."""

from __future__ import annotations

import sys


def version_of(package: str) -> str:
    """The version of an imported package; empty if it is not imported, or has none."""
    return str(getattr(sys.modules.get(package), "__version__", ""))


def is_at_least(package: str, version: tuple[int, int]) -> bool:
    """Whether an imported package has this version or a later one; True if that is unknown."""
    numbers = tuple(int(part) for part in version_of(package).split(".")[:2] if part.isdigit())
    return not numbers or numbers >= version
