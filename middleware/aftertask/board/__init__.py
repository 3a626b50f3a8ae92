"""`Board`: a live page about the background tasks of this process. `app.mount("/aftertask", Board(authorize=…))`."""

from __future__ import annotations

from ._app import Authorize, Board

__all__ = ["Authorize", "Board"]
