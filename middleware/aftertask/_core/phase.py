"""How far a request has come."""

from __future__ import annotations

import enum

#: The messages of the server that start a response, and those that can end it.
STARTS = frozenset({"http.response.start", "websocket.http.response.start"})
BODIES = frozenset({"http.response.body", "websocket.http.response.body", "http.response.pathsend"})


class Phase(enum.Enum):
    """How far a request has come."""

    SCHEDULED = "nothing has been sent"
    RESPONDING = "the response has started"
    SERVING = "the last byte has been handed over; the tasks run"
    CLOSED = "the call of the app has returned"
