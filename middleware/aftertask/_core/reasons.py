"""How far a request has come, and why its runs never started: the reasons of `tasks_not_run_total`."""

from __future__ import annotations

import enum

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.websockets import WebSocketDisconnect

#: The reasons for which a handler, or what came before it, failed; its compensating tasks run then.
HANDLER_FAILED = frozenset({"http_exception", "validation", "handler_error"})

#: FastAPI's validation errors, by name: FastAPI need not be installed.
_VALIDATION_ERRORS = ("RequestValidationError", "WebSocketRequestValidationError")


class Phase(enum.IntEnum):
    """How far a request has come."""

    SCHEDULED = 0  # no response yet
    ADMITTING = 1  # the response is about to start; what it has to keep is being kept
    RESPONDING = 2  # the response has started
    SERVING = 3  # the last byte is being sent; the tasks run
    COMPLETE = 4  # the last byte has been sent; the tasks run
    CLOSED = 5  # the call of the app has returned
    UNANSWERED = 6  # it has returned before a response; an error page may still be sent from around us


def reason_of(error: BaseException, phase: Phase) -> str:
    """The reason for runs whose request ended with this error, in this phase."""
    if not isinstance(error, Exception):
        return "request_cancelled"
    if phase is Phase.COMPLETE:
        return "request_failed"
    if isinstance(error, HTTPException):
        # 4xx is the client's, 5xx the app's own failure.
        return "http_exception" if error.status_code < 500 else "handler_error"
    if type(error).__name__ in _VALIDATION_ERRORS:
        return "validation"
    if isinstance(error, (ClientDisconnect, WebSocketDisconnect)) or (
        isinstance(error, OSError) and phase >= Phase.RESPONDING
    ):
        return "client_gone"
    return "handler_error"
