"""`Board`: a live page about an app's background tasks. `app.mount("/aftertask", Board(authorize=…))`."""

from __future__ import annotations

try:
    from ._access import Authorize
    from ._app import Board
except ModuleNotFoundError as error:
    if error.name != "jinja2":
        raise
    raise ImportError("aftertask.board needs Jinja2: pip install 'aftertask[board]'") from error

__all__ = ["Authorize", "Board"]
