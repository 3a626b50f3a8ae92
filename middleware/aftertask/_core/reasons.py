"""Why runs that were scheduled never started: the reasons of `tasks_not_run_total`."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.websockets import WebSocketDisconnect

#: The reasons for which a handler, or what came before it, failed; its compensating tasks run then.
HANDLER_FAILED = frozenset({"http_exception", "validation", "handler_error"})

#: FastAPI's validation errors, by name: FastAPI need not be installed.
_VALIDATION_ERRORS = ("RequestValidationError", "WebSocketRequestValidationError")


def reason_of(error: BaseException, *, has_started: bool, is_complete: bool) -> str:
    """
    The reason for runs whose request ended with this error.

    Args:
        error: What the app raised.
        has_started: Whether the response had started.
        is_complete: Whether its last byte had been sent.
    """
    if not isinstance(error, Exception):
        return "request_cancelled"
    if is_complete:
        return "request_failed"
    if isinstance(error, HTTPException):
        # 4xx is the client's, 5xx the app's own failure.
        return "http_exception" if error.status_code < 500 else "handler_error"
    if type(error).__name__ in _VALIDATION_ERRORS:
        return "validation"
    if isinstance(error, (ClientDisconnect, WebSocketDisconnect)) or (isinstance(error, OSError) and has_started):
        return "client_gone"
    return "handler_error"
