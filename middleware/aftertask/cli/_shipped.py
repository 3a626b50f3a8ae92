"""What is shipped beside the code: the dashboards and runbooks, from a wheel or from a checkout."""

from __future__ import annotations

from pathlib import Path


def folder(kind: str = "") -> Path:
    """
    Where the dashboards are, or one of the folders beside them.

    Raises:
        FileNotFoundError: Neither the wheel's folder nor a checkout's is there.
    """
    package = Path(__file__).parents[1]
    # A wheel carries them in the package; an editable install reads the checkout, where they stand beside it.
    for place in (package / "_dashboards", package.parents[1] / "dashboards"):
        if (place / "runbooks").is_dir():
            return place / kind
    raise FileNotFoundError(f"the dashboards are missing beside {package}; install aftertask again from a wheel")
