"""`Board`: a live page about the background tasks of this process. `app.mount("/aftertask", Board(authorize=…))`."""

from __future__ import annotations

try:
    from ._app import Authorize, Board
except ModuleNotFoundError as error:
    if error.name != "jinja2":
        raise
    raise ImportError("aftertask.board needs Jinja2: pip install 'aftertask[board]'") from error

__all__ = ["Authorize", "Board"]
